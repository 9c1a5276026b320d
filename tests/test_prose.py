"""If this fails, a text is not in plain English: a stranger has to know the code to understand it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import prose, signatures

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", [*prose.FOLDERS, *prose.PAGES])
def test_texts_are_plain_english(name: str) -> None:
    if (ROOT / name).exists():
        assert not [str(violation) for violation in prose.violations(ROOT, [name])]


def test_functions_are_short_and_have_few_parameters() -> None:
    assert not list(signatures.violations(ROOT))
