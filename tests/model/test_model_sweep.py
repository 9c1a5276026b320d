"""If this fails, what docs/models.md says of a model type is untrue.

`python -m tests.model.test_model_sweep` tries every type and rewrites the table, and then the page.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers.models.auto import modeling_auto

from tests.helpers.model_sweep import sweep_models
from tests.helpers.models_page import PAGE, models_page, read_model_table, write_model_table

TYPES = {
    "causal": sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "image-text-to-text": sorted(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
}
SELECTION = [
    ("causal", ("llama", "qwen3_next", "bloom", "granitemoehybrid", "rwkv")),
    ("causal", ("gpt_oss", "gemma3_text", "nemotron_h", "jetmoe", "bert")),
    ("causal", ("deepseek_v3", "gpt2", "falcon_h1", "bart", "zamba2")),
    ("image-text-to-text", ("gemma4", "qwen3_vl_moe", "llama4", "mistral3", "kosmos-2.5")),
]
"""Types of every kind, which are tried in every run of the tests."""
GROUPS = 6
"""Number of groups of the other types of a task."""


def others(task: str, group: int) -> list[str]:
    selected = {name for selected_task, names in SELECTION if selected_task == task for name in names}
    return [name for name in TYPES[task] if name not in selected][group::GROUPS]


def check(task: str, names: Sequence[str], folder: Path) -> None:
    outcomes, table = sweep_models(names, task, folder), read_model_table()[task]
    assert outcomes == {name: table[name] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize(("task", "names"), SELECTION)
def test_outcomes_of_selected_types(task: str, names: tuple[str, ...], tmp_path: Path) -> None:
    check(task, names, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.parametrize("task", TYPES)
def test_outcomes_of_all_other_types(task: str, group: int, tmp_path: Path) -> None:
    check(task, others(task, group), tmp_path)


@pytest.mark.parametrize("task", TYPES)
def test_table_has_every_type_of_transformers(task: str) -> None:
    assert list(read_model_table()[task]) == TYPES[task]


def test_page_shows_the_table() -> None:
    assert PAGE.read_text() == models_page(), "write it anew: python -m tests.helpers.models_page"


def test_most_types_train() -> None:
    table = read_model_table()
    assert not [name for entries in table.values() for name, entry in entries.items() if "failed" in entry]
    assert sum("refused" not in entry for entry in table["causal"].values()) >= 120


def write_table() -> None:
    table = {}
    for task, names in TYPES.items():
        with tempfile.TemporaryDirectory() as folder:
            table[task] = sweep_models(names, task, Path(folder))
    write_model_table(table)
    PAGE.write_text(models_page())


if __name__ == "__main__":
    write_table()
