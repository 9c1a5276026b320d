"""If this fails, a field that controls training is ignored, or a row of preference data is trained as a good answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_dist.data.row_encoder import EncodedSequence, RowEncoder
from qlora_dist.data.row_fields import UnreadFields
from qlora_dist.data.row_formats import parse_rows
from qlora_dist.data.source_row import BadRow, MessagesRow, SourceRow
from tests.helpers.published_tokenizers import make_tokenizer

HI, HELLO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "be brief"}
CONVERSATION = [HI, HELLO, HI, HELLO]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
ASKING: list[dict[str, Any]] = [
    {"messages": CONVERSATION},
    {"conversations": SHAREGPT},
    {"instruction": "hi", "output": "hello"},
    {"prompt": "hi", "completion": "hello"},
    {"prompt": [HI], "completion": [HELLO]},
]


def row(**fields: Any) -> SourceRow | BadRow:
    (result,) = parse_rows(iter([("1", fields)]), "auto", "")
    return result


def flags(**fields: Any) -> list[bool | None]:
    """Return each message's `train`."""
    result = row(**fields)
    assert isinstance(result, MessagesRow), result
    return [message.get("train") for message in result.messages]


def reason(**fields: Any) -> str:
    result = row(**fields)
    assert isinstance(result, BadRow), result
    assert "; " in result.reason and not result.reason.endswith(".")
    return result.reason


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loss_weight", "loss", "training"])
@pytest.mark.parametrize(("value", "expected"), [(0, False), (0.0, False), (False, False), (1.0, True), (True, True)])
def test_other_names_of_train(name, value, expected):
    """They are used by LLaMA-Factory, ms-swift and axolotl."""
    assert flags(messages=[HI, HELLO | {name: value}, HI, HELLO]) == [None, expected, None, None]
    assert flags(conversations=[SHAREGPT[0], SHAREGPT[1] | {name: value}]) == [None, expected]
    assert flags(messages=[HI, HELLO | {name: value, "train": not expected}]) == [None, not expected]
    assert flags(messages=[HI, HELLO | {name: None}]) == [None, None]
    result = row(messages=[HI, HELLO | {name: value}])
    assert isinstance(result, MessagesRow) and name not in result.messages[1]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"loss_weight": 0.5}, "message 2: `loss_weight` is neither 0 nor 1; write one of them"),
        ({"loss": "no"}, "message 2: `loss` is a string; write true or false"),
        ({"loss": True, "training": False}, "message 2: `loss`, `training` contradict each other; keep one of them"),
        ({"mask": True}, "message 2 has a `mask`, which is not read; write `train`"),
        ({"train_detail": []}, "message 2 has a `train_detail`, which is not read; write `train`"),
        ({"loss_scale": 2}, "message 2 has a `loss_scale`, which is not read; write `train`"),
    ],
)
def test_unsupported_masks(fields, expected):
    assert reason(messages=[HI, HELLO | fields]).startswith(expected)


@pytest.mark.parametrize("fields", [{"mask": [0, 1]}, {"masked": "yes"}, {"weight": 0}, {"loss_weight": 0}])
def test_masks_of_a_whole_row_are_refused(fields):
    assert "which is read in messages only" in reason(messages=[HI, HELLO], **fields)


def test_a_call_in_the_old_form_is_not_lost():
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    for content in (None, "calling"):
        (result,) = RowEncoder(make_tokenizer("qwen3"), "assistant").encode(
            [row(messages=[HI, call | {"content": content}])]
        )
        assert isinstance(result, BadRow)
        assert result.reason == (
            "the row has a `function_call`, which the chat template does not write; write it as `tool_calls`"
        )


# --- rows -------------------------------------------------------------------------------------------------------------


def test_loss_mask_of_a_row():
    """LLaMA-Factory writes one number per message, where 0 masks the message."""
    assert flags(messages=CONVERSATION, loss_mask=[0, 0, 0, 1]) == [False, False, False, None]
    assert flags(messages=CONVERSATION, loss_mask=[1, False, 1, True]) == [None, False, None, None]
    assert flags(conversations=SHAREGPT * 2, loss_mask="[0, 0, 0, 1]") == [False, False, False, None]
    assert flags(messages=[SYSTEM, *CONVERSATION], loss_mask=[1, 0, 1, 1]) == [None, None, False, None, None]
    assert flags(messages=CONVERSATION, system="be brief", loss_mask=[1, 0, 1, 1]) == [None, None, False, None, None]
    assert flags(instruction="hi", output="hello", history=[["hi", "hello"]], loss_mask=[0, 0, 1, 1]) == [
        False, False, None, None
    ]  # fmt: skip
    assert flags(messages=CONVERSATION, loss_mask=None) == [None] * 4


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([0, 1], "`loss_mask` has 2 items for 4 messages; write one for each message"),
        ([0, 1, 0, 0.5], "`loss_mask` is not a list of 0 and 1; write one of them for each message"),
        (1, "`loss_mask` is not a list of 0 and 1; "),
        ("[0", "`loss_mask` is not valid JSON ("),
    ],
)
def test_invalid_loss_masks(mask, expected):
    assert reason(messages=CONVERSATION, loss_mask=mask).startswith(expected)
    assert reason(prompt="hi", completion="hello", loss_mask=[0, 1]).startswith(
        "the row has a `loss_mask`, but is not a conversation; "
    )


@pytest.mark.parametrize("fields", ASKING)
@pytest.mark.parametrize("label", [True, False, "True", "false"])
def test_preference_data_are_refused(fields, label):
    """In the KTO data of TRL and ms-swift, a row with `label` false is an answer to avoid."""
    assert reason(**fields, label=label) == (
        f"`label` is {str(label).lower()}, so the row is preference data (KTO), which is not trained; keep the rows of "
        "good answers and take `label` out of them"
    )


def test_labels_of_other_data():
    for label in (3, "positive", None):
        assert not isinstance(row(prompt="hi", completion="hello", label=label), BadRow)
    assert not isinstance(row(text="hi", label=False), BadRow)


def test_preferences_in_lists():
    assert reason(prompt=[HI], chosen=[HELLO], rejected=[HELLO]) == (
        "`chosen` is a list, so the row is preference data, of which only HH-RLHF's texts are read; write the "
        "conversation that ends with the chosen answer as `messages`"
    )


@pytest.mark.parametrize("fields", ASKING)
@pytest.mark.parametrize(
    ("name", "value"), [("loss_weight", 0.5), ("loss", False), ("train", False), ("completion_mask", [0, 1])]
)
def test_masks_of_rows_that_are_not_read(fields, name, value):
    assert reason(**fields, **{name: value}).startswith(f"the row has a `{name}`, which is read in messages only; ")
    assert not isinstance(row(**fields, **{name: True}), BadRow)
    assert not isinstance(row(text="a", **{name: value}), BadRow)


def test_functions_are_tools():
    functions = [{"name": "f", "parameters": {}}]
    assert reason(messages=CONVERSATION, functions=functions).startswith(
        "the row has `functions`, which are not read; "
    )


def test_system_beside_messages():
    system = "be brief"
    result = row(messages=CONVERSATION, system=system)
    assert isinstance(result, MessagesRow) and result.messages == [SYSTEM, *CONVERSATION]
    assert flags(prompt=[HI], completion=[HELLO], system=system) == [False, False, True]
    assert row(messages=[SYSTEM, *CONVERSATION], system=system) == result
    assert "its first message is another" in reason(messages=[SYSTEM, *CONVERSATION], system="be wordy")
    assert reason(prompt="hi", completion="hello", system=system) == (
        "the row has a `system`, and its prompt is a text; write it into the prompt"
    )
    assert not isinstance(row(prompt="hi", completion="hello", system=" "), BadRow)


# --- variables of the template ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_text", [False, True])
def test_variables_of_the_template(as_text):
    """The tokens equal the result of `apply_chat_template` with the same variables."""
    tokenizer = make_tokenizer("qwen3")
    tokenizer.chat_template = "{% if shout %}the mat {% endif %}" + tokenizer.chat_template
    variables = {"shout": True, "enable_thinking": False}
    given = json.dumps(variables) if as_text else variables
    rows = [row(messages=CONVERSATION[:2], chat_template_kwargs=value) for value in (given, None)]
    with_them, without = RowEncoder(tokenizer, "assistant").encode(rows)
    assert isinstance(with_them, EncodedSequence) and isinstance(without, EncodedSequence)
    assert with_them.tokens.tolist() == tokenizer.apply_chat_template(CONVERSATION[:2], **variables)["input_ids"]
    assert without.tokens.tolist() == tokenizer.apply_chat_template(CONVERSATION[:2])["input_ids"]
    # Qwen 3's prompt then has an empty thought, which is not trained.
    trained = [tokenizer.decode(item.tokens[item.loss_mask]) for item in (with_them, without)]
    assert trained == ["hello<|im_end|>", "<think>\n\n</think>\n\nhello<|im_end|>"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["a"], "`chat_template_kwargs` is a list; write an object"),
        ("{", "`chat_template_kwargs` is not valid JSON ("),
        ({"tools": []}, "`chat_template_kwargs` holds `tools`, which comes from the row itself; take it out"),
    ],
)
def test_invalid_variables(value, expected):
    assert reason(messages=CONVERSATION, chat_template_kwargs=value).startswith(expected)
    assert "but is not a conversation; " in reason(prompt="a", completion="b", chat_template_kwargs={"a": 1})


# --- what is ignored --------------------------------------------------------------------------------------------------


def test_ignored_fields_are_named():
    names = UnreadFields()
    messages = [HI | {"name": "Ada", "mood": "good"}, HELLO]
    records = [
        ("1", {"messages": messages, "id": 1, "tools": None, "x": None}),
        ("2", {"messages": messages, "url": "a", "chat_template_kwargs": {"enable_thinking": True, "y": 1}}),
    ]
    assert not any(isinstance(result, BadRow) for result in parse_rows(iter(records), "auto", "", names))
    template = "{{ message.name }}\nmood_of {{ enable_thinking }}"
    assert names.ignored_by(template) == ["`id`", "`url`", "`mood` of messages", "`y` of chat_template_kwargs"]
    assert names.ignored_by({"default": "mood", "tool_use": template}) == [
        "`id`",
        "`url`",
        "`y` of chat_template_kwargs",
    ]
    assert "`name` of messages" in names.ignored_by(None)
