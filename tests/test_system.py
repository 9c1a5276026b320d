"""If this fails, who starts a run on Windows gets a traceback about a signal."""

from __future__ import annotations

import sys

import pytest

from qlora_dist.cli import app
from qlora_dist.errors import UserError


@pytest.mark.parametrize("words", [["train", "my.yaml", "--dry-run"], ["launch", "my.yaml"], ["quantize", "a", "b"]])
def test_windows_is_refused_in_a_sentence(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the file is read and modules are imported that Windows has not."""
    monkeypatch.setitem(sys.modules, "qlora_dist.train.stop", None)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UserError, match=r"^qlora-dist trains on Linux, .*, not on Windows; start it in WSL 2"):
        app(words, standalone_mode=False)
