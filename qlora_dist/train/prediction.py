"""What a run is going to need by the planner's formulas, said before it starts, and beside what it has needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora_dist.adapters.attach import is_lora_parameter
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

_DEFAULT_NETWORK = "infiniband-400g"  # where nobody has measured


@dataclass(frozen=True)
class RunPrediction:
    """Predicted memory, traffic and speed, of each rank unless it says otherwise."""

    run: RunSpec
    memory: MemoryEstimate
    traffic: dict[str, int]
    tokens_per_s: float | None
    """Tokens per second of all ranks together; None: the speed of this device is not known."""
    is_measured: bool
    """True if the device's speeds were measured by `plan --calibrate`, false if they come from its data sheet."""

    def sentence(self) -> str:
        """Return the plan in one sentence."""
        memory = self.memory
        received = ", ".join(
            f"{dim} {format_bytes(nbytes)}" for dim, nbytes in self.traffic.items() if dim != "control"
        )
        source = "by what --calibrate has measured" if self.is_measured else f"+-{TIME_UNCERTAINTY:.0%}"
        speed = f"; {self.tokens_per_s:,.0f} tokens/s ({source})" if self.tokens_per_s is not None else ""
        return (
            f"plan: each rank holds {format_bytes(memory.static_bytes)} between steps and {format_bytes(memory.peak_bytes)} "
            f"{PHASE_LABELS[memory.peak_phase]}, and receives {received or 'nothing'} per step{speed}"
        )

    def against(self, measured: dict[str, Any], optimizer_state_bytes: int) -> dict[str, list[float | None]]:
        """Return planned and measured figures of rank 0, by term; None where a figure is not known.

        On a CPU the measured peak is the process's, with Python and its libraries, which no formula here has: it is
        not compared.

        Args:
            measured: content of summary.json.
            optimizer_state_bytes: bytes of the optimizer's states on the device.
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
    """The plan of a run, or why there is none. A run must not fail because of its plan."""
    try:
        run = planned_run(setup, setup.config)
        device_speed, is_measured = device_speeds(setup.device, run)
        card = torch.cuda.mem_get_info(setup.device)[1] if setup.device.type == "cuda" else None
        memory = estimate_memory(run, card)
        tokens_per_s = estimate_step_time(run, memory, device_speed).tokens_per_s if device_speed is not None else None
        traffic = step_traffic(run.model.units, run.shard_counts, run.accumulation, run.compute_bytes)
    except UserError as error:
        return f"plan: none ({error})"
    except Exception as error:  # of a model that nobody has planned yet
        return f"plan: none ({type(error).__name__}: {error})"
    return RunPrediction(run, memory, traffic, tokens_per_s, is_measured)


def check_adapter_numel(run: RunSpec, model: nn.Module) -> None:
    """Compare the elements of adapters that the plan counts with the model's, before any weight is read.

    The bytes of adapters and moments follow from their number. A folder that has only some of its layers in 4 bit has
    another number of adapters than its config.json tells, and is not compared.

    Args:
        run: as planned.
        model: on meta, with its adapters, not sharded.

    Raises:
        UserError: they differ, with both figures.
    """
    parameters = [parameter for unit in run.model.units for parameter in unit.parameters]
    planned = sum(
        p.numel for p in parameters if p.trained and not p.always_row_sharded
    )  # without modules trained whole
    real = sum(p.numel() for name, p in model.named_parameters() if is_lora_parameter(name))
    in_4_bit = sum(parameter.dtype == torch.uint8 for parameter in model.parameters())
    if real != planned and in_4_bit == sum(parameter.is_quantized for parameter in parameters):
        raise UserError(
            f"lora: the adapters have {real:,} elements and the plan counts {planned:,}, so a matrix may lack its "
            "adapter; report this with the model's config.json, and name some layers in lora.targets until then"
        )


def planned_run(setup: RunSetup, config: Config) -> RunSpec:
    """What the planner knows of a run, or of the same run with another configuration."""
    world_size, nodes = setup.ranks.world_size, setup.ranks.world_size // setup.ranks.local_world_size
    return make_run_spec(
        config, setup.folder.config, world_size, nodes, "cuda" if setup.device.type == "cuda" else "cpu"
    )


def device_speeds(device: torch.device, run: RunSpec) -> tuple[RankSpeeds | None, bool]:
    """As measured (`plan --calibrate`) or by the GPU's name, and whether they were measured. None: nobody knows."""
    hardware, measured = load_hardware(), load_calibration().devices
    if device.type == "cpu":
        of_cpu, nodes = measured.get("cpu"), run.nodes
        if (
            of_cpu is None
            or (run.ranks_per_node > 1 and not of_cpu.inside_bytes)
            or (nodes > 1 and not of_cpu.between_bytes)
        ):
            return None, False
        return calibrated_speeds(of_cpu), True
    name = torch.cuda.get_device_name(device)
    kind = hardware.find_gpu_name(name)
    if kind is None:
        return None, False
    gpu = hardware.gpu(kind)
    assumed = data_sheet_speeds(run, gpu, hardware.link(gpu.link), hardware.link(_DEFAULT_NETWORK))
    return (calibrated_speeds(measured[kind], assumed), True) if kind in measured else (assumed, False)
