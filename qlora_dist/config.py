"""The whole YAML as one strict tree.

Each section is read once, validated once, and handed down whole (``cfg.optim``). A field's docstring is its
documentation. No torch in here: ``--help`` and every configuration error come without importing it.
"""

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
    model_validator,
)
from pydantic_core import PydanticCustomError

_LEAST_NVME_PAGE = 2 * 2**20
"""Of two moments, each of 1 MiB."""
DEFAULT_STEPS = 100
"""With neither `train.steps` nor `train.epochs`."""

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


def _bytes(value: object) -> object:
    if not isinstance(value, str) or value == "auto":
        return value
    try:
        return int(_BYTE_SIZE.validate_python(value))
    except ValidationError:
        raise PydanticCustomError("bytes", "Input should be a number of bytes, or text such as 2GiB") from None


_BYTE_SIZE = TypeAdapter(ByteSize)
Bytes = Annotated[int, Field(ge=0), BeforeValidator(_bytes)]
"""A number, or text such as 16MiB."""


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )


class ModelConfig(Section):
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


class LoraConfig(Section):
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
    """Every quantized layer, or the last name parts of those to adapt, such as [q_proj, v_proj]."""
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


Format = Literal[
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


class SourceConfig(Section):
    """One source of a mixture."""

    path: str
    """File (JSONL, JSON, Parquet, CSV), folder of such files, folder saved by `datasets`, or a data set's name on the
    Hugging Face hub."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each of its rows is trained per epoch: 0.5, every other epoch; 2, twice an epoch."""
    format: Format | None = None
    """Shape of its rows; none: `data.format`."""
    split: str = "train"
    """Of a data set with splits."""
    subset: str | None = None
    """Of a data set with several configurations."""


class DataConfig(Section):
    """The text."""

    train: Annotated[list[str | SourceConfig], Field(min_length=1)]
    """Files, folders or data sets; each a path, or a mapping with `path` and `weight`, `format`, `split`, `subset`."""
    eval: str | SourceConfig | None = None
    """Held-out rows; none: no evaluation."""
    format: Format = "auto"
    """Shape of the rows; auto: told by the fields of each source's first row."""
    chat_template: str | None = None
    """How conversations are written: none, as the tokenizer says; `chatml`, `alpaca` or `guanaco`, for a base model; or
    the path of a Jinja file."""
    seq_len: PositiveInt = 2048
    """Tokens per row of a batch."""
    too_long: Literal["truncate", "split", "drop"] = "truncate"
    """What becomes of a sequence longer than that: cut there, cut into several, or left out."""
    packing: Literal["best-fit", "none"] = "best-fit"
    """Put several sequences in one row, none seeing another, or one sequence in each."""
    group_by_length: bool = False
    """Without packing: put sequences of similar length into a step, so that little is padded. Changes the order."""
    mask: Literal["assistant", "last", "all"] = "assistant"
    """Tokens that are trained: the assistant's turns, the last of them, or all. Rows of `text` train all, rows of
    `prompt` and `completion` the completion unless all; `train` or `weight` (0 or 1) of a message overrides it."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be used: stop there, or count it and go on."""
    max_bad_rows: Annotated[int, Field(ge=0)] = 100
    """Stop when more than so many rows of a source have been skipped."""
    cache: str = "~/.cache/qlora-dist"
    """Folder of what has been tokenized, seen by all nodes or one on each."""
    workers: PositiveInt | Literal["auto"] = "auto"
    """Processes that tokenize; auto: the processor cores this process may use, shared with the other ranks of a
    node."""


class ParallelConfig(Section):
    """Who holds what."""

    engine: Literal["fsdp2", "zero2", "zero3"] = "fsdp2"
    """What shards the model: PyTorch's FSDP2, or DeepSpeed's ZeRO-3 (`pip install 'qlora-dist[zero]'`). zero2: base and
    adapters are whole on each rank (`base: replicate`), and only gradients and moments are cut. The numbers are the
    same, and a run may change its engine where it goes on from a checkpoint."""
    base: Literal["replicate", "node", "world", "paged"] | PositiveInt = "node"
    """Ranks that share one copy of the frozen base: none (each has its own), those of a node, all, or that many. paged:
    those of a node, and of its 4-bit layers a rank has `resident_bytes` on the device; the others are fetched ahead of
    their use from where `paging` says."""
    resident_bytes: Bytes | Literal["auto"] = "auto"
    """With `base: paged`, of the rank's part of the layers, on the device: bytes, or text such as 2GiB, of at least two
    layers; 0: two layers; auto: half of what is free before loading, after taking off what else the rank will hold. On
    a CPU that is memory, and the node's ranks share it."""
    adapter: Literal["world", "node"] = "world"
    """Ranks that share the adapters, their gradients and optimizer states: all, or those of a node, which then
    all-reduce the gradients between nodes."""
    offload: Literal["none", "base"] = "none"
    """Keep the frozen base's shards in host memory and copy each layer to the device when it is used."""
    prefetch: Annotated[int, Field(ge=0)] = 1
    """Layers gathered ahead of the one in use."""


class OptimConfig(Section):
    """The update of the adapters."""

    name: Literal["adamw", "adamw-8bit", "paged-adamw-32bit", "paged-adamw-8bit", "zero-adamw"] = "paged-adamw-32bit"
    """AdamW, its moments in 32 bit or in 8 (bitsandbytes' blockwise states), on the rank that holds the shard they
    update. Paged: as many of them stay on the device as `resident_bytes` says, the others come and go by pages.
    zero-adamw: with `parallel.engine: zero3`, DeepSpeed's optimizer, in 32 bit, where `offload` says."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Of zero-adamw, where DeepSpeed has the moments and the fp32 values that it updates: on the device, in host
    memory, or in files in `paging.dir`, which needs libaio and a C++ compiler; moved by `paging.page_bytes` of moments
    or more."""
    resident_bytes: Bytes | Literal["auto"] = "auto"
    """Of a paged optimizer's moments, on the device, per rank: bytes, or text such as 2GiB, of at least two pages; 0:
    two pages; auto: what the device has left after a step's peak."""
    lr: Annotated[float, Field(gt=0)] = 2.0e-4
    """Learning rate after the warm-up."""
    lora_plus_ratio: Annotated[float, Field(gt=0)] = 1.0
    """The B matrices learn so many times as fast (LoRA+ recommends 16)."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.999
    """Decay of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1.0e-8
    """Added to the square root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up: as it is, or down to zero at the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Steps over which the learning rate rises from zero."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 0.3
    """The gradient of all adapters together is scaled down to this norm; null: never."""


class PagingConfig(Section):
    """Where the pages lie that are not on the device."""

    to: Literal["auto", "unified", "host", "disk"] = "auto"
    """host: in host memory; disk: in a file; unified: CUDA's managed memory, moved by the driver, for optimizer states
    only; auto: host for GPUs, disk for CPUs."""
    dir: str | None = None
    """Folder of that file, on storage of the node's own; none: the system's folder for temporary files. The file is
    gone when the run is."""
    page_bytes: Annotated[Bytes, Field(ge=4096)] = 2**24
    """Bytes of a page of moments."""
    ahead: Annotated[int, Field(ge=0)] = 1
    """Pages fetched ahead of the one in use."""


class TrainConfig(Section):
    """The loop."""

    steps: PositiveInt | None = None
    """Optimizer steps; none: as many as `epochs` takes, or 100 without it."""
    epochs: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    """Passes over the data, in place of `steps`."""
    global_batch: PositiveInt = 16
    """Rows per optimizer step, over all ranks and micro-batches."""
    micro_batch: PositiveInt = 1
    """Rows per forward pass of one rank."""
    checkpointing: Literal["none", "full"] | PositiveInt = "full"
    """Activation checkpointing: no layer, every layer, or every k-th."""
    compile: bool = False
    """Compile the decoder layers with torch.compile: minutes at the first step, then fewer passes over memory. Needs a
    C++ compiler."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the adapters' first values, the order of the data and dropout."""
    eval_every: Annotated[int, Field(ge=0)] = 50
    """Evaluate each so many steps, and always before the first and after the last; 0: only then."""
    save_every: Annotated[int, Field(ge=0)] = 50
    """Write a checkpoint each so many steps, and always after the last; 0: only then."""
    keep_checkpoints: PositiveInt = 2
    """The newest so many stay."""
    max_time: Annotated[timedelta, Field(strict=False, gt=timedelta(0))] | None = None
    """Stop in time to have a checkpoint after so long, such as 24:00:00 or P2D; to be started again."""
    spike_factor: Annotated[float, Field(gt=1)] | None = 4.0
    """A loss of more than so many times the median of the last 20 steps is a spike; null: nothing is."""
    on_spike: Literal["warn", "rollback"] = "warn"
    """At a spike, or a loss or gradient that is not finite: say so, or go back to the last checkpoint and leave that
    global batch out."""
    max_skipped_steps: PositiveInt = 5
    """Stop after so many steps in a row whose loss or gradient was not finite."""
    timeout: PositiveInt = 600
    """Seconds without progress after which the run gives a rank up, and ends. More than the longest step
    takes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: CUDA where there is one."""


class RunConfig(Section):
    """Where results go."""

    dir: str = "runs"
    """Folder of all runs."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """This run's folder in it."""
    overwrite: bool = False
    """Replace a run of that name."""
    report: bool = True
    """Write report.html at the end: loss, throughput, memory, configuration."""
    profile: bool = False
    """Run the last step under torch's profiler, and say in summary.json what its time went into (`step_shares`). That
    step is slower."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Log metrics there too. Their settings come from their own environment variables."""
    project: str = "qlora-dist"
    """Of wandb, and the experiment of mlflow."""


class Config(Section):
    """One run. Only `parallel` differs between one device and a cluster."""

    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig = OptimConfig()
    paging: PagingConfig = PagingConfig()
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.lora.experts and (self.lora.dropout or self.lora.dora):
            raise ValueError(
                "lora.experts: experts know neither dropout nor DoRA; set lora.dropout: 0 and lora.dora: false"
            )
        self._engine_does_it()
        if self.parallel.base == "paged" and self.paging.to == "unified":
            raise ValueError(
                "paging.to: unified memory is for optimizer states only, and parallel.base: paged pages the base too; "
                "set paging.to to host or disk"
            )
        if self.parallel.base == "paged" and self.parallel.offload != "none":
            raise ValueError(
                "parallel.offload: base and parallel.base: paged exclude each other; leave parallel.offload out"
            )
        paged = self.optim.name.startswith("paged")
        least = 2 * self.paging.page_bytes
        if paged and self.optim.resident_bytes != "auto" and 0 < self.optim.resident_bytes < least:
            raise ValueError(
                f"optim.resident_bytes: {self.optim.resident_bytes} is less than two pages, {least}; raise it, set it "
                "to 0 for just two pages, or lower paging.page_bytes"
            )
        if self.data.group_by_length and self.data.packing != "none":
            raise ValueError(
                "data.group_by_length: packed rows have one length; set data.packing: none, or leave the key out"
            )
        if self.train.steps is not None and self.train.epochs is not None:
            raise ValueError(
                f"train.epochs: {self.train.epochs:g} and train.steps: {self.train.steps} exclude each other; set one "
                "of them to null, or take it out"
            )
        steps = self.train.steps or DEFAULT_STEPS
        if self.train.epochs is None and self.optim.warmup_steps > steps:  # of epochs, the data tell how many they are
            raise ValueError(
                f"optim.warmup_steps: {self.optim.warmup_steps} is more than train.steps: {steps}; lower it"
            )
        if self.train.global_batch % self.train.micro_batch:
            raise ValueError(
                f"train.global_batch: {self.train.global_batch} is not a multiple of train.micro_batch: "
                f"{self.train.micro_batch}; change one of them"
            )
        return self

    def _engine_does_it(self) -> None:
        parallel = self.parallel
        if parallel.engine == "zero3" and parallel.base == "paged":
            raise ValueError(
                "parallel.base: paged: engine zero3 has no pages; set parallel.engine: fsdp2, or keep the base in host "
                "memory with parallel.base: node and parallel.offload: base"
            )
        if parallel.engine == "zero3" and self.train.compile:
            raise ValueError(
                "train.compile: layers with the hooks of engine zero3 cannot be compiled; leave train.compile out, or "
                "set parallel.engine: fsdp2"
            )
        if self.optim.name == "zero-adamw" and parallel.engine != "zero3":
            raise ValueError(
                f"optim.name: zero-adamw is of engine zero3, and parallel.engine is {parallel.engine}; set optim.name: "
                "paged-adamw-32bit, or parallel.engine: zero3"
            )
        if self.optim.offload != "none" and self.optim.name != "zero-adamw":
            raise ValueError(
                f"optim.offload: {self.optim.offload} is for optim.name: zero-adamw, and DeepSpeed does not move the "
                f"states of {self.optim.name} rightly; leave it out, and say with paging.to where they go"
            )
        if self.optim.offload == "nvme" and self.paging.page_bytes < _LEAST_NVME_PAGE:
            raise ValueError(
                f"paging.page_bytes: {self.paging.page_bytes} is less than {_LEAST_NVME_PAGE}, and DeepSpeed leaves in "
                "memory what is less than 1 MiB; raise it, or leave out optim.offload: nvme"
            )
        if parallel.engine == "zero2" and (parallel.base not in ("replicate", 1) or parallel.offload != "none"):
            raise ValueError(
                "parallel.engine: zero2 has the whole base on each rank's device; set parallel.base: replicate and "
                "parallel.offload: none, or parallel.engine: zero3"
            )
