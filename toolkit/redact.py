"""Any value that is about to be written or sent -> the same value without secrets.

What counts as one: the value of an environment variable that is named like a secret, a token of a known shape
(`hf_...`), the user and password inside a URL, the signature in a URL's query, and whatever stands under a key such as
`api_key`. Guarantees: numbers, booleans and None never change, neither do hashes, revisions and names such as
`tokens_per_step`. It does not look inside files, and a secret that looks like an ordinary word it cannot know.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

REDACTED = "[redacted]"

# Shorter values ("1", "true", "gpt2") would blot out ordinary text wherever they occur.
MIN_SECRET_CHARACTERS = 8

_SECRET_WORDS = {
    *("KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "PASS", "PWD", "PAT", "AUTH", "BEARER"),
    *("CREDENTIAL", "CREDENTIALS", "COOKIE", "SIGNATURE"),
}
# PGPASSWORD, MYAPIKEY: the word at the end of a longer one.
_SECRET_ENDINGS = ("PASSWORD", "PASSWD", "SECRET", "APIKEY", "TOKEN")
# HF_TOKEN_PATH and the like say where a secret is or how it is made, not what it is; PWD and OLDPWD are folders.
_DESCRIBING_WORDS = {"PATH", "FILE", "DIR", "SOCK", "MODE", "TYPE", "NAME", "COUNT", "SIZE", "LENGTH", "TTL", "TIMEOUT"}
_ORDINARY_VARIABLES = {"PWD", "OLDPWD"}

_SECRET_KEYS = {
    *("api_key", "apikey", "password", "passwd", "passphrase", "secret", "secret_key", "client_secret"),
    *(
        "access_key",
        "access_key_id",
        "secret_access_key",
        "session_token",
        "private_key",
        "credentials",
        "authorization",
    ),
    *("auth", "auth_token", "access_token", "refresh_token", "hf_token", "token", "wandb_api_key", "bearer_token"),
}

_KNOWN_TOKENS = re.compile(
    r"\b(?:"
    r"hf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{16,}|hf_[A-Za-z0-9]{24,}"  # Hugging Face
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"  # GitHub
    r"|wandb_v\d_\w{20,}"  # Weights & Biases
    r"|A(?:KIA|SIA)[A-Z0-9]{16}"  # AWS
    r"|sk-[A-Za-z0-9_-]{20,}"  # OpenAI and others
    r")"
)
_USERINFO = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/?#@]*(?:@[^\s/?#@]*)*@")
_URL_QUERY = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s?#]*)([?#]\S*)")
_SIGNED_PARAMETER = re.compile(
    r"(?i)([?&#;](?:x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|awsaccesskeyid|sig"
    r"|signature|key-pair-id|policy|token|access_token|auth_token|id_token|api_?key|key|password|secret|auth)=)[^&#;\s\"'<>]+"
)
_BEARER = re.compile(r"(?i)(\bbearer\s+)[A-Za-z0-9._~+/=-]{8,}")


def redact(value: Any, *, environ: Mapping[str, str] | None = None) -> Any:
    """A copy of a JSON-like value (or text) in which every secret reads `[redacted]`."""
    return _redact(value, secret_values(os.environ if environ is None else environ))


def secret_values(environ: Mapping[str, str]) -> list[str]:
    """The environment's secrets, longest first, so that one which contains another is replaced as a whole."""
    return sorted({value for name, value in environ.items() if _is_secret(name, value)}, key=lambda s: (-len(s), s))


def _is_secret(name: str, value: str) -> bool:
    if len(value) < MIN_SECRET_CHARACTERS or name in _ORDINARY_VARIABLES:
        return False
    words = [word for word in re.split(r"[^A-Z0-9]+", name.upper()) if word]
    named = any(word in _SECRET_WORDS or word.endswith(_SECRET_ENDINGS) for word in words)
    if not named or words[-1] in _DESCRIBING_WORDS:
        return False
    return not _is_number(value) and not (value.startswith(("/", "~")) and os.path.exists(os.path.expanduser(value)))  # noqa: PTH110, PTH111


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _redact(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        return _redact_text(value, secrets)
    if isinstance(value, Mapping):
        return {
            key: REDACTED if _is_secret_key(key) and isinstance(item, str) and item else _redact(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [REDACTED if _is_flag_value(value, k) else _redact(item, secrets) for k, item in enumerate(value)]
    return value


def _is_secret_key(key: Any) -> bool:
    return isinstance(key, str) and key.lower().replace("-", "_") in _SECRET_KEYS


def _is_flag_value(arguments: Sequence[Any], index: int) -> bool:
    """True for what follows a flag such as --wandb.api-key in a command line."""
    flag, value = arguments[index - 1] if index else None, arguments[index]
    return (
        isinstance(flag, str)
        and isinstance(value, str)
        and flag.startswith("--")
        and not value.startswith("--")
        and _is_secret_key(flag.lstrip("-").rpartition(".")[2])
    )


def _redact_text(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    text = _KNOWN_TOKENS.sub(REDACTED, text)
    if "://" in text:
        text = _USERINFO.sub(rf"\1{REDACTED}@", text)
        text = _URL_QUERY.sub(lambda url: url[1] + _SIGNED_PARAMETER.sub(rf"\1{REDACTED}", url[2]), text)
    flag, is_assignment, value = text.partition("=")  # --wandb.api-key=...
    if is_assignment and value and flag.startswith("--") and _is_secret_key(flag.lstrip("-").rpartition(".")[2]):
        return f"{flag}={REDACTED}"
    return _BEARER.sub(rf"\1{REDACTED}", text)
