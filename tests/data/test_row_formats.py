"""If this fails, a row becomes another conversation than it holds, or only half of it is trained."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_dist.data.row_encoder import EncodedSequence, RowEncoder
from qlora_dist.data.row_formats import ROW_FORMATS, parse_rows
from qlora_dist.data.source_row import BadRow, CompletionRow, MessagesRow, SourceRow, TextRow
from tests.helpers.published_tokenizers import make_tokenizer

HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SYSTEM = {"role": "system", "content": "be brief"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def row(format: str = "auto", **fields: Any) -> SourceRow:
    """Return the parsed row."""
    (result,) = parse_rows(iter([("here", fields)]), format, "so said")
    assert not isinstance(result, BadRow), result
    assert result.location == "here"
    return result


def messages(format: str = "auto", **fields: Any) -> list[dict[str, Any]]:
    result = row(format, **fields)
    assert isinstance(result, MessagesRow)
    return result.messages


def reason(format: str, **fields: Any) -> str:
    """Return the reason why a row is bad."""
    (result,) = parse_rows(iter([("here", fields)]), format, "so said")
    assert isinstance(result, BadRow) and result.location == "here"
    assert "; " in result.reason and result.reason.isprintable() and not result.reason.endswith(".")
    return result.reason


# --- which format -----------------------------------------------------------------------------------------------------

ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": HELLO},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    "alpaca": {"instruction": "hi", "input": "", "output": "hello"},
    "prompt-completion": {"prompt": "hi", "completion": "hello"},
    "oasst": {
        "message_tree_id": "1",
        "prompt": {"role": "prompter", "text": "hi", "replies": [{"role": "assistant", "text": "hello"}]},
    },
    "hh-rlhf": {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
    "flan": {"inputs": "hi", "targets": "hello"},
    "longform": {"input": "hi", "output": "hello"},
    "text": {"text": "hi"},
}


@pytest.mark.parametrize("format", ROWS)
def test_a_format_is_recognized_by_its_fields(format):
    expected = {
        "prompt-completion": CompletionRow("here", "hi", "hello"),
        "flan": CompletionRow("here", "hi", "hello"),
        "text": TextRow("here", "hi"),
    }.get(format, MessagesRow("here", HELLO))
    assert row("auto", **ROWS[format]) == row(format, **ROWS[format]) == expected
    assert row("auto", **ROWS[format], more=1) == expected


def test_every_format_is_known():
    assert {shape.name for shape in ROW_FORMATS} == set(ROWS)


@pytest.mark.parametrize(
    "formats", [("messages", "sharegpt"), ("sharegpt", "text"), ("alpaca", "text"), ("alpaca", "longform")]
)
def test_of_two_formats_the_first_is_taken(formats):
    first, second = formats
    assert row("auto", **(ROWS[second] | ROWS[first])) == row(first, **ROWS[first])


def test_the_first_row_decides_for_all():
    records = [("1", ROWS["text"]), ("2", ROWS["messages"] | ROWS["text"]), ("3", ROWS["messages"])]
    assert list(parse_rows(iter(records), "auto", "")) == [
        TextRow("1", "hi"),
        TextRow("2", "hi"),
        BadRow("3", "the row has no `text` (the first row has it: 1); add it or take the row out"),
    ]


def test_bad_rows_of_the_file_are_passed_on():
    bad = BadRow("1", "not valid JSON (); write")
    assert list(parse_rows(iter([bad, ("2", ROWS["text"]), bad]), "auto", "")) == [bad, TextRow("2", "hi"), bad]


# --- messages ---------------------------------------------------------------------------------------------------------


def test_other_fields_of_a_message_are_kept_and_nulls_are_not():
    given = [
        {"role": "user", "content": "a", "name": "Ada", "at": None, "tool_calls": None},
        {"role": "assistant", "content": "b", "reasoning_content": "c", "tool_calls": []},
    ]
    assert messages(messages=given) == [
        {"role": "user", "content": "a", "name": "Ada"},
        {"role": "assistant", "content": "b", "reasoning_content": "c"},
    ]


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": " b"}]  # LLaMA-Factory writes the latter.
    assert messages(messages=[{"role": "user", "content": parts}, HELLO[1]])[0] == {"role": "user", "content": "a b"}


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
        {"function": {"name": "add", "arguments": {"a": 1}}, "id": None},
        {"name": "add", "arguments": '{"a": 1}'},
    ],
)
def test_arguments_of_tool_calls_become_objects(call):
    given = [HELLO[0], {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "3"}]
    expected = [HELLO[0], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}]
    assert messages(messages=given) == expected
    del given[1]["content"]
    assert messages(messages=given) == expected
    given[1]["content"] = ""
    expected[1] = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert messages(messages=given) == expected


def test_lists_as_json_text():
    """CSV has only text. In Parquet, JSON text keeps objects with different fields apart."""
    given = [HELLO[0], {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])}]
    expected = [HELLO[0], {"role": "assistant", "tool_calls": [CALL]}]
    assert messages(messages=given) == messages(messages=json.dumps(given)) == expected
    assert messages(messages=[HELLO[0] | {"tool_calls": "null"}, HELLO[1] | {"tool_calls": ""}]) == HELLO
    assert messages(conversations=json.dumps(ROWS["sharegpt"]["conversations"])) == HELLO


def test_a_file_whose_rows_lie_under_a_name():
    """SQuAD's `data` is such a field. It is not part of any format, so renaming it would be wrong."""
    for name in ("data", "train"):
        bad = next(parse_rows(iter([("here", {"version": 1, name: [{"messages": HELLO}]})]), "auto", ""))
        assert isinstance(bad, BadRow)
        assert bad.reason == (
            f"it is not a row, but its field `{name}` holds rows; write that list alone, as a file of its own"
        )


def test_ids_of_calls_for_templates_that_ask_for_them():
    """ShareGPT has no field for ids, and Mistral's template requires nine letters and digits."""
    call = json.dumps({"name": "what", "arguments": {}})
    given = [
        {"from": "human", "value": "the cat"},
        {"from": "function_call", "value": f"[{call}, {call}]"},
        {"from": "observation", "value": "1"},
        {"from": "observation", "value": "2"},
        {"from": "function_call", "value": call},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "sat"},
    ]
    made = row(conversations=given)
    assert isinstance(made, MessagesRow)
    ids = [call["id"] for message in made.messages for call in message.get("tool_calls", ())]
    assert ids == [message["tool_call_id"] for message in made.messages if message["role"] == "tool"]
    assert len(set(ids)) == 3 and all(len(name) == 9 and name.isalnum() for name in ids)
    (encoded,) = RowEncoder(make_tokenizer("mistral-nemo"), "assistant").encode([made])
    assert isinstance(encoded, EncodedSequence), encoded


@pytest.mark.parametrize("arguments", ["", None, {}, "{}"])
def test_no_arguments(arguments):
    call = {"id": "x", "type": "function", "function": {"name": "now", "arguments": arguments}}
    (made,) = messages(messages=[{"role": "assistant", "tool_calls": [call]}])
    assert made["tool_calls"] == [{"id": "x", "type": "function", "function": {"name": "now", "arguments": {}}}]


@pytest.mark.parametrize(("given", "expected"), [(None, None), ("", None), ("[]", None), ([], None), ([TOOL], [TOOL])])
def test_tools(given, expected):
    assert row(messages=HELLO, tools=given).tools == expected
    assert row(messages=HELLO, tools=json.dumps([TOOL])).tools == [TOOL]
    assert row(**ROWS["sharegpt"], tools=json.dumps([TOOL])).tools == [TOOL]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"train": False}, {"train": False}),
        ({"train": True}, {"train": True}),
        ({"weight": 0}, {"train": False}),
        ({"weight": 1.0}, {"train": True}),
        ({"weight": 0, "train": True}, {"train": True}),
        ({"weight": None, "train": None}, {}),
    ],
)
def test_train_and_weight_of_a_message(given, expected):
    assert messages(messages=[HELLO[0], HELLO[1] | given])[1] == HELLO[1] | expected


def test_an_answer_that_is_not_trained_may_be_empty():
    answers = [{"role": "assistant", "content": "", "train": False}, {"role": "assistant", "content": " ", "weight": 0}]
    assert [message["content"] for message in messages(messages=answers)] == ["", " "]


def test_a_user_and_a_system_message_may_be_empty():
    given = [{"role": "system", "content": ""}, {"role": "user", "content": ""}, HELLO[1]]
    assert messages(messages=given) == given


DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hi", "`messages` is a string; write a list of objects with `role` and `content`"),
        (None, "`messages` is null; write a list of objects with `role` and `content`"),
        ([], "`messages` is empty; add a message or take the row out"),
        (["hi"], "message 1 is a string; write an object with `role` and `content`"),
        ([HELLO[0], {"content": "x"}], "message 2 has no `role`; give each message a `role` and a `content`"),
        ([{"from": "gpt", "value": "x"}], "message 1 has no `role`; give each message a `role` and a `content`"),
        ([{"role": "assistant"}], "message 1 has no `content`; give each message a `role` and a `content`"),
        ([{"role": "user", "content": None}], "message 1: `content` is null; write a string"),
        ([{"role": None, "content": "x"}], "message 1: `role` is null; write a string"),
        ([{"role": 1, "content": "x"}], "message 1: `role` is a number; write a string"),
        ([{"role": "user", "content": 1}], "message 1: `content` is a number; write a string"),
        ([{"role": "user", "content": "a\ud83d"}], "message 1: `content` holds half of a surrogate pair; write the "),
        ([{"role": "\ud83d", "content": "a"}], "message 1: `role` holds half of a surrogate pair; write the whole "),
        ([HELLO[0] | {"name": "\ud83d"}], "message 1: `name` holds half of a surrogate pair; write the whole char"),
        ([HELLO[0] | {"\ud83d": 1}], "message 1: a name holds half of a surrogate pair; write the whole character"),
        ([HELLO[0] | {"more": DEEP}], "message 1: `more` is nested more than 100 levels deep; flatten it"),
        (
            [HELLO[0], {"role": "assistant", "content": " \n"}],
            "message 2: the assistant's message is empty; give it `cont",
        ),
        (
            [{"role": "assistant", "content": [], "tool_calls": []}],
            "message 1: the assistant's message is empty; give it ",
        ),
        (
            [{"role": "assistant", "content": "", "train": True}],
            "message 1: the assistant's message is empty; give it `c",
        ),
        ([HELLO[1] | {"train": 1}], "message 1: `train` is a number; write true or false"),
        ([HELLO[1] | {"weight": 0.5}], "message 1: `weight` is neither 0 nor 1; write one of them"),
        ([HELLO[1] | {"weight": 2}], "message 1: `weight` is neither 0 nor 1; write one of them"),
        ([HELLO[1] | {"weight": True}], "message 1: `weight` is a boolean; write 0 or 1"),
        ([HELLO[1] | {"weight": "0"}], "message 1: `weight` is a string; write 0 or 1"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}],
            "message 1: `content`: part 2 is of the type `image_url`; only text is trained; take out the rows with ",
        ),
        (
            [{"role": "user", "content": [{"type": "thought", "text": "a"}]}],
            "message 1: `content`: part 1 is of the type `thought`; only parts of "
            '{"type": "text", "text": ...} are read',
        ),
        (
            [{"role": "user", "content": ["a"]}],
            "message 1: `content`: part 1 is not an object with a `type`; only parts ",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1: `content`: part 1 has no `text`; write {"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "message 1: `content`: part 1: `text` is nu"),
    ],
)
def test_bad_messages(given, expected):
    assert reason("messages", messages=given).startswith(expected)
    if isinstance(given, list) and given:
        assert reason("prompt-completion", prompt=HELLO[:1], completion=given).startswith(f"`completion`: {expected}")


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ("add", "message 2: `tool_calls` is a string; write a list of objects with `function`"),
        (["add"], "message 2: tool call 1 is a string; write an object with `function`"),
        ([CALL, {}], "message 2: tool call 2: `name` is null; write a string"),
        ([{"function": "add"}], "message 2: tool call 1: `function` is a string; write an object with `name` and `arg"),
        ([{"name": ""}], "message 2: tool call 1: `name` is empty; fill it or take the row out"),
        ([{"name": "f", "arguments": "{"}], "message 2: tool call 1: `arguments` is not valid JSON (Expecting prope"),
        ([{"name": "f", "arguments": "[1]"}], "message 2: tool call 1: `arguments` is a list; write an object, or on"),
        ([{"name": "f", "arguments": 3}], "message 2: tool call 1: `arguments` is a number; write an object, or one "),
        ([{"name": "f", "arguments": '"a"'}], "message 2: tool call 1: `arguments` is a string; write an object, or"),
        ([{"name": "f", "arguments": '{"a": "\\ud83d"}'}], "message 2: tool call 1 holds half of a surrogate pair; "),
        ([{"name": "f", "arguments": {"\ud83d": 1}}], "message 2: tool call 1 holds half of a surrogate pair; write "),
        ([{"name": "f", "arguments": {"a": DEEP}}], "message 2: tool call 1 is nested more than 100 levels deep; fla"),
        ([{"name": "f", "arguments": {"a": float("nan")}}], "message 2: tool call 1 cannot be written as JSON (Out o"),
    ],
)
def test_bad_tool_calls(calls, expected):
    given = [HELLO[0], {"role": "assistant", "content": None, "tool_calls": calls}]
    assert reason("messages", messages=given).startswith(expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("{", "`tools` is not valid JSON (Expecting property name enclosed in double quotes at character 2); correct"),
        ({}, "`tools` is an object; write a list of objects"),
        (False, "`tools` is a boolean; write a list of objects"),
        ('"a"', "`tools` is a string; write a list of objects"),
        (["a"], "`tools`: item 1 is a string; write an object"),
        ([TOOL, {"x": "\ud83d"}], "`tools`: item 2 holds half of a surrogate pair; write the whole character"),
    ],
)
def test_bad_tools(given, expected):
    assert reason("messages", messages=HELLO, tools=given).startswith(expected)
    assert reason("sharegpt", **ROWS["sharegpt"], tools=given).startswith(expected)


# --- sharegpt ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("system", "system"), ("human", "user"), ("user", "user"), ("gpt", "assistant"), ("assistant", "assistant"),
        ("chatgpt", "assistant"), ("tool", "tool"), ("observation", "tool"), ("function_response", "tool"),
    ],
)  # fmt: skip
def test_speakers(speaker, role):
    assert messages(conversations=[{"from": speaker, "value": "hi"}]) == [{"role": role, "content": "hi"}]
    assert messages(conversations=[{"role": speaker, "content": "hi"}]) == [{"role": role, "content": "hi"}]


def test_sharegpt_weights_and_other_fields():
    given = [{"from": "human", "value": "hi", "weight": None}, {"from": "gpt", "value": "", "weight": 0, "id": "x"}]
    assert messages(conversations=given) == [HELLO[0], {"role": "assistant", "content": "", "train": False, "id": "x"}]


@pytest.mark.parametrize(
    "value", ['{"name": "add", "arguments": {"a": 1}}', CALL, '{"name": "add", "arguments": "{\\"a\\": 1}"}']
)
def test_function_calls(value):
    given = [*ROWS["sharegpt"]["conversations"], {"from": "function_call", "value": value}]
    assert messages(conversations=given) == [*HELLO, {"role": "assistant", "tool_calls": [CALL | {"id": "call00001"}]}]


def test_function_calls_at_once():
    given = [{"from": "function_call", "value": json.dumps([CALL, CALL])}]
    calls = [CALL | {"id": "call00001"}, CALL | {"id": "call00002"}]
    assert messages(conversations=given) == [{"role": "assistant", "tool_calls": calls}]


@pytest.mark.parametrize("format", ["sharegpt", "alpaca"])
def test_system_beside_the_conversation(format):
    assert messages(**ROWS[format], system="be brief") == [SYSTEM, *HELLO]
    assert messages(**ROWS[format], system=None) == messages(**ROWS[format], system="") == HELLO
    assert reason(format, **ROWS[format], system=3) == "`system` is a number; write a string"


def test_system_beside_and_within_the_conversation():
    given = [{"from": "system", "value": "be brief"}]
    assert messages(conversations=given, system="be brief") == [SYSTEM]
    assert reason("sharegpt", conversations=given, system="be wordy") == (
        "the row has a `system`, and its first message is another; take one of them out"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hi", "`conversations` is a string; write a list of objects with `from` and `value`"),
        ([], "`conversations` is empty; add a message or take the row out"),
        ([3], "message 1 is a number; write an object with `from` and `value`"),
        ([{"value": "a"}], "message 1 has no `from`; give each message a `from` and a `value`"),
        ([{"from": "human"}], "message 1 has no `value`; give each message a `from` and a `value`"),
        ([{"role": "user"}], "message 1 has no `content`; give each message a `role` and a `content`"),
        ([{"from": None, "value": "a"}], "message 1: `from` is null; write a string"),
        ([{"from": ["human"], "value": "a"}], "message 1: `from` is a list; write a string"),
        ([{"from": "human", "value": None}], "message 1: `content` is null; write a string"),
        ([{"from": "human", "value": "\ud83d"}], "message 1: `content` holds half of a surrogate pair; write the w"),
        (
            [{"from": "gpt", "value": ""}],
            "message 1: the assistant's message is empty; give it `content`, or `train`: fa",
        ),
        (
            [{"from": "bi\nng", "value": "a"}],
            "message 1 is from the unknown speaker `bi\\nng`; write one of system, human, user, gpt, assistant, ",
        ),
        ([{"role": "wizard", "content": "a"}], "message 1 is from the unknown speaker `wizard`; write one of system, "),
        ([{"from": "function_call", "value": "add(1)"}], "message 1: the call is not valid JSON (Expecting value at"),
        ([{"from": "function_call", "value": "3"}], "message 1: the call is a number; write an object with `function`"),
        ([{"from": "function_call", "value": "[]"}], "message 1: `content` is null; write a string"),
    ],
)
def test_bad_sharegpt(given, expected):
    assert reason("sharegpt", conversations=given).startswith(expected)


# --- the others -------------------------------------------------------------------------------------------------------


def test_alpaca():
    assert messages(instruction="Add.", input="1, 2", output="3")[0]["content"] == "Add.\n\n1, 2"
    assert messages(instruction="", input="1 + 2?", output="3")[0]["content"] == "1 + 2?"
    for nothing in ({}, {"input": None}, {"input": " "}):
        assert messages(instruction="hi", output="hello", history=None, **nothing) == HELLO
    history = [["hi", "hello"], ["hi", "hello"]]
    assert messages(instruction="hi", output="hello", history=history, system="be brief") == [SYSTEM, *HELLO * 3]


@pytest.mark.parametrize(
    ("format", "fields", "expected"),
    [
        ("alpaca", {"instruction": None}, "`instruction` is null; write a string"),
        ("alpaca", {"instruction": ""}, "`instruction` is empty; fill it or take the row out"),
        ("alpaca", {"input": 3}, "`input` is a number; write a string"),
        ("alpaca", {"output": ""}, "`output` is empty; fill it or take the row out"),
        ("alpaca", {"output": ["a", "b"]}, "`output` is a list; write a string"),
        ("alpaca", {"history": "a"}, "`history` is a string; write a list of pairs of question and answer"),
        ("alpaca", {"history": [["a"]]}, "`history`: item 1 is not a pair; write a list of question and answer"),
        ("alpaca", {"history": [["a", ""]]}, "`history`: answer 1 is empty; fill it or take the row out"),
        ("alpaca", {"history": [[1, "a"]]}, "`history`: question 1 is a number; write a string"),
        ("prompt-completion", {"completion": ""}, "`completion` is empty; fill it or take the row out"),
        ("prompt-completion", {"completion": HELLO}, "`completion` is a list; write a string"),
        ("prompt-completion", {"prompt": HELLO}, "`prompt` is a list; write a string"),
        ("prompt-completion", {"prompt": [], "completion": HELLO}, "`prompt` is empty; add a message or take the row"),
        ("flan", {"inputs": None}, "`inputs` is null; write a string"),
        ("flan", {"targets": " "}, "`targets` is empty; fill it or take the row out"),
        ("longform", {"output": ""}, "`output` is empty; fill it or take the row out"),
        ("longform", {"input": []}, "`input` is a list; write a string"),
        ("text", {"text": "a\udc00"}, "`text` holds half of a surrogate pair; write the whole character"),
        ("hh-rlhf", {"chosen": 3}, "`chosen` is a number; write a string"),
        ("hh-rlhf", {"chosen": "hello"}, "`chosen` does not start with a turn; write "),
        ("hh-rlhf", {"chosen": "well\n\nHuman: hi\n\nAssistant: a"}, "`chosen` does not start with a turn; write "),
        ("hh-rlhf", {"chosen": "\n\nHuman: hi\n\nAssistant:"}, "`chosen`: turn 2 is empty; fill it or take the row"),
    ],
)
def test_bad_values(format, fields, expected):
    assert reason(format, **(ROWS[format] | fields)).startswith(expected)


@pytest.mark.parametrize("format", ["alpaca", "prompt-completion", "flan", "longform", "hh-rlhf", "text", "sharegpt"])
def test_a_field_that_is_missing(format):
    name = next(shape.required_fields[-1] for shape in ROW_FORMATS if shape.name == format)
    fields = {key: value for key, value in ROWS[format].items() if key != name}
    assert reason(format, **fields) == f"the row has no `{name}` (so said); add it or take the row out"


def test_a_prompt_may_be_empty():
    assert row(prompt="", completion="a") == CompletionRow("here", "", "a")


def test_of_a_prompt_and_a_completion_of_messages_only_the_completion_is_trained():
    """TRL does the same. A message's own `train` wins."""
    empty = {"role": "assistant", "content": ""}
    prompt, completion = [SYSTEM, HELLO[0], empty, HELLO[0]], [HELLO[1], HELLO[1] | {"weight": 0}]
    assert row(prompt=prompt, completion=completion, tools=[TOOL]) == MessagesRow(
        "here",
        [*(message | {"train": False} for message in prompt), HELLO[1] | {"train": True}, HELLO[1] | {"train": False}],
        [TOOL],
    )


def test_hh_rlhf_of_several_turns():
    chosen = "\n\nHuman: one\n\ntwo: Assistant: x\n\nAssistant: three\n\nHuman: \n\nAssistant:four"
    assert messages(chosen=chosen) == [
        {"role": "user", "content": "one\n\ntwo: Assistant: x"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "four"},
    ]


@pytest.mark.parametrize("field", ["images", "image", "videos", "audios"])
@pytest.mark.parametrize("format", ["messages", "sharegpt", "alpaca"])
def test_a_row_with_more_than_text_is_refused(format, field):
    expected = f"the row has `{field}`; only text is trained; take out the rows with images, videos or sounds"
    assert reason(format, **ROWS[format], **{field: ["cat.png"]}) == expected
    (row,) = parse_rows(iter([("here", {**ROWS[format], field: []})]), format, "so said")
    assert not isinstance(row, BadRow)
