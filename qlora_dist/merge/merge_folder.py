"""A model's folder and an adapter to a folder of the merged model, some rows at a time."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from qlora_dist.adapters.saved_adapter import LowRankUpdate
from qlora_dist.errors import UserError
from qlora_dist.io.read_ahead import read_chunks
from qlora_dist.io.safetensors_file import SafetensorsReader, SafetensorsWriter, specs_bytes
from qlora_dist.merge.error_feedback import round_with_feedback, update_directions
from qlora_dist.merge.lora_update import (
    LoraUpdate,
    add_update_to_rows,
    expert_lora_update,
    read_checked_adapter,
    read_lora_update,
)
from qlora_dist.merge.merge_plan import MatrixMerge, MergeOptions, MergePlan, TensorMerge, make_merge_plan
from qlora_dist.merge.merged_adapter_file import write_merged_adapter_file
from qlora_dist.merge.tokenizer_files import TOKENIZER_FILES, copy_tokenizer
from qlora_dist.merge.weight_rows import (
    base_weight_rows,
    dequantized_weight_rows,
    packed_weight,
    quantize_weight_rows,
    training_weight_rows,
)
from qlora_dist.model.meta_model import COMPUTE_DTYPES
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.save_model_folder import finish_model_folder, split_into_files
from qlora_dist.nf4.quant_state import quant_state_tensors


@dataclass
class MergeReport:
    """What `merge_folder` did. Sums of squares are over the matrices with an update."""

    out: Path
    merged: int = 0
    """Matrices with an update."""
    replaced: int = 0
    """Tensors that were trained whole."""
    squared_updates: float = 0.0
    """Squares of what the adapter adds to the weights that it was trained on."""
    trained: float = 0.0
    """Squares of what was trained: those weights and the update."""
    difference: float = 0.0
    """Squares of (what is written - what was trained)."""
    kept: float = 0.0
    """Products of (what is written - the weights trained on) with what the adapter adds."""

    def compare(self, written: torch.Tensor, trained_on: torch.Tensor, trained: torch.Tensor) -> None:
        """Add some rows: fp32[n, in_features] each, but for what is written, in its own type."""
        update, written = trained - trained_on, written.float()
        self.squared_updates += _squares(update)
        self.trained += _squares(trained)
        self.difference += _squares(written - trained)
        self.kept += _product(written - trained_on, update)


def _squares(tensor: torch.Tensor) -> float:
    return _product(tensor, tensor)


def _product(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one.flatten().dot(other.flatten()))


def merge_folder(
    base: Path | None, adapter_path: Path, out: Path, options: MergeOptions, console: Console
) -> MergeReport:
    """Write the merged model as a folder that plain transformers loads.

    Args:
        base: folder of the model; None: the one that the adapter names.
        adapter_path: folder of the adapter.
        out: folder to make.
        options: how.
        console: for progress.

    Memory: the packed form of the largest matrix, and a constant; transposed matrices (GPT-2's) are held whole. The
    folder is called `OUT.partial` until it is complete.

    Raises:
        UserError: the adapter or the base is not what it should be, they don't fit, or `out` is there.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; remove it or give another name")
    adapter = read_checked_adapter(adapter_path)
    if base is None and not adapter.base:
        raise UserError(f"{adapter_path}: names no base; give its folder with --base")
    folder = ModelFolder(base or adapter.base)
    plan = make_merge_plan(folder, adapter, options)
    partial = out.with_name(out.name + ".partial")
    report = MergeReport(out, replaced=len(adapter.whole))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_files(partial, plan, folder, options, report, console)
        write_merged_adapter_file(partial, adapter_path)
        replaced = TOKENIZER_FILES if copy_tokenizer(adapter_path, partial) else ()
        finish_model_folder(partial, out, folder.path, _config(folder, plan, options), replaced)
    except OSError as error:  # a full disk, no permission
        raise UserError(f"{partial}: cannot be written ({error.strerror}); mend that and run again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def print_merge_report(report: MergeReport, console: Console) -> None:
    """What was merged, and how far what is written is from what was trained."""
    console.print(
        f"{report.out}: {report.merged} matrices are merged, {report.replaced} tensors replaced", soft_wrap=True
    )
    if report.squared_updates:
        of_weights, of_updates = (
            math.sqrt(report.difference / whole) for whole in (report.trained, report.squared_updates)
        )
        console.print(
            f"what is written differs from what was trained by {of_weights:.1e} of the weights, {of_updates:.1e} of "
            f"what the adapter adds (norms), of which {report.kept / report.squared_updates:.0%} are in it",
            highlight=False,
            soft_wrap=True,
        )


def _write_files(
    partial: Path, plan: MergePlan, folder: ModelFolder, options: MergeOptions, report: MergeReport, console: Console
) -> None:
    places = split_into_files(
        {place: specs_bytes(work.specs()) for place, work in enumerate(plan.tensors)}, options.file_bytes
    )
    files = [[plan.tensors[place] for place in file] for file in places]
    steps = iter(track(plan.tensors, "merging", console=console, disable=not console.is_terminal, transient=True))
    with SafetensorsReader() as reader:
        updates = _UpdateCache(reader)
        for index, file in enumerate(files, 1):
            specs = [spec for work in file for spec in work.specs()]
            writer = SafetensorsWriter(partial / f"model-{index:05}-of-{len(files):05}.safetensors", specs)
            for _ in file:
                work = next(steps)
                if work.copied_entry is not None:
                    _copy(work, reader, writer)
                for number, part in enumerate(work.parts):
                    _write_matrix(work, number, part, folder, options, reader, updates, writer, report)
            writer.close()


def _copy(work: TensorMerge, reader: SafetensorsReader, writer: SafetensorsWriter) -> None:
    assert work.copied_entry is not None
    size = work.copied_entry.dtype.itemsize
    for start, nbytes in read_chunks(work.copied_entry.nbytes):
        piece = torch.empty(nbytes // size, dtype=work.copied_entry.dtype)
        reader.read_into(piece, work.copied_entry, start)
        writer.write(work.key, piece.to(work.dtype), start // size * work.dtype.itemsize)


def _write_matrix(
    work: TensorMerge,
    number: int,
    part: MatrixMerge,
    folder: ModelFolder,
    options: MergeOptions,
    reader: SafetensorsReader,
    updates: _UpdateCache,
    writer: SafetensorsWriter,
    report: MergeReport,
) -> None:
    """One matrix of those of a tensor, merged; and how far it is from what was trained."""
    if part.update is None and work.written_in_4bit:
        _write_4_bit(packed_weight(part, folder, reader), part, writer)
        return
    values = updates.of(part)

    def row_pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows that the adapter was trained on, and what they became."""
        for first, rows in training_weight_rows(part, folder, reader):
            yield rows, _merge_rows(rows, values, first)

    report.merged += values is not None
    if work.written_in_4bit:
        merged_rows = (rows for _, rows in row_pairs())
        if options.error_feedback and values is not None:
            before_merging = packed_weight(part, folder, reader)
            packed = round_with_feedback(before_merging, merged_rows, part.layout, update_directions(values))
        else:
            packed = quantize_weight_rows(merged_rows, part.layout)
        _write_4_bit(packed, part, writer)
        for (_, stored), (before, merged) in zip(
            dequantized_weight_rows(packed, part.layout), row_pairs(), strict=True
        ):
            report.compare(stored, before, merged)
        return
    original_rows = base_weight_rows(part, folder, reader) if options.into == "original" else None
    matrix_writer = _MatrixWriter(work, number, part, writer)
    for before, merged in row_pairs():
        first, rows = next(original_rows) if original_rows is not None else (0, None)
        stored = matrix_writer.write(merged if rows is None else _merge_rows(rows, values, first))
        if values is not None:
            report.compare(stored, before, merged)
    matrix_writer.close()


class _UpdateCache:
    """Of what the adapter does to a matrix, the values; those of a layer's experts are read together, once."""

    def __init__(self, reader: SafetensorsReader) -> None:
        self._reader = reader
        self._last: tuple[LowRankUpdate, LoraUpdate] | None = None

    def of(self, part: MatrixMerge) -> LoraUpdate | None:
        if part.update is None:
            return None
        if self._last is None or self._last[0] != part.update:
            self._last = part.update, read_lora_update(part.update, self._reader)
        values = self._last[1]
        if not part.update.experts:
            return values
        rows = slice(part.first_update_row, part.first_update_row + part.layout.shape[0])
        return expert_lora_update(values, part.update, part.expert, rows)


def _merge_rows(rows: torch.Tensor, values: LoraUpdate | None, first: int) -> torch.Tensor:
    return rows if values is None else add_update_to_rows(rows, values, first)


def _write_4_bit(packed: torch.Tensor, part: MatrixMerge, writer: SafetensorsWriter) -> None:
    for key, tensor in quant_state_tensors(part.matrix.name, packed, part.layout).items():
        writer.write(key, tensor)


class _MatrixWriter:
    """Where the rows of a matrix go in 16 or 32 bit, from the first on; those of a transposed one are held."""

    def __init__(self, work: TensorMerge, number: int, part: MatrixMerge, writer: SafetensorsWriter) -> None:
        rows, columns = part.layout.shape
        self._first = number * rows * columns * work.dtype.itemsize
        self._work, self._writer, self._transposed = work, writer, part.matrix.transposed
        self._held: list[torch.Tensor] = []

    def write(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows as they are written."""
        stored = rows.to(self._work.dtype)
        if self._transposed:
            self._held.append(stored)
        else:
            self._writer.write(self._work.key, stored, self._first)
            self._first += stored.nbytes
        return stored

    def close(self) -> None:
        """After the last rows."""
        if self._held:
            self._writer.write(self._work.key, torch.cat(self._held).T.contiguous(), self._first)


def _config(folder: ModelFolder, plan: MergePlan, options: MergeOptions) -> dict[str, Any]:
    """config.json of the merged model."""
    config = dict(folder.config)
    if options.into != "nf4":
        config.pop("quantization_config", None)
    if options.dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = str(COMPUTE_DTYPES[options.dtype]).removeprefix("torch.")
    if plan.untied:
        config["tie_word_embeddings"] = False
    if plan.vocabulary is not None:
        config["vocab_size"] = plan.vocabulary
    return config
