"""Schedules as functions of the step."""

import itertools
import math

import pytest

from personmae.training.schedules import ScheduleConfig, ema_momentum, feature_ramp, learning_rate, num_steps

CONFIG = ScheduleConfig(warmup_ratio=0.1, feature_ramp_ratio=0.25, ema_start=0.99)


def test_learning_rate_rises_linearly_and_falls_by_a_cosine():
    rates = [learning_rate(step, 200, 2.0, CONFIG) for step in range(200)]
    assert rates[:20] == pytest.approx([2.0 * (k + 1) / 20 for k in range(20)])
    assert rates[20] == 2.0 == max(rates)
    assert rates[20:] == pytest.approx([1.0 + math.cos(math.pi * k / 180) for k in range(180)])
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))
    assert learning_rate(199, 200, 1.0, ScheduleConfig(final_ratio=0.5)) == pytest.approx(0.5, abs=1e-3)
    assert learning_rate(0, 1, 1.0, CONFIG) == 1.0


def test_feature_ramp_reaches_one_after_a_quarter():
    values = [feature_ramp(step, 400, CONFIG) for step in range(400)]
    assert values[:100] == pytest.approx([(k + 1) / 100 for k in range(100)])
    assert set(values[99:]) == {1.0}
    assert feature_ramp(0, 400, ScheduleConfig(feature_ramp_ratio=0.0)) == 1.0


def test_momentum_rises_from_start_to_end():
    values = [ema_momentum(step, 1000, CONFIG) for step in range(1000)]
    assert values[0] == 0.99
    assert values[500] == pytest.approx(0.995)
    assert values[-1] == pytest.approx(1.0, abs=1e-6)
    assert all(a < b for a, b in itertools.pairwise(values))


def test_length_of_a_run():
    assert num_steps(ScheduleConfig(epochs=2.5), 10) == 25
    assert num_steps(ScheduleConfig(epochs=0.001), 10) == 1
    assert num_steps(ScheduleConfig(epochs=300, steps=7), 10) == 7
