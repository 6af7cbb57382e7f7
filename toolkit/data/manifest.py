"""The record of a data set: `manifest.json`, written canonically and read strictly.

Guarantees: the same manifest on every machine gives the same text, whose sha256 is the data set's fingerprint; what is
read is bounded in size, of a known schema, with safe file names and counts that fit together. Does not: touch the shards
(`shards`).
"""

import errno
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from toolkit.disk import replace_file
from toolkit.errors import UserError
from toolkit.strict_json import parse_object

Split = Literal["train", "val"]

SPLITS: tuple[Split, ...] = ("train", "val")
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"  # vocabulary of a tokenizer of one's own, beside the shards
SET_TOKENIZERS = ("gpt2", "bytes")  # come with the toolkit; a set of any other tokenizer carries its vocabulary file
SCHEMA_VERSION = 1
MAX_SHARD_TOKENS = 2**31 - 1  # the shard's header counts in int32
MAX_MANIFEST_BYTES = 16 * 2**20  # about 50,000 shards; a larger file is not a manifest

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
UNSAFE_NAME = "a shard name may hold only letters, digits, '.', '_' and '-', and ends in .bin"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id fits, else uint32, both little-endian."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerInfo:
    """Which tokenizer made the ids; two sets may be mixed only if these are equal."""

    name: str
    vocab_size: int
    eot_id: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """What the manifest says of one shard; a document counts where it starts, `sha256` is that of the whole file."""

    file: str
    tokens: int
    documents: int
    utf8_bytes: int
    sha256: str
    largest_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A data set as one small immutable record, the same on every machine.

    `source` says where the text came from as plain JSON values; `prepare` keeps there `counts` (documents and bytes
    read, skipped, empty, ...) and `split_rule`. Times, absolute paths and worker counts have no place in it.

    Raises: UserError if a value breaks a rule; the message names all that do.
    """

    schema_version: int
    source: Mapping[str, Any]
    tokenizer: TokenizerInfo
    splits: Mapping[Split, tuple[ShardInfo, ...]]

    def __post_init__(self) -> None:
        problems = _manifest_problems(self)
        if problems:
            raise UserError("; ".join(problems))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the ids in every shard of the set."""
        return token_dtype(self.tokenizer.vocab_size)

    @property
    def fingerprint(self) -> str:
        """sha256 of the canonical text, which is also that of the file `manifest.json`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def totals(self, split: Split) -> dict[str, int]:
        """Tokens, documents and UTF-8 bytes of a split."""
        shards = self.splits[split]
        return {
            "tokens": sum(shard.tokens for shard in shards),
            "documents": sum(shard.documents for shard in shards),
            "utf8_bytes": sum(shard.utf8_bytes for shard in shards),
        }

    def to_json(self) -> str:
        """The canonical text: sorted keys, one space of indent, ASCII, a newline at the end."""
        values = {
            "schema_version": self.schema_version,
            "source": self.source,
            "tokenizer": asdict(self.tokenizer),
            "splits": {
                split: self.totals(split) | {"shards": [asdict(shard) for shard in self.splits[split]]}
                for split in SPLITS
            },
        }
        return json.dumps(values, sort_keys=True, indent=1, allow_nan=False) + "\n"


def _manifest_problems(manifest: Manifest) -> list[str]:
    tokenizer, shards = manifest.tokenizer, [shard for split in manifest.splits.values() for shard in split]
    problems = []
    if manifest.schema_version != SCHEMA_VERSION:
        problems.append(
            f"schema_version={manifest.schema_version} is not the {SCHEMA_VERSION} that this version of the toolkit reads"
        )
    if not 1 <= tokenizer.vocab_size <= 2**31 - 1:
        problems.append(f"tokenizer vocab_size={tokenizer.vocab_size} must be from 1 to {2**31 - 1}")
    if not 0 <= tokenizer.eot_id < tokenizer.vocab_size:
        problems.append(f"tokenizer eot_id={tokenizer.eot_id} must be below vocab_size={tokenizer.vocab_size}")
    if not _SAFE_NAME.fullmatch(tokenizer.name):
        problems.append(f"tokenizer name {tokenizer.name!r} may hold only letters, digits, '.', '_' and '-'")
    if not _SHA256.fullmatch(tokenizer.sha256):
        problems.append(f"tokenizer sha256 {tokenizer.sha256!r} is not 64 hexadecimal digits")
    if set(manifest.splits) != set(SPLITS):
        problems.append(f"splits {sorted(manifest.splits)} must be {sorted(SPLITS)}")
    names = Counter(shard.file for shard in shards)
    problems += [f"shard {name!r} is listed more than once" for name, count in names.items() if count > 1]
    for shard in shards:
        problems += [f"shard {shard.file!r}: {problem}" for problem in _shard_info_problems(shard, tokenizer)]
    return problems


def is_safe_shard_name(name: str) -> bool:
    """Whether a name can only mean a file in the folder of the set, on any system."""
    return bool(_SAFE_NAME.fullmatch(name)) and name.endswith(".bin")


def _shard_info_problems(shard: ShardInfo, tokenizer: TokenizerInfo) -> list[str]:
    problems = []
    if not is_safe_shard_name(shard.file):
        problems.append(UNSAFE_NAME)
    if not 1 <= shard.tokens <= MAX_SHARD_TOKENS:
        problems.append(f"tokens={shard.tokens} must be from 1 to {MAX_SHARD_TOKENS}")
    if not 0 <= shard.documents <= shard.tokens:
        problems.append(f"documents={shard.documents} must be from 0 to tokens={shard.tokens}")
    if not 0 <= shard.utf8_bytes < 2**63:
        problems.append(f"utf8_bytes={shard.utf8_bytes} must be from 0 to {2**63 - 1}")
    if not _SHA256.fullmatch(shard.sha256):
        problems.append(f"sha256 {shard.sha256!r} is not 64 hexadecimal digits")
    if not 0 <= shard.largest_id < tokenizer.vocab_size:
        problems.append(
            f"largest_id={shard.largest_id} must be below the tokenizer's vocab_size={tokenizer.vocab_size}"
        )
    return problems


def _parse_manifest(data: bytes) -> Manifest:
    try:
        values = parse_object(data)
    except ValueError as error:
        raise UserError(str(error)) from None
    version = values.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise UserError(
            f"schema_version={version!r} is not the {SCHEMA_VERSION} that this version of the toolkit reads"
        )
    fields = _fields(values, "manifest", {"schema_version": int, "source": dict, "tokenizer": dict, "splits": dict})
    splits = _fields(fields["splits"], "splits", dict.fromkeys(SPLITS, dict))
    shards: dict[Split, tuple[ShardInfo, ...]] = {}
    for split in SPLITS:
        totals = {"tokens": int, "documents": int, "utf8_bytes": int}
        entries = _fields(splits[split], f"splits.{split}", totals | {"shards": list})["shards"]
        shards[split] = tuple(
            ShardInfo(**_fields(entry, f"splits.{split}.shards[{index}]", ShardInfo.__annotations__))
            for index, entry in enumerate(entries)
        )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        source=fields["source"],
        tokenizer=TokenizerInfo(**_fields(fields["tokenizer"], "tokenizer", TokenizerInfo.__annotations__)),
        splits=shards,
    )
    for split in SPLITS:
        for name, total in manifest.totals(split).items():
            if splits[split][name] != total:
                raise UserError(f"splits.{split}.{name}={splits[split][name]} is not the sum over its shards, {total}")
    return manifest


def _fields(values: Any, where: str, types: Mapping[str, type]) -> dict[str, Any]:
    """`values` if it is an object with exactly these keys and types."""
    if not isinstance(values, dict):
        raise UserError(f"{where} is not an object")
    unknown, missing = sorted(set(values) - set(types)), sorted(set(types) - set(values))
    if unknown or missing:
        raise UserError(f"{where}: unknown keys {unknown}, missing keys {missing}; was it made by another version?")
    for name, kind in types.items():
        if type(values[name]) is not kind:  # `True` is no count
            raise UserError(f"{where}.{name}={str(values[name])[:80]!r} is not of type {kind.__name__}")
    return values


def is_url(path: str) -> bool:
    """True for a set far away, false for a folder."""
    return "://" in path


def safe_url(url: str) -> str:
    """The URL without user, password, query and fragment, which may hold secrets: for messages."""
    scheme, separator, rest = url.partition("://")  # by hand, because it has to name URLs that `urlsplit` refuses
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json`, the mark that the data set is complete.

    Raises: UserError if it is larger than what `read_manifest` accepts.
    """
    data = manifest.to_json().encode()
    if len(data) > MAX_MANIFEST_BYTES:
        shards = sum(len(split) for split in manifest.splits.values())
        raise UserError(
            f"{Path(folder) / MANIFEST_FILE}: {shards} shards make {len(data)} bytes, more than {MAX_MANIFEST_BYTES}; "
            "use larger shards (--shard-tokens)"
        )
    replace_file(Path(folder) / MANIFEST_FILE, data)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data folder, checked strictly; the shards themselves are not touched.

    Raises: UserError if the folder or the manifest is missing (naming the command that makes it) or not as it should be.
    """
    return decode_manifest(read_manifest_file(folder), where=str(Path(folder) / MANIFEST_FILE))


def read_manifest_file(folder: Path) -> bytes:
    """The bytes of the manifest of a data folder, at most one more than a manifest may have.

    Raises: UserError if the folder or the manifest is missing (naming the command that makes it), or it is no regular file.
    """
    folder = Path(folder)
    path = folder / MANIFEST_FILE
    if not folder.exists():
        raise UserError(f"{folder} does not exist; {_how_to_make(folder)}")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds {MANIFEST_FILE}")
    try:
        with open_regular(path) as file:
            data: bytes = file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise UserError(_no_manifest(folder)) from None
    return data


def decode_manifest(data: bytes, *, where: str) -> Manifest:
    """The manifest in the bytes of a file.

    Raises: UserError if it is not one of ours to the letter: too large, another schema, unknown or missing keys, values out
    of bounds, unsafe file names, totals that do not fit.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise UserError(f"{where} is larger than {MAX_MANIFEST_BYTES} bytes, more than any manifest of ours")
    try:
        return _parse_manifest(data)
    except UserError as error:
        raise UserError(f"{where}: {error}; put the file back as it was made, or make the set again") from None


def own_tokenizer_file(folder: Path, manifest: Manifest) -> Path | None:
    """The vocabulary file of a set of a tokenizer of one's own; None for the tokenizers that come with the toolkit.

    Raises: UserError if the set lacks it.
    """
    if manifest.tokenizer.name in SET_TOKENIZERS:
        return None
    path = folder / TOKENIZER_FILE
    if not path.exists():
        raise UserError(
            f"{path} is missing: the set was made with a tokenizer of its own, {manifest.tokenizer.name!r} of sha256 "
            f"{manifest.tokenizer.sha256[:12]}; put its file back or prepare the data again"
        )
    return path


def _how_to_make(folder: Path) -> str:
    if folder.name == "fineweb-edu-10b":
        return f"make it with `make prepare-data`, or another set with `toolkit prepare PATH... --out {folder}`"
    return f"make it with `toolkit prepare PATH... --out {folder}`"


def _no_manifest(folder: Path) -> str:
    if any(folder.glob("*.bin")):
        return (
            f"{folder} holds shards but no {MANIFEST_FILE}; run the same `toolkit prepare ... --out {folder}` again to "
            f"finish it, or, for llm.c shards, `toolkit adopt {folder}`"
        )
    what = "is empty" if not any(folder.iterdir()) else f"has no {MANIFEST_FILE}"
    return f"{folder} {what}; {_how_to_make(folder)}, or, for llm.c shards, `toolkit adopt {folder}`"


def open_regular(path: Path) -> Any:
    """A regular file opened for reading in binary; never through a symbolic link.

    Raises: UserError for a link, a folder or a device; FileNotFoundError if there is nothing.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, which could lead anywhere; put the file itself there")
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise UserError(f"{path} is not a regular file") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)
