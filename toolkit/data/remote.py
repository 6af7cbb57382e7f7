"""A prepared set far away, read as if it were local: shards are fetched ahead of need into a bounded cache on disk.

`https://` and `http://` go through the standard library, every other URL (`hf://`, `s3://`, `memory://`, ...) through
fsspec. The loader says which shards it needs now and which come next; background threads fetch them, check size and sha256
against the manifest, and hold them; what is no longer needed is dropped. Several processes on one machine share the cache:
all changes of its files happen under one lock, a shard in use carries a shared lock, one being fetched an exclusive lock,
and the kernel frees the locks of a process that dies.

Guarantees: no byte is used that the manifest's sha256 does not cover; the cache stays within its limit; a link that
fails is tried again with back-off, a shard that fails its hash is fetched once more, then a clear error. Does not: decide
the order (`order`), or trust a cached file without hashing it.
"""

import base64
import contextlib
import functools
import hashlib
import http.client
import logging
import math
import os
import re
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.data.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    SET_TOKENIZERS,
    TOKENIZER_FILE,
    Manifest,
    ShardInfo,
    Split,
    decode_manifest,
    open_regular,
    safe_url,
)
from toolkit.data.shards import (
    HEADER_BYTES,
    Shard,
    content_problems,
    header_problem,
    manifest_problems,
    read_at,
    scan_shard,
    shard_bytes,
    tokenizer_problems,
    verify_shards,
)
from toolkit.disk import replace_file
from toolkit.errors import UserError, describe_os_error
from toolkit.failpoint import failpoint

logger = logging.getLogger(__name__)

PIECE_BYTES = 2**20  # read from the link at one time
FETCH_THREADS = 4  # shards fetched at one time per process; object stores limit each connection
READ_TIMEOUT_SECONDS = 30.0  # a connection that gives nothing for this long has stalled
OUTAGE_SECONDS = 600.0  # a link without progress for this long is given up, while a step waits
OPEN_OUTAGE_SECONDS = 10.0  # the same for the manifest, while the user waits
FIRST_BACKOFF_SECONDS, LAST_BACKOFF_SECONDS = 0.5, 30.0
BUSY_SECONDS = 0.1  # before asking again for a shard that another process is fetching, or for room
BUSY, NO_ROOM = "another process is fetching it", "the cache is full"  # why a fetch has to wait
NO_ROOM_SECONDS = 60.0  # a shard that is needed now and finds no room for this long is an error
REPORT_SECONDS = 10.0  # between log lines while a step waits for the link
FETCH_AGAIN = 1  # fetches after one that failed its hash
MAX_TOKENIZER_BYTES = 64 * 2**20

# What has a meaning in a path or query; "%" begins what is quoted already. Source: RFC 3986, sec. 2.2 and 3.3.
URL_CHARACTERS = "%/?:@!$&'()*+,;=~"

LINK_ERRORS = (OSError, http.client.HTTPException, EOFError)


def _request_parts(url: str) -> tuple[urllib.parse.SplitResult, str | None]:
    """The URL as a request may hold it: without user and fragment, its host in IDNA, nothing left to quote; and the value
    of the Authorization header that user and password make.

    Raises: UserError if no server can ever be asked for it.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError as error:
        raise UserError(f"{safe_url(url)}: {error}; use a URL such as https://HOST:PORT/FOLDER") from None
    if not host or re.search(r"[\x00-\x20\x7f]", host):
        raise UserError(f"{safe_url(url)} names no host; use a URL such as https://HOST:PORT/FOLDER")
    host = f"[{host}]" if ":" in host else host
    authorization = None
    if parts.username is not None:
        user, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
        authorization = f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"
    path, query = (urllib.parse.quote(part, safe=URL_CHARACTERS) for part in (parts.path.rstrip("/"), parts.query))
    return parts._replace(
        netloc=host if port is None else f"{host}:{port}", path=path, query=query, fragment=""
    ), authorization


def _one_safe_line(text: str) -> str:
    """The start of a foreign message without the queries of its URLs, which may be signed."""
    return re.sub(r"\?[^\s'\"]+", "?...", " ".join(text.split()))[:200]


class _LinkError(Exception):
    """Trouble that may pass: the fetch is tried again."""


class _NotNowError(Exception):
    """A shard cannot be fetched by this process at this moment."""


class RemoteFolder:
    """Files of a folder far away, as streams of bytes from any offset."""

    def __init__(self, url: str) -> None:
        """Raises: UserError for a URL that can never work."""
        self.url = url
        self.where = safe_url(url).rstrip("/")
        self._http = _request_parts(url) if url.startswith(("http://", "https://")) else None

    def stream(self, name: str, start: int) -> Generator[bytes, None, None]:
        """The bytes of a file from an offset on; none if it ends before.

        Raises: UserError for what will not pass (no such file, no access, a package that is missing); _LinkError for what may.
        """
        try:
            if self._http is not None:
                yield from self._stream_http(*self._http, name, start)
            else:
                yield from self._stream_fsspec(name, start)
        except urllib.error.HTTPError as error:
            if error.code == 416 and start:  # there is nothing from `start` on
                return
            if error.code in (408, 425, 429) or error.code >= 500:
                raise _LinkError(f"HTTP status {error.code}") from None
            raise UserError(
                f"{self.where}/{name}: HTTP status {error.code}; check the URL and your access to it"
            ) from None
        except FileNotFoundError:
            raise UserError(f"{self.where}/{name} does not exist; check the URL") from None
        except PermissionError:
            raise UserError(f"{self.where}/{name}: access denied; log in, or check the URL") from None
        except LINK_ERRORS as error:
            raise _LinkError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from None

    def _stream_http(
        self, folder: urllib.parse.SplitResult, authorization: str | None, name: str, start: int
    ) -> Iterator[bytes]:
        request = urllib.request.Request(  # noqa: S310 - the caller has checked the scheme
            folder._replace(path=f"{folder.path}/{urllib.parse.quote(name)}").geturl(),
            headers={"Accept-Encoding": "identity"},
        )
        if authorization is not None:
            request.add_unredirected_header("Authorization", authorization)  # another host must not read it
        if start:
            request.add_header("Range", f"bytes={start}-")
        with urllib.request.urlopen(request, timeout=READ_TIMEOUT_SECONDS) as response:  # noqa: S310
            skip, left = start, response.length
            if response.status == 206:
                begun = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
                if begun != str(start):
                    raise _LinkError(f"asked for bytes from {start} on and got them from {begun!r} on")
                skip = 0
            while piece := response.read1(PIECE_BYTES):  # what is there, so that a stall loses nothing
                yield piece[skip:]
                skip = max(0, skip - len(piece))
                left = None if left is None else left - len(piece)
            if left:
                raise _LinkError(f"the connection closed {left} bytes before the end")

    def _stream_fsspec(self, name: str, start: int) -> Iterator[bytes]:
        import fsspec  # only sets that are far away need it

        try:
            filesystem, folder = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise UserError(f"{self.where}: {error}; install the package that it names") from None
        except ValueError as error:
            raise UserError(f"{self.where}: {error}; use a folder or a URL such as hf://, s3:// or https://") from None
        try:
            with filesystem.open(f"{folder.rstrip('/')}/{name}", "rb") as file:
                file.seek(start)
                while piece := file.read(PIECE_BYTES):
                    yield piece
        except LINK_ERRORS:
            raise
        except Exception as error:  # every file system has errors of its own, most of them of the link
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403, 404):
                raise UserError(
                    f"{self.where}/{name}: HTTP status {status}; check the URL and your access to it"
                ) from None
            raise _LinkError(f"{type(error).__name__}: {_one_safe_line(str(error))}") from None

    def read_small(self, name: str, *, limit: int) -> bytes:
        """A whole small file, at most `limit` + 1 bytes of it.

        Raises: UserError if it cannot be read.
        """
        data = bytearray()
        for piece in self.patiently(name, limit + 1, patience=OPEN_OUTAGE_SECONDS):
            data += piece
        return bytes(data)

    def patiently(self, name: str, size: int, *, patience: float) -> Iterator[bytes]:
        """The first `size` bytes of a file, going on where a failed connection stopped; fewer if the file is shorter.

        Raises: UserError if `patience` seconds pass without a byte.
        """
        done, failures, last_progress = 0, 0, time.monotonic()
        while True:
            try:
                with contextlib.closing(self.stream(name, done)) as pieces:
                    for piece in pieces:
                        if piece:
                            yield piece[: size - done]
                            done, failures, last_progress = done + len(piece), 0, time.monotonic()
                        if done >= size:
                            return
                return
            except _LinkError as error:
                failures += 1
                wait = min(FIRST_BACKOFF_SECONDS * 2 ** (failures - 1), LAST_BACKOFF_SECONDS)
                if time.monotonic() - last_progress + wait > patience:
                    raise UserError(
                        f"{self.where}/{name}: no progress for {time.monotonic() - last_progress:.0f} s in {failures} "
                        f"attempts ({error}); check the connection and start again, nothing is lost"
                    ) from None
                logger.warning("%s/%s: %s; trying again in %.1f s", self.where, name, error, wait)
                time.sleep(wait)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Key:
    """One shard of one set: where it comes from and what it must be."""

    folder: str  # of its set, below the cache's folder
    info: ShardInfo
    manifest: Manifest
    source: RemoteFolder

    def __hash__(self) -> int:
        return hash((self.folder, self.info.file))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and (self.folder, self.info.file) == (other.folder, other.info.file)

    @property
    def size(self) -> int:
        return shard_bytes(self.info.tokens, self.manifest.dtype)

    @property
    def where(self) -> str:
        return f"{self.source.where}/{self.info.file}"


class ShardCache:
    """A folder of shards that stays within `limit_bytes`, shared by the processes of a machine.

    `NAME.bin` is a whole shard that had the right sha256, `NAME.bin.part` one that is being fetched, at its full size from
    the start so that it counts. A file whose lock nobody holds may be removed by anyone who needs the room.
    """

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        try:
            import fcntl
        except ImportError:
            raise UserError(
                "a remote data set needs file locks that this system does not have; copy it to a folder"
            ) from None
        self._fcntl = fcntl
        self.folder = folder
        self.limit_bytes = limit_bytes
        folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """While this lasts no other process changes what is in the cache."""
        with (self.folder / ".lock").open("ab") as file:
            self._fcntl.flock(file, self._fcntl.LOCK_EX)
            yield  # closing the file frees the lock

    def _try_lock(self, file: Any) -> bool:
        try:
            self._fcntl.flock(file, self._fcntl.LOCK_EX | self._fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def path(self, key: _Key) -> Path:
        """Where the whole shard lies."""
        return self.folder / key.folder / key.info.file

    def open_whole(self, key: _Key) -> Any | None:
        """The cached shard, opened and held against removal, or None; its content is not checked."""
        with self.locked():
            try:
                file = open_regular(self.path(key))
            except FileNotFoundError:
                return None
            self._fcntl.flock(file, self._fcntl.LOCK_SH)
            return file

    def begin(self, key: _Key, *, kept: frozenset[_Key]) -> Any:
        """A locked file to write the shard into.

        Makes room by removing shards that no process holds, oldest first, except those in `kept`.
        Raises: _NotNowError while another process fetches it, or there is no room.
        """
        kept_paths = {self.path(other) for other in kept}
        part = self.path(key).with_name(f"{key.info.file}.part")
        with self.locked():
            part.parent.mkdir(parents=True, exist_ok=True)
            if self.path(key).exists() or (part.exists() and not self._remove(part)):
                raise _NotNowError(BUSY)
            files = sorted(self.files(), key=lambda item: item[1].st_mtime)
            excess = sum(status.st_size for _, status in files) + key.size - self.limit_bytes
            for path, status in files:
                if excess > 0 and path not in kept_paths and self._remove(path):
                    excess -= status.st_size
            if excess > 0:
                raise _NotNowError(NO_ROOM)
            file = part.open("x+b")
            self._try_lock(file)
            os.truncate(file.fileno(), key.size)
            return file

    def files(self) -> list[tuple[Path, os.stat_result]]:
        """Every shard in the cache, whole or being fetched."""
        found = []
        for pattern in ("*/*.bin", "*/*.bin.part"):
            for path in self.folder.glob(pattern):
                with contextlib.suppress(FileNotFoundError):
                    found.append((path, path.lstat()))
        return found

    def _remove(self, path: Path) -> bool:
        """Removes a file unless some process holds it; call with the cache locked."""
        try:
            with path.open("r+b") as file:  # NFS gives an exclusive lock only to those who may write
                if not self._try_lock(file):
                    return False
                path.unlink()
        except FileNotFoundError:
            pass
        return True

    def finish(self, key: _Key, file: Any) -> None:
        """Gives the complete file its name; from now on it is held like a whole shard."""
        failpoint("remote.before-rename")
        with self.locked():
            Path(f"{self.path(key)}.part").replace(self.path(key))
            self._fcntl.flock(file, self._fcntl.LOCK_SH)

    def abandon(self, key: _Key, file: Any) -> None:
        """Removes a file that was begun."""
        with self.locked():
            Path(f"{self.path(key)}.part").unlink(missing_ok=True)
            file.close()

    def remove(self, key: _Key) -> None:
        """Removes a shard that no process holds any more."""
        with self.locked():
            self._remove(self.path(key))

    def remove_damaged(self, key: _Key, file: Any) -> None:
        """Removes a shard found damaged, even if others hold it, unless another process has replaced it by now."""
        with self.locked(), contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), self.path(key).stat()):
                self.path(key).unlink()
        file.close()


class Fetcher:
    """Keeps the shards that are needed now and soon on this machine, in background threads that live while there is work.

    What is needed now is held: open, and locked against removal. What is needed soon lies in the cache unlocked, so that
    another run that needs room now can have it; the worst that happens then is that it is fetched again.
    """

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._changed = threading.Condition()
        self._needs: dict[tuple[str, Split], tuple[list[_Key], list[_Key]]] = {}  # (now, soon) of each set and split
        self._demanded: _Key | None = None  # what a read is waiting for
        self._held: dict[_Key, Any] = {}
        self._ready: set[_Key] = set()  # fetched for later
        self._verified: dict[_Key, _Identity] = {}  # files whose sha256 this process has seen to be right
        self._active: set[_Key] = set()
        self._deferred: dict[_Key, tuple[float, float, str]] = {}  # not before this moment, waited so far, why
        self._failed: dict[_Key, Exception] = {}
        self._discarded: list[_Key] = []
        self._threads = 0
        self.total_bytes = 0  # of all sets that are read through this object
        self.seconds_waited = 0.0  # time for which reads had to wait for the link

    def small_file(self, folder: str, name: str, data: bytes) -> Path:
        """Keeps a small file of a set beside its shards; it stays and does not count."""
        path = self._cache.folder / folder / name
        with self._cache.locked():  # several processes start together
            if not path.is_file() or path.read_bytes() != data:
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, data)
        return path

    @property
    def limit_bytes(self) -> int:
        """The most disk that the cache uses."""
        return self._cache.limit_bytes

    def need(self, name: tuple[str, Split], now: Sequence[_Key], soon: Sequence[_Key]) -> None:
        """Replaces what a split of a set needs: `now` is fetched first, then `soon`; what nobody needs is dropped.

        Raises: UserError if the cache can never hold at one time what all splits and sets need now.
        """
        with self._changed:
            self._needs[name] = (list(now), list(soon))
            self._check_room()
            self._failed.clear()  # what failed while it was not urgent may be had by now
            urgent, kept = self._urgent(), self._kept()
            for key in self._ready & urgent:
                self._hold_ready(key)
            unneeded = [key for key in {*self._held, *self._ready} if key not in kept]
            for key in [key for key in self._held if key not in urgent]:
                self._held.pop(key).close()
                self._ready.add(key)
            self._ready -= {*unneeded}
            if self.total_bytes > self.limit_bytes:  # sets that fit as a whole stay, for the next epoch
                self._discarded += unneeded
            self._start_threads()

    def _check_room(self) -> None:
        needed = {key for now, _ in self._needs.values() for key in now}
        size = sum(key.size for key in needed)
        if size > self.limit_bytes:
            raise UserError(
                f"data.cache_gib={self.limit_bytes / 2**30:g} is too small: a micro-batch of training and one of validation "
                f"lie in {len(needed)} shards of {size / 2**30:.3g} GiB; use --data.cache-gib "
                f"{math.ceil(size / 2**30 * 10) / 10:g}, smaller micro-batches, or larger shards"
            )

    def _hold_ready(self, key: _Key) -> None:
        """Opens a shard that was fetched earlier; if it was removed since, it is to be fetched again."""
        self._ready.discard(key)
        file = self._cache.open_whole(key)
        if file is not None and _identity(file) == self._verified.get(key):
            self._held[key] = file

    def read_into(self, key: _Key, buffer: memoryview, offset: int) -> int:
        """Fills the buffer from a shard, waiting until it is there.

        Raises: UserError if it cannot be had.
        """
        file = self._held.get(key)
        if file is None:
            file = self._wait_for(key)
        return read_at(file, buffer, offset)

    def _wait_for(self, key: _Key) -> Any:
        start = reported = time.monotonic()
        with self._changed:
            self._failed.pop(key, None)
            self._deferred.pop(key, None)
            self._ready.discard(key)
            self._demanded = key
            try:
                while key not in self._held:
                    if key in self._failed:
                        raise self._failed.pop(key)
                    self._start_threads()
                    self._changed.wait(1.0)
                    if time.monotonic() - reported > REPORT_SECONDS:
                        reported = time.monotonic()
                        obstacle = self._deferred[key][2] if key in self._deferred else "it is being fetched"
                        logger.warning(
                            "training waits for %s, %.0f s so far: %s", key.where, reported - start, obstacle
                        )
            finally:
                self._demanded = None
                self.seconds_waited += time.monotonic() - start
            return self._held[key]

    def _urgent(self) -> frozenset[_Key]:
        needed = [key for now, _ in self._needs.values() for key in now]
        return frozenset([*needed, self._demanded] if self._demanded else needed)

    def _kept(self) -> frozenset[_Key]:
        return self._urgent().union(*(soon for _, soon in self._needs.values()))

    def _pending(self) -> list[_Key]:
        """What is to be fetched, the most urgent first."""
        wanted = [self._demanded] if self._demanded else []
        wanted += [key for now, _ in self._needs.values() for key in now]
        wanted += [key for _, soon in self._needs.values() for key in soon]
        done = {*self._held, *self._ready, *self._active, *self._failed}
        return [key for key in dict.fromkeys(wanted) if key not in done]

    def _start_threads(self) -> None:
        work = len(self._pending()) + bool(self._discarded)
        while self._threads < min(FETCH_THREADS, work):
            self._threads += 1
            threading.Thread(target=_work, args=(weakref.ref(self),), name="shard-fetcher", daemon=True).start()
        self._changed.notify_all()

    def work_once(self) -> bool:
        """Drops what is not needed and fetches one shard that is; False once a thread has nothing left to do."""
        with self._changed:
            urgent, kept, discarded, pending = self._urgent(), self._kept(), self._discarded, self._pending()
            self._discarded = []
            now = time.monotonic()
            key = next((key for key in pending if self._deferred.get(key, (0.0,))[0] <= now), None)
            if key is not None:
                self._active.add(key)
            elif pending:
                self._changed.wait(BUSY_SECONDS)
            elif not discarded:
                self._threads -= 1
                return False
        for unneeded in discarded:
            if unneeded not in kept:
                with contextlib.suppress(OSError):  # what stays is removed when its room is needed
                    self._cache.remove(unneeded)
        if key is not None:
            self._fetch_and_record(key, urgent if key in urgent else kept)  # what is needed soon makes way
        return True

    def _fetch_and_record(self, key: _Key, kept: frozenset[_Key]) -> None:
        file: Any = None
        problem: Exception | None = None
        obstacle = ""
        try:
            file = self._fetch(key, kept)
        except _NotNowError as reason:
            obstacle = str(reason)
        except UserError as error:
            problem = error
        except OSError as error:
            problem = UserError(f"the cache of remote shards: {describe_os_error(error)}")
        except Exception as error:  # a mistake of ours: whoever waits for the shard shall see it
            problem = error
        with self._changed:
            self._active.discard(key)
            if problem is not None:
                self._failed[key] = problem
                logger.warning("%s", problem)
            elif file is None:
                self._defer(key, obstacle)
            else:
                self._deferred.pop(key, None)
                self._verified[key] = _identity(file)
                if key in self._urgent():
                    self._held[key] = file
                else:
                    file.close()
                    self._ready |= {key} & self._kept()  # or the run has moved on
            self._changed.notify_all()

    def _defer(self, key: _Key, obstacle: str) -> None:
        """Lets a shard wait: while another process fetches it, or until there is room in the cache."""
        _, waited, before = self._deferred.get(key, (0.0, 0.0, obstacle))
        waited = waited if before == obstacle else 0.0
        if obstacle == NO_ROOM and key == self._demanded and waited > NO_ROOM_SECONDS:
            self._failed[key] = UserError(
                f"no room for {key.where} in {self._cache.folder}: its {self.limit_bytes / 2**30:.3g} GiB are in use by "
                "other processes; raise --data.cache-gib, or give this run a --data.cache-dir of its own"
            )
            return
        pause = BUSY_SECONDS if key == self._demanded else min(max(waited, BUSY_SECONDS), LAST_BACKOFF_SECONDS)
        self._deferred[key] = (time.monotonic() + pause, waited + pause, obstacle)

    def _fetch(self, key: _Key, kept: frozenset[_Key]) -> Any:
        """The shard's file, held and checked.

        Raises: _NotNowError if it is to be tried later; UserError if the shard at the source is not that of the manifest.
        """
        file = self._cache.open_whole(key)
        if file is not None:
            if _identity(file) == self._verified.get(key):
                return file
            problem = _content_problem(file, key)
            if problem is None:
                return file
            logger.warning("%s in the cache: %s; fetching it again", key.info.file, problem)
            self._cache.remove_damaged(key, file)
        for _ in range(1 + FETCH_AGAIN):
            file = self._cache.begin(key, kept=kept)
            try:
                problem = _download(key, file)
            except BaseException:
                self._cache.abandon(key, file)
                raise
            if problem is None:
                self._cache.finish(key, file)
                return file
            self._cache.abandon(key, file)
            logger.warning("%s: %s", key.where, problem)
        raise UserError(
            f"{key.where}: {problem}, also when fetched again; the shard there is not that of {MANIFEST_FILE}: run "
            "`toolkit verify` where the set was made and copy it again"
        )


def _work(reference: "weakref.ref[Fetcher]") -> None:
    """The life of a thread: as long as there is work, and somebody who could read what it fetches."""
    while (fetcher := reference()) is not None and fetcher.work_once():
        del fetcher


_Identity = tuple[int, int, int, int]


def _identity(file: Any) -> _Identity:
    """What tells that a file is still the one it was: device, inode, size, time of its last change."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _download(key: _Key, file: Any) -> str | None:
    """Writes the shard from its source into the file; what is wrong with it, or None."""
    digest, done = hashlib.sha256(), 0
    for piece in key.source.patiently(key.info.file, key.size + 1, patience=OUTAGE_SECONDS):
        done += len(piece)
        if done > key.size:
            return f"it has more than the {key.size} bytes that {MANIFEST_FILE} says"
        digest.update(piece)
        file.write(piece)
    file.flush()
    if done != key.size:
        return f"it has {done} bytes, not the {key.size} that {MANIFEST_FILE} says"
    return _digest_problem(digest.hexdigest(), file, key)


def _content_problem(file: Any, key: _Key) -> str | None:
    size = os.fstat(file.fileno()).st_size
    if size != key.size:
        return f"it has {size} bytes, not {key.size}"
    return _digest_problem(hashlib.file_digest(file, "sha256").hexdigest(), file, key)


def _digest_problem(sha256: str, file: Any, key: _Key) -> str | None:
    if sha256 != key.info.sha256:
        return f"its sha256 is {sha256}, not {key.info.sha256}"
    header = bytearray(HEADER_BYTES)
    read_at(file, memoryview(header), 0)
    return header_problem(bytes(header), key.info.tokens, key.manifest.dtype, where=key.where)


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteSet:
    """A prepared set behind a URL: its manifest, its shards as the loader reads them, and the way to say what it needs."""

    name: str
    where: str  # the URL without secrets
    manifest: Manifest
    shards: Mapping[Split, Sequence[Shard]]
    tokenizer_file: Path | None
    fetcher: Fetcher
    keys: Mapping[Split, Sequence[_Key]]

    def need(self, split: Split, now: Sequence[int], soon: Sequence[int]) -> None:
        """Says which shards (by number) are needed now and which soon."""
        keys = self.keys[split]
        self.fetcher.need((self.name, split), [keys[index] for index in now], [keys[index] for index in soon])

    def room_needed(self, *, shuffle_group_shards: int, shards_between: int) -> int:
        """The most bytes of cache for two groups of training shards, those in between, and two validation shards."""
        train, val = (sorted((key.size for key in self.keys[split]), reverse=True) for split in ("train", "val"))
        return sum(train[: 2 * shuffle_group_shards + shards_between]) + sum(val[:2])


def default_cache_dir() -> Path:
    """The folder for cached shards below the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gpt2-toolkit" / "shards"


def new_fetcher(*, cache_dir: str | None, cache_gib: float) -> Fetcher:
    """A fetcher with a cache of at most `cache_gib` GiB in `cache_dir`, or below the user's cache folder."""
    folder = Path(cache_dir) if cache_dir else default_cache_dir()
    return Fetcher(ShardCache(folder, limit_bytes=int(cache_gib * 2**30)))


def open_remote(url: str, *, name: str, fetcher: Fetcher) -> RemoteSet:
    """The set behind a URL; reads its manifest (and the vocabulary of a tokenizer of its own), no shard.

    Raises: UserError if they cannot be read or the manifest is not as it should be. The tokenizer is checked by who loads it.
    """
    source = RemoteFolder(url)
    _, manifest = _read_manifest(source)
    folder = manifest.fingerprint[:32]
    keys = {
        split: [_Key(folder=folder, info=info, manifest=manifest, source=source) for info in infos]
        for split, infos in manifest.splits.items()
    }
    fetcher.total_bytes += sum(key.size for split in keys.values() for key in split)
    shards = {
        split: [
            Shard(
                info=key.info,
                where=key.where,
                dtype=manifest.dtype,
                vocab_size=manifest.tokenizer.vocab_size,
                source=functools.partial(fetcher.read_into, key),
            )
            for key in split_keys
        ]
        for split, split_keys in keys.items()
    }
    tokenizer_file = None
    if manifest.tokenizer.name not in SET_TOKENIZERS:
        data = source.read_small(TOKENIZER_FILE, limit=MAX_TOKENIZER_BYTES)
        tokenizer_file = fetcher.small_file(folder, TOKENIZER_FILE, data)
    return RemoteSet(
        name=name,
        where=source.where,
        manifest=manifest,
        shards=shards,
        tokenizer_file=tokenizer_file,
        fetcher=fetcher,
        keys=keys,
    )


def _read_manifest(source: RemoteFolder) -> tuple[bytes, Manifest]:
    """The manifest as it is there, and what it says."""
    data = source.read_small(MANIFEST_FILE, limit=MAX_MANIFEST_BYTES)
    return data, decode_manifest(data, where=f"{source.where}/{MANIFEST_FILE}")


def verify_remote(url: str) -> Iterator[str]:
    """Reads every byte of the set behind a URL, keeping none, and compares it with the manifest there; lines as for a folder.

    Raises: UserError at the end, naming every problem; shards that the manifest does not know cannot be seen from here.
    """
    source = RemoteFolder(url)
    data, manifest = _read_manifest(source)

    def problems_of(info: ShardInfo) -> Iterator[str]:
        where, size = f"{source.where}/{info.file}", shard_bytes(info.tokens, manifest.dtype)
        try:
            pieces = source.patiently(info.file, size + 1, patience=OUTAGE_SECONDS)
            found = scan_shard(pieces, file=info.file, where=where, size=size, tokenizer=manifest.tokenizer)
        except UserError as error:
            yield str(error)
        else:
            yield from content_problems(found, info, where=where)

    known_problems = [
        *manifest_problems(data, manifest, where=f"{source.where}/{MANIFEST_FILE}"),
        *_tokenizer_problems(source, manifest),
    ]
    return verify_shards(manifest, where=source.where, known_problems=known_problems, problems_of=problems_of)


def _tokenizer_problems(source: RemoteFolder, manifest: Manifest) -> Iterator[str]:
    if manifest.tokenizer.name in SET_TOKENIZERS:
        yield from tokenizer_problems(manifest.tokenizer, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / TOKENIZER_FILE
        try:
            copy.write_bytes(source.read_small(TOKENIZER_FILE, limit=MAX_TOKENIZER_BYTES))
        except UserError as error:
            yield str(error)
            return
        for problem in tokenizer_problems(manifest.tokenizer, copy):
            yield problem.replace(str(copy), f"{source.where}/{TOKENIZER_FILE}")
