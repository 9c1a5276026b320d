"""If this fails, a cache of other tokens or masks is taken for the right one, or is made anew for nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qlora_dist.data import encoder_fingerprint as module
from qlora_dist.data.row_encoder import RowEncoder
from tests.helpers.published_tokenizers import make_tokenizer

ROOT = Path(__file__).parents[2]


def changed_template(tokenizer):
    tokenizer.chat_template += " "


def changed_vocabulary(tokenizer):
    tokenizer.add_tokens(["xyzzy"])


def changed_special_token(tokenizer):
    tokenizer.bos_token = "<|endoftext|>"


def changed_rules(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = None


def changed_splitting(tokenizer):
    tokenizer.split_special_tokens = True


@pytest.mark.parametrize(
    "change", [changed_template, changed_vocabulary, changed_special_token, changed_rules, changed_splitting]
)
def test_changes_with_what_tokens_depend_on(change):
    tokenizer = make_tokenizer("chatml")
    before = RowEncoder(tokenizer, "assistant").fingerprint()
    change(tokenizer)
    assert RowEncoder(tokenizer, "assistant").fingerprint() != before


def test_changes_with_mask_template_and_version(monkeypatch):
    tokenizer = make_tokenizer("chatml")
    settings = [("assistant", None), ("last", None), ("all", None), ("all", "chatml"), ("all", "alpaca")]
    found = {RowEncoder(tokenizer, mask, template).fingerprint() for mask, template in settings}
    monkeypatch.setattr(module, "ENCODER_VERSION", module.ENCODER_VERSION + 1)
    found.add(RowEncoder(tokenizer, "assistant").fingerprint())
    assert len(found) == 6


def test_stays_with_what_they_do_not_depend_on(tmp_path):
    """Where the files lie, what was encoded before, whether the template came from a file."""
    tokenizer = make_tokenizer("chatml", pad_token="<|im_end|>")
    before = RowEncoder(tokenizer, "assistant").fingerprint()
    tokenizer(["the cat", "the"], padding=True, truncation=True, max_length=1)
    assert RowEncoder(tokenizer, "assistant").fingerprint() == before
    path = tmp_path / "template.jinja"
    path.write_text(tokenizer.chat_template)
    assert RowEncoder(tokenizer, "assistant", str(path)).fingerprint() == before
    for name in ("a", "b"):
        tokenizer.save_pretrained(tmp_path / name)
        assert RowEncoder(AutoTokenizer.from_pretrained(tmp_path / name), "assistant").fingerprint() == before


@pytest.mark.slow
def test_is_the_same_in_another_process(tmp_path):
    """Ranks compare it: it cannot depend on the order of a set or on hash seeds."""
    tokenizer = make_tokenizer("qwen3")
    tokenizer.save_pretrained(tmp_path / "model")
    program = (
        "import sys; from transformers import AutoTokenizer; from qlora_dist.data.row_encoder import RowEncoder; "
        "print(RowEncoder(AutoTokenizer.from_pretrained(sys.argv[1]), 'last').fingerprint())"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model")]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert told == RowEncoder(tokenizer, "last").fingerprint()
