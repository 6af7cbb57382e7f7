"""The learning rate as a function of the step number alone: (step, ScheduleConfig) -> share of the peak.

A pure function, so there is nothing to save, nothing to restore and nothing that the number of processes, a resume or
`max_steps` could shift: a few steps of a long recipe and a later extension of it follow one and the same curve.
"""

import math

from toolkit.config import ScheduleConfig


def learning_rate_multiplier(step: int, schedule: ScheduleConfig) -> float:
    """The share of the peak learning rate, in [0, 1], with which step `step` (counted from 0) updates the weights.

    Why: the first warm-up step has peak / warmup_steps and the last one the peak itself, so no step is spent at rate 0.
    Source: karpathy/build-nanogpt (warm-up counted from 1); Hu et al. 2024, sec. 4 (warm-up, stable, decay).
    """
    assert step >= 0, step
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    decayed = step - schedule.warmup_steps - schedule.stable_steps  # steps into the decay; stable_steps: wsd only
    if decayed < 0:
        return 1.0
    if decayed >= schedule.decay_steps:
        return schedule.final_ratio
    progress = decayed / schedule.decay_steps  # [0, 1)
    above_floor = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return schedule.final_ratio + (1 - schedule.final_ratio) * above_floor
