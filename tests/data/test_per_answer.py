"""If this fails, models whose templates rewrite history are trained on text they never see, or not on all answers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.data.row_encoder import EncodedSequence, MaskMode, MultiTurnMode, RowEncoder
from qlora_dist.data.source_row import BadRow, MessagesRow
from tests.helpers.published_tokenizers import FAMILIES, make_tokenizer


def make_message(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


CHAT = [
    make_message("user", "the cat"),
    make_message("assistant", "sat on"),
    make_message("user", "the dog"),
    make_message("assistant", "the log"),
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "what", "arguments": {"role": "cat"}}}

_TURN = "<|im_start|>{{ m.role }}\n"
_ASKED = "{% if m.role != 'assistant' %}" + _TURN + "{{ m.content }}<|im_end|>\n"
_END = "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
# As in Qwen 3.5: the prompt opens a thought, the last answer has one, and earlier answers have none.
OPENS_AND_FORGETS = (
    "{% for m in messages %}" + _ASKED + "{% else %}" + _TURN + "{% if loop.last %}<think>\n"
    "{{ m.reasoning_content | default('') }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n" + _END
    + "<think>\n{% endif %}"
)  # fmt: skip
# As in DeepSeek R1: the prompt opens a thought, and no answer is written with one.
OPENS = (
    "{% for m in messages %}" + _ASKED + "{% else %}" + _TURN + "{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    + _END + "<think>\n{% endif %}"
)  # fmt: skip
# As in Nemotron 3: an answer without a thought gets an empty one, which differs from the prompt's.
CLOSES = OPENS.replace("{{ m.content.split('</think>')[-1] }}", "<think></think>{{ m.content }}")
# As in Gemma 4: the prompt has an empty thought, and the answer none.
EMPTY = OPENS.replace("<think>\n{% endif %}", "<think>\n\n</think>\n\n{% endif %}")
# The prompt has an empty thought, and the data have one.
THINKS_UNASKED = OPENS_AND_FORGETS.replace("<think>\n{% endif %}", "<think>\n\n</think>\n\n{% endif %}")
# As in Mistral: the system message is written into the question while that is the last message.
MOVES = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}<|im_end|>{% elif m.role == 'assistant' %}"
    " {{ m.content }}<|endoftext|>{% endif %}{% endfor %}"
)
# As in GPT-OSS: the last answer has another end than the others.
ENDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ '<|endoftext|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
AGAIN = ASKED + "sat on<|im_end|>\n<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n"


def encode(
    template: str | None,
    messages: list[dict],
    mode: MultiTurnMode = "auto",
    mask: MaskMode = "assistant",
    name: str = "qwen3",
) -> Any:
    tokenizer = make_tokenizer(name)
    if template is not None:
        tokenizer.chat_template = template
    (encoded,) = RowEncoder(tokenizer, mask, None, mode).encode([MessagesRow("train.jsonl, line 7", messages)])
    return encoded


def decode_answers(encoded: Any) -> list[tuple[str, str]]:
    """Return, for each sequence, the text before the first trained token and the trained text."""
    tokenizer = make_tokenizer("qwen3")
    texts = []
    for item in encoded:
        start = int(item.loss_mask.argmax())
        stop = len(item.loss_mask) - int(item.loss_mask[::-1].argmax())
        assert item.loss_mask[start:stop].all()
        assert not tokenizer.decode(item.tokens[stop:]).strip()
        texts.append((tokenizer.decode(item.tokens[:start]), tokenizer.decode(item.tokens[start:stop])))
    return texts


THOUGHTS = [
    make_message("user", "the cat"),
    make_message("assistant", "sat on", reasoning_content="who?"),
    make_message("user", "the dog"),
    make_message("assistant", "the log"),
]
INLINE = [
    CHAT[0],
    make_message("assistant", "<think>\nwho?\n</think>\n\nsat on"),
    CHAT[2],
    make_message("assistant", "what\n</think>\n\nthe log"),
]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (
            OPENS_AND_FORGETS,
            THOUGHTS,
            [
                (ASKED + "<think>\n", "who?\n</think>\n\nsat on<|im_end|>"),
                (AGAIN + "<think>\n", "\n</think>\n\nthe log<|im_end|>"),
            ],
        ),
        (
            OPENS,
            INLINE,
            [
                (ASKED + "<think>\n", "who?\n</think>\n\nsat on<|im_end|>"),
                (AGAIN.replace("sat on", "\n\nsat on") + "<think>\n", "what\n</think>\n\nthe log<|im_end|>"),
            ],
        ),
        (
            CLOSES,
            CHAT,
            [
                (ASKED + "<think>\n", "</think>sat on<|im_end|>"),
                (AGAIN.replace("sat on", "<think></think>sat on") + "<think>\n", "</think>the log<|im_end|>"),
            ],
        ),
        (
            EMPTY,
            CHAT,
            [
                (ASKED + "<think>\n\n</think>\n\n", "sat on<|im_end|>"),
                (AGAIN + "<think>\n\n</think>\n\n", "the log<|im_end|>"),
            ],
        ),
        (
            MOVES,
            [make_message("system", "You are a cat."), *CHAT],
            [
                ("<|im_start|>You are a cat.\n\nthe cat<|im_end|>", " sat on<|endoftext|>"),
                (
                    "<|im_start|>the cat<|im_end|> sat on<|endoftext|><|im_start|>You are a cat.\n\nthe dog<|im_end|>",
                    " the log<|endoftext|>",
                ),
            ],
        ),
        (
            ENDS,
            CHAT,
            [
                (ASKED.replace("\n<|im_s", "<|im_s"), "sat on<|endoftext|>"),
                (AGAIN.replace("\n<|im_s", "<|im_s"), "the log<|endoftext|>"),
            ],
        ),
    ],
    ids=["opens and forgets", "opens", "closes", "empty", "moves", "ends"],
)
def test_one_sequence_per_answer_where_history_is_rewritten(template, messages, expected):
    assert isinstance(encode(template, messages, "whole"), BadRow)
    for mode in ("auto", "per-answer"):
        encoded = encode(template, messages, mode)
        assert isinstance(encoded, list), encoded
        assert decode_answers(encoded) == expected
        tokenizer = make_tokenizer("qwen3")
        tokenizer.chat_template = template
        for item, end in zip(encoded, (len(messages) - 3, len(messages) - 1), strict=True):
            prompt = tokenizer.apply_chat_template(messages[:end], add_generation_prompt=True, return_dict=False)
            assert item.tokens[: len(prompt)].tolist() == prompt, "the tokens of the prompt at inference"
            assert not item.loss_mask[: len(prompt)].any() and item.loss_mask[len(prompt)]


@functools.cache
def make_encoder(name: str, mode: MultiTurnMode, mask: MaskMode) -> RowEncoder:
    return RowEncoder(make_tokenizer(name), mask, None, mode)


CONTENTS = st.sampled_from(["a", "the cat", " sat \n", "\n\nfoo", "字🙂", "<think>\nwho?\n</think>\n\nme"])


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), mask=st.sampled_from(["assistant", "last"]))
def test_published_templates(name, data, mask):
    """Each answer that the mask selects is trained once, after the tokens that inference would see."""
    tokenizer, end = make_tokenizer(name), FAMILIES[name].end
    messages = []
    for _ in range(data.draw(st.integers(1, 4))):
        messages.append(make_message("user", data.draw(CONTENTS)))
        messages.append(
            make_message("assistant", data.draw(CONTENTS), train=data.draw(st.sampled_from([None, True, False])))
        )
    row = MessagesRow("train.jsonl, line 7", messages)
    (whole,), (auto,), (each,) = (
        make_encoder(name, mode, mask).encode([row]) for mode in ("whole", "auto", "per-answer")
    )
    answers = range(1, len(messages), 2)
    masked = answers[-1:] if mask == "last" else answers
    trained_indices = [i for i in answers if messages[i]["train"] or (messages[i]["train"] is None and i in masked)]
    if not trained_indices:
        assert isinstance(each, EncodedSequence) and not each.loss_mask.any()
        return
    plain = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    assert isinstance(each, list) and len(each) == len(trained_indices)
    for index, item in zip(trained_indices, each, strict=True):
        prompt = tokenizer.apply_chat_template(plain[:index], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(plain[: index + 1], tokenize=False)
        assert text.startswith(prompt)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if FAMILIES[name].words == "bytes":
            assert item.tokens[: len(ids)].tolist() == ids
            assert not item.loss_mask[: len(ids)].any()
            answer = text[len(prompt) :]
            assert tokenizer.decode(item.tokens[item.loss_mask]) == answer[: answer.index(end) + len(end)]
        assert tokenizer.decode(item.tokens) == tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    if isinstance(whole, EncodedSequence):
        assert isinstance(auto, EncodedSequence)
        assert (auto.tokens.tolist(), auto.loss_mask.tolist()) == (whole.tokens.tolist(), whole.loss_mask.tolist())
        # History is not rewritten, and no line feed of an answer forms a token with the prompt's.
        if name in ("chatml", "llama-3", "llama-3.1") and not any(m["content"][0] in " \n" for m in messages):
            tail = [tokenizer.decode(item.tokens[item.loss_mask]) for item in each]
            assert "".join(tail) == tokenizer.decode(whole.tokens[whole.loss_mask])
    else:
        assert isinstance(auto, list)


def test_calls_and_what_follows_the_last_answer():
    messages = [
        CHAT[0],
        make_message("assistant", "", reasoning_content="who?", tool_calls=[CALL]),
        make_message("tool", "you"),
        CHAT[1],
        CHAT[2],
        CHAT[3],
        make_message("user", "and?"),
    ]
    first, second, last = encode(None, messages)
    tokenizer = make_tokenizer("qwen3")
    assert tokenizer.decode(first.tokens[first.loss_mask]).startswith("<think>\nwho?\n</think>\n\n<tool_call>")
    assert tokenizer.decode(second.tokens).count("who?") == 1, "the thought belongs to the question that is answered"
    assert tokenizer.decode(last.tokens).count("who?") == 0
    assert tokenizer.decode(last.tokens[last.loss_mask]) == "<think>\n\n</think>\n\nthe log<|im_end|>"
    assert "and?" not in tokenizer.decode(last.tokens)


def test_marked_spans_are_used_as_they_are():
    words = "{{ m.content }}<|im_end|>\n" + _END
    assert words in OPENS_AND_FORGETS
    marked = OPENS_AND_FORGETS.replace(words, "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n" + _END)
    encoded = encode(marked, CHAT, "per-answer")
    assert [text for _, text in decode_answers(encoded)] == ["sat on<|im_end|>", "the log<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "messages", "mode", "expected"),
    [
        (OPENS, CHAT, "auto", "prompt for message 2 opens a thought ('<think>\\n') and the answer holds none; begin "),
        (ENDS, [{**CHAT[0], "train": True}, *CHAT[1:]], "auto", "message 1 is trained and is not the assistant's"),
        (ENDS, CHAT, "whole", "cannot be trained as one row; set data.multi_turn: auto, or give data.chat_template"),
        (ENDS, CHAT[1:], "per-answer", "starts with the assistant"),
        (
            THINKS_UNASKED,
            THOUGHTS,
            "auto",
            "prompt for message 2 ends with '\\n</think>\\n\\n', and the answer does not",
        ),
    ],
)
def test_unsupported_conversations_get_a_remedy(template, messages, mode, expected, refusal):
    row = encode(template, messages, mode)
    assert isinstance(row, BadRow)
    assert expected in refusal(row.to_error())
