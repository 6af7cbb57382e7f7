"""Losses that jump out of their recent history."""

import math
import statistics
from collections import deque
from collections.abc import Iterable

HISTORY_STEPS = 128  # losses that a new one is compared with; fewer than half of them is no history yet

# A normal distribution's standard deviation is 1.4826 times its median absolute deviation.
_MAD_TO_DEVIATION = 1.4826
# A quiet run's losses hardly deviate at all; a jump of less than this share of the median is never a spike.
_SMALLEST_DEVIATION = 0.005


class SpikeDetector:
    """Tells whether a loss lies more than `z_score` robust deviations above the median of the losses before it.

    Why robust: the median and the median absolute deviation are not moved by the spikes that they are to find.
    Non-finite losses and spikes never enter the history.
    """

    def __init__(self, *, z_score: float, history: Iterable[float] = ()) -> None:
        self.z_score = z_score
        self.history: deque[float] = deque(history, maxlen=HISTORY_STEPS)

    def is_spike(self, loss: float) -> bool:
        """True if `loss` is a spike; otherwise it becomes part of the history."""
        if not math.isfinite(loss):
            return False
        if len(self.history) >= HISTORY_STEPS // 2:
            median = statistics.median(self.history)
            spread = statistics.median(abs(value - median) for value in self.history)
            deviation = max(_MAD_TO_DEVIATION * spread, _SMALLEST_DEVIATION * abs(median))
            if loss - median > self.z_score * deviation:
                return True
        self.history.append(loss)
        return False
