"""Merging of an adapter into a model's folder, a chunk of rows at a time."""

from __future__ import annotations

import hashlib
import json
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
from qlora_dist.io.safetensors_file import SafetensorsReader, SafetensorsWriter, TensorEntry, specs_bytes
from qlora_dist.merge.error_feedback import round_with_feedback, update_directions
from qlora_dist.merge.lora_update import (
    LoraUpdate,
    add_update_to_rows,
    expert_lora_update,
    read_checked_adapter,
    read_lora_update,
)
from qlora_dist.merge.merge_plan import MatrixMerge, MergeOptions, MergePlan, TensorMerge, make_merge_plan
from qlora_dist.merge.published_config import exclude_modules
from qlora_dist.merge.token_row_writer import TokenRowWriter
from qlora_dist.merge.weight_rows import (
    base_weight_rows,
    dequantized_weight_rows,
    packed_weight,
    quantize_weight_rows,
    training_weight_rows,
)
from qlora_dist.model.meta_model import COMPUTE_DTYPES
from qlora_dist.model.model_folder import ModelFolder, read_model_json
from qlora_dist.model.save_model_folder import finish_model_folder, set_vocab_size, split_into_files, untie_head
from qlora_dist.nf4.quant_state import quant_state_tensors

_TOKENIZER_FILES = (
    "tokenizer*",
    "*.jinja",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)
"""Patterns of the files that transformers saves for a tokenizer."""

TensorWriter = SafetensorsWriter | TokenRowWriter

MERGED_ADAPTER_FILE = "merged_adapter.json"
"""Name of the file that records the merged adapter. `qlora-dist quantize` copies it like all JSON files."""


@dataclass(kw_only=True)
class MergeReport:
    """Result of `merge_folder`. Sums are over the matrices with an update."""

    out: Path
    merged: int = 0
    """Number of matrices with an update."""
    replaced: int = 0
    """Number of fully trained tensors."""
    squared_updates: float = 0.0
    """Squared norm of the update to the weights that the adapter was trained on."""
    squared_trained: float = 0.0
    """Squared norm of the trained weights, that is of those weights plus the update."""
    squared_difference: float = 0.0
    """Squared norm of the difference between written and trained weights."""
    update_dot_product: float = 0.0
    """Dot product of the update with the written change, the written weights minus those trained on."""

    def add_rows(self, written: torch.Tensor, trained_on: torch.Tensor, trained: torch.Tensor) -> None:
        """Add the sums of some rows, fp32[n, in_features] each; `written` may have another type."""
        update, written = trained - trained_on, written.float()
        difference = written - trained
        self.squared_updates += _product(update, update)
        self.squared_trained += _product(trained, trained)
        self.squared_difference += _product(difference, difference)
        self.update_dot_product += _product(written - trained_on, update)


def _product(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one.flatten().dot(other.flatten()))


def merge_folder(
    base: Path | None, adapter_path: Path, out: Path, options: MergeOptions, console: Console
) -> MergeReport:
    """Write the merged model as a folder that plain transformers loads.

    Without `base`, the adapter's own base is used. Peak memory is the packed form of the largest matrix and a constant.
    Transposed matrices (GPT-2's) are held as a whole. The folder is named `OUT.partial` until it is complete.

    Raises:
        UserError: the adapter or the base is invalid, they do not match, or `out` exists.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; remove it or give another name")
    adapter = read_checked_adapter(adapter_path)
    if base is None and not adapter.base:
        raise UserError(f"{adapter_path}: names no base; give its folder with --base")
    folder = ModelFolder(base or adapter.base)
    plan = make_merge_plan(folder, adapter, options)
    partial = out.with_name(out.name + ".partial")
    report = MergeReport(out=out, replaced=len(adapter.full_tensors) + len(adapter.token_rows))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_files(partial, plan, _MatrixMerger(folder, options, report), console)
        write_merged_adapter_file(partial, adapter_path)
        replaced = _copy_tokenizer(adapter_path, partial)
        finish_model_folder(partial, out, folder.path, _config(folder, plan, options), replaced)
    except OSError as error:  # a full disk, no permission
        raise UserError(f"{partial}: cannot be written ({error.strerror}); mend that and run again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def write_merged_adapter_file(folder: Path, adapter: Path) -> None:
    """Record in a merged folder which adapter it holds."""
    record = {"adapter": str(adapter), "adapter_sha256": _sha256(adapter)}
    (folder / MERGED_ADAPTER_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def check_trained_on_merged(adapter: Path, base: Path, earlier_adapter: Path) -> None:
    """Raise a UserError unless an adapter was trained on `base`, into which an earlier adapter was merged."""
    if not (base / MERGED_ADAPTER_FILE).exists():
        raise UserError(
            f"{adapter}: was trained on {base}, which is no folder that qlora-dist merge has written; merge "
            f"{earlier_adapter} and train on that, or compose adapters of one base with --how cat"
        )
    if read_model_json(base / MERGED_ADAPTER_FILE).get("adapter_sha256") != _sha256(earlier_adapter):
        raise UserError(
            f"{adapter}: was trained on {base}, which holds another adapter than {earlier_adapter}; name the adapters "
            "in the order of their training"
        )


def _sha256(adapter: Path) -> str:
    digest = hashlib.sha256()
    with (adapter / "adapter_model.safetensors").open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def print_merge_report(report: MergeReport, console: Console) -> None:
    """Print what was merged, and the difference between written and trained weights."""
    console.print(
        f"{report.out}: {report.merged} matrices are merged, {report.replaced} tensors replaced", soft_wrap=True
    )
    if report.squared_updates:
        of_weights, of_updates = (
            math.sqrt(report.squared_difference / total) for total in (report.squared_trained, report.squared_updates)
        )
        console.print(
            f"the written weights differ from the trained ones by {of_weights:.1e} of the weights, and by "
            f"{of_updates:.1e} of the update (norms), of which they keep "
            f"{report.update_dot_product / report.squared_updates:.0%}",
            highlight=False,
            soft_wrap=True,
        )


def _copy_tokenizer(adapter: Path, out: Path) -> tuple[str, ...]:
    """Copy the tokenizer with its chat template, and the generation settings, from an adapter's folder.

    Return the patterns of the base's files that must not be copied, none if the folder has no tokenizer.
    """
    if not (adapter / "tokenizer_config.json").is_file():
        return ()
    for pattern in (*_TOKENIZER_FILES, "generation_config.json"):
        for path in adapter.glob(pattern):
            if path.is_file():
                shutil.copy2(path, out / path.name)
    return _TOKENIZER_FILES


def _write_files(partial: Path, plan: MergePlan, merger: _MatrixMerger, console: Console) -> None:
    sizes = {index: specs_bytes(tensor.specs()) for index, tensor in enumerate(plan.tensors)}
    files = [[plan.tensors[index] for index in file] for file in split_into_files(sizes, merger.options.file_bytes)]
    steps = iter(track(plan.tensors, "merging", console=console, disable=not console.is_terminal, transient=True))
    with merger.reader:
        for number, file in enumerate(files, 1):
            specs = [spec for tensor in file for spec in tensor.specs()]
            writer = SafetensorsWriter(partial / f"model-{number:05}-of-{len(files):05}.safetensors", specs)
            for _ in file:
                tensor = next(steps)
                if (token_rows := tensor.token_rows) is not None:
                    row_writer = TokenRowWriter(token_rows, tensor.dtype, writer, merger.reader)
                    _write_tensor(tensor, merger, row_writer)
                    row_writer.write_added_rows(tensor.key)
                else:
                    _write_tensor(tensor, merger, writer)
            writer.close()


def _write_tensor(tensor: TensorMerge, merger: _MatrixMerger, writer: TensorWriter) -> None:
    if tensor.copied_entry is not None:
        _copy(tensor, tensor.copied_entry, merger.reader, writer)
    for index, part in enumerate(tensor.matrices):
        if tensor.written_in_4bit:
            merger.write_4_bit(part, writer)
        else:
            merger.write_rows(part, _RowWriter(tensor, index, part, writer))


def _copy(tensor: TensorMerge, entry: TensorEntry, reader: SafetensorsReader, writer: TensorWriter) -> None:
    size = entry.dtype.itemsize
    for start, nbytes in read_chunks(entry.nbytes):
        chunk = torch.empty(nbytes // size, dtype=entry.dtype)
        reader.read_into(chunk, entry, start)
        writer.write(tensor.key, chunk.to(tensor.dtype), start // size * tensor.dtype.itemsize)


class _MatrixMerger:
    """Merger of single matrices that adds their norms to the report."""

    def __init__(self, folder: ModelFolder, options: MergeOptions, report: MergeReport) -> None:
        self.options, self.reader = options, SafetensorsReader()
        self._folder, self._report = folder, report
        self._last_update: tuple[LowRankUpdate, LoraUpdate] | None = None

    def write_4_bit(self, part: MatrixMerge, writer: TensorWriter) -> None:
        update = self._read_update(part)
        if update is None:
            _write_quant_state(packed_weight(part, self._folder, self.reader), part, writer)
            return
        merged_rows = (merged for _, merged in self._merged_rows(part, update))
        if self.options.error_feedback:
            before_merging = packed_weight(part, self._folder, self.reader)
            packed = round_with_feedback(before_merging, merged_rows, part.layout, update_directions(update))
        else:
            packed = quantize_weight_rows(merged_rows, part.layout)
        _write_quant_state(packed, part, writer)
        self._report.merged += 1
        stored_rows = dequantized_weight_rows(packed, part.layout)
        for (_, stored), (rows, merged) in zip(stored_rows, self._merged_rows(part, update), strict=True):
            self._report.add_rows(stored, rows, merged)

    def write_rows(self, part: MatrixMerge, writer: _RowWriter) -> None:
        update = self._read_update(part)
        self._report.merged += update is not None
        is_original = self.options.into == "original"
        original_rows = base_weight_rows(part, self._folder, self.reader) if is_original else None
        for rows, merged in self._merged_rows(part, update):
            first, original = next(original_rows) if original_rows is not None else (0, None)
            stored = writer.write(merged if original is None else _merge_rows(original, update, first))
            if update is not None:
                self._report.add_rows(stored, rows, merged)
        writer.close()

    def _merged_rows(self, part: MatrixMerge, update: LoraUpdate | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield rows that the adapter was trained on, and the merged rows."""
        for first, rows in training_weight_rows(part, self._folder, self.reader):
            yield rows, _merge_rows(rows, update, first)

    def _read_update(self, part: MatrixMerge) -> LoraUpdate | None:
        """Read a matrix's update. Matrices of a layer's experts follow each other, so their tensors are read once."""
        if part.update is None:
            return None
        if self._last_update is None or self._last_update[0] != part.update:
            self._last_update = part.update, read_lora_update(part.update, self.reader)
        update = self._last_update[1]
        if not part.update.experts:
            return update
        rows = slice(part.first_update_row, part.first_update_row + part.layout.shape[0])
        return expert_lora_update(update, part.update, part.expert, rows)


def _merge_rows(rows: torch.Tensor, update: LoraUpdate | None, first: int) -> torch.Tensor:
    return rows if update is None else add_update_to_rows(rows, update, first)


def _write_quant_state(packed: torch.Tensor, part: MatrixMerge, writer: TensorWriter) -> None:
    for key, tensor in quant_state_tensors(part.matrix.name, packed, part.layout).items():
        writer.write(key, tensor)


class _RowWriter:
    """Writer of a matrix in 16 or 32 bit, row by row. It holds the rows of a transposed matrix until `close`."""

    def __init__(self, tensor: TensorMerge, index: int, part: MatrixMerge, writer: TensorWriter) -> None:
        rows, columns = part.layout.shape
        self._first = index * rows * columns * tensor.dtype.itemsize
        self._tensor, self._writer, self._transposed = tensor, writer, part.matrix.transposed
        self._held: list[torch.Tensor] = []

    def write(self, rows: torch.Tensor) -> torch.Tensor:
        """Write the next rows, and return them in the type of the file."""
        stored = rows.to(self._tensor.dtype)
        if self._transposed:
            self._held.append(stored)
        else:
            self._writer.write(self._tensor.key, stored, self._first)
            self._first += stored.nbytes
        return stored

    def close(self) -> None:
        if self._held:
            self._writer.write(self._tensor.key, torch.cat(self._held).T.contiguous(), self._first)


def _config(folder: ModelFolder, plan: MergePlan, options: MergeOptions) -> dict[str, Any]:
    config = dict(folder.config)
    if options.into != "nf4":
        config.pop("quantization_config", None)
    if plan.unquantized_modules is not None:
        config["quantization_config"] = exclude_modules(folder.config, plan.unquantized_modules)
    if options.dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = str(COMPUTE_DTYPES[options.dtype]).removeprefix("torch.")
    if plan.is_untied:
        untie_head(config)
    if plan.vocab_size is not None:
        set_vocab_size(config, plan.vocab_size)
    return config
