"""If this fails, the fast path tokenizes or masks differently from transformers and its offsets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors

from qlora_dist.data.text_encoder import EncodedSequence, MaskedText, TextEncoder, token_byte_lengths
from tests.helpers.published_tokenizers import make_tokenizer


def plain_tokenizer() -> Any:
    return make_tokenizer("chatml")


def nfc_tokenizer() -> Any:
    """Return a tokenizer like Qwen's, where a letter and an accent become one, shorter character."""
    tokenizer = make_tokenizer("qwen3")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()])
    return tokenizer


def stripping_tokenizer() -> Any:
    """Return a tokenizer with added tokens that absorb the white space beside them."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.add_tokens([AddedToken("<x>", lstrip=True, rstrip=True), AddedToken("<y>", normalized=True)])
    return tokenizer


def tokenizer_without_bytes(unknown: str | None) -> Any:
    tokenizer = make_tokenizer("chatml")
    rules = tokenizer.backend_tokenizer.to_str()
    for letter in ("å", "Ń", "ð"):  # bytes 0xE5, 0xAD and 0xF0
        rules = rules.replace(f'"{letter}":', f'"unused {ord(letter)}":')
    if unknown:
        rules = rules.replace('"unk_token":null', f'"unk_token":"{unknown}"')
    changed = type(tokenizer)(tokenizer_object=Tokenizer.from_str(rules), eos_token="<|im_end|>")
    assert len(changed("字🙂")["input_ids"]) < 7 or unknown
    return changed


def bos_tokenizer() -> Any:
    """Return a tokenizer that writes a token before every text."""
    tokenizer = make_tokenizer("llama-3")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return tokenizer


BYTE_LEVEL: dict[str, Callable[[], Any]] = {
    "plain": plain_tokenizer,
    "composing": nfc_tokenizer,
    "swallowing": stripping_tokenizer,
    "without some bytes": functools.partial(tokenizer_without_bytes, None),
    "unknown bytes": functools.partial(tokenizer_without_bytes, "<|endoftext|>"),
    "beginning": bos_tokenizer,
}
OTHERS = {"sentencepiece": functools.partial(make_tokenizer, "gemma")}


@functools.cache
def encoder(kind: str) -> TextEncoder:
    return TextEncoder({**BYTE_LEVEL, **OTHERS}[kind]())


PARTS = [
    "the",
    " cat",
    "  ",
    "\n",
    "字",
    "🙂",
    "é",
    "e\u0301",
    "\u1100\u1161",
    "<x>",
    " <y> ",
    "<|im_end|>",
    "<|endoftext|>",
]


@st.composite
def texts(draw: Any) -> list[MaskedText]:
    drawn = []
    for _ in range(draw(st.integers(1, 4))):
        text = draw(st.lists(st.sampled_from(PARTS), max_size=8).map("".join))
        cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=4)))
        spans = list(zip(cuts[::2], cuts[1::2], strict=False)) if draw(st.booleans()) else None
        drawn.append(MaskedText(text, spans, spans_are_masked=draw(st.booleans())))
    return drawn


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, *OTHERS])
@settings(max_examples=80, deadline=None)
@given(batch=texts(), closed=st.booleans())
def test_equals_the_tokenizers_own_call_and_its_offsets(kind, batch, closed):
    tokenizer = encoder(kind)._tokenizer
    if closed:  # Turns can be masked only in a conversation.
        batch = [text._replace(spans_are_masked=False) for text in batch]
    results = encoder(kind).encode(batch, add_special_tokens=closed)
    assert len(results) == len(batch)
    for text, encoded in zip(batch, results, strict=True):
        expected = tokenizer(text.text, add_special_tokens=closed, return_offsets_mapping=True)
        ids, offsets = expected["input_ids"], expected["offset_mapping"]
        has_end = text.text.rstrip().endswith(tokenizer.eos_token)
        ended = closed and not has_end
        assert encoded.tokens.tolist() == ids + [tokenizer.eos_token_id] * ended
        assert (encoded.tokens.dtype, encoded.loss_mask.dtype) == (np.int32, np.bool_)
        if text.spans is None:
            assert encoded.loss_mask.all()
            continue
        flags = encoded.loss_mask.tolist()
        if closed and encoded.tokens[-1] == tokenizer.eos_token_id:
            assert flags.pop()
        for (first, last), flag in zip(offsets, flags, strict=False):
            if text.text[first:last].strip() == "<x>":  # Its own text counts, not the white space that it absorbs.
                first = text.text.index("<x>", first)
                last = first + len("<x>")
            if first < last:
                inside = any(max(first, start) < min(last, end) for start, end in text.spans)
                assert flag == (inside != text.spans_are_masked)


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_most_texts_take_the_fast_path(kind, monkeypatch):
    """The test above would pass if no text did."""
    slow: list[MaskedText] = []
    monkeypatch.setattr(
        TextEncoder, "_encode_by_offsets", lambda self, texts, **_: slow.extend(texts) or [None] * len(texts)
    )
    results = encoder(kind).encode(
        [MaskedText("the cat é", [(4, 7)]), MaskedText("e\u0301", None), MaskedText("\n", [])], add_special_tokens=False
    )
    assert not slow
    assert all(isinstance(item, EncodedSequence) for item in results)


def test_only_the_texts_that_need_it_take_the_slow_path(monkeypatch):
    slow: list[str] = []
    by_offsets = TextEncoder._encode_by_offsets

    def recorded(self: TextEncoder, texts: list[MaskedText], *, add_special_tokens: bool) -> list[EncodedSequence]:
        slow.extend(text.text for text in texts)
        return by_offsets(self, texts, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(TextEncoder, "_encode_by_offsets", recorded)
    encoder("composing").encode(
        [MaskedText("the cat", [(0, 3)]), MaskedText("e\u0301", [(0, 2)]), MaskedText("字", [(0, 1)])],
        add_special_tokens=False,
    )
    encoder("swallowing").encode(
        [MaskedText("the <x>", [(0, 3)]), MaskedText("the<x>", [(0, 3)])], add_special_tokens=False
    )
    encoder("unknown bytes").encode(
        [MaskedText("the é", [(0, 3)]), MaskedText("字", [(0, 1)])], add_special_tokens=False
    )
    assert slow == ["e\u0301", "the <x>", "字"]


def prefix_space_tokenizer() -> Any:
    tokenizer = make_tokenizer("chatml")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def lowercasing_tokenizer() -> Any:
    tokenizer = make_tokenizer("chatml")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def dropping_tokenizer() -> Any:
    tokenizer = make_tokenizer("chatml")
    tokenizer.backend_tokenizer.model.dropout = 0.1
    return tokenizer


@pytest.mark.parametrize("make", [prefix_space_tokenizer, lowercasing_tokenizer, dropping_tokenizer, *OTHERS.values()])
def test_tokenizers_of_another_kind(make):
    assert token_byte_lengths(make()) is None


def test_tokenizer_with_its_own_encode_function():
    tokenizer = make_tokenizer("chatml")

    class Own(type(tokenizer)):  # type: ignore[misc]
        def _encode_plus(self, *args: Any, **options: Any) -> Any:
            return super()._encode_plus(*args, **options)

    tokenizer.__class__ = Own
    assert token_byte_lengths(tokenizer) is None


def bos_and_eos_tokenizer(make: Callable[[], Any]) -> Any:
    """Return a tokenizer that writes a token before and after every text."""
    tokenizer = make()
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, eos)],
    )
    return tokenizer


RENDERED = {
    "byte-level": bos_tokenizer,
    "byte-level, both ends": functools.partial(bos_and_eos_tokenizer, bos_tokenizer),
    "sentencepiece": functools.partial(make_tokenizer, "gemma"),
    "sentencepiece, both ends": functools.partial(bos_and_eos_tokenizer, functools.partial(make_tokenizer, "gemma")),
}


@pytest.mark.parametrize("name", RENDERED)
@pytest.mark.parametrize("spanned", [False, True])
def test_a_text_that_was_rendered_before_gets_no_second_beginning_or_end(name, spanned):
    """A second BOS token would be a target, so the model would learn to continue after the end of its answer."""
    tokenizer = RENDERED[name]()
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    prompt, answer = f"{bos}the cat", " sat on the mat"
    for end in ("", eos, f"{eos}\n", f"{eos} \n\n"):
        text = prompt + answer + end
        spans = [(len(prompt), len(text))] if spanned else None
        (encoded,) = TextEncoder(tokenizer).encode([MaskedText(text, spans)], add_special_tokens=True)
        expected = tokenizer(text if end else text + eos, add_special_tokens=False)
        assert encoded.tokens.tolist() == expected["input_ids"]
        assert encoded.tokens.tolist().count(tokenizer.eos_token_id) == 1
        start = expected.char_to_token(len(prompt)) if spanned else 0
        assert encoded.loss_mask.tolist() == [place >= start for place in range(len(encoded.tokens))]


def test_split_special_tokens_are_not_bos_or_eos():
    tokenizer = bos_and_eos_tokenizer(bos_tokenizer)
    tokenizer.split_special_tokens = True
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    (encoded,) = TextEncoder(tokenizer).encode(
        [MaskedText("<|begin_of_text|>the<|eot_id|>", None)], add_special_tokens=True
    )
    assert (encoded.tokens[0], encoded.tokens[-1]) == (bos, eos)
    assert not {bos, eos} & set(encoded.tokens[1:-1].tolist())


@pytest.mark.parametrize("answer", ["sat", " sat", "\n\n sat"])
def test_a_token_that_takes_the_white_space_of_an_answer_is_not_trained(answer):
    """If Phi-3's `<|assistant|>` were trained, the model would learn to begin turns itself."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True), AddedToken("<|end|>", lstrip=True)])
    prompt, end = "the cat<|assistant|>\n", "<|end|>"
    text = prompt + answer + " " + end
    (encoded,) = TextEncoder(tokenizer).encode([MaskedText(text, [(len(prompt), len(text))])], add_special_tokens=False)
    assert tokenizer.decode(encoded.tokens[encoded.loss_mask]) == f"sat{end}"
