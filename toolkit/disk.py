"""What becomes durable: files as a whole, and names in a folder."""

import contextlib
import errno
import os
from collections.abc import Sequence
from pathlib import Path

from toolkit.failpoint import failpoint

CHUNK = 16 << 20  # bytes per write and per read: large enough to cost no time, small enough to overlap with hashing
BEHIND = 64 << 20  # bytes that the disk may lag behind before they are dropped from memory


def write_new_file(path: Path, pieces: Sequence[memoryview], *, half_way: str | None = None) -> None:
    """Writes a file that does not exist yet and fsyncs it; its mode is 0666 without the umask's bits.

    `half_way` names a failure point that is passed when half of the bytes are written.
    """
    middle = sum(map(len, pieces)) // 2
    written = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
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
    """Puts a file in place as a whole, on disk when this returns.

    Whoever reads `path`, at any time and after any failure, sees the old content or the new.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that what a killed process left goes away
    try:
        temporary.unlink(missing_ok=True)
        write_new_file(temporary, [memoryview(data)])
        failpoint("files.before-replace")
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # the first error is the one to read
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable; systems that cannot do this for folders are left to themselves."""
    if os.name == "nt":  # folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)
