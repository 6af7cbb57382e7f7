"""Files, folders, the standard library or a dataset on the Hub -> blocks of documents, from any position on.

A source lists its files in sorted path order and cuts them into blocks that workers can tokenize independently
(`documents`). Formats: `.txt` (one document), `.jsonl` (one on each line), `.parquet` (one in each row); the first two
also as `.gz` or `.zst`. `stdlib` means the source files of the Python that runs, which every machine has;
write `./stdlib` for a file or folder of that name. `hub:DATASET[:CONFIG]` is the train split of a dataset on the Hub.

Guarantees: the documents and their order depend on the files alone, not on where the blocks are cut; reading can go on
from the end of any block without reading what came before (a compressed file is decompressed again up to there); a
source whose files change meanwhile is refused. Does not: tokenize, split, write.
"""

import codecs
import contextlib
import functools
import gzip
import hashlib
import io
import json
import logging
import os
import platform
import re
import sysconfig
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import xxhash

from toolkit.data.documents import (
    BYTE_ORDER_MARK,
    Block,
    Counts,
    Position,
    documents,
    missing_column,
    not_utf8,
    pack_rows,
)
from toolkit.errors import UserError

logger = logging.getLogger(__name__)

Format = Literal["text", "jsonl", "parquet"]
Compression = Literal["", ".gz", ".zst"]
FindCut = Callable[[str, int, int], int | None]  # `Tokenizer.exact_cut`
Notice = Callable[[str], None]

FORMATS: dict[str, Format] = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
SUPPORTED = ".txt, .jsonl (both also .gz, .zst) and .parquet"
STDLIB = "stdlib"
INSTALLED_PACKAGES = ("site-packages", "dist-packages")  # folders beside the standard library that are not part of it
HUB_PREFIX = "hub:"

BLOCK_BYTES = 2**20  # text in one block: about a quarter of a million tokens, 0.1 s of one worker's work [bytes]
LONG_TEXT_BYTES = 2**22  # a text file above this is cut into stretches [bytes]
KEPT_STRETCH_BYTES = 2**23  # a longer stretch (text without any place to cut) is read by the worker itself [bytes]
LARGE_DOCUMENT_BYTES = 2**25  # a larger document in one piece is announced with the memory it takes [bytes]
ROWS_AT_A_TIME = 256  # Parquet rows decoded at one time: a small column may unfold into large equal documents [rows]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file of a source: `name` is relative and goes into the manifest, `label` is how errors call it."""

    name: str
    label: str
    path: str  # of the file system, or the address of a file on the Hub
    format: Format
    compression: Compression
    size: int  # [bytes]
    stamp: str  # changes when the file does: modification time, or the hash that the Hub gives


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Documents in a fixed order, and what identifies them."""

    kind: Literal["files", "stdlib", "hub"]
    files: tuple[SourceFile, ...]
    text_column: str
    details: dict[str, str]  # what else identifies the source: a revision, a version of Python
    ignored_files: int = 0  # in the folders, with other endings

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def description(self) -> dict[str, Any]:
        """What the manifest says: names and sizes, nothing of this machine."""
        listing = "".join(f"{json.dumps(file.name)} {file.size}\n" for file in self.files)
        return {
            "kind": self.kind,
            **self.details,
            "text_column": self.text_column,
            "files": len(self.files),
            "file_bytes": self.size,
            "first_file": self.files[0].name,
            "last_file": self.files[-1].name,
            "listing_sha256": hashlib.sha256(listing.encode()).hexdigest(),
        }

    def blocks(self, start: Position, *, find_cut: FindCut, notice: Notice = logger.info) -> Iterator[Block]:
        """The blocks from a position on; `notice` hears of documents that take much memory before they are read.

        Raises: UserError for a file that is damaged, cut short, or not as it was when it was listed.
        """
        before = [0]
        for file in self.files:
            before.append(before[-1] + file.size)
        index = start.file
        while index < len(self.files):
            file = self.files[index]
            position = start if index == start.file else Position(file=index)
            context = _Context(file=file, index=index, before=before[index], find_cut=find_cut, notice=notice)
            if file.format == "text" and position.offset == 0 and not _is_long(file):
                block = self._block_of_small_files(index, before)
                yield block
                index = block.end.file
                continue
            with _readable(file):
                read = _read_remote if _is_remote(file) else _read_local
                yield from read(context, position, self.text_column)
                _check_unchanged(file)
            index += 1

    def _block_of_small_files(self, index: int, before: Sequence[int]) -> Block:
        """Text files in a row, each whole, up to about the size of a block."""
        first = index
        names: list[str] = []
        lengths: list[int] = []
        parts: list[bytes] = []
        while index < len(self.files) and sum(lengths) < BLOCK_BYTES and len(names) < 4096:
            file = self.files[index]
            if file.format != "text" or (index > first and _is_long(file)):
                break
            with _readable(file), _open(file) as stream:
                parts.append(_read_all(stream))
                _check_unchanged(file)
            names.append(file.label)
            lengths.append(len(parts[-1]))
            index += 1
        return Block(
            form="files",
            header={"names": names, "python": self.kind == "stdlib"},
            payload=pack_rows(lengths, b"".join(parts)),
            end=Position(file=index),
            source_bytes=before[index],
        )

    def texts(self) -> Iterator[str]:
        """The text of every document, one after the other, in this process (a long text file in several parts)."""
        for block in self.blocks(Position(), find_cut=lambda text, start, stop: start):
            if block.form == "stretch":
                yield block.payload.decode("utf-8")
            else:
                yield from (text for text, _ in documents(block, Counts()))


def open_source(paths: Sequence[str], *, text_column: str = "text", revision: str | None = None) -> Source:
    """The source that these paths name, its files listed but not yet read; `revision` pins a dataset on the Hub.

    Raises: UserError if there is nothing to read, a file is of no known format, or named twice.
    """
    if not paths:
        raise UserError("no source is named; give files, folders, stdlib or hub:DATASET[:CONFIG]")
    special = [path for path in paths if path == STDLIB or path.startswith(HUB_PREFIX)]
    if special and len(paths) > 1:
        raise UserError(f"{special[0]} cannot be combined with other paths in one data set; prepare it by itself")
    if paths[0] == STDLIB:
        return _open_stdlib(text_column)
    if special:
        return _open_hub(paths[0].removeprefix(HUB_PREFIX), text_column=text_column, revision=revision)
    return _open_files(paths, text_column)


# --- files -----------------------------------------------------------------------------------------------------------


def _format_of(name: str) -> tuple[Format, Compression] | None:
    name = name.lower()
    compression: Compression = ".gz" if name.endswith(".gz") else ".zst" if name.endswith(".zst") else ""
    kind = FORMATS.get(Path(name.removesuffix(compression)).suffix)
    return None if kind is None or (kind == "parquet" and compression) else (kind, compression)


def _open_files(paths: Sequence[str], text_column: str) -> Source:
    found: list[tuple[Path, str]] = []
    ignored = 0
    for given in map(Path, paths):
        if given.is_dir():
            inside = sorted(_files_below(given))
            known = [path for path in inside if _format_of(path.name)]
            if not known:
                raise UserError(
                    f"{given} holds no file ending in {SUPPORTED} ({len(inside)} others); name another folder"
                )
            ignored += len(inside) - len(known)
            found += [(path, path.relative_to(given).as_posix()) for path in known]
        elif given.exists():
            if _format_of(given.name) is None:
                raise UserError(f"{given} has an unknown ending; files must end in {SUPPORTED}")
            found.append((given, given.name))
        else:
            raise UserError(f"{given} does not exist; give files, folders, stdlib or hub:DATASET[:CONFIG]")
    found.sort()
    seen: dict[str, Path] = {}
    for path, _ in found:
        other = seen.setdefault(os.path.realpath(path), path)
        if other is not path:
            raise UserError(f"{path} is named twice (also as {other}); name it once")
    return Source(
        kind="files",
        files=tuple(_local_file(path, name) for path, name in found),
        text_column=text_column,
        details={},
        ignored_files=ignored,
    )


def _files_below(folder: Path, *, without: Collection[str] = ()) -> Iterator[Path]:
    """Every file below a folder, through links to folders too but never twice; names that begin with a dot are hidden."""
    entered = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(parent)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        yield from (Path(parent) / name for name in names if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _local_file(path: Path, name: str) -> SourceFile:
    status = path.stat()
    kind, compression = _format_of(path.name) or ("text", "")
    return SourceFile(
        name=name,
        label=str(path),
        path=str(path.absolute()),
        format=kind,
        compression=compression,
        size=status.st_size,
        stamp=str(status.st_mtime_ns),
    )


def _open_stdlib(text_column: str) -> Source:
    """The .py files of the standard library, its tests included, without the packages installed beside it."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in _files_below(root, without=INSTALLED_PACKAGES) if path.suffix == ".py")
    if not paths:
        raise UserError(
            f"the source files of Python's standard library are not in {root}; name a folder of text instead"
        )
    return Source(
        kind="stdlib",
        files=tuple(_local_file(path, path.relative_to(root).as_posix()) for path in paths),
        text_column=text_column,
        details={"python": platform.python_version()},
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Context:
    """What the readers of one file share."""

    file: SourceFile
    index: int
    before: int  # bytes of the files before this one
    find_cut: FindCut
    notice: Notice

    def position(self, *, offset: int = 0, row: int = 0) -> Position:
        return Position(file=self.index, offset=offset, row=row)

    def next_file(self) -> Position:
        return Position(file=self.index + 1)


def _read_local(context: _Context, position: Position, text_column: str) -> Iterator[Block]:
    if context.file.format != "parquet":
        yield from _READERS[context.file.format](context, position, text_column)
        return
    import pyarrow

    try:
        yield from _parquet(context, position, text_column)
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{context.file.label} is damaged, cut short or not Parquet ({_first_line(error)}); get it again"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _open(file: SourceFile) -> IO[bytes]:
    """The uncompressed bytes of a file."""
    raw = _open_remote(file) if _is_remote(file) else _open_local(file)
    if file.compression == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw, mode="rb"))
    if file.compression == ".zst":
        return io.BufferedReader(_ZstdReader(raw), buffer_size=BLOCK_BYTES)
    return raw


def _open_local(file: SourceFile) -> IO[bytes]:
    return Path(file.path).open("rb", buffering=BLOCK_BYTES)


class _ZstdReader(io.RawIOBase):
    """Decompresses Zstandard frames, and knows when the last one is not complete (the package's own reader does not)."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard  # only needed for such files

        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._error = zstandard.ZstdError
        self._raw = raw
        self._frame: Any = None
        self._ready = b""
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._input:
                self._input = self._raw.read(2**16)
                if not self._input:
                    if self._frame is not None:
                        raise EOFError("the last Zstandard frame is not complete")
                    return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._ready = self._frame.decompress(self._input)
            except self._error as error:
                raise zlib.error(str(error)) from None
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


@contextlib.contextmanager
def _readable(file: SourceFile) -> Iterator[None]:
    """Turns damage of a file into one line."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file.label} is damaged or cut short ({error}); get it again") from None
    except FileNotFoundError:
        raise UserError(f"{file.label} has gone since it was listed; put it back and run again") from None


def _check_unchanged(file: SourceFile) -> None:
    if _is_remote(file):
        return  # an address with a revision never changes
    status = Path(file.path).stat()
    if (status.st_size, str(status.st_mtime_ns)) != (file.size, file.stamp):
        raise UserError(f"{file.label} changed while it was read; run again into an empty folder when it is complete")


def _is_long(file: SourceFile) -> bool:
    """Whether a text file has more than LONG_TEXT_BYTES of text; a compressed one must be looked into."""
    if file.format != "text" or not file.compression:
        return file.size > LONG_TEXT_BYTES
    with _readable(file), _open(file) as stream:
        return len(_read_all(stream, LONG_TEXT_BYTES + 1)) > LONG_TEXT_BYTES


def _read_all(stream: IO[bytes], limit: int | None = None) -> bytes:
    """The stream's bytes up to its end or a limit."""
    parts: list[bytes] = []
    while limit is None or limit > 0:
        part = stream.read(BLOCK_BYTES if limit is None else min(limit, BLOCK_BYTES))
        if not part:
            break
        parts.append(part)
        limit = limit if limit is None else limit - len(part)
    return b"".join(parts)


def _skip(stream: IO[bytes], count: int, *, compressed: bool) -> None:
    if not compressed:
        stream.seek(count)
        return
    while count > 0:
        part = stream.read(min(count, BLOCK_BYTES))
        if not part:
            raise EOFError("it ends before the place where reading stopped")
        count -= len(part)


def _share_read(file: SourceFile, offset: int) -> int:
    """Bytes on disk that `offset` uncompressed bytes stand for; of a compressed file a guess, for the progress bar."""
    return min(file.size, offset if not file.compression else offset // 3)


# --- one long text ---------------------------------------------------------------------------------------------------


def _long_text(context: _Context, position: Position, text_column: str) -> Iterator[Block]:
    """A text file in stretches that end where a cut does not change the ids; the hash of the whole comes first."""
    file = context.file
    key, size, has_mark = _hash_text(file)
    for start, stop, data in _stretches(context, max(position.offset, len(BYTE_ORDER_MARK) if has_mark else 0)):
        yield Block(
            form="stretch",
            header={
                "name": file.label,
                "path": file.path,
                "compression": file.compression,
                "start": start,
                "stop": stop,
                "in_payload": data is not None,
                "first": position.offset == 0 and start == (len(BYTE_ORDER_MARK) if has_mark else 0),
                "byte_order_mark": has_mark,
                "key": key,
            },
            payload=data or b"",
            end=context.position(offset=stop) if stop < size else context.next_file(),
            source_bytes=context.before + _share_read(file, stop),
        )


def _hash_text(file: SourceFile) -> tuple[int, int, bool]:
    """Hash of the text without its byte order mark, size with it, and whether there is one."""
    digest = xxhash.xxh3_64()
    with _open(file) as stream:
        part = stream.read(BLOCK_BYTES)
        size, has_mark = len(part), part.startswith(BYTE_ORDER_MARK)
        digest.update(part[len(BYTE_ORDER_MARK) :] if has_mark else part)
        while part := stream.read(BLOCK_BYTES):
            digest.update(part)
            size += len(part)
    return digest.intdigest(), size, has_mark


def _stretches(context: _Context, start: int) -> Iterator[tuple[int, int, bytes | None]]:
    """(start, stop, bytes) one after the other; no bytes for a stretch that is too long to keep."""
    file = context.file
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open(file) as stream:
        _skip(stream, start, compressed=bool(file.compression))
        text, text_start = "", start  # what is looked through for a cut, and where it stands
        kept: list[str] | None = []  # what stands between `start` and `text`; None: too long to keep
        offset = start
        while True:
            data = stream.read(BLOCK_BYTES)
            pending = decoder.getstate()[0]
            try:
                text += decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise not_utf8(error, where=file.label, offset=offset - len(pending)) from None
            offset += len(data)
            searched = 0
            while data and len(text) - searched > BLOCK_BYTES:
                # the very end is left out: what a cut there would look like depends on what follows
                cut = context.find_cut(text, searched + BLOCK_BYTES // 2, len(text) - 1)
                if cut is None:
                    break
                stop = text_start + len(text[searched:cut].encode())
                whole = None if kept is None else "".join([*kept, text[searched:cut]]).encode()
                yield start, stop, whole
                start = text_start = stop
                searched, kept = cut, []
            text = text[searched:]
            if not data:
                whole = None if kept is None else "".join([*kept, text]).encode()
                if offset > start:
                    yield start, offset, whole
                return
            if len(text) > 2 * BLOCK_BYTES:  # nowhere to cut so far: keep looking at the end only
                done = text[:-BLOCK_BYTES]
                text_start += len(done.encode())
                if kept is not None:
                    kept.append(done)
                    kept = kept if text_start - start < KEPT_STRETCH_BYTES else None
                text = text[-BLOCK_BYTES:]


def read_stretch(header: dict[str, Any], payload: bytes | bytearray) -> Iterator[str]:
    """The text of a stretch of a long file in chunks, from the block itself or from the file."""
    if header["in_payload"]:
        yield payload.decode("utf-8")
        return
    file = SourceFile(
        name=header["name"],
        label=header["name"],
        path=header["path"],
        format="text",
        compression=header["compression"],
        size=0,
        stamp="",
    )
    decoder = codecs.getincrementaldecoder("utf-8")()
    left = header["stop"] - header["start"]
    with _readable(file), _open(file) as stream:
        _skip(stream, header["start"], compressed=bool(file.compression))
        while left:
            data = stream.read(min(left, BLOCK_BYTES // 4))
            if not data:
                raise EOFError("it became shorter")
            left -= len(data)
            yield decoder.decode(data, final=not left)


# --- JSONL -----------------------------------------------------------------------------------------------------------


def _jsonl(context: _Context, position: Position, text_column: str) -> Iterator[Block]:
    file = context.file
    offset, row = position.offset, position.row
    announced = False
    with _open(file) as stream:
        _skip(stream, offset, compressed=bool(file.compression))
        parts: list[bytes] = []
        while True:
            data = stream.read(BLOCK_BYTES)
            end = data.rfind(b"\n") + 1
            if data and not end:
                parts.append(data)
                if not announced and sum(map(len, parts)) > LARGE_DOCUMENT_BYTES:
                    announced = True
                    _announce_line(context, offset, row + 1)
                continue
            payload = b"".join([*parts, data[:end]])
            parts, announced = [data[end:]] if data[end:] else [], False
            if payload:
                header = {"name": file.label, "line": row + 1, "offset": offset, "column": text_column}
                offset += len(payload)
                row += payload.count(b"\n")
                yield Block(
                    form="lines",
                    header=header,
                    payload=payload,
                    end=context.position(offset=offset, row=row),
                    source_bytes=context.before + _share_read(file, offset),
                )
            if not data:
                return


def _announce_line(context: _Context, start: int, number: int) -> None:
    """Measures a very long line without keeping it, and says what reading it will take."""
    length = 0
    with _open(context.file) as stream:
        _skip(stream, start, compressed=bool(context.file.compression))
        while data := stream.read(BLOCK_BYTES):
            end = data.find(b"\n")
            length += len(data) if end < 0 else end
            if end >= 0:
                break
    context.notice(
        f"{context.file.label} line {number} has {length / 2**20:.0f} MiB: reading it takes up to "
        f"{6 * length / 2**30:.1f} GiB of memory"
    )


# --- Parquet ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _RowGroup:
    """A row group of a Parquet file: which rows it holds, and how much of the text column."""

    index: int
    start: int
    end: int
    size: int  # uncompressed [bytes]
    compressed: int  # [bytes]


def _parquet(context: _Context, position: Position, text_column: str) -> Iterator[Block]:
    with _open(context.file) as stream:
        table = _open_table(stream)
        for group in _row_groups(context, table, position.row, text_column):
            yield from _rows(context, table, group, max(position.row, group.start), text_column)


def _open_table(stream: IO[bytes], *, metadata: Any = None) -> Any:
    """The Parquet file in a stream, read a little at a time; a remote one, whose metadata is known, in whole ranges."""
    from pyarrow import parquet

    whole = metadata is not None
    return parquet.ParquetFile(stream, metadata=metadata, pre_buffer=whole, buffer_size=0 if whole else BLOCK_BYTES)


def _check_column(schema: Any, text_column: str, label: str) -> None:
    from pyarrow import types

    if text_column not in schema.names:
        raise missing_column(label, text_column, schema.names)
    kind = schema.field(text_column).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(value) or types.is_large_string(value)):
        raise UserError(f"{label}: the column {text_column!r} is {kind}, not a string; name another with --text-column")


def _row_groups(context: _Context, table: Any, first_row: int, column: str) -> list[_RowGroup]:
    """The row groups that hold rows from `first_row` on; announces documents that take much memory."""
    _check_column(table.schema_arrow, column, context.file.label)
    found, start = [], 0
    for index in range(table.num_row_groups):
        metadata = table.metadata.row_group(index)
        end = start + metadata.num_rows
        if end > first_row:
            chunks = [metadata.column(n) for n in range(metadata.num_columns)]
            chunks = [chunk for chunk in chunks if chunk.path_in_schema == column]
            group = _RowGroup(
                index=index,
                start=start,
                end=end,
                size=sum(chunk.total_uncompressed_size for chunk in chunks),
                compressed=sum(chunk.total_compressed_size for chunk in chunks),
            )
            # a page must be read as a whole: one document at least, and of a dictionary all that it holds
            page = max([group.size // metadata.num_rows, *(_dictionary_size(chunk) for chunk in chunks)])
            if page > LARGE_DOCUMENT_BYTES:
                context.notice(
                    f"{context.file.label} rows {start} to {end - 1} lie in pages of up to {page / 2**20:.0f} MiB: reading "
                    f"one takes up to {3 * page / 2**30:.1f} GiB of memory"
                )
            found.append(group)
        start = end
    return found


def _dictionary_size(chunk: Any) -> int:
    """Bytes of the dictionary page of a column chunk, about; 0 if it has none."""
    if not chunk.has_dictionary_page or not chunk.total_compressed_size:
        return 0
    compressed = chunk.data_page_offset - chunk.dictionary_page_offset
    return int(compressed * chunk.total_uncompressed_size / chunk.total_compressed_size)


def _rows(context: _Context, table: Any, group: _RowGroup, first_row: int, column: str) -> Iterator[Block]:
    """Blocks of about BLOCK_BYTES from a row group, from a row on."""
    num_rows = table.metadata.num_rows
    rows_at_a_time = max(1, min(ROWS_AT_A_TIME, BLOCK_BYTES * (group.end - group.start) // max(1, group.size)))
    row, skip = first_row, first_row - group.start
    lengths: list[int] = []
    parts: list[bytes] = []
    for batch in table.iter_batches(
        batch_size=rows_at_a_time, row_groups=[group.index], columns=[column], use_threads=False
    ):
        if skip >= len(batch):
            skip -= len(batch)
            continue
        array_lengths, data = _strings(batch.column(0).slice(skip))
        skip = 0
        lengths += array_lengths
        parts.append(data)
        end = row + len(lengths)
        if end == group.end or sum(map(len, parts)) >= BLOCK_BYTES:
            yield Block(
                form="rows",
                header={"name": context.file.label, "row": row},
                payload=pack_rows(lengths, b"".join(parts)),
                end=context.position(row=end) if end < num_rows else context.next_file(),
                source_bytes=context.before + context.file.size * end // num_rows,
            )
            row, lengths, parts = end, [], []


def _strings(array: Any) -> tuple[list[int], bytes]:
    """Lengths (-1: null) and bytes of an Arrow array of strings, without a Python string for each."""
    import pyarrow

    if pyarrow.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    nulls = np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False)) if array.null_count else ()
    array = array.cast(pyarrow.large_string())
    array = array.fill_null("") if array.null_count else array
    _, offset_buffer, data_buffer = array.buffers()
    offsets = np.frombuffer(offset_buffer, "<i8")[array.offset : array.offset + len(array) + 1]
    lengths = np.diff(offsets)
    lengths[list(nulls)] = -1
    data = b"" if data_buffer is None else memoryview(data_buffer)[int(offsets[0]) : int(offsets[-1])].tobytes()
    return lengths.tolist(), data


_READERS = {"text": _long_text, "jsonl": _jsonl, "parquet": _parquet}


# --- the Hub ---------------------------------------------------------------------------------------------------------

MAX_RETRIES = 8  # failures in a row, each after the client's own retries, before reading stops
FIRST_WAIT_SECONDS = 1.0  # before the first retry; doubled for each further one
LONGEST_WAIT_SECONDS = 60.0
FETCHES_AT_A_TIME = 4  # row groups asked for ahead of need
MAX_FETCH_BYTES = 2**26  # a larger row group is read a little at a time instead [bytes]

_DATASET_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HUB_ADDRESS = re.compile(r"hf://datasets/[^@]+@([^/]+)/(.+)")
_INSTEAD = (
    "check the connection (or HF_ENDPOINT), or download Parquet files elsewhere and run `toolkit prepare FOLDER`, or "
    "`toolkit prepare stdlib` for text that is already on this machine"
)


def _is_remote(file: SourceFile) -> bool:
    return file.path.startswith("hf://")


def _open_hub(name: str, *, text_column: str, revision: str | None) -> Source:
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
    addresses, config_name = _retried(lambda: _resolve(dataset, config, revision), f"hub:{name}")
    files = sorted(_retried(lambda: _remote_files(name, addresses), f"hub:{name}"), key=lambda file: Path(file.name))
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
            raise UserError(f"hub:{name} cannot be reached at {endpoint} ({_first_line(error)}); {_INSTEAD}") from None


CONNECT_SECONDS = 10.0  # for the first sign of life of the Hub
_NO_WAY = {"ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError", "UnsupportedProtocol"}


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
        kind = _format_of(path.replace(".json", ".jsonl") if re.search(r"\.json(\.gz|\.zst)?$", path) else path)
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


def _open_remote(file: SourceFile) -> IO[bytes]:
    from huggingface_hub import HfFileSystem

    # Parquet is read in exact ranges, the others from front to back
    cache = "none" if file.format == "parquet" else "readahead"
    return cast(IO[bytes], _FullReads(HfFileSystem().open(file.path, "rb", cache_type=cache), file.size))


class _FullReads(io.RawIOBase):
    """A remote file of which a read that comes back short is an error, not the end of the file."""

    def __init__(self, file: Any, size: int) -> None:
        self._file = file
        self._size = size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def read(self, size: int = -1) -> bytes:
        left = self._size - self._file.tell()
        wanted = left if size is None or size < 0 else min(size, left)
        data = bytes(self._file.read(wanted)) if wanted else b""
        if len(data) != wanted:
            raise OSError(f"got {len(data)} of {wanted} bytes")
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _read_remote(context: _Context, position: Position, text_column: str) -> Iterator[Block]:
    """The blocks of a file on the Hub; a broken connection is taken up where it broke."""
    if context.file.format == "parquet":
        yield from _remote_parquet(context, position, text_column)
    else:
        yield from _going_on(context, position, lambda at: _READERS[context.file.format](context, at, text_column))


def _remote_parquet(context: _Context, position: Position, text_column: str) -> Iterator[Block]:
    """As `_parquet`, with several row groups asked for ahead of need."""
    label = context.file.label

    def read_metadata() -> Any:
        with _open(context.file) as stream:
            return _open_table(stream)

    def fetch(group: _RowGroup) -> list[Block]:
        with _open(context.file) as stream:
            table = _open_table(stream, metadata=metadata)
            return list(_rows(context, table, group, max(position.row, group.start), text_column))

    def read_slowly(group: _RowGroup) -> Iterator[Block]:
        def read(at: Position) -> Iterator[Block]:
            with _open(context.file) as stream:
                yield from _rows(context, _open_table(stream), group, at.row, text_column)

        return _going_on(context, context.position(row=max(position.row, group.start)), read)

    opened = _retried(read_metadata, label, context.notice)
    metadata = opened.metadata
    waiting: deque[Iterator[Block] | Future[list[Block]]] = deque()
    with ThreadPoolExecutor(FETCHES_AT_A_TIME, thread_name_prefix="hub") as threads:
        try:
            for group in _row_groups(context, opened, position.row, text_column):
                if group.compressed > MAX_FETCH_BYTES:
                    waiting.append(read_slowly(group))
                else:
                    waiting.append(threads.submit(_retried, functools.partial(fetch, group), label, context.notice))
                if len(waiting) > FETCHES_AT_A_TIME:
                    yield from _blocks_of(waiting.popleft())
            while waiting:
                yield from _blocks_of(waiting.popleft())
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def _blocks_of(item: "Iterator[Block] | Future[list[Block]]") -> Iterator[Block]:
    yield from item.result() if isinstance(item, Future) else item


def _going_on(context: _Context, position: Position, read: Callable[[Position], Iterator[Block]]) -> Iterator[Block]:
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
            _wait(error, failures, context.file.label, context.notice)


def _retried(act: Callable[[], Any], label: str, notice: Notice = logger.info) -> Any:
    """The result of `act`, tried again after growing waits while the connection fails."""
    failures = 0
    while True:
        try:
            return act()
        except Exception as error:
            failures += 1
            _wait(error, failures, label, notice)


def _wait(error: Exception, failures: int, label: str, notice: Notice) -> None:
    """Waits before the next try, or raises: the error itself if it is not the connection's, else a UserError."""
    status = _status_of(error)
    reason = f"HTTP {status}" if status else _first_line(error)
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
    time.sleep(seconds)


def _is_transient(error: Exception, status: int | None) -> bool:
    import pyarrow

    if status is not None:
        return status in (408, 425, 429) or status >= 500
    package = type(error).__module__.partition(".")[0]
    return package in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3") or isinstance(
        error, OSError | EOFError | zlib.error | pyarrow.ArrowException
    )


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
