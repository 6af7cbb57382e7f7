"""What a person reads while a run goes on: lines of the log, and a progress bar where there is a terminal."""

import contextlib
import logging
import sys
import time
from itertools import pairwise
from typing import Any

from tqdm import tqdm

from toolkit.redact import redact

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0  # progress where there is no terminal


class Progress:
    """The progress of the main process: a bar on a terminal, elsewhere a line at most every ten seconds."""

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps
        self._bar: tqdm[Any] | None = None
        self._last_line = 0.0

    def show(self, *, step: int, loss: float, tokens_per_second: float, step_seconds: float) -> None:
        """Shows the step that has just been done."""
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(total=self._max_steps, initial=step - 1, unit="step", dynamic_ncols=True)
            self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES or step == self._max_steps:
            self._last_line = now
            left = duration((self._max_steps - step) * step_seconds)
            logger.info(
                "step %d/%d: loss %.4f, %s tokens/s, %s left",
                step,
                self._max_steps,
                loss,
                f"{tokens_per_second:,.0f}",
                left,
            )

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """The two largest units of a duration: 3 d 4 h, 5 h 6 min, 7 min 8 s, 9 s."""
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    whole = round(seconds)
    for (name, size), (small, smaller) in pairwise(units):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // smaller} {small}"
    return f"{whole} s"


def configure_logging(*, is_main: bool = True, with_time: bool = True) -> None:
    """Sends the toolkit's messages to stderr, above a progress bar if there is one; other processes keep silent.

    Called again it changes how: a command and a run in one process never print a message twice.
    """
    root = logging.getLogger("toolkit")
    handler = next((handler for handler in root.handlers if isinstance(handler, _AboveProgress)), None)
    if handler is None:
        handler = _AboveProgress()
        root.addHandler(handler)
        root.propagate = False
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s" if with_time else None, datefmt="%H:%M:%S"))
    root.setLevel(logging.INFO if is_main else logging.ERROR)


class _AboveProgress(logging.Handler):
    """Writes each message, without secrets, on a line of its own, without tearing tqdm's bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # stderr closed, or its reader gone: training goes on
            tqdm.write(redact(self.format(record)), file=sys.stderr)
