"""Worker processes that turn blocks of text into token ids; the results come back in the order of the blocks.

Each worker is a fresh interpreter (never a fork of a process with threads) that is fed through its standard input and
answers on its standard output. It leaves when its input ends, so it does not outlive a parent that was killed. With one
worker the work is done in the calling process.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np

from toolkit.data.documents import Block, Counts
from toolkit.data.tokenizer import Tokenizer
from toolkit.data.tokenizing import Job, Part, Result, receive, send, tokenize_block
from toolkit.errors import UserError

PARTS_WAITING = 8  # parts of one block that wait to be written before its worker waits too [parts]
MAX_BYTES_IN_FLIGHT = 2**26  # source bytes handed out and not yet written; keeps large documents from piling up [bytes]
BLOCKS_PER_WORKER = 8  # handed out at one time: enough to go on with while the disk takes its time [blocks]

_Answer = Part | Counts | Exception


@contextlib.contextmanager
def started(workers: int) -> Iterator["Pool | None"]:
    """Worker processes, starting up while the caller prepares their work; none for a single worker."""
    pool = Pool(workers) if workers > 1 else None
    try:
        yield pool
    finally:
        if pool is not None:
            pool.close()


def tokenize_blocks(
    blocks: Iterable[Block], *, tokenizer: Tokenizer, job: Job, pool: "Pool | None"
) -> Iterator[tuple[Block, Result]]:
    """Each block with its result, in order, whatever the number of workers; a result is to be taken before the next.

    Raises: UserError from a block that cannot be read, when its turn comes, or if a worker process dies.
    """
    if pool is None:
        for block in blocks:
            yield block, tokenize_block(block, tokenizer, job.val_below)
        return
    waiting: deque[tuple[Block, int, Result]] = deque()
    in_flight = 0
    for block in blocks:
        size = len(block.payload)
        while waiting and (len(waiting) >= BLOCKS_PER_WORKER * pool.size or in_flight + size > MAX_BYTES_IN_FLIGHT):
            done, done_size, result = waiting.popleft()
            in_flight -= done_size
            yield done, result
        waiting.append((_without_payload(block), size, pool.submit(block)))
        in_flight += size
    while waiting:
        done, _, result = waiting.popleft()
        yield done, result


def _without_payload(block: Block) -> Block:
    return Block(form=block.form, header=block.header, payload=b"", end=block.end, source_bytes=block.source_bytes)


class Pool:
    """Worker processes, and two threads for each: while one waits for an answer the other hands over the next block."""

    def __init__(self, workers: int) -> None:
        self.size = workers
        self._closed = threading.Event()
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker() for _ in range(workers)]
        for worker in 2 * self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(2 * workers, thread_name_prefix="prepare")

    def begin(self, job: Job) -> None:
        """Tells the workers what all blocks have in common; they load the tokenizer at once."""
        for worker in self._workers:
            worker.begin(job)

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
        """Ends the processes, whatever they are doing."""
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


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Blocks SIGINT in this thread and in what it starts; systems that cannot block signals are left to themselves."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """One worker process as the parent sees it."""

    def __init__(self) -> None:
        # -P and PYTHONPATH: the same modules as in this process, and none from the current folder
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        # Ctrl-C, which reaches all processes of a terminal, is the parent's affair; the end of its input ends this one. So it
        # is blocked from the worker's first moment on, and in this process until then.
        with _without_interrupts():
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from toolkit.data.tokenizing import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                bufsize=0,
            )
        self._sending = threading.Lock()
        self._answering = threading.Condition()
        self._asked = self._answered = 0

    def begin(self, job: Job) -> None:
        self._send(asdict(job))

    def tokenize(self, block: Block) -> Iterator["Part | Counts"]:
        """The parts of a block, then its counts; answers come in the order in which threads asked."""
        with self._sending:
            turn, self._asked = self._asked, self._asked + 1
            self._send({"form": block.form, "header": block.header}, block.payload)
        with self._answering:
            self._answering.wait_for(lambda: self._answered == turn)
        try:
            yield from self._answers()
        finally:
            with self._answering:
                self._answered += 1
                self._answering.notify_all()

    def _answers(self) -> Iterator["Part | Counts"]:
        frame = self._frame()
        while "parts_end" not in frame[0]:
            header, payload = frame
            if "error" in header:
                raise UserError(header["error"])
            yield Part(**(header | {"ids": np.frombuffer(payload, header["ids"])}))
            frame = self._frame()
        yield Counts(**frame[0]["parts_end"])

    def _send(self, header: dict[str, Any], payload: bytes | bytearray = b"") -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            send(self._process.stdin, header, payload)

    def _frame(self) -> tuple[dict[str, Any], bytearray]:
        assert self._process.stdout is not None
        frame = receive(self._process.stdout)
        if frame is None:
            status = self._process.wait()
            raise UserError(
                f"a worker process ended ({_describe_exit(status)}) before its work was done; run the same command again "
                "to continue, with fewer --workers if memory was short"
            )
        return frame

    def stop(self) -> None:
        self._process.kill()  # it owns no file: there is nothing to lose
        self._process.wait()


def _describe_exit(status: int) -> str:
    if status == -signal.SIGTERM or os.name == "nt" or status >= 0:
        return f"status {status}"
    return f"signal {signal.Signals(-status).name}" + (", perhaps for lack of memory" if status == -9 else "")


def usable_cores() -> int:
    """The cores that this process may use: by default as many workers tokenize."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)
