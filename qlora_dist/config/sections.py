"""Sections of the configuration. A field's docstring is its documentation."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticCustomError

DEFAULT_STEPS = 100
"""Steps of a run with neither `train.steps` nor `train.epochs`."""

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


def _parse_bytes(value: object) -> object:
    if not isinstance(value, str) or value == "auto":
        return value
    try:
        return int(_BYTE_SIZE.validate_python(value))
    except ValidationError:
        raise PydanticCustomError("bytes", "Input should be a number of bytes, or text such as 2GiB") from None


_BYTE_SIZE = TypeAdapter(ByteSize)
ByteCount = Annotated[int, Field(ge=0), BeforeValidator(_parse_bytes)]
"""A number, or text such as 16MiB."""


class ConfigSection(BaseModel):
    """A part of the configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )


class ModelConfig(ConfigSection):
    """The frozen base model."""

    base: str
    """Folder of a Hugging Face causal language model: already in 4 bit (`qlora-dist quantize`, or anybody's
    bitsandbytes folder), or in 16/32 bit, then quantized while it is loaded."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """Code table used when the base is quantized on loading (QLoRA, section 3: 4-bit NormalFloat)."""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one absmax, when the base is quantized on loading."""
    double_quant: bool = True
    """Quantize the absmax values too (QLoRA, section 3: Double Quantization), when quantized on loading."""
    embeddings: Literal["16bit", "4bit"] = "16bit"
    """4bit: quantize the input embedding and the output head on loading too, where the folder does not have them in
    4 bit already."""
    compute_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Precision of the forward and backward pass, and of the base's parameters that stay unquantized."""
    attention: Literal["sdpa", "flex", "eager"] = "sdpa"
    """sdpa: torch's kernels, each packed sequence by itself and without masks where the architecture allows it; flex:
    torch's flex_attention with block masks, for GPUs (on a CPU it has no backward, and plain formulas stand in); eager:
    transformers' plain formulas, with masks."""


class LoraConfig(ConfigSection):
    """The trained adapter."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    from_adapter: Annotated[str, Field(min_length=1)] | None = Field(default=None, alias="from")
    """Folder of an adapter to begin from, written here or by PEFT. Its rank, alpha, targets, experts, modules_to_save,
    rslora and dora are taken where the key is not set, and compared where it is. None: begin from random A and zero
    B."""
    r: PositiveInt = 64
    """Rank."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """Numerator of the scaling alpha / r."""
    dropout: Fraction = 0.05
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """all-linear: every quantized layer; or the last parts of the names of those to adapt, such as [q_proj, v_proj]."""
    experts: bool = False
    """Adapt the experts of sparse models too, each with matrices of its own. Needs dropout 0, as in PEFT."""
    modules_to_save: list[str] = []
    """Modules that are trained whole, by the last part of their names, such as [embed_tokens, lm_head] for the sake of
    new tokens. Their weights, in fp32, are sharded like the adapters; a tied head follows its embedding, so name
    [embed_tokens] alone there."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (rank-stabilized LoRA)."""
    dora: bool = False
    """Train each output's magnitude apart from its direction (DoRA)."""


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str | dict) else value


DataFormat = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt-completion",
    "text",
    "oasst",
    "hh-rlhf",
    "flan",
    "longform",
]


class SourceConfig(ConfigSection):
    """One source of a mixture."""

    path: str
    """File (JSONL, JSON, Parquet, CSV), pattern or folder of such files, folder saved by `datasets`, or a data set's
    name on the Hugging Face hub."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each of its rows is trained per epoch: 0.5, every other epoch; 2, twice an epoch."""
    format: DataFormat | None = None
    """Shape of its rows; null: as `data.format` says."""
    split: str = "train"
    """Name of the split to read, in a data set with splits."""
    subset: str | None = None
    """Name of the configuration to read, in a data set with several."""


class DataConfig(ConfigSection):
    """Training and evaluation data."""

    train: Annotated[list[str | SourceConfig], Field(min_length=1), BeforeValidator(_as_list)]
    """Files, folders or data sets; each a path, or a mapping with `path` and `weight`, `format`, `split`, `subset`. One
    alone need not be a list."""
    eval: str | SourceConfig | None = None
    """Held-out rows; null: no evaluation."""
    format: DataFormat = "auto"
    """Shape of the rows; auto: by the fields of each source's first row."""
    chat_template: str | None = None
    """How conversations are written. null: by the tokenizer's template; `chatml`, `alpaca` or `guanaco`: for a base
    model; or the path of a Jinja file."""
    seq_len: PositiveInt = 2048
    """Tokens per row of a batch."""
    too_long: Literal["truncate", "split", "drop"] = "truncate"
    """What becomes of a sequence longer than that. truncate: it is cut there; split: it is cut into several; drop: it
    is left out."""
    packing: Literal["best-fit", "none"] = "best-fit"
    """best-fit: several sequences in one row, none of which sees another; none: one sequence in each row."""
    group_by_length: bool = False
    """Without packing: put sequences of similar length into a step, so that little is padded. Changes the order."""
    mask: Literal["assistant", "last", "all"] = "assistant"
    """Tokens that are trained. assistant: the assistant's turns; last: the last of them; all: every token. Rows of
    `text` train all, rows of `prompt` and `completion` the completion unless all; `train` or `weight` (0 or 1) of a
    message overrides it."""
    multi_turn: Literal["auto", "whole", "per-answer"] = "auto"
    """Form in which a conversation of several answers is trained. whole: one row. per-answer: one row for each trained
    answer, with the prompt that inference would see. auto: whole, and per-answer where the chat template rewrites
    history."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do at a row that cannot be used. error: stop; skip: count it and go on."""
    max_bad_rows: Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^(100|\d{1,2}(\.\d+)?)%$")] = 100
    """Most rows of a source that may be skipped: a number, or a share such as 1%, which is checked at the end of the
    source."""
    cache: str = "~/.cache/qlora-dist"
    """Folder of what has been tokenized, seen by all nodes or one on each. The default follows XDG_CACHE_HOME."""
    workers: PositiveInt | Literal["auto"] = "auto"
    """Processes that tokenize; auto: one for each processor core that this process may use."""


class ParallelConfig(ConfigSection):
    """How base, adapters and optimizer states are distributed over the ranks."""

    engine: Literal["fsdp2", "zero2", "zero3"] = "fsdp2"
    """What shards the model. fsdp2: PyTorch's FSDP2; zero3: DeepSpeed's ZeRO-3 (`pip install 'qlora-dist[zero]'`).
    zero2: base and
    adapters are whole on each rank (`base: replicate`), and only gradients and moments are cut. The numbers are the
    same, and a run may change its engine where it goes on from a checkpoint."""
    base: Literal["replicate", "node", "world", "paged"] | PositiveInt = "node"
    """Ranks that share one copy of the frozen base. replicate: each rank has a whole one; node: those of a node; world:
    all; a number: that many. paged: those of a node, and a rank keeps `resident_bytes` of its 4-bit layers on the
    device; the others are fetched ahead of their use from where `paging` says."""
    resident_bytes: ByteCount | Literal["auto"] = "auto"
    """With `base: paged`, what a rank keeps of its part of the layers on the device: bytes, or text such as 2GiB, at
    least two layers. 0: two layers; auto: half of what is free before loading, less what else the rank will hold. On a
    CPU that is memory, and the node's ranks share it."""
    adapter: Literal["world", "node"] = "world"
    """Ranks that share the adapters, their gradients and optimizer states. world: all; node: those of a node, and the
    nodes all-reduce the gradients."""
    offload: Literal["none", "base"] = "none"
    """base: keep the frozen base's shards in host memory and copy each layer to the device when it is used."""
    prefetch: Annotated[int, Field(ge=0)] = 1
    """Layers gathered ahead of the one in use."""


class OptimConfig(ConfigSection):
    """The update of the adapters."""

    name: Literal["adamw", "adamw-8bit", "paged-adamw-32bit", "paged-adamw-8bit", "zero-adamw"] = "paged-adamw-32bit"
    """AdamW. Its moments are in 32 bit, or in 8 bit (bitsandbytes' blockwise states), on the rank that holds the shard
    they update. paged: `resident_bytes` of them stay on the device, the others come and go by pages. zero-adamw: with
    `parallel.engine: zero3`, DeepSpeed's optimizer, in 32 bit, where `offload` says."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """With zero-adamw, where DeepSpeed keeps the moments and the fp32 values that it updates. none: on the device; cpu:
    in host memory; nvme: in files in `paging.dir`, which needs libaio and a C++ compiler. They are moved by
    `paging.page_bytes` of moments or more."""
    resident_bytes: ByteCount | Literal["auto"] = "auto"
    """With a paged optimizer, bytes of moments that each rank keeps on the device, or text such as 2GiB: at least two
    pages. 0: two pages; auto: what the device has left after a step's peak."""
    lr: Annotated[float, Field(gt=0)] = 2.0e-4
    """Learning rate after the warm-up."""
    lora_plus_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the B matrices' learning rate (LoRA+ recommends 16)."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.999
    """Decay of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1.0e-8
    """Added to the square root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up. constant: as it is; linear, cosine: down to zero at the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Steps over which the learning rate rises from zero; cut to the run's steps."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 0.3
    """Norm to which the gradient of all adapters together is scaled down; null: no limit."""


class PagingConfig(ConfigSection):
    """Where the pages lie that are not on the device."""

    to: Literal["auto", "unified", "host", "disk"] = "auto"
    """host: in host memory; disk: in a file; unified: CUDA's managed memory, moved by the driver, for optimizer states
    only; auto: host for GPUs, disk for CPUs."""
    dir: str | None = None
    """Folder of that file, on storage of the node's own; null: the system's folder for temporary files. The file is
    removed when the run ends."""
    page_bytes: Annotated[ByteCount, Field(ge=4096)] = 2**24
    """Bytes of a page of moments."""
    ahead: Annotated[int, Field(ge=0)] = 1
    """Pages fetched ahead of the one in use."""


class TrainConfig(ConfigSection):
    """The loop."""

    steps: PositiveInt | None = None
    """Optimizer steps; null: as many as `epochs` takes, or 100 without it."""
    epochs: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    """Passes over the data, in place of `steps`."""
    global_batch: PositiveInt = 16
    """Rows per optimizer step, over all ranks and micro-batches."""
    micro_batch: PositiveInt = 1
    """Rows per forward pass of one rank."""
    checkpointing: Literal["none", "full"] | PositiveInt = "full"
    """Activation checkpointing. none: no layer; full: every layer; a number k: every k-th."""
    compile: bool = False
    """Compile the decoder layers with torch.compile: minutes at the first step, then fewer passes over memory. Needs a
    C++ compiler."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the adapters' first values, the order of the data and dropout."""
    eval_every: Annotated[int, Field(ge=0)] = 50
    """Steps between evaluations. One is made before the first step and one after the last in any case; 0: only
    these."""
    save_every: Annotated[int, Field(ge=0)] = 50
    """Steps between checkpoints. One is written after the last step in any case; 0: only that one."""
    keep_checkpoints: PositiveInt = 2
    """Number of the most recent checkpoints to keep."""
    max_time: Annotated[timedelta, Field(strict=False, gt=timedelta(0))] | None = None
    """Stop in time to have a checkpoint after so long, such as 24:00:00 or P2D; to be started again."""
    spike_factor: Annotated[float, Field(gt=1)] | None = 4.0
    """A step is a spike if its loss is more than this factor times the median of the last 20 steps; null: none is."""
    on_spike: Literal["warn", "rollback"] = "warn"
    """What to do at a spike, or a loss or gradient that is not finite. warn: say so; rollback: go back to the last
    checkpoint and leave that global batch out."""
    max_skipped_steps: PositiveInt = 5
    """Steps in a row whose loss or gradient was not finite after which the run stops."""
    timeout: PositiveInt = 600
    """Seconds without progress after which the run gives a rank up, and ends. More than the longest step
    takes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: CUDA where there is one."""


class RunConfig(ConfigSection):
    """Where results go."""

    dir: str = "runs"
    """Folder of all runs."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """This run's folder in it."""
    overwrite: bool = False
    """Replace a run of the same name."""
    report: bool = True
    """Write report.html at the end: loss, throughput, memory, configuration."""
    profile: bool = False
    """Run the last step under torch's profiler, and say in summary.json what its time went into (`step_shares`). That
    step is slower."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Log metrics there too. Their settings come from their own environment variables."""
    project: str = "qlora-dist"
    """Name of wandb's project and of mlflow's experiment."""
