"""Worker processes that turn blocks of text into token ids; the results come back in the order of the blocks.

Each worker is a fresh interpreter (never a fork of a process with threads) that is fed through its standard input and
answers on its standard output: frames of a JSON header and raw bytes, no pickle. It leaves when its input ends, so it
does not outlive a parent that was killed. With one worker the work is done in the calling process.
"""

import contextlib
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import xxhash

from toolkit.data.documents import Block, Counts, Position, documents
from toolkit.data.manifest import SPLITS, Split, token_dtype
from toolkit.data.reading import read_stretch
from toolkit.data.split_writer import Part
from toolkit.data.tokenizer import Tokenizer, load_tokenizer
from toolkit.errors import UserError
from toolkit.failpoint import failpoint

Ids = npt.NDArray[Any]

LONG_DOCUMENT = 2**20  # a longer document is encoded and handed on in parts [characters]
PART_TOKENS = 2**20  # ids that are handed on at one time, at least [tokens]
PARTS_WAITING = 8  # parts of one block that wait to be written before its worker waits too [parts]
MAX_BYTES_IN_FLIGHT = 2**26  # source bytes handed out and not yet written; keeps large documents from piling up [bytes]
BLOCKS_PER_WORKER = 8  # handed out at one time: enough to go on with while the disk takes its time [blocks]

_Answer = Part | Counts | Exception

_FRAME = struct.Struct("<QQ")  # bytes of the JSON header, bytes of the payload


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


def tokenize_blocks(
    blocks: Iterable[Block], *, tokenizer: Tokenizer, job: Job, workers: int
) -> Iterator[tuple[Block, Result]]:
    """Each block with its result, in order, whatever the number of workers; a result is to be taken before the next.

    Raises: UserError from a block that cannot be read, when its turn comes, or if a worker process dies.
    """
    if workers == 1:
        for block in blocks:
            yield block, tokenize_block(block, tokenizer, job.val_below)
        return
    pool = _Pool(job, workers)
    waiting: deque[tuple[Block, int, Result]] = deque()
    in_flight = 0
    try:
        for block in blocks:
            size = len(block.payload)
            while waiting and (len(waiting) >= BLOCKS_PER_WORKER * workers or in_flight + size > MAX_BYTES_IN_FLIGHT):
                done, done_size, result = waiting.popleft()
                in_flight -= done_size
                yield done, result
            waiting.append((_without_payload(block), size, pool.submit(block)))
            in_flight += size
        while waiting:
            done, _, result = waiting.popleft()
            yield done, result
    finally:
        pool.close()


def _without_payload(block: Block) -> Block:
    return Block(form=block.form, header=block.header, payload=b"", end=block.end, source_bytes=block.source_bytes)


class _Pool:
    """Worker processes, and one thread for each that talks to it."""

    def __init__(self, job: Job, workers: int) -> None:
        self._closed = threading.Event()
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(job) for _ in range(workers)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="prepare")

    def submit(self, block: Block) -> Result:
        """The result of a block, which a worker begins as soon as one is free."""
        answers: queue.Queue[_Answer] = queue.Queue(PARTS_WAITING)
        counts = Counts()
        self._threads.submit(self._run, block, answers)
        return Result(parts=_parts_of(answers, counts), counts=counts)

    def _run(self, block: Block, answers: "queue.Queue[_Answer]") -> None:
        worker = self._idle.get()
        try:
            for answer in worker.tokenize(block):
                self._put(answers, answer)
        except Exception as error:
            self._put(answers, error)
        finally:
            self._idle.put(worker)

    def _put(self, answers: "queue.Queue[_Answer]", answer: "_Answer") -> None:
        """Waits while nobody takes the parts that are there, but not for ever."""
        while not self._closed.is_set():
            try:
                answers.put(answer, timeout=0.2)
            except queue.Full:
                continue
            return

    def close(self) -> None:
        self._closed.set()
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(cancel_futures=True)


def _parts_of(answers: "queue.Queue[_Answer]", counts: Counts) -> Iterator[Part]:
    """The parts of a block as they come; adds its counts when the last one has come."""
    while True:
        answer = answers.get()
        if isinstance(answer, Part):
            yield answer
        elif isinstance(answer, Counts):
            counts.add(answer)
            return
        else:
            raise answer


class _Worker:
    """One worker process as the parent sees it."""

    def __init__(self, job: Job) -> None:
        # -P and PYTHONPATH: the same modules as in this process, and none from the current folder
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from toolkit.data.workers import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
        )
        self._job: Job | None = job  # until it has been told

    def tokenize(self, block: Block) -> Iterator["Part | Counts"]:
        """The parts of a block, then its counts."""
        frame = self._ask(block)
        while "parts_end" not in frame[0]:
            header, payload = frame
            if "error" in header:
                raise UserError(header["error"])
            yield Part(**(header | {"ids": np.frombuffer(payload, header["ids"])}))
            frame = self._frame()
        yield Counts(**frame[0]["parts_end"])

    def _ask(self, block: Block) -> tuple[dict[str, Any], bytearray]:
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            if self._job is not None:
                _send(self._input, asdict(self._job))
                self._job = None
            _send(self._input, {"form": block.form, "header": block.header}, block.payload)
        return self._frame()

    def _frame(self) -> tuple[dict[str, Any], bytearray]:
        frame = _receive(self._output)
        if frame is None:
            status = self._process.wait()
            raise UserError(
                f"a worker process ended ({_describe_exit(status)}) before its work was done; run the same command again "
                "to continue, with fewer --workers if memory was short"
            )
        return frame

    @property
    def _input(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _output(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def stop(self) -> None:
        self._process.kill()  # it owns no file: there is nothing to lose
        self._process.wait()


def _describe_exit(status: int) -> str:
    if status == -signal.SIGTERM or os.name == "nt" or status >= 0:
        return f"status {status}"
    return f"signal {signal.Signals(-status).name}" + (", perhaps for lack of memory" if status == -9 else "")


def serve() -> None:
    """The worker process: answers each block on standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair; the end of the input ends this
    output = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a stray print must not get between the frames
    source = os.fdopen(os.dup(0), "rb", buffering=0)
    first = _receive(source)
    if first is None:
        return
    job = Job(**first[0])
    tokenizer = None
    while (frame := _receive(source)) is not None:
        header, payload = frame
        failpoint("workers.block")
        block = Block(form=header["form"], header=header["header"], payload=payload, end=Position(), source_bytes=0)
        try:
            tokenizer = tokenizer or _load(job)
            result = tokenize_block(block, tokenizer, job.val_below)
            for part in result.parts:
                _send(output, _part_header(part), part.ids.tobytes())
            _send(output, {"parts_end": result.counts.to_dict()})
        except UserError as error:
            _send(output, {"error": str(error)})
        except BrokenPipeError:
            return


def _load(job: Job) -> Tokenizer:
    tokenizer = load_tokenizer(job.tokenizer)
    if tokenizer.sha256 != job.tokenizer_sha256:
        raise UserError(f"tokenizer {job.tokenizer} changed while it was used; run again when it is complete")
    return tokenizer


def _part_header(part: Part) -> dict[str, Any]:
    return {
        "split": part.split,
        "ids": part.ids.dtype.str,
        "documents": part.documents,
        "utf8_bytes": part.utf8_bytes,
    }


def _send(stream: IO[bytes], header: dict[str, Any], payload: bytes | bytearray = b"") -> None:
    text = json.dumps(header).encode()
    _write_all(stream, _FRAME.pack(len(text), len(payload)) + text)
    _write_all(stream, payload)


def _write_all(stream: IO[bytes], data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def _receive(stream: IO[bytes]) -> tuple[dict[str, Any], bytearray] | None:
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


def default_workers() -> int:
    """One worker for each core that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)
