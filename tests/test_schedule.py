"""The learning rate curve: hand-computed points, shape, and independence of everything but the step."""

import math
from typing import get_args, get_type_hints

import pytest

from toolkit.config import OptimizerConfig, ScheduleConfig, TrainConfig, TrainingConfig
from toolkit.training.schedule import learning_rate_multiplier

PEAK = OptimizerConfig().learning_rate
RECIPE = ScheduleConfig()  # GPT-3 Small's schedule over 10 billion tokens


def test_published_numbers_of_the_124m_recipe():
    assert PEAK * learning_rate_multiplier(0, RECIPE) == pytest.approx(6e-4 / 715, rel=1e-12)
    assert learning_rate_multiplier(714, RECIPE) == 1.0
    assert learning_rate_multiplier(715, RECIPE) == 1.0  # the decay starts at the peak
    middle = 715 + 18_358 // 2
    assert PEAK * learning_rate_multiplier(middle, RECIPE) == pytest.approx((6e-4 + 6e-5) / 2, rel=1e-12)
    assert PEAK * learning_rate_multiplier(19_072, RECIPE) == pytest.approx(6e-5, rel=1e-6)
    assert PEAK * learning_rate_multiplier(19_073, RECIPE) == pytest.approx(6e-5, rel=1e-12)
    assert PEAK * learning_rate_multiplier(10**9, RECIPE) == pytest.approx(6e-5, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (
            ScheduleConfig(name="cosine", warmup_steps=2, decay_steps=4, final_ratio=0.2),
            [0.5, 1, 1, 0.2 + 0.8 * (2 + math.sqrt(2)) / 4, 0.6, 0.2 + 0.8 * (2 - math.sqrt(2)) / 4, 0.2, 0.2],
        ),
        (ScheduleConfig(name="linear", warmup_steps=2, decay_steps=4, final_ratio=0), [0.5, 1, 1, 0.75, 0.5, 0.25, 0]),
        (ScheduleConfig(name="constant", warmup_steps=3, decay_steps=1), [1 / 3, 2 / 3, 1, 1, 1, 1, 1]),
        (
            ScheduleConfig(name="wsd", warmup_steps=1, stable_steps=3, decay_steps=2, final_ratio=0.1),
            [1, 1, 1, 1, 1, 0.55, 0.1, 0.1],
        ),
        (ScheduleConfig(name="linear", warmup_steps=0, decay_steps=2, final_ratio=0), [1, 0.5, 0]),
        (ScheduleConfig(name="cosine", warmup_steps=1, decay_steps=0, final_ratio=0.3), [1, 0.3, 0.3]),
    ],
)
def test_hand_computed_curves(schedule, expected):
    curve = [learning_rate_multiplier(step, schedule) for step in range(len(expected))]
    assert curve == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("name", get_args(get_type_hints(ScheduleConfig)["name"]))
def test_every_curve_stays_between_the_floor_and_the_peak_and_never_rises_after_warm_up(name):
    schedule = ScheduleConfig(name=name, warmup_steps=7, decay_steps=50, final_ratio=0.1)
    curve = [learning_rate_multiplier(step, schedule) for step in range(80)]
    assert all(0 < value <= 1 for value in curve)
    assert curve[:7] == sorted(curve[:7])
    assert curve[6:] == sorted(curve[6:], reverse=True)
    assert min(curve[6:]) == (1.0 if name == "constant" else pytest.approx(0.1))


def test_a_few_steps_of_a_long_recipe_follow_the_long_curve():
    """A warm-up longer than the run is no error: max_steps takes no part in the curve."""
    short = TrainConfig(training=TrainingConfig(max_steps=5))
    long = TrainConfig(training=TrainingConfig(max_steps=19_073))
    assert [learning_rate_multiplier(step, short.schedule) for step in range(5)] == [
        learning_rate_multiplier(step, long.schedule) for step in range(5)
    ]
