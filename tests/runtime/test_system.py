"""If this fails, a run on Windows ends in a traceback about a signal, or the cache fills a small home folder."""

from __future__ import annotations

import pwd
import sys
from pathlib import Path

import pytest

from qlora_dist.cli.main import app
from qlora_dist.config.sections import DataConfig
from qlora_dist.data.prepare_datasets import data_cache_folder
from qlora_dist.errors import UserError
from qlora_dist.plan.calibration_file import load_calibration


@pytest.mark.parametrize("words", [["train", "my.yaml", "--dry-run"], ["launch", "my.yaml"], ["quantize", "a", "b"]])
def test_windows_is_refused_in_a_sentence(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows is refused before the file is read and before modules are imported that fail there."""
    monkeypatch.setitem(sys.modules, "qlora_dist.train.stop_requests", None)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UserError, match=r"^qlora-dist trains on Linux, .*, not on Windows; start it in WSL 2"):
        app(words, standalone_mode=False)


def test_the_cache_follows_xdg_cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Homes often have a quota, so users move caches with XDG_CACHE_HOME."""
    default = DataConfig.model_validate({"train": ["a.jsonl"]})
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert data_cache_folder(default) == tmp_path / "home" / ".cache" / "qlora-dist"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "scratch"))
    assert data_cache_folder(default) == tmp_path / "scratch" / "qlora-dist"
    assert data_cache_folder(default.model_copy(update={"cache": "~/mine"})) == tmp_path / "home" / "mine"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """The container has no entry for the user's number."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    for cache in ("~/.cache/qlora-dist", "~/mine"):
        with pytest.raises(UserError, match="home folder"):
            data_cache_folder(DataConfig(train=["a.jsonl"], cache=cache))
    assert load_calibration().devices == {}
