"""Schemes of compressed-tensors: how `quantization_config` says that the weights of a module are quantized."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CompressedScheme:
    """Quantization of a module's weight."""

    format: str
    """Name of the way in which tensors are stored, such as `pack-quantized`."""
    type: str
    """`int` or `float`."""
    bits: int
    strategy: str
    """Range that a scale covers: `tensor`, `channel`, `group`, `tensor_group` or `block`."""
    group_size: int | None
    is_symmetric: bool
    block: tuple[int, int] | None
    """Rows and columns of a block for the strategy `block`."""


class CompressedSchemes:
    """Schemes of a folder, by module. `config` is `quantization_config` of config.json, which lies at `path`.

    A module belongs to the group with its name, else to one with a pattern (`re:...`) that matches it. The last choice
    is a group with the name of a class, as in `compressed_tensors.utils.match.match_targets`. Classes are not known
    here, so each class matches. `ignore` is not read, because an ignored module has no quantized tensors.

    Raises:
        UserError: the configuration has no groups, or a group is damaged.
    """

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        self._names: dict[str, CompressedScheme] = {}
        self._patterns: list[tuple[re.Pattern[str], CompressedScheme]] = []
        self._classes: list[CompressedScheme] = []
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise UserError(f"{path}: quantization_config.config_groups lists no groups; get the file anew")
        for name, group in groups.items():
            try:
                self._add_group(group, str(config.get("format") or ""))
            except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
                raise UserError(
                    f"{path}: quantization_config.config_groups.{name} cannot be read ({error!r}); get the file anew"
                ) from None
        if not self.schemes:
            raise UserError(
                f"{path}: quantization_config quantizes activations only, which is not supported; remove it from the "
                "file to train without it"
            )

    @property
    def schemes(self) -> list[CompressedScheme]:
        """Distinct schemes of all groups."""
        everywhere = [*self._names.values(), *(scheme for _, scheme in self._patterns), *self._classes]
        return list(dict.fromkeys(everywhere))

    def find(self, module: str) -> CompressedScheme | None:
        """Return the scheme of a module's weight; None if the groups leave it open."""
        if module in self._names:
            return self._names[module]
        for pattern, scheme in self._patterns:
            if pattern.match(module):
                return scheme
        if self._classes:
            return self._classes[0]
        return self.schemes[0] if len(self.schemes) == 1 else None  # the model's class may have other names

    def _add_group(self, group: Mapping[str, Any], default_format: str) -> None:
        weights = group.get("weights")
        if weights is None:
            return
        size = weights.get("group_size")
        inferred = "tensor" if size is None else "group" if size > 0 else "channel"
        scheme = CompressedScheme(
            format=str(group.get("format") or default_format),
            type=str(weights.get("type", "int")).lower(),
            bits=int(weights.get("num_bits", 8)),
            strategy=str(weights.get("strategy") or inferred).lower(),
            group_size=size,
            is_symmetric=bool(weights.get("symmetric", True)),
            block=_read_block(weights.get("block_structure")),
        )
        for target in group["targets"]:
            if target.startswith("re:"):
                self._patterns.append((re.compile(target.removeprefix("re:")), scheme))
            elif target[:1].isupper() and "." not in target:
                self._classes.append(scheme)
            else:
                self._names[target] = scheme


def _read_block(block: Any) -> tuple[int, int] | None:
    """Return rows and columns of a block, which may be given as "128x128"."""
    if block is None:
        return None
    rows, columns = block.split("x") if isinstance(block, str) else block
    return int(rows), int(columns)
