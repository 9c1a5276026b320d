"""If this fails, the test split of a downloaded data set is trained, or the data set cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_dist.config.sections import SourceConfig
from qlora_dist.data.source import read_source_rows, source_files
from qlora_dist.data.source_row import TextRow
from qlora_dist.errors import UserError

SHARDS = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"]
CONFIGURATIONS = ["de/train-00000-of-00001.jsonl", "en/test-00000-of-00001.jsonl", "en/train-00000-of-00001.jsonl"]
CONVERTED = ["default/test/0000.parquet", "default/train/0000.parquet"]
SFT = ["data/train_sft-00000-of-00001-a3ecc755682dfbb5.parquet", "data/test_sft-00000-of-00001-a3ecc755.parquet"]


def make(folder: Path, names: list[str]) -> Path:
    for name in [*names, "README.md", ".cache/x/train-00000-of-00001.jsonl", "dataset_infos.json"]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "' + name + '"}\n')
    return folder


@pytest.mark.parametrize(
    ("names", "source", "expected"),
    [
        (SHARDS, {}, SHARDS[:2]),
        (SHARDS, {"split": "test"}, SHARDS[2:]),
        (CONFIGURATIONS, {"subset": "en"}, CONFIGURATIONS[2:]),
        (CONFIGURATIONS, {"subset": "en", "split": "test"}, CONFIGURATIONS[1:2]),
        (CONVERTED, {}, CONVERTED[1:]),
        (CONVERTED, {"subset": "default", "split": "test"}, CONVERTED[:1]),
        (SFT, {"split": "train_sft"}, SFT[:1]),
        (["train.jsonl", "test.jsonl", "dev.json.gz"], {}, ["train.jsonl"]),
        (["train.jsonl", "test.jsonl", "dev.json.gz"], {"split": "validation"}, ["dev.json.gz"]),
        # A folder of files without splits.
        (["b.jsonl", "a.csv", "within/c.jsonl"], {}, ["a.csv", "b.jsonl"]),
        (["train.jsonl", "more.jsonl"], {}, ["more.jsonl", "train.jsonl"]),
        (["eval.jsonl"], {}, ["eval.jsonl"]),
    ],
)
def test_files_of_a_split(names, source, expected, tmp_path):
    folder = make(tmp_path / "set", names)
    files = source_files(SourceConfig(path=str(folder), **source))
    assert [str(path.relative_to(folder)) for path in files] == expected


@pytest.mark.parametrize(
    ("names", "source", "message"),
    [
        (SHARDS, {"split": "dev"}, "has no split 'dev'; set `split` to one of `test`, `train`"),
        (SHARDS, {"subset": "en"}, "has no subset 'en'; take subset: en out"),
        (SFT, {}, "has no split 'train'; set `split` to one of `test_sft`, `train_sft`"),
        (CONFIGURATIONS, {}, "has several configurations; set `subset` to one of `de`, `en`"),
        (CONFIGURATIONS, {"subset": "fr"}, "has no subset 'fr'; set it to one of `de`, `en`"),
        (["a.jsonl", "test.jsonl"], {}, "has files of the splits `test` and others (a.jsonl); give a file, or"),
        (["a.jsonl"], {"split": "test"}, "has no splits; take split: test out"),
    ],
)
def test_ambiguous_names_are_refused(names, source, message, tmp_path, refusal):
    folder = make(tmp_path / "set", names)
    with pytest.raises(UserError) as error:
        source_files(SourceConfig(path=str(folder), **source))
    assert refusal(error.value).startswith(f"{folder}: {message}")


def test_patterns(tmp_path, refusal):
    folder = make(tmp_path / "set", ["b.jsonl", "a.jsonl", "c.txt", "within/d.jsonl"])
    rows = list(read_source_rows(SourceConfig(path=f"{folder}/*.jsonl")))
    assert [row.text for row in rows if isinstance(row, TextRow)] == ["a.jsonl", "b.jsonl"]
    deep = source_files(SourceConfig(path=f"{folder}/**/*.jsonl"))
    assert [path.name for path in deep] == ["a.jsonl", "b.jsonl", "d.jsonl"]
    (folder / "[1].jsonl").write_text('{"text": "a name is no pattern"}\n')
    assert source_files(SourceConfig(path=f"{folder}/[1].jsonl")) == [folder / "[1].jsonl"]
    for source, message in [
        ({"path": f"{folder}/*.parquet"}, "no file matches; give the path of a file or folder that is there"),
        ({"path": f"{folder}/*.jsonl", "split": "test"}, "has no splits; take split: test out"),
    ]:
        with pytest.raises(UserError) as error:
            source_files(SourceConfig(**source))
        assert message in refusal(error.value)
