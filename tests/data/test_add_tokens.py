"""If this fails, an added token gets the number of another, is split, or finds data in the cache that lack it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.data.new_tokens import find_new_tokens
from qlora_dist.data.row_encoder import RowEncoder
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.errors import UserError
from tests.helpers import tiny_models

TOKENS = 305
"""Number of tokens of the tokenizer."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_models.make_tokenizer().save_pretrained(folder)
    return folder


def resolve(folder: Path, base: Path, *overrides: str) -> Config:
    return load_config(tiny_models.make_config(folder, base), overrides)


def test_an_added_token_is_one_token(base: Path) -> None:
    tokenizer = load_tokenizer(base, ["<Tool>", "alpha", "</tool>"])
    assert len(tokenizer) == TOKENS + 2
    ids = tokenizer("a<Tool> alpha</tool>b")["input_ids"]
    assert [token for token in ids if token >= TOKENS] == [TOKENS, TOKENS + 1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<Tool> alpha</tool>b"


def test_the_cache_knows_the_tokens(base: Path) -> None:
    prints = [
        RowEncoder(load_tokenizer(base, tokens), "assistant", None, "auto").fingerprint()
        for tokens in ([], ["<tool>"], ["<tool>", "<x>"], ["<x>", "<tool>"], ["alpha"])
    ]
    assert len(set(prints)) == 4 and prints[4] == prints[0]


def test_rows_that_are_added_and_spare_ones(base: Path, tmp_path: Path) -> None:
    config = resolve(tmp_path, base, "model.add_tokens=[<a>, alpha, <b>]")
    grown = find_new_tokens(config, base, TOKENS)
    assert (grown.ids, grown.vocabulary) == ((305, 306), 307)
    assert [line.partition(": ")[2] for line in grown.remarks] == [
        "alpha: in the tokenizer already, so no row is added; lora.trainable_tokens trains existing rows",
        "embedding and head get 2 rows after their 305, for tokens without one",
    ]
    spare = find_new_tokens(config, base, 320)
    assert (spare.ids, spare.vocabulary) == ((305, 306), 320)
    assert spare.remarks[1] == "model.add_tokens: <a>, <b>: trained in spare rows, of which the embedding has 320"
    mixed = find_new_tokens(config, base, 306)
    assert (mixed.ids, mixed.vocabulary) == ((305, 306), 307)


def test_a_tokenizer_with_more_tokens_than_rows(base: Path, tmp_path: Path) -> None:
    """Rows without a gap follow the embedding, so tokens that are not named get one too."""
    last = load_tokenizer(base).convert_ids_to_tokens(304)
    tokens = find_new_tokens(resolve(tmp_path, base, f"model.add_tokens=[{last!r}]"), base, 300)
    assert (tokens.ids, tokens.vocabulary) == ((300, 301, 302, 303, 304), 305)
    assert find_new_tokens(resolve(tmp_path, base), base, 300).ids == ()


def test_existing_tokens_are_trained_by_name(base: Path, tmp_path: Path) -> None:
    config = resolve(tmp_path, base, "lora.trainable_tokens=[<|im_start|>, <pad>]", "model.add_tokens=[<a>]")
    tokens = find_new_tokens(config, base, 320)
    assert (tokens.ids, tokens.vocabulary) == ((0, 1, 305), 320)
    with pytest.raises(
        UserError, match=r"^lora\.trainable_tokens: <b> is no token of .*; name it in model\.add_tokens"
    ):
        find_new_tokens(resolve(tmp_path, base, "lora.trainable_tokens=[<b>]"), base, 320)


@pytest.mark.parametrize("key", ["model.add_tokens", "lora.trainable_tokens"])
def test_mistakes_in_the_configuration(key: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{key}: <a> is named twice; leave one out"):
        resolve(tmp_path, base, f"{key}=[<a>, <b>, <a>]")
    with pytest.raises(UserError, match=rf"{key}"):
        resolve(tmp_path, base, f"{key}=['']")
