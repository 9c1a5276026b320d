"""The loss mask: which messages of a conversation are trained, and which tokens of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from qlora_dist.data.chat_renderer import CharSpan
from qlora_dist.data.source_row import Message

if TYPE_CHECKING:
    from tokenizers import Encoding

MaskMode = Literal["assistant", "last", "all"]


def trained_messages(messages: list[Message], mask: MaskMode) -> list[bool]:
    """Return whether each message is trained. A message's own `train` takes precedence over `data.mask`."""
    if mask == "all":
        flags = [True] * len(messages)
    else:
        flags = [message["role"] == "assistant" for message in messages]
        if mask == "last" and True in flags:
            last = len(flags) - 1 - flags[::-1].index(True)
            flags = [index == last for index in range(len(flags))]
    train_flags = [message.get("train") for message in messages]
    return [flag if train is None else train for flag, train in zip(flags, train_flags, strict=True)]


def loss_mask_from_spans(encoding: Encoding, spans: Sequence[CharSpan]) -> npt.NDArray[np.bool_]:
    """Return bool[tokens]: whether each token overlaps one of the spans, which are in ascending order.

    A token around an empty span does not overlap it.
    """
    flags = np.zeros(len(encoding), np.bool_)
    for start, end in spans:
        if start == end:
            continue
        # Single characters are looked up, because a Python list of all offsets would take longer than everything else.
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        if first is None or last is None:  # The character is in no token.
            return _mask_from_offsets(encoding.offsets, spans)
        while (char_span := encoding.token_to_chars(last + 1)) is not None and char_span[0] < end:
            last += 1  # Tokens may share a character, such as the bytes of an emoji.
        flags[first : last + 1] = True
    return flags


def _mask_from_offsets(offsets: Sequence[CharSpan], spans: Sequence[CharSpan]) -> npt.NDArray[np.bool_]:
    flags = np.zeros(len(offsets), np.bool_)
    position = 0
    for start, end in spans:
        if start == end:
            continue
        while position < len(offsets) and offsets[position][1] <= start:
            position += 1
        while position < len(offsets) and offsets[position][0] < end:
            flags[position] = True
            position += 1
    return flags
