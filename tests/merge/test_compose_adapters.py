"""If this fails, a composed adapter differs from the sum of its parts, or parts of different models are combined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from qlora_dist.cli.main import app
from qlora_dist.errors import UserError
from qlora_dist.merge.combine_matrices import WeightedLoraFactors, combine_matrices
from qlora_dist.merge.compose_adapters import compose_adapters
from qlora_dist.merge.compose_options import ComposeOptions, WeightedAdapter, parse_weighted_adapter
from qlora_dist.merge.merge_folder import merge_folder
from qlora_dist.merge.merge_plan import MergeOptions
from tests.helpers import tiny_models

PROMPT = torch.arange(3, 60).view(1, -1)
QUIET = Console(quiet=True)
PARTS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "b": {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
    "c": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"layers.1.mlp.up_proj": 2},
        "modules_to_save": ["model.norm"],
    },
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_model(
        tmp_path_factory.mktemp("compose") / "model", dtype=torch.float32, num_hidden_layers=2
    )


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def adapters(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save PEFT's adapters, each in a folder of its name."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, config in PARTS.items():
        make_adapter(source, folder / name, **config)
    return folder


def make_adapter(base: Path, out: Path, **settings: Any) -> Path:
    model = peft.get_peft_model(load(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(len(out.name) + ord(out.name[0]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" not in name and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(out)
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROMPT, use_cache=False).logits


def deltas(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    layers = {name: module for name, module in model.named_modules() if adapter in getattr(module, "lora_A", ())}
    return {name: module.get_delta_weight(adapter) for name, module in layers.items()}


factors = st.builds(
    lambda r, scaling, weight, seed: WeightedLoraFactors(
        *(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for shape in ((r, 7), (9, r))),
        scaling,
        weight,
    ),
    st.integers(1, 6),
    st.floats(0.1, 4),
    st.floats(-2, 2, width=16),
    st.integers(0, 99),
)


@settings(max_examples=40)
@given(st.lists(factors, min_size=1, max_size=4))
def test_cat_and_svd_of_full_rank_are_the_weighted_sum(updates: list[WeightedLoraFactors]) -> None:
    parts = [(update.weight * update.scaling, update.b.double(), update.a.double()) for update in updates]
    total = sum(factor * b @ a for factor, b, a in parts)
    size = sum(abs(factor) * b.norm() * a.norm() for factor, b, a in parts)
    for how in ("cat", "svd"):
        a, b = combine_matrices(updates, how, 7, 1.0)  # type: ignore[arg-type]
        assert (b.double() @ a.double() - total).norm() <= 1e-6 * size


def test_svd_of_low_rank_is_the_best_approximation() -> None:
    torch.manual_seed(0)
    updates = [WeightedLoraFactors(torch.randn(4, 20), torch.randn(30, 4), 0.5, weight) for weight in (1.0, -0.7)]
    a, b = combine_matrices(updates, "svd", 3, 1.0)
    total = sum(update.weight * update.scaling * update.b @ update.a for update in updates)
    error = torch.linalg.svdvals(total)[3:].norm()
    torch.testing.assert_close((b @ a - total).norm(), error)


@pytest.mark.parametrize("how", ["cat", "linear", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"])
def test_combination_types_equal_pefts(how: Any, source: Path, adapters: Path, tmp_path: Path) -> None:
    model = peft.PeftModel.from_pretrained(load(source), adapters / "a", adapter_name="a")
    model.load_adapter(adapters / "b", adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum", combination_type=how, density=0.4)
    parts = [WeightedAdapter("a", adapters / "a", 0.7), WeightedAdapter("b", adapters / "b", -0.4)]
    report = compose_adapters(parts, tmp_path / "out", ComposeOptions(how=how, density=0.4))
    composed_deltas = deltas(peft.PeftModel.from_pretrained(load(source), tmp_path / "out"))
    for name, delta in deltas(model, "sum").items():
        torch.testing.assert_close(composed_deltas[name], delta, rtol=1e-5, atol=1e-6)
    total = {name: 0.7 * delta - 0.4 * deltas(model, "b")[name] for name, delta in deltas(model, "a").items()}
    relative_difference = sum((composed_deltas[name] - total[name]).square().sum() for name in total) / sum(
        t.square().sum() for t in total.values()
    )
    assert (report.squared_difference / report.squared_sum) ** 0.5 == pytest.approx(
        float(relative_difference) ** 0.5, rel=1e-3, abs=1e-5
    )


def test_other_ranks_scalings_and_modules(source: Path, adapters: Path, tmp_path: Path) -> None:
    """The result is the sum of PEFT's deltas, with the norm that one adapter has fully trained."""
    parts = [WeightedAdapter(name, adapters / name, weight) for name, weight in (("a", 1.0), ("b", 0.5), ("c", -0.25))]
    compose_adapters(parts, tmp_path / "out", ComposeOptions())
    composed = peft.PeftModel.from_pretrained(load(source), tmp_path / "out")
    composed_deltas, expected = deltas(composed), {}
    for part in parts:
        for name, delta in deltas(peft.PeftModel.from_pretrained(load(source), part.path)).items():
            expected[name] = expected.get(name, 0) + part.weight * delta
    assert composed_deltas.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(composed_deltas[name], delta, rtol=1e-5, atol=1e-6)
    saved = load_file(adapters / "c" / "adapter_model.safetensors")
    norm = next(value for name, value in saved.items() if "norm" in name)
    assert torch.equal(composed.get_submodule("model.model.norm").modules_to_save["default"].weight, norm)


def test_dare_drops_a_part_and_keeps_the_mean(adapters: Path, tmp_path: Path) -> None:
    parts = [WeightedAdapter(name, adapters / name) for name in "ab"]
    for out, seed in (("one", 0), ("again", 0), ("other", 1)):
        compose_adapters(parts, tmp_path / out, ComposeOptions(how="dare_linear", density=0.5, seed=seed))
    one, again, other = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("one", "again", "other"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    key = next(name for name in one if "down_proj.lora_A" in name)
    assert not torch.equal(one[key], other[key])
    assert 0.2 < (one[key] == 0).float().mean() < 0.3  # probability that both adapters' values are dropped: a quarter


def test_sequential(source: Path, adapters: Path, tmp_path: Path) -> None:
    """Base and composed adapter equal the second adapter on the merged model that it was trained on."""
    merged = tmp_path / "merged"
    merge_folder(source, adapters / "a", merged, MergeOptions(into="original", dtype="fp32"), QUIET)
    second = make_adapter(merged, tmp_path / "second", **PARTS["c"])
    parts = [WeightedAdapter("a", adapters / "a"), WeightedAdapter("second", second)]
    compose_adapters(parts, tmp_path / "out", ComposeOptions(how="sequential"))
    composed = logits(peft.PeftModel.from_pretrained(load(source), tmp_path / "out"))
    expected = logits(peft.PeftModel.from_pretrained(load(merged), second))
    torch.testing.assert_close(composed, expected, rtol=1e-5, atol=1e-5)
    assert (logits(load(merged)) - composed).abs().max() > 0.01  # the second matters
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(source)
    with pytest.raises(UserError, match="holds another adapter than"):
        compose_adapters(
            [WeightedAdapter("b", adapters / "b"), parts[1]], tmp_path / "wrong", ComposeOptions(how="sequential")
        )
    with pytest.raises(UserError, match="only the last of a sequence"):
        compose_adapters(
            [WeightedAdapter("a", adapters / "a", 0.5), parts[1]], tmp_path / "wrong", ComposeOptions(how="sequential")
        )
    with pytest.raises(UserError, match="compose adapters of one base, or name their common base with --base"):
        compose_adapters(parts, tmp_path / "wrong", ComposeOptions())


def test_adapters_that_cannot_be_composed_are_refused(source: Path, adapters: Path, tmp_path: Path) -> None:
    a, b, c = (WeightedAdapter(name, adapters / name) for name in "abc")
    dora = WeightedAdapter(
        "dora", make_adapter(source, tmp_path / "dora", r=4, target_modules=["q_proj"], use_dora=True)
    )
    small = tiny_models.make_model(tmp_path / "small", hidden_size=32, num_hidden_layers=2)
    other = WeightedAdapter("other", make_adapter(small, tmp_path / "other", r=4, target_modules=["q_proj"]))
    for parts, options, message in [
        ([a, dora], {}, "is DoRA, whose magnitudes have no sum"),
        ([a, other], {}, "compose adapters of one base, or name"),
        ([a, other], {"base": source}, r"q_proj is \(64, 32\) there and \(64, 64\) in"),
        ([c, WeightedAdapter("d", c.path)], {}, "and the two have no sum"),
        ([a, c], {"how": "linear"}, r"has the ranks \[3, 4\] in these adapters; use cat or svd"),
        ([a, b], {"how": "ties", "density": 1.5}, "give a number between 0 and 1"),
        ([a, b], {"rank": 2}, "leave it out, or use svd"),
        ([a, a], {}, "each with a name of its own"),
        ([a, WeightedAdapter("x", a.path, -1.0)], {"how": "linear"}, "the updates cancel each other"),
        ([a, WeightedAdapter("x", a.path, -1.0)], {}, "the updates cancel each other"),
        ([a, b], {"how": "sequential"}, "which is no folder that qlora-dist merge has written"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            compose_adapters(parts, tmp_path / "out", ComposeOptions(**options))  # type: ignore[arg-type]
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_the_command(adapters: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = ["compose", f"a={adapters / 'a'}", f"b={adapters / 'b'}:0.5", str(out), "--how", "svd", "--rank", "3"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    assert "1 x a + 0.5 x b by svd, rank 3 on 4 matrices" in " ".join(result.output.split())
    assert load_file(out / "adapter_model.safetensors")
    call[-3] = "sum"
    assert "is no combination type; choose from cat, linear" in str(CliRunner().invoke(app, call[:-2]).exception)


def test_parse_weighted_adapter() -> None:
    assert parse_weighted_adapter("a=runs/a/adapter:0.5") == WeightedAdapter("a", Path("runs/a/adapter"), 0.5)
    assert parse_weighted_adapter("a=runs/a:b") == WeightedAdapter("a", Path("runs/a:b"), 1.0)
    for text in ("runs/a", "=runs/a", "a=", "a=runs/a:nan"):
        with pytest.raises(UserError, match="write NAME=FOLDER"):
            parse_weighted_adapter(text)
