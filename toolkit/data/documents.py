"""Blocks of source bytes -> documents: what a worker does before it tokenizes. It lists no files.

A block is a stretch of the source that one worker can handle alone: whole text files, JSONL lines, Parquet rows, or a
part of one long text file. What happens to unusual text, counted in `Counts` and reported at the end:

- Text files must be UTF-8; anything else is refused with the file and the byte. Only the source files of the standard
  library are decoded by their coding line, and the few that cannot be are skipped.
- A byte order mark at the start of a file is removed. CRLF, NUL and every other character are kept as they are.
- A lone surrogate (`"\\ud800"` in JSON), which no UTF-8 text can hold, becomes U+FFFD.
- An empty document and one that is null are skipped; a document of white space alone is kept.
- A literal `<|endoftext|>` is ordinary text.
- A line that is not JSON, a missing field, and a text that is not a string are refused with file and line.
"""

import io
import json
import tokenize
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from toolkit.data.tokenizer import replace_surrogates
from toolkit.errors import UserError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where reading goes on: number of the file, byte offset in it (uncompressed), rows or lines before it."""

    file: int = 0
    offset: int = 0
    row: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A stretch of source bytes; `header` says in JSON values how to read `payload`, `end` where the next one starts."""

    form: Literal["files", "lines", "rows", "stretch"]
    header: dict[str, Any]
    payload: bytes | bytearray
    end: Position
    source_bytes: int  # bytes of all source files up to `end`, as they lie on disk: for the progress bar and estimates


@dataclass(kw_only=True, slots=True)
class Counts:
    """What was read and what became of it; every document that was read is either kept or skipped for one reason."""

    documents: int = 0  # kept
    utf8_bytes: int = 0  # of the kept ones
    skipped_empty: int = 0
    skipped_null: int = 0
    skipped_undecodable: int = 0  # source files of the standard library whose bytes do not fit their coding line
    skipped_blank_lines: int = 0  # lines of a JSONL file with nothing on them: no documents
    white_space_only: int = 0  # kept
    byte_order_marks_removed: int = 0
    surrogates_replaced: int = 0  # characters

    def add(self, other: "Counts") -> None:
        """Adds another count to this one."""
        for field in fields(Counts):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def documents_read(self) -> int:
        """Kept and skipped."""
        return self.documents + self.skipped_empty + self.skipped_null + self.skipped_undecodable

    def to_dict(self) -> dict[str, int]:
        """All counts by name."""
        return asdict(self)


def documents(block: Block, counts: Counts) -> Iterator[tuple[str, bytes]]:
    """(text, the same as UTF-8) of each document of a block that is kept, in order; counts every one.

    Raises: UserError naming file and line for what the policy above refuses.
    """
    texts = {"files": _texts_of_files, "lines": _texts_of_lines, "rows": _texts_of_rows}[block.form]
    for text in texts(block, counts):
        if text is None:
            counts.skipped_null += 1
            continue
        if not text:
            counts.skipped_empty += 1
            continue
        try:
            encoded = text.encode()
        except UnicodeEncodeError:
            clean = replace_surrogates(text)
            counts.surrogates_replaced += clean.count("\ufffd") - text.count("\ufffd")
            text, encoded = clean, clean.encode()
        counts.documents += 1
        counts.utf8_bytes += len(encoded)
        if text.isspace():
            counts.white_space_only += 1
        yield text, encoded


def pack_rows(lengths: list[int], data: bytes) -> bytes:
    """The payload of a block of files or rows: number and lengths of the documents (-1: null), then their bytes."""
    return np.array([len(lengths), *lengths], dtype="<i8").tobytes() + data


def _unpack_rows(payload: bytes | bytearray) -> Iterator[bytes | bytearray | None]:
    count = int(np.frombuffer(payload, "<i8", 1)[0])
    offset = 8 * (1 + count)
    for length in np.frombuffer(payload, "<i8", count, 8).tolist():
        if length < 0:
            yield None
        else:
            yield payload[offset : offset + length]
            offset += length


def _texts_of_files(block: Block, counts: Counts) -> Iterator[str | None]:
    for name, data in zip(block.header["names"], _unpack_rows(block.payload), strict=True):
        assert data is not None
        if block.header["python"]:
            text = _decode_python(data)
            if text is None:
                counts.skipped_undecodable += 1
                continue
        else:
            text = decode_utf8(data, where=name)
        if text.startswith("\ufeff"):
            counts.byte_order_marks_removed += 1
            text = text[1:]
        yield text


def _decode_python(data: bytes | bytearray) -> str | None:
    """The text of a Python source file by its coding line; None if it does not fit it."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None


def decode_utf8(data: bytes | bytearray, *, where: str, offset: int = 0) -> str:
    """The text in these bytes, which stand at `offset` of the file `where`.

    Raises: UserError naming the file and the first byte that is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, where=where, offset=offset) from None


def not_utf8(error: UnicodeDecodeError, *, where: str, offset: int) -> UserError:
    """The error for bytes that stand at `offset` of the file `where`."""
    is_utf16 = offset + error.start == 0 and error.object[:2] in UTF16_MARKS
    return UserError(
        f"{where} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset + error.start} "
        f"({error.reason}); convert it first, for example with `iconv -f {'utf-16' if is_utf16 else 'latin1'} -t utf-8`, or "
        "leave it out"
    )


def _texts_of_rows(block: Block, counts: Counts) -> Iterator[str | None]:
    for row, data in enumerate(_unpack_rows(block.payload), block.header["row"]):
        yield None if data is None else decode_utf8(data, where=f"{block.header['name']} row {row}")


def _texts_of_lines(block: Block, counts: Counts) -> Iterator[str | None]:
    header, column = block.header, block.header["column"]
    offset = header["offset"]
    lines = list[bytes | bytearray](block.payload.split(b"\n"))
    if not lines[-1]:
        lines.pop()  # what follows the last line's end
    for number, line in enumerate(lines, header["line"]):
        where = f"{header['name']} line {number}"
        start, offset = offset, offset + len(line) + 1
        if start == 0 and line.startswith(BYTE_ORDER_MARK):
            counts.byte_order_marks_removed += 1
            line = line[len(BYTE_ORDER_MARK) :]
        if not line or line.isspace():
            counts.skipped_blank_lines += 1
            continue
        yield _text_of_line(decode_utf8(line, where=where, offset=start), where=where, column=column)


# Numbers, of which Python reads only those of less than 4,300 digits, are no text: they are passed over.
_ROWS = json.JSONDecoder(parse_int=lambda digits: 0, parse_float=lambda digits: 0.0)


def _text_of_line(line: str, *, where: str, column: str) -> str | None:
    try:
        values = _ROWS.decode(line)
    except RecursionError:
        raise UserError(f"{where} is nested too deeply to be read; leave that line out") from None
    except ValueError as error:
        raise UserError(
            f"{where} is not JSON ({str(error)[:100]}); a .jsonl file holds one JSON object on each line"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{where} is {type(values).__name__}, not a JSON object such as {{{column!r}: ...}}")
    if column not in values:
        raise missing_column(where, column, list(values))
    text = values[column]
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"{where}: the field {column!r} is {type(text).__name__}, not a string; name another with --text-column"
        )
    return text


def missing_column(where: str, column: str, present: list[str]) -> UserError:
    """The error for rows without the text column, which names the columns that there are."""
    listed = ", ".join(repr(name) for name in present[:20]) + (", ..." if len(present) > 20 else "")
    return UserError(f"{where} has no column {column!r}, only {listed or 'none'}; name one of them with --text-column")
