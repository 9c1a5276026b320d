"""The arguments of `qlora-dist plan`, and the configuration that they describe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dist.config.config_file import apply_changes, config_from_tree, load_config
from qlora_dist.config.lora_from_adapter import fill_lora_from_adapter
from qlora_dist.config.max_positions import check_seq_len
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.plan.calibration_file import load_calibration
from qlora_dist.plan.hardware import load_hardware
from qlora_dist.plan.model_config import read_model_config
from qlora_dist.plan.run_spec import make_run_spec
from qlora_dist.plan.training_plan import TrainingPlan, make_training_plan


@dataclass(frozen=True, kw_only=True)
class PlanArgs:
    """Arguments of the command line."""

    model: str
    """Name or path of a model, or the configuration file of a run."""
    overrides: Sequence[str]
    gpus: int
    """Number of GPUs of each node."""
    gpu: str
    nodes: int
    network: str
    seq_len: int | None = None
    micro_batch: int | None = None
    hardware: Path | None = None
    calibration: Path | None = None

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes

    @property
    def run_file(self) -> Path | None:
        """Configuration file of the run to plan; None if `model` is a model."""
        path = Path(self.model)
        return path if path.suffix in (".yaml", ".yml") else None


def plan_from_args(args: PlanArgs, config: Config | None = None) -> TrainingPlan:
    """Make the plan of the arguments, or of another configuration on the same machines."""
    hardware = load_hardware(args.hardware)
    gpu, measured = hardware.gpu(args.gpu), load_calibration(args.calibration).devices.get(args.gpu)
    config = config or config_to_plan(args)
    model_config = read_model_config(config.model.base)
    check_seq_len(config.data.seq_len, model_config, config.model.base)
    run = make_run_spec(config, model_config, args.ranks, args.nodes)
    return make_training_plan(run, args.gpu, gpu, hardware.link(gpu.link), hardware.link(args.network), measured)


def config_to_plan(args: PlanArgs) -> Config:
    """Return the configuration to plan: a run's file or the defaults, with the arguments applied.

    Without a run's file, `train.global_batch` defaults to the first multiple of one micro-batch per rank from 16 on.
    """
    if args.run_file is not None:
        sizes = {"data.seq_len": args.seq_len, "train.micro_batch": args.micro_batch}
        options = [f"{key}={value}" for key, value in sizes.items() if value is not None]
        config = fill_lora_from_adapter(load_config(args.run_file, [*args.overrides, *options]))
        _check_global_batch(config, args.ranks)
        return config
    tree: dict[str, dict[str, Any]] = {"model": {"base": args.model}, "data": {"train": ["data/train.jsonl"]}}
    if args.seq_len is not None:
        tree["data"]["seq_len"] = args.seq_len
    if args.micro_batch is not None:
        tree["train"] = {"micro_batch": args.micro_batch, "global_batch": args.micro_batch}
    config = fill_lora_from_adapter(
        config_from_tree(json.loads(json.dumps(tree)), _with_matching_global_batch(args.overrides))
    )
    rows = args.ranks * config.train.micro_batch
    if not any(o.partition("=")[0].strip() == "train.global_batch" for o in args.overrides):
        return apply_changes(config, {"train": {"global_batch": rows * -(-16 // rows)}})
    config = fill_lora_from_adapter(config_from_tree(tree, args.overrides))
    _check_global_batch(config, args.ranks)
    return config


def _check_global_batch(config: Config, ranks: int) -> None:
    rows = ranks * config.train.micro_batch
    if config.train.global_batch % rows:
        raise UserError(
            f"train.global_batch: {config.train.global_batch} is not a multiple of {rows} ({ranks} ranks x "
            f"train.micro_batch: {config.train.micro_batch}); change one of them"
        )


def _with_matching_global_batch(overrides: Sequence[str]) -> list[str]:
    """Append a global batch of one micro-batch, so that a micro-batch of any size passes the configuration's checks."""
    sizes = [o.partition("=")[2] for o in overrides if o.partition("=")[0].strip() == "train.micro_batch"]
    return [*overrides, *(f"train.global_batch={size}" for size in sizes[-1:])]
