"""What watches over a training process: stop requests from outside, the death of the launcher, and a hang.

Nothing here talks to other processes: each one learns of its own signals, and the trainer carries "somebody was asked
to stop" in the one reduction of the step, so that all leave at the same step. A signal is only noted; the work of
stopping is done between two steps.
"""

import ctypes
import faulthandler
import logging
import math
import os
import signal
import sys
import time
from types import FrameType

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, *(() if sys.platform == "win32" else (signal.SIGUSR1,)))

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
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._first: float = 0.0
        self._launcher = os.getppid() if any(name in os.environ for name in _LAUNCHER_VARIABLES) else None
        self._previous: dict[int, object] = {}

    def listen(self) -> None:
        """Installs the handlers, and asks Linux for a SIGTERM when the launcher dies."""
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        if self._launcher is not None and sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    def stop_listening(self) -> None:
        """Puts the handlers back that were there before `listen`."""
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # type: ignore[arg-type]
        self._previous.clear()

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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        received, now = signal.Signals(number), time.monotonic()
        if self._received is None:
            self._received, self._first = received, now
        elif now - self._first > SAME_REQUEST_SECONDS and not self._launcher_died():
            # os.write, not logging: a handler may run while a lock of the logging module is held.
            os.write(
                2,
                f"\nreceived {received.name} again: leaving at once; the last complete checkpoint is intact\n".encode(),
            )
            os._exit(128 + number)


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
