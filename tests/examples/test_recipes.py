"""If this fails, `train` refuses one of our own recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "recipes"
NAMES = sorted(path.name for path in RECIPES.glob("*.yaml"))


def load(name: str) -> Config:
    return load_config(RECIPES / name)


def test_all_recipes_exist() -> None:
    guanaco = {f"guanaco-{size}.yaml" for size in ("7b", "13b", "33b", "65b")}
    llama = {f"llama-3.1-{size}.yaml" for size in ("8b", "70b", "405b")}
    assert {"quickstart.yaml"} | guanaco | llama <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_loads_and_runs_under_its_own_name(name: str) -> None:
    assert load(name).run.name == Path(name).stem


@pytest.mark.parametrize(
    ("name", "lr", "dropout"),
    [
        ("guanaco-7b.yaml", 2e-4, 0.1),
        ("guanaco-13b.yaml", 2e-4, 0.1),
        ("guanaco-33b.yaml", 1e-4, 0.05),
        ("guanaco-65b.yaml", 1e-4, 0.05),
    ],
)
def test_guanaco_has_the_settings_of_the_paper(name: str, lr: float, dropout: float) -> None:
    config = load(name)
    assert (config.optim.lr, config.lora.dropout) == (lr, dropout)
    assert (config.lora.r, config.lora.alpha, config.lora.targets) == (64, 16, "all-linear")
    assert (config.train.steps, config.train.global_batch, config.data.seq_len) == (1875, 16, 512)
    assert (config.optim.schedule, config.optim.beta2, config.optim.max_grad_norm) == ("constant", 0.999, 0.3)


def test_recipes_of_one_family_differ_only_where_the_paper_does() -> None:
    def without(config: Config) -> dict[str, object]:
        tree = config.model_dump()
        tree["model"].pop("base")
        tree["run"].pop("name")
        tree["optim"].pop("lr")
        tree["lora"].pop("dropout")
        return tree

    trees = [without(load(f"guanaco-{size}.yaml")) for size in ("7b", "13b", "33b", "65b")]
    assert all(tree == trees[0] for tree in trees)
