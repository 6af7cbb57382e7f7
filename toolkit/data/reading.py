"""Files -> blocks: opening plain, compressed and remote files, and cutting text and JSONL into blocks.

Guarantees: reading goes on from the end of any block; a file that is damaged, cut short or changed meanwhile is an error,
never an early end. Does not: list files (`sources`), read Parquet (`sources`), wait for a network to come back (`hub`).
"""

import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import xxhash

from toolkit.data.documents import BYTE_ORDER_MARK, Block, Position, not_utf8
from toolkit.errors import UserError

Format = Literal["text", "jsonl", "parquet"]
Compression = Literal["", ".gz", ".zst"]
FindCut = Callable[[str, int, int], int | None]  # `Tokenizer.exact_cut`
Notice = Callable[[str], None]

FORMATS: dict[str, Format] = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
SUPPORTED = ".txt, .jsonl (both also .gz, .zst) and .parquet"

BLOCK_BYTES = 2**20  # text in one block: about a quarter of a million tokens, 0.1 s of one worker's work [bytes]
LONG_TEXT_BYTES = 2**22  # a text file above this is cut into stretches [bytes]
ZSTD_INPUT_BYTES = 2**10  # decompressed at one time; may unfold into eleven thousand times as much, all held [bytes]
KEPT_STRETCH_BYTES = 2**23  # a longer stretch (text without any place to cut) is read by the worker itself [bytes]
LARGE_DOCUMENT_BYTES = 2**25  # a larger document in one piece is announced with the memory it takes [bytes]


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
class ReadContext:
    """What the readers of one file share."""

    file: SourceFile
    index: int
    before: int  # bytes of the files before this one
    find_cut: FindCut
    notice: Notice

    def position(self, *, offset: int = 0, row: int = 0) -> Position:
        """A position in this file."""
        return Position(file=self.index, offset=offset, row=row)

    def next_file(self) -> Position:
        """The start of the next file."""
        return Position(file=self.index + 1)


def format_of(name: str) -> tuple[Format, Compression] | None:
    """Format and compression by the ending of a name, or None if that is not one we read."""
    name = name.lower()
    compression: Compression = ".gz" if name.endswith(".gz") else ".zst" if name.endswith(".zst") else ""
    kind = FORMATS.get(Path(name.removesuffix(compression)).suffix)
    return None if kind is None or (kind == "parquet" and compression) else (kind, compression)


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def is_remote(file: SourceFile) -> bool:
    """Whether a file lies on the Hub."""
    return file.path.startswith("hf://")


@contextlib.contextmanager
def open_file(file: SourceFile) -> Iterator[IO[bytes]]:
    """The uncompressed bytes of a file."""
    with _open_both(file) as (stream, _):
        yield stream


@contextlib.contextmanager
def _open_both(file: SourceFile) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The uncompressed bytes of a file, and its bytes as they lie on disk, from which the former are read."""
    with _open_remote(file) if is_remote(file) else Path(file.path).open("rb", buffering=BLOCK_BYTES) as raw:
        if file.compression == ".gz":
            yield cast(IO[bytes], gzip.GzipFile(fileobj=raw, mode="rb")), raw
        elif file.compression == ".zst":
            yield io.BufferedReader(_ZstdReader(raw), buffer_size=BLOCK_BYTES), raw
        else:
            yield raw, raw


class _ZstdReader(io.RawIOBase):
    """Decompresses Zstandard frames, and knows when the last one is not complete (the package's own reader does not)."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard  # only needed for such files

        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._error = zstandard.ZstdError
        self._raw = raw
        self._frame: Any = None
        self._ready = memoryview(b"")
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._input:
                self._input = self._raw.read(ZSTD_INPUT_BYTES)
                if not self._input:
                    if self._frame is not None:
                        raise EOFError("the last Zstandard frame is not complete")
                    return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(self._input))
            except self._error as error:
                raise zlib.error(str(error)) from None
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


@contextlib.contextmanager
def readable(file: SourceFile) -> Iterator[None]:
    """Turns damage of a file into one line."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file.label} is damaged or cut short ({error}); get it again") from None
    except FileNotFoundError:
        raise UserError(f"{file.label} has gone since it was listed; put it back and run again") from None


def check_unchanged(file: SourceFile) -> None:
    """Raises UserError if a file is no longer as it was when it was listed."""
    if is_remote(file):
        return  # an address with a revision never changes
    status = Path(file.path).stat()
    if (status.st_size, str(status.st_mtime_ns)) != (file.size, file.stamp):
        raise UserError(f"{file.label} changed while it was read; run again into an empty folder when it is complete")


def is_long_text(file: SourceFile) -> bool:
    """Whether a text file has more than LONG_TEXT_BYTES of text; a compressed one must be looked into."""
    if file.format != "text" or not file.compression:
        return file.size > LONG_TEXT_BYTES
    with readable(file), open_file(file) as stream:
        return len(read_up_to(stream, LONG_TEXT_BYTES + 1)) > LONG_TEXT_BYTES


def read_up_to(stream: IO[bytes], limit: int | None = None) -> bytes:
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


def _share_read(file: SourceFile, offset: int, raw: IO[bytes]) -> int:
    """Bytes on disk that `offset` uncompressed bytes stand for; of a compressed file all that were read, a little more."""
    return raw.tell() if file.compression else offset


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
            raise ConnectionError(f"got {len(data)} of {wanted} bytes")
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


# --- one long text ---------------------------------------------------------------------------------------------------


def read_text(context: ReadContext, position: Position, text_column: str) -> Iterator[Block]:
    """A text file in stretches that end where a cut does not change the ids; the hash of the whole comes first."""
    file = context.file
    key, size, has_mark, is_space = _hash_text(file)
    for start, stop, data, share_read in _stretches(
        context, max(position.offset, len(BYTE_ORDER_MARK) if has_mark else 0)
    ):
        yield Block(
            form="stretch",
            header={
                "name": file.label,
                "path": file.path,
                "compression": file.compression,
                "start": start,
                "stop": stop,
                "size": file.size,
                "in_payload": data is not None,
                "first": position.offset == 0 and start == (len(BYTE_ORDER_MARK) if has_mark else 0),
                "byte_order_mark": has_mark,
                "white_space_only": is_space,
                "key": key,
            },
            payload=data or b"",
            end=context.position(offset=stop) if stop < size else context.next_file(),
            source_bytes=context.before + share_read,
        )


def _hash_text(file: SourceFile) -> tuple[int, int, bool, bool]:
    """Hash of the text without its byte order mark, size with it, whether there is one, whether all is white space."""
    digest = xxhash.xxh3_64()
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # what is no UTF-8 is no white space
    with open_file(file) as stream:
        part = stream.read(BLOCK_BYTES)
        size, has_mark, is_space = 0, part.startswith(BYTE_ORDER_MARK), True
        while part:
            text = part[len(BYTE_ORDER_MARK) :] if has_mark and size == 0 else part
            digest.update(text)
            is_space = is_space and (decoder.decode(text) or " ").isspace()
            size += len(part)
            part = stream.read(BLOCK_BYTES)
    return digest.intdigest(), size, has_mark, is_space


def _stretches(context: ReadContext, start: int) -> Iterator[tuple[int, int, bytes | None, int]]:
    """(start, stop, bytes, bytes on disk up to `stop`) one after the other; no bytes for what is too long to keep."""
    file = context.file
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open_both(file) as (stream, raw):
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
                yield start, stop, whole, _share_read(file, stop, raw)
                start = text_start = stop
                searched, kept = cut, []
            text = text[searched:]
            if not data:
                whole = None if kept is None else "".join([*kept, text]).encode()
                if offset > start:
                    yield start, offset, whole, _share_read(file, offset, raw)
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
        size=header["size"],
        stamp="",
    )
    decoder = codecs.getincrementaldecoder("utf-8")()
    left = header["stop"] - header["start"]
    with readable(file), open_file(file) as stream:
        _skip(stream, header["start"], compressed=bool(file.compression))
        while left:
            data = stream.read(min(left, BLOCK_BYTES // 4))
            if not data:
                raise EOFError("it became shorter")
            left -= len(data)
            yield decoder.decode(data, final=not left)


# --- JSONL -----------------------------------------------------------------------------------------------------------


def read_jsonl(context: ReadContext, position: Position, text_column: str) -> Iterator[Block]:
    """Whole lines of a JSONL file, about BLOCK_BYTES at a time; the workers parse them."""
    file = context.file
    offset, row = position.offset, position.row
    announced = False
    with _open_both(file) as (stream, raw):
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
                    source_bytes=context.before + _share_read(file, offset, raw),
                )
            if not data:
                return


def _announce_line(context: ReadContext, start: int, number: int) -> None:
    """Measures a very long line without keeping it, and says what reading it will take."""
    length = 0
    with open_file(context.file) as stream:
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


READERS = {"text": read_text, "jsonl": read_jsonl}
