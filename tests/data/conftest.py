"""Byte-level BPE tokenizers, like those that Llama and Qwen use, trained on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As in Llama 3: a BOS token, trimmed contents, and nothing after the end-of-turn token.
LLAMA = (
    "{{ '<|bos|>' }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
# No special token: a line feed ends a turn.
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As in Qwen 3: only the last turn is written with its thought.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The prompt opens a thought that the rendered answer does not have.
UNPROMPTED = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
ALTERNATING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML

TEMPLATES = {
    "chatml": CHATML,
    "llama": LLAMA,
    "plain": PLAIN,
    "marked": MARKED,
    "rewriting": REWRITING,
    "unprompted": UNPROMPTED,
    "alternating": ALTERNATING,
    "none": None,
}

# As in Llama 3 and Qwen: consecutive line feeds are one piece.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SENTENCES = [
    "user\nsat on the mat",
    "assistant\nthe cat",
    "the cat sat on the mat and the dog sat on the log",
    "user asks and assistant answers: hello there, how are you?",
    "a line feed\n\nand another\n\n\nand white space   too",
]


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Return `make_tokenizer(name of a template, **special tokens)`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    serialized = tokenizer.to_str()

    def make(template: str, **special_tokens: Any) -> PreTrainedTokenizerFast:
        made = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(serialized), **{"eos_token": "<|eos|>", **special_tokens}
        )
        made.chat_template = TEMPLATES[template]
        return made

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Return `write_rows(row, row, ..., name="train.jsonl")`, which gives the path of a JSONL file of these objects."""

    def write(*rows: Any, name: str = "train.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def refusal() -> Callable[[BaseException], str]:
    """Return a function that checks that an error is one sentence on one line with a remedy, and returns it."""

    def check(error: BaseException) -> str:
        message = str(error)
        assert "\n" not in message
        assert "; " in message, "problem; remedy"
        assert not message.endswith(".")
        return message

    return check
