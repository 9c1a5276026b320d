"""If this fails, long agentic conversations take minutes to prepare, or are trained on other tokens than short ones."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qlora_dist.data import answer_spans
from qlora_dist.data.chat_renderer import ChatRenderer
from qlora_dist.data.row_encoder import EncodedSequence, RowEncoder
from qlora_dist.data.source_row import BadRow, MessagesRow
from tests.helpers.published_tokenizers import make_tokenizer

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "what", "arguments": {"role": "cat"}}}
CONTENTS = ["a", "the cat", " sat \n", "\n\nfoo", "字🙂", '{"a": 1}', "<tool_response>", "</think>", "qzj0z3b"]


def make_agent_messages(steps: int, rng: random.Random, thoughts: float, contents: list[str]) -> list[dict[str, Any]]:
    """Return a question, steps of calls and results, and the answer."""
    messages = [{"role": "user", "content": rng.choice(contents)}]
    for _ in range(steps):
        thought = {"reasoning_content": "who?"} if rng.random() < thoughts else {}
        messages.append({"role": "assistant", "content": "", "tool_calls": [CALL], **thought})
        messages.append({"role": "tool", "content": rng.choice(contents), "tool_call_id": "abcdefghi"})
    return [*messages, {"role": "assistant", "content": rng.choice(contents)}]


@pytest.mark.parametrize("name", ["chatml", "llama-3", "llama-3.1", "mistral-nemo", "gemma", "qwen3"])
def test_long_conversations_are_trained_as_short_ones(name, monkeypatch):
    """Tokens and refusals do not depend on whether the conversation is rendered up to each answer."""
    rng = random.Random(name)
    encoder = RowEncoder(make_tokenizer(name), "assistant")
    tools = "tool_calls" in make_tokenizer(name).chat_template
    kinds = []
    for contents in (CONTENTS[:2], CONTENTS):
        for steps, thoughts in [(0, 0.0), *([(1, 0.0), (26, 0.0), (26, 1.0), (2, 0.02)] if tools else [])]:
            messages: list[dict[str, Any]] = []
            while sum(message["role"] == "assistant" for message in messages) < answer_spans.MIN_ANSWERS_TO_DERIVE:
                messages += make_agent_messages(steps, rng, thoughts, contents)
            row = MessagesRow("train.jsonl, line 7", messages)
            (derived,) = encoder.encode([row])
            with monkeypatch.context() as patch:
                patch.setattr(answer_spans, "MIN_ANSWERS_TO_DERIVE", 10**9)
                (exact,) = encoder.encode([row])
            kinds.append(type(exact))
            if isinstance(exact, EncodedSequence):
                assert isinstance(derived, EncodedSequence), derived
                assert derived.tokens.tolist() == exact.tokens.tolist()
                assert derived.loss_mask.tolist() == exact.loss_mask.tolist()
            else:
                assert isinstance(derived, BadRow)
    assert EncodedSequence in kinds


@pytest.mark.parametrize(("name", "steps"), [("chatml", 0), ("llama-3.1", 40), ("qwen3", 40), ("qwen3", 0)])
def test_a_few_renderings(name, steps, monkeypatch):
    """One rendering per answer made 200 steps take 24 times as long as the tokenizer."""
    rendered = []
    text = ChatRenderer.render

    def counted(self: ChatRenderer, *args: Any, **options: Any) -> str:
        rendered.append(1)
        return text(self, *args, **options)

    monkeypatch.setattr(ChatRenderer, "render", counted)
    encoder = RowEncoder(make_tokenizer(name), "assistant")
    rendering_counts = []
    for long in (1, 4):
        rng = random.Random(0)
        thoughts = float(name == "qwen3")  # Other templates write none.
        messages = make_agent_messages(40 * long, rng, thoughts, CONTENTS[:3]) if steps else []
        for _ in range(0 if steps else 40 * long):
            messages += make_agent_messages(0, rng, 0.0, CONTENTS[:3])
        rendered.clear()
        (encoded,) = encoder.encode([MessagesRow("1", messages)])
        assert isinstance(encoded, EncodedSequence)
        rendering_counts.append(len(rendered))
    assert max(rendering_counts) <= 30, rendering_counts


def test_one_rewritten_turn_among_many_is_noticed():
    """A single thought in the middle is in the prompt of its answer, but not in the conversation."""
    rng = random.Random(0)
    messages: list[dict[str, Any]] = []
    for turn in range(30):
        messages += make_agent_messages(2, rng, float(turn == 17), CONTENTS[:2])
    (row,) = RowEncoder(make_tokenizer("qwen3"), "assistant").encode([MessagesRow("1", messages)])
    assert isinstance(row, BadRow) and "rewrites history (the prompt of message" in row.reason
