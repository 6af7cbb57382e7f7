"""Small files of a run: JSON that is strict both ways, bounded reads.

Guarantees: a read opens regular files of a bounded size only and gives back either what was written or a
`DamagedFileError`. Does not: write (`disk`); nothing here knows what the files mean.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolkit.disk import CHUNK, sync_folder
from toolkit.errors import UserError
from toolkit.strict_json import parse_object

MAX_JSON_BYTES = 16 << 20  # of a JSON file that is parsed


class DamagedFileError(UserError):
    """A file is not what was once written there: another copy of it has to be used."""


def render_json(values: Mapping[str, Any]) -> bytes:
    """The values as an indented JSON file. Raises: ValueError for a NaN or infinity, which JSON does not have."""
    return (json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def parse_json(data: bytes, *, where: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises: DamagedFileError for anything else: a key given twice, NaN, nesting without end, other encodings.
    """
    try:
        return parse_object(data)
    except ValueError as error:
        raise DamagedFileError(f"{where} {error}") from None


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with a "sha256" of their own: of all other keys as JSON, sorted and without spaces."""
    content = {key: value for key, value in values.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def is_as_sealed(values: Mapping[str, Any], data: bytes) -> bool:
    """Whether a file's content `data`, parsed to `values`, is byte for byte what `render_json(sealed(...))` wrote.

    Why bytes: JSON does not mind another space or another way to write a number, but a flipped byte it is.
    """
    try:
        return render_json(sealed(values)) == data
    except (ValueError, RecursionError):  # nested too deeply to be written again
        return False


def set_aside(path: Path) -> Path:
    """Renames what cannot be used, whatever it is, to a free name beside it: NAME.damaged, NAME.damaged-2, ..."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged" + (f"-{number}" if number > 1 else ""))):
        number += 1
    path.rename(aside)
    sync_folder(path.parent)
    return aside


@contextmanager
def opened(path: Path, *, size: int | None = None) -> Iterator[int]:
    """A descriptor of a regular file (no symbolic link, no pipe), of exactly `size` bytes if that is given.

    Raises: DamagedFileError if the file is another one, is missing, or its disk cannot read it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedFileError(f"{path} is missing") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedFileError(f"{path} is a symbolic link, not a file") from None
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise DamagedFileError(f"{path} is not a regular file")
        if size is not None and found.st_size != size:
            raise DamagedFileError(f"{path} has {found.st_size} bytes, the manifest says {size}")
        yield descriptor
    except OSError as error:
        if error.errno == errno.EIO:  # a sector that cannot be read is damage like any other
            raise DamagedFileError(f"{path} cannot be read ({error.strerror})") from None
        raise
    finally:
        os.close(descriptor)


def read_bounded(path: Path, *, size: int | None = None, most: int = MAX_JSON_BYTES) -> bytes:
    """The content of a small file. Raises: DamagedFileError as `opened` does, and for more than `most` bytes."""
    with opened(path, size=size) as descriptor:
        found = os.fstat(descriptor).st_size
        if found > most:
            raise DamagedFileError(f"{path} has {found} bytes, more than the {most} that such a file may have")
        data = b""
        while part := os.pread(descriptor, found - len(data), len(data)):
            data += part
        return data


def stream_sha256(descriptor: int) -> str:
    """The hash of an open file of any size, read through a small buffer."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(CHUNK, os.fstat(descriptor).st_size)))
    position = 0
    while count := os.preadv(descriptor, [buffer], position):
        digest.update(buffer[:count])
        position += count
    return digest.hexdigest()
