"""Speeds and sizes of GPUs and networks: `gpus.yaml`, and users' files of the same form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from qlora_dist.config.config_file import load_yaml_config
from qlora_dist.config.sections import ConfigSection
from qlora_dist.errors import UserError

Positive = Annotated[float, Field(gt=0)]
UnitFraction = Annotated[float, Field(gt=0, le=1)]


class Gpu(ConfigSection):
    """A kind of GPU."""

    memory: Positive
    """GiB that a program sees."""
    tflops: Positive
    """Dense bf16 TFLOP/s with fp32 accumulation, from the data sheet."""
    efficiency: UnitFraction
    """Fraction of `tflops` that QLoRA's matrix products reach."""
    memory_gb_s: Positive
    """GB/s of its memory."""
    link: str
    """Name of the link between the GPUs of a node."""
    host_gb_s: Positive
    """GB/s to and from host memory."""

    @property
    def memory_bytes(self) -> int:
        return int(self.memory * 2**30)


class Link(ConfigSection):
    """A kind of connection."""

    gb_s: Positive
    """GB/s in one direction, from the data sheet."""
    efficiency: UnitFraction
    """Fraction of `gb_s` that collectives reach."""
    per: Literal["gpu", "node"] = "gpu"
    """`gpu` if each GPU has its own connection; `node` if the GPUs of a node share one."""

    def bytes_per_s(self, ranks_per_node: int) -> float:
        """Return the bytes per second of one rank while all ranks send."""
        return 1e9 * self.gb_s * self.efficiency / (ranks_per_node if self.per == "node" else 1)


class Hardware(ConfigSection):
    """All known GPUs and links by name."""

    gpus: dict[str, Gpu] = Field(default_factory=dict)
    links: dict[str, Link] = Field(default_factory=dict)

    def gpu(self, name: str) -> Gpu:
        if name not in self.gpus:
            raise UserError(
                f"--gpu: {name} is not known; choose from {', '.join(sorted(self.gpus))}, or describe it in a file "
                "for --hardware"
            )
        self.link(self.gpus[name].link)
        return self.gpus[name]

    def find_gpu_name(self, device_name: str) -> str | None:
        """Return the GPU's name in this file for a driver's name such as NVIDIA A100-SXM4-80GB; None if unknown."""
        kinds = [kind for kind in self.gpus if all(word in device_name.lower() for word in kind.split("-"))]
        return max(kinds, key=len, default=None)

    def link(self, name: str) -> Link:
        if name not in self.links:
            raise UserError(
                f"{name}: no such link; choose from {', '.join(sorted(self.links))}, or describe it in a file for "
                "--hardware"
            )
        return self.links[name]


def load_hardware(user_file: Path | None = None) -> Hardware:
    """Return the package's hardware, with the entries that a user's file adds or replaces."""
    known = load_yaml_config(Path(__file__).with_name("gpus.yaml"), Hardware)
    if user_file is None:
        return known
    added = load_yaml_config(user_file, Hardware, first_keys="`gpus:` or `links:`")
    return Hardware(gpus=known.gpus | added.gpus, links=known.links | added.links)
