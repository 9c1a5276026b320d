"""If this fails, a model that is accepted is not trained on its own loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_dist.config.config_file import load_config
from qlora_dist.config.sections import ModelConfig
from qlora_dist.errors import UserError
from qlora_dist.model.meta_model import build_meta_model
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from qlora_dist.runs.run_dir import run_path
from tests.helpers import tiny_models
from tests.helpers.architectures import ARCHITECTURES, dequantized_model, make_architecture
from tests.helpers.ranks import run_ranks
from tests.helpers.train_helpers import PROMPT, first_loss, losses, train_and_get_logits

STEPS = 2
SPARSE = ("Mixtral", "DeepseekV3", "GptOss")  # with a name per expert, with a dense layer too, with transposed experts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "experts"), [*((name, False) for name in ARCHITECTURES), *((name, True) for name in SPARSE)]
)
def test_an_architecture_trains_as_in_transformers(name: str, experts: bool, tmp_path: Path) -> None:
    source = make_architecture(tmp_path / "source", name)
    quantized = quantize_folder(source, tmp_path / "nf4", QuantizeOptions(min_share=0.95)).out
    path = tiny_models.make_config(tmp_path, quantized, train__steps=STEPS, optim__warmup_steps=0)
    packing = "none" if name in ("Falcon", "Bloom") else "best-fit"
    overrides = [f"data.packing={packing}", f"lora.experts={str(experts).lower()}"]
    configs = [load_config(path, [f"run.name={n}-ranks", f"train.micro_batch={12 // n}", *overrides]) for n in (1, 2)]
    one, two = (run_ranks(n, train_and_get_logits, config)[0] for n, config in enumerate(configs, 1))
    assert losses(configs[1]) == pytest.approx(losses(configs[0]), rel=1e-5)
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)

    # transformers' own forward pass gives the first loss, and PEFT with the adapter the last logits
    plain = dequantized_model(source, quantized)
    assert losses(configs[0])[0] == pytest.approx(first_loss(configs[0], plain), rel=1e-5)
    with torch.no_grad():
        base = plain(input_ids=PROMPT, use_cache=False).logits
        adapted = peft.PeftModel.from_pretrained(plain, run_path(configs[1].run) / "adapter").eval()
        logits = adapted(input_ids=PROMPT, use_cache=False).logits
    torch.testing.assert_close(torch.from_numpy(two), logits, rtol=1e-3, atol=1e-4)
    assert (logits - base).abs().max() > 20 * np.abs(one - two).max()  # the adapter matters


def test_fused_experts_of_a_folder_get_a_name_each(tmp_path: Path) -> None:
    source = make_architecture(tmp_path / "source", "GptOss")
    folder = ModelFolder(quantize_folder(source, tmp_path / "nf4", QuantizeOptions()).out)
    names = {f"model.layers.0.mlp.experts.{p}.{e}.weight" for p in ("gate_up_proj", "down_proj") for e in range(4)}
    assert names <= folder.quantized.keys()
    assert folder.quantized["model.layers.0.mlp.experts.gate_up_proj.0.weight"].layout.shape == (320, 64)
    assert len(load_file(source / "model.safetensors")["model.layers.0.mlp.experts.gate_up_proj"]) == 4


def test_a_bias_that_chooses_experts_is_not_rounded(tmp_path: Path) -> None:
    source = make_architecture(tmp_path / "source", "DeepseekV3")
    model = build_meta_model(ModelFolder(source), ModelConfig(base=str(source)))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert dict(model.named_buffers())[name].dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_buffer_that_the_folder_lacks(tmp_path: Path) -> None:
    source = make_architecture(tmp_path / "source", "DeepseekV3")
    tensors = load_file(source / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "e_score" not in name}, source / "model.safetensors")
    with pytest.raises(UserError, match=r"the weight .*e_score_correction_bias is missing"):
        build_meta_model(ModelFolder(source), ModelConfig(base=str(source)))


def test_experts_of_which_only_some_are_in_4_bit(tmp_path: Path) -> None:
    source = make_architecture(tmp_path / "source", "Mixtral")
    folder = quantize_folder(source, tmp_path / "nf4", QuantizeOptions()).out
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    key = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    for name in [name for name in tensors if name.startswith(key)]:
        del tensors[name]
    tensors[key] = load_file(source / "model.safetensors")[key]
    save_file(tensors, path)
    index = {"weight_map": dict.fromkeys(tensors, path.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"experts\.2\.w1\.weight is not quantized and others of its layer are"):
        build_meta_model(ModelFolder(folder), ModelConfig(base=str(folder)))
