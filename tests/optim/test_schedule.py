"""If this fails, a run learns at another rate than its configuration and the paper say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.config.sections import OptimConfig
from qlora_dist.optim.schedule import learning_rate


def rates(steps: int, **options: object) -> list[float]:
    config = OptimConfig(lr=8.0, **options)
    return [learning_rate(step, steps, config) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [2, 4, 6, 8, 8, 8, 8, 8]),
        ("linear", [2, 4, 6, 8, 8, 6, 4, 2]),
        # 4 * (1 + cos(k pi / 4)), k = 0, 1, 2, 3
        ("cosine", [2, 4, 6, 8, 8, 6.82842712, 4, 1.17157288]),
    ],
)
def test_by_hand(schedule, expected):
    assert rates(8, schedule=schedule, warmup_steps=4) == pytest.approx(expected)


def test_without_warm_up_the_first_step_has_the_full_rate():
    for schedule in ("constant", "linear", "cosine"):
        assert rates(5, schedule=schedule, warmup_steps=0)[0] == 8.0


def test_a_run_that_is_all_warm_up():
    for warmup_steps in (4, 5, 1000):  # one that is longer than the run is cut
        assert rates(4, schedule="cosine", warmup_steps=warmup_steps) == pytest.approx([2, 4, 6, 8])


def test_a_run_of_one_step():
    assert rates(1, schedule="linear", warmup_steps=0) == [8.0]


@given(steps=st.integers(1, 300), schedule=st.sampled_from(["constant", "linear", "cosine"]), data=st.data())
def test_rises_then_falls_and_never_leaves_its_bounds(steps, schedule, data):
    warmup = data.draw(st.integers(0, steps))
    values = rates(steps, schedule=schedule, warmup_steps=warmup)
    assert all(0 < value <= 8.0 for value in values), "a step of rate zero would be wasted"
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    assert values[max(0, warmup - 1)] == 8.0
