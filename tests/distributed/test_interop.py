"""If this fails, transformers, PEFT and bitsandbytes do not compute what was trained here."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit

from qlora_dist.adapters.attach import init_lora_weight
from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.runs.run_dir import run_path
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.train.run_setup import set_up_run
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks
from tests.helpers.train_helpers import PROMPT, losses, plain_losses, train_and_get_logits


def train_reference(config: Config, steps: int) -> list[float]:
    """Repeat the run in one process: transformers' 4-bit model, PEFT's LoRA, full logits, torch's AdamW."""
    setup = set_up_run(config, read_rank_info({}))
    model = plain_model(Path(config.model.base))
    model = peft.get_peft_model(model, peft_like(setup.adapter))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                value = init_lora_weight(name.removeprefix("base_model.model."), parameter.shape, config.train.seed)
                if value is not None:
                    parameter.data = value
    return plain_losses(model.train(), config, steps)


def plain_model(folder: Path) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linears = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(linears) == 21
    for module in linears:
        # In eval mode on AVX512-BF16 bitsandbytes re-packs the weight in place and rounds its scales to bf16.
        module.support_avx512bf16_for_cpu = False
        module.compute_dtype = torch.float32
    return model


def peft_like(config: peft.LoraConfig) -> peft.LoraConfig:
    """Return PEFT's configuration without this package's layer."""
    fields = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "task_type")
    return peft.LoraConfig(**{field: getattr(config, field) for field in fields})


@pytest.fixture(scope="module")
def fp32_nf4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a 4-bit folder with widths that bitsandbytes reads correctly on AVX512: multiples of the block size."""
    from qlora_dist.model.quantize_folder import quantize_folder
    from qlora_dist.model.quantize_plan import QuantizeOptions

    folder = tmp_path_factory.mktemp("interop")
    source = tiny_models.make_model(folder / "source", dtype=torch.float32, intermediate_size=192, head_dim=16)
    return quantize_folder(source, folder / "nf4", QuantizeOptions()).out


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_losses_adapter_and_logits_equal_transformers_and_peft(variant: str, fp32_nf4: Path, tmp_path: Path) -> None:
    flags = [] if variant == "lora" else [f"lora.{variant}=true"]
    config = load_config(
        tiny_models.make_config(tmp_path, fp32_nf4, train__steps=6),
        ["optim.schedule=constant", "optim.warmup_steps=0", *flags],
    )
    results = [torch.from_numpy(logits) for logits in run_ranks(2, train_and_get_logits, config)]
    folder = run_path(config.run)

    # PEFT loads the adapter on the model from transformers
    model = peft.PeftModel.from_pretrained(plain_model(fp32_nf4), folder / "adapter")
    model.eval()
    with torch.no_grad():
        peft_logits = model(input_ids=PROMPT, use_cache=False).logits
        with model.disable_adapter():
            base = model(input_ids=PROMPT, use_cache=False).logits
    for ours in results:
        torch.testing.assert_close(ours, peft_logits, rtol=1e-4, atol=1e-5)
    assert (peft_logits - base).abs().max() > 100 * (peft_logits - results[0]).abs().max()  # the adapter matters

    # DoRA's magnitudes start as row norms, which PEFT computes in another order
    tolerance = 1e-4 if variant == "dora" else 1e-5
    assert losses(config) == pytest.approx(train_reference(config, 6), rel=tolerance)


def test_an_adapter_folder_names_its_base_and_targets(fp32_nf4: Path, tmp_path: Path) -> None:
    config = load_config(
        tiny_models.make_config(tmp_path, fp32_nf4, train__steps=2), ["lora.targets=[q_proj,v_proj]", "lora.r=3"]
    )
    run_ranks(1, train_and_get_logits, config)
    loaded = peft.PeftConfig.from_pretrained(run_path(config.run) / "adapter")
    assert loaded.base_model_name_or_path == str(fp32_nf4)
    assert loaded.target_modules == {"q_proj", "v_proj"}
    assert (loaded.r, loaded.lora_alpha, loaded.task_type) == (3, 8, "CAUSAL_LM")
