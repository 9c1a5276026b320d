"""Sections of the configuration. A field's docstring is its documentation."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

DEFAULT_STEPS = 100
"""Number of steps of a run with neither `train.steps` nor `train.epochs`."""

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonEmptyStr = Annotated[str, Field(min_length=1)]


def _parse_bytes(value: object) -> object:
    if not isinstance(value, str) or value == "auto":
        return value
    try:
        return int(_BYTE_SIZE.validate_python(value))
    except ValidationError:
        raise PydanticCustomError("bytes", "Input should be a number of bytes, or text such as 2GiB") from None


_BYTE_SIZE = TypeAdapter(ByteSize)
ByteCount = Annotated[int, Field(ge=0), BeforeValidator(_parse_bytes)]
"""Number of bytes, given as a number or as text such as 16MiB."""


class ConfigSection(BaseModel):
    """Part of the configuration. It is immutable and refuses unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )


class ModelConfig(ConfigSection):
    """Frozen base model."""

    base: str
    """Folder of a Hugging Face causal language model: in 4 bit (from `qlora-dist quantize` or bitsandbytes), 16/32 bit,
    or a published format such as FP8. A model that is not in 4 bit is quantized while it is loaded."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """Code table used when the base is quantized on loading (QLoRA, section 3: 4-bit NormalFloat)."""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one absmax when the base is quantized on loading."""
    double_quant: bool = True
    """Quantization of the absmax values when the base is quantized on loading (QLoRA, section 3: Double
    Quantization)."""
    keep_format: bool = False
    """Training on a base in FP8, MXFP4, INT4 or another published format as it is. Its weights keep their codes, and
    layers in 16 bit stay so. false: such a base is quantized to 4 bit while it is loaded."""
    embeddings: Literal["16bit", "4bit"] = "16bit"
    """Precision of the input embedding and the output head. 4bit: they are quantized on loading, unless the folder has
    them in 4 bit already."""
    add_tokens: list[NonEmptyStr] = []
    """Tokens to add to the tokenizer, such as [<tool>, </tool>]. They take spare rows of the embedding, or rows that
    are added to embedding and head. These rows alone are trained, unless `lora.modules_to_save` names the modules."""
    compute_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Precision of the forward and backward pass, and of the base's unquantized parameters."""
    attention: Literal["sdpa", "flex", "eager"] = "sdpa"
    """Implementation of attention. `sdpa`: torch's kernels, per packed sequence and without masks where the
    architecture allows it. `flex`: torch's flex_attention with block masks, for GPUs. A CPU uses plain formulas
    instead, because flex_attention has no backward there. `eager`: transformers' plain formulas with masks."""


class LoraConfig(ConfigSection):
    """Trained adapter."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    from_adapter: NonEmptyStr | None = Field(default=None, alias="from")
    """Folder of an adapter to begin from, written here or by PEFT. Its r, alpha, targets, experts, modules_to_save,
    rslora and dora replace unset keys and must equal set ones. null: begin from random A and zero B."""
    r: PositiveInt = 64
    """Rank of the adapter."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """Numerator of the scaling alpha / r."""
    dropout: Fraction = 0.05
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Adapted layers. all-linear: every quantized layer; or a list of last name parts, such as [q_proj, v_proj]."""
    experts: bool = False
    """Adapters for the experts of sparse models too, with separate matrices for each. Needs dropout 0, as in PEFT."""
    modules_to_save: list[str] = []
    """Modules that are trained in full, by the last part of their names, such as [embed_tokens, lm_head]. Their weights
    are in fp32 and sharded like the adapters. A tied head follows its embedding, so name only [embed_tokens] for it."""
    trainable_tokens: list[NonEmptyStr] = []
    """Tokens of the tokenizer whose rows of embedding and head are trained too, such as reserved ones. Tokens of
    `model.add_tokens` need not be named."""
    rslora: bool = False
    """Scaling by alpha / sqrt(r) (rank-stabilized LoRA)."""
    dora: bool = False
    """Separate training of each output's magnitude and direction (DoRA)."""


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str | dict) else value


DataFormat = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text", "oasst", "hh-rlhf", "flan", "longform"
]


class SourceConfig(ConfigSection):
    """Source of a mixture."""

    path: str
    """File (JSONL, JSON, Parquet, CSV), pattern or folder of such files, folder saved by `datasets`, or name on the
    Hugging Face hub."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Number of times that each row is trained per epoch. 0.5: every other epoch; 2: twice per epoch."""
    format: DataFormat | None = None
    """Format of the rows; null: `data.format`."""
    split: str = "train"
    """Name of the split, for a data set with splits."""
    subset: str | None = None
    """Name of the data set's configuration, for a data set with several."""


class DataConfig(ConfigSection):
    """Training and evaluation data."""

    train: Annotated[list[str | SourceConfig], Field(min_length=1), BeforeValidator(_as_list)]
    """Files, folders or data sets. Each is a path, or a mapping with `path` and `weight`, `format`, `split`, `subset`.
    A single one need not be a list."""
    eval: str | SourceConfig | None = None
    """Held-out data for evaluation; null: no evaluation."""
    format: DataFormat = "auto"
    """Format of the rows; auto: detected from the fields of each source's first row."""
    chat_template: str | None = None
    """Template of conversations. null: the tokenizer's; `chatml`, `alpaca` or `guanaco`: a template for base models; or
    the path of a Jinja file."""
    seq_len: PositiveInt = 2048
    """Tokens per row of a batch."""
    too_long: Literal["truncate", "split", "drop"] = "truncate"
    """Treatment of sequences longer than `seq_len`. truncate: cut the end off; split: cut into several sequences; drop:
    leave out."""
    packing: Literal["best-fit", "none"] = "best-fit"
    """Packing of sequences into rows. best-fit: several sequences per row, which do not attend to each other; none: one
    sequence per row."""
    group_by_length: bool = False
    """Grouping of sequences of similar length into a step to reduce padding, without packing. Changes the order."""
    mask: Literal["assistant", "last", "all"] = "assistant"
    """Tokens that are trained. assistant: the assistant's turns; last: the last of them; all: every token. Rows of
    `text` train every token. Rows of `prompt` and `completion` train the completion, or every token with all. `train`
    or `weight` (0 or 1) of a message overrides it."""
    multi_turn: Literal["auto", "whole", "per-answer"] = "auto"
    """Form in which a conversation with several answers is trained. `whole`: one row. `per-answer`: one row per trained
    answer, with the prompt that inference would see. `auto`: per-answer if the chat template rewrites the history, and
    whole otherwise."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Treatment of unusable rows. error: stop; skip: count the row and continue."""
    max_bad_rows: Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^(100|\d{1,2}(\.\d+)?)%$")] = 100
    """Maximum number of rows of a source that may be skipped, or a share such as 1%. A share is checked at the end of
    the source."""
    cache: str = "~/.cache/qlora-dist"
    """Folder of tokenized data, either shared by all nodes or one on each. The default follows XDG_CACHE_HOME."""
    workers: PositiveInt | Literal["auto"] = "auto"
    """Number of processes that tokenize; auto: one per processor core that this process may use."""


class ParallelConfig(ConfigSection):
    """Distribution of base, adapters and optimizer states over the ranks."""

    engine: Literal["fsdp2", "zero2", "zero3"] = "fsdp2"
    """Library that shards the model. `fsdp2`: PyTorch's FSDP2. `zero3`: DeepSpeed's ZeRO-3 (`pip install
    'qlora-dist[zero]'`). `zero2`: each rank holds the whole base and all adapters (`base: replicate`), and only
    gradients and optimizer states are sharded. All engines compute the same numbers, and a run may change its engine
    when it resumes."""
    base: Literal["replicate", "node", "world", "paged"] | PositiveInt = "node"
    """Ranks that share one copy of the frozen base. `replicate`: each rank holds a whole copy; `node`: the ranks of a
    node; `world`: all ranks; or a number of ranks. `paged`: the ranks of a node, and each rank keeps only
    `resident_bytes` of its 4-bit layers on the device. The other layers are prefetched from the storage that `paging`
    names."""
    resident_bytes: ByteCount | Literal["auto"] = "auto"
    """Bytes of its layers that a rank keeps on the device with `base: paged`, such as 2GiB; at least two layers. 0: two
    layers; auto: half of the memory that is free before loading, less the rank's other memory. On a CPU this is host
    memory, which the node's ranks share."""
    adapter: Literal["world", "node"] = "world"
    """Ranks that share the adapters, their gradients and optimizer states. world: all ranks; node: the ranks of a node,
    and the nodes all-reduce the gradients."""
    offload: Literal["none", "base"] = "none"
    """Offloading. base: the frozen base's shards stay in host memory, and each layer is copied to the device for its
    use."""
    prefetch: Annotated[int, Field(ge=0)] = 1
    """Number of layers gathered ahead of the one in use."""


class OptimConfig(ConfigSection):
    """Optimizer of the adapters."""

    name: Literal["adamw", "adamw-8bit", "paged-adamw-32bit", "paged-adamw-8bit", "zero-adamw"] = "paged-adamw-32bit"
    """Kind of AdamW. Its states are in 32 bit, or in 8 bit (bitsandbytes' blockwise states), on the rank whose shard
    they update. `paged-...`: `resident_bytes` of the states stay on the device, and the others are paged. `zero-adamw`:
    DeepSpeed's optimizer in 32 bit, with `parallel.engine: zero3`; `offload` sets its storage."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Storage of zero-adamw's states and fp32 values. none: the device; cpu: host memory; nvme: files in `paging.dir`,
    which needs libaio and a C++ compiler. DeepSpeed moves at least `paging.page_bytes` of states at a time."""
    resident_bytes: ByteCount | Literal["auto"] = "auto"
    """Bytes of states that each rank keeps on the device with a paged optimizer, such as 2GiB; at least two pages. 0:
    two pages; auto: the memory that is left on the device at a step's peak."""
    lr: Annotated[float, Field(gt=0)] = 2.0e-4
    """Learning rate after the warm-up."""
    lora_plus_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the B matrices' learning rate (LoRA+ recommends 16)."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.999
    """Decay of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1.0e-8
    """Term added to the square root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up. constant: unchanged; linear, cosine: decay to zero at the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Steps in which the learning rate rises from zero, at most the run's steps."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 0.3
    """Norm to which the gradient of all adapters together is clipped; null: no limit."""


class PagingConfig(ConfigSection):
    """Storage of pages that are not on the device."""

    to: Literal["auto", "unified", "host", "disk"] = "auto"
    """Storage of the pages. `host`: host memory; `disk`: a file. `unified`: CUDA's managed memory, moved by the driver,
    for optimizer states only. `auto`: host for GPUs, disk for CPUs."""
    dir: str | None = None
    """Folder of the file, on storage local to the node; null: the system's folder for temporary files. The file is
    removed when the run ends."""
    page_bytes: Annotated[ByteCount, Field(ge=4096)] = 2**24
    """Bytes of a page of optimizer states."""
    ahead: Annotated[int, Field(ge=0)] = 1
    """Number of pages fetched ahead of the one in use."""


class TrainConfig(ConfigSection):
    """Training loop."""

    steps: PositiveInt | None = None
    """Number of optimizer steps; null: the steps of `epochs`, or 100 without it."""
    epochs: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    """Number of passes over the data, instead of `steps`."""
    global_batch: PositiveInt = 16
    """Rows per optimizer step, over all ranks and micro-batches."""
    micro_batch: PositiveInt = 1
    """Rows per forward pass of one rank."""
    checkpointing: Literal["none", "full"] | PositiveInt = "full"
    """Activation checkpointing. none: no layer; full: every layer; a number k: every k-th layer."""
    compile: bool = False
    """Compilation of the decoder layers with torch.compile, which takes minutes at the first step and then reads memory
    less often. Needs a C++ compiler."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the adapters' initial values, the order of the data and dropout."""
    eval_every: Annotated[int, Field(ge=0)] = 50
    """Steps between evaluations. The run always evaluates before the first and after the last step; 0: only then."""
    save_every: Annotated[int, Field(ge=0)] = 50
    """Steps between checkpoints. The run always writes one after the last step; 0: only then."""
    keep_checkpoints: PositiveInt = 2
    """Number of the most recent checkpoints to keep."""
    max_time: Annotated[timedelta, Field(strict=False, gt=timedelta(0))] | None = None
    """Time limit, such as 24:00:00 or P2D. The run writes a checkpoint before it and stops, to be started again."""
    spike_factor: Annotated[float, Field(gt=1)] | None = 4.0
    """Spike threshold: a step is a spike if its loss exceeds this factor times the median of the last 20 steps. `null`:
    no step is."""
    on_spike: Literal["warn", "rollback"] = "warn"
    """Reaction to a spike, or to a loss or gradient that is not finite. `warn`: print a warning. `rollback`: resume
    from the last checkpoint and skip that global batch."""
    max_skipped_steps: PositiveInt = 5
    """Number of consecutive steps without a finite loss and gradient after which the run stops."""
    timeout: PositiveInt = 600
    """Seconds without progress of a rank after which the run ends. It must be longer than the longest step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the computation; auto: CUDA if available."""


class RunConfig(ConfigSection):
    """Folder, reports and trackers of a run."""

    dir: str = "runs"
    """Folder of all runs."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of this run, and of its folder in `dir`."""
    overwrite: bool = False
    """Replacement of an existing run with the same name."""
    report: bool = True
    """Writing of report.html at the end, with loss, throughput, memory and configuration."""
    profile: bool = False
    """Profiling of the last step with torch's profiler, which slows that step. summary.json then has its parts
    (`step_shares`)."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Trackers that also receive the metrics. Their own environment variables configure them."""
    project: str = "qlora-dist"
    """Name of the W&B project and of the MLflow experiment."""
