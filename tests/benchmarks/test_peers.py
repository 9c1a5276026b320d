"""If this fails, the comparison with other tools makes a claim that its figures do not support, or hides an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
sys.path.append(str(PEERS))  # after tests, whose modules have equal names

from figures import claims, figures  # type: ignore[import-not-found] # noqa: E402
from peer_process import PeerProcess  # type: ignore[import-not-found] # noqa: E402
from systems import SYSTEMS  # type: ignore[import-not-found] # noqa: E402
from table import exception_line, render_tables  # type: ignore[import-not-found] # noqa: E402

from qlora_dist.runtime.system import machine_info  # noqa: E402

STEPS = [
    {"kind": kind, "tokens": tokens, "our_tokens": 400} for kind, tokens in [("full", 400)] * 3 + [("uneven", 300)] * 3
]
ERROR = """exit code 1: ValueError: the mistake of the other rank
[rank1]: Traceback (most recent call last):
[rank1]:   File "x.py", line 1, in <module>
[rank1]: NotImplementedError: no kernel of that name
on a CPU
[rank0]: RuntimeError: Connection closed by peer [127.0.0.1]:1"""


def run(system: str, ranks: int, seconds: float, static: int, **more: Any) -> dict[str, Any]:
    """Return a run whose first step of each kind takes ten times as long."""
    marks: list[dict[str, Any]] = [
        {"what": "imported", "time": 0.0, "sent": 0, "VmRSS": 100, "VmHWM": 120},
        {"what": "loaded", "time": 5.0, "sent": 10, "VmRSS": 200, "VmHWM": 350},
    ]
    now = 5.0
    for index in range(len(STEPS)):
        now += 1000  # turns of other systems
        marks.append({"what": "begin", "time": now})
        now += 10 * seconds if index % 3 == 0 else seconds
        marks.append({"what": "step", "time": now, "sent": 1000 + 80 * index, "VmRSS": 0, "VmHWM": 0})
        marks.append({"what": "loss", "loss": 2.0 - index / 10})
    marks.append({"what": "end", "static_bytes": static, "VmHWM": 900})
    marks.append({"what": "engine", "engine": more.pop("engine", "x")})
    return {
        "system": system,
        "ranks": ranks,
        "repeat": 0,
        "marks": [marks] * ranks,
        "error": None,
        "namespace": True,
        "seconds": 40,
    } | more


@pytest.fixture
def tree() -> dict[str, Any]:
    runs = [
        run("ours", 2, 1.0, 50),
        run("fully_shard", 2, 1.6, 60),
        run("accelerate FSDP2", 2, 1.2, 40, engine="DistributedDataParallel"),
        {"system": "torchtune", "ranks": 2, "repeat": 0, "marks": [], "error": ERROR, "namespace": True, "seconds": 20},
    ]
    settings = {"base": "some-model", "rows": 2, "seq_len": 200, "steps": 2, "repeats": 1, "threads": 2}
    settings |= {"machine": machine_info("cpu")}
    return {"settings": settings, "systems": figures(runs, STEPS, 2), "runs": runs}


def test_figures_leave_out_the_first_step_of_each_kind(tree: dict[str, Any]) -> None:
    ours, peer = tree["systems"][:2]
    assert ours["full_tokens_per_s"] == pytest.approx(400)
    assert ours["uneven_tokens_per_s"] == pytest.approx(400)
    assert peer["uneven_tokens_per_s"] == pytest.approx(300 / 1.6)
    assert ours["wire_bytes"] == 40  # 80 a step over both ranks
    assert ours["load_peak_bytes"] == 250


def test_a_claim_holds_only_if_its_figures_support_it(tree: dict[str, Any]) -> None:
    holds = {(claim["peer"], claim["what"]): claim["holds"] for claim in claims(tree["systems"])}
    assert holds["fully_shard", "full"]
    assert holds["fully_shard", "uneven"]
    assert holds["fully_shard", "static_bytes"]
    assert not holds["accelerate FSDP2", "full"]
    assert not holds["accelerate FSDP2", "static_bytes"]
    assert ("torchtune", "static_bytes") not in holds


def test_the_table_shows_outcomes_and_errors(tree: dict[str, Any]) -> None:
    text = render_tables(json.loads(json.dumps(tree)))
    assert "| accelerate FSDP2: ran DDP | 2 | 333 (333 - 333) | 250 (250 - 250) |" in text
    assert "| torchtune: torchtune 0.6.1, torchao 0.10.0 | 2 | `NotImplementedError: no kernel of that name" in text
    ratios = "| 1.20 (1.20 - 1.20) **no** | 1.60 (1.60 - 1.60) **no** | 1.250 **no** |"
    assert f"| accelerate FSDP2: ran DDP | 2 | ours {ratios}" in text
    assert "| fully_shard | 2 | ours | 1.60 (1.60 - 1.60) | 2.13 (2.13 - 2.13) | 0.833 |" in text
    for part in text.split("\n\n"):  # all rows of a table have equally many cells
        assert len({line.count("|") for line in part.splitlines()}) == 1


def test_peaks_at_load_leave_out_the_run_that_compiles_its_imports() -> None:
    first, second = run("ours", 2, 1.0, 50), run("ours", 2, 1.0, 50)
    for rank in first["marks"]:
        rank[1] = rank[1] | {"VmHWM": 900}
    (line,) = figures([first, second], STEPS, 2)
    assert line["load_peak_bytes"] == 250


def test_ratios_pair_steps_of_the_same_turn() -> None:
    """Check that a machine that becomes three times slower in the second repeat does not change the ratio."""
    runs = [run(name, 2, slow * s, 50) for slow in (1, 3, 3) for name, s in (("ours", 1.0), ("fully_shard", 1.6))]
    del runs[-1]
    by_key = {claim["what"]: claim for claim in claims(figures(runs, STEPS, 2))}
    assert by_key["full"]["ratio"] == pytest.approx(1.6)
    assert by_key["full"]["range"] == pytest.approx([1.6, 1.6])


def test_peers_without_recomputation_are_compared_only_with_ours_without_it() -> None:
    names = ["ours", "ours, nothing recomputed", "transformers", "transformers, nothing recomputed"]
    pairs = {(c["ours"], c["peer"]) for c in claims(figures([run(name, 1, 1.0, 50) for name in names], STEPS, 2))}
    assert pairs == {(names[0], names[2]), (names[1], names[2]), (names[1], names[3])}


SYSTEM = """
import os, sys
sys.path[:0] = sys.argv[1:2]
from marks import wait_for_turn, write_mark
for step in range(2):
    wait_for_turn()
    write_mark("step")
    if sys.argv[2] == "is killed":
        os.kill(os.getpid(), 9)
    if sys.argv[2] == "dies":
        raise ValueError("in its first step")
"""


def test_systems_take_turns(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SYSTEM, str(PEERS)]
    good, bad = (PeerProcess([*command, name], 1, tmp_path / name, {}) for name in ("lives", "dies"))
    good.turn()
    bad.turn()
    assert (good.code, bad.code) == (None, 1)
    good.turn()
    assert good.code == 0
    (marks,), (bad_marks,) = good.marks(), bad.marks()
    assert [mark["what"] for mark in marks] == ["ready", "begin", "step"] * 2
    assert marks[2]["time"] < bad_marks[1]["time"] < bad_marks[2]["time"] < marks[4]["time"], "steps overlap"
    assert exception_line(bad.error()) == "ValueError: in its first step"
    assert good.error() is None
    assert good.cpu_s > 0


def test_a_killed_system_reports_a_lack_of_memory(tmp_path: Path) -> None:
    system = PeerProcess([sys.executable, "-c", SYSTEM, str(PEERS), "is killed"], 1, tmp_path / "system", {})
    system.turn()
    assert "fewer --systems at a time" in exception_line(system.error())


def test_the_error_of_a_rank_that_lost_its_peer_is_not_the_reason() -> None:
    assert exception_line(ERROR).startswith("NotImplementedError: no kernel")


def test_every_system_has_its_files() -> None:
    for system in SYSTEMS.values():
        assert (PEERS / system.script).is_file()
        assert system.requirements is None or (PEERS / f"{system.requirements}.txt").is_file()


def test_missing_and_invalid_arguments(tmp_path: Path) -> None:
    command = [sys.executable, str(PEERS / "run.py")]
    missing = subprocess.run(command, capture_output=True, text=True)
    odd = subprocess.run([*command, "--base", ".", "--data", "x", "--rows", "3"], capture_output=True, text=True)
    assert missing.returncode == odd.returncode == 2
    assert "--base and --data are needed" in missing.stderr
    assert "--rows 3 is not divided by 2 ranks" in odd.stderr
