"""JSON of files whose meaning must not depend on the reader: what Python's own reader lets pass is refused."""

import json
import math
from typing import Any


class _RefusedError(ValueError):
    """Valid for Python's reader, not for ours; the message is the whole reason."""


def parse_object(data: bytes) -> dict[str, Any]:
    """The object in a JSON file, which may begin with a byte order mark, as some editors write it.

    Raises: ValueError for anything else: other values, a key given twice, NaN, nesting without end, other encodings; its
    message goes on after the file's name ("is not valid JSON (...)").
    """
    try:
        values = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite
        )
    except _RefusedError:
        raise
    except RecursionError:
        raise ValueError("is not valid JSON (nested too deeply)") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(values, dict):
        raise ValueError("does not hold a JSON object")
    return values


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _RefusedError("holds a key twice in one object")
    return values


def _no_constant(name: str) -> Any:
    raise _RefusedError(f"holds {name[:80]}, which is no finite number")


def _finite(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _no_constant(number)
