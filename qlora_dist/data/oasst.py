"""OpenAssistant's conversation trees, of which the conversation of the best-ranked replies is kept.

Guanaco's data were made this way (QLoRA, appendix B): "we select the top reply at each level in the conversation tree".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_dist.data.source_row import BadRow, MessagesRow
from qlora_dist.data.validate import InvalidRowError, RawRow, json_type_name, quote, require_nonempty_str, require_str

_OASST_ROLES = {"prompter": "user", "assistant": "assistant"}


def parse_oasst_tree(location: str, tree: dict[str, Any]) -> MessagesRow:
    """Return the best conversation of a tree, up to the last message of the assistant.

    At each level, the reply with the lowest `rank` is taken, and the first of equals. Replies without a `rank` are last
    in this order. Messages that were deleted or failed their review are dropped, with all replies to them. A tree
    without a reply becomes a row with nothing to train.
    """
    path: list[dict[str, Any]] = []
    level: Any = [tree["prompt"]]
    while level:
        where = f"turn {len(path) + 1}"
        if not isinstance(level, list) or not all(isinstance(node, dict) for node in level):
            raise InvalidRowError(f"{where} is not a list of objects; write `replies` as the messages that follow")
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
    if rank is None or rank != rank:  # pandas writes NaN for null.
        return float("inf")
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise InvalidRowError(f"{where}: `rank` is {json_type_name(rank)}; write a number or null")
    return rank


def _message(node: dict[str, Any], where: str) -> dict[str, str]:
    role = require_str(node.get("role"), f"{where}: `role`")
    if role not in _OASST_ROLES:
        raise InvalidRowError(f"{where} has the unknown role {quote(role)}; write prompter or assistant")
    return {"role": _OASST_ROLES[role], "content": require_nonempty_str(node.get("text"), f"{where}: `text`")}


def assemble_oasst_trees(records: Iterator[RawRow | BadRow]) -> Iterator[RawRow | BadRow]:
    """Yield the trees of the flat table, which has one row per message, at the location of their first row.

    The messages of a tree are adjacent, as in OASST1, so only one tree is in memory at a time.
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
    location = group[0][0]
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
                # The parent may have been dropped.
                replies.get(require_str(parent, f"{where}: `parent_id`"), []).append(node)
            else:
                roots.append(node)
        if len(roots) != 1:
            raise InvalidRowError(
                f"{len(roots)} of the {len(group)} adjacent messages of its tree have no `parent_id`, instead of one; "
                "sort the rows by `message_tree_id` and keep each tree whole"
            )
    except InvalidRowError as error:
        return BadRow(location, str(error))
    return location, {"prompt": roots[0]}
