"""If this fails, the first command that a user tries fails, or reports success after a run that learned nothing."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from examples.quickstart import __main__ as command
from examples.quickstart import python_docs, quickstart, smollm2
from examples.quickstart.quickstart import AnswerComparison, QuickstartSummary, StageError
from qlora_dist.config.config_file import load_config
from qlora_dist.errors import UserError

SUMMARY: dict[str, Any] = {
    "eval_loss_first": 2.9,
    "eval_loss_last": 2.3,
    "steps": 24,
    "tokens_per_s": 301.5,
    "static_bytes": [70_000_000, 70_000_000],
    "peak_bytes": [1_500_000_000, 1_400_000_000],
    "comm_bytes_per_step": {"base": 560_000_000, "adapter": 20_000_000},
    "adapter": "runs/quickstart/adapter",
    "wall_s": 200.0,
}


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Replace every stage by one that only makes its folder; return the list of stages that ran."""
    ran: list[str] = []

    def unpack(folder: Path) -> Path:
        ran.append("unpack")
        folder.mkdir(parents=True)
        for name in smollm2._FOLDER_FILES:
            (folder / name).touch()
        return folder

    def build(folder: Path) -> python_docs.PairCounts:
        ran.append("data")
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text("{}\n{}\n")
        (folder / "eval.jsonl").write_text("{}\n")
        return python_docs.PairCounts(2, 1)

    def call(stage: str, words: list[str]) -> None:
        ran.append(stage)
        assert words[0] == sys.executable
        if stage == "quantize":
            Path(words[-1]).mkdir()
            (Path(words[-1]) / "config.json").touch()
        else:
            recipe = words.index("train") + 1
            config = load_config(words[recipe], words[recipe + 1 :])
            run = Path(config.run.dir) / config.run.name
            run.mkdir(parents=True, exist_ok=True)
            (run / "summary.json").write_text(json.dumps(SUMMARY | {"a_key_of_tomorrow": 1}))

    monkeypatch.setattr(smollm2, "unpack_smollm2", unpack)
    monkeypatch.setattr(python_docs, "build_python_docs", build)
    monkeypatch.setattr(quickstart, "_run_stage_process", call)
    monkeypatch.setattr(
        quickstart, "compare_answers", lambda *_: AnswerComparison("What?", "Documented.", "[before]", "[after]")
    )
    return ran


def printed(folder: Path) -> tuple[int, str]:
    output = io.StringIO()
    code = quickstart.run_quickstart(folder, 2, console=Console(file=output, width=200))
    return code, output.getvalue()


def test_second_run_only_trains(stages: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "with space, and [brackets]"
    code, text = printed(folder)
    assert code == 0
    assert stages == ["unpack", "data", "quantize", "train"]
    for figure in ("2.900 before, 2.300 after 24 steps", "20.7% lower", "302 tokens/s", "66.8 MiB, 66.8 MiB"):
        assert figure in text
    for figure in ("534.1 MiB (base, rank 0)", "runs/quickstart/adapter", "[before]", "[after]", "Documented."):
        assert figure in text
    stages.clear()
    assert printed(folder)[0] == 0
    assert stages == ["train"]


def test_a_run_that_learned_nothing_fails(stages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUMMARY, "eval_loss_last", 2.7)
    code, text = printed(tmp_path)
    assert code == 1
    assert "fell by 6.9%" in text


def test_an_unfinished_summary_is_a_failed_stage(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no complete summary"):
        QuickstartSummary.read(tmp_path / "summary.json")
    (tmp_path / "summary.json").write_text('{"steps": 3}')
    with pytest.raises(StageError, match="eval_loss_first"):
        QuickstartSummary.read(tmp_path / "summary.json")


def test_a_failed_process_keeps_its_exit_code() -> None:
    with pytest.raises(StageError, match="exit code 2") as raised:
        quickstart._run_stage_process("quantize", [sys.executable, "-c", "raise SystemExit(2)"])
    assert raised.value.exit_code == 2
    with pytest.raises(StageError) as raised:
        quickstart._run_stage_process("train", [sys.executable, "-c", "raise SystemExit(7)"])
    assert raised.value.exit_code == 1


def test_user_errors_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command.quickstart_main(["--dir", str(tmp_path), "--recipe", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1

    def missing(*_: object) -> int:
        raise UserError("the package is missing; install it")

    monkeypatch.setattr(command, "run_quickstart", missing)
    assert command.quickstart_main([]) == 2
    assert capsys.readouterr().err == "the package is missing; install it\n"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (9999, "9999 B"), (10_240, "10.0 KiB"), (3 * 1024**4, "3072.0 GiB")]
)
def test_readable_bytes(count: int, text: str) -> None:
    assert quickstart.readable_bytes(count) == text
