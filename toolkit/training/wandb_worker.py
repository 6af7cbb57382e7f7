"""Lines of JSON on stdin -> a W&B run: the program that `wandb_mirror` starts, and the only file that imports wandb.

Why a process of its own: whatever wandb does (hang in `init` or `finish`, die, install exit hooks and signal handlers,
print, prompt) happens to this process and not to training; and when training is killed, this one sees the end of its
input and still finishes the run with every step it was sent. It needs nothing of the toolkit, and it ends by itself
within its time limits after its input does.

W&B takes no step twice, so a step goes there as a whole: when the next one comes, or at the end. Of a run that was killed,
or stopped before its step's evaluation, the last step is left to the next start, which sends what it knows of it "again".

Input, one object a line: {"start": {...}} first, then {"log": row} and {"samples": rows, "step": n}, {"finish": {...}}.
Output, one object a line: {"started": {...}}, {"warning": text}, {"finished": {...}}.
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

# Failures after which no further row is tried.
MAX_FAILURES = 3
# How long a connection to the server may take before the run is recorded offline instead [seconds].
CONNECT_SECONDS = 5.0
# How much longer than its own limits wandb may take before this process ends itself [seconds].
GRACE_SECONDS = 15.0
# How long finishing may take once training has gone without a word: nobody waits for it, a new start may [seconds].
ORPHAN_SECONDS = 20.0
# The helper of a killed start may still be finishing the same run; the next one waits this long for it [seconds].
PREDECESSOR_SECONDS = 30.0
# What wandb raises, besides a broken connection, when its own helper is gone: names, since wandb is not imported yet.
_NOBODY_ANSWERS = ("HandleAbandonedError", "MailboxClosedError")


def main() -> None:
    """Mirrors one run from stdin to W&B."""
    # A signal to the whole job is for training to answer; its end of the pipe tells us when it has.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's own telemetry
    commands, reports = _private_pipes()
    first = commands.readline()
    if first.endswith(b"\n"):
        Worker(json.loads(first)["start"], reports).run(commands)


def _private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Our stdin and stdout under other numbers, so that neither wandb nor its own helper can use or hold them."""
    commands, reports = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    return commands, reports


class Worker:
    """One W&B run behind a circuit breaker: the first failure is reported, after `MAX_FAILURES` wandb is left alone."""

    def __init__(self, start: dict[str, Any], reports: BinaryIO) -> None:
        self._start = start
        self._reports = reports
        self._wandb_run: Any = None
        self._failures = 0
        self._next_step = 0  # rows of earlier steps are in W&B already, which takes no step twice
        self._left_out = 0
        self._last_written: int | None = None  # step
        self._held: list[dict[str, Any]] = []  # what has come of the newest step

    def run(self, commands: BinaryIO) -> None:
        """Starts the run, mirrors every line until the input ends, and finishes the run."""
        threading.Thread(target=self._end_without_parent, args=(os.getppid(),), daemon=True).start()
        lock = _lock(Path(self._start["folder"]) / "wandb")
        with self._time_limit("start", self._start["init_seconds"] * 2 + GRACE_SECONDS):
            self._try(self._open)
        # The input ended without a word: a crash.
        finish: dict[str, Any] = {"exit_code": 1, "preempted": False, "step_is_complete": False}
        seconds = ORPHAN_SECONDS
        for command in _lines(commands):
            if "finish" in command:
                finish, seconds = command["finish"], self._start["finish_seconds"] + GRACE_SECONDS
                break
            self._take(command)
        with self._time_limit("finish", seconds):
            self._close(finish)
        if lock is not None:
            os.close(lock)

    def _open(self) -> None:
        import wandb

        start = self._start
        mode: Literal["online", "offline"] = start["mode"]
        if mode == "online" and (problem := _unreachable(wandb.setup().settings.base_url)):
            if not start["may_fall_back"]:
                raise ConnectionError(problem)
            self._report(warning=f"{problem}; recording offline")
            mode = "offline"
        try:
            run = self._init(mode)
        except Exception as error:
            if mode == "offline" or not start["may_fall_back"]:
                raise
            self._report(warning=f"{_describe(error)}; recording offline")
            mode = "offline"
            wandb.teardown()  # the next init starts a new helper, whatever became of this one
            run = self._init(mode)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._wandb_run = run
        sync_dir = Path(run.settings.sync_dir)
        if run.resumed:
            self._next_step = run.starting_step
        elif mode == "offline" and start["continue_local"]:
            earlier = sync_dir.parent.glob(f"*run-*-{start['id']}/run-{start['id']}.wandb")
            self._next_step = 1 + max((_last_step(path) for path in earlier if path.parent != sync_dir), default=-1)
        self._report(started={"mode": mode, "dir": str(sync_dir), "url": run.url, "next_step": self._next_step})
        if Path(start["folder"]).resolve() not in sync_dir.resolve().parents:
            self._report(warning=f"cannot write below {start['folder']}; its files are in {sync_dir}")

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        start = self._start
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            finish_timeout=start["finish_seconds"],
            init_timeout=start["init_seconds"],
            program="",
            save_code=False,
            silent=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        return wandb.init(
            config=start["config"],
            dir=start["folder"],
            entity=start["entity"],
            id=start["id"],
            mode=mode,
            name=start["name"],
            project=start["project"],
            resume="allow",
            settings=settings,
            tags=start["tags"],
        )

    def _take(self, command: dict[str, Any]) -> None:
        if self._held and _step_of(command) != _step_of(self._held[0]):
            self._write_held()
        self._held.append(command)

    def _write_held(self) -> None:
        held, self._held = self._held, []
        if self._wandb_run is not None and self._failures < MAX_FAILURES:
            self._try(self._write, held)

    def _write(self, commands: list[dict[str, Any]]) -> None:
        """One row of W&B from all that came of a step."""
        import wandb

        step = _step_of(commands[0])
        if step < self._next_step:
            self._left_out += sum(not command.get("again") for command in commands)
            return
        for command in commands:  # wandb gathers them into one row, which it writes at once when told that it is whole
            values = command.get("log")
            if rows := command.get("samples"):
                columns = list(rows[0])
                table = wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in rows])
                values = {"samples": table, "step": step}
            self._wandb_run.log(values or {}, step=step, commit=command is commands[-1])
        self._last_written, self._next_step = step, step + 1

    def _close(self, finish: dict[str, Any]) -> None:
        if finish["step_is_complete"] and self._held:
            self._write_held()
        run = self._wandb_run
        complete = run is not None and not self._failures
        if run is not None and self._failures < MAX_FAILURES:
            if finish["preempted"]:
                self._try(run.mark_preempting)
            began = time.monotonic()
            self._try(run.finish, finish["exit_code"])
            self._try(self._teardown)
            complete = not self._failures and time.monotonic() - began < self._start["finish_seconds"]
            if complete and run.offline and self._last_written is not None:  # a full disk is no error to wandb
                complete = _last_step(Path(run.settings.sync_file)) == self._last_written
        self._report(finished={"complete": complete, "left_out": self._left_out})

    def _teardown(self) -> None:
        import wandb

        wandb.teardown()  # returns when wandb's helper has written its file and ended

    def _try(self, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:  # whatever fails in wandb is said once, and never stops the rest
            self._failures += 1
            if self._failures == 1:
                self._report(warning=_describe(error))

    def _report(self, **report: Any) -> None:
        with contextlib.suppress(OSError):  # training has gone; there is nobody to tell
            self._reports.write(json.dumps(report).encode() + b"\n")

    @contextlib.contextmanager
    def _time_limit(self, what: str, seconds: float) -> Iterator[None]:
        """Ends this process if the block takes longer; wandb's own helper ends when it sees that."""

        def give_up() -> None:
            self._report(warning=f"wandb's {what} did not return within {seconds:g} s")
            os._exit(1)

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end_without_parent(self, parent: int) -> None:
        """Ends this process a bounded time after the one that started it, even if wandb hangs while logging."""
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)


def _lines(commands: BinaryIO) -> Iterator[dict[str, Any]]:
    for line in commands:
        if not line.endswith(b"\n"):  # cut off by the death of the other side
            return
        yield json.loads(line)


def _step_of(command: dict[str, Any]) -> int:
    """The step that a row, or texts, belong to."""
    step: int = command["log"]["step"] if "log" in command else command["step"]
    return step


def _describe(error: Exception) -> str:
    """One line on an error of wandb's, the same whichever of its threads met it first."""
    text = " ".join(str(error).split())
    said = f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
    ended = isinstance(error, (BrokenPipeError, ConnectionResetError)) or type(error).__name__ in _NOBODY_ANSWERS
    return f"wandb's own process, wandb-core, has ended ({said})" if ended else said


def _unreachable(base_url: str) -> str | None:
    """Why no connection to the server can be made, or None; unknown, hence None, behind a proxy."""
    url = urllib.parse.urlsplit(base_url)
    if urllib.request.getproxies().get(url.scheme) or not url.hostname:
        return None
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return f"{url.hostname}:{port} cannot be reached ({error})"
    return None


def _lock(folder: Path) -> int | None:
    """Holds the folder for this process, waiting a bounded time for the helper of an earlier start to end."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY)
        deadline = time.monotonic() + PREDECESSOR_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
            else:
                break
    except OSError:  # no folder or no locks here: wandb itself will say what is wrong
        return None
    return fd


def _last_step(path: Path) -> int:
    """The highest step in a .wandb file, -1 if there is none.

    Why: `wandb sync` puts the segments of a run one after the other and moves overlapping steps behind each other. When
    a segment begins after the end of those before it, W&B shows each step once and in order.
    """
    from wandb.proto import wandb_internal_pb2

    last = -1
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)  # type: ignore[attr-defined]
        if record.HasField("history"):
            last = max(last, record.history.step.num)
    return last


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file up to its first gap: a 7-byte header, then a LevelDB log of 32 KiB blocks.

    Source: https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    block, position, parts = 2**15, 7, b""
    while position + 7 <= len(data):
        if block - position % block < 7:  # the rest of a block that has no room for a header
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if not 1 <= kind <= 4 or position > len(data):
            return
        if kind in (1, 4):  # a whole record, or its last part
            yield parts
            parts = b""


if __name__ == "__main__":
    main()
