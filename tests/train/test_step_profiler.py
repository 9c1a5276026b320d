"""If this fails, a run reports a wrong split of a step's time."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import record_function

from qlora_dist.train.step_profiler import (
    DATA_LABEL,
    OPTIMIZER_LABEL,
    PAGE_LABEL,
    STEP_KINDS,
    STEP_LABEL,
    StepProfiler,
    split_time,
)
from tests.helpers.ranks import run_ranks

SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda ends: (min(ends), max(ends))), max_size=4)


@given(st.fixed_dictionaries(dict.fromkeys(("paging", "communication", "optimizer"), SPANS)))
def test_the_split_equals_a_count_of_moments(layers: dict[str, list[tuple[int, int]]]) -> None:
    begin, end = 5, 25
    moments = dict.fromkeys(STEP_KINDS, 0)
    for moment in range(begin, end):
        at_work = [kind for kind, spans in layers.items() if any(a <= moment < b for a, b in spans)]
        moments[at_work[0] if at_work else "compute"] += 1
    shares = split_time(layers, begin, end)
    assert shares == pytest.approx({kind: count / (end - begin) for kind, count in moments.items()}, abs=1e-12)


def one_step() -> dict[str, float]:
    """Run a step of half a second in which rank 1 is late. The kinds with a label take about a sixth each."""
    dist.init_process_group("gloo")
    profiler = StepProfiler(torch.device("cpu"))
    profiler.begin()
    with record_function(DATA_LABEL):
        time.sleep(0.1)
    with record_function(STEP_LABEL):
        time.sleep(0.1 if dist.get_rank() == 0 else 0.4)
        dist.all_reduce(torch.ones(10))
        with record_function(OPTIMIZER_LABEL):
            time.sleep(0.1)
            with record_function(PAGE_LABEL):
                time.sleep(0.1)
    shares = profiler.end()
    dist.destroy_process_group()
    return shares


def test_waiting_for_another_rank_is_communication() -> None:
    early, late = run_ranks(2, one_step)
    assert sum(early.values()) == pytest.approx(1) == sum(late.values())
    assert early["communication"] > early["compute"] and late["communication"] < late["compute"]
    for kind in ("data", "optimizer", "paging"):
        assert 0.05 < early[kind] < 0.3, kind
