"""If this fails, a damaged or malicious file of a model ends in a traceback."""

from __future__ import annotations

import pytest

from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.errors import UserError
from qlora_dist.model.model_folder import read_model_json

CONTENTS = {"nested": "[" * 100_000, "closed": '{"a":' * 50_000 + "1" + "}" * 50_000, "null": "null", "a list": "[]"}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_files_that_hold_no_tokenizer(make_tokenizer, tmp_path, name, content):
    make_tokenizer("chatml").save_pretrained(tmp_path)
    (tmp_path / name).write_text(CONTENTS[content])
    with pytest.raises(UserError, match=rf"^{tmp_path}: holds no tokenizer \(.+\); copy it there"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", CONTENTS)
def test_files_that_hold_no_object(tmp_path, content):
    (tmp_path / "config.json").write_text(CONTENTS[content])
    with pytest.raises(UserError, match=r"config\.json: .*get the file anew$"):
        read_model_json(tmp_path / "config.json")
