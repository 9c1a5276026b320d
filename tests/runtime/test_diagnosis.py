"""If this fails, a run that ended blames the wrong rank, or a run is ended that is only slow."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from qlora_dist.runtime.diagnosis import (
    Diagnosis,
    RankStatus,
    diagnose,
    diagnose_exited_ranks,
    process_state,
    unknown_status,
)


def make_status(
    rank: int, step: int = 17, phase: str = "training", idle_s: float = 600.0, **others: object
) -> RankStatus:
    """Return the status of a rank that waits in a collective."""
    known = {"tick": 5, "limit_s": 600.0, "in_collective": True, "host": f"n{rank}", "pid_namespace": ""}
    return RankStatus(rank=rank, step=step, phase=phase, idle_s=idle_s, **(known | others))


def all_alive(statuses: list[RankStatus]) -> list[RankStatus]:
    return [replace(status, tick=status.tick + 1) for status in statuses]


@pytest.mark.parametrize(
    ("behind", "message"),
    [
        ({"step": 16}, "rank 2 on n2 has made no progress for 600 s after step 16 (training)"),
        ({"step": 0}, "rank 2 on n2 has made no progress for 600 s before the first step (training)"),
        ({"phase": "reading data"}, "rank 2 on n2 has made no progress for 600 s after step 17 (reading data)"),
        ({"in_collective": False}, "rank 2 on n2 has made no progress for 600 s after step 17 (training)"),
        ({"step": 18}, "rank 0 on n0 (and 2 more) has made no progress"),
    ],
)
def test_the_slowest_rank_has_stalled(behind, message):
    statuses = [make_status(0), make_status(1), make_status(2, **behind), make_status(3)]
    diagnosis = diagnose(statuses, all_alive(statuses))
    assert diagnosis.message.startswith(message)
    assert diagnosis.is_stuck
    assert 2 in diagnosis.ranks or "step" in behind


def test_a_slow_rank_within_its_limit_is_waited_for():
    statuses = [make_status(0), make_status(1, phase="evaluating", idle_s=3.0), make_status(2)]
    assert diagnose(statuses, all_alive(statuses)) is None


def test_a_rank_that_compiles_has_more_time():
    statuses = [make_status(0), make_status(1, step=0, limit_s=3600.0)]
    assert diagnose(statuses, all_alive(statuses)) is None


def test_a_rank_that_stopped_publishing_is_gone_even_if_others_are_slower():
    statuses = [
        make_status(0, step=16),
        make_status(1),
        make_status(2, step=16, phase="evaluating"),
    ]  # the last rank's status is a second old
    diagnosis = diagnose(statuses, [*all_alive(statuses[:2]), statuses[2]])
    assert diagnosis.message.startswith("rank 2 on n2 went away after step 17 (training)")
    assert (diagnosis.ranks, diagnosis.is_stuck, diagnosis.exit_code) == ([2], False, 1)


def test_a_rank_that_is_done_does_not_count_as_gone():
    statuses = [make_status(0), make_status(1, exit_reason="", phase="saving the adapter")]
    assert diagnose(statuses, [*all_alive(statuses[:1]), statuses[1]]).ranks == [0]


def test_a_user_error_takes_precedence_over_the_exit_that_follows():
    statuses = [make_status(0), make_status(1), make_status(2, exit_reason="the file is gone; fetch it")]
    diagnosis = diagnose_exited_ranks(statuses, state=lambda status: "gone" if status.rank == 2 else "unknown")
    assert diagnosis == Diagnosis("rank 2 on n2 has stopped: the file is gone; fetch it", [2], exit_code=2)


def test_a_rank_that_never_published_is_gone():
    statuses = [make_status(0, step=0, phase="starting"), unknown_status(1)]
    diagnosis = diagnose(statuses, [*all_alive(statuses[:1]), statuses[1]])
    assert diagnosis.message.startswith("rank 1 on an unknown host went away before the first step (starting)")


def test_statuses_and_diagnoses_survive_the_store():
    for value in (make_status(3, exit_reason=None), Diagnosis("what", [1, 2], True, 2)):
        assert type(value).from_json(value.to_json().encode()) == value


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_dead_process_of_this_machine_is_detected():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = RankStatus(
        rank=0, tick=1, step=0, phase="loading", idle_s=0.0, limit_s=600.0, in_collective=False, pid=process.pid
    )
    assert process_state(own) == "unknown"
    process.kill()
    process.stdin.close()
    while process_state(own) == "unknown":  # until the process is a zombie
        pass
    assert process_state(own) == "gone"
    process.wait()
    assert process_state(own) == "gone"
    assert process_state(replace(own, pid_namespace="of another container")) == "unknown"
