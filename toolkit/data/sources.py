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
import gzip
import hashlib
import io
import json
import logging
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
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
            read = {"text": _long_text, "jsonl": _jsonl, "parquet": _parquet}[file.format]
            with _readable(file):
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


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, through links to folders too but never twice; names that begin with a dot are hidden."""
    entered = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(parent)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
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
    left_out = {"site-packages", "dist-packages", "__pycache__"}
    paths = sorted(path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts))
    if not paths:
        raise UserError(
            f"the source files of Python's standard library are not in {root}; name a folder of text instead"
        )
    return Source(
        kind="stdlib",
        files=tuple(_local_file(path, path.relative_to(root).as_posix()) for path in paths),
        text_column=text_column,
        details={"python": sysconfig.get_python_version()},
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


def _parquet(context: _Context, position: Position, text_column: str) -> Iterator[Block]:
    import pyarrow
    from pyarrow import parquet

    file = context.file
    with _open(file) as stream:
        try:
            table = parquet.ParquetFile(stream, pre_buffer=False, buffer_size=BLOCK_BYTES)
            _check_column(table.schema_arrow, text_column, file.label)
            for start, batches in _row_groups(context, table, position.row, text_column):
                yield from _rows(context, batches, start, table.metadata.num_rows)
        except pyarrow.ArrowException as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{file.label} is damaged, cut short or not Parquet ({reason}); get it again") from None


def _check_column(schema: Any, text_column: str, label: str) -> None:
    from pyarrow import types

    if text_column not in schema.names:
        raise missing_column(label, text_column, schema.names)
    kind = schema.field(text_column).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(value) or types.is_large_string(value)):
        raise UserError(f"{label}: the column {text_column!r} is {kind}, not a string; name another with --text-column")


def _row_groups(context: _Context, table: Any, first_row: int, column: str) -> Iterator[tuple[int, Iterator[Any]]]:
    """(number of the first row, Arrow arrays of the column from there on) for each row group from `first_row` on."""
    group_start = 0
    for group in range(table.num_row_groups):
        metadata = table.metadata.row_group(group)
        group_end = group_start + metadata.num_rows
        if group_end > first_row:
            chunks = [metadata.column(n) for n in range(metadata.num_columns)]
            size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
            average = size // max(1, metadata.num_rows)
            if average > LARGE_DOCUMENT_BYTES:
                context.notice(
                    f"{context.file.label} rows {group_start} to {group_end - 1} have {average / 2**20:.0f} MiB each: "
                    f"reading one takes up to {6 * average / 2**30:.1f} GiB of memory"
                )
            rows = max(1, min(ROWS_AT_A_TIME, BLOCK_BYTES // max(1, average)))
            start = max(first_row, group_start)
            yield start, _arrays(table, group, column, rows, skip=start - group_start)
        group_start = group_end


def _arrays(table: Any, group: int, column: str, rows: int, *, skip: int) -> Iterator[Any]:
    for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=[column], use_threads=False):
        if skip >= len(batch):
            skip -= len(batch)
            continue
        yield batch.column(0).slice(skip)
        skip = 0


def _rows(context: _Context, arrays: Iterator[Any], row: int, num_rows: int) -> Iterator[Block]:
    """Blocks of about BLOCK_BYTES from a row group's arrays."""
    lengths: list[int] = []
    parts: list[bytes] = []

    def block() -> Block:
        end = row + len(lengths)
        return Block(
            form="rows",
            header={"name": context.file.label, "row": row},
            payload=pack_rows(lengths, b"".join(parts)),
            end=context.position(row=end) if end < num_rows else context.next_file(),
            source_bytes=context.before + context.file.size * end // num_rows,
        )

    for array in arrays:
        array_lengths, data = _strings(array)
        lengths += array_lengths
        parts.append(data)
        if sum(map(len, parts)) >= BLOCK_BYTES:
            yield block()
            row += len(lengths)
            lengths, parts = [], []
    if lengths:
        yield block()


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


# --- the Hub ---------------------------------------------------------------------------------------------------------


def _is_remote(file: SourceFile) -> bool:
    return file.path.startswith("hf://")


def _open_remote(file: SourceFile) -> IO[bytes]:
    raise NotImplementedError


def _open_hub(name: str, *, text_column: str, revision: str | None) -> Source:
    raise NotImplementedError
