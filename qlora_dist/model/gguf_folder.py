"""A GGUF file as a model folder, whose config.json and tokenizer are made from the file's metadata."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from qlora_dist.errors import UserError
from qlora_dist.formats.gguf import check_ggml_type, gguf_weight
from qlora_dist.io.gguf_file import GGUF_FLOATS, GgufHeader, find_gguf, read_split_gguf
from qlora_dist.io.safetensors_file import SafetensorsReader, SafetensorsWriter, TensorEntry, read_safetensors_header
from qlora_dist.model.gguf_architectures import GGUF_ARCHITECTURES, named_tensors
from qlora_dist.model.gguf_config import find_architecture, gguf_dtype, make_gguf_config
from qlora_dist.model.gguf_tokenizer import save_gguf_tokenizer
from qlora_dist.model.model_folder import ModelFolder, read_model_json
from qlora_dist.model.save_model_folder import COPIED_PATTERNS
from qlora_dist.nf4.quantize import TORCH_DTYPES

_TOKENIZER_MODELS = ("tokenizer.json", "tokenizer.model")


class GgufFolder(ModelFolder):
    """Model whose tensors are in a GGUF file.

    Matrices of another type than the model's, and matrices whose rows llama.cpp has reordered, are weights in a
    published format. Norms and biases are fp32 in all files. They are rounded to the model's type, as transformers
    does, in a file in `config_folder`.

    Args:
        path: the GGUF file, or the folder that holds it.
        header: header of the file, or of all files of a split model.
        config_folder: folder of config.json and of the tokenizer.

    Raises:
        UserError: a tensor is of an unsupported type, or transformers' class has no such tensor.
    """

    def __init__(self, path: Path, header: GgufHeader, config_folder: Path) -> None:
        self._header = header
        super().__init__(path, config_folder=config_folder)

    def _find_tensors(self) -> None:
        metadata = self._header.metadata
        architecture = GGUF_ARCHITECTURES[metadata["general.architecture"]]
        heads = metadata[f"{metadata['general.architecture']}.attention.head_count"]
        kv_heads = metadata.get(f"{metadata['general.architecture']}.attention.head_count_kv", heads)
        dtype = gguf_dtype(self._header)
        types: set[str] = set()
        vectors: dict[str, TensorEntry] = {}
        for name, tensor, is_interleaved in named_tensors(architecture, self._header.tensors):
            if tensor.ggml_type not in types:
                check_ggml_type(tensor, name)
                types.add(tensor.ggml_type)
            if len(tensor.shape) == 1 and tensor.ggml_type in GGUF_FLOATS:
                vectors[name] = tensor.entry
            elif len(tensor.shape) != 2:
                raise UserError(
                    f"{tensor.entry.path}: {name} is in {tensor.ggml_type} with the shape {tensor.shape}, which is no "
                    "matrix; give the model in another format"
                )
            elif tensor.entry.dtype == TORCH_DTYPES[dtype] and not is_interleaved:
                self.entries[name] = tensor.entry
            else:
                head_rows = tensor.shape[0] // (kv_heads if ".k_proj." in name else heads)
                self.published[name] = gguf_weight(tensor, dtype, head_rows=head_rows if is_interleaved else 0)
        self.entries |= self._round_vectors(vectors, TORCH_DTYPES[dtype])

    def _round_vectors(self, vectors: Mapping[str, TensorEntry], dtype: torch.dtype) -> dict[str, TensorEntry]:
        """Write vectors in another type, and return the entries of the file."""
        path = self.config_folder / "rounded.safetensors"
        writer = SafetensorsWriter(path, [(name, dtype, entry.shape) for name, entry in vectors.items()])
        with SafetensorsReader() as reader:
            for name, entry in vectors.items():
                writer.write(name, reader.read(entry).to(dtype))
        writer.close()
        for entry in vectors.values():
            shutil.copystat(entry.path, path)  # an interrupted run resumes if all files have the times that they had
        return read_safetensors_header(path)


@contextmanager
def open_model(source: Path) -> Iterator[ModelFolder]:
    """Open a model folder or a GGUF file. The folder of a file's config.json is deleted on exit.

    If `source` is a folder that holds a GGUF file, its config.json and tokenizer are preferred to those in the file.

    Raises:
        UserError: `source` is damaged or of an unsupported kind.
    """
    path = find_gguf(source)
    if path is None:
        yield ModelFolder(source)
        return
    header = read_split_gguf(path)
    with tempfile.TemporaryDirectory(prefix="qlora-dist-gguf-") as directory:
        folder = Path(directory)
        if source.is_dir():
            for pattern in COPIED_PATTERNS:
                for file in source.glob(pattern):
                    shutil.copy2(file, folder / file.name)
        if (folder / "config.json").exists():
            architecture = find_architecture(header, path)
            model_type = read_model_json(folder / "config.json").get("model_type")
            if model_type not in (architecture.model_type, *architecture.equal_types):
                raise UserError(
                    f"{source / 'config.json'}: has the model_type {model_type}, and {path.name} holds "
                    f"{architecture.model_type}; give the config.json that belongs to the file"
                )
        else:
            config = make_gguf_config(header, path)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if not any((folder / name).exists() for name in _TOKENIZER_MODELS):
            save_gguf_tokenizer(path, header, folder)
        yield GgufFolder(source, header, folder)
