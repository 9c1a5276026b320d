"""If this fails, a page of the documentation is wrong.

A code block after the comment `<!-- test -->` is tested. A page's blocks run one after another in one folder. It holds
`my-data.jsonl`, `my-eval.jsonl` and a tiny model: `my-model`, and `my-model-nf4` in 4 bit unless the page makes it.

- yaml: must be a valid configuration. `<!-- test: my-run.yaml -->` saves it under that name, made small, for commands.
- bash: is run. `<!-- test: 2 nodes -->` runs it twice at a time, with NODE_RANK 0 and 1. `<!-- test: a cluster -->`
  runs it with SLURM, in a folder with the repository's `slurm` and `configs`.
- python: is run.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import pytest
import typer
import yaml
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from qlora_dist.cli.main import app
from qlora_dist.config.config_file import load_config
from qlora_dist.config.other_trainers import KEY_ADVICE, MIGRATION_PAGE
from qlora_dist.config.schema import Config
from qlora_dist.config.sections import SourceConfig
from qlora_dist.launch.cluster import Cluster, Container
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.plan.model_spec import FsdpUnit, make_model_spec
from qlora_dist.plan.step_traffic import ShardCounts, shard_elements, step_traffic
from qlora_dist.runtime.byte_sizes import LOSS_CHUNK_LOGITS
from qlora_dist.train.step_metrics import StepMetrics
from tests.helpers import tiny_models
from tests.helpers.models_page import PAGE, models_page
from tests.helpers.ranks import free_port
from tests.helpers.real_slurm import free_ports, slurm_unavailable
from tests.helpers.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

LLAMAS: dict[str, dict[str, Any]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
"""Keys of Llama-3.1's config.json on which sizes depend."""
for _config in LLAMAS.values():
    _config |= {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256}

SMALL = {
    "model": {"compute_dtype": "fp32"},
    "lora": {"r": 4},
    "data": {"seq_len": 64},
    "optim": {"warmup_steps": 1},
    "train": {"steps": 3, "global_batch": 4, "device": "cpu", "eval_every": 0},
}
"""Values that a documented configuration gets before it is run."""


class Block(NamedTuple):
    language: str
    note: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page that are tested."""
    found = re.findall(r"^<!-- test(?:: (.+?))? -->\n+```(\w+)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [Block(language, note, text) for note, language, text in found]


def pages_with(language: str) -> list[Any]:
    chosen = [page for page in PAGES if any(block.language == language for block in blocks(page))]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in chosen]


# --- examples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_configurations_are_valid(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml":
            path = tmp_path / "run.yaml"
            path.write_text(block.text)
            load_config(path)


@pytest.fixture(scope="module")
def page_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a user's files at the start, under the names that the pages use."""
    folder = tmp_path_factory.mktemp("material")
    # bitsandbytes' kernel for transformers' layers needs multiples of 32 on some processors
    tiny_models.make_model(folder / "my-model", intermediate_size=192, max_position_embeddings=2048)
    quantize_folder(folder / "my-model", folder / "my-model-nf4", QuantizeOptions())
    tiny_models.make_data(folder / "my-data.jsonl", 40)
    tiny_models.make_data(folder / "my-eval.jsonl", 6, seed=1)
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with warm_python(tmp_path_factory.mktemp("python")) as script:
        yield script


@pytest.mark.slow
@pytest.mark.timeout(550)
@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_of_a_page_succeed(page: Path, page_files: Path, python: Path, tmp_path: Path) -> None:
    shutil.copytree(page_files, tmp_path, dirs_exist_ok=True)
    if any("quantize my-model my-model-nf4" in block.text for block in blocks(page)):
        shutil.rmtree(tmp_path / "my-model-nf4")
    on_cluster = any(block.note == "a cluster" for block in blocks(page))
    if on_cluster and (reason := slurm_unavailable()) is not None:
        pytest.skip(reason)
    make_commands(tmp_path / ".bin", python)
    for block in blocks(page):
        if block.language == "yaml":
            if block.note:
                (tmp_path / block.note).write_text(json.dumps(shrink_config(block.text)))
        elif block.language == "python":
            run([str(python), "-c", block.text], tmp_path)
        else:
            script = block.text.replace("--nproc-per-node 8", "--nproc-per-node 2").replace("first-node", "127.0.0.1")
            script = script.replace("29500", str(free_port()))
            nodes = [0, 1] if block.note == "2 nodes" else [0]
            with local_cluster(tmp_path) if block.note == "a cluster" else contextlib.nullcontext():
                run(["bash", "-euo", "pipefail", "-c", script], tmp_path, nodes)
    if on_cluster:
        output = " ".join((tmp_path / "runs" / "my-run" / "jobs" / "1" / "output.log").read_text().split())
        (steps,) = re.findall(r"stopped by SIGTERM after (\d+) steps", output)
        assert f"resumes after {steps} steps" in output
    if "multi-node" in page.name:  # the run was one of two nodes, not two of one
        summary = json.loads((tmp_path / "runs" / "my-run" / "summary.json").read_text())
        assert len(summary["static_bytes"]) == 4
        assert set(summary["comm_bytes_per_step"]) == {"shard", "world", "control"}


def shrink_config(text: str) -> dict[str, Any]:
    tree = yaml.safe_load(text)
    for section, values in SMALL.items():
        tree.setdefault(section, {}).update(values)
    return tree


def run(command: list[str], folder: Path, nodes: list[int] | None = None) -> None:
    """Run a command as a user of the installed package would, on several nodes at the same time."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environ |= {
        "PATH": f"{folder / '.bin'}:{environ['PATH']}",
        "PYTHON_EXEC": str(folder / ".bin" / "python"),  # torchrun starts ranks with it
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(folder),  # the cache is below it, unless the page sets another
    }
    outputs = [folder / f"output-{node}.txt" for node in nodes or [0]]
    processes = []
    for node, output in enumerate(outputs):
        with output.open("w") as file:
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=folder,
                    env=environ | {"NODE_RANK": str(node)},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    try:
        for process in processes:
            process.wait(timeout=500)
    finally:
        for process in processes:
            terminate(process)
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, f"{command[-1]}\n{output.read_text()}"


def terminate(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children. torchrun ends its ranks after SIGTERM, but not after SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=40)


@contextlib.contextmanager
def local_cluster(folder: Path) -> Iterator[None]:
    """Prepare `folder` for `slurm/local_cluster.sh`, and stop the cluster at the end."""
    for name in ("slurm", "configs"):
        (folder / name).symlink_to(ROOT / name)
    settings = {
        "QLORA_SLURM_DIR": tempfile.mkdtemp(prefix="slurm"),  # the path of a socket must be short
        "QLORA_SLURM_PORT": str(free_ports(2)),
    }
    os.environ.update(settings)
    try:
        yield
    finally:
        subprocess.run([ROOT / "slurm" / "local_cluster.sh", "down"], check=True, timeout=60)
        shutil.rmtree(settings["QLORA_SLURM_DIR"])
        for name in settings:
            del os.environ[name]


def make_commands(folder: Path, python: Path) -> None:
    """Write the commands `qlora-dist`, `torchrun` and `python` for this Python."""
    scripts = {
        "qlora-dist": f'exec {python} -m qlora_dist "$@"',
        "torchrun": f'exec {python} -m torch.distributed.run "$@"',
        "python": f'exec {python} "$@"',
    }
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_named_files_exist(name: str) -> None:
    """`room/file.py` and `tests/room` are files of the repository, from its root or from the package."""
    text = (ROOT / name).read_text()
    rooms = "|".join(path.name for path in (ROOT / "qlora_dist").iterdir() if path.name.isidentifier())
    others = "benchmarks|tests|configs|docs|examples|launch|slurm|qlora_dist"
    path_ = r"[\w/.-]*[\w-]"
    pattern = rf"(?<![\w/.-])((?:{rooms})/{path_}\.(?:py|jinja)|(?:{others})/{path_}\.(?:py|yaml|md|sh|svg|png))"
    named = set(re.findall(pattern, text))
    named |= set(re.findall(r"tests/[\w/]+[\w](?:\.py)?", text))
    assert not [
        path for path in sorted(named) if not (ROOT / path).exists() and not (ROOT / "qlora_dist" / path).exists()
    ]


def test_readme_links_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert not [str(page.relative_to(ROOT)) for page in PAGES[1:] if f"({page.relative_to(ROOT)})" not in readme]


OPTION = re.compile(r"--[a-z][\w-]+")


@pytest.mark.parametrize("name", NAMES)
def test_named_options_of_commands_exist(name: str) -> None:
    """Check options in code, such as `qlora-dist train my-run.yaml --dry-run` or `plan --search`."""
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = (ROOT / name).read_text().replace("\\\n", " ")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    lines = [line for language, block in fenced if language in ("", "bash") for line in block.splitlines()]
    unknown = []
    for code in [*lines, *re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))]:
        call = re.match(
            r"(?:.*\bqlora[-_]dist )?([a-z][a-z-]*)( .*)?$", code.partition("#")[0].partition("|")[0].strip()
        )
        if call is None or call[1] not in verbs or not call[2]:
            continue
        known = {
            option for parameter in verbs[call[1]].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        unknown += [f"{call[1]} {option}" for option in OPTION.findall(call[2]) if option not in {*known, "--help"}]
    assert not unknown


# --- figures ----------------------------------------------------------------------------------------------------------


def test_every_key_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    table = configuration_reference()
    assert table in page, f"docs/training.md: the reference should be\n\n{table}"


def test_keys_of_other_trainers_are_in_the_page_and_have_advice() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    assert MIGRATION_PAGE == 'docs/training.md, "Coming from another trainer"'
    table = page.partition("## Coming from another trainer")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \| ", table, re.M)
    named = {name for row in rows for code in re.findall(r"`([^`]+)`", row) for name in re.findall(r"^\w+", code)}
    values = {"paged_adamw_8bit", "adamw_bnb_8bit"}
    ours = {key for field in Config.model_fields.values() for key in field.annotation.model_fields}  # type: ignore[union-attr]
    assert named - values - ours == set(KEY_ADVICE) - ours


def test_every_key_of_a_source_is_in_the_page_about_data() -> None:
    rows = source_rows()
    assert rows in (ROOT / "docs" / "data.md").read_text(), f"docs/data.md: the table should be\n\n{rows}"


def test_every_key_of_a_cluster_is_in_the_page_about_slurm() -> None:
    table = cluster_rows()
    assert table in (ROOT / "docs" / "slurm.md").read_text(), f"docs/slurm.md: the table should be\n\n{table}"


def test_every_key_of_the_metrics_is_in_the_page_about_training() -> None:
    table = metrics_rows()
    assert table in (ROOT / "docs" / "training.md").read_text(), f"docs/training.md: the table should be\n\n{table}"
    documented = [row.split("`")[1] for row in table.splitlines()]
    assert documented == [field.name for field in dataclasses.fields(StepMetrics)], "each field needs a docstring"


def metrics_rows() -> str:
    """The keys of metrics.jsonl, which are the fields of `StepMetrics`, with their docstrings."""
    (definition,) = ast.parse(inspect.getsource(StepMetrics)).body
    assert isinstance(definition, ast.ClassDef)
    rows = []
    for field, doc in itertools.pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            rows.append(f"| `{ast.unparse(field.target)}` | {' '.join(str(doc.value.value).split())} |")
    return "\n".join(rows)


def source_rows() -> str:
    return "\n".join(reference_row(key, field) for key, field in SourceConfig.model_fields.items())


def cluster_rows() -> str:
    rows = [reference_row(key, field) for key, field in Cluster.model_fields.items()]
    rows += [reference_row(f"container.{key}", field) for key, field in Container.model_fields.items()]
    return "\n".join(rows)


def reference_row(key: str, field: FieldInfo) -> str:
    assert field.description
    default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
    return f"| `{key}` | {values(field)} | {default} | {' '.join(field.description.split())} |"


def values(field: FieldInfo) -> str:
    """Return the values that a key can have, from its type."""
    return ", ".join(dict.fromkeys(type_words(field.annotation, field.metadata)))


def type_words(kind: Any, limits: Sequence[Any] = ()) -> Iterator[str]:
    """Yield a description of a type's values; literals as they are written."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner, *more = arguments
        flat = [limit for one in more for limit in (one.metadata if isinstance(one, FieldInfo) else [one])]
        yield from type_words(inner, [*flat, *limits])
    elif origin is Literal:
        yield from (f"`{value}`" for value in arguments)
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from type_words(argument)
    elif origin is list:
        yield f"list of {' or '.join(type_words(arguments[0]))}"
    elif origin is dict or (isinstance(kind, type) and issubclass(kind, BaseModel)):
        yield "mapping"
    elif any(isinstance(limit, BeforeValidator) for limit in limits):
        yield "bytes"
    else:
        names = {bool: "`true`, `false`", type(None): "`null`", str: "text", timedelta: "time"}
        signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
        bounds = [
            f"{sign} {getattr(limit, name):,.15g}"
            for limit in limits
            for name, sign in signs.items()
            if kind in NUMBERS and hasattr(limit, name)
        ]
        yield f"{names.get(kind) or NUMBERS[kind]} {' and '.join(bounds)}".strip()


NUMBERS = {int: "whole number", float: "number"}


def configuration_reference() -> str:
    """Return the keys, defaults and docstrings of the configuration as tables."""
    parts = []
    for section, section_field in Config.model_fields.items():
        model = section_field.annotation
        assert isinstance(model, type) and issubclass(model, BaseModel)
        rows = [reference_row(f"{section}.{field.alias or key}", field) for key, field in model.model_fields.items()]
        parts.append(
            f"### {section}\n\n{model.__doc__}\n\n| key | values | default | meaning |\n| --- | --- | --- | --- |\n"
            + "\n".join(rows)
        )
    return "\n\n".join(parts)


def test_size_of_embeddings_in_4_bit() -> None:
    text = " ".join((ROOT / "docs" / "memory.md").read_text().split())
    lora = load_config(ROOT / "configs/recipes/llama-3.1-8b.yaml").lora

    def elements(embeddings: Any) -> int:
        units = make_model_spec(LLAMAS["8B"], lora, embeddings=embeddings).units
        return sum(p.numel for unit in units if unit.kind in ("embedding", "head") for p in unit.parameters)

    in_4_bit, in_16_bit = elements("4bit"), 2 * elements("16bit")
    assert f"{in_4_bit / 1e9:.2f} GB instead of {in_16_bit / 1e9:.1f} GB in bf16" in text


def test_memory_table() -> None:
    text = (ROOT / "docs" / "memory.md").read_text()
    for name, model in LLAMAS.items():
        config = load_config(ROOT / f"configs/recipes/llama-3.1-{name.lower()}.yaml")
        units = make_model_spec(model, config.lora).units
        cells = [f"Llama-3.1-{name}", str(config.lora.r), *(gib(part) for part in whole_model(units))]
        cells += [gib(static_bytes(units, base, adapter)) for base, adapter in ((1, 1), (8, 8), (8, 16), (16, 16))]
        assert f"| {' | '.join(cells)} |" in text, f"| {' | '.join(cells)} |"


def whole_model(units: Sequence[FsdpUnit]) -> tuple[int, int, int]:
    """Return the bytes of 4-bit weights, of the frozen rest in bf16, and of adapters with gradients and optimizer."""
    parameters = [p for unit in units for p in unit.parameters]
    return (
        sum(p.numel for p in parameters if p.is_quantized),
        sum(2 * p.numel for p in parameters if not p.is_quantized and not p.trained),
        sum(16 * p.numel for p in parameters if p.trained),
    )


def static_bytes(units: Sequence[FsdpUnit], base_shards: int, adapter_shards: int) -> int:
    total = 0
    for parameter in (p for unit in units for p in unit.parameters):
        shards, element_bytes = (
            (adapter_shards, 16) if parameter.trained else (base_shards, 1 if parameter.is_quantized else 2)
        )
        total += element_bytes * shard_elements(parameter, shards)
    return total


def test_momentary_memory_table() -> None:
    text = (ROOT / "docs" / "memory.md").read_text()
    for name, model in LLAMAS.items():
        config = load_config(ROOT / f"configs/recipes/llama-3.1-{name.lower()}.yaml")
        layer = make_model_spec(model, config.lora).units[1]
        hidden, tokens = model["hidden_size"], config.data.seq_len
        cells = [
            f"Llama-3.1-{name}",
            gib(sum(p.numel * (1 if p.is_quantized else 2) for p in layer.parameters)),
            gib(2 * hidden * model["intermediate_size"]),
            gib(2 * hidden * model["vocab_size"]),
            f"{tokens} tokens: {gib(2 * hidden * tokens * model['num_hidden_layers'])}",
        ]
        assert f"| {' | '.join(cells)} |" in text, f"| {' | '.join(cells)} |"


def test_replicated_scales() -> None:
    """The first of the four ideas: the bytes of a rank if absmax is not sharded."""
    model = LLAMAS["405B"]
    hidden, intermediate, layers = (model[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    kv = hidden // model["num_attention_heads"] * model["num_key_value_heads"]
    shapes = 2 * [(hidden, hidden)] + 2 * [(kv, hidden)] + 3 * [(intermediate, hidden)]

    def scales(double_quant: bool) -> str:
        layouts = [NF4Layout(shape=shape, double_quant=double_quant) for shape in shapes]
        return gib(layers * sum(layout.total_bytes - layout.codes.stop for layout in layouts))

    assert (scales(True), scales(False)) == ("5.9 GiB", "23.4 GiB")
    for name in ("README.md", "docs/memory.md"):
        text = (ROOT / name).read_text()
        assert "5.9 GiB" in text and "23.4 GiB" in text


def test_traffic_table() -> None:
    text = (ROOT / "docs" / "multi-node.md").read_text()
    config = load_config(ROOT / "configs/recipes/llama-3.1-405b.yaml")
    units = make_model_spec(LLAMAS["405B"], config.lora).units
    accumulation = config.train.global_batch // (16 * config.train.micro_batch)
    layouts = {("node", "world"): (8, 16), ("node", "node"): (8, 8), ("world", "world"): (16, 16)}
    for (base, adapter), (base_shards, adapter_shards) in layouts.items():
        traffic = step_traffic(units, ShardCounts(16, base_shards, adapter_shards), accumulation, 2)
        columns = [f"{traffic[dim] / 1e9:,.1f} GB" if dim in traffic else "-" for dim in ("shard", "world", "replica")]
        row = f"| `base: {base}`, `adapter: {adapter}` | {' | '.join(columns)} |"
        assert row in text, row


def test_readme_bytes_per_gather() -> None:
    parameters = [
        p
        for unit in make_model_spec(
            LLAMAS["405B"], load_config(ROOT / "configs/recipes/llama-3.1-405b.yaml").lora
        ).units
        for p in unit.parameters
    ]
    adapters = 2 * sum(p.numel for p in parameters if p.trained)
    base = sum(p.numel for p in parameters if p.is_quantized)
    text = (ROOT / "README.md").read_text()
    assert f"{adapters / 1e9:.1f} GB" in text and f"{base / 1e9:.0f} GB" in text


def test_size_of_the_heads_chunks() -> None:
    size = f"chunks of {4 * LOSS_CHUNK_LOGITS // 2**20} MiB"
    assert not [
        page.name for page in PAGES if page.name in ("architecture.md", "memory.md") and size not in page.read_text()
    ]


def gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"


# --- messages ---------------------------------------------------------------------------------------------------------


def test_messages_in_troubleshooting_are_in_the_source() -> None:
    """Each sentence in docs/troubleshooting.md is in the source, with `...` for the parts that vary."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    sentences = re.findall(r"^\| `(.+?)` \|", page, re.M)
    assert len(sentences) > 15
    source = "\n".join(path.read_text() for path in (ROOT / "qlora_dist").rglob("*.py"))
    source = re.sub(r"\{[^{}]*\}", "...", re.sub(r'"\s*\n\s*f?"', "", source))  # as one string, values left out
    for sentence in sentences:
        pieces = [piece.strip() for piece in sentence.split("...") if piece.strip()]
        assert not [piece for piece in pieces if piece not in source], sentence


# --- writing the tables -----------------------------------------------------------------------------------------------


def write_tables() -> None:
    """Update the tables of keys and of models: `python tests/test_docs.py`."""
    training, data, slurm = (ROOT / "docs" / f"{name}.md" for name in ("training", "data", "slurm"))
    before, _, _ = training.read_text().partition("## Every key\n")
    training.write_text(f"{before}## Every key\n\n{configuration_reference()}\n")
    for page, rows in ((training, metrics_rows()), (data, source_rows()), (slurm, cluster_rows())):
        text, first = page.read_text(), rows.partition(" | ")[0]
        begin = text.index(f"\n{first} |") + 1
        page.write_text(text[:begin] + rows + text[text.index("\n\n", begin) :])
    PAGE.write_text(models_page())


if __name__ == "__main__":
    write_tables()
