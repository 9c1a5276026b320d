"""Values before training of the rows that tokens get in embedding and head, as transformers gives them.

`PreTrainedModel.resize_token_embeddings` samples each added row from a normal distribution with the mean of the old
rows and 1e-9 times their covariance. If that is not positive definite, it takes the mean. Here the old rows are read in
chunks, twice, so no rank holds the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributions import MultivariateNormal, constraints

from qlora_dist.adapters.attach import seed_from_name
from qlora_dist.adapters.trainable_tokens import vocab_modules
from qlora_dist.io.safetensors_file import SafetensorsReader
from qlora_dist.layers.dequantize import dequantize
from qlora_dist.layers.token_rows import TOKEN_ROWS_NAME, token_rows
from qlora_dist.model.meta_model import LossModel
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.nf4.quantize import dequantize_rows
from qlora_dist.runtime.heartbeat import record_heartbeat
from qlora_dist.shard_view import flat_offset, full_shape, local_slice, local_tensor

_EPSILON = 1e-9
"""Factor on the covariance, `epsilon` of transformers' `_init_added_embeddings_weights_with_mean`."""
_CHUNK_VALUES = 2**24


@torch.no_grad()
def init_new_token_rows(model: LossModel, folder: ModelFolder, seed: int, device: torch.device) -> None:
    """Set this rank's shards of rows that tokens have in embedding and head beside the folder's weights.

    All ranks call this. The model is sharded and has the weights of its base. Rank 0 computes the values, so they do
    not depend on the number of ranks. Rows that the folder has begin with their values there.
    """
    for path, module in vocab_modules(model).items():
        if (rows := token_rows(module)) is not None:
            parameter = module.get_parameter(TOKEN_ROWS_NAME)
            values = _values_from_rank_0(model, folder, f"{path}.weight", rows.ids, seed, device)
            local_tensor(parameter).copy_(local_slice(parameter, values))
            continue
        for name in ("weight", "bias"):
            grown = _grown_parameter(module, name, model, folder, path)
            if grown is not None:
                old, new = grown
                ids = range(old, full_shape(new)[0])
                _fill_end(new, _values_from_rank_0(model, folder, f"{path}.{name}", ids, seed, device))


def folder_rows(
    folder: ModelFolder, key: str, ids: Sequence[int], generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """Return the rows before training of an embedding, head or head's bias in a folder, fp32[len(ids), ...].

    Rows beyond the folder's are sampled in ascending order, and rounded to the type in the folder, as by transformers.
    """
    count, *columns = folder.shape(key)
    result = torch.empty(len(ids), *columns, device=device)
    new = sorted(token for token in ids if token >= count)
    with SafetensorsReader() as reader:
        matrix = _FolderMatrix(folder, key, reader, device)
        if new:
            sample = _sample_bias if not columns else _sample_rows
            sampled = dict(zip(new, sample(matrix, len(new), generator).to(matrix.dtype).float(), strict=True))
        for index, token in enumerate(ids):
            result[index] = sampled[token] if token >= count else matrix.rows(token, token + 1)[0]
    return result


class _FolderMatrix:
    """Rows of a tensor in a folder. A quantized tensor is read whole."""

    def __init__(self, folder: ModelFolder, key: str, reader: SafetensorsReader, device: torch.device) -> None:
        self.shape, self._device, self._reader = folder.shape(key), device, reader
        self._layout, (self.dtype, _) = folder.packed_layout(key), folder.unquantized_format(key)
        if self._layout is None:
            self._entry = folder.entries[key]
        else:
            self._packed = torch.empty(self._layout.total_bytes, dtype=torch.uint8)
            folder.read_range(key, reader, self._packed, 0)

    def rows(self, first: int, stop: int) -> torch.Tensor:
        """Return the rows as fp32[stop - first, ...] on the device."""
        if self._layout is None:
            out = torch.empty(stop - first, *self.shape[1:], dtype=self.dtype)
            self._reader.read_into(out, self._entry, first * out[0].nbytes)
            return out.to(self._device).float()
        if isinstance(self._layout, NF4Layout) and self._layout.shape[1] % self._layout.block_size == 0:
            rows = torch.arange(first, stop)
            return dequantize_rows(self._packed, self._layout, rows, torch.float32).to(self._device)
        return dequantize(self._packed, self._layout, torch.float32)[first:stop].to(self._device)

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yield all rows."""
        step = max(1, _CHUNK_VALUES // max(1, *self.shape[1:], 1))
        for first in range(0, self.shape[0], step):
            record_heartbeat(phase="loading")
            yield self.rows(first, min(first + step, self.shape[0]))


def _sample_rows(matrix: _FolderMatrix, count: int, generator: torch.Generator) -> torch.Tensor:
    rows, h = matrix.shape
    total = torch.zeros(h, dtype=torch.float64, device=matrix.rows(0, 1).device)
    for chunk in matrix.chunks():
        total += chunk.sum(dim=0, dtype=torch.float64)
    mean = (total / rows).float()
    covariance = torch.zeros(h, h, device=mean.device)
    for chunk in matrix.chunks():
        centered = chunk - mean
        covariance.addmm_(centered.t(), centered)
    covariance.mul_(_EPSILON / rows)
    if not constraints.positive_definite.check(covariance).all():
        return mean.expand(count, h)
    scale = MultivariateNormal(mean, covariance_matrix=covariance).scale_tril
    noise = torch.normal(torch.zeros(count, h), torch.ones(count, h), generator=generator).to(mean.device)
    return mean + noise @ scale.t()


def _sample_bias(matrix: _FolderMatrix, count: int, generator: torch.Generator) -> torch.Tensor:
    """Sample entries as transformers' `_init_added_lm_head_bias_with_mean` does."""
    bias = matrix.rows(0, matrix.shape[0])
    noise = torch.normal(torch.zeros(count), torch.ones(count), generator=generator).to(bias.device)
    return bias.mean() + _EPSILON * bias.std() * noise


def _values_from_rank_0(
    model: LossModel, folder: ModelFolder, name: str, ids: Sequence[int], seed: int, device: torch.device
) -> torch.Tensor:
    """Return the rows `ids` of a parameter before training, fp32[len(ids), ...] on the device of every rank."""
    key = model.origins[name].keys[0]
    if dist.get_rank() == 0:
        generator = torch.Generator().manual_seed(seed_from_name(seed, name))
        values = folder_rows(folder, key, ids, generator, device)
    else:
        values = torch.empty(len(ids), *folder.shape(key)[1:], device=device)
    dist.broadcast(values, src=0)
    return values


def _grown_parameter(
    module: nn.Module, name: str, model: LossModel, folder: ModelFolder, path: str
) -> tuple[int, nn.Parameter] | None:
    """Return the folder's rows and the parameter, if the parameter has more; else None."""
    parameter, source = dict(module.named_parameters(recurse=False)).get(name), model.origins.get(f"{path}.{name}")
    if parameter is None or source is None:
        return None
    rows = folder.shape(source.keys[0])[0]
    return (rows, parameter) if full_shape(parameter)[0] > rows else None


def _fill_end(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Write values to the last rows of a parameter, as far as they lie in this rank's shard."""
    local, first = local_tensor(parameter).view(-1), flat_offset(parameter)
    begin = full_shape(parameter).numel() - values.numel()
    skipped = max(0, begin - first)
    if skipped < local.numel():
        local[skipped:] = values.flatten()[first + skipped - begin :][: local.numel() - skipped]
