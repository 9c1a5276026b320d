"""If this fails, the merged model differs from the trained one, or transformers cannot load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file

from qlora_dist.errors import UserError
from qlora_dist.merge.merge_folder import MergeReport, merge_folder
from qlora_dist.merge.merge_plan import MergeOptions
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from tests.helpers import tiny_models
from tests.helpers.architectures import dequantized_model, make_architecture

PROMPT = torch.arange(3, 60).view(1, -1)
QUIET = Console(quiet=True)
FILE = "model-00001-of-00001.safetensors"


def make_adapter(model: torch.nn.Module, out: Path, base: Path, **settings: Any) -> Path:
    """Save an adapter by PEFT with random values."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "target_modules": "all-linear"} | settings))
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter *= 1 + 0.2 * torch.rand_like(parameter)
            elif "lora_" in name:
                parameter.normal_(std=0.1)
            elif "modules_to_save" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(out)
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROMPT, use_cache=False).logits.float()


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def merge_and_check(source: Path, tmp_path: Path, **settings: Any) -> tuple[Path, MergeReport]:
    """Merge into the dequantized weights, and compare with PEFT's model of base and adapter."""
    quantized = quantize_folder(source, tmp_path / "nf4", QuantizeOptions(min_share=0.5)).out
    adapter = make_adapter(dequantized_model(source, quantized), tmp_path / "adapter", quantized, **settings)
    adapted = peft.PeftModel.from_pretrained(dequantized_model(source, quantized), adapter)
    report = merge_folder(None, adapter, tmp_path / "merged", MergeOptions(dtype="fp32"), QUIET)
    merged = logits(load(report.out))
    torch.testing.assert_close(merged, logits(adapted), rtol=1e-5, atol=1e-5)
    with adapted.disable_adapter():
        assert (logits(adapted) - merged).abs().max() > 0.05  # the adapter matters
    assert report.squared_difference == 0.0 < report.squared_updates
    return report.out, report


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}},
        {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
        {"modules_to_save": ["lm_head", "embed_tokens", "model.norm"]},
        {"bias": "all"},
    ],
    ids=["lora", "rslora with rank patterns", "dora", "modules to save", "bias"],
)
def test_the_merged_model_is_base_and_adapter(settings: dict[str, Any], tmp_path: Path) -> None:
    arch = "Qwen2" if settings.get("bias") else "Llama"
    merge_and_check(tiny_models.make_model(tmp_path / "source", arch=arch), tmp_path, **settings)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens(*, tied: bool, tmp_path: Path) -> None:
    """A fully trained embedding has more rows than the base's, and a tied head stays tied to it."""
    source = tiny_models.make_model(tmp_path / "source", tie_word_embeddings=tied, num_hidden_layers=1)
    quantized = quantize_folder(source, tmp_path / "nf4", QuantizeOptions(min_share=0.3)).out

    def resized() -> Any:
        model = dequantized_model(source, quantized)
        model.resize_token_embeddings(330, mean_resizing=False)
        return model

    whole = {"modules_to_save": ["embed_tokens"] if tied else ["embed_tokens", "lm_head"], "ensure_weight_tying": tied}
    adapter = make_adapter(resized(), tmp_path / "adapter", quantized, target_modules=["q_proj"], **whole)
    out = merge_folder(None, adapter, tmp_path / "merged", MergeOptions(dtype="fp32"), QUIET).out
    merged = load(out)
    assert merged.config.vocab_size == 330 and merged.config.tie_word_embeddings == tied
    expected = logits(peft.PeftModel.from_pretrained(resized(), adapter))
    assert expected.shape[-1] == 330
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT2", "Mixtral", "GptOss", "Gemma2", "Falcon", "DeepseekV3", "Llama4"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    """These cover transposed matrices, separate and stacked experts, adapters of experts, and tied embeddings.

    They also cover fused projections, names that PEFT converts to experts of twice the rank, and experts whose inputs
    and outputs PEFT confuses.
    """
    experts = ["experts.down_proj", "experts.gate_up_proj"]
    sparse = {"target_modules": ["q_proj", "o_proj"], "target_parameters": experts}
    converted = {"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]}
    targets = sparse if name in ("Mixtral", "GptOss", "Llama4") else converted if name == "DeepseekV3" else {}
    out, _ = merge_and_check(make_architecture(tmp_path / "source", name), tmp_path, **targets)
    saved = {name for path in (tmp_path / "source").glob("*.safetensors") for name in load_file(path)}
    assert {name for path in out.glob("*.safetensors") for name in load_file(path)} == saved


@pytest.fixture(scope="module")
def trained_adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Make a 16-bit folder, its 4-bit version, and an adapter of the latter."""
    folder = tmp_path_factory.mktemp("merge")
    source = tiny_models.make_model(folder / "source")
    quantized = quantize_folder(source, folder / "nf4", QuantizeOptions()).out
    return (source, quantized, make_adapter(dequantized_model(source, quantized), folder / "adapter", quantized))


def merge(trained_adapter: tuple[Path, Path, Path], out: Path, *, base: int, **options: Any) -> MergeReport:
    return merge_folder(trained_adapter[base], trained_adapter[2], out, MergeOptions(**options), QUIET)


def test_bf16_is_the_trained_model_up_to_rounding(trained_adapter: tuple[Path, Path, Path], tmp_path: Path) -> None:
    report = merge(trained_adapter, tmp_path / "merged", base=1)
    (dtype,) = {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model-00001-of-00001.safetensors").values()}
    assert dtype == torch.bfloat16
    adapted = peft.PeftModel.from_pretrained(
        dequantized_model(trained_adapter[0], trained_adapter[1]), trained_adapter[2]
    )
    expected = logits(adapted)
    assert (logits(load(report.out)) - expected).norm() < 5e-3 * expected.norm()
    assert 0 < report.squared_difference / report.squared_trained < (2**-9) ** 2


def test_a_base_that_the_run_quantized_while_loading(trained_adapter: tuple[Path, Path, Path], tmp_path: Path) -> None:
    merge(trained_adapter, tmp_path / "one", base=1)
    merge(trained_adapter, tmp_path / "other", base=0)
    one, other = (load_file(tmp_path / name / "model-00001-of-00001.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_into_the_original(trained_adapter: tuple[Path, Path, Path], tmp_path: Path) -> None:
    report = merge(trained_adapter, tmp_path / "merged", base=0, into="original", dtype="fp32")
    adapted = peft.PeftModel.from_pretrained(load(trained_adapter[0]), trained_adapter[2])
    torch.testing.assert_close(logits(load(report.out)), logits(adapted), rtol=1e-5, atol=1e-5)
    base = (
        report.squared_trained - report.squared_updates
    )  # approximately, because a random update is orthogonal to the weights
    assert 0.05 < (report.squared_difference / base) ** 0.5 < 0.15  # the error of 4 bit before training


def test_into_nf4(trained_adapter: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Merging into nf4 equals quantizing the model that was merged in 16 bit."""
    report = merge(trained_adapter, tmp_path / "merged", base=1, into="nf4")
    merge(trained_adapter, tmp_path / "bf16", base=1)
    again = quantize_folder(tmp_path / "bf16", tmp_path / "again", QuantizeOptions()).out
    merged_tensors, quantized_tensors = (load_file(path / FILE) for path in (report.out, again))
    assert merged_tensors.keys() == quantized_tensors.keys()
    assert all(torch.equal(merged_tensors[name], quantized_tensors[name]) for name in merged_tensors)
    assert 0.05 < (report.squared_difference / report.squared_trained) ** 0.5 < 0.2


def test_into_nf4_with_error_feedback(tmp_path: Path) -> None:
    """Plain rounding loses a small update, and error feedback keeps it.

    Scales and matrices without an update do not change, and the result is deterministic.
    """
    torch.manual_seed(0)
    source = tiny_models.make_model(tmp_path / "source", hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    quantized = quantize_folder(source, tmp_path / "nf4", QuantizeOptions(block_size=64)).out
    adapter = make_adapter(load(quantized), tmp_path / "adapter", quantized, r=2, target_modules=["up_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: t * 0.1 for name, t in tensors.items()}, adapter / "adapter_model.safetensors")
    reports = {}
    for out, feedback in (("rounded", False), ("fed", True), ("again", True)):
        options = MergeOptions(into="nf4", error_feedback=feedback)
        reports[out] = merge_folder(quantized, adapter, tmp_path / out, options, QUIET)
    kept = {out: report.update_dot_product / report.squared_updates for out, report in reports.items()}
    assert abs(kept["rounded"]) < 0.2 and kept["fed"] == pytest.approx(1, abs=0.05)
    base, fed, again = (load_file(tmp_path / name / FILE) for name in ("nf4", "fed", "again"))
    assert all(torch.equal(fed[name], again[name]) for name in fed)
    changed = [name for name in base if not torch.equal(base[name], fed[name])]
    assert changed == ["model.layers.0.mlp.up_proj.weight"]
    assert (base[changed[0]] != fed[changed[0]]).float().mean() < 0.2


def test_files_respect_the_largest_size(trained_adapter: tuple[Path, Path, Path], tmp_path: Path) -> None:
    merge(trained_adapter, tmp_path / "merged", base=1, file_bytes=100_000, dtype="fp32")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 3
    load(tmp_path / "merged")


def copy_with_damage(folder: Path, out: Path, change: Any) -> Path:
    out.mkdir()
    (out / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, out / "adapter_model.safetensors")
    return out


Q = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [x.zero_() for name, x in t.items() if "lora_B" in name], "every B is zero"),
        (lambda t: t[Q + "lora_A.weight"].view(-1)[3].fill_(float("nan")), "not finite"),
        (lambda t: t.pop(Q + "lora_B.weight"), "q_proj lacks its lora_B"),
        (lambda t: t.update({Q + "lora_A.weight": torch.ones(3, 64)}), "for rank 4; export"),
        (lambda t: t.update({Q + "lora_A.weight": torch.ones(4, 32)}), "in the base; give the model"),
        (
            lambda t: t.update({"base_model.model.other.weight": torch.ones(3)}),
            "has other.weight, which the base lacks",
        ),
        (lambda t: t.update({Q + "lora_embedding_A": torch.ones(3)}), "has LoRA on an embedding"),
        (lambda t: t.update({Q + "lora_C": torch.ones(3)}), "only LoRA of linear layers and experts is"),
    ],
)
def test_a_damaged_adapter_is_refused(
    change: Any, message: str, trained_adapter: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    adapter = copy_with_damage(trained_adapter[2], tmp_path / "adapter", change)
    with pytest.raises(UserError, match=message) as error:
        merge_folder(trained_adapter[1], adapter, tmp_path / "out", MergeOptions(), QUIET)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("base", "into", "message"),
    [(0, "nf4", "is not in 4 bit; quantize it first"), (1, "original", "is in 4 bit; give the 16-bit model")],
)
def test_a_base_in_other_bits(
    base: int, into: str, message: str, trained_adapter: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        merge(trained_adapter, tmp_path / "out", base=base, into=into)
