"""Contents of a Hugging Face model folder, without reading the weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from qlora_dist.errors import UserError
from qlora_dist.formats.find_published import find_published_weights
from qlora_dist.formats.published_entry import PublishedWeightEntry
from qlora_dist.formats.unquantized import unquantized_weight
from qlora_dist.io.gguf_file import find_gguf
from qlora_dist.io.read_ahead import read_chunks
from qlora_dist.io.safetensors_file import SafetensorsReader, TensorEntry, read_safetensors_header
from qlora_dist.layers.dequantize import WeightLayout
from qlora_dist.nf4.quant_state import QuantizedWeightEntry, find_quantized_weights, is_part_of_quantized
from qlora_dist.nf4.quantize import TORCH_DTYPES

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PART = re.compile(r"(?:pytorch_)?model-\d+-of-(\d+)\.safetensors")


class ModelFolder:
    """Configuration and tensors of a folder, with quantized weights apart from the other tensors.

    Attributes:
        path: the folder, or a GGUF file.
        config_folder: folder of config.json and of the tokenizer, which is `path` unless the weights are in a GGUF
            file.
        config: content of config.json.
        entries: tensors that are not part of a quantized weight, by name.
        quantized: 4-bit weights of bitsandbytes, by name.
        published: weights in a published format, by the name that a 16-bit folder has for them.
        published_tensors: the tensors of these weights in the files, such as codes and scales, by name.

    Raises:
        UserError: the folder is damaged or incomplete, or its weights are of a kind that is not supported.
    """

    def __init__(self, path: str | Path, config_folder: Path | None = None) -> None:
        self.path = Path(path)
        self.config_folder = config_folder or self.path
        if config_folder is None and (gguf := find_gguf(self.path)) is not None:
            raise UserError(
                f"{self.path}: {gguf.name} is a GGUF file, which only the command quantize reads; quantize it, and "
                "give the folder that it writes"
            )
        if not self.config_folder.is_dir():
            raise UserError(f"{self.path}: no such folder; give the folder of a Hugging Face model")
        self.config = read_model_json(self.config_folder / "config.json")
        self._equal: dict[tuple[str, str], bool] = {}
        self.entries: dict[str, TensorEntry] = {}
        self.quantized: dict[str, QuantizedWeightEntry] = {}
        self.published: dict[str, PublishedWeightEntry] = {}
        self.published_tensors: dict[str, TensorEntry] = {}
        self._find_tensors()

    def _find_tensors(self) -> None:
        """Find the tensors and sort them by kind."""
        entries = self._read_entries()
        with SafetensorsReader() as reader:
            self.quantized = find_quantized_weights(entries, reader)
        self.entries = {
            name: entry for name, entry in entries.items() if not is_part_of_quantized(name, self.quantized)
        }
        self._check_4_bit_alone()
        quantization_config = self.config.get("quantization_config")
        if quantization_config and not self.quantized:
            found = find_published_weights(self.entries, quantization_config, self._dtype())
            self.published = dict(found.weights)
            self.published_tensors = {name: self.entries.pop(name) for name in found.tensors}

    def _check_4_bit_alone(self) -> None:
        """Raise if a folder in 4 bit holds weights in 8 bit too, whose codes would be taken for values."""
        codes = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
        mixed = [name for name, entry in self.entries.items() if entry.dtype in codes] if self.quantized else []
        if mixed:
            kind = str(self.entries[mixed[0]].dtype).removeprefix("torch.")
            raise UserError(
                f"{self.path}: {mixed[0]} is {kind} beside weights in 4 bit, which is not supported; give a copy of "
                "the model in 16 bit"
            )

    @property
    def is_quantized(self) -> bool:
        """Whether linear layers are in 4 bit of bitsandbytes."""
        return bool(self.quantized)

    @property
    def names(self) -> list[str]:
        """Names of all tensors. A quantized weight counts as one."""
        return [*self.entries, *self.quantized, *self.published]

    def packed(self, name: str) -> QuantizedWeightEntry | PublishedWeightEntry | None:
        """Return a quantized weight, which is read as the bytes of its vector; None for another tensor."""
        return self.quantized.get(name) or self.published.get(name)

    def pack_unquantized(self, name: str) -> None:
        """Treat a matrix in 16 or 32 bit as a weight in a published format from now on."""
        self.published[name] = unquantized_weight(self.entries.pop(name))

    def packed_layout(self, name: str) -> WeightLayout | None:
        """Return the layout of a quantized weight; None for another tensor."""
        packed = self.packed(name)
        return None if packed is None else packed.layout

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, quantized or not."""
        packed = self.packed(name)
        return packed.layout.shape if packed is not None else self.entries[name].shape

    def unquantized_format(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return type and shape of a tensor's values, for a quantized weight after dequantization."""
        packed = self.packed(name)
        if packed is not None:
            return TORCH_DTYPES[packed.layout.dtype], packed.layout.shape
        return self.entries[name].dtype, self.entries[name].shape

    def file_position(self, name: str) -> tuple[Path, int]:
        """Return the file of a tensor and its first byte there."""
        packed = self.packed(name)
        entry = packed.first_tensor if packed is not None else self.entries[name]
        return entry.path, entry.start

    def tensors_equal(self, one: str, other: str) -> bool:
        """Return whether two tensors, quantized or not, have equal bytes. They are read up to the first difference."""
        pair = one, other
        if pair not in self._equal:
            self._equal[pair] = self._format(one) == self._format(other) and self._bytes_equal(one, other)
        return self._equal[pair]

    def _format(self, name: str) -> object:
        packed = self.packed(name)
        return packed.layout if packed is not None else (self.entries[name].shape, self.entries[name].dtype)

    def _bytes_equal(self, one: str, other: str) -> bool:
        with SafetensorsReader() as reader:
            for start, length in read_chunks(self.nbytes(one)):
                parts = torch.empty(2, length, dtype=torch.uint8)
                self.read_range(one, reader, parts[0], start)
                self.read_range(other, reader, parts[1], start)
                if not torch.equal(parts[0], parts[1]):
                    return False
        return True

    def nbytes(self, name: str) -> int:
        """Return the bytes of a tensor in its file, or of the byte vector of a quantized weight."""
        packed = self.packed(name)
        return packed.layout.total_bytes if packed is not None else self.entries[name].nbytes

    def read_range(self, name: str, reader: SafetensorsReader, out: torch.Tensor, start: int) -> None:
        """Fill `out` (CPU) with these bytes from `start` on. `out` is uint8[n] for a quantized weight."""
        if (packed := self.packed(name)) is not None:
            packed.read_range(reader, out, start)
        else:
            reader.read_into(out, self.entries[name], start)

    def missing_weight_error(self, name: str) -> UserError:
        """Return the error about a weight that config.json requires and the folder does not hold."""
        stem = name.removesuffix(".weight")
        similar = (key for key in sorted(self.names) if key.startswith(stem))
        nearest = next((key for key in similar if key != f"{stem}.bias"), None)
        if nearest is None:
            other = next((key for key in sorted(self.names) if key.endswith(f".{name.removeprefix('model.')}")), None)
            if other is not None:
                return UserError(
                    f"{self.path}: the weight {name} is missing; {other} is there, which belongs to another class than "
                    "config.json names; get the config.json that was published with the weights"
                )
            return UserError(f"{self.path}: the weight {name} is missing; get the folder anew")
        return UserError(
            f"{self.path}: the weight {name} is missing; {nearest} is there, which has an unsupported format; give the "
            "model as its maker published it, or a copy in 16 bit"
        )

    def _dtype(self) -> str:
        """Return the type of the model in config.json, or of its text part."""
        configs = (self.config, self.config.get("text_config") or {})
        names = [config.get(key) for config in configs for key in ("dtype", "torch_dtype")]
        name = next((str(name) for name in names if name), "bfloat16").removeprefix("torch.")
        return name if name in TORCH_DTYPES else "bfloat16"

    def _read_entries(self) -> dict[str, TensorEntry]:
        entries: dict[str, TensorEntry] = {}
        for file in self._weight_files():
            if Path(file).name != file:
                raise UserError(f"{self.path / _INDEX}: names a file outside the folder, {file}; get the folder anew")
            entries |= read_safetensors_header(self.path / file)
        return entries

    def _weight_files(self) -> list[str]:
        """Return the names of the files that transformers reads, or of all parts of a model without an index."""
        if (self.path / _SINGLE).exists():  # transformers prefers it to an index too
            return [_SINGLE]
        if (self.path / _INDEX).exists():
            weight_map = read_model_json(self.path / _INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise UserError(f"{self.path / _INDEX}: names no files; get the folder anew")
            return sorted(set(weight_map.values()))
        files = sorted(path.name for path in self.path.glob("*.safetensors"))
        parts = {name: int(match[1]) for name in files if (match := _PART.fullmatch(name))}
        if not parts:
            raise UserError(f"{self.path}: holds no {_SINGLE}; {self._missing_files_hint(files)}")
        if set(parts.values()) != {len(parts)}:
            raise UserError(
                f"{self.path}: holds {len(parts)} of the {max(parts.values())} parts of a model, and no {_INDEX}; get "
                "the folder anew"
            )
        return list(parts)

    def _missing_files_hint(self, files: list[str]) -> str:
        if any(name.startswith("consolidated") for name in files):
            return f"{files[0]} has Mistral's own names of tensors; get the files that transformers loads"
        if "adapter_model.safetensors" in files:
            return "it is the folder of an adapter; give the folder of its base"
        pickled = sorted(path.name for path in self.path.glob("*.bin"))
        if pickled:
            return f"{pickled[0]} is a pickle, which is never read; save the model as safetensors"
        return "give the folder of a Hugging Face model"


def read_model_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; give the folder of a Hugging Face model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); get the file anew") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; get the file anew")
    return content
