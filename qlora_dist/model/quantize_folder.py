"""Conversion of a Hugging Face folder to one in 4 bit, tensor by tensor."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from qlora_dist.errors import UserError
from qlora_dist.io.read_ahead import ReadAhead, ReadProgress, ReadRequest, read_chunks
from qlora_dist.io.safetensors_file import SafetensorsReader, SafetensorsWriter, specs_bytes
from qlora_dist.model.gguf_folder import open_model
from qlora_dist.model.model_folder import ModelFolder, read_model_json
from qlora_dist.model.quantize_plan import ParameterCounts, QuantizeOptions, QuantizePlan, make_quantize_plan
from qlora_dist.model.save_model_folder import finish_model_folder, split_into_files, untie_head
from qlora_dist.model.shard_reader import decode_from_reads, published_reads, quantize_from_reads, tensor_reads
from qlora_dist.nf4.quant_state import quant_state_specs, quant_state_tensors

_PLAN_FILE = "quantize-plan.json"
_LISTED_NAMES = 5


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """Result of `quantize_folder`."""

    out: Path
    plan: QuantizePlan
    seconds: float
    read_bytes: int
    wait_s: float
    """Seconds spent waiting for the disk."""

    @property
    def counts(self) -> ParameterCounts:
        """Number of parameters in the folder."""
        return self.plan.counts


def quantize_folder(
    source: Path, out: Path, options: QuantizeOptions, console: Console | None = None
) -> QuantizeReport:
    """Quantize every linear layer but the output head, including experts, into bitsandbytes' serialized format.

    `source` is a model folder, a GGUF file, or a folder that holds one.

    With `options.embeddings` the input embedding and the output head are quantized too, once if they are tied.

    Each expert's matrix has its own scales. If a checkpoint keeps all experts in one tensor, the matrix of expert 3 is
    named TENSOR.3.weight. This naming is specific to this package.

    Peak memory is the packed form of the largest tensor and a constant, because tensors are read in chunks. The files
    are written into `OUT.partial`, which is renamed when it is complete. An interrupted run resumes with the first
    incomplete file.

    Raises:
        UserError: `source` cannot be quantized, or `out` exists.
    """
    console = console or Console(quiet=True)
    with open_model(source) as folder:
        return _quantize_opened(folder, out, options, console)


def _quantize_opened(folder: ModelFolder, out: Path, options: QuantizeOptions, console: Console) -> QuantizeReport:
    source = folder.path
    if folder.is_quantized:
        raise UserError(f"{source}: is in 4 bit already; use it as model.base")
    if out.exists():
        raise UserError(f"{out}: is there already; remove it or give another name")
    plan = make_quantize_plan(folder, options)
    if plan.counts.quantized_share < options.min_share:
        share = 100 * plan.counts.quantized_share
        largest = ", ".join(plan.counts.largest_unquantized)
        raise UserError(
            f"{source}: only {share:.1f} % of the parameters outside unquantized embeddings and output head would be "
            f"in 4 bit (the largest others: {largest}); to accept that, set --min-share {int(share) / 100}"
        )
    if plan.adapter_problem is not None:
        console.print(
            f"train refuses the default lora.targets of this model: {plan.adapter_problem}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    partial = out.with_name(out.name + ".partial")
    started = time.perf_counter()
    try:
        reading = _write_folder(partial, out, folder, plan, options, console)
    except OSError as error:  # a full disk, no permission
        raise UserError(
            f"{partial}: cannot be written ({error.strerror}); mend that and run again, which resumes where it stopped"
        ) from None
    return QuantizeReport(
        out=out, plan=plan, seconds=time.perf_counter() - started, read_bytes=reading.read_bytes, wait_s=reading.wait_s
    )


def _write_folder(
    partial: Path, out: Path, folder: ModelFolder, plan: QuantizePlan, options: QuantizeOptions, console: Console
) -> ReadProgress:
    files = _files(plan, folder, options.file_bytes)
    _prepare_partial_folder(partial, folder, options)
    work = [
        (partial / f"model-{index:05}-of-{len(files):05}.safetensors", names) for index, names in enumerate(files, 1)
    ]
    todo = [(path, names) for path, names in work if not path.exists()]
    total = sum(_file_bytes(folder, name) for name in folder.names)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console, disable=not console.is_terminal)
    with bars as progress, SafetensorsReader() as reader:
        reads = [read for _, names in todo for name in names for read in _reads(name, plan, folder, reader)]
        # bytes of an earlier run must not count as this run's speed
        done = total - sum(read.nbytes for read in reads)
        task = progress.add_task("quantizing", total=total, completed=done)
        reading = ReadProgress(0, 0, 0.0)

        def report(current: ReadProgress) -> None:
            nonlocal reading
            reading = current
            progress.update(task, completed=done + current.read_bytes)

        with ReadAhead(reads, report) as ahead:
            for path, names in todo:
                _write_file(path, names, plan, folder, ahead, torch.device(options.device))
    _write_config_and_index(partial, out, folder, plan, options)
    return reading


def print_quantize_report(report: QuantizeReport, console: Console) -> None:
    """Print which parameters are in 4 bit, and which are not."""
    counts = report.counts
    lines = [
        f"{report.out}: {100 * counts.quantized / counts.parameters:.1f} % of {counts.parameters:,} parameters are in "
        f"4 bit, {100 * counts.quantized_share:.1f} % of those outside unquantized embeddings and output head"
    ]
    lines += [
        f"  not quantized: {name} ({count:,})"
        for name, count in sorted(counts.unquantized.items(), key=lambda item: -item[1])
    ]
    if report.plan.towers:
        lines.append(f"  copied, because only text is trained: {', '.join(report.plan.towers)} ({counts.towers:,})")
    if report.plan.without_adapter:
        names = ", ".join(report.plan.without_adapter)
        lines.append(f"  in 4 bit, but without an adapter, because the model's code reads the weight itself: {names}")
    if unused := report.plan.unused:
        names = ", ".join(unused[:_LISTED_NAMES]) + (" and others" if len(unused) > _LISTED_NAMES else "")
        lines.append(f"  copied, but neither loaded by transformers nor trained: {names} ({counts.unused:,} elements)")
    if not report.plan.loads_in_transformers:
        lines.append(
            "  plain transformers does not load this folder; to use its adapters there, give them the 16-bit model or "
            "merge them"
        )
    speed, waiting = report.read_bytes / 1e9 / report.seconds, 100 * report.wait_s / report.seconds
    lines.append(f"  {report.seconds:.1f} s at {speed:.2f} GB/s, {waiting:.0f} % of it waiting for reads")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _files(plan: QuantizePlan, folder: ModelFolder, file_bytes: int) -> list[list[str]]:
    names = sorted(plan.weights, key=folder.file_position)
    return split_into_files({name: specs_bytes(_specs([name], plan, folder)) for name in names}, file_bytes)


def _prepare_partial_folder(partial: Path, folder: ModelFolder, options: QuantizeOptions) -> None:
    """Keep the files of an interrupted run of the same plan, and delete all others."""
    sources = {folder.file_position(name)[0] for name in folder.names}
    stats = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(sources)}
    plan = json.dumps({"source": str(folder.path.resolve()), "files": stats, "options": vars(options)}, sort_keys=True)
    if (partial / _PLAN_FILE).exists() and (partial / _PLAN_FILE).read_text() == plan:
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / _PLAN_FILE).write_text(plan)


def _write_file(
    path: Path, names: list[str], plan: QuantizePlan, folder: ModelFolder, ahead: ReadAhead, device: torch.device
) -> None:
    writer = SafetensorsWriter(path, _specs(names, plan, folder))
    for name in names:
        if not plan.weights[name]:
            _write_unquantized(name, folder, ahead, device, writer)
        for matrix, layout in plan.weights[name]:
            packed = quantize_from_reads(ahead, layout, device, folder, matrix)
            for key, tensor in quant_state_tensors(matrix.name, packed, layout).items():
                writer.write(key, tensor)
    writer.close()


def _write_unquantized(
    name: str, folder: ModelFolder, ahead: ReadAhead, device: torch.device, writer: SafetensorsWriter
) -> None:
    """Copy a tensor, or write the values of a weight in a published format."""
    if name in folder.published:
        position = 0
        for rows in decode_from_reads(ahead, folder.published[name], device):
            writer.write(name, rows, position)
            position += rows.nbytes
    else:
        for start, _ in read_chunks(folder.entries[name].nbytes):
            writer.write(name, next(ahead), start)


def _file_bytes(folder: ModelFolder, name: str) -> int:
    return folder.published[name].nbytes if name in folder.published else folder.entries[name].nbytes


def _reads(name: str, plan: QuantizePlan, folder: ModelFolder, reader: SafetensorsReader) -> Iterator[ReadRequest]:
    if name in folder.published:
        yield from published_reads(reader, folder.published[name])
        return
    for index in [matrix.index for matrix, _ in plan.weights[name]] or [None]:
        yield from tensor_reads(reader, folder.entries[name], index)


def _specs(
    names: list[str], plan: QuantizePlan, folder: ModelFolder
) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    for name in names:
        if not plan.weights[name]:
            yield name, *folder.unquantized_format(name)
        for matrix, layout in plan.weights[name]:
            yield from quant_state_specs(matrix.name, layout)


def _write_config_and_index(
    partial: Path, out: Path, folder: ModelFolder, plan: QuantizePlan, options: QuantizeOptions
) -> None:
    """Write index, config.json and tokenizer, and rename the folder."""
    config = read_model_json(folder.config_folder / "config.json")
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": options.quant_type,
        "bnb_4bit_use_double_quant": options.double_quant,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": plan.skip_modules,
    }
    if plan.unties_head:
        untie_head(config)
    (partial / _PLAN_FILE).unlink()
    finish_model_folder(partial, out, folder.config_folder, config)
