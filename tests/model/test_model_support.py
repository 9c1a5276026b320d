"""If this fails, a model is quantized for hours that cannot be trained, or is trained on a wrong loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qlora_dist.errors import UserError
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions

_SMALL = {"vocab_size": 320, "hidden_size": 64, "d_model": 64, "num_attention_heads": 4, "intermediate_size": 128}
REFUSED = {
    "bart": ({"encoder_layers": 1, "decoder_layers": 1}, "attends to the states of an encoder"),
    "bert-generation": ({"is_decoder": True}, "adds a bias to an output head that is tied to the input embedding"),
    "reformer": (
        {"is_decoder": True, "attn_layers": ["local"], "attention_head_size": 16, "axial_pos_embds_dim": [32, 32]},
        "takes only sequences of the length that axial_pos_shape gives",
    ),
    "rwkv": ({"num_hidden_layers": 1}, "changes the weight of rwkv.blocks.0.attention.output while it computes"),
    "xlnet": ({"n_layer": 1, "n_head": 4}, "lets a position see later ones"),
    "zamba": (
        {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
        "shares one weight between model.layers.2.shared_transf",
    ),
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_an_unsupported_class_is_refused_before_anything_is_written(
    kind: str, tiny_llama: Path, tmp_path: Path
) -> None:
    settings, message = REFUSED[kind]
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    (source / "config.json").write_text(json.dumps({"model_type": kind} | _SMALL | settings))
    with pytest.raises(UserError) as caught:
        quantize_folder(source, tmp_path / "out", QuantizeOptions())
    assert f"a model of type {kind} {message}" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
