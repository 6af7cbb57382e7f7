"""What watches over a training process: stop requests from outside, the death of the launcher, and a hang.

Nothing here talks to other processes: each one learns of its own signals, and the trainer carries "somebody was asked
to stop" in the one reduction of the step, so that all leave at the same step. A signal is only noted; the work of
stopping is done between two steps.
"""

import contextlib
import ctypes
import faulthandler
import math
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

# SIGHUP: the terminal was closed. It is left alone where it is ignored, as below nohup.
STOP_SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT),
    *(() if sys.platform == "win32" else (signal.SIGUSR1, signal.SIGHUP)),
)

# One request can arrive several times: a terminal sends Ctrl-C to the launcher and to us, and the launcher passes it
# on. Signals this close together [seconds] are one request; a later one means "leave at once".
SAME_REQUEST_SECONDS = 0.5

# Set by `accelerate launch` and by torchrun: there is a launcher above us whose death we must notice.
_LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")

_PR_SET_PDEATHSIG = 1  # Source: Linux, include/uapi/linux/prctl.h


class StopRequests:
    """Notes that this process was asked to stop: by a signal, or because its launcher has died.

    Why the launcher's death counts: a one-process `accelerate launch` passes no signal on, and a launcher killed with
    SIGKILL or SIGUSR1 would leave training processes behind that share their run folder with the next start.
    Why a thread: Python calls a handler when the main thread is next between two of its instructions, which is seconds
    away in a long step, and never in a collective whose other side hangs; and two signals sent together would then look
    like two requests. The number of a signal is in a pipe at once.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._first: float = 0.0
        self._launcher = os.getppid() if any(name in os.environ for name in _LAUNCHER_VARIABLES) else None

    def follow_launcher(self) -> None:
        """Asks Linux for a SIGTERM when the launcher dies: until `listen`, this process dies with it."""
        if self._launcher is not None and sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if self._launcher_died():  # before the system was asked
                signal.raise_signal(signal.SIGTERM)

    def listen(self) -> bool:
        """From now on a signal is a request; False in a thread, to which Python gives no signals."""
        self.follow_launcher()
        return _signals.add(self)

    def stop_listening(self) -> None:
        """Signals do what they did before `listen`, unless another still listens."""
        _signals.remove(self)

    def asked(self) -> bool:
        """True once this process should stop; also notices a dead launcher where the system sends no signal for it."""
        return self._received is not None or self._launcher_died()

    @property
    def reason(self) -> str | None:
        """Why this process should stop; None while it should not.

        The launcher's death is looked for here, not in the handler: its threads die one after the other, and the first
        death already sends the signal.
        """
        if self._launcher_died():
            return "the launcher has died"
        return f"received {self._received.name}" if self._received is not None else None

    def _launcher_died(self) -> bool:
        return self._launcher is not None and os.getppid() != self._launcher

    def take(self, received: signal.Signals) -> None:
        """Notes a signal; the second ends the process."""
        now = time.monotonic()
        if self._received is None:
            self._received, self._first = received, now
        elif now - self._first > SAME_REQUEST_SECONDS and not self._launcher_died():
            # os.write, not logging: the main thread may hold a lock of the logging module and be stuck.
            line = f"\nreceived {received.name} again: leaving at once; what was saved before is intact\n"
            with contextlib.suppress(OSError):
                os.write(2, line.encode())
            os._exit(128 + received)


class _Signals:
    """The signals of this process, while somebody listens: a thread hands each to all who do.

    Why shared: there is one handler for a signal, and one pipe, however many runs a program has, one after another or at
    the same time.
    """

    def __init__(self) -> None:
        self._listeners: list[StopRequests] = []
        self._previous: dict[int, Any] = {}  # handlers
        self._previous_wakeup = -1
        self._pipe: int | None = None  # its writing end
        self._follows_forks = False

    def add(self, requests: StopRequests) -> bool:
        """True if `requests` gets the signals from now on."""
        if threading.current_thread() is not threading.main_thread():
            return False
        if requests not in self._listeners:
            self._listeners.append(requests)  # first: from the first signal on, somebody takes it
            if self._pipe is None:
                self._begin()
        return True

    def remove(self, requests: StopRequests) -> None:
        """The last one to go leaves all as it was; outside the main thread that cannot be, and a signal ends the process."""
        if self._listeners == [requests] and threading.current_thread() is threading.main_thread():
            self._end()
        if requests in self._listeners:
            self._listeners.remove(requests)

    def _begin(self) -> None:
        reading, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        threading.Thread(target=self._take_all, args=(reading,), name="signals", daemon=True).start()
        self._previous_wakeup = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        if not self._follows_forks:  # it cannot be taken back, so once per process
            os.register_at_fork(after_in_child=self._end_in_child)
            self._follows_forks = True
        for number in STOP_SIGNALS:
            if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, _leave_it_to_the_thread)

    def _end(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()
        try:
            signal.set_wakeup_fd(self._previous_wakeup)
        except (ValueError, OSError):  # whose it was (an event loop's, say) has closed it meanwhile
            signal.set_wakeup_fd(-1)
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None

    def _end_in_child(self) -> None:
        """A signal to a forked child is for the child: it would come out of its parent's pipe."""
        if self._pipe is not None:
            self._end()
            self._listeners.clear()

    def _take_all(self, reading: int) -> None:
        """Takes the numbers of signals out of the pipe until its other end is closed."""
        while numbers := os.read(reading, 64):
            for number in numbers:
                if number not in self._previous:  # another part's signal
                    continue
                for requests in list(self._listeners):
                    requests.take(signal.Signals(number))
                if not self._listeners:
                    os._exit(128 + number)
        os.close(reading)


_signals = _Signals()


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    """A handler there must be, or the system would act by itself."""


class Watchdog:
    """Prints the stacks of all threads and ends the process when `feed` is not called for `minutes`.

    Why: a stuck process keeps its peers waiting inside a collective for the whole timeout of the process group without
    a word. Each process has a watchdog of its own, so the stuck line is printed by every rank. `faulthandler` does it
    from a thread of the C level, which runs even while the interpreter is stuck.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = minutes * 60
        self._fed = -math.inf

    def feed(self) -> None:
        """Starts the wait anew, to within 1 % of it; called after each step and inside long work between steps.

        Why not each time: it starts a thread, and a step of a small model takes milliseconds.
        """
        now = time.monotonic()
        if now - self._fed < self._seconds / 100:
            return
        self._fed = now
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__ or sys.stderr)

    def stop(self) -> None:
        """No longer watches."""
        self._fed = -math.inf
        faulthandler.cancel_dump_traceback_later()
