"""If this fails, the loss mask is shifted against the tokens."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from qlora_dist.data.loss_mask import loss_mask_from_spans
from tests.helpers.published_tokenizers import make_tokenizer


def trimming(name: str) -> Any:
    """Return a tokenizer like GPT-2's, where spaces belong to a token but not to its offsets."""
    tokenizer = make_tokenizer(name)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


KINDS = {
    "bytes": functools.cache(functools.partial(make_tokenizer, "chatml")),
    "trimmed bytes": functools.cache(functools.partial(trimming, "chatml")),
    "sentencepiece": functools.cache(functools.partial(make_tokenizer, "gemma")),
    "prefixed sentencepiece": functools.cache(functools.partial(make_tokenizer, "mistral")),
}
TEXTS = st.lists(st.sampled_from(["the", " cat", "  ", "\n", "字", "🙂", "é", "<|im_end|>", "<bos>", "x", "�"])).map(
    "".join
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_equals_a_check_of_every_token(kind, data):
    """A token is inside if it shares a character with a span. A token without characters belongs to its neighbours."""
    text = data.draw(TEXTS)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    encoding = KINDS[kind]()(text, add_special_tokens=False).encodings[0]
    flags = loss_mask_from_spans(encoding, spans).tolist()
    assert len(flags) == len(encoding.offsets)
    for (first, last), flag in zip(encoding.offsets, flags, strict=True):
        inside = any(max(first, start) < min(last, end) for start, end in spans)
        assert flag == inside or (first == last and any(start <= first <= end for start, end in spans))
