"""If this fails, models with these templates are trained on the wrong tokens. Expectations are written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_dist.data.row_encoder import EncodedSequence, MaskMode, RowEncoder
from qlora_dist.data.source_row import BadRow, MessagesRow
from tests.helpers.published_tokenizers import make_tokenizer, token_texts

Flagged = list[tuple[str, bool]]


def expect_masked(*texts: str) -> Flagged:
    return [(text, False) for text in texts]


def expect_trained(*texts: str) -> Flagged:
    return [(text, True) for text in texts]


def make_message(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


SYSTEM = make_message("system", "You are a cat.")
CAT, SAT = make_message("user", "the cat"), make_message("assistant", "sat on")
DOG, LOG = make_message("user", "the dog"), make_message("assistant", "the log")


def encode(name: str, messages: list[dict], mask: MaskMode = "assistant", tools: list[dict] | None = None) -> Flagged:
    tokenizer = make_tokenizer(name)
    encoded = RowEncoder(tokenizer, mask).encode([MessagesRow("train.jsonl, line 7", messages, tools)])[0]
    assert isinstance(encoded, EncodedSequence), encoded
    texts = token_texts(tokenizer, encoded.tokens)
    assert len(texts) == len(encoded.loss_mask)
    return list(zip(texts, encoded.loss_mask.tolist(), strict=True))


def encode_refusal(
    name: str, messages: list[dict], mask: MaskMode = "assistant", tools: list[dict] | None = None
) -> str:
    row = RowEncoder(make_tokenizer(name), mask).encode([MessagesRow("train.jsonl, line 7", messages, tools)])[0]
    assert isinstance(row, BadRow)
    assert row.location == "train.jsonl, line 7"
    assert "; " in row.reason and "\n" not in row.reason
    return row.reason


# End of a turn -> the turns above in the template's format.
CHATML_SYSTEM = expect_masked("<|im_start|>", "system", "\n", "You", " are", " a", " cat", ".", "<|im_end|>", "\n")
CHATML_CAT = expect_masked("<|im_start|>", "user", "\n", "the", " cat", "<|im_end|>", "\n")
CHATML_DOG = expect_masked("<|im_start|>", "user", "\n", "the", " dog", "<|im_end|>", "\n")
CHATML_PROMPT = expect_masked("<|im_start|>", "assistant", "\n")
CHATML_SAT = [*CHATML_PROMPT, *expect_trained("sat", " on", "<|im_end|>"), *expect_masked("\n")]
CHATML_LOG = [*CHATML_PROMPT, *expect_trained("the", " log", "<|im_end|>"), *expect_masked("\n")]


def all_masked(flagged: Flagged) -> Flagged:
    return [(text, False) for text, _ in flagged]


class TestChatML:
    def test_every_answer(self):
        assert encode("chatml", [SYSTEM, CAT, SAT, DOG, LOG]) == [
            *CHATML_SYSTEM,
            *CHATML_CAT,
            *CHATML_SAT,
            *CHATML_DOG,
            *CHATML_LOG,
        ]

    def test_last_answer(self):
        assert encode("chatml", [CAT, SAT, DOG, LOG], "last") == [
            *CHATML_CAT,
            *all_masked(CHATML_SAT),
            *CHATML_DOG,
            *CHATML_LOG,
        ]

    def test_last_answer_is_not_the_last_message(self):
        assert encode("chatml", [CAT, SAT, DOG], "last") == [*CHATML_CAT, *CHATML_SAT, *CHATML_DOG]

    def test_all(self):
        conversation = encode("chatml", [CAT, SAT], "all")
        assert conversation == expect_trained(*(text for text, _ in CHATML_CAT + CHATML_SAT))

    def test_an_answer_is_masked(self):
        messages = [CAT, {**SAT, "train": False}, DOG, LOG]
        assert encode("chatml", messages) == [*CHATML_CAT, *all_masked(CHATML_SAT), *CHATML_DOG, *CHATML_LOG]

    def test_an_earlier_answer_is_trained(self):
        messages = [CAT, {**SAT, "train": True}, DOG, LOG]
        assert encode("chatml", messages, "last") == [*CHATML_CAT, *CHATML_SAT, *CHATML_DOG, *CHATML_LOG]

    def test_other_roles_are_trained(self):
        """The content and the end of the turn are trained, as in an answer, but not the role."""
        messages = [{**SYSTEM, "train": True}, {**CAT, "train": True}, SAT]
        assert encode("chatml", messages) == [
            *expect_masked("<|im_start|>", "system", "\n"),
            *expect_trained("You", " are", " a", " cat", ".", "<|im_end|>"),
            *expect_masked("\n", "<|im_start|>", "user", "\n"),
            *expect_trained("the", " cat", "<|im_end|>"),
            *expect_masked("\n"),
            *CHATML_SAT,
        ]

    def test_messages_are_masked_with_all(self):
        assert encode("chatml", [{**CAT, "train": False}, SAT, DOG, {**LOG, "train": False}], "all") == [
            *expect_trained("<|im_start|>", "user", "\n"),
            *expect_masked("the", " cat", "<|im_end|>"),
            *expect_trained("\n", *(text for text, _ in CHATML_SAT + CHATML_DOG + CHATML_PROMPT)),
            *expect_masked("the", " log", "<|im_end|>"),
            *expect_trained("\n"),
        ]

    def test_tools_would_be_lost(self):
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
        assert "`tool_calls`, which the chat template does not write" in encode_refusal("chatml", [CAT, call])
        assert "`tools`, which the chat template does not write" in encode_refusal(
            "chatml", [CAT, SAT], tools=[{"a": 1}]
        )
        assert encode("chatml", [CAT, SAT], tools=[]) == [*CHATML_CAT, *CHATML_SAT]


LLAMA_CAT = expect_masked("<|start_header_id|>", "user", "<|end_header_id|>", "\n\n", "the", " cat", "<|eot_id|>")
LLAMA_PROMPT = expect_masked("<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n")


class TestLlama3:
    def test_every_answer(self):
        assert encode("llama-3", [SYSTEM, CAT, SAT, DOG, LOG]) == [
            *expect_masked("<|begin_of_text|>", "<|start_header_id|>", "system", "<|end_header_id|>", "\n\n"),
            *expect_masked("You", " are", " a", " cat", ".", "<|eot_id|>"),
            *LLAMA_CAT,
            *LLAMA_PROMPT,
            *expect_trained("sat", " on", "<|eot_id|>"),
            *expect_masked("<|start_header_id|>", "user", "<|end_header_id|>", "\n\n", "the", " dog", "<|eot_id|>"),
            *LLAMA_PROMPT,
            *expect_trained("the", " log", "<|eot_id|>"),
        ]

    def test_contents_are_trimmed(self):
        messages = [{**CAT, "content": " the cat\n", "train": True}, {**SAT, "content": "\n\nsat on "}]
        assert encode("llama-3", messages) == [
            *expect_masked("<|begin_of_text|>", "<|start_header_id|>", "user", "<|end_header_id|>", "\n\n"),
            *expect_trained("the", " cat", "<|eot_id|>"),
            *LLAMA_PROMPT,
            *expect_trained("sat", " on", "<|eot_id|>"),
        ]

    def test_tools(self):
        """In Llama 3.1, functions are in the user's turn, a call is in the answer's, and a result has its own turn."""
        tools = [{"name": "f"}]
        call = {"type": "function", "function": {"name": "what", "arguments": '{"role":"cat"}'}}
        messages = [CAT, {"role": "assistant", "tool_calls": [call]}, make_message("tool", "the log"), SAT]
        encoded = encode("llama-3.1", messages, tools=tools)
        trained = [text for text, flag in encoded if flag]
        # The arguments, a string in OpenAI's format, are written as an object.
        assert "".join(trained) == '{"name": "what", "parameters": {"role": "cat"}}<|eot_id|>sat on<|eot_id|>'
        start = next(index for index, (_, flag) in enumerate(encoded) if flag)
        assert encoded[start - 7 : start] == [*expect_masked("the", " cat", "<|eot_id|>"), *LLAMA_PROMPT]
        assert encoded[-17:] == [
            *expect_trained("<|eot_id|>"),
            *expect_masked(
                "<|start_header_id|>", "ipython", "<|end_header_id|>", "\n\n", '"', "the", " log", '"', "<|eot_id|>"
            ),
            *LLAMA_PROMPT,
            *expect_trained("sat", " on", "<|eot_id|>"),
        ]

    def test_two_calls_at_once(self):
        call = {"function": {"name": "f", "arguments": {}}}
        messages = [CAT, {"role": "assistant", "tool_calls": [call, call]}]
        assert "(This model only supports single tool-calls at once!)" in encode_refusal("llama-3.1", messages)


class TestMistral:
    def test_every_answer(self):
        """Only the end of the question prompts for an answer. The space before it belongs to the answer."""
        assert encode("mistral", [CAT, SAT, DOG, LOG]) == [
            *expect_masked("<s>", " ", " [INST]", " the", " cat", " [/INST]"),
            *expect_trained(" sat", " on", "</s>"),
            *expect_masked(" ", " [INST]", " the", " dog", " [/INST]"),
            *expect_trained(" the", " log", "</s>"),
        ]

    def test_system_message_in_the_first_question(self):
        assert encode("mistral", [SYSTEM, CAT, SAT], "last") == [
            *expect_masked("<s>", " ", " [INST]", " You", " are", " a", " cat.", "\n\n", "the", " cat", " [/INST]"),
            *expect_trained(" sat", " on", "</s>"),
        ]

    def test_system_message_has_no_turn_to_train(self):
        reason = encode_refusal("mistral", [{**SYSTEM, "train": True}, CAT, SAT])
        assert "`train` of message 1 is true, and the chat template writes no turn for that message" in reason

    def test_question_is_trained(self):
        assert encode("mistral", [{**CAT, "train": True}, SAT]) == [
            *expect_masked("<s>", " ", " [INST]"),
            *expect_trained(" the", " cat", " [/INST]", " sat", " on", "</s>"),
        ]

    def test_two_questions_in_a_row(self):
        assert "conversation roles must alternate" in encode_refusal("mistral", [CAT, DOG, SAT])

    def test_without_spaces(self):
        assert encode("mistral-nemo", [CAT, SAT, DOG, LOG]) == [
            *expect_masked("<s>", "[INST]", "the", " cat", "[/INST]"),
            *expect_trained("sat", " on", "</s>"),
            *expect_masked("[INST]", "the", " dog", "[/INST]"),
            *expect_trained("the", " log", "</s>"),
        ]

    @pytest.mark.parametrize("mask", ["assistant", "last"])
    def test_system_message_that_is_lost(self, mask):
        """Nemo writes the system message only while the question is the last message, so the trained text lacks it."""
        reason = encode_refusal("mistral-nemo", [SYSTEM, CAT, SAT], mask)
        assert "rewrites history (the prompt of message 3 changes with what follows)" in reason

    def test_tools(self):
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "what", "arguments": {"role": "cat"}}}
        messages = [
            CAT,
            {"role": "assistant", "tool_calls": [call]},
            make_message("tool", "log", tool_call_id="abcdefghi"),
            SAT,
        ]
        encoded = encode("mistral-nemo", messages, tools=[{"type": "function", "function": {"name": "what"}}])
        trained = [text for text, flag in encoded if flag]
        assert "".join(trained) == (
            '[TOOL_CALLS][{"name": "what", "arguments": {"role": "cat"}, "id": "abcdefghi"}]</s>sat on</s>'
        )
        assert encoded[-5:] == [*expect_masked('"}', "[/TOOL_RESULTS]"), *expect_trained("sat", " on", "</s>")]


class TestGemma:
    def test_every_answer(self):
        turns = [
            *expect_masked("<start_of_turn>", "user", "\n", "the", " cat", "<end_of_turn>", "\n"),
            *expect_masked("<start_of_turn>", "model", "\n"),
            *expect_trained("sat", " on", "<end_of_turn>"),
            *expect_masked("\n", "<start_of_turn>", "user", "\n", "the", " dog", "<end_of_turn>", "\n"),
            *expect_masked("<start_of_turn>", "model", "\n"),
            *expect_trained("the", " log", "<end_of_turn>"),
            *expect_masked("\n"),
        ]
        assert encode("gemma", [CAT, SAT, DOG, LOG]) == [*expect_masked("<bos>"), *turns]

    def test_no_system_message(self):
        assert "(System role not supported)" in encode_refusal("gemma", [SYSTEM, CAT, SAT])
        assert "(System role not supported)" in encode_refusal("gemma", [SYSTEM, CAT, SAT], "all")


EMPTY_THOUGHT = ("<think>", "\n\n", "</think>", "\n\n")


class TestQwen3:
    def test_one_answer(self):
        """The template puts an empty thought before the answer, with which generation has to begin."""
        assert encode("qwen3", [CAT, SAT]) == [
            *CHATML_CAT,
            *CHATML_PROMPT,
            *expect_trained(*EMPTY_THOUGHT, "sat", " on", "<|im_end|>"),
            *expect_masked("\n"),
        ]

    @pytest.mark.parametrize(
        "thoughtful",
        [make_message("assistant", "<think>\na thought\n</think>\n\nsat on"), {**SAT, "reasoning": "a thought"}],
    )
    def test_one_answer_with_a_thought(self, thoughtful):
        assert encode("qwen3", [CAT, thoughtful]) == [
            *CHATML_CAT,
            *CHATML_PROMPT,
            *expect_trained("<think>", "\n", "a", " thought", "\n", "</think>", "\n\n", "sat", " on", "<|im_end|>"),
            *expect_masked("\n"),
        ]

    def test_every_answer(self):
        """Earlier answers are trained as in the template's history, without their thoughts."""
        thoughtful = make_message("assistant", "<think>\na thought\n</think>\n\nsat on")
        assert encode("qwen3", [SYSTEM, CAT, thoughtful, DOG, LOG]) == [
            *CHATML_SYSTEM,
            *CHATML_CAT,
            *CHATML_SAT,
            *CHATML_DOG,
            *CHATML_PROMPT,
            *expect_trained(*EMPTY_THOUGHT, "the", " log", "<|im_end|>"),
            *expect_masked("\n"),
        ]

    def test_last_answer(self):
        assert encode("qwen3", [CAT, SAT, DOG, LOG], "last") == [
            *CHATML_CAT,
            *all_masked(CHATML_SAT),
            *CHATML_DOG,
            *CHATML_PROMPT,
            *expect_trained(*EMPTY_THOUGHT, "the", " log", "<|im_end|>"),
            *expect_masked("\n"),
        ]

    def test_tools(self):
        """The first answer is written without an empty thought, because it is not the last message."""
        call = {"type": "function", "function": {"name": "what", "arguments": '{"role":"cat"}'}}
        messages = [
            CAT,
            make_message("assistant", "", tool_calls=[call]),
            make_message("tool", "log"),
            make_message("tool", "mat"),
            SAT,
        ]
        encoded = encode("qwen3", messages, tools=[{"name": "what"}])
        trained = [text for text, flag in encoded if flag]
        assert "".join(trained) == (
            '<tool_call>\n{"name": "what", "arguments": {"role": "cat"}}\n</tool_call><|im_end|>'
            "<think>\n\n</think>\n\nsat on<|im_end|>"
        )
        at = next(index for index, (_, flag) in enumerate(encoded) if flag)
        assert encoded[at - 10 : at] == [*CHATML_CAT, *CHATML_PROMPT]
        at = max(index for index, (text, _) in enumerate(encoded) if text == "<tool_response>")
        assert encoded[at:] == [
            *expect_masked("<tool_response>", "\n", "mat", "\n", "</tool_response>", "<|im_end|>", "\n"),
            *CHATML_PROMPT,
            *expect_trained(*EMPTY_THOUGHT, "sat", " on", "<|im_end|>"),
            *expect_masked("\n"),
        ]

    def test_thoughts_on_the_way_to_an_earlier_answer(self):
        """They are written until the next user message. The prompt of the second answer no longer exists then."""
        call = {"function": {"name": "what", "arguments": {}}}
        messages = [
            CAT,
            make_message("assistant", "", reasoning_content="a thought", tool_calls=[call]),
            make_message("tool", "log"),
            SAT,
            DOG,
            LOG,
        ]
        assert "rewrites history (the prompt of message 4" in encode_refusal("qwen3", messages)
        assert encode("qwen3", messages, "last")[-8:] == [
            *expect_trained(*EMPTY_THOUGHT, "the", " log", "<|im_end|>"),
            *expect_masked("\n"),
        ]
        assert encode("qwen3", messages[:4]) == [
            *CHATML_CAT,
            *CHATML_PROMPT,
            *expect_trained("<think>", "\n", "a", " thought", "\n", "</think>", "\n\n", "<tool_call>", "\n"),
            *expect_trained('{"', "name", '":', ' "', "what", '",', ' "', "arguments", '":', " ", "{", "}", "}", "\n"),
            *expect_trained("</tool_call>", "<|im_end|>"),
            *expect_masked(
                "\n", "<|im_start|>", "user", "\n", "<tool_response>", "\n", "log", "\n", "</tool_response>"
            ),
            *expect_masked("<|im_end|>", "\n"),
            *CHATML_PROMPT,
            *expect_trained(*EMPTY_THOUGHT, "sat", " on", "<|im_end|>"),
            *expect_masked("\n"),
        ]

    def test_messages_of_tools_share_a_turn(self):
        """Only the last of them can be trained."""
        messages = [CAT, SAT, make_message("tool", "log", train=True), make_message("tool", "mat")]
        assert "rewrites history (an earlier turn of message 3" in encode_refusal("qwen3", messages)
