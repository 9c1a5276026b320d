"""A Hugging Face folder in 16 or 32 bit to one in 4 bit, tensor by tensor."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from torch import nn

from qlora_dist.errors import UserError
from qlora_dist.model.folder import ModelFolder, read_json
from qlora_dist.model.matrices import Matrix, layout_of, matrices, quantizable
from qlora_dist.model.origins import find_origins
from qlora_dist.model.skeleton import causal_lm_on_meta
from qlora_dist.nf4.checkpoint import tensor_specs, tensors
from qlora_dist.nf4.layout import BLOCK_SIZES, NF4Layout, QuantType
from qlora_dist.nf4.quantize import quantize
from qlora_dist.nf4.safetensors_file import Reader, Writer, read_header

_PLAN = "quantize-plan.json"
_COPIED = (  # what a model needs beside its weights; nothing that holds weights or code
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "LICENSE*",
    "README*",
)


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantize."""

    quant_type: QuantType = "nf4"
    block_size: int = 64
    double_quant: bool = True
    device: str = "cpu"
    file_bytes: int = 5_000_000_000
    """Largest size of one of the files; a tensor that is larger has a file of its own."""
    min_share: float = 0.9
    """Refuse a model of whose parameters, outside embeddings and output head, a smaller part would be in 4 bit."""


@dataclass(frozen=True)
class Report:
    """What `quantize_folder` did."""

    out: Path
    parameters: int
    quantized_parameters: int
    outside_layers: int
    """Parameters of embeddings and the output head that stay as they were."""
    left: dict[str, int]
    """Parameters that stay as they were, by the name of their tensor without layer numbers."""

    @property
    def share(self) -> float:
        """The part of the parameters outside embeddings and output head that is in 4 bit."""
        return self.quantized_parameters / (self.parameters - self.outside_layers)


def quantize_folder(source: Path, out: Path, options: QuantizeOptions, console: Console | None = None) -> Report:
    """Quantize every linear layer but the output head, experts included, in bitsandbytes' serialized format.

    An expert's matrix has scales of its own. Where a checkpoint keeps all experts in one tensor, the matrix of number
    3 is called TENSOR.3.weight; no other tool has such weights in 4 bit.

    Memory: the largest tensor, its packed form, and a constant. The files are written into `OUT.partial`, which gets
    its name when it is complete; a run that was interrupted goes on with the file it was at.

    Raises:
        UserError: `source` is not what it should be, or `out` is there.
    """
    console = console or Console(quiet=True)
    folder = ModelFolder(source)
    if folder.is_quantized:
        raise UserError(f"{source}: is in 4 bit already; use it as model.base")
    if out.exists():
        raise UserError(f"{out}: is there already; remove it or give another name")
    plan = _plan(folder, options)
    report = _report(out, folder, plan)
    if report.share < options.min_share:
        kept = ", ".join(name for name, _ in Counter(report.left).most_common(3))
        raise UserError(
            f"{source}: only {100 * report.share:.1f} % of the parameters of its layers would be in 4 bit (the largest "
            f"others: {kept}); if that is what you want, allow it with --min-share {int(100 * report.share) / 100}"
        )
    partial = out.with_name(out.name + ".partial")
    try:
        _write_folder(partial, out, folder, plan, options, console)
    except OSError as error:  # a full disk, no permission
        raise UserError(
            f"{partial}: cannot be written ({error.strerror}); mend that and run again, it goes on where it stopped"
        ) from None

    return report


def _report(out: Path, folder: ModelFolder, plan: _Plan) -> Report:
    left: Counter[str] = Counter()
    outside = 0
    for name, parts in plan.weights.items():
        count = torch.Size(folder.entries[name].shape).numel()
        if not parts:
            left[re.sub(r"\.\d+(?=\.|$)", ".*", name)] += count
            outside += count if name in plan.outside_layers else 0
    quantized = sum(layout.numel for parts in plan.weights.values() for _, layout in parts)
    return Report(out, quantized + sum(left.values()), quantized, outside, dict(left))


def _write_folder(
    partial: Path,
    out: Path,
    folder: ModelFolder,
    plan: _Plan,
    options: QuantizeOptions,
    console: Console,
) -> None:
    files = _files(plan, folder, options.file_bytes)
    _begin(partial, folder, options)
    work = [
        (partial / f"model-{index:05}-of-{len(files):05}.safetensors", names) for index, names in enumerate(files, 1)
    ]
    with _progress(console) as progress, Reader() as reader:
        task = progress.add_task("quantizing", total=sum(entry.nbytes for entry in folder.entries.values()))
        for path, names in work:
            if not path.exists():
                _write_file(path, names, plan, folder, reader, torch.device(options.device), progress, task)
            else:
                progress.advance(task, sum(folder.entries[name].nbytes for name in names))
    _finish(partial, out, folder, plan, options)


def print_report(report: Report, console: Console) -> None:
    """What is now in 4 bit and what is not."""
    share = 100 * report.quantized_parameters / report.parameters
    lines = [
        f"{report.out}: {share:.1f} % of {report.parameters:,} parameters are in 4 bit, "
        f"{100 * report.share:.1f} % of those outside embeddings and output head"
    ]
    lines += [
        f"  not quantized: {name} ({count:,})" for name, count in sorted(report.left.items(), key=lambda item: -item[1])
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def parse_size(text: str) -> int:
    """Bytes of '5GB', '500MB' or a plain number.

    Raises:
        UserError: it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgG]?)[bB]?", text.strip())
    size = int(float(match[1]) * 1000 ** " kmg".index(match[2].lower() or " ")) if match else 0
    if size < 1:
        raise UserError(f"--file-size {text}: is no size; write 5GB, 500MB or a number of bytes")
    return size


def make_options(
    quant_type: str, block_size: int, double_quant: bool, device: str, file_size: str, min_share: float = 0.9
) -> QuantizeOptions:
    """Options from the command line.

    Raises:
        UserError: one is out of range.
    """
    if quant_type not in ("nf4", "fp4"):
        raise UserError(f"--quant-type {quant_type}: choose nf4 or fp4")
    if block_size not in BLOCK_SIZES:
        raise UserError(f"--block-size {block_size}: choose one of {', '.join(map(str, BLOCK_SIZES))}")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; use cpu or auto")
    if not 0 <= min_share <= 1:
        raise UserError(f"--min-share {min_share}: is no part of a whole; write a number from 0 to 1")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return QuantizeOptions(quant_type, block_size, double_quant, device, parse_size(file_size), min_share)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Plan:
    """What becomes of each tensor of the folder."""

    weights: dict[str, list[tuple[Matrix, NF4Layout]]]
    """By tensor, the matrices in it that are quantized; none: it is copied."""
    outside_layers: set[str]
    """Tensors of embeddings and the output head."""
    head: str
    """Name of the output head in transformers' class."""


def _plan(folder: ModelFolder, options: QuantizeOptions) -> _Plan:
    model = causal_lm_on_meta(folder, torch.bfloat16)
    origins = find_origins(model, folder.entries)
    weights: dict[str, list[tuple[Matrix, NF4Layout]]] = {name: [] for name in folder.entries}
    for target in quantizable(model):
        if target.name not in origins:
            raise UserError(f"{folder.path}: the weight {target.name} is missing; get the folder anew")
        parts = matrices(target, origins[target.name])
        layout = layout_of(parts, target, folder, options.quant_type, options.block_size, options.double_quant)
        for matrix in parts:
            weights[matrix.key].append((matrix, layout))
    head = model.get_output_embeddings()
    outside, head_name = set(), ""
    for path, module in model.named_modules():
        if module is head:
            head_name = path
        if module is head or isinstance(module, nn.Embedding):
            names = [f"{path}.{name}" for name in module._parameters]
            outside |= {key for name in names if name in origins for key in origins[name].keys}
    return _Plan(weights, outside, head_name)


def _files(plan: _Plan, folder: ModelFolder, file_bytes: int) -> list[list[str]]:
    """The tensors of each file, in the order in which they lie in the source."""
    files: list[list[str]] = []
    size = 0
    for name in sorted(plan.weights, key=lambda n: (folder.entries[n].path, folder.entries[n].start)):
        nbytes = sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in _specs([name], plan, folder))
        if not files or size + nbytes > file_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += nbytes
    return files


def _begin(partial: Path, folder: ModelFolder, options: QuantizeOptions) -> None:
    """Keep what an interrupted run of the same work has left, and nothing else."""
    sources = {entry.path for entry in folder.entries.values()}
    stats = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(sources)}
    plan = json.dumps({"source": str(folder.path.resolve()), "files": stats, "options": vars(options)}, sort_keys=True)
    if (partial / _PLAN).exists() and (partial / _PLAN).read_text() == plan:
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / _PLAN).write_text(plan)


def _write_file(
    path: Path,
    names: list[str],
    plan: _Plan,
    folder: ModelFolder,
    reader: Reader,
    device: torch.device,
    progress: Progress,
    task: Any,
) -> None:
    writer = Writer(path, _specs(names, plan, folder))
    for name in names:
        entry = folder.entries[name]
        if not plan.weights[name]:
            writer.write(name, reader.read(entry))
        for matrix, layout in plan.weights[name]:
            # the weight has no name, under which it would live on while the next one is read
            packed, _ = quantize(
                matrix.read(entry, reader).to(device), layout.quant_type, layout.block_size, layout.double_quant
            )
            for key, tensor in tensors(matrix.name, packed, layout).items():
                writer.write(key, tensor)
        progress.advance(task, entry.nbytes)
    writer.close()


def _specs(names: list[str], plan: _Plan, folder: ModelFolder) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    for name in names:
        if not plan.weights[name]:
            yield name, folder.entries[name].dtype, folder.entries[name].shape
        for matrix, layout in plan.weights[name]:
            yield from tensor_specs(matrix.name, layout)


def _finish(
    partial: Path,
    out: Path,
    folder: ModelFolder,
    plan: _Plan,
    options: QuantizeOptions,
) -> None:
    """Index, config.json and tokenizer; then the folder's name."""
    for pattern in _COPIED:
        for path in folder.path.glob(pattern):
            if not path.name.endswith((".index.json", _PLAN)):
                shutil.copy2(path, partial / path.name)
    weight_map: dict[str, str] = {}
    total = 0
    for path in sorted(partial.glob("model-*.safetensors")):
        for name, entry in read_header(path).items():
            weight_map[name] = path.name
            total += entry.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = read_json(folder.path / "config.json")
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": options.quant_type,
        "bnb_4bit_use_double_quant": options.double_quant,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted({plan.head, "lm_head"}),
    }
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (partial / _PLAN).unlink()
    partial.rename(out)


def _progress(console: Console) -> Progress:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
