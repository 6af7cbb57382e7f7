"""Small files of a run -> disk and back: JSON that is strict both ways, durable writes, bounded reads.

Guarantees: a write is on disk when it returns; a read opens regular files of a bounded size only and gives back either
what was written or a `DamagedFileError`. Nothing here knows what the files mean.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolkit.disk import sync_folder
from toolkit.errors import UserError
from toolkit.failpoint import failpoint

MAX_JSON_BYTES = 16 << 20  # of a JSON file that is parsed
CHUNK = 16 << 20  # bytes per write and per read: large enough to cost no time, small enough to overlap with hashing
BEHIND = 64 << 20  # bytes that the disk may lag behind before they are dropped from memory


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
        values = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DamagedFileError(f"{where} is not valid JSON ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(values, dict):
        raise DamagedFileError(f"{where} does not hold a JSON object")
    return values


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key is given twice")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is too large")
    return value


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


def write_new_file(path: Path, pieces: Sequence[memoryview], *, half_way: str | None = None) -> None:
    """Writes a file that does not exist yet and fsyncs it; its mode is 0666 without the umask's bits.

    `half_way` names a failure point that is passed when half of the bytes are written.
    """
    middle = sum(map(len, pieces)) // 2
    written = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in pieces:
            position = 0
            while position < len(piece):
                if half_way and written >= middle:
                    failpoint(half_way)
                    half_way = None
                most = min(CHUNK, middle - written) if half_way else CHUNK
                count = os.write(descriptor, piece[position : position + most])
                position, written = position + count, written + count
                _start_writing_back(descriptor, written)
        os.fsync(descriptor)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        os.close(descriptor)


def _start_writing_back(descriptor: int, written: int) -> None:
    """Has the disk work while the next bytes are prepared, and memory freed of bytes that are on disk already.

    Why: the fsync at the end then has almost nothing left to wait for, and a checkpoint does not push the training
    data out of the page cache. DONTNEED starts writing what is dirty and drops what is clean, so that the second call
    for the same bytes, `BEHIND` later, frees them. Source: Linux, mm/fadvise.c.
    """
    if hasattr(os, "posix_fadvise") and written >= CHUNK:
        start = max(0, written - CHUNK - BEHIND)
        os.posix_fadvise(descriptor, start, written - start, os.POSIX_FADV_DONTNEED)


def replace_file(path: Path, data: bytes) -> None:
    """Puts a file in place as a whole: whoever reads `path`, at any time, sees the old content or the new."""
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that what a killed process left goes away
    try:
        temporary.unlink(missing_ok=True)
        write_new_file(temporary, [memoryview(data)])
        failpoint("files.before-replace")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


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
