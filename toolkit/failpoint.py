"""Named points where a test can make the process die, stall or fail; nothing at all happens when none is set.

`TOOLKIT_FAILPOINTS="checkpoint.before-rename=kill"` kills the process (SIGKILL) when it passes that point. Several are
separated by `;`. An action is `kill`, `fail` (raises OSError ENOSPC), `raise` (raises RuntimeError), `sleep:SECONDS` or
`exit:STATUS`; `@N` acts at the N-th passage only (counted from 1), `@N+` from the N-th on, and `#R` in the process of
rank R only: `checkpoint.before-rename#0=kill@2`.
"""

import errno
import os
import signal
import time

VARIABLE = "TOOLKIT_FAILPOINTS"

_passages: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Acts if the environment names this point; one dictionary look-up otherwise.

    Raises: OSError, RuntimeError or SystemExit when the environment asks for it; ValueError for an unknown action.
    """
    settings = os.environ.get(VARIABLE)
    if settings:
        _act(name, settings)


def is_set(name: str) -> bool:
    """True if the environment names this point."""
    points = [setting.partition("=")[0] for setting in os.environ.get(VARIABLE, "").split(";")]
    return name in [point.partition("#")[0].strip() for point in points]


def _act(name: str, settings: str) -> None:
    _passages[name] = passage = _passages.get(name, 0) + 1
    for setting in settings.split(";"):
        point, _, action = setting.strip().partition("=")
        point, _, rank = point.partition("#")
        if point != name or (rank and rank != os.environ.get("RANK", "0")):
            continue
        action, _, when = action.partition("@")
        first = int(when.rstrip("+") or 0)
        if not when or passage == first or (when.endswith("+") and passage > first):
            _perform(name, action)


def _perform(name: str, action: str) -> None:
    verb, _, value = action.partition(":")
    match verb:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(int(value))
        case "sleep":
            time.sleep(float(value))
        case "fail":
            raise OSError(errno.ENOSPC, f"No space left on device (failpoint {name})")
        case "raise":
            raise RuntimeError(f"failpoint {name}")
        case _:
            raise ValueError(f"{VARIABLE}: unknown action {action!r} at {name}")
