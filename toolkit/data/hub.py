"""Datasets on the Hub -> files and blocks: resolved by `datasets`, read in exact ranges, through broken connections.

`datasets` resolves a configuration to files of one commit, which is recorded; their bytes are then read in ranges, for
Parquet the text of one row group at a time, several ahead of need. Guarantees: whatever breaks (dropped connections,
HTTP 429 and 5xx, bodies that are cut short) is tried again after growing waits, and changes nothing but the time it
takes; what was read is not read again. Does not: keep files on disk.
"""

import functools
import logging
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from toolkit.data.documents import Block, Position
from toolkit.data.reading import (
    READERS,
    SUPPORTED,
    Notice,
    ReadContext,
    SourceFile,
    first_line,
    format_of,
)
from toolkit.data.sources import RowGroup, Source, open_parquet, open_table, row_groups, rows_of
from toolkit.errors import UserError

logger = logging.getLogger(__name__)

MAX_RETRIES = 8  # failures in a row, each after the client's own retries, before reading stops
FIRST_WAIT_SECONDS = 1.0  # before the first retry; doubled for each further one
LONGEST_WAIT_SECONDS = 60.0
FETCHES_AT_A_TIME = 4  # row groups asked for ahead of need
MAX_FETCH_BYTES = 2**23  # compressed text of a row group; a larger one is read this much at a time instead [bytes]
CONNECT_SECONDS = 10.0  # for the first sign of life of the Hub

_DATASET_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HUB_ADDRESS = re.compile(r"hf://datasets/[^@]+@([^/]+)/(.+)")
_NO_WAY = ("ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError", "UnsupportedProtocol")
_CONNECTION_PACKAGES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
_INSTEAD = (
    "check the connection (or HF_ENDPOINT), or download Parquet files elsewhere and run `toolkit prepare FOLDER`, or "
    "`toolkit prepare stdlib` for text that is already on this machine"
)


def open_hub(name: str, *, text_column: str, revision: str | None) -> Source:
    """The train split of a dataset on the Hub, at its newest commit or at `revision`."""
    dataset, _, config = name.partition(":")
    if not _DATASET_NAME.fullmatch(dataset):
        raise UserError(f"hub:{name} is not of the form hub:DATASET[:CONFIG], such as hub:HuggingFaceFW/fineweb-edu")
    if Path(dataset).exists():
        raise UserError(
            f"hub:{name} means the Hub, but `datasets` would read the folder {dataset} here instead; run in another "
            "folder, or name the folder without hub:"
        )
    _check_reachable(name)
    addresses, config_name = retried(lambda: _resolve(dataset, config, revision), f"hub:{name}")
    files = sorted(retried(lambda: _remote_files(name, addresses), f"hub:{name}"), key=lambda file: Path(file.name))
    return Source(
        kind="hub",
        files=tuple(files),
        text_column=text_column,
        details={"hub": name, "config": config_name, "revision": _parse_address(addresses[0])[0]},
    )


def _parse_address(address: str) -> tuple[str, str]:
    """(revision, path in the dataset)"""
    match = _HUB_ADDRESS.fullmatch(address)
    assert match is not None, f"{address} is no address of a file on the Hub"
    return match[1], match[2]


def _check_reachable(name: str) -> None:
    """Raises UserError at once if there is no way to the Hub; the clients themselves try for half a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"hub:{name} cannot be read: HF_HUB_OFFLINE is set; unset it, or {_INSTEAD}")
    endpoint = constants.ENDPOINT
    try:
        get_session().head(endpoint, timeout=CONNECT_SECONDS)
    except Exception as error:
        if type(error).__name__ in _NO_WAY:
            raise UserError(f"hub:{name} cannot be reached at {endpoint} ({first_line(error)}); {_INSTEAD}") from None


def _resolve(dataset: str, config: str, revision: str | None) -> tuple[list[str], str]:
    """Addresses of the files of the train split, and the name of the configuration."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(dataset, config or None, revision=revision)
    except ValueError as error:  # an unknown configuration, or one of several must be chosen
        raise UserError(f"hub:{dataset}:{config}: {' '.join(str(error).split())[:300]}") from None
    splits = builder.config.data_files or {}
    if "train" not in splits:
        raise UserError(f"hub:{dataset} has no train split, only {', '.join(sorted(splits)) or 'none'}; use another")
    return [str(address) for address in splits["train"]], str(builder.config.name)


def _remote_files(name: str, addresses: Sequence[str]) -> list[SourceFile]:
    from huggingface_hub import HfFileSystem

    system = HfFileSystem()
    files = []
    for address in addresses:
        revision, path = _parse_address(address)
        kind = format_of(path.replace(".json", ".jsonl") if re.search(r"\.json(\.gz|\.zst)?$", path) else path)
        if kind is None:
            raise UserError(f"hub:{name} holds {path}; only {SUPPORTED} can be read")
        entry = system.info(address)
        files.append(
            SourceFile(
                name=path,
                label=f"hub:{name}/{path}",
                path=address,
                format=kind[0],
                compression=kind[1],
                size=entry["size"],
                stamp=str(entry.get("blob_id") or revision),
            )
        )
    return files


def read_remote(context: ReadContext, position: Position, text_column: str) -> Iterator[Block]:
    """The blocks of a file on the Hub; a broken connection is taken up where it broke."""
    if context.file.format == "parquet":
        yield from _remote_parquet(context, position, text_column)
    else:
        yield from _going_on(context, position, lambda at: READERS[context.file.format](context, at, text_column))


def _remote_parquet(context: ReadContext, position: Position, text_column: str) -> Iterator[Block]:
    """The blocks of a Parquet file, several row groups asked for ahead of need."""
    label, stopped = context.file.label, Event()

    def read_metadata() -> tuple[Any, list[RowGroup]]:
        with open_parquet(context.file) as stream:
            table = open_table(stream)
            return table.metadata, row_groups(context, table, position.row, text_column)

    def fetch(group: RowGroup) -> list[Block]:
        with open_parquet(context.file) as stream:
            table = open_table(stream, metadata=metadata, buffer_size=0)
            return list(rows_of(context, table, group, max(position.row, group.start), text_column))

    def read_slowly(group: RowGroup) -> Iterator[Block]:
        def read(at: Position) -> Iterator[Block]:
            with open_parquet(context.file) as stream:
                table = open_table(stream, metadata=metadata, buffer_size=MAX_FETCH_BYTES)
                yield from rows_of(context, table, group, at.row, text_column)

        return _going_on(context, context.position(row=max(position.row, group.start)), read)

    metadata, groups = retried(read_metadata, label, context.notice)
    waiting: deque[Iterator[Block] | Future[list[Block]]] = deque()
    threads = ThreadPoolExecutor(FETCHES_AT_A_TIME, thread_name_prefix="hub")
    try:
        for group in groups:
            if group.compressed > MAX_FETCH_BYTES:
                waiting.append(read_slowly(group))
            else:
                act = functools.partial(fetch, group)
                waiting.append(threads.submit(retried, act, label, context.notice, stopped=stopped))
            if len(waiting) > FETCHES_AT_A_TIME:
                yield from _blocks_of(waiting.popleft())
        while waiting:
            yield from _blocks_of(waiting.popleft())
    finally:
        stopped.set()
        threads.shutdown(wait=False, cancel_futures=True)


def _blocks_of(item: "Iterator[Block] | Future[list[Block]]") -> Iterator[Block]:
    yield from item.result() if isinstance(item, Future) else item


def _going_on(context: ReadContext, position: Position, read: Callable[[Position], Iterator[Block]]) -> Iterator[Block]:
    """The blocks of `read`, begun again after the last one that came whenever the connection breaks."""
    failures = 0
    while True:
        try:
            for block in read(position):
                yield block
                position, failures = block.end, 0
            return
        except Exception as error:
            failures += 1
            _wait(error, failures, context.file.label, context.notice, Event())


def retried(act: Callable[[], Any], label: str, notice: Notice = logger.info, *, stopped: Event | None = None) -> Any:
    """The result of `act`, tried again after growing waits while the connection fails and nobody has stopped it."""
    failures, stopped = 0, stopped or Event()
    while True:
        try:
            return act()
        except Exception as error:
            failures += 1
            if stopped.is_set():
                raise
            _wait(error, failures, label, notice, stopped)


def _wait(error: Exception, failures: int, label: str, notice: Notice, stopped: Event) -> None:
    """Waits before the next try, or raises: the error itself if it is not the connection's, else a UserError."""
    status = _status_of(error)
    reason = f"HTTP {status}" if status else first_line(error)
    if isinstance(error, UserError):
        raise error
    if status in (401, 403):
        raise UserError(
            f"{label}: access is refused (HTTP {status}); accept the dataset's conditions on its page and log in with "
            "`hf auth login`, or set HF_TOKEN"
        ) from None
    if status == 404 or (status is None and isinstance(error, FileNotFoundError)):
        raise UserError(
            f"{label} is not on the Hub (or private: log in with `hf auth login`); check the spelling of DATASET"
        ) from None
    if not _is_transient(error, status):
        raise error
    if failures > MAX_RETRIES:
        raise UserError(
            f"{label}: the connection failed {failures} times in a row ({reason}); run the same command again later, it "
            "goes on from here"
        ) from None
    seconds = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (failures - 1))
    notice(f"{label}: {reason}; trying again in {seconds:.0f} s ({failures} of {MAX_RETRIES})")
    stopped.wait(seconds)


def _is_transient(error: Exception, status: int | None) -> bool:
    """Whether an error is the connection's; damage of a Parquet file is a UserError by then."""
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    package = type(error).__module__.partition(".")[0]
    return package in _CONNECTION_PACKAGES or isinstance(error, OSError | EOFError | zlib.error)


def _status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, which the clients wrap several times."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        error = error.__cause__ or error.__context__
    return None
