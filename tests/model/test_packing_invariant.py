"""If this fails, packing sequences into rows changes their loss or gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from qlora_dist.adapters.attach import attach_adapter, make_peft_config, named_trainable_parameters
from qlora_dist.config.sections import LoraConfig, ModelConfig
from qlora_dist.model.adapter_init import init_adapter
from qlora_dist.model.attention import PACKED_ATTENTION, PACKED_FLEX_ATTENTION
from qlora_dist.model.load_weights import load_weights
from qlora_dist.model.meta_model import build_meta_model
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from tests.helpers.architectures import make_architecture

LENGTHS = [[30, 7, 1, 19], [41, 16]]
"""Lengths of the sequences in each row. The rest of SEQ_LEN is padding."""
SEQ_LEN = 64
WINDOW = 12
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": WINDOW},
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},  # only in the second layer
    "Gemma2": {"sliding_window": WINDOW},  # in every other layer, with soft caps
    "GptOss": {"sliding_window": WINDOW},  # in every other layer, with sinks
    "StableLm": {},  # its attention does not take starts
}
CASES = [
    *((name, attention) for name in ("Llama", "Mistral", "Qwen2", "Gemma2") for attention in ("eager", "sdpa", "flex")),
    *((name, "masks") for name in ("Llama", "Mistral", "Qwen2", "StableLm")),
    *(("GptOss", attention) for attention in ("sdpa", "flex")),  # transformers' masks mix its sequences
]
IMPLEMENTATION = {"eager": "eager", "masks": "sdpa", "sdpa": PACKED_ATTENTION, "flex": PACKED_FLEX_ATTENTION}
"""Attention implementations. `masks` is transformers' own SDPA, for models whose attention takes no starts."""
SLIDING_WINDOW_CASES = [case for case in CASES if "sliding_window" in MODELS[case[0]]]
Build = Callable[..., PreTrainedModel]
Sequences = list[list[torch.Tensor]]


def each_of(cases: list[tuple[str, str]]) -> pytest.MarkDecorator:
    slow = ("Qwen2", "GptOss", "StableLm")
    params = [pytest.param(*case, marks=[pytest.mark.slow] if case[0] in slow else []) for case in cases]
    return pytest.mark.parametrize(("name", "attention"), params)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return a function that builds a 4-bit model with adapters on all layers."""

    @cache
    def loaded_model(name: str, window: int) -> PreTrainedModel:
        settings = {key: window if key == "sliding_window" else value for key, value in MODELS[name].items()}
        path = make_architecture(tmp_path_factory.mktemp("model"), name, num_hidden_layers=2, **settings)
        folder = ModelFolder(path)
        model = build_meta_model(folder, ModelConfig(base=str(folder.path), compute_dtype="fp32"))
        attach_adapter(model, make_peft_config(model, LoraConfig(r=4, alpha=8, dropout=0.0), str(folder.path)))
        with process_group(read_rank_info({}), torch.device("cpu")):
            load_weights(model, folder, torch.device("cpu"))
            init_adapter(model, seed=0)
        torch.manual_seed(1)
        for parameter_name, parameter in named_trainable_parameters(model):
            if "lora_B" in parameter_name:  # A has no gradient while B is zero
                parameter.data.normal_(std=0.05)
        return model

    def model(name: str, attention: str, window: int = WINDOW) -> PreTrainedModel:
        result = loaded_model(name, window)
        result.set_attn_implementation(IMPLEMENTATION[attention])
        return result

    return model


def sequences() -> Sequences:
    torch.manual_seed(2)
    return [[torch.randint(3, 300, (n,)) for n in row] for row in LENGTHS]


def batch(rows: Sequences, seq_len: int = SEQ_LEN) -> dict[str, torch.Tensor]:
    """Collate rows as the dataloader does."""
    shape = (len(rows), seq_len)
    ids, labels, positions = (torch.full(shape, value) for value in (2, -100, 0))
    for index, row in enumerate(rows):
        start = 0
        for sequence in [*row, ids.new_full((seq_len - sum(map(len, row)),), 2)]:
            end = start + len(sequence)
            ids[index, start:end], positions[index, start:end] = sequence, torch.arange(len(sequence))
            if end < seq_len or sequence is row[-1]:
                labels[index, start : end - 1] = sequence[1:]
            start = end
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def loss_and_gradients(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> tuple[float, list[Any]]:
    """Return loss and gradients, summed over all labels of all batches."""
    model.zero_grad()
    total = 0.0
    for inputs in batches:
        loss = model(**inputs)
        loss.backward()
        total += loss.double().item()
    return total, [p.grad.clone() for _, p in named_trainable_parameters(model)]


@each_of(CASES)
def test_packed_rows_give_the_loss_and_the_gradients_of_their_sequences(
    name: str, attention: str, build: Build
) -> None:
    model, rows = build(name, attention), sequences()
    alone = [batch([[sequence]], len(sequence)) for row in rows for sequence in row if len(sequence) > 1]
    loss, gradients = loss_and_gradients(model, [batch(rows)])
    expected, expected_gradients = loss_and_gradients(model, alone)
    assert loss == pytest.approx(expected, rel=1e-5)
    for actual, reference in zip(gradients, expected_gradients, strict=True):
        assert (actual - reference).norm() <= 1e-5 * reference.norm()


@each_of(CASES)
def test_a_sequence_does_not_see_its_neighbours(name: str, attention: str, build: Build) -> None:
    model, inputs = build(name, attention), batch(sequences())
    first, end = LENGTHS[0][0], sum(LENGTHS[0][:2])
    other = inputs["input_ids"].clone()
    other[0, first:end] = torch.randint(3, 300, (end - first,))
    other[:, sum(LENGTHS[0]) :] = 7  # the padding's too
    labels = inputs["labels"].clone()
    labels[0, first:end] = -100  # its neighbours' remain

    def change(**others: torch.Tensor) -> float:
        """Return the relative change of the loss with other tokens."""
        with torch.no_grad():
            before, after = (model(**inputs | others | {"input_ids": i}) for i in (inputs["input_ids"], other))
        return abs(after.item() / before.item() - 1)

    assert change(labels=labels) < 1e-6
    assert change() > 1e-4
    one_sequence = torch.arange(SEQ_LEN).repeat(len(LENGTHS), 1)
    assert change(labels=labels, position_ids=one_sequence) > 1e-4  # one sequence sees them


@each_of(SLIDING_WINDOW_CASES)
def test_a_window_changes_only_longer_sequences(name: str, attention: str, build: Build) -> None:
    long = batch(sequences())
    short = batch([[sequence[:WINDOW] for sequence in row] for row in sequences()])
    windowed, without = (
        [build(name, attention, window)(**inputs).item() for inputs in (long, short)] for window in (WINDOW, SEQ_LEN)
    )
    assert abs(windowed[0] / without[0] - 1) > 1e-5
    assert windowed[1] == pytest.approx(without[1], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "attention", "chosen"),
    [
        ("Llama", "sdpa", "sdpa"),
        ("Llama", "flex", "flex"),
        ("Llama", "eager", "eager"),
        ("Gemma2", "sdpa", "sdpa"),
        ("Gemma2", "flex", "flex"),
        ("StableLm", "sdpa", "masks"),
    ],
)
def test_the_configuration_selects_the_attention(name: str, attention: Any, chosen: str, tmp_path: Path) -> None:
    folder = make_architecture(tmp_path, name)
    model = build_meta_model(ModelFolder(folder), ModelConfig(base=str(folder), attention=attention))
    assert model.config._attn_implementation == IMPLEMENTATION[chosen]
