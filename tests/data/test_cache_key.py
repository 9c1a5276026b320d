"""If this fails, a run trains on the tokens of other data, or tokenizes needlessly."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_dist.config.sections import DataConfig, SourceConfig
from qlora_dist.data import cache_key as key_module
from qlora_dist.data.cache_key import source_cache_key
from qlora_dist.errors import UserError


@pytest.fixture
def key(tmp_path: Path):
    """Return `key(path, fingerprint=..., source={...}, **data)`."""

    def make(path: str, fingerprint: str = "tokenizer", source: dict[str, Any] | None = None, **data: Any) -> str:
        config = DataConfig(train=["unused"], **data)
        return source_cache_key(
            SourceConfig(path=path, **(source or {})), config, fingerprint, tmp_path / "cache", print
        )

    return make


@pytest.fixture
def path(write_rows) -> str:
    return write_rows({"text": "one"}, {"text": "two"})


def test_the_key_contains_everything_that_tokens_depend_on(key, path, write_rows):
    keys = [
        key(path),
        key(write_rows({"text": "one"}, {"text": "twO"}, name="other.jsonl")),
        key(path, fingerprint="another"),
        key(path, format="text"),
        key(path, on_bad_row="skip"),
        key(path, on_bad_row="skip", max_bad_rows=7),
    ]
    assert len(set(keys)) == len(keys)
    # `max_bad_rows` counts only if rows are skipped, and a source's own format overrides `data.format`.
    assert key(path, max_bad_rows=7) == keys[0]
    assert key(path, format="messages", source={"format": "text"}) == keys[3]


def test_the_key_does_not_contain_later_settings(key, path):
    later = {"seq_len": 77, "too_long": "split", "packing": "none", "group_by_length": True, "workers": 3}
    assert key(path, source={"weight": 2.0}, **later) == key(path)


def test_a_file_that_was_touched_moved_or_copied_is_the_same(key, path, tmp_path):
    before = key(path)
    os.utime(path, ns=(1, 1))
    assert key(path) == before
    moved = str(shutil.move(path, tmp_path / "renamed.jsonl"))
    assert key(moved) == before
    (tmp_path / "elsewhere").mkdir()
    assert key(str(shutil.copy(moved, tmp_path / "elsewhere" / "copied.jsonl"))) == before
    # The extension selects the reader.
    assert key(str(shutil.move(moved, tmp_path / "renamed.csv"))) != before


def test_a_change_of_the_same_size_is_noticed(key, path):
    before = key(path)
    Path(path).write_text(Path(path).read_text().replace("one", "One"))
    assert key(path) != before


def test_contents_are_read_once(key, path, monkeypatch):
    """With 100 GB of data, 64 ranks would otherwise read 6.4 TB."""
    before = key(path)
    monkeypatch.setattr(key_module, "_digest", None)
    assert key(path, fingerprint="another") != before
    assert key(path) == before


def test_the_digest_covers_the_whole_file(tmp_path):
    path = tmp_path / "large.jsonl"
    path.write_bytes(os.urandom(2**20 + 5))
    assert key_module._digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_missing_file(key, tmp_path, refusal):
    with pytest.raises(UserError) as error:
        key(str(tmp_path / "nothing.jsonl"))
    assert refusal(error.value).startswith(str(tmp_path / "nothing.jsonl"))
