"""Checks of a job before it waits in a queue."""

from __future__ import annotations

from rich.console import Console
from transformers import PreTrainedModel

from qlora_dist.config.max_positions import check_seq_len
from qlora_dist.config.schema import Config
from qlora_dist.config.sections import SourceConfig
from qlora_dist.data.dataloader import gradient_accumulation
from qlora_dist.data.source import source_files
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.errors import UserError
from qlora_dist.launch.cluster import Cluster
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.parallel.mesh import MeshSizes, mesh_sizes
from qlora_dist.plan.activations import FP32_BYTES
from qlora_dist.plan.memory_estimate import estimate_memory
from qlora_dist.plan.print_plan import PHASE_LABELS
from qlora_dist.plan.run_spec import make_run_spec
from qlora_dist.runtime.byte_sizes import COMPUTE_BYTES
from qlora_dist.runtime.environment import Launcher, RankInfo
from qlora_dist.train.run_setup import set_up_model, set_up_run


def check_job(config: Config, cluster: Cluster, nodes: int, ranks_per_node: int, console: Console) -> None:
    """Run the checks of `train --dry-run` for the job's number of ranks. The nodes themselves check their devices.

    With `preprocess` in the cluster's file, a node reads the data instead.
    """
    if cluster.gpus_per_node and ranks_per_node > cluster.gpus_per_node:
        raise UserError(
            f"--ranks-per-node: {ranks_per_node} is more than the {cluster.gpus_per_node} GPUs of a node "
            "(gpus_per_node); use one rank per GPU"
        )
    ranks = _first_rank(nodes * ranks_per_node, ranks_per_node, "none")
    sizes = mesh_sizes(config.parallel, ranks)
    if cluster.preprocess:
        gradient_accumulation(config.train.global_batch, config.train.micro_batch, ranks.world_size)
        folder, model, _ = set_up_model(config)
        check_seq_len(config.data.seq_len, model.config.to_dict(), str(folder.path))
        load_tokenizer(folder.path, config.model.add_tokens)
        for source in [*config.data.train, *([config.data.eval] if config.data.eval else [])]:
            source_files(source if isinstance(source, SourceConfig) else SourceConfig(path=source))
    else:
        # the nodes themselves compile
        cpu_train = config.train.model_copy(update={"device": "cpu", "compile": False})
        optim = config.optim.model_copy(update={"offload": "none"})
        setup = set_up_run(config.model_copy(update={"train": cpu_train, "optim": optim}), ranks, console)
        folder, model = setup.folder, setup.model
    _check_memory(config, cluster, model, sizes, console)
    _check_plan(config, cluster, folder, ranks.world_size, nodes, console)


def check_local_run(config: Config, launcher: str, ranks_per_node: int, console: Console) -> None:
    """Run the checks of `train --dry-run` for the ranks that a launcher will start on this machine."""
    names: dict[str, Launcher] = {"torchrun": "torchrun", "mpi": "mpi"}
    set_up_run(config, _first_rank(ranks_per_node, ranks_per_node, names.get(launcher, "none")), console)


def _first_rank(world_size: int, local_size: int, launcher: Launcher) -> RankInfo:
    return RankInfo(rank=0, world_size=world_size, local_rank=0, local_world_size=local_size, launcher=launcher)


def _check_memory(config: Config, cluster: Cluster, model: PreTrainedModel, sizes: MeshSizes, console: Console) -> None:
    base, adapters = estimate_static_bytes(model, sizes, config)
    if config.parallel.offload == "base" or config.parallel.base == "paged":
        base = 0.0 if config.parallel.resident_bytes == "auto" else float(config.parallel.resident_bytes)
    total_gib = (base + adapters) / 2**30
    static = (
        f"a rank holds {total_gib:.3g} GiB between steps ({base / 2**30:.3g} of the base, {adapters / 2**30:.3g} of "
        "adapters, gradients and moments)"
    )
    if cluster.gpu_memory is not None and total_gib > cluster.gpu_memory:
        raise UserError(
            f"{static} and a GPU has {cluster.gpu_memory:g}; use more ranks, another parallel.base, or "
            "parallel.base=paged"
        )
    console.print(static, highlight=False, soft_wrap=True)


def _check_plan(
    config: Config, cluster: Cluster, folder: ModelFolder, world_size: int, nodes: int, console: Console
) -> None:
    """Refuse a run whose planned peak exceeds a GPU, and print a note if the estimate is close."""
    card = None if cluster.gpu_memory is None else int(cluster.gpu_memory * 2**30)
    try:
        memory = estimate_memory(make_run_spec(config, folder.config, world_size, nodes), card)
    except UserError as error:  # the planner has no formulas for this model or engine
        console.print(f"plan: none ({error})", highlight=False, soft_wrap=True)
        return
    peak = f"plan: a rank needs {memory.peak_bytes / 2**30:.3g} GiB {PHASE_LABELS[memory.peak_phase]}"
    if card is not None and memory.peak_bytes > card:
        raise UserError(
            f"{peak}, and a GPU has {cluster.gpu_memory:g}; `qlora-dist plan --search` finds a configuration that fits"
        )
    tight = "; with what the allocator adds that may not fit" if card is not None and not memory.fits(card) else ""
    console.print(f"{peak}{tight}", highlight=False, soft_wrap=True)


def estimate_static_bytes(model: PreTrainedModel, sizes: MeshSizes, config: Config) -> tuple[float, float]:
    """Return the bytes of the base, and the bytes of adapters, gradients and optimizer states, between steps on a rank.

    The bytes are without padding. Paged states use only free memory.
    """
    parameters = list(model.parameters())
    base = sum(p.nbytes for p in parameters if not p.requires_grad) / sizes.base_shards
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    engine, optim, compute = config.parallel.engine, config.optim, COMPUTE_BYTES[config.model.compute_dtype]
    element_bytes = FP32_BYTES + 4 + 2 * (1 if optim.name.endswith("8bit") else 4)
    if optim.name == "zero-adamw":  # it keeps the summed gradients beside the optimizer states
        element_bytes += 4 if optim.offload == "none" else -8
    if engine == "zero3" and compute != FP32_BYTES:
        element_bytes += compute  # a rounded copy, which is gathered
    if engine == "zero2":
        # each rank holds all adapters in the compute dtype; in fp32 its shard's values are part of that copy
        element_bytes -= FP32_BYTES if compute == FP32_BYTES else 0
        return base, element_bytes * trained / sizes.adapter_shards + compute * trained
    return base, element_bytes * trained / sizes.adapter_shards
