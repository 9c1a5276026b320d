"""If this fails, `quantize` writes a wrong model, transformers cannot load it, or an interrupted run starts anew."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_dist.adapters.attach import has_tied_head
from qlora_dist.config.sections import ModelConfig
from qlora_dist.errors import UserError
from qlora_dist.io import read_ahead
from qlora_dist.io.safetensors_file import SafetensorsReader, SafetensorsWriter, read_safetensors_header
from qlora_dist.model import quantizable, quantize_plan
from qlora_dist.model.meta_model import build_meta_model
from qlora_dist.model.model_class import whole_model_on_meta
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantize_folder import print_quantize_report, quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions, parse_quantize_options, parse_size
from qlora_dist.nf4.quantize import dequantize_weight, quantize_weight
from tests.helpers import tiny_models
from tests.helpers.architectures import make_architecture
from tests.helpers.ranks import run_ranks
from tests.helpers.sweep_folder import SweepFolder

ONE_FILE_PER_TENSOR = QuantizeOptions(file_bytes=1)

# in_features a multiple of the block size everywhere: elsewhere bitsandbytes' own forward errs on AVX512
ARCHITECTURES = [
    pytest.param("Llama", {"intermediate_size": 192}, id="Llama"),
    pytest.param("Llama", {"intermediate_size": 192, "tie_word_embeddings": True}, id="Llama-tied"),
    pytest.param("Qwen2", {"intermediate_size": 192}, id="Qwen2"),
    pytest.param("Qwen3", {"intermediate_size": 192, "tie_word_embeddings": True}, id="Qwen3-tied"),
    pytest.param("Mistral", {"intermediate_size": 192}, id="Mistral"),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def dequantized_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the dequantized weights of a 4-bit folder, as training reads them."""
    weights = {}
    with SafetensorsReader() as reader:
        for name, entry in ModelFolder(folder).quantized.items():
            packed = torch.empty(entry.layout.total_bytes, dtype=torch.uint8)
            entry.read_range(reader, packed, 0)
            weights[name] = dequantize_weight(packed, entry.layout, torch.bfloat16)
    return weights


@pytest.mark.parametrize(("arch", "config"), ARCHITECTURES)
def test_plain_transformers_loads_the_same_model(tmp_path, arch, config):
    source = tiny_models.make_model(tmp_path / "source", arch, **config)
    out = tmp_path / "out"
    report = quantize_folder(source, out, QuantizeOptions())

    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    layers = {name: m for name, m in loaded.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    weights = dequantized_weights(out)
    assert {f"{name}.weight" for name in layers} == weights.keys()
    assert len(layers) == 3 * 7

    original = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert report.counts.parameters == original.num_parameters()
    assert report.counts.quantized == sum(weight.numel() for weight in weights.values())
    expected = copy.deepcopy(original)
    for name, layer in layers.items():
        packed, layout = quantize_weight(original.get_parameter(f"{name}.weight").detach())
        weight = dequantize_weight(packed, layout, torch.bfloat16)
        assert torch.equal(weights[f"{name}.weight"], weight)
        assert torch.equal(bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state), weight)
        expected.get_submodule(name).weight = nn.Parameter(weight)
    for name, parameter in loaded.named_parameters():
        if not isinstance(parameter, bnb.nn.Params4bit):
            assert torch.equal(parameter, original.get_parameter(name)), name

    tokens = torch.arange(3, 43).view(2, 20)
    assert torch.equal(loaded.train()(tokens).logits, expected.train()(tokens).logits)


def test_a_weight_that_ends_within_a_block(tiny_llama, tiny_llama_nf4):
    # down_proj has 176 columns, for which bitsandbytes' kernel reads the wrong absmax
    weights = dequantized_weights(tiny_llama_nf4)
    with SafetensorsReader() as reader:
        for name, entry in ModelFolder(tiny_llama).entries.items():
            if name in weights:
                packed, layout = quantize_weight(reader.read(entry))
                assert torch.equal(weights[name], dequantize_weight(packed, layout, torch.bfloat16))
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (64, 176)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (QuantizeOptions(quant_type="fp4", block_size=128, double_quant=False), ("fp4", 128, False)),
        (QuantizeOptions(block_size=32), ("nf4", 32, True)),
    ],
)
def test_options_apply_to_every_weight_and_to_the_configuration(tiny_llama, tmp_path, options, expected):
    out = tmp_path / "out"
    quantize_folder(tiny_llama, out, options)
    layouts = [entry.layout for entry in ModelFolder(out).quantized.values()]
    assert {(layout.quant_type, layout.block_size, layout.double_quant) for layout in layouts} == {expected}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == (expected[0], expected[2])
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert (weight.quant_state.quant_type, weight.quant_state.blocksize) == expected[:2]


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_quantized_once_if_tied(tmp_path, tied):
    source = tiny_models.make_model(tmp_path / "source", tie_word_embeddings=tied)
    without = quantize_folder(source, tmp_path / "without", QuantizeOptions()).counts
    counts = quantize_folder(source, tmp_path / "out", QuantizeOptions(embeddings=True)).counts
    actual, original = dequantized_weights(tmp_path / "out"), ModelFolder(source).entries
    quantizable = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert actual.keys() - dequantized_weights(tmp_path / "without").keys() == quantizable
    with SafetensorsReader() as reader:
        for name in quantizable:
            packed, layout = quantize_weight(reader.read(original[name]))
            assert torch.equal(actual[name], dequantize_weight(packed, layout, torch.bfloat16))

    embedding_parameters = len(quantizable) * 320 * 64
    assert counts.parameters == without.parameters
    assert counts.quantized == without.quantized + embedding_parameters
    assert (counts.unquantized_embeddings, without.unquantized_embeddings) == (0, embedding_parameters)
    assert counts.quantized_share == counts.quantized / counts.parameters > without.quantized_share > 0.99
    assert not quantizable & counts.unquantized.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == (["lm_head"] if tied else [])


def test_embeddings_of_positions_stay_and_count_as_unquantized(tmp_path):
    source = make_architecture(tmp_path / "source", "GPT2")
    counts = quantize_folder(source, tmp_path / "out", QuantizeOptions(embeddings=True)).counts
    assert counts.unquantized_embeddings == 512 * 64
    assert counts.unquantized["transformer.wpe.weight"] == 512 * 64
    assert "transformer.wte.weight" not in counts.unquantized
    assert counts.quantized_share == counts.quantized / (counts.parameters - 512 * 64)


def test_an_embedding_that_cannot_be_in_4_bit_is_refused_before_anything_is_written(tiny_llama, tmp_path, monkeypatch):
    class NormalizedEmbedding(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.embedding(ids, self.weight / self.weight.norm())

    def with_another_class(*args: object) -> transformers.PreTrainedModel:
        model = whole_model_on_meta(*args)
        model.get_input_embeddings().__class__ = NormalizedEmbedding
        return model

    monkeypatch.setattr(quantize_plan, "whole_model_on_meta", with_another_class)
    with pytest.raises(UserError, match="NormalizedEmbedding: this class computes with its weight itself"):
        quantize_folder(tiny_llama, tmp_path / "out", QuantizeOptions(embeddings=True))
    assert not list(tmp_path.iterdir())


def test_experts_that_would_stay_in_16_bit_are_refused(tmp_path, monkeypatch):
    source = make_architecture(tmp_path / "source", "Mixtral")
    monkeypatch.setattr(quantizable, "is_moe_experts", lambda module: False)  # an unknown architecture
    message = r"only \d+\.\d % of the parameters .* others: model\.layers\.\*\.block_sparse_moe\.experts\.\*\.w\d"
    with pytest.raises(UserError, match=message):
        quantize_folder(source, tmp_path / "out", QuantizeOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    counts = quantize_folder(source, tmp_path / "out", QuantizeOptions(min_share=0.0)).counts
    assert 0.05 < counts.quantized_share < 0.5


def test_fp32_and_fp16_sources_keep_their_type_in_the_layout(tmp_path):
    for dtype in (torch.float32, torch.float16):
        source = tiny_models.make_model(tmp_path / f"{dtype}", dtype=dtype, num_hidden_layers=1)
        out = tmp_path / f"{dtype}-4bit"
        quantize_folder(source, out, QuantizeOptions())
        layouts = {entry.layout.dtype for entry in ModelFolder(out).quantized.values()}
        assert layouts == {str(dtype).removeprefix("torch.")}


def test_files_of_source_and_result_are_independent(tiny_llama, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    results = {}
    for name, source, file_bytes in (
        ("one", tiny_llama, 10**9),
        ("many", tiny_llama, 20_000),
        ("again", tmp_path / "source", 20_000),
    ):
        out = tmp_path / name
        quantize_folder(source, out, QuantizeOptions(file_bytes=file_bytes))
        files = sorted(out.glob("*.safetensors"))
        largest = 40_960 + 1000  # the embedding has its own file
        assert all(path.stat().st_size < largest for path in files) or name == "one"
        assert len(files) == 1 if name == "one" else len(files) > 3
        results[name] = dequantized_weights(out)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {path.name for path in files}
        transformers.AutoModelForCausalLM.from_pretrained(out)
    for weights in results.values():
        assert weights.keys() == results["one"].keys()
        assert all(torch.equal(weight, results["one"][name]) for name, weight in weights.items())


def test_chunks_of_tensors_make_the_same_files(tiny_llama, tmp_path, monkeypatch):
    quantize_folder(tiny_llama, tmp_path / "whole", QuantizeOptions())
    monkeypatch.setattr(read_ahead, "READ_CHUNK_BYTES", 2**13)  # 4096 weights, the largest block
    report = quantize_folder(tiny_llama, tmp_path / "pieces", QuantizeOptions())
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")
    assert report.read_bytes == 2 * report.counts.parameters
    assert 0 < report.wait_s < report.seconds


def test_only_the_tokenizer_is_copied_with_the_model(tiny_llama, tmp_path):
    source = tmp_path / "source"
    quantize_folder(tiny_llama, source, QuantizeOptions())  # a copy to put more into
    (source / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    for path in source.glob("model*"):
        path.unlink()
    (source / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes())
    (source / "LICENSE").write_text("free")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    (source / "optimizer.bin").write_bytes(b"pickle")
    out = tmp_path / "out"
    quantize_folder(source, out, QuantizeOptions())
    names = set(contents(out))
    assert {"LICENSE", "tokenizer.json", "tokenizer_config.json", "config.json"} <= names
    assert not {"modeling_evil.py", "optimizer.bin", "model.safetensors", "quantize-plan.json"} & names
    copied, source_tokenizer = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (out, tiny_llama))
    assert copied.chat_template == source_tokenizer.chat_template
    assert copied("hello world").input_ids == source_tokenizer("hello world").input_ids


def quantize_until_killed(source: Path, out: Path) -> None:
    """Quantize until SIGKILL, which this process gets once six files are complete."""
    partial = out.with_name(f"{out.name}.partial")

    def watch() -> None:
        while len(list(partial.glob("*.safetensors"))) < 6:
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    quantize_folder(source, out, ONE_FILE_PER_TENSOR)


@pytest.fixture
def killed(tiny_llama: Path, tmp_path: Path) -> Path:
    """Kill a run and return the path of its result."""
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=quantize_until_killed, args=(tiny_llama, out))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists(), "an incomplete result has the final name"
    return out


def test_a_killed_run_resumes(tiny_llama, tmp_path, killed):
    done = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out.partial/*.safetensors")}
    assert 6 <= len(done) < len(ModelFolder(tiny_llama).entries)
    quantize_folder(tiny_llama, killed, ONE_FILE_PER_TENSOR)
    assert {name: (killed / name).stat().st_mtime_ns for name in done} == done, "finished files were written again"
    assert not (tmp_path / "out.partial").exists()

    quantize_folder(tiny_llama, tmp_path / "uninterrupted", ONE_FILE_PER_TENSOR)
    assert contents(killed) == contents(tmp_path / "uninterrupted")


def test_progress_resumes_and_reaches_the_end(tiny_llama, killed):
    """Bytes of an earlier run must not count as speed, or the estimate of the remaining time would be too short."""
    done = {
        name for file in killed.with_name("out.partial").glob("*.safetensors") for name in read_safetensors_header(file)
    }
    entries = ModelFolder(tiny_llama).entries
    total = sum(entry.nbytes for entry in entries.values())
    left = sum(entry.nbytes for name, entry in entries.items() if name not in done)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    report = quantize_folder(tiny_llama, killed, ONE_FILE_PER_TENSOR, console)
    assert report.read_bytes == left < total
    assert f"{total / 1000:.1f}/{total / 1000:.1f} kB" in console.file.getvalue()


@pytest.mark.parametrize("change", ["options", "source"])
def test_files_of_a_killed_run_are_not_used_for_another_plan(tiny_llama, tmp_path, killed, change):
    options = QuantizeOptions(block_size=128, file_bytes=1) if change == "options" else ONE_FILE_PER_TENSOR
    source = tiny_llama
    if change == "source":
        source = tiny_models.make_model(tmp_path / "other", initializer_range=0.1)
    quantize_folder(source, killed, options)
    quantize_folder(source, tmp_path / "fresh", options)
    assert contents(killed) == contents(tmp_path / "fresh")


def test_a_truncated_source_is_refused_before_anything_is_written(tmp_path):
    tiny_models.make_model(tmp_path / "source", num_hidden_layers=1)
    file = tmp_path / "source" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="is truncated"):
        quantize_folder(tmp_path / "source", tmp_path / "out", QuantizeOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_with_a_missing_weight_is_refused(tmp_path, tiny_llama):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    folder = ModelFolder(tiny_llama)
    left_out = "model.layers.1.mlp.up_proj.weight"
    names = [name for name in folder.entries if name != left_out]
    writer = SafetensorsWriter(
        source / "model.safetensors", [(n, folder.entries[n].dtype, folder.entries[n].shape) for n in names]
    )
    with SafetensorsReader() as reader:
        for name in names:
            writer.write(name, reader.read(folder.entries[name]))
    writer.close()
    with pytest.raises(UserError, match=f"{left_out} is missing"):
        quantize_folder(source, tmp_path / "out", QuantizeOptions())


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("500MB", 500_000_000),
        ("1.5g", 1_500_000_000),
        ("64kB", 64_000),
        (" 5 GB ", 5_000_000_000),
        ("7", 7),
    ],
)
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5TB", "5 apples", "1e9", "0.0001"])
def test_parse_size_refuses(text):
    with pytest.raises(UserError, match="--file-size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "int4"}, "--quant-type int4: choose nf4 or fp4"),
        ({"block_size": 100}, "--block-size 100: choose one of 32, 64"),
        ({"device": "tpu"}, "--device tpu"),
        ({"file_size": "big"}, "--file-size big"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    valid = {"quant_type": "nf4", "block_size": 64, "double_quant": True, "device": "cpu", "file_size": "5GB"}
    assert parse_quantize_options(**valid) == QuantizeOptions()
    with pytest.raises(UserError, match=message):
        parse_quantize_options(**(valid | options))


def peak_bytes(*folders: Path) -> int:
    """Return the peak memory of this process while it quantizes."""
    gc.freeze()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    for source, out in zip(folders[::2], folders[1::2], strict=True):
        quantize_folder(source, out, QuantizeOptions())
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_bounded_by_the_largest_tensor(tiny_llama, tmp_path):
    # nine matrices of 64 MiB
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=8192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
    )
    config.architectures = ["LlamaForCausalLM"]
    source = tmp_path / "source"
    config.save_pretrained(source)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    writer = SafetensorsWriter(
        source / "model.safetensors", [(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    )
    values = torch.randn(4096 * 8192).bfloat16()
    for name, shape in shapes.items():
        writer.write(name, values[: torch.Size(shape).numel()])
    writer.close()

    del values
    (baseline,) = run_ranks(1, peak_bytes, tiny_llama, tmp_path / "tiny")
    (peak,) = run_ranks(1, peak_bytes, tiny_llama, tmp_path / "tiny-again", source, tmp_path / "out")
    largest, constant = 2 * 4096 * 8192, 80 * 2**20
    assert peak - baseline < 1.5 * largest + constant
    assert (source / "model.safetensors").stat().st_size > 2 * (1.5 * largest + constant), (
        "the model is too small for this test"
    )


def test_a_run_resumes_after_a_file_could_not_be_written(tiny_llama: Path, tmp_path: Path) -> None:
    """Writes beyond 50 kB fail (EFBIG), as on a full disk. Then there is room again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"nf4\.partial: cannot be written \(File too large\); mend that and run again"
        ):
            quantize_folder(tiny_llama, tmp_path / "nf4", QuantizeOptions())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "nf4").exists()
    assert quantize_folder(tiny_llama, tmp_path / "nf4", QuantizeOptions()).out.is_dir()


def change_tensors(source: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


UNTRAINABLE = {
    "no head": (False, lambda t: t.pop("lm_head.weight"), "the weight lm_head.weight is missing"),
    "no embedding": (
        True,
        lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}),
        "the weight model.embed_tokens.weight is missing",
    ),
    "another vocabulary": (
        True,
        lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:300].clone()}),
        "model.embed_tokens.weight has the shape (300, 64) and config.json asks for (320, 64)",
    ),
    "an unsupported format": (
        True,
        lambda t: t.update({"model.norm.weight_blocks": t.pop("model.norm.weight")}),
        "the weight model.norm.weight is missing; model.norm.weight_blocks is there, which has an unsupported format",
    ),
}


@pytest.mark.parametrize("damage", list(UNTRAINABLE))
def test_a_model_that_training_would_refuse_is_refused_before_anything_is_written(damage, tmp_path):
    tied, change, message = UNTRAINABLE[damage]
    source = tiny_models.make_model(tmp_path / "source", tie_word_embeddings=tied)
    change_tensors(source, change)
    with pytest.raises(UserError) as caught:
        quantize_folder(source, tmp_path / "out", QuantizeOptions())
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("quantized", [True, False])
def test_a_stored_head_that_differs_from_a_tied_embedding_is_used(tmp_path, quantized):
    source = tiny_models.make_model(tmp_path / "source", tie_word_embeddings=True)
    head = torch.randn(320, 64).bfloat16()
    change_tensors(source, lambda t: t.update({"lm_head.weight": head}))
    plain = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(plain.get_output_embeddings().weight, head)  # transformers uses it too
    base = source
    if quantized:
        base = quantize_folder(source, tmp_path / "out", QuantizeOptions()).out
        assert json.loads((base / "config.json").read_text())["tie_word_embeddings"] is False
    model = build_meta_model(ModelFolder(base), ModelConfig(base=str(base)))
    assert not has_tied_head(model)
    assert model.origins["lm_head.weight"].keys == ("lm_head.weight",)


def test_a_stored_head_that_equals_a_tied_embedding_is_omitted(tmp_path):
    source = tiny_models.make_model(tmp_path / "source", tie_word_embeddings=True)
    change_tensors(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert has_tied_head(build_meta_model(ModelFolder(source), ModelConfig(base=str(source))))
    out = quantize_folder(source, tmp_path / "out", QuantizeOptions(embeddings=True)).out
    assert "lm_head.weight" not in ModelFolder(out).entries
    assert has_tied_head(build_meta_model(ModelFolder(out), ModelConfig(base=str(out))))


def test_tensors_that_transformers_does_not_load_are_not_counted(tiny_llama, tmp_path):
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    expected = quantize_folder(source, tmp_path / "without", QuantizeOptions()).counts
    change_tensors(source, lambda t: t.update({"model.layers.3.eh_proj.weight": torch.zeros(512, 512)}))
    console = Console(file=io.StringIO(), width=120)
    report = quantize_folder(source, tmp_path / "out", QuantizeOptions(), console)
    assert report.counts == dataclasses.replace(expected, unused=512 * 512)
    assert "model.layers.3.eh_proj.weight" in ModelFolder(report.out).entries
    print_quantize_report(report, console)
    assert f"nor trained: model.layers.3 ({512 * 512:,} elements)" in console.file.getvalue()
    assert "plain transformers does not load" not in console.file.getvalue()


def test_the_report_says_that_plain_transformers_does_not_load_the_folder(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    for name in ("Mixtral", "Falcon"):
        source = make_architecture(tmp_path / name, name)
        report = quantize_folder(source, tmp_path / f"{name}-nf4", QuantizeOptions())
        print_quantize_report(report, console)
    assert console.file.getvalue().count("plain transformers does not load this folder") == 2


def test_an_adapter_that_peft_cannot_read_is_announced_before_anything_is_written(tmp_path: Path) -> None:
    source = SweepFolder(tmp_path, "causal").make_source("laguna")
    console = Console(record=True, width=400, file=io.StringIO())
    quantize_folder(source, tmp_path / "nf4", QuantizeOptions(min_share=0.0), console)
    expected = "train refuses the default lora.targets of this model: lora: PEFT would read other tensors"
    assert console.export_text().startswith(expected)
