"""OpenAssistant's conversation trees: of each, the conversation of the best-ranked replies.

So was Guanaco's data made (QLoRA, appendix B): "we select the top reply at each level in the conversation tree".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_dist.data.source_row import BadRow, MessagesRow
from qlora_dist.data.validate import InvalidRowError, RawRow, json_type_name, quote, require_nonempty_str, require_str

_ROLES = {"prompter": "user", "assistant": "assistant"}


def parse_oasst_tree(location: str, tree: dict[str, Any]) -> MessagesRow:
    """The best conversation of a tree, to the last turn of the assistant's.

    At each level that is the reply of the lowest `rank`, those without one last, among equals the first. Messages that
    were deleted or failed their review are left out with all that follows them. A tree that has no reply becomes a
    row with nothing to train.

    Raises:
        Unusable: the tree or a message on the way is not what it should be.
    """
    path: list[dict[str, Any]] = []
    level: Any = [tree["prompt"]]
    while level:
        where = f"turn {len(path) + 1}"
        if not isinstance(level, list) or not all(isinstance(node, dict) for node in level):
            raise InvalidRowError(f"{where} is no list of objects; write `replies` as the messages that follow")
        kept = [
            (_reply_rank(node, where), number) for number, node in enumerate(level) if not _is_excluded(node, where)
        ]
        if not kept:
            break
        path.append(level[min(kept)[1]])
        level = path[-1].get("replies")
    messages = [_message(node, f"turn {number}") for number, node in enumerate(path, start=1)]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return MessagesRow(location, messages or [{"role": "user", "content": "", "train": False}])


def _is_excluded(node: dict[str, Any], where: str) -> bool:
    for name in ("deleted", "review_result"):
        flag = node.get(name)
        if flag is not None and not isinstance(flag, bool):
            raise InvalidRowError(f"{where}: `{name}` is {json_type_name(flag)}; write true, false or null")
    return node.get("deleted") is True or node.get("review_result") is False


def _reply_rank(node: dict[str, Any], where: str) -> float:
    rank = node.get("rank")
    if rank is None or rank != rank:  # pandas writes NaN for null
        return float("inf")
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise InvalidRowError(f"{where}: `rank` is {json_type_name(rank)}; write a number or null")
    return rank


def _message(node: dict[str, Any], where: str) -> dict[str, str]:
    role = require_str(node.get("role"), f"{where}: `role`")
    if role not in _ROLES:
        raise InvalidRowError(f"{where} is by {quote(role)}, who is not known; write prompter or assistant")
    return {"role": _ROLES[role], "content": require_nonempty_str(node.get("text"), f"{where}: `text`")}


def assemble_oasst_trees(records: Iterator[RawRow | BadRow]) -> Iterator[RawRow | BadRow]:
    """The trees of the flat table, which has one row per message; each is at the place of its first row.

    The messages of a tree stand together, as they do in OASST1: only one tree is held at a time.
    """
    group: list[RawRow] = []
    for record in records:
        if isinstance(record, BadRow):
            yield record
            continue
        if group and _starts_new_tree(record[1], group[0][1]):
            yield _assemble_tree(group)
            group = []
        group.append(record)
    if group:
        yield _assemble_tree(group)


def _starts_new_tree(fields: dict[str, Any], first: dict[str, Any]) -> bool:
    if "message_tree_id" in first:
        return bool(fields.get("message_tree_id") != first["message_tree_id"])
    return not fields["parent_id"]


def _assemble_tree(group: list[RawRow]) -> RawRow | BadRow:
    place = group[0][0]
    replies: dict[str, list[dict[str, Any]]] = {}
    roots = []
    try:
        for where, fields in group:
            name = require_nonempty_str(fields["message_id"], f"{where}: `message_id`")
            if name in replies:
                raise InvalidRowError(
                    f"{where}: another message of the tree has this `message_id`; take one of them out"
                )
            replies[name] = []
        for where, fields in group:
            node = fields | {"replies": replies[fields["message_id"]]}
            parent = fields["parent_id"]
            if parent:
                replies.get(require_str(parent, f"{where}: `parent_id`"), []).append(node)  # else of one left out
            else:
                roots.append(node)
        if len(roots) != 1:
            raise InvalidRowError(
                f"of the {len(group)} messages of its tree that stand together here, {len(roots)} have no `parent_id`, "
                "not one; sort the rows by `message_tree_id` and keep each tree whole"
            )
    except InvalidRowError as error:
        return BadRow(place, str(error))
    return place, {"prompt": roots[0]}
