"""If this fails, ranks with different settings hang, or train an unintended model."""

from __future__ import annotations

import os
import socket
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from qlora_dist.cli.main import main
from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.runtime import shared_folder
from qlora_dist.runtime.environment import RankInfo, read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.train.rank_consistency import (
    PER_NODE_KEYS,
    check_ranks_agree,
    find_misplaced_rank,
    first_difference,
    rank_facts,
)
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks, started_ranks

HOST, CPU = socket.gethostname(), torch.device("cpu")


def train(*words: str | Path, sys_path: Path | None = None) -> None:
    if sys_path is not None:
        sys.path.insert(0, str(sys_path))
    sys.argv = ["qlora-dist", "train", *map(str, words)]
    main()


def test_another_configuration_or_version_ends_all_ranks_with_one_sentence(tiny_llama_nf4, tmp_path):
    config = tiny_models.make_config(tmp_path, tiny_llama_nf4)
    other = tmp_path / "another environment" / "bitsandbytes-99.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 99.1\n")
    differing = [
        partial(train, config, "optim.lr=0.5", "data.workers=1"),
        partial(train, config, sys_path=other.parent),
    ]
    sentences = []
    for function in differing:
        with started_ranks([partial(train, config), function], tmp_path) as processes:
            for process in processes:
                process.join(60)
        assert [process.exitcode for process in processes] == [2, 2]
        sentences.append((tmp_path / "rank-0.txt").read_text())
        assert (tmp_path / "rank-1.txt").read_text() == ""
    start = f"qlora-dist: rank 1 on {HOST} differs from rank 0 on {HOST}: "
    assert sentences[0] == f"{start}optim.lr is 0.5 there and 0.01 here; give all ranks the same file and overrides\n"
    assert sentences[1].startswith(f"{start}bitsandbytes is 99.1 there and 0.")
    assert sentences[1].endswith(" here; install the same versions on all nodes\n")
    assert not (tmp_path / "runs").exists()


def train_in(folder: Path, *words: str | Path) -> None:
    os.chdir(folder)
    train(*words)


def test_a_run_folder_that_is_not_shared_is_found_at_the_start(tiny_llama_nf4, tmp_path, monkeypatch):
    """Two nodes have a disk each. Without the check, the first checkpoint would never be complete, hours later."""
    monkeypatch.setattr(shared_folder, "_VISIBLE_TIMEOUT_S", 0.5)
    config, words = tiny_models.make_config(tmp_path, tiny_llama_nf4), ("run.dir=runs", "train.timeout=60")
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for node in nodes:
        node.mkdir()
    with started_ranks([partial(train_in, node, config, *words) for node in nodes], tmp_path, nodes=2) as processes:
        for process in processes:
            process.join(60)
    assert [process.exitcode for process in processes] == [2, 2]
    output = (tmp_path / "rank-0.txt").read_text()
    assert output.endswith(
        f"qlora-dist: runs/run: rank 1 on {HOST} does not see what rank 0 on {HOST} writes there; give run.dir a "
        "folder that all nodes share, by its whole path\n"
    )
    assert not (nodes[0] / "runs").exists(), "the same command may start once it is shared"


def config_of(train: list[str], **changes: object) -> Config:
    return Config.model_validate({"model": {"base": "m"}, "data": {"train": train, **changes}})


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({}, None),
        ({"device": torch.device("cuda", 1)}, "the device is cuda there and cpu here; start the run on machines"),
        (
            {"ranks": RankInfo(rank=5, world_size=6, local_rank=0, local_world_size=2, launcher="torchrun")},
            "the number of ranks on the node is 2 there and 4 here; start equally",
        ),
        (
            {"data": {"train": "abc"}},
            "the content of data.train is sha256:abc there and none here; copy the same files",
        ),
        ({"config": config_of(["b"])}, 'data.train is ["b"] there and ["a"] here; give all ranks the same file'),
        ({"config": config_of(["a"], seq_len=9)}, "data.seq_len is 9 there and 2048 here"),
    ],
)
def test_every_kind_of_difference_is_named(other, sentence):
    same = {
        "config": config_of(["a"]),
        "ranks": RankInfo(rank=0, world_size=6, local_rank=0, local_world_size=4, launcher="torchrun"),
        "device": CPU,
        "data": {},
    }
    answers = [("A", rank_facts(**same)), ("A", rank_facts(**same)), ("B", rank_facts(**(same | other)))]
    if sentence is None:
        assert first_difference(answers) is None
    else:
        assert first_difference(answers).startswith(f"rank 2 on B differs from rank 0 on A: {sentence}")


def test_long_values_are_compared_but_not_sent():
    long = [
        rank_facts(
            config_of([f"{'a' * 1000}{end}"]),
            RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none"),
            CPU,
            {},
        )
        for end in "ab"
    ]
    assert "sha256:" in first_difference([("A", long[0]), ("B", long[1])])
    assert len(str(long[0])) < 5000


def test_keys_that_may_differ_exist():
    sections = config_of(["a"]).model_dump()
    assert all(name in sections[section] for section, name in (key.split(".") for key in PER_NODE_KEYS))


def test_a_single_process_agrees_with_itself():
    ranks = read_rank_info({})
    with process_group(ranks, CPU):
        check_ranks_agree(config_of(["a"]), ranks, CPU)


def rank_message(path: Path) -> str:
    ranks = read_rank_info()
    with process_group(ranks, CPU):
        try:
            check_ranks_agree(load_config(path, [f"train.seed={ranks.rank // 2}"]), ranks, CPU)
        except UserError as error:
            return str(error)
    return ""


def test_all_ranks_name_the_same_rank(tiny_llama_nf4, tmp_path):
    sentences = run_ranks(4, rank_message, tiny_models.make_config(tmp_path, tiny_llama_nf4))
    assert len(set(sentences)) == 1
    assert sentences[0].startswith(f"rank 2 on {HOST} differs from rank 0 on {HOST}: train.seed is 1 there and 0 here")


def test_ranks_that_the_launcher_has_misplaced():
    # srun --gpus-per-task=1 gives each rank the same index, but another GPU
    assert (
        find_misplaced_rank([("n1", 0, "GPU-a"), ("n1", 1, "GPU-b"), ("n2", 0, "GPU-a"), ("n2", 1, "GPU-b")], 2) is None
    )
    assert find_misplaced_rank([("n1", 0, ""), ("n1", 1, "")], 2) is None
    shared = find_misplaced_rank([("n1", 0, "GPU-a"), ("n1", 1, "GPU-b"), ("n2", 0, "GPU-c"), ("n2", 1, "GPU-c")], 2)
    assert shared is not None and shared.startswith("ranks 2 and 3 on n2 have the same GPU (GPU-c); start one rank per")
    cyclic = find_misplaced_rank([("n1", 0, ""), ("n2", 0, ""), ("n1", 1, ""), ("n2", 1, "")], 2)
    assert cyclic is not None and cyclic.startswith("rank 1 is number 0 on n2, not number 1: neighbouring ranks belong")
