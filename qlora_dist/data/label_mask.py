"""Spans of a text -> flags of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qlora_dist.data.chat_renderer import CharSpan

if TYPE_CHECKING:
    from tokenizers import Encoding


def loss_mask_from_spans(encoding: Encoding, spans: Sequence[CharSpan]) -> npt.NDArray[np.bool_]:
    """bool[tokens]: for every token, whether it overlaps one of the spans, which are in ascending order.

    A token that straddles an empty span is not in it.
    """
    flags = np.zeros(len(encoding), np.bool_)
    for start, end in spans:
        if start == end:
            continue
        # asked for single characters: the places of all tokens, as Python objects, would take longer than the rest
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        if first is None or last is None:  # a character that is in no token
            return _mask_from_offsets(encoding.offsets, spans)
        while (char_span := encoding.token_to_chars(last + 1)) is not None and char_span[0] < end:
            last += 1  # tokens that share a character, such as the bytes of an emoji
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
