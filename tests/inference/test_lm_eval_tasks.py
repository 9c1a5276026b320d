"""If this fails, lm-evaluation-harness scores another model than the one that was trained, or a sharded one hangs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest

from qlora_dist.errors import UserError
from qlora_dist.inference import lm_eval_tasks
from qlora_dist.inference.inference_config import inference_config
from qlora_dist.inference.inference_model import open_inference_model
from qlora_dist.inference.lm_eval_tasks import TaskOptions, check_tasks, run_tasks
from qlora_dist.inference.named_adapter import common_base, parse_named_adapters
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks

CHOICE, TEXT, WRITE = "tiny_choice", "tiny_text", "tiny_write"


def make_tasks(folder: Path) -> Path:
    """Write three tasks that need no network: multiple choice with examples, perplexity of a text, and generation."""
    rows = [
        {"question": f"{a} {b}", "choices": [b, f"{a} {a}", "who"], "answer": index % 3, "text": f"{a} about {b} " * 40}
        for index, (a, b) in enumerate(zip(tiny_models.WORDS, tiny_models.WORDS[3:], strict=False))
    ]
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
    }
    choice = {
        "output_type": "multiple_choice",
        "fewshot_split": "test",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "num_fewshot": 2,
    }
    text = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    write = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    }
    for name, task in ((CHOICE, choice), (TEXT, text), (WRITE, write)):
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))
    return folder


def run_lm_eval_tasks(adapter: Path, folder: Path) -> Any:
    """Return all scores, and the harness's requests with the answers."""
    from qlora_dist.inference.lm_eval_model import LmEvalModel

    calls: dict[str, Any] = {}
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        record_calls(LmEvalModel, kind, calls)  # in this rank's process alone
    adapters = parse_named_adapters([f"one={adapter}"])
    overrides = ("train.device=cpu", "model.compute_dtype=fp32")
    with open_inference_model(
        inference_config(common_base(adapters), adapter, overrides=overrides), adapters
    ) as loaded:
        scores = run_tasks(loaded, TaskOptions(names=(CHOICE, TEXT, WRITE), batch_size=4, limit=5, folder=folder))
    return scores, calls


def record_calls(model: Any, kind: str, calls: dict[str, Any]) -> None:
    """Record the requests to a method of a class or an instance, and its answers."""
    method = getattr(model, kind)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        results, requests = method(*args, **kwargs), args[-1]
        pairs = zip(requests, results, strict=True)
        calls[kind] = [[list(map(str, request.args)), result] for request, result in pairs]
        return results

    setattr(model, kind, recorded)


def test_missing_data_is_reported_before_the_model_is_loaded(tmp_path: Path) -> None:
    """A compute node has no network, as these tests have none (HF_HUB_OFFLINE)."""
    pytest.importorskip("lm_eval")
    task = {"task": "far", "dataset_path": "no-such-owner/no-such-data", "output_type": "loglikelihood_rolling"}
    (tmp_path / "far.yaml").write_text(
        json.dumps({**task, "test_split": "test", "doc_to_text": "", "doc_to_target": "t"})
    )
    with pytest.raises(UserError, match=r"^--tasks far: the data of a task cannot be loaded \(.*HF_HOME\)$"):
        check_tasks(TaskOptions(names=("far",), folder=tmp_path))


def test_preloaded_tasks_are_evaluated_once(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    options = TaskOptions(names=(CHOICE,), folder=make_tasks(tmp_path / "tasks"))
    check_tasks(options)
    manager = lm_eval_tasks._task_manager(options.names, options.folder)
    first, second = manager.load([CHOICE]), manager.load([CHOICE])
    assert first["tasks"].keys() == second["tasks"].keys() == {CHOICE}
    assert first["tasks"][CHOICE] is not second["tasks"][CHOICE], "the harness changes what it evaluates"


@pytest.mark.slow
def test_scores_equal_the_plain_hf_models(
    material: Any, plain_model: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is the harness's own model with transformers, bitsandbytes and PEFT."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # it takes seconds
    folder = make_tasks(tmp_path / "tasks")
    reference: dict[str, Any] = {}
    model = peft.PeftModel.from_pretrained(plain_model(material.base), material.first_adapter)
    plain = HFLM(pretrained=model, tokenizer=str(material.base), batch_size=4)
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        record_calls(plain, kind, reference)
    lm_eval.simple_evaluate(
        plain,
        tasks=[CHOICE, TEXT, WRITE],
        limit=5,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    ((scores, alone),) = run_ranks(1, run_lm_eval_tasks, material.first_adapter, folder)
    assert len(reference) == 3
    assert set(scores) == {CHOICE, TEXT, WRITE}
    for kind, rows in reference.items():
        assert len(rows) >= 5
        assert [request for request, _ in rows] == [request for request, _ in alone[kind]]
        answers = [[result for _, result in calls] for calls in (rows, alone[kind])]
        if kind == "loglikelihood":
            assert [greedy for _, greedy in answers[0]] == [greedy for _, greedy in answers[1]]
            answers = [[score for score, _ in pairs] for pairs in answers]
        if kind == "generate_until":
            assert answers[0] == answers[1]
        else:
            assert answers[1] == pytest.approx(answers[0], abs=1e-3)
            assert len(set(answers[0])) > 3
    for rank_scores, calls in run_ranks(2, run_lm_eval_tasks, material.first_adapter, folder):
        for kind in reference:
            assert [request for request, _ in calls[kind]] == [request for request, _ in alone[kind]]
        for (_, (score, _)), (_, (expected, _)) in zip(calls["loglikelihood"], alone["loglikelihood"], strict=True):
            assert score == pytest.approx(expected, abs=1e-4)
        assert [text for _, text in calls["generate_until"]] == [text for _, text in alone["generate_until"]]
        assert not rank_scores or rank_scores[CHOICE]["acc"] == scores[CHOICE]["acc"]
