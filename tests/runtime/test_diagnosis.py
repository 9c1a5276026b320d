"""If this fails, a run that has ended blames the wrong rank, or ends one that is only slow."""

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
    """Of a rank that waits in a collective."""
    known = {"tick": 5, "limit_s": 600.0, "waiting": True, "host": f"n{rank}", "pid_space": ""}
    return RankStatus(rank, step=step, phase=phase, idle_s=idle_s, **(known | others))


def all_alive(signs: list[RankStatus]) -> list[RankStatus]:
    return [replace(sign, tick=sign.tick + 1) for sign in signs]


@pytest.mark.parametrize(
    ("behind", "words"),
    [
        ({"step": 16}, "rank 2 on n2 has made no progress for 600 s after step 16 (training)"),
        ({"step": 0}, "rank 2 on n2 has made no progress for 600 s before the first step (training)"),
        ({"phase": "reading data"}, "rank 2 on n2 has made no progress for 600 s after step 17 (reading data)"),
        ({"waiting": False}, "rank 2 on n2 has made no progress for 600 s after step 17 (training)"),
        ({"step": 18}, "rank 0 on n0 (and 2 more) has made no progress"),
    ],
)
def test_who_is_behind_has_stalled(behind, words):
    signs = [make_status(0), make_status(1), make_status(2, **behind), make_status(3)]
    verdict = diagnose(signs, all_alive(signs))
    assert verdict.sentence.startswith(words)
    assert verdict.is_stuck
    assert 2 in verdict.ranks or "step" in behind


def test_who_is_behind_and_at_work_is_waited_for():
    signs = [make_status(0), make_status(1, phase="evaluating", idle_s=3.0), make_status(2)]
    assert diagnose(signs, all_alive(signs)) is None


def test_who_compiles_has_more_time():
    signs = [make_status(0), make_status(1, step=0, limit_s=3600.0)]
    assert diagnose(signs, all_alive(signs)) is None


def test_who_publishes_no_more_is_gone_and_not_who_is_behind():
    signs = [
        make_status(0, step=16),
        make_status(1),
        make_status(2, step=16, phase="evaluating"),
    ]  # the last sign is a second old
    verdict = diagnose(signs, [*all_alive(signs[:2]), signs[2]])
    assert verdict.sentence.startswith("rank 2 on n2 went away after step 17 (training)")
    assert (verdict.ranks, verdict.is_stuck, verdict.exit_code) == ([2], False, 1)


def test_who_is_done_has_not_gone():
    signs = [make_status(0), make_status(1, left="", phase="saving the adapter")]
    assert diagnose(signs, [*all_alive(signs[:1]), signs[1]]).ranks == [0]


def test_a_mistake_is_the_reason_and_not_the_end_that_follows():
    signs = [make_status(0), make_status(1), make_status(2, left="the file is gone; fetch it")]
    verdict = diagnose_exited_ranks(signs, state=lambda sign: "gone" if sign.rank == 2 else "unknown")
    assert verdict == Diagnosis("rank 2 on n2 has stopped: the file is gone; fetch it", [2], exit_code=2)


def test_a_rank_that_never_gave_a_sign_is_gone():
    signs = [make_status(0, step=0, phase="starting"), unknown_status(1)]
    verdict = diagnose(signs, [*all_alive(signs[:1]), signs[1]])
    assert verdict.sentence.startswith("rank 1 on an unknown host went away before the first step (starting)")


def test_signs_and_verdicts_survive_the_store():
    for value in (make_status(3, left=None), Diagnosis("what", [1, 2], True, 2)):
        assert type(value).from_json(value.to_json().encode()) == value


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_dead_process_of_this_machine_is_known_as_one():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = RankStatus(0, 1, 0, "loading", 0.0, 600.0, False, pid=process.pid)
    assert process_state(own) == "unknown"
    process.kill()
    process.stdin.close()
    while process_state(own) == "unknown":  # until it is a zombie
        pass
    assert process_state(own) == "gone"
    process.wait()
    assert process_state(own) == "gone"
    assert process_state(replace(own, pid_space="of another container")) == "unknown"
