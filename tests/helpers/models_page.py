"""The page about model types, which is written from the outcomes of the sweep."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

_ROOT = Path(__file__).resolve().parents[2]
MODEL_TABLE = _ROOT / "tests" / "model" / "model_sweep.json"
"""Outcome of each type, by task."""
PAGE = _ROOT / "docs" / "models.md"

_INTRODUCTION = """\
# Models

These tables show what becomes of each model type of transformers {version}. The type is `model_type` in the model's
`config.json`. `tests/model/test_model_sweep.py` wrote them and checks them:

- It makes a tiny model of each type with random weights, and saves it with `save_pretrained` in bf16.
- `quantize` writes it in 4 bit, or says why it cannot be trained.
- It is trained for two steps in fp32, on one rank and on two. The losses of both must agree.
- The loss of the first step must be that of transformers, with the weights that bitsandbytes dequantizes.
- PEFT opens the adapter on that model of transformers. Its held-out loss must be the one at the end of the training.

The relative difference of two losses must be below 1e-5.

- **packing**: whether a row may hold several sequences. Where it may not, set `data.packing: none`.
- **experts**: whether `lora.experts: true` trains the experts. A type without experts in 4 bit has no entry.
- **share**: whether `--min-share` has to be given, because much of the tiny model stays in 16 bit.
"""


def read_model_table() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the outcome of each type, by task."""
    return json.loads(MODEL_TABLE.read_text())


def write_model_table(table: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Write the outcomes with a line for each type."""
    tasks = []
    for task, entries in table.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
        tasks.append(f" {json.dumps(task)}: {{\n" + ",\n".join(lines) + "\n }")
    MODEL_TABLE.write_text("{\n" + ",\n".join(tasks) + "\n}\n")


def models_page() -> str:
    """Return the page in Markdown."""
    table = read_model_table()
    sections = [_INTRODUCTION.format(version=transformers.__version__)]
    for task, title in (("causal", "Causal language models"), ("image-text-to-text", "Multimodal models")):
        works = {name: entry for name, entry in table[task].items() if "refused" not in entry}
        refused = {name: entry for name, entry in table[task].items() if "refused" in entry}
        sections.append(f"## {title}\n\n{len(works)} of {len(table[task])} types can be trained.\n")
        if works:
            sections.append(_works_rows(works))
        sections.append("The others are refused with a message:\n")
        sections.append(_refused_rows(refused))
    return "\n".join(sections)


def _works_rows(entries: Mapping[str, Mapping[str, Any]]) -> str:
    rows = ["| type | packing | experts | share |", "| --- | --- | --- | --- |"]
    for name, entry in entries.items():
        experts = "yes" if entry.get("experts") else ""
        share = f"{entry['min_share']:.0%}" if "min_share" in entry else ""
        rows.append(f"| `{name}` | {'yes' if entry['packing'] else 'no'} | {experts} | {share} |")
    return "\n".join(rows) + "\n"


def _refused_rows(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a row for each message, with `...` for the type."""
    types: dict[str, list[str]] = {}
    for name, entry in entries.items():
        message = re.sub(rf"type {re.escape(name)}\b", "type ...", entry["refused"])
        message = message.replace("`", "'").replace("|", "/")
        types.setdefault(message, []).append(f"`{name}`")
    rows = ["| types | message |", "| --- | --- |"]
    rows += [f"| {', '.join(names)} | `{message}` |" for message, names in types.items()]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(models_page())
