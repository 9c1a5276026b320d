"""If this fails, the planner accepts runs that do not fit, or it omits a term."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.config.schema import Config
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.plan.memory_estimate import estimate_memory, optimizer_state_bytes
from qlora_dist.plan.model_config import read_model_config
from qlora_dist.plan.run_spec import RunSpec, make_run_spec

GIB = 2**30


def make_bundled_run_spec(model: str, world_size: int = 8, nodes: int = 1, **keys: Any) -> RunSpec:
    tree: dict[str, dict[str, Any]] = {"model": {"base": model}, "lora": {"dropout": 0.0}, "data": {"train": ["data"]}}
    for key, value in keys.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    train = tree.setdefault("train", {})
    train.setdefault("global_batch", world_size * train.get("micro_batch", 1))
    return make_run_spec(Config.model_validate(tree), read_model_config(model), world_size, nodes)


def test_llama_405b_by_hand() -> None:
    """Check 25.1 GiB of shards, 126 inputs of 64 MiB, the head and its buffer, and the last layer's buffer."""
    memory = estimate_memory(make_bundled_run_spec("llama-3.1-405b", lora__r=16))
    hidden, intermediate, kv = 16384, 53248, 1024
    shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), *[(intermediate, hidden)] * 2]
    packed = 126 * sum(NF4Layout(shape=shape).total_bytes for shape in [*shapes, (hidden, intermediate)])
    assert memory.static["base"] == packed // 8
    assert memory.peak_phase == "head"
    terms = memory.phases["head"]
    assert terms["checkpointed inputs"] == 126 * 2048 * hidden * 2
    head = 2 * 128256 * hidden
    assert terms["gathered"] == pytest.approx(2 * head + packed / 126, rel=0.05)
    assert memory.peak_bytes == memory.static_bytes + sum(terms.values())
    assert not memory.fits(40 * GIB) and memory.fits(79 * GIB)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["llama-3.2-1b", "qwen3-4b", "gemma-2-2b", "mixtral-8x7b", "deepseek-v3"]),
    st.sampled_from([1, 2, 8]),
    st.integers(1, 4),
    st.sampled_from([512, 4096]),
)
def test_more_ranks_hold_less_and_more_tokens_need_more(model: str, ranks: int, rows: int, length: int) -> None:
    run = make_bundled_run_spec(model, ranks, parallel__base="world", train__micro_batch=rows, data__seq_len=length)
    more_ranks = make_bundled_run_spec(
        model, 2 * ranks, parallel__base="world", train__micro_batch=rows, data__seq_len=length
    )
    assert estimate_memory(more_ranks).static_bytes < estimate_memory(run).static_bytes
    for longer in (replace(run, seq_len=2 * length), replace(run, micro_batch=2 * rows)):
        assert estimate_memory(longer).peak_bytes > estimate_memory(run).peak_bytes
    if length == 4096:
        assert estimate_memory(replace(run, checkpointing=0)).peak_bytes > estimate_memory(run).peak_bytes


def test_offloaded_and_paged_parts_are_on_the_host() -> None:
    run = make_bundled_run_spec("llama-3.1-70b")
    on_device, offloaded = estimate_memory(run), estimate_memory(replace(run, offload=True))
    assert offloaded.on_host == on_device.static["base"] + on_device.static["embeddings and norms"]
    assert offloaded.static_bytes == on_device.static_bytes - offloaded.on_host
    paged = estimate_memory(replace(run, is_base_paged=True, base_resident_bytes=2 * GIB))
    layer_bytes = on_device.static["base"] / 80
    assert layer_bytes < 2 * GIB - paged.static["base"] + layer_bytes
    assert paged.static["base"] <= 2 * GIB < on_device.static["base"] <= paged.on_host


def test_paged_moments_make_room_for_the_rest() -> None:
    run = make_bundled_run_spec("llama-2-70b", 1, lora__r=64, data__seq_len=4096)
    whole = optimizer_state_bytes(run)
    assert estimate_memory(run).static["moments"] == estimate_memory(run, 200 * GIB).static["moments"] == whole
    squeezed = estimate_memory(run, 48 * GIB)
    assert squeezed.static["moments"] == 2 * run.page_bytes
    assert squeezed.paged_moments == whole - 2 * run.page_bytes
    assert estimate_memory(replace(run, optimizer_resident_bytes=GIB)).static["moments"] == pytest.approx(GIB, rel=0.02)
    assert optimizer_state_bytes(replace(run, optimizer_bits=8)) == pytest.approx(whole / 4, rel=0.02)


def test_double_quantization_of_a_quantized_folder_follows_its_config_json() -> None:
    config = Config.model_validate({"model": {"base": "model"}, "data": {"train": ["data"]}})
    shape = read_model_config("llama-2-7b")
    quantized = {**shape, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    bits = {
        name: 8
        * estimate_memory(make_run_spec(config, tree, 1)).static["base"]
        / (32 * (4 * 4096**2 + 3 * 4096 * 11008))
        for name, tree in (("double", shape), ("plain", quantized))
    }
    assert bits == pytest.approx({"double": 4.127, "plain": 4.5}, abs=1e-3)
