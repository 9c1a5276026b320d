"""If this fails, Guanaco's data differ from the paper's: answers are not the best, or conversations are torn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.data.row_formats import parse_rows
from qlora_dist.data.source_row import BadRow, MessagesRow


def node(text: str, *replies: dict[str, Any], by: str = "", **fields: Any) -> dict[str, Any]:
    """Return a message. The case of the text gives its role: QUESTION, answer."""
    role = by or ("prompter" if text.isupper() else "assistant")
    return {"message_id": f"id-{text}", "role": role, "text": text, "replies": list(replies)} | fields


def flat(root: dict[str, Any], tree: str | None = "tree", parent: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table, a message before its replies."""
    fields = {name: value for name, value in root.items() if name != "replies"} | {"parent_id": parent}
    yield fields | ({"message_tree_id": tree} if tree else {})
    for reply in root["replies"]:
        yield from flat(reply, tree, root["message_id"])


def read(*rows: dict[str, Any], format: str = "auto") -> list:
    return list(parse_rows(((f"line {number}", row) for number, row in enumerate(rows, start=1)), format, "so said"))


def texts(row: MessagesRow) -> list[str]:
    return [message["content"] for message in row.messages]


def nested(root: dict[str, Any]) -> MessagesRow | BadRow:
    (row,) = read({"message_tree_id": "tree", "tree_state": "ready_for_export", "prompt": root})
    return row


TREES = {
    "the best of three": (node("Q", node("b", rank=1), node("a", rank=0), node("c", rank=2)), ["Q", "a"]),
    "the best at each level": (
        node("Q", node("a", node("R", node("d", rank=1), node("e", rank=0))), node("b", node("S"), rank=0)),
        ["Q", "b"],
    ),
    "replies without a rank are last, the first of equals wins": (
        node("Q", node("a", rank=None), node("b"), node("c", rank=7), node("d", rank=7.0)),
        ["Q", "c"],
    ),
    "NaN, which pandas writes for null, is no rank": (
        node("Q", node("a", rank=float("nan")), node("b", rank=3), node("c", rank=float("nan"))),
        ["Q", "b"],
    ),
    "ended on the assistant's turn": (node("Q", node("a", node("R", node("b", node("S"))))), ["Q", "a", "R", "b"]),
    "deleted": (
        node("Q", node("a", rank=0, deleted=True), node("b", rank=1, deleted=False, review_result=True)),
        ["Q", "b"],
    ),
    "failed the review": (node("Q", node("a", rank=0, review_result=False), node("b", review_result=None)), ["Q", "b"]),
}


@pytest.mark.parametrize("name", TREES)
def test_the_conversation_of_a_tree(name):
    root, expected = TREES[name]
    row = nested(root)
    assert texts(row) == expected
    assert [message["role"] for message in row.messages] == ["user", "assistant"] * (len(expected) // 2)
    assert read(*flat(root)) == [row.__class__("line 1", row.messages)]
    assert read(*flat(root, tree=None)) == [row.__class__("line 1", row.messages)]
    assert read(*reversed(list(flat(root)))) == [row.__class__("line 1", row.messages)] or "equals" in name


@pytest.mark.parametrize(
    "root",
    [node("Q"), node("Q", deleted=True), node("Q", node("a", deleted=True)), node("Q", node("a"), review_result=False)],
)
def test_a_tree_without_an_answer_has_nothing_to_train(root):
    """It is not an error, because OASST1 has many such trees. Later stages count and drop these rows."""
    for row in (nested(root), *read(*flat(root))):
        assert [message["train"] for message in row.messages] == [False]


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        (3, "turn 1 is not a list of objects; write `replies` as the messages that follow"),
        (node("Q", replies="a"), "turn 2 is not a list of objects; write `replies` as the messages that follow"),
        (node("Q", replies=[3]), "turn 2 is not a list of objects; write `replies` as the messages that follow"),
        (node("Q", node("a", rank="0")), "turn 2: `rank` is a string; write a number or null"),
        (node("Q", node("a", deleted="False")), "turn 2: `deleted` is a string; write true, false or null"),
        (node("Q", node("a", review_result=1)), "turn 2: `review_result` is a number; write true, false or null"),
        (node("Q", node("a", by="wizard")), "turn 2 has the unknown role `wizard`; write prompter or assistant"),
        (node("Q", node("a", role=None)), "turn 2: `role` is null; write a string"),
        (node("Q", node("a") | {"text": None}), "turn 2: `text` is null; write a string"),
        (node("Q", node("a") | {"text": " "}), "turn 2: `text` is empty; fill it or take the row out"),
        (node("Q", node("a") | {"text": "\ud83d"}), "turn 2: `text` holds half of a surrogate pair; "),
    ],
)
def test_bad_trees(root, expected):
    row = nested(root)
    assert isinstance(row, BadRow) and row.location == "line 1"
    assert row.reason.startswith(expected)


def test_trees_one_after_another():
    first, second = node("Q", node("a")), node("R", node("b"), node("c", rank=0))
    for trees in (("1", "2"), (None, None)):
        rows = read(*flat(first, trees[0]), *flat(second, trees[1]))
        assert [(row.location, texts(row)) for row in rows] == [("line 1", ["Q", "a"]), ("line 3", ["R", "c"])]


def test_a_table_that_is_not_sorted_by_tree_is_noticed():
    first, second = list(flat(node("Q", node("a"), node("b")), "1")), list(flat(node("R", node("c")), "2"))
    rows = read(first[0], second[0], first[1], second[1])
    assert [row.location for row in rows if isinstance(row, BadRow)] == ["line 3", "line 4"]
    assert rows[2].reason == (
        "0 of the 1 adjacent messages of its tree have no `parent_id`, instead of one; "
        "sort the rows by `message_tree_id` and keep each tree whole"
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"message_id": 3}, "line 2: `message_id` is a number; write a string"),
        ({"message_id": "id-Q"}, "line 2: another message of the tree has this `message_id`; take one of them out"),
        ({"parent_id": ["id-Q"]}, "line 2: `parent_id` is a list; write a string"),
        ({"parent_id": None}, "2 of the 2 adjacent messages of its tree have no `parent_id`, instead of one"),
    ],
)
def test_bad_messages_of_the_table(change, expected):
    first, second = flat(node("Q", node("a")))
    (bad,) = read(first, second | change)
    assert isinstance(bad, BadRow) and bad.location == "line 1"
    assert bad.reason.startswith(expected)


def test_a_message_of_the_table_without_a_field():
    first, second = flat(node("Q", node("a")))
    del second["role"]
    bad, row = read(first, second)
    assert bad == BadRow("line 2", "the row has no `role` (the first row has it: line 1); add it or take the row out")
    assert row.messages[0]["train"] is False


def test_a_given_format_chooses_the_variant_of_an_incomplete_row():
    first, second = flat(node("Q", node("a")))
    del first["role"]
    bad, _ = read(first, second, format="oasst")
    assert bad.reason == "the row has no `role` (so said); add it or take the row out"


names = st.integers(0, 10**9).map(str)
trees = st.recursive(
    st.builds(lambda name, rank: node(name, rank=rank), names, st.none() | st.integers(0, 3)),
    lambda inner: st.builds(
        lambda name, rank, replies: node(name, *replies, rank=rank),
        names, st.none() | st.integers(0, 3), st.lists(inner, max_size=3),
    ),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(trees)
def test_both_variants_give_the_best_replies(root):
    def renamed(root: dict[str, Any], depth: int = 0, name: str = "0") -> dict[str, Any]:
        replies = [renamed(reply, depth + 1, f"{name}.{n}") for n, reply in enumerate(root["replies"])]
        role = "assistant" if depth % 2 else "prompter"
        return root | {"message_id": name, "text": name, "role": role, "replies": replies}

    root = renamed(root)
    row = nested(root)
    assert isinstance(row, MessagesRow)
    assert read(*flat(root)) == [row]
    if row.messages[-1].get("train") is False:
        assert not root["replies"]
        return
    level = [root]
    for message in row.messages:
        chosen = next(reply for reply in level if reply["text"] == message["content"])
        ranks = [reply["rank"] for reply in level if reply["rank"] is not None]
        assert chosen["rank"] == (min(ranks) if ranks else None)
        level = chosen["replies"]
    assert all(not reply["replies"] for reply in level) or row.messages[-1]["role"] == "assistant"
