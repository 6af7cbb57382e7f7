"""Blocks -> token ids: what a worker process does, and how it talks to its parent.

Imports little, so that a worker is soon at work. A frame between the processes is a JSON header and raw bytes, no pickle.
"""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import xxhash

from toolkit.data.documents import Block, Counts, Position, documents
from toolkit.data.manifest import SPLITS, Split, token_dtype
from toolkit.data.reading import read_stretch
from toolkit.data.tokenizer import Tokenizer, load_tokenizer
from toolkit.errors import UserError, describe_os_error
from toolkit.failpoint import failpoint

Ids = npt.NDArray[Any]

LONG_DOCUMENT = 2**20  # a longer document is encoded and handed on in parts [characters]
PART_TOKENS = 2**20  # ids that are handed on at one time, at least [tokens]

_FRAME = struct.Struct("<QQ")  # bytes of the JSON header, bytes of the payload


@dataclass(kw_only=True, slots=True)
class Part:
    """Ids of one split in a row, the documents that start in them and the UTF-8 bytes that they stand for."""

    split: Split
    ids: Ids
    documents: int
    utf8_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every worker needs to know; `val_below`: hashes of documents below it belong to the validation split."""

    tokenizer: str
    tokenizer_sha256: str
    val_below: int


@dataclass(kw_only=True, slots=True)
class Result:
    """A tokenized block: its ids in parts, to be taken once and in order; `counts` is complete when they are taken."""

    parts: Iterator[Part]
    counts: Counts


def tokenize_block(block: Block, tokenizer: Tokenizer, val_below: int) -> Result:
    """The ids of a block's documents by split, each after an end-of-text, in order, in parts of bounded size."""
    counts = Counts()
    return Result(parts=_tokenize(block, tokenizer, val_below, counts), counts=counts)


def _tokenize(block: Block, tokenizer: Tokenizer, val_below: int, counts: Counts) -> Iterator[Part]:
    collected = {split: _Collected(split, tokenizer) for split in SPLITS}
    if block.form == "stretch":
        split = collected[_split_of(block.header["key"], val_below)]
        if block.header["first"]:
            counts.documents = 1
            counts.byte_order_marks_removed = int(block.header["byte_order_mark"])
            counts.white_space_only = int(block.header["white_space_only"])
            split.start_document()
        counts.utf8_bytes = block.header["stop"] - block.header["start"]
        for ids in tokenizer.encode_stream(read_stretch(block.header, block.payload)):
            yield from split.add(ids)
    else:
        for text, encoded in documents(block, counts):
            split = collected[_split_of(xxhash.xxh3_64_intdigest(encoded), val_below)]
            split.start_document()
            if tokenizer.name == "bytes":
                yield from split.add(np.frombuffer(encoded, np.uint8), len(encoded))
            elif len(text) <= LONG_DOCUMENT:
                yield from split.add(tokenizer.encode_to_numpy(text), len(encoded))
            else:
                for ids in tokenizer.encode_stream([text]):
                    yield from split.add(ids)
    for split in collected.values():
        yield from split.rest()


def _split_of(key: int, val_below: int) -> Split:
    return "val" if key < val_below else "train"


class _Collected:
    """Ids of one split on the way into parts of at least PART_TOKENS."""

    def __init__(self, split: Split, tokenizer: Tokenizer) -> None:
        self._split: Split = split
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._start = np.array([tokenizer.eot_id], self._dtype)
        self._token_bytes = tokenizer.token_bytes()
        self._clear()

    def _clear(self) -> None:
        self._ids: list[Ids] = []
        self._tokens = self._documents = self._utf8_bytes = 0

    def start_document(self) -> None:
        self._ids.append(self._start)
        self._documents += 1

    def add(self, ids: Ids, utf8_bytes: int | None = None) -> Iterator[Part]:
        """Takes ids and, if known, the bytes they stand for; gives a part when there is enough for one."""
        self._ids.append(ids.astype(self._dtype))
        self._tokens += len(ids)
        self._utf8_bytes += int(self._token_bytes[ids].sum()) if utf8_bytes is None else utf8_bytes
        if self._tokens >= PART_TOKENS:
            yield from self.rest()

    def rest(self) -> Iterator[Part]:
        if self._ids:
            yield Part(
                split=self._split,
                ids=np.concatenate(self._ids),
                documents=self._documents,
                utf8_bytes=self._utf8_bytes,
            )
            self._clear()


def serve() -> None:
    """The worker process: answers each block on standard input until it ends."""
    output = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a stray print must not get between the frames
    source = os.fdopen(os.dup(0), "rb", buffering=0)
    first = receive(source)
    if first is None:
        return
    job = Job(**first[0])
    tokenizer: Tokenizer | UserError = _load(job)  # while the parent still looks for the first block
    while (frame := receive(source)) is not None:
        header, payload = frame
        failpoint("workers.block")
        block = Block(form=header["form"], header=header["header"], payload=payload, end=Position(), source_bytes=0)
        try:
            if isinstance(tokenizer, UserError):
                raise tokenizer
            result = tokenize_block(block, tokenizer, job.val_below)
            for part in result.parts:
                send(output, _part_header(part), part.ids.tobytes())
            send(output, {"parts_end": result.counts.to_dict()})
        except BrokenPipeError:
            return
        except UserError as error:
            send(output, {"error": str(error)})
        except OSError as error:
            send(output, {"error": describe_os_error(error)})


def _load(job: Job) -> Tokenizer | UserError:
    try:
        tokenizer = load_tokenizer(job.tokenizer)
    except UserError as error:
        return error
    if tokenizer.sha256 != job.tokenizer_sha256:
        return UserError(f"tokenizer {job.tokenizer} changed while it was used; run again when it is complete")
    return tokenizer


def _part_header(part: Part) -> dict[str, Any]:
    return {
        "split": part.split,
        "ids": part.ids.dtype.str,
        "documents": part.documents,
        "utf8_bytes": part.utf8_bytes,
    }


def send(stream: IO[bytes], header: dict[str, Any], payload: bytes | bytearray = b"") -> None:
    """Writes a frame: a JSON header and raw bytes."""
    text = json.dumps(header).encode()
    _write_all(stream, _FRAME.pack(len(text), len(payload)) + text)
    _write_all(stream, payload)


def _write_all(stream: IO[bytes], data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], bytearray] | None:
    """The next frame, or None at the end."""
    start = _read_exactly(stream, _FRAME.size)
    if start is None:
        return None
    text_size, payload_size = _FRAME.unpack(start)
    text, payload = _read_exactly(stream, text_size), _read_exactly(stream, payload_size)
    return None if text is None or payload is None else (json.loads(text), payload)


def _read_exactly(stream: IO[bytes], size: int) -> bytearray | None:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = stream.readinto(view)  # type: ignore[attr-defined]
        if not count:
            return None
        view = view[count:]
    return data
