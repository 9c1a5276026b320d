"""A Hugging Face model folder: what is in it, without reading the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_dist.errors import UserError
from qlora_dist.nf4.checkpoint import QuantizedEntry, find_quantized, is_part_of_quantized
from qlora_dist.nf4.safetensors_file import Entry, Reader, read_header

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class ModelFolder:
    """config.json and the tensors of a folder, 4-bit weights told from the others.

    Attributes:
        path: the folder.
        config: config.json.
        entries: the tensors that are not part of a 4-bit weight, by name.
        quantized: the 4-bit weights, by name.

    Raises:
        UserError: the folder, its config.json or one of its safetensors files is missing or damaged, or the weights
            are of a kind that is not supported.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such folder; give the folder of a Hugging Face model")
        self.config = read_json(self.path / "config.json")
        entries = self._read_entries()
        with Reader() as reader:
            self.quantized: dict[str, QuantizedEntry] = find_quantized(entries, reader)
        self.entries: dict[str, Entry] = {
            name: entry for name, entry in entries.items() if not is_part_of_quantized(name, self.quantized)
        }
        method = (self.config.get("quantization_config") or {}).get("quant_method")
        if method is not None and not self.quantized:
            raise UserError(
                f"{self.path}: is quantized with {method}, which is not 4-bit bitsandbytes; give the original model"
            )

    @property
    def is_quantized(self) -> bool:
        """Whether the linear layers are in 4 bit."""
        return bool(self.quantized)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, in 4 bit or not."""
        return self.quantized[name].layout.shape if name in self.quantized else self.entries[name].shape

    def missing(self, name: str) -> UserError:
        """What to say of a weight that config.json asks for and the folder does not hold."""
        return UserError(f"{self.path}: the weight {name} is missing; get the folder anew")

    def _read_entries(self) -> dict[str, Entry]:
        if (self.path / _INDEX).exists():
            weight_map = read_json(self.path / _INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise UserError(f"{self.path / _INDEX}: names no files; get the folder anew")
            files = sorted(set(weight_map.values()))
        elif (self.path / _SINGLE).exists():
            files = [_SINGLE]
        else:
            pickled = sorted(p.name for p in self.path.glob("*.bin"))
            hint = f"{pickled[0]} is a pickle, which is never read; save the model as safetensors" if pickled else ""
            raise UserError(f"{self.path}: holds no {_SINGLE}; {hint or 'give the folder of a Hugging Face model'}")
        entries: dict[str, Entry] = {}
        for file in files:
            if Path(file).name != file:
                raise UserError(f"{self.path / _INDEX}: names a file outside the folder, {file}; get the folder anew")
            entries |= read_header(self.path / file)
        return entries


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: missing, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; give the folder of a Hugging Face model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); get the file anew") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; get the file anew")
    return content
