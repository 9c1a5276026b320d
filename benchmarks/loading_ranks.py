"""The processes of loading.py, which load with qlora-dist or transformers and send their figures."""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from synthetic import resident_bytes, restart_peak

from qlora_dist.adapters.attach import attach_adapter, make_peft_config
from qlora_dist.config.schema import Config
from qlora_dist.io.read_ahead import ReadProgress
from qlora_dist.model.meta_model import build_meta_model
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.parallel.loaded_model import load_model, shard_model
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group


def load_with_qlora_dist(
    rank: int, world_size: int, nodes: int, port: int, folder: Path, tiny: Path, pipe: Any
) -> None:
    """Load on one rank as `train` does."""
    local = world_size // nodes
    variables = (rank, world_size, rank % local, local, "127.0.0.1", port)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update({name: str(value) for name, value in zip(names, variables, strict=True)})
    torch.set_num_threads(1)
    base = "world" if nodes == 1 else "node"
    config = Config.model_validate(
        {"model": {"base": str(folder)}, "lora": {"r": 16}, "data": {"train": ["-"]}, "parallel": {"base": base}}
    )
    ranks, device = read_rank_info(), torch.device("cpu")
    readings = [ReadProgress(0, 0, 0.0)]
    with process_group(ranks, device):

        def load(path: Path) -> tuple[Any, dict[str, Any]]:
            source = ModelFolder(path)
            model = build_meta_model(source, config.model)
            attach_adapter(model, make_peft_config(model, config.lora, config.model.base))
            loaded = load_model(shard_model(model, config, ranks, device), source, on_read=readings.append)
            return loaded, {"read_bytes": loaded.read_bytes, "waiting_s": readings[-1].wait_s}

        load(tiny)
        measure_load(pipe, lambda: load(folder), lambda loaded: {"static_bytes": loaded.static_bytes})


def load_with_transformers(folder: Path, tiny: Path, pipe: Any) -> None:
    def load(path: Path) -> tuple[Any, dict[str, Any]]:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, device_map="cpu")
        for parameter in model.parameters():
            state = getattr(parameter, "quant_state", None)
            for tensor in [parameter.data] + ([state.absmax, state.state2.absmax] if state else []):
                tensor.view(-1).view(torch.uint8)[::4096].sum()
        return model, {"read_bytes": (path / "model.safetensors").stat().st_size}

    torch.set_num_threads(1)
    load(tiny)
    measure_load(pipe, lambda: load(folder), lambda _: {})


def measure_load(
    pipe: Any, load: Callable[[], tuple[Any, dict[str, Any]]], then: Callable[[Any], dict[str, Any]]
) -> None:
    """Load when all ranks are ready, and send the figures when all are done, with the memory still held."""
    gc.collect()
    pipe.send(None)
    pipe.recv()
    disk, shared, own = disk_bytes(), mapped_bytes(), resident_bytes("RssAnon")
    before, started = restart_peak(), time.perf_counter()
    model, figures = load()
    figures["seconds"] = time.perf_counter() - started
    figures |= {"peak_bytes": resident_bytes("VmHWM") - before, "held_bytes": resident_bytes() - before}
    figures |= then(model) | {"disk_bytes": disk_bytes() - disk}
    pipe.send(None)
    pipe.recv()
    pipe.send(figures | {"in_all_bytes": resident_bytes("RssAnon") - own + mapped_bytes() - shared})
    pipe.recv()


def mapped_bytes() -> int:
    """Return the bytes of mapped files, each page divided by the number of processes that map it."""
    sizes = re.findall(r"^Pss_(?:File|Shmem):\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M)
    return 1024 * sum(map(int, sizes))


def disk_bytes() -> int:
    """Return the bytes read from the disk for this process, pages of mapped files included."""
    return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)[1])  # type: ignore[index]
