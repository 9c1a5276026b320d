"""bitsandbytes' serialized 4-bit weights: tensors beside a `NAME.weight`, and their place in the byte vector.

```
    NAME.weight                               codes, uint8[numel/2, 1], or the same bytes in another storage type
    NAME.weight.absmax                        uint8[blocks] with double quantization, else fp32[blocks]
    NAME.weight.quant_map                     fp32[16], the code table
    NAME.weight.nested_absmax                 fp32[blocks/256]     } double quantization only
    NAME.weight.nested_quant_map              fp32[256]            }
    NAME.weight.quant_state.bitsandbytes__nf4 JSON as uint8: shape, dtype, blocksize, nested_offset
```

Source: `bitsandbytes.functional.QuantState.as_dict(packed=True)` and `Params4bit.from_prequantized`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from qlora_dist.errors import UserError
from qlora_dist.io.safetensors_file import SafetensorsReader, TensorEntry
from qlora_dist.nf4.nf4_layout import NESTED_BLOCK_SIZE, NF4Layout
from qlora_dist.nf4.quantize import TORCH_DTYPES, code_table, nested_code_table

_STATE = ".quant_state.bitsandbytes__"
_LONGEST_FLOAT = 25  # characters of a double's repr; the JSON is padded because its length is needed before its content


@dataclass(frozen=True)
class QuantizedWeightEntry:
    """4-bit weight in a folder."""

    layout: NF4Layout
    parts: tuple[tuple[slice, TensorEntry], ...]
    """Ranges of the vector's bytes, with the tensor in the file that holds each."""
    offset: float | None
    """Offset of the absmax values, which the file stores as a number in the JSON; None: no double quantization."""

    @property
    def first_tensor(self) -> TensorEntry:
        """The codes' tensor."""
        return self.parts[0][1]

    def read_range(self, reader: SafetensorsReader, out: torch.Tensor, start: int) -> None:
        """Fill `out: uint8[n]` (CPU) with bytes start .. start+n of the vector. No other bytes are read."""
        position, stop = start, start + out.numel()
        for span, entry in self.parts:
            lo, hi = max(span.start, start), min(span.stop, stop)
            if lo < hi:
                out[position - start : lo - start].zero_()  # the gap between two parts
                reader.read_into(out[lo - start : hi - start], entry, lo - span.start)
                position = hi
        out[position - start :].zero_()
        if self.offset is not None:
            span = self.layout.offset
            lo, hi = max(span.start, start), min(span.stop, stop)
            if lo < hi:
                value = torch.tensor([self.offset], dtype=torch.float32).view(torch.uint8)
                out[lo - start : hi - start] = value[lo - span.start : hi - span.start]


def expert_key(key: str, expert: int) -> str:
    """Return the name that one expert's matrix of a stacked tensor has among the weights of a quantized folder."""
    return f"{key}.{expert}.weight"


def find_quantized_weights(
    entries: Mapping[str, TensorEntry], reader: SafetensorsReader
) -> dict[str, QuantizedWeightEntry]:
    """Find the 4-bit weights among a folder's tensors, by name (`....weight`)."""
    return {key.partition(_STATE)[0]: _quantized_entry(key, entries, reader) for key in entries if _STATE in key}


def is_part_of_quantized(name: str, quantized: Mapping[str, QuantizedWeightEntry]) -> bool:
    """Return whether a tensor is a 4-bit weight, or one of the tensors beside it."""
    parts = name.split(".")
    return any(".".join(parts[:n]) in quantized for n in range(1, len(parts) + 1))


def _quantized_entry(key: str, entries: Mapping[str, TensorEntry], reader: SafetensorsReader) -> QuantizedWeightEntry:
    name, _, quant_type = key.partition(_STATE)
    try:
        state = json.loads(bytes(reader.read(entries[key]).numpy()))
        weight, absmax, quant_map = (entries[name + part] for part in ("", ".absmax", ".quant_map"))
        nested = entries.get(f"{name}.nested_absmax")
        layout = NF4Layout(
            shape=tuple(state["shape"]),
            quant_type=state["quant_type"],
            block_size=state["blocksize"],
            double_quant=nested is not None,
            dtype=state["dtype"],
        )
        tables = [(quant_map, code_table(layout.quant_type))]
        parts = [(layout.codes, weight), (layout.absmax, absmax)]
        offset = None
        if nested is not None:
            parts.append((layout.nested_absmax, nested))
            tables.append((entries[f"{name}.nested_quant_map"], nested_code_table(torch.device("cpu"))))
            offset = float(state["nested_offset"])
            if state["nested_blocksize"] != NESTED_BLOCK_SIZE or state["nested_dtype"] != "float32":
                raise ValueError("its nested absmax values are not fp32 in blocks of 256")
        if layout.dtype not in TORCH_DTYPES or quant_type != layout.quant_type:
            raise ValueError(f"it is {layout.quant_type} of {layout.dtype}")
        for span, entry in parts:
            if entry.nbytes != span.stop - span.start:
                raise ValueError(f"{entry.nbytes} bytes where its shape asks for {span.stop - span.start}")
        for entry, table in tables:
            if not torch.equal(reader.read(entry).flatten().float(), table):
                raise ValueError("its code table is not bitsandbytes'")
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{entries[key].path}: the 4-bit weight {name} cannot be used ({error}); quantize the model again"
        ) from None
    return QuantizedWeightEntry(layout, tuple(parts), offset)


def quant_state_specs(name: str, layout: NF4Layout) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Yield name, type and shape of the tensors that `quant_state_tensors` returns."""
    yield name, torch.uint8, (layout.codes.stop, 1)
    yield f"{name}.absmax", torch.uint8 if layout.double_quant else torch.float32, (layout.num_blocks,)
    yield f"{name}.quant_map", torch.float32, (16,)
    if layout.double_quant:
        yield f"{name}.nested_absmax", torch.float32, (-(-layout.num_blocks // NESTED_BLOCK_SIZE),)
        yield f"{name}.nested_quant_map", torch.float32, (256,)
    yield f"{name}{_STATE}{layout.quant_type}", torch.uint8, (len(_state_json(layout, 0.0)),)


def quant_state_tensors(name: str, packed: torch.Tensor, layout: NF4Layout) -> dict[str, torch.Tensor]:
    """Return a packed weight as bitsandbytes' tensors, by name."""
    packed = packed.cpu()
    offset = packed[layout.offset].view(torch.float32).item() if layout.double_quant else 0.0
    values = [packed[layout.codes], packed[layout.absmax], code_table(layout.quant_type)]
    if layout.double_quant:
        values += [packed[layout.nested_absmax], nested_code_table(torch.device("cpu"))]
    values.append(torch.frombuffer(bytearray(_state_json(layout, offset)), dtype=torch.uint8))
    return {
        key: value.contiguous().view(dtype).view(shape)
        for (key, dtype, shape), value in zip(quant_state_specs(name, layout), values, strict=True)
    }


def _state_json(layout: NF4Layout, offset: float) -> bytes:
    state = {
        "quant_type": layout.quant_type,
        "blocksize": layout.block_size,
        "dtype": layout.dtype,
        "shape": list(layout.shape),
    }
    if not layout.double_quant:
        return json.dumps(state).encode()
    state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32"}
    length = len(json.dumps(state | {"nested_offset": 0.0})) + _LONGEST_FLOAT
    return json.dumps(state | {"nested_offset": offset}).ljust(length).encode()
