"""If this fails, the quickstart trains on useless data, or its held-out data is in its training data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from examples.quickstart import python_docs
from examples.quickstart.python_docs import DocEntry
from qlora_dist.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    counts = python_docs.build_python_docs(folder)
    assert counts.train == len(rows(folder / "train.jsonl"))
    assert counts.held_out == len(rows(folder / "eval.jsonl"))
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(path: Path) -> list[str]:
    return [row["messages"][1]["content"] for row in rows(path)]


def questions(path: Path) -> list[str]:
    return [row["messages"][0]["content"] for row in rows(path)]


@pytest.mark.slow
def test_enough_pairs_and_a_small_held_out_part(folder: Path) -> None:
    train, held_out = len(rows(folder / "train.jsonl")), len(rows(folder / "eval.jsonl"))
    assert train + held_out >= python_docs.MIN_PAIRS
    assert 0.01 < held_out / (train + held_out) <= 0.05
    assert held_out <= python_docs.MAX_EVAL_NAMES


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
@pytest.mark.slow
def test_every_row_is_a_question_and_an_answer(folder: Path, name: str) -> None:
    for row in rows(folder / name):
        assert list(row) == ["messages"]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"].strip() for message in row["messages"])
        assert python_docs.MIN_ANSWER_CHARS <= len(row["messages"][1]["content"]) <= python_docs.MAX_ANSWER_CHARS


@pytest.mark.slow
def test_splits_share_neither_question_nor_answer_nor_its_first_paragraph(folder: Path) -> None:
    train, held_out = folder / "train.jsonl", folder / "eval.jsonl"
    assert not set(questions(train)) & set(questions(held_out))
    assert not set(answers(train)) & set(answers(held_out))

    def summaries(path: Path) -> set[str]:
        bodies = (re.sub(r"^`[^\n]*`\n\n", "", answer) for answer in answers(path))
        return {body.split("\n\n")[0].lower() for body in bodies}

    assert not summaries(train) & summaries(held_out)


@pytest.mark.slow
def test_no_answer_occurs_twice(folder: Path) -> None:
    everything = answers(folder / "train.jsonl") + answers(folder / "eval.jsonl")
    assert len(set(everything)) == len(everything)


@pytest.mark.slow
def test_a_second_build_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    python_docs.build_python_docs(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.jsonl", "train.jsonl"]


@pytest.mark.slow
def test_well_known_names_have_their_documentation(folder: Path) -> None:
    by_answer = "\n".join(answers(folder / "train.jsonl") + answers(folder / "eval.jsonl"))
    for signature in ("`os.path.join(a, *p)`", "`class pathlib.Path`", "`import heapq`"):
        assert signature in by_answer
    asked = questions(folder / "train.jsonl") + questions(folder / "eval.jsonl")
    for kind, templates in python_docs.QUESTION_TEMPLATES.items():  # questions of different kinds differ
        patterns = "|".join(re.escape(template).replace(re.escape("{name}"), ".+") for template in templates)
        assert sum(re.fullmatch(patterns, question) is not None for question in asked) > 50, kind


def test_questions_vary_and_depend_on_the_name() -> None:
    entries = [DocEntry("function", f"module.f{i}", f"module.f{i}()", "Return something.") for i in range(200)]
    templates = {entry.question.replace(entry.name, "NAME") for entry in entries}
    assert len(templates) == len(python_docs.QUESTION_TEMPLATES["function"])
    assert entries[7].question == DocEntry("function", "module.f7", "other", "Another text.").question


def test_split_does_not_depend_on_the_order_of_the_pairs() -> None:
    entries = [DocEntry("function", f"module.f{i}", "", f"Return the number {i}.") for i in range(300)]
    assert python_docs.split_doc_entries(entries) == python_docs.split_doc_entries(entries[::-1])


def test_long_documentation_is_cut_between_paragraphs_before_examples() -> None:
    text = "f(x) -> y\n\nFirst.\n\nSecond:\n\n>>> f(1)\n2"
    assert python_docs._leading_paragraphs(text, 0) == "First."
    assert python_docs._leading_paragraphs("A" * 600 + "\n\n" + "B" * 600, 0) == "A" * 600
    assert python_docs._leading_paragraphs("A" * 1000, 0) == ""


def test_definitions_of_the_language_reference_are_cut_out() -> None:
    text = "String Methods\n**************\n\nIntroduction.\n\nstr.f(x)\n\n   Return f.\n\n   More."
    text += "\n\nstr.g()\n\n   G."
    definitions = list(python_docs._definitions(text.splitlines()))
    assert [(entry.name, entry.body) for entry in definitions] == [("str.f", "Return f.\n\nMore."), ("str.g", "G.")]
    (section,) = python_docs._sections(text.splitlines())
    assert (section.name, section.body) == ("String Methods", "Introduction.")


def test_a_python_without_sources_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(python_docs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="installed without sources"):
        python_docs.build_python_docs(tmp_path / "out")
    assert not (tmp_path / "out").exists()
