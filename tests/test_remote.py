"""Sets far away: the same samples as a local set, whatever the link does, within a bounded cache that processes share."""

import base64
import errno
import fcntl
import http.server
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.data_sets import write_set
from tests.hub_server import Hub
from toolkit.data import remote
from toolkit.data.loader import open_data, sample_windows, training_loader, validation_loader
from toolkit.data.manifest import read_manifest
from toolkit.data.remote import Fetcher, new_fetcher, verify_remote
from toolkit.data.shards import verify_data
from toolkit.errors import UserError

SETTINGS: dict[str, Any] = {"sequence_length": 16, "seed": 3, "shuffle_group_shards": 2}
SHARDS, TOKENS = 10, 340
SHARD_BYTES = 1024 + 2 * TOKENS
PER_SHARD = (TOKENS - 1) // 16
ROOM_GIB = 6.5 * SHARD_BYTES / 2**30  # two groups of two shards, two validation shards, and not one more

Fault = Callable[[http.server.BaseHTTPRequestHandler, bytes], bool]


class Server:
    """A web server of one folder on 127.0.0.1; `faults[NAME]` answers a request in its own way and returns True, or False."""

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        self.requests: Counter[str] = Counter()
        self.starts: Counter[tuple[str, int]] = Counter()  # (file, first byte asked for)
        self.faults: dict[str, Fault] = {}
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.partition("?")[0].rpartition("/")[2]
                start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
                server.requests[name] += 1
                server.starts[name, start] += 1
                path = folder / name
                if not path.is_file():
                    self.send_error(404)
                    return
                data = path.read_bytes()
                fault = server.faults.get(name)
                if fault is not None and fault(self, data):
                    return
                if start and ranges:
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                    data = data[start:]
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/data"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "data", [TOKENS] * SHARDS, val=[TOKENS, TOKENS])


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    one = Server(folder)
    yield one
    one.close()


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that passes costs no time; how long one may last is as generous as ever, for a busy machine's sake."""
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setattr(remote, "FIRST_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(remote, "OUTAGE_SECONDS", 15.0)
    monkeypatch.setattr(remote, "OPEN_OUTAGE_SECONDS", 60.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a fault that stays."""
    monkeypatch.setattr(remote, "OUTAGE_SECONDS", 1.0)
    monkeypatch.setattr(remote, "OPEN_OUTAGE_SECONDS", 1.0)
    monkeypatch.setattr(remote, "READ_TIMEOUT_SECONDS", 1.0)


def cached_bytes(cache: Path) -> int:
    """Disk that the cache takes, at a moment when nobody changes it."""
    with (cache / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in cache.rglob("*.bin*"))


def digests_of(path: str, count: int, *, cache: Path | None = None, first: int = 0, gib: float = ROOM_GIB) -> list[int]:
    data = open_data(path, cache_dir=str(cache) if cache else None, cache_gib=gib)
    return [window.digest for window in sample_windows(data, first, count, **SETTINGS)]


# ------------------------------------------------------------------------------------------------ the same as a local set


def test_order_position_and_validation_are_those_of_a_local_set(folder: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder) + "/", "/far/data/", recursive=True)
    epoch_and_more = SHARDS * PER_SHARD + 100
    local = open_data(str(folder))
    far = open_data("memory://far/data", cache_dir=str(tmp_path / "cache"), cache_gib=ROOM_GIB)
    assert far.fingerprint == local.fingerprint
    windows = sample_windows(far, 0, epoch_and_more, **SETTINGS)
    assert windows == sample_windows(local, 0, epoch_and_more, **SETTINGS)
    assert sample_windows(far, 777, 20, **SETTINGS) == sample_windows(local, 777, 20, **SETTINGS)
    batches = [
        validation_loader(data.sets[0], sequence_length=16, max_tokens=500, micro_batch_size=4) for data in (far, local)
    ]
    assert [batch["digest"].tolist() for batch in batches[0]] == [batch["digest"].tolist() for batch in batches[1]]
    # in a mixture with a local set
    mixed = open_data([f"{folder}=0.5", "memory://far/data=0.5"], cache_dir=str(tmp_path / "other"), cache_gib=ROOM_GIB)
    both = open_data([f"{folder}=0.5", f"{folder}=0.5"])
    assert [window.digest for window in sample_windows(mixed, 0, 99, **SETTINGS)] == [
        window.digest for window in sample_windows(both, 0, 99, **SETTINGS)
    ]


def test_the_cache_stays_within_its_limit_and_drops_what_was_used(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    data = open_data(server.url, cache_dir=str(cache), cache_gib=ROOM_GIB)
    loader = training_loader(data, position=0, micro_batch_size=4, **SETTINGS)
    held = []
    for batch, _ in zip(loader, range(SHARDS * PER_SHARD * 3 // 8), strict=False):
        assert batch["digest"].shape == (4,)
        held.append(cached_bytes(cache))
    assert max(held) <= ROOM_GIB * 2**30
    assert sum(server.requests[f"train_{index:06d}.bin"] for index in range(SHARDS)) > SHARDS  # fetched again
    # we stand in the second epoch's third group: it and the next remain, the others were dropped and not only evicted
    local = open_data(str(tmp_path / "data"))
    rest = sample_windows(local, (SHARDS + 4) * PER_SHARD, 4 * PER_SHARD, **SETTINGS)
    expected = {window.shard for window in rest}
    deadline = time.monotonic() + 60
    while {path.name for path in cache.rglob("*.bin")} != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {path.name for path in cache.rglob("*.bin")} == expected


def test_the_cache_may_lie_on_nfs(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an exclusive lock wants a file that may be written, and a shared one a file that may be read (flock(2))."""
    flock = fcntl.flock

    def as_nfs_does(file: Any, operation: int) -> None:
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        refused = os.O_RDONLY if operation & fcntl.LOCK_EX else os.O_WRONLY
        if mode == refused and not operation & fcntl.LOCK_UN:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", as_nfs_does)
    data = open_data(server.url, cache_dir=str(tmp_path / "cache"), cache_gib=ROOM_GIB)
    loader = training_loader(data, position=0, micro_batch_size=4, **SETTINGS)
    read = [batch["digest"].shape for batch, _ in zip(loader, range(SHARDS * PER_SHARD // 4), strict=False)]
    assert len(read) == SHARDS * PER_SHARD // 4


def test_runs_that_share_a_cache_take_no_shard_that_another_needs_now(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "NO_ROOM_SECONDS", 3.0)
    cache = tmp_path / "cache"

    def start(position: int) -> Iterator[dict[str, Any]]:
        data = open_data(server.url, cache_dir=str(cache), cache_gib=ROOM_GIB)
        batches = iter(training_loader(data, position=position, micro_batch_size=1, **SETTINGS))
        next(batches)
        return batches

    def shards_of(group: int) -> set[str]:
        first = group * 2 * PER_SHARD
        local = open_data(str(cache.parent / "data"))
        return {window.shard for window in sample_windows(local, first, 2 * PER_SHARD, **SETTINGS)}

    def wait_until_cached(*groups: int) -> None:
        names = set.union(*(shards_of(group) for group in groups))
        deadline = time.monotonic() + 60
        while not names <= {path.name for path in cache.rglob("*.bin")} and time.monotonic() < deadline:
            time.sleep(0.01)
        assert names <= {path.name for path in cache.rglob("*.bin")}

    one = start(0)
    wait_until_cached(0, 1)
    two = start(3 * 2 * PER_SHARD)  # there is room for its group because that which the other needs soon makes way
    wait_until_cached(0, 3)
    three = start(4 * 2 * PER_SHARD)
    wait_until_cached(0, 3, 4)
    with pytest.raises(
        UserError, match=r"no room for .*/data/train_0.*.bin in .*cache: its .* GiB are in use by other"
    ):
        start(2 * 2 * PER_SHARD)
    wait_until_cached(0, 3, 4)
    assert cached_bytes(cache) <= ROOM_GIB * 2**30
    del two, three
    for _ in range(4 * PER_SHARD):
        next(one)


def test_a_set_that_fits_as_a_whole_is_fetched_once(server: Server, tmp_path: Path) -> None:
    count = 3 * SHARDS * PER_SHARD
    assert len(digests_of(server.url, count, cache=tmp_path / "cache", gib=1.0)) == count
    assert set(server.requests.values()) == {1}


def test_the_next_group_is_there_before_it_is_needed(server: Server, tmp_path: Path) -> None:
    data = open_data(server.url, cache_dir=str(tmp_path / "cache"), cache_gib=ROOM_GIB)
    of_other_tests = set(threading.enumerate())
    batches = iter(training_loader(data, position=0, micro_batch_size=1, **SETTINGS))
    next(batches)
    fetcher = data.sets[0].remote.fetcher  # type: ignore[union-attr]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        # A file gets its name before its thread has noted that it is there, for which a read would wait a moment.
        fetching = any(thread.name == "shard-fetcher" for thread in set(threading.enumerate()) - of_other_tests)
        if not fetching and len(list((tmp_path / "cache").rglob("*.bin"))) >= 4:
            break
        time.sleep(0.01)
    waited = fetcher.seconds_waited
    for _ in range(2 * 2 * PER_SHARD - 1):  # to the end of the second group
        next(batches)
    assert fetcher.seconds_waited == waited


def test_a_cache_that_is_too_small_is_refused_with_numbers(server: Server, tmp_path: Path) -> None:
    data = open_data(server.url, cache_dir=str(tmp_path), cache_gib=5 * SHARD_BYTES / 2**30)
    with pytest.raises(
        UserError,
        match=r"data.cache_gib=.* is too small: this group of data.shuffle_group_shards=2 .* or --data.shuffle-group-shards 1$",
    ):
        training_loader(data, position=0, micro_batch_size=1, **SETTINGS)


def test_a_cache_too_small_for_the_shards_of_one_batch_is_refused_at_once(tmp_path: Path) -> None:
    tiny = write_set(tmp_path / "tiny", [52] * 30, val=[52] * 8)  # shards of 3 windows
    server = Server(tiny)
    try:
        data = open_data(server.url, cache_dir=str(tmp_path / "cache"), cache_gib=8.5 * (1024 + 2 * 52) / 2**30)
        with pytest.raises(
            UserError,
            match=r"^data.cache_gib=.* is too small: this group of data.shuffle_group_shards=2 shards, the next one, "
            r"3 shards that a micro-batch of 11 windows may cover in between and the validation shards take",
        ):
            training_loader(data, position=0, micro_batch_size=11, **SETTINGS)
        batches = iter(training_loader(data, position=0, micro_batch_size=7, **SETTINGS))
        for _ in range(30):  # every way in which a batch can lie
            next(batches)
        validation = validation_loader(data.sets[0], sequence_length=16, max_tokens=10**6, micro_batch_size=24)
        with pytest.raises(
            UserError,
            match=r"^data.cache_gib=.* is too small: a micro-batch of training and one of validation lie in 1[0-2] shards "
            r"of .* GiB; use --data.cache-gib 0.1, smaller micro-batches, or larger shards$",
        ):
            validation[0]
    finally:
        server.close()


def test_what_is_needed_soon_makes_way_for_what_is_needed_now(server: Server, tmp_path: Path) -> None:
    data = open_data(server.url, cache_dir=str(tmp_path / "cache"), cache_gib=ROOM_GIB)
    batches = iter(training_loader(data, position=2 * PER_SHARD - 1, micro_batch_size=2, **SETTINGS))
    next(batches)  # in two groups; the third one then fills the cache
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "cache").rglob("train*.bin"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(list((tmp_path / "cache").rglob("*.bin"))) == 6
    validation = validation_loader(data.sets[0], sequence_length=16, max_tokens=500, micro_batch_size=4)
    assert validation[PER_SHARD // 4]["digest"].shape == (4,)  # in two shards
    for _ in range(SHARDS * PER_SHARD):
        next(batches)


def test_what_a_cache_held_before_is_hashed_before_it_is_used(server: Server, folder: Path, tmp_path: Path) -> None:
    cache, count = tmp_path / "cache", SHARDS * PER_SHARD
    expected = digests_of(str(folder), count)
    shutil.copytree(folder, cache / read_manifest(folder).fingerprint[:32])
    damaged = next(cache.rglob("train_000003.bin"))
    data = bytearray(damaged.read_bytes())
    data[1500] ^= 1
    damaged.write_bytes(data)
    assert digests_of(server.url, count, cache=cache, gib=1.0) == expected
    assert server.requests == {"manifest.json": 1, "train_000003.bin": 1}


# ------------------------------------------------------------------------------------------------------------- faults


def times(count: int, fault: Fault) -> Fault:
    left = [fault] * count

    def first_times(handler: http.server.BaseHTTPRequestHandler, data: bytes) -> bool:
        return bool(left) and left.pop()(handler, data)

    return first_times


def respond(handler: http.server.BaseHTTPRequestHandler, body: bytes, *, length: int | None = None) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def stall(handler: http.server.BaseHTTPRequestHandler, data: bytes) -> bool:
    respond(handler, data[:700], length=len(data))
    handler.wfile.flush()
    time.sleep(5.0)
    return True


def drop(handler: http.server.BaseHTTPRequestHandler, data: bytes) -> bool:
    respond(handler, data[:700], length=len(data))
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


def corrupt(handler: http.server.BaseHTTPRequestHandler, data: bytes) -> bool:
    respond(handler, data[:1200] + bytes([data[1200] ^ 255]) + data[1201:])
    return True


def shorter(handler: http.server.BaseHTTPRequestHandler, data: bytes) -> bool:
    respond(handler, data[:-2])
    return True


def longer(handler: http.server.BaseHTTPRequestHandler, data: bytes) -> bool:
    respond(handler, data + b"xx")
    return True


def chunked_without_end(handler: http.server.BaseHTTPRequestHandler, data: bytes) -> bool:
    """Every byte in one chunk, but not the empty chunk that says that it was the last."""
    if handler.headers.get("Range") == f"bytes={len(data)}-":
        handler.send_error(416)
        return True
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    return True


def status(code: int) -> Fault:
    def answer(handler: http.server.BaseHTTPRequestHandler, data: bytes) -> bool:
        handler.send_error(code)
        return True

    return answer


FAULTS = {"stall": stall, "drop": drop, "corrupt": corrupt, "shorter": shorter, "longer": longer}


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no-ranges"])
@pytest.mark.parametrize("fault", [*FAULTS, "503", "429"])
def test_a_fault_that_passes_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, ranges: bool
) -> None:
    if fault == "stall":
        monkeypatch.setattr(remote, "READ_TIMEOUT_SECONDS", 1.0)
    server = Server(folder, ranges=ranges)
    answer = FAULTS.get(fault) or status(int(fault))
    server.faults = {name: times(1, answer) for name in ("train_000001.bin", "train_000007.bin")}
    try:
        count = SHARDS * PER_SHARD
        assert digests_of(server.url, count, cache=tmp_path / "cache") == digests_of(str(folder), count)
        assert server.requests["train_000001.bin"] == 2
        if fault in ("stall", "drop"):
            assert server.starts["train_000001.bin", 700] == 1  # it went on where the connection stopped
    finally:
        server.close()


def test_a_connection_lost_after_the_last_byte_loses_nothing(server: Server, folder: Path, tmp_path: Path) -> None:
    server.faults = {f"train_{index:06d}.bin": chunked_without_end for index in range(SHARDS)}
    count = SHARDS * PER_SHARD
    assert digests_of(server.url, count, cache=tmp_path / "cache") == digests_of(str(folder), count)
    assert server.starts["train_000001.bin", SHARD_BYTES] == server.starts["train_000001.bin", 0]
    assert list(verify_remote(server.url)) == list(verify_data(folder))
    os.truncate(folder / "train_000001.bin", SHARD_BYTES - 2)
    with pytest.raises(UserError, match=rf"1 problem: .*train_000001.bin has {SHARD_BYTES - 2} bytes, but the"):
        list(verify_remote(server.url))


def test_a_link_that_drops_again_and_again_gets_there(server: Server, folder: Path, tmp_path: Path) -> None:
    def drop_soon(handler: http.server.BaseHTTPRequestHandler, data: bytes) -> bool:
        start = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        handler.wfile.write(data[start : start + 100])
        return True

    server.faults = {"train_000001.bin": drop_soon}
    count = SHARDS * PER_SHARD
    assert digests_of(server.url, count, cache=tmp_path / "cache", gib=1.0) == digests_of(str(folder), count)
    assert server.requests["train_000001.bin"] == -(-SHARD_BYTES // 100)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            corrupt,
            r"train_000001.bin: its sha256 is .*, also when fetched again; the shard there is not that of manifest",
        ),
        (
            shorter,
            r"train_000001.bin: it has 1702 bytes, not the 1704 that manifest.json says, also when fetched again",
        ),
        (longer, r"train_000001.bin: it has more than the 1704 bytes"),
        (stall, r"train_000001.bin: no progress for .* attempts \(TimeoutError: timed out\); check the connection"),
        (status(503), r"train_000001.bin: no progress for .* attempts \(HTTP status 503\)"),
        (status(404), r"train_000001.bin: HTTP status 404; check the URL and your access to it"),
        (status(403), r"train_000001.bin: HTTP status 403"),
    ],
    ids=["corrupt", "shorter", "longer", "stall", "503", "404", "403"],
)
def test_a_fault_that_stays_is_one_clear_line(server: Server, tmp_path: Path, fault: Fault, message: str) -> None:
    server.faults["train_000001.bin"] = fault
    with pytest.raises(UserError, match=message) as caught:
        digests_of(server.url, SHARDS * PER_SHARD, cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert "data/train_000001.bin" in str(caught.value)


def test_a_shard_that_failed_early_is_tried_again_when_it_is_needed(
    server: Server, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = open_data(server.url, cache_dir=str(tmp_path / "cache"), cache_gib=ROOM_GIB)
    order = [window.shard for window in sample_windows(open_data(str(folder)), 0, SHARDS * PER_SHARD, **SETTINGS)]
    later = next(shard for shard in order if shard not in order[: 2 * PER_SHARD])  # of the second group
    server.faults[later] = status(404)
    batches = iter(training_loader(data, position=0, micro_batch_size=1, **SETTINGS))
    with caplog.at_level(logging.WARNING):
        next(batches)
        deadline = time.monotonic() + 60
        while later not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    assert later in caplog.text
    server.faults.clear()
    for _ in range(4 * PER_SHARD):
        next(batches)


@pytest.mark.usefixtures("impatient")
def test_a_set_that_cannot_be_opened_is_one_clear_line(server: Server, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    server.faults["manifest.json"] = status(404)
    with pytest.raises(UserError, match=r"127.0.0.1:\d+/nothing/nowhere/manifest.json: HTTP status 404"):
        open_data(server.url.replace("data", "nothing/nowhere"), cache_dir=cache)
    server.faults["manifest.json"] = lambda handler, data: bool(respond(handler, b'{"schema_version": 9}')) or True
    with pytest.raises(UserError, match=r"/data/manifest.json: schema_version=9 is not the 1"):
        open_data(server.url, cache_dir=cache)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://user:hunter2@127.0.0.1:{closed.getsockname()[1]}/x?token=hunter2"
        with pytest.raises(UserError, match=r"no progress for .*Connection refused") as caught:
            open_data(url, cache_dir=cache)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(UserError, match=r"memory://no/such/manifest.json does not exist"):
        open_data("memory://no/such", cache_dir=cache)
    with pytest.raises(UserError, match=r"nonsense://x: .*; use a folder or a URL such as"):
        open_data("nonsense://x", cache_dir=cache)
    with pytest.raises(UserError, match=r"s3://bucket/x: .*s3fs.*install the package that it names"):
        open_data("s3://bucket/x", cache_dir=cache)


@pytest.mark.parametrize(
    ("given", "query", "shares"),
    [
        ("?expires=1700000000", "expires=1700000000", [0.5, 0.5]),
        ("?name=a&expires=1700000000", "name=a&expires=1700000000", [0.5, 0.5]),
        ("?expires=1700000000=3", "expires=1700000000", [0.75, 0.25]),
        ("?signature=ab==3", "signature=ab=", [0.75, 0.25]),
        ("=3", "", [0.75, 0.25]),
    ],
)
def test_a_number_in_a_query_is_no_weight(
    server: Server, folder: Path, tmp_path: Path, given: str, query: str, shares: list[float]
) -> None:
    asked = []
    server.faults["manifest.json"] = lambda handler, data: bool(asked.append(handler.path.partition("?")[2]))
    second = f"{folder}=1" if shares[0] > 0.5 else str(folder)
    data = open_data([server.url + given, second], cache_dir=str(tmp_path), cache_gib=ROOM_GIB)
    assert asked == [query]
    assert [data_set.weight for data_set in data.sets] == shares


def test_a_query_in_the_url_goes_along_and_stays_out_of_messages(server: Server, tmp_path: Path) -> None:
    data = open_data(server.url + "?signature=hunter2", cache_dir=str(tmp_path), cache_gib=ROOM_GIB)
    assert data.sets[0].path == server.url
    assert data.sets[0].name == "data"
    server.faults["train_000001.bin"] = status(404)
    with pytest.raises(UserError) as caught:
        sample_windows(data, 0, SHARDS * PER_SHARD, **SETTINGS)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("données/set 1", "/donn%C3%A9es/set%201/manifest.json"),
        ("donn%C3%A9es/set%201/", "/donn%C3%A9es/set%201/manifest.json"),
        ("a+b@c=d?sig=a%2Fb=&name=é", "/a+b@c=d/manifest.json?sig=a%2Fb=&name=%C3%A9"),
    ],
)
def test_a_url_is_quoted_where_it_is_not(server: Server, tmp_path: Path, given: str, asked: str) -> None:
    paths = []
    server.faults["manifest.json"] = lambda handler, data: bool(paths.append(handler.path))
    data = open_data(f"{server.url.removesuffix('data')}{given}", cache_dir=str(tmp_path), cache_gib=ROOM_GIB)
    assert paths == [asked]
    assert data.sets[0].path.endswith(given.partition("?")[0].rstrip("/"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://[::1/x", r"^http://\[::1/x: Invalid IPv6 URL; use a URL such as https://HOST:PORT/FOLDER$"),
        ("http://host:abc/x", r"^http://host:abc/x: Port could not be cast .*; use a URL"),
        ("http://user:hunter2@host:70000/x", r"^http://host:70000/x: Port out of range"),
        ("http:///x", r"^http:///x names no host; use a URL"),
        ("https://my host/x", r"^https://my host/x names no host; use a URL"),
        (f"http://{'é' * 70}.org/x", r"label .*; use a URL"),
    ],
)
def test_a_url_that_can_never_work_is_refused_at_once(tmp_path: Path, url: str, message: str) -> None:
    for use in (verify_remote, lambda url: open_data(url, cache_dir=str(tmp_path))):
        with pytest.raises(UserError, match=message) as caught:
            list(use(url))
        assert "\n" not in str(caught.value)
        assert "hunter2" not in str(caught.value)


@pytest.mark.usefixtures("impatient")
def test_user_and_password_are_sent_to_the_host_itself_and_never_named(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    headers = []

    def note(handler: http.server.BaseHTTPRequestHandler, data: bytes) -> bool:
        headers.append(handler.headers.get("Authorization"))
        return False

    def redirect(handler: http.server.BaseHTTPRequestHandler, data: bytes) -> bool:
        headers.append(handler.headers.get("Authorization"))
        handler.send_response(302)
        handler.send_header("Location", server.url.replace("127.0.0.1", "localhost") + "/train_000001.bin")
        handler.end_headers()
        return True

    server.faults = {
        "manifest.json": note,
        "val_000000.bin": redirect,
        "train_000001.bin": note,
        "train_000002.bin": status(500),
    }
    url = server.url.replace("http://", "http://me:hunter%402@")
    with pytest.raises(
        UserError, match=r"3 problems: .*train_000002.bin: no progress .*val_000000.bin was changed"
    ) as far:
        list(verify_remote(url))
    sent = "Basic " + base64.b64encode(b"me:hunter@2").decode()
    assert headers == [sent, sent, sent, None]  # manifest, shard, shard that lies elsewhere, shard at the other host
    data = open_data(url.removesuffix("/data"), cache_dir=str(tmp_path), cache_gib=ROOM_GIB)
    for text in (str(far.value), caplog.text, data.sets[0].name, data.sets[0].path):
        assert "hunter" not in text


def test_a_full_disk_is_one_clear_line(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_FAILPOINTS", "remote.before-rename=fail@3+")
    with pytest.raises(UserError, match=r"the cache of remote shards: .*No space left on device"):
        digests_of(server.url, SHARDS * PER_SHARD, cache=tmp_path / "cache")


# ---------------------------------------------------------------------------------------------------------- verify


def test_a_set_far_away_is_verified_like_a_folder(server: Server, folder: Path, tmp_path: Path) -> None:
    server.faults["train_000003.bin"] = times(1, drop)
    assert list(verify_remote(server.url)) == list(verify_data(folder))
    assert not list(tmp_path.glob("cache*"))
    server.faults["val_000001.bin"] = status(404)
    for name, start, data in (
        ("train_000001.bin", 1024 + 2 * 5, b"\0\0"),
        ("train_000002.bin", 1024 + 2 * 5, b"\xff\xff"),
        ("train_000005.bin", SHARD_BYTES, b"more"),
        ("train_000006.bin", 0, b"none"),
    ):
        with (folder / name).open("r+b") as file:
            file.seek(start)
            file.write(data)
    os.truncate(folder / "train_000004.bin", SHARD_BYTES - 3)
    lines = []
    with pytest.raises(UserError) as caught:
        lines += verify_remote(server.url)
    for part in (
        f"{server.url} has 6 problems: ",
        "train_000001.bin was changed: its sha256 is ",
        "train_000002.bin: id 65535 at token 5 is not below",
        f"train_000004.bin has {SHARD_BYTES - 3} bytes, but the {TOKENS} tokens in its header make {SHARD_BYTES}",
        f"train_000005.bin has {SHARD_BYTES + 1} bytes, but the",  # no more of it is asked for
        "train_000006.bin: header says magic ",
        "val_000001.bin: HTTP status 404",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_far_away_is_verified_like_one_in_a_folder(server: Server, folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = path.read_text()
    for text in (manifest.replace("50256", "7"), manifest.replace('"documents": 0', '"documents":  0')):
        path.write_text(text)
        with pytest.raises(UserError) as near:
            list(verify_data(folder))
        with pytest.raises(UserError) as far:
            list(verify_remote(server.url))
        assert str(far.value) == str(near.value).replace(str(folder), server.url)


# ---------------------------------------------------------------------------------------------------------- the Hub

HUB_READER = """
import json, sys
from toolkit.data.remote import new_fetcher, open_remote
from toolkit.errors import UserError

fetcher = new_fetcher(cache_dir=sys.argv[1], cache_gib=1.0)
found = open_remote("hf://datasets/me/tokens/data", name="data", fetcher=fetcher)
ids = [shard.read(5, 3).tolist() for shard in found.shards["train"]]
try:
    open_remote("hf://datasets/me/nothing/data", name="data", fetcher=fetcher)
except UserError as error:
    print(json.dumps([found.manifest.fingerprint, ids, str(error)]))
"""


def test_a_set_on_the_hub_is_read_with_the_real_client(folder: Path, tmp_path: Path) -> None:
    with Hub(folder.parent, dataset="me/tokens") as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hf"),
        }
        command = [sys.executable, "-c", HUB_READER, str(tmp_path / "cache")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    fingerprint, ids, error = json.loads(done.stdout)
    assert fingerprint == read_manifest(folder).fingerprint
    assert ids == [[first + 5, first + 6, first + 7] for first in range(0, SHARDS * TOKENS, TOKENS)]
    assert error == "hf://datasets/me/nothing/data/manifest.json does not exist; check the URL"


# ------------------------------------------------------------------------------------------------- several processes

READER = """
import json, sys
from toolkit.data.loader import open_data, training_loader

url, cache, gib, count = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
data = open_data(url, cache_dir=cache, cache_gib=gib)
loader = training_loader(data, sequence_length=16, seed=3, shuffle_group_shards=2, micro_batch_size=1, position=0)
print(json.dumps([digest for _, batch in zip(range(count), loader) for digest in batch["digest"].tolist()]))
"""


def test_processes_share_a_cache_and_one_may_be_killed(server: Server, folder: Path, tmp_path: Path) -> None:
    script, cache, count = tmp_path / "reader.py", tmp_path / "cache", SHARDS * PER_SHARD
    script.write_text(READER)

    def start(failpoints: str = "") -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, str(script), server.url, str(cache), str(ROOM_GIB), str(count)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TOOLKIT_FAILPOINTS": failpoints, "OMP_NUM_THREADS": "1"},
        )

    killed = start("remote.before-rename=kill@3")
    assert killed.wait(timeout=120) == -signal.SIGKILL
    assert list(cache.rglob("*.part"))
    reader = start()  # it reads while we do, through the same cache
    expected = digests_of(str(folder), count)
    while reader.poll() is None:
        assert digests_of(server.url, count, cache=cache) == expected
    assert json.loads(reader.communicate()[0]) == expected
    assert reader.returncode == 0
    assert cached_bytes(cache) <= ROOM_GIB * 2**30


def test_a_small_file_that_several_processes_keep_at_once_is_whole(tmp_path: Path) -> None:
    """As processes of one run do that start together, each with locks of its own."""
    data = os.urandom(2**20)
    fetchers = [new_fetcher(cache_dir=str(tmp_path), cache_gib=1.0) for _ in range(8)]
    barrier = threading.Barrier(8)

    def keep(fetcher: Fetcher) -> bytes:
        barrier.wait()
        return fetcher.small_file("set", "tokenizer.json", data).read_bytes()

    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            assert all(found == data for found in pool.map(keep, fetchers))
        next(tmp_path.glob("**/tokenizer.json")).unlink()
