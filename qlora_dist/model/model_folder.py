"""Contents of a Hugging Face model folder, without reading the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qlora_dist.errors import UserError
from qlora_dist.io.read_ahead import read_chunks
from qlora_dist.io.safetensors_file import SafetensorsReader, TensorEntry, read_safetensors_header
from qlora_dist.nf4.quant_state import QuantizedWeightEntry, find_quantized_weights, is_part_of_quantized

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class ModelFolder:
    """Configuration and tensors of a folder, with 4-bit weights apart from the other tensors.

    Attributes:
        config: content of config.json.
        entries: tensors that are not part of a 4-bit weight, by name.
        quantized: 4-bit weights, by name.

    Raises:
        UserError: the folder is damaged or incomplete, or its weights are of a kind that is not supported.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such folder; give the folder of a Hugging Face model")
        self.config = read_model_json(self.path / "config.json")
        self._equal: dict[tuple[str, str], bool] = {}
        method = (self.config.get("quantization_config") or {}).get("quant_method")
        hint = _QUANT_METHOD_HINTS.get(str(method), "give a copy of the model in 16 bit, or in 4 bit of bitsandbytes")
        if method not in (None, "bitsandbytes"):
            raise UserError(f"{self.path}: is quantized with {method}, which is not supported; {hint}")
        entries = self._read_entries()
        with SafetensorsReader() as reader:
            self.quantized: dict[str, QuantizedWeightEntry] = find_quantized_weights(entries, reader)
        self.entries: dict[str, TensorEntry] = {
            name: entry for name, entry in entries.items() if not is_part_of_quantized(name, self.quantized)
        }
        if method is not None and not self.quantized:
            raise UserError(
                f"{self.path}: is quantized with bitsandbytes, but not in 4 bit, which is not supported; {hint}"
            )

    @property
    def is_quantized(self) -> bool:
        """Whether linear layers are in 4 bit."""
        return bool(self.quantized)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, in 4 bit or not."""
        return self.quantized[name].layout.shape if name in self.quantized else self.entries[name].shape

    def tensors_equal(self, one: str, other: str) -> bool:
        """Return whether two tensors, in 4 bit or not, have equal bytes. They are read up to the first difference."""
        pair = one, other
        if pair not in self._equal:
            self._equal[pair] = self._format(one) == self._format(other) and self._bytes_equal(one, other)
        return self._equal[pair]

    def _format(self, name: str) -> object:
        if name in self.quantized:
            return self.quantized[name].layout
        return self.entries[name].shape, self.entries[name].dtype

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
        """Return the bytes of a tensor in its file, or of the byte vector of a 4-bit weight."""
        return self.quantized[name].layout.total_bytes if name in self.quantized else self.entries[name].nbytes

    def read_range(self, name: str, reader: SafetensorsReader, out: torch.Tensor, start: int) -> None:
        """Fill `out` (CPU) with these bytes from `start` on. `out` is uint8[n] for a 4-bit weight."""
        if name in self.quantized:
            self.quantized[name].read_range(reader, out, start)
        else:
            reader.read_into(out, self.entries[name], start)

    def missing_weight_error(self, name: str) -> UserError:
        """Return the error about a weight that config.json requires and the folder does not hold."""
        stem = name.removesuffix(".weight")
        similar = (key for key in sorted([*self.entries, *self.quantized]) if key.startswith(stem))
        nearest = next((key for key in similar if key != f"{stem}.bias"), None)
        if nearest is None:
            return UserError(f"{self.path}: the weight {name} is missing; get the folder anew")
        return UserError(
            f"{self.path}: the weight {name} is missing; {nearest} is there, which has an unsupported format; give a "
            "copy of the model in 16 bit"
        )

    def _read_entries(self) -> dict[str, TensorEntry]:
        if (self.path / _INDEX).exists():
            weight_map = read_model_json(self.path / _INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise UserError(f"{self.path / _INDEX}: names no files; get the folder anew")
            files = sorted(set(weight_map.values()))
        elif (self.path / _SINGLE).exists():
            files = [_SINGLE]
        else:
            raise UserError(f"{self.path}: holds no {_SINGLE}; {self._missing_files_hint()}")
        entries: dict[str, TensorEntry] = {}
        for file in files:
            if Path(file).name != file:
                raise UserError(f"{self.path / _INDEX}: names a file outside the folder, {file}; get the folder anew")
            entries |= read_safetensors_header(self.path / file)
        return entries

    def _missing_files_hint(self) -> str:
        files = sorted(path.name for path in self.path.glob("*.safetensors"))
        if any(name.startswith("model-") for name in files):
            return f"its parts are there without {_INDEX}; copy that file too"
        if any(name.startswith("consolidated") for name in files):
            return f"{files[0]} has Mistral's own names of tensors; get the files that transformers loads"
        if "adapter_model.safetensors" in files:
            return "it is the folder of an adapter; give the folder of its base"
        pickled = sorted(path.name for path in self.path.glob("*.bin"))
        if pickled:
            return f"{pickled[0]} is a pickle, which is never read; save the model as safetensors"
        return "give the folder of a Hugging Face model"


_DEQUANTIZED = "load it with {config}(dequantize=True) of transformers, save it in 16 bit, and give that folder"
_QUANT_METHOD_HINTS = {
    "fp8": _DEQUANTIZED.format(config="FineGrainedFP8Config"),
    "mxfp4": "give a copy of the model in bf16",
}


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
