from __future__ import annotations

import pytest

from experiments.config.schema import TrainConfig
from experiments.training.lr_scheduler import SCHEDULES, learning_rate


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 100, "batch_size": 1, "lr": 1.0, "warmup": 10, **changes})


def test_the_rate_climbs_then_falls_along_a_cosine():
    rates = [learning_rate(config(final_lr_ratio=0.1), step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_rate_stays_then_falls_in_a_line():
    rates = [learning_rate(config(schedule="wsd", decay_share=0.2, final_lr_ratio=0.1), step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:81] == pytest.approx([1.0] * 71)
    assert rates[90] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("changes", [{"steps": 1, "warmup": 0}, {"steps": 5, "warmup": 4}, {"decay_share": 0.0}])
def test_any_schedule_has_a_rate_for_every_step(schedule, changes):
    whole = config(schedule=schedule, **changes)
    assert all(0 < learning_rate(whole, step) <= 1 for step in range(whole.steps))
