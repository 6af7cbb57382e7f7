"""Worker processes that turn blocks of text into token ids; the results come back in the order of the blocks.

Each worker is a fresh interpreter (never a fork of a process with threads) that is fed through its standard input and
answers on its standard output: frames of a JSON header and raw bytes, no pickle. It leaves when its input ends, so it
does not outlive a parent that was killed. With one worker the work is done in the calling process.
"""

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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import xxhash

from toolkit.data.documents import Block, Counts, Position, documents
from toolkit.data.manifest import SPLITS, Split, token_dtype
from toolkit.data.sources import read_stretch
from toolkit.data.split_writer import Part
from toolkit.data.tokenizer import Tokenizer, load_tokenizer
from toolkit.errors import UserError
from toolkit.failpoint import failpoint

Ids = npt.NDArray[Any]

MAX_BYTES_IN_FLIGHT = 2**27  # source bytes handed out and not yet written; keeps large documents from piling up [bytes]
BLOCKS_PER_WORKER = 3  # handed out at one time: one in work, one waiting, one done and waiting to be written [blocks]

_FRAME = struct.Struct("<QQ")  # bytes of the JSON header, bytes of the payload


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every worker needs to know; `val_below`: hashes of documents below it belong to the validation split."""

    tokenizer: str
    tokenizer_sha256: str
    val_below: int


@dataclass(kw_only=True, slots=True)
class Result:
    """A tokenized block."""

    parts: dict[Split, Part]
    counts: Counts


def tokenize_block(block: Block, tokenizer: Tokenizer, val_below: int) -> Result:
    """The ids of a block's documents by split, each after an end-of-text, in order."""
    dtype = token_dtype(tokenizer.vocab_size)
    start = np.array([tokenizer.eot_id], dtype)
    ids: dict[Split, list[Ids]] = {split: [] for split in SPLITS}
    totals = {split: [0, 0] for split in SPLITS}
    counts = Counts()
    if block.form == "stretch":
        _tokenize_stretch(block, tokenizer, ids, totals, counts, val_below)
    else:
        for text, encoded in documents(block, counts):
            split = _split_of(xxhash.xxh3_64_intdigest(encoded), val_below)
            text_ids = (
                np.frombuffer(encoded, np.uint8) if tokenizer.name == "bytes" else tokenizer.encode_to_numpy(text)
            )
            ids[split] += [start, text_ids.astype(dtype)]
            totals[split][0] += 1
            totals[split][1] += len(encoded)
    return Result(
        parts={
            split: Part(ids=np.concatenate(ids[split]), documents=totals[split][0], utf8_bytes=totals[split][1])
            for split in SPLITS
            if ids[split]
        },
        counts=counts,
    )


def _split_of(key: int, val_below: int) -> Split:
    return "val" if key < val_below else "train"


def _tokenize_stretch(
    block: Block,
    tokenizer: Tokenizer,
    ids: dict[Split, list[Ids]],
    totals: dict[Split, list[int]],
    counts: Counts,
    val_below: int,
) -> None:
    header, dtype = block.header, token_dtype(tokenizer.vocab_size)
    split = _split_of(header["key"], val_below)
    if header["first"]:
        ids[split].append(np.array([tokenizer.eot_id], dtype))
        counts.documents = totals[split][0] = 1
        counts.byte_order_marks_removed = int(header["byte_order_mark"])
    counts.utf8_bytes = totals[split][1] = header["stop"] - header["start"]
    ids[split] += [part.astype(dtype) for part in tokenizer.encode_stream(read_stretch(header, block.payload))]


def tokenize_blocks(
    blocks: Iterable[Block], *, tokenizer: Tokenizer, job: Job, workers: int
) -> Iterator[tuple[Block, Result]]:
    """Each block with its result, in order, whatever the number of workers.

    Raises: UserError from a block that cannot be read, when its turn comes, or if a worker process dies.
    """
    if workers == 1:
        for block in blocks:
            yield block, tokenize_block(block, tokenizer, job.val_below)
        return
    pool = _Pool(job, workers)
    waiting: deque[tuple[Block, int, Future[Result]]] = deque()
    in_flight = 0
    try:
        for block in blocks:
            size = len(block.payload)
            while waiting and (len(waiting) >= BLOCKS_PER_WORKER * workers or in_flight + size > MAX_BYTES_IN_FLIGHT):
                done, done_size, future = waiting.popleft()
                in_flight -= done_size
                yield done, future.result()
            future = pool.submit(block)
            waiting.append((_without_payload(block), size, future))
            in_flight += size
        while waiting:
            done, _, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.close()


def _without_payload(block: Block) -> Block:
    return Block(form=block.form, header={}, payload=b"", end=block.end, source_bytes=block.source_bytes)


class _Pool:
    """Worker processes, and one thread for each that talks to it."""

    def __init__(self, job: Job, workers: int) -> None:
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(job) for _ in range(workers)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="prepare")

    def submit(self, block: Block) -> "Future[Result]":
        return self._threads.submit(self._run, block)

    def _run(self, block: Block) -> Result:
        worker = self._idle.get()
        try:
            return worker.tokenize(block)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(cancel_futures=True)


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
        self._lock = threading.Lock()
        self._job = job
        self._greeted = False

    def tokenize(self, block: Block) -> Result:
        try:
            if not self._greeted:
                _send(self._input, asdict(self._job))
                self._greeted = True
            _send(self._input, {"form": block.form, "header": block.header}, block.payload)
            answer = _receive(self._output)
        except (BrokenPipeError, ValueError):  # ValueError: closed by stop()
            answer = None
        if answer is None:
            status = self._process.wait()
            raise UserError(
                f"a worker process ended ({_describe_exit(status)}) before its work was done; run the same command again "
                "to continue, with fewer --workers if memory was short"
            )
        header, payload = answer
        if "error" in header:
            raise UserError(header["error"])
        return _unpack_result(header, payload)

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
            answer = _pack_result(tokenize_block(block, tokenizer, job.val_below))
        except UserError as error:
            answer = {"error": str(error)}, b""
        try:
            _send(output, *answer)
        except BrokenPipeError:
            return


def _load(job: Job) -> Tokenizer:
    tokenizer = load_tokenizer(job.tokenizer)
    if tokenizer.sha256 != job.tokenizer_sha256:
        raise UserError(f"tokenizer {job.tokenizer} changed while it was used; run again when it is complete")
    return tokenizer


def _pack_result(result: Result) -> tuple[dict[str, Any], bytes]:
    parts = {
        split: {
            "tokens": len(part.ids),
            "documents": part.documents,
            "utf8_bytes": part.utf8_bytes,
            "dtype": part.ids.dtype.str,
        }
        for split, part in result.parts.items()
    }
    return {"parts": parts, "counts": result.counts.to_dict()}, b"".join(
        part.ids.tobytes() for part in result.parts.values()
    )


def _unpack_result(header: dict[str, Any], payload: bytearray) -> Result:
    parts: dict[Split, Part] = {}
    offset = 0
    for split in SPLITS:
        if split in header["parts"]:
            entry = header["parts"][split]
            ids = np.frombuffer(payload, entry["dtype"], entry["tokens"], offset)
            offset += ids.nbytes
            parts[split] = Part(ids=ids, documents=entry["documents"], utf8_bytes=entry["utf8_bytes"])
    return Result(parts=parts, counts=Counts(**header["counts"]))


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
