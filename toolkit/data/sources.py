"""Files, folders, the standard library or a dataset on the Hub -> blocks of documents, from any position on.

A source lists its files in sorted path order and cuts them into blocks that workers can tokenize independently
(`documents`). Formats: `.txt` (one document), `.jsonl` (one on each line), `.parquet` (one in each row); the first two
also as `.gz` or `.zst`. `stdlib` means the source files of the Python that runs, which every machine has;
write `./stdlib` for a file or folder of that name. `hub:DATASET[:CONFIG]` is the train split of a dataset on the Hub.

Guarantees: the documents and their order depend on the files alone, not on where the blocks are cut; reading can go on
from the end of any block without reading what came before (a compressed file is decompressed again up to there); a
source whose files change meanwhile is refused. Does not: tokenize, split, write.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import stat
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from toolkit.data import reading
from toolkit.data.documents import Block, Counts, Position, documents, missing_column, pack_rows
from toolkit.data.reading import (
    SUPPORTED,
    FindCut,
    Notice,
    ReadContext,
    SourceFile,
    check_unchanged,
    first_line,
    format_of,
    is_long_text,
    is_remote,
    open_file,
    read_up_to,
    readable,
)
from toolkit.errors import UserError

logger = logging.getLogger(__name__)

STDLIB = "stdlib"
INSTALLED_PACKAGES = ("site-packages", "dist-packages")  # folders beside the standard library that are not part of it
HUB_PREFIX = "hub:"

ROWS_AT_A_TIME = 256  # Parquet rows decoded at one time: a small column may unfold into large equal documents [rows]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Documents in a fixed order, and what identifies them."""

    kind: Literal["files", "stdlib", "hub"]
    files: tuple[SourceFile, ...]
    text_column: str
    details: dict[str, str]  # what else identifies the source: a revision, a version of Python
    ignored_files: int = 0  # in the folders, with other endings

    def __post_init__(self) -> None:
        empty = [file.label for file in self.files if file.compression and not file.size]
        if empty:  # their readers would take it for an empty text
            raise UserError(f"{empty[0]} has no bytes at all, so it is no {Path(empty[0]).suffix} file; get it again")

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
            context = ReadContext(file=file, index=index, before=before[index], find_cut=find_cut, notice=notice)
            if file.format == "text" and position.offset == 0 and not is_long_text(file):
                block = self._block_of_small_files(index, before)
                yield block
                index = block.end.file
                continue
            with readable(file):
                yield from _read(context, position, self.text_column)
                check_unchanged(file)
            index += 1

    def _block_of_small_files(self, index: int, before: Sequence[int]) -> Block:
        """Text files in a row, each whole, up to about the size of a block."""
        first = index
        names: list[str] = []
        lengths: list[int] = []
        parts: list[bytes] = []
        while index < len(self.files) and sum(lengths) < reading.BLOCK_BYTES and len(names) < 4096:
            file = self.files[index]
            if file.format != "text" or (index > first and is_long_text(file)):
                break
            with readable(file), open_file(file) as stream:
                parts.append(read_up_to(stream))
                check_unchanged(file)
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
        from toolkit.data.hub import open_hub  # datasets is large: imported only for the Hub

        return open_hub(paths[0].removeprefix(HUB_PREFIX), text_column=text_column, revision=revision)
    return _open_files(paths, text_column)


# --- files -----------------------------------------------------------------------------------------------------------


def _open_files(paths: Sequence[str], text_column: str) -> Source:
    found: list[tuple[Path, str]] = []
    ignored = 0
    for given in map(Path, paths):
        if given.is_dir():
            inside = sorted(_files_below(given))
            known = [path for path in inside if format_of(path.name)]
            if not known:
                raise UserError(
                    f"{given} holds no file ending in {SUPPORTED} ({len(inside)} others); name another folder"
                )
            ignored += len(inside) - len(known)
            found += [(path, path.relative_to(given).as_posix()) for path in known]
        elif given.exists():
            if format_of(given.name) is None:
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
        # sorted: of two ways into a folder, the one that is taken names its files
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in without)
        yield from (Path(parent) / name for name in names if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _local_file(path: Path, name: str) -> SourceFile:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise UserError(f"{path} is a pipe, a device or a socket, not a file; leave it out")
    kind, compression = format_of(path.name) or ("text", "")
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


def _read(context: ReadContext, position: Position, text_column: str) -> Iterator[Block]:
    if is_remote(context.file):
        from toolkit.data.hub import read_remote

        yield from read_remote(context, position, text_column)
    elif context.file.format == "parquet":
        yield from _read_parquet(context, position, text_column)
    else:
        yield from reading.READERS[context.file.format](context, position, text_column)


# --- Parquet ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroup:
    """A row group of a Parquet file: which rows it holds, and how much of the text column."""

    index: int
    start: int
    end: int
    size: int  # uncompressed [bytes]
    compressed: int  # [bytes]


@contextlib.contextmanager
def open_parquet(file: SourceFile) -> Iterator[IO[bytes]]:
    """The bytes of a Parquet file; turns damage that its reader meets into one line."""
    import pyarrow

    try:
        with open_file(file) as stream:
            yield stream
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise  # the disk's or the connection's; of damage Arrow says so without a number
        raise UserError(
            f"{file.label} is damaged, cut short or not Parquet ({first_line(error)}); get it again"
        ) from None


def _read_parquet(context: ReadContext, position: Position, text_column: str) -> Iterator[Block]:
    with open_parquet(context.file) as stream:
        table = open_table(stream)
        for group in row_groups(context, table, position.row, text_column):
            yield from rows_of(context, table, group, max(position.row, group.start), text_column)


def open_table(stream: IO[bytes], *, metadata: Any = None, buffer_size: int | None = None) -> Any:
    """The Parquet file in a stream, read `buffer_size` at a time; 0: each range that is needed as a whole."""
    from pyarrow import parquet

    buffer_size = reading.BLOCK_BYTES if buffer_size is None else buffer_size
    return parquet.ParquetFile(
        stream,
        metadata=metadata,
        pre_buffer=buffer_size == 0,
        buffer_size=buffer_size,
        page_checksum_verification=True,
    )


def _check_column(schema: Any, text_column: str, label: str) -> None:
    from pyarrow import types

    if text_column not in schema.names:
        raise missing_column(label, text_column, schema.names)
    if (count := schema.names.count(text_column)) > 1:
        raise UserError(f"{label} has {count} columns {text_column!r}; rename or drop all but one")
    kind = schema.field(text_column).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)):
        raise UserError(f"{label}: the column {text_column!r} is {kind}, not a string; name another with --text-column")


def row_groups(context: ReadContext, table: Any, first_row: int, column: str) -> list[RowGroup]:
    """The row groups that hold rows from `first_row` on; announces documents that take much memory."""
    _check_column(table.schema_arrow, column, context.file.label)
    found, start = [], 0
    for index in range(table.num_row_groups):
        metadata = table.metadata.row_group(index)
        end = start + metadata.num_rows
        if end > first_row:
            chunks = [metadata.column(n) for n in range(metadata.num_columns)]
            chunks = [chunk for chunk in chunks if chunk.path_in_schema == column]
            group = RowGroup(
                index=index,
                start=start,
                end=end,
                size=sum(chunk.total_uncompressed_size for chunk in chunks),
                compressed=sum(chunk.total_compressed_size for chunk in chunks),
            )
            # a page must be read as a whole: one document at least, and of a dictionary all that it holds
            page = max([group.size // max(1, metadata.num_rows), *(_dictionary_size(chunk) for chunk in chunks)])
            if page > reading.LARGE_DOCUMENT_BYTES:
                context.notice(
                    f"{context.file.label} rows {start} to {end - 1} lie in pages of up to {page / 2**20:.0f} MiB: reading "
                    f"one takes up to {4 * page / 2**30:.1f} GiB of memory"
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


def rows_of(context: ReadContext, table: Any, group: RowGroup, first_row: int, column: str) -> Iterator[Block]:
    """Blocks of about BLOCK_BYTES from a row group, from a row on."""
    num_rows = table.metadata.num_rows
    rows_at_a_time = max(1, min(ROWS_AT_A_TIME, reading.BLOCK_BYTES * (group.end - group.start) // max(1, group.size)))
    if group.size > reading.LARGE_DOCUMENT_BYTES:
        rows_at_a_time = 1  # any of them may be large, whatever their mean
    row, skip = first_row, first_row - group.start
    lengths: list[int] = []
    parts: list[bytes] = []
    size = 0  # of the parts
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
        size += len(data)
        end = row + len(lengths)
        if end == group.end or size >= reading.BLOCK_BYTES:
            yield Block(
                form="rows",
                header={"name": context.file.label, "row": row},
                payload=pack_rows(lengths, b"".join(parts)),
                end=context.position(row=end) if end < num_rows else context.next_file(),
                source_bytes=context.before + context.file.size * end // num_rows,
            )
            row, lengths, parts, size = end, [], [], 0


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
