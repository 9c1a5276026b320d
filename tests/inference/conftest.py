"""A small model in 4 bit, and adapters of it that PEFT itself has written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit

from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from tests.helpers import tiny_models


class TinyModels(NamedTuple):
    source: Path
    """Folder of the model in fp32."""
    base: Path
    """Folder of the model in 4 bit."""
    first_adapter: Path
    second_adapter: Path


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Widths are multiples of the block size: elsewhere bitsandbytes misreads absmax on AVX512."""
    folder = tmp_path_factory.mktemp("inference")
    source = tiny_models.make_model(folder / "source", dtype=torch.float32, intermediate_size=192)
    base = quantize_folder(source, folder / "nf4", QuantizeOptions()).out
    one = random_adapter(folder / "one", base, seed=1, target_modules="all-linear")
    two = random_adapter(folder / "two", base, seed=2, r=2, target_modules=["q_proj", "o_proj"], use_rslora=True)
    return TinyModels(source, base, one, two)


def load_plain(base: Path) -> Any:
    """Load a model with transformers and bitsandbytes alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # in eval mode on AVX512-BF16 bitsandbytes re-packs the weight in place and rounds its scales to bf16
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = torch.float32
    return model.eval()


def random_adapter(out: Path, base: Path, seed: int, **settings: Any) -> Path:
    """Write an adapter whose every value is random."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **({"r": 4} | settings))
    model = peft.get_peft_model(load_plain(base), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2) if parameter.dim() > 1 else parameter.mul_(1.5)
            elif "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="session", name="plain_model")
def plain_model_fixture() -> Callable[[Path], Any]:
    return load_plain


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Path]:
    return random_adapter
