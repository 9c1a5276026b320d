"""If this fails, a cache of other tokens or masks is reused, or tokens are needlessly created again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qlora_dist.data import row_encoder as module
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
def test_changes_with_everything_that_tokens_depend_on(change):
    tokenizer = make_tokenizer("chatml")
    before = RowEncoder(tokenizer, "assistant").fingerprint()
    change(tokenizer)
    assert RowEncoder(tokenizer, "assistant").fingerprint() != before


def test_changes_with_mask_template_and_version(monkeypatch):
    tokenizer = make_tokenizer("chatml")
    settings = [("assistant", None), ("last", None), ("all", None), ("all", "chatml"), ("all", "alpaca")]
    fingerprints = {RowEncoder(tokenizer, mask, template).fingerprint() for mask, template in settings}
    monkeypatch.setattr(module, "ENCODER_VERSION", module.ENCODER_VERSION + 1)
    fingerprints.add(RowEncoder(tokenizer, "assistant").fingerprint())
    assert len(fingerprints) == 6


def test_does_not_change_with_anything_else(tmp_path):
    """It depends neither on the location of the files, nor on earlier texts, nor on whether the template was a file."""
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
    """Ranks compare it, so it cannot depend on the order of a set or on hash seeds."""
    tokenizer = make_tokenizer("qwen3")
    tokenizer.save_pretrained(tmp_path / "model")
    program = (
        "import sys; from transformers import AutoTokenizer; from qlora_dist.data.row_encoder import RowEncoder; "
        "print(RowEncoder(AutoTokenizer.from_pretrained(sys.argv[1]), 'last').fingerprint())"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model")]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert output == RowEncoder(tokenizer, "last").fingerprint()
