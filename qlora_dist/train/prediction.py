"""The memory, traffic and speed of a run by the planner's formulas, to compare with what is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.plan.calibration_file import calibrated_speeds, load_calibration
from qlora_dist.plan.hardware import load_hardware
from qlora_dist.plan.memory_estimate import MemoryEstimate, estimate_memory
from qlora_dist.plan.print_plan import PHASE_LABELS
from qlora_dist.plan.run_spec import RunSpec, make_run_spec
from qlora_dist.plan.step_time import TIME_UNCERTAINTY, RankSpeeds, data_sheet_speeds, estimate_step_time
from qlora_dist.plan.step_traffic import step_traffic
from qlora_dist.runtime.byte_sizes import format_bytes
from qlora_dist.train.run_setup import RunSetup

_DEFAULT_NETWORK = "infiniband-400g"
"""Network that is assumed between nodes if the links are not calibrated."""


@dataclass(frozen=True, kw_only=True)
class RunPrediction:
    """Predicted memory, traffic and speed per rank, unless a field says otherwise."""

    run: RunSpec
    """Run as the planner describes it."""
    memory: MemoryEstimate
    """Predicted memory by phase."""
    traffic: dict[str, int]
    """Bytes received per step, by mesh dimension."""
    tokens_per_s: float | None
    """Tokens per second of all ranks together; None if the device's speed is unknown."""
    is_measured: bool
    """True if the device's speeds were measured by `plan --calibrate`, false if they come from its data sheet."""

    def describe(self) -> str:
        """Return the prediction in one sentence."""
        memory = self.memory
        received = ", ".join(
            f"{dim} {format_bytes(nbytes)}" for dim, nbytes in self.traffic.items() if dim != "control"
        )
        source = "by what --calibrate has measured" if self.is_measured else f"+-{TIME_UNCERTAINTY:.0%}"
        speed = f"; {self.tokens_per_s:,.0f} tokens/s ({source})" if self.tokens_per_s is not None else ""
        return (
            f"plan: each rank holds {format_bytes(memory.static_bytes)} between steps and "
            f"{format_bytes(memory.peak_bytes)} {PHASE_LABELS[memory.peak_phase]}, "
            f"and receives {received or 'nothing'} per step{speed}"
        )

    def compare_with(self, measured: dict[str, Any], optimizer_state_bytes: int) -> dict[str, list[float | None]]:
        """Return planned figures and those in summary.json (`measured`) of rank 0, by term, with None for unknown ones.

        On a CPU the measured peak includes Python and its libraries, which the formulas leave out, so it is not
        compared.
        """
        terms: dict[str, list[float | None]] = {
            "weights_bytes": [self.memory.weights_bytes, measured["static_bytes"][0]],
            "moments_bytes": [self.memory.static["moments"], optimizer_state_bytes],
        }
        if self.run.device == "cuda":
            terms["peak_bytes"] = [self.memory.peak_bytes, measured["peak_bytes"][0]]
        for dim, nbytes in measured["comm_bytes_per_step"].items():
            if dim != "control":
                terms[f"{dim}_bytes_per_step"] = [self.traffic.get(dim, 0), nbytes]
        return terms | {"tokens_per_s": [self.tokens_per_s, measured["tokens_per_s"] or None]}


def predict_run(setup: RunSetup) -> RunPrediction | str:
    """Return the prediction for a run, or a sentence about why there is none. It never fails, so the run continues."""
    try:
        run = planned_run(setup, setup.config)
        device_speed, is_measured = device_speeds(setup.device, run)
        card = torch.cuda.mem_get_info(setup.device)[1] if setup.device.type == "cuda" else None
        memory = estimate_memory(run, card)
        tokens_per_s = estimate_step_time(run, memory, device_speed).tokens_per_s if device_speed is not None else None
        traffic = step_traffic(run.model.units, run.shard_counts, run.accumulation, run.compute_bytes)
    except UserError as error:
        return f"plan: none ({error})"
    except Exception as error:  # the planner may lack formulas for the model
        return f"plan: none ({type(error).__name__}: {error})"
    return RunPrediction(run=run, memory=memory, traffic=traffic, tokens_per_s=tokens_per_s, is_measured=is_measured)


def planned_run(setup: RunSetup, config: Config) -> RunSpec:
    """Return the planner's description of a run, possibly with another configuration."""
    world_size, nodes = setup.ranks.world_size, setup.ranks.world_size // setup.ranks.local_world_size
    return make_run_spec(
        config, setup.folder.config, world_size, nodes, "cuda" if setup.device.type == "cuda" else "cpu"
    )


def device_speeds(device: torch.device, run: RunSpec) -> tuple[RankSpeeds | None, bool]:
    """Return the device's speeds, None if unknown, and whether `plan --calibrate` measured them."""
    hardware, measured = load_hardware(), load_calibration().devices
    if device.type == "cpu":
        cpu = measured.get("cpu")
        if (
            cpu is None
            or (run.ranks_per_node > 1 and not cpu.inside_bytes)
            or (run.nodes > 1 and not cpu.between_bytes)
        ):
            return None, False
        return calibrated_speeds(cpu), True
    name = torch.cuda.get_device_name(device)
    kind = hardware.find_gpu_name(name)
    if kind is None:
        return None, False
    gpu = hardware.gpu(kind)
    assumed = data_sheet_speeds(run, gpu, hardware.link(gpu.link), hardware.link(_DEFAULT_NETWORK))
    return (calibrated_speeds(measured[kind], assumed), True) if kind in measured else (assumed, False)
