"""Commands for models and adapters. Imports are lazy, as in `main.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_dist.cli.command_process import prepare_process, run_on_every_rank

model_app = typer.Typer()


@model_app.command()
def quantize(
    source: Annotated[
        Path, typer.Argument(help="Folder of a Hugging Face model that is not in 4 bit, or a GGUF file.", metavar="SRC")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to create.", metavar="OUT")],
    quant_type: Annotated[str, typer.Option(help="nf4 or fp4.")] = "nf4",
    block_size: Annotated[int, typer.Option(help="Weights per absmax.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantize the absmax values too.")] = True,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Quantize the input embedding and the output head too.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    file_size: Annotated[str, typer.Option(help="Largest size of a file, such as 5GB.")] = "5GB",
    min_share: Annotated[
        float, typer.Option(help="Smallest part of the layers' parameters that must be in 4 bit.")
    ] = 0.9,
) -> None:
    """Quantize a model to 4 bit in bitsandbytes' format. An interrupted run continues where it stopped."""
    prepare_process()
    from rich.console import Console

    from qlora_dist.model.quantize_folder import print_quantize_report, quantize_folder
    from qlora_dist.model.quantize_plan import parse_quantize_options

    console = Console()
    options = parse_quantize_options(
        quant_type, block_size, device, file_size, min_share, double_quant=double_quant, embeddings=embeddings
    )
    print_quantize_report(quantize_folder(source, out, options, console), console)


@model_app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, such as runs/NAME/adapter.")],
    out: Annotated[Path, typer.Argument(help="Folder to create.", metavar="OUT")],
    base: Annotated[
        Path | None, typer.Option(help="Folder of the model; without it, the one that the adapter names.")
    ] = None,
    into: Annotated[
        Literal["dequantized", "original", "nf4"],
        typer.Option(
            help="Weights that the adapter is added to. dequantized: the 4-bit weights in 16 bit, as in training; "
            "original: the weights of a --base that is not in 4 bit; nf4: the 4-bit weights, quantized again."
        ),
    ] = "dequantized",
    dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="Type of values not in 4 bit; auto: the base's.")
    ] = "auto",
    quant_type: Annotated[
        Literal["nf4", "fp4"] | None,
        typer.Option(help="Type of the run's quantization, for a base that is not in 4 bit; default: the run's."),
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Block size of that quantization; default: the run's.")] = None,
    double_quant: Annotated[
        bool | None, typer.Option(help="Double quantization in that quantization; default: the run's.")
    ] = None,
    keep_format: Annotated[
        bool | None, typer.Option(help="Whether the run kept the base's published format; default: as in the run.")
    ] = None,
    error_feedback: Annotated[
        bool,
        typer.Option("--error-feedback", help="With --into nf4: carry each weight's rounding error to the next one."),
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="Held-out file on which to print the loss before and after merging.")
    ] = None,
    file_size: Annotated[str, typer.Option(help="Largest size of a file, such as 5GB.")] = "5GB",
) -> None:
    """Merge an adapter into its base, from file to file."""
    prepare_process()
    from rich.console import Console

    from qlora_dist.config.sections import ModelConfig
    from qlora_dist.inference.inference_config import training_config
    from qlora_dist.merge.merge_folder import merge_folder, print_merge_report
    from qlora_dist.merge.merge_plan import MergeOptions
    from qlora_dist.model.quantize_plan import parse_size

    run = training_config(adapter)
    trained = run.model if run is not None else ModelConfig(base="")
    options = MergeOptions(
        into=into,
        dtype=dtype,
        quant_type=trained.quant_type if quant_type is None else quant_type,
        block_size=trained.block_size if block_size is None else block_size,
        double_quant=trained.double_quant if double_quant is None else double_quant,
        keep_format=trained.keep_format if keep_format is None else keep_format,
        error_feedback=error_feedback,
        file_bytes=parse_size(file_size),
    )
    console = Console()
    if data is None:
        print_merge_report(merge_folder(base, adapter, out, options, console), console)
        return
    from qlora_dist.inference.merge_and_evaluate import merge_and_evaluate, print_loss_table

    report, losses = merge_and_evaluate(base, adapter, out, options, data, console)
    print_merge_report(report, console)
    print_loss_table(losses, console)


@model_app.command()
def compose(
    adapters: Annotated[list[str], typer.Argument(help="Adapters.", metavar="NAME=FOLDER[:WEIGHT]...")],
    out: Annotated[Path, typer.Argument(help="Folder to create.", metavar="OUT")],
    how: Annotated[
        str,
        typer.Option(
            help="cat: the exact sum; svd: the sum in fewer ranks; linear, ties, dare_linear, dare_ties or "
            "magnitude_prune, and the last four with _svd: as in PEFT; sequential: each was trained on the model that "
            "the previous one was merged into."
        ),
    ] = "cat",
    rank: Annotated[int | None, typer.Option(help="Rank for svd; without it, the adapters' largest rank.")] = None,
    density: Annotated[float, typer.Option(help="Part of the values that ties, dare and magnitude_prune keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of the values that dare drops.")] = 0,
    base: Annotated[Path | None, typer.Option(help="Folder of the model, if the adapters name it differently.")] = None,
) -> None:
    """Combine several adapters into one."""
    prepare_process()
    from rich.console import Console

    from qlora_dist.merge.compose_adapters import compose_adapters, print_compose_report
    from qlora_dist.merge.compose_options import ComposeOptions, parse_combination_type, parse_weighted_adapter

    weighted_adapters = [parse_weighted_adapter(text) for text in adapters]
    options = ComposeOptions(how=parse_combination_type(how), rank=rank, density=density, seed=seed, base=base)
    report = compose_adapters(weighted_adapters, out, options)
    print_compose_report(report, weighted_adapters, options, Console())


_ADAPTER_OPTION = typer.Option("--adapter", help="Adapter, as NAME=FOLDER or FOLDER; repeatable.")
_BASE_OPTION = typer.Option("--base", help="Folder of the model; without it, the one that the adapters name.")
_NO_QUANTIZE_OPTION = typer.Option(
    "--no-quantize", help="Keep a 16-bit base in 16 bit instead of quantizing it as train does."
)
_OVERRIDES_OPTION = typer.Option(
    "--set", help="section.key=value, overriding the configuration of the adapter's run; repeatable."
)


@model_app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="Prompt to answer.", metavar="PROMPT")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts, as JSONL in the data formats or as lines; prints JSONL.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Chat: read lines, and print answers token by token.")] = False,
    adapter: Annotated[list[str] | None, _ADAPTER_OPTION] = None,
    use: Annotated[
        str | None, typer.Option(help="Name of the adapter that answers, or base; default: the first.")
    ] = None,
    base: Annotated[Path | None, _BASE_OPTION] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0: always the likeliest token.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(help="Total probability of the likeliest tokens that are sampled from.")
    ] = 0.9,
    top_k: Annotated[int, typer.Option(help="Number of likeliest tokens that are sampled from; 0: all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Penalty of repeated tokens; 1: none.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Same as --temperature 0.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of a file that a rank computes together.")] = 8,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    no_quantize: Annotated[bool, _NO_QUANTIZE_OPTION] = False,
    overrides: Annotated[list[str] | None, _OVERRIDES_OPTION] = None,
) -> None:
    """Answer a prompt, a file of prompts or a chat, as a single process or as a rank of torchrun."""

    def run() -> None:
        from qlora_dist.inference.generate import SamplingOptions
        from qlora_dist.inference.inference_commands import ModelOptions, PromptOptions, run_generate

        sampling = SamplingOptions(
            max_new_tokens=max_new_tokens,
            temperature=0.0 if greedy else temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        options = ModelOptions(adapter or (), base, not no_quantize, overrides or ())
        prompt_options = PromptOptions(
            prompt=prompt, file=prompts, chat=chat, raw=raw, system=system, adapter=use, batch_size=batch_size
        )
        run_generate(options, prompt_options, sampling)

    run_on_every_rank(run)


@model_app.command(name="eval")
def evaluate(
    folder: Annotated[
        str | None, typer.Argument(help="Folder of an adapter, such as runs/NAME/adapter.", metavar="ADAPTER")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Held-out file, read as in the adapter's run.")] = None,
    adapter: Annotated[list[str] | None, _ADAPTER_OPTION] = None,
    base: Annotated[Path | None, _BASE_OPTION] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, such as mmlu,arc_easy.")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Folder with YAML files of your own tasks.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of rows of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests of tasks that a rank computes together.")] = 8,
    no_quantize: Annotated[bool, _NO_QUANTIZE_OPTION] = False,
    overrides: Annotated[list[str] | None, _OVERRIDES_OPTION] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Print held-out loss, perplexity and task scores, as a single process or as a rank of torchrun."""

    def run() -> None:
        from qlora_dist.inference.inference_commands import ModelOptions, run_eval
        from qlora_dist.inference.lm_eval_tasks import TaskOptions

        options = ModelOptions(
            [*([folder] if folder else []), *(adapter or ())], base, not no_quantize, overrides or ()
        )
        task_names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        task_options = TaskOptions(
            names=task_names, num_fewshot=num_fewshot, limit=limit, batch_size=batch_size, folder=task_folder
        )
        run_eval(options, data, task_options if task_names else None, as_json=as_json)

    run_on_every_rank(run)
