"""If this fails, `qlora-dist plan` is slow, plans something else than requested, or writes unusable output."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qlora_dist.cli.main import app
from qlora_dist.config.config_file import load_config
from qlora_dist.errors import UserError
from qlora_dist.plan.hardware import load_hardware
from qlora_dist.plan.plan_args import PlanArgs, config_to_plan, plan_from_args
from qlora_dist.plan.plan_search import search_plans

H100 = PlanArgs(
    model="llama-3.1-405b", overrides=["lora.r=16"], gpus=8, gpu="h100-80gb", nodes=2, network="infiniband-400g"
)


def test_a_plan_is_quick_and_needs_no_torch() -> None:
    code = """
import sys, time
from qlora_dist.cli.main import app
started = time.process_time()
app(["plan", "llama-3.1-405b", "--gpus", "8", "--nodes", "2", "--json"], standalone_mode=False)
print(time.process_time() - started, "torch" in sys.modules, "transformers" in sys.modules, file=sys.stderr)
"""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, torch, transformers = done.stderr.split()
    assert (torch, transformers) == ("False", "False")
    assert float(seconds) < 1 and time.perf_counter() - started < 120
    tree = json.loads(done.stdout)
    assert tree["fits"] is True
    low, high = tree["per_rank"]["reserved_bytes"]
    assert tree["per_rank"]["static_bytes"] < tree["per_rank"]["peak_bytes"] < low < high
    assert sum(tree["per_rank"]["terms"].values()) == tree["per_rank"]["peak_bytes"]
    assert set(tree) >= {"fits", "per_rank", "traffic", "step_s", "tokens_per_s", "bound_by"}
    assert set(tree["traffic"]) >= {"intra_node_bytes", "inter_node_bytes"}


def test_the_table_has_every_term() -> None:
    result = CliRunner().invoke(app, ["plan", "mixtral-8x7b", "--gpus", "2", "--gpu", "rtx-4090", "lora.r=8"])
    assert result.exit_code == 0, result.output
    for term in ("base", "checkpointed inputs", "peak, ", "reserved by the allocator", "tokens/s", "fit"):
        assert term in result.output


def test_the_base_stays_in_its_node() -> None:
    """Only adapters cross between nodes."""
    two_meshes, one_mesh = (
        plan_from_args(H100),
        plan_from_args(PlanArgs(**{**vars(H100), "overrides": ["parallel.base=world"]})),
    )
    assert two_meshes.intra_node_bytes > 50 * two_meshes.inter_node_bytes
    assert one_mesh.intra_node_bytes == 0 and one_mesh.inter_node_bytes > two_meshes.intra_node_bytes
    slow = PlanArgs(**{**vars(H100), "network": "ethernet-25g"})
    assert plan_from_args(slow).time.step_s < 1.2 * plan_from_args(H100).time.step_s
    crossing = PlanArgs(**{**vars(slow), "overrides": ["parallel.base=world"]})
    assert plan_from_args(crossing).time.bound_by == "communication between nodes"


@pytest.mark.parametrize(
    ("overrides", "batch"),
    [([], 16), (["train.micro_batch=3"], 48), (["train.global_batch=64"], 64), (["lora.r=8"], 16)],
)
def test_the_global_batch_suits_the_ranks(overrides: list[str], batch: int) -> None:
    asked = PlanArgs(model="smollm2-135m", overrides=overrides, gpus=8, gpu="l40s", nodes=2, network="ethernet-100g")
    assert config_to_plan(asked).train.global_batch == batch


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"overrides": ["train.global_batch=12"]}, r"train\.global_batch: 12 is not a multiple of 16"),
        ({"overrides": ["lora.rank=4"]}, r"lora\.rank: unknown key; write lora\.r"),
        ({"overrides": ["parallel.base=3"]}, r"parallel\.base: 3 does not divide the world of 16 ranks"),
        ({"gpu": "h900"}, "--gpu: h900 is not known; choose from"),
        ({"network": "string"}, "string: no such link; choose from"),
        ({"model": "lama"}, "no model that is known by name"),
    ],
)
def test_errors_are_one_sentence(args: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_from_args(PlanArgs(**{**vars(H100), **args}))  # type: ignore[arg-type]


def test_a_user_defined_gpu(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        "gpus:\n  mine: {memory: 12, tflops: 30, efficiency: 0.5, memory_gb_s: 300, link: wire, host_gb_s: 8}\n"
        "links:\n  wire: {gb_s: 1, efficiency: 0.5}\n"
    )
    hardware = load_hardware(own)
    assert hardware.gpu("mine").memory == 12 and hardware.gpu("a100-40gb").link == "nvlink-3"
    plan = plan_from_args(
        PlanArgs(model="llama-3.2-1b", overrides=[], gpus=2, gpu="mine", nodes=1, network="wire", hardware=own)
    )
    assert plan.fits and plan.time.bound_by.startswith("communication")
    own.write_text("gpus: {mine: {memory: 12}}")
    with pytest.raises(UserError, match=r"gpus\.mine\.tflops"):
        load_hardware(own)


def test_every_known_gpu_has_its_link() -> None:
    hardware = load_hardware()
    names = "rtx-3090 rtx-4090 rtx-5090 rtx-a5000 rtx-6000-ada l40s a10g a100-40gb a100-80gb h100-80gb h200 b200"
    assert set(names.split()) <= set(hardware.gpus)
    for name in hardware.gpus:
        hardware.gpu(name)


RUN_FILE = """\
model: {base: meta-llama/Llama-3.1-8B}
data: {train: [no-such.jsonl], seq_len: 1024}
lora: {r: 16}
train: {micro_batch: 2, global_batch: 32, checkpointing: none}
"""


def test_the_file_of_a_run_is_planned_as_it_will_be_trained(tmp_path: Path) -> None:
    path = tmp_path / "my-run.yaml"
    path.write_text(RUN_FILE)
    keys = ["lora.r=16", "train.micro_batch=2", "train.global_batch=32", "train.checkpointing=none"]

    def plan(model: str, *overrides: str, **options: Any) -> dict[str, Any]:
        return plan_from_args(
            PlanArgs(
                model=model, overrides=overrides, gpus=2, gpu="rtx-4090", nodes=1, network="infiniband-400g", **options
            )
        ).as_json()

    assert plan(str(path)) == plan("llama-3.1-8b", *keys, "data.seq_len=1024")
    assert plan(str(path), "lora.r=8") == plan("llama-3.1-8b", *keys, "data.seq_len=1024", "lora.r=8")
    assert plan(str(path), seq_len=512) == plan("llama-3.1-8b", *keys, seq_len=512)
    with pytest.raises(UserError, match=r"train\.global_batch: 32 is not a multiple of 6 \(3 ranks x"):
        plan_from_args(
            PlanArgs(model=str(path), overrides=[], gpus=3, gpu="rtx-4090", nodes=1, network="infiniband-400g")
        )
    with pytest.raises(UserError, match=r"no-run\.yaml: no such configuration file"):
        plan(str(tmp_path / "no-run.yaml"))
    result = search_plans(
        PlanArgs(model=str(path), overrides=[], gpus=2, gpu="rtx-4090", nodes=1, network="infiniband-400g")
    )
    found = result.best[0].config
    assert (found.train.checkpointing, found.train.micro_batch, found.data.train) == ("none", 2, ["no-such.jsonl"])
    assert result.tried_values["parallel.offload"] == ["none", "base"]


def test_search_finds_what_fits_and_keeps_what_was_asked_for(tmp_path: Path) -> None:
    asked = PlanArgs(
        model="llama-3.1-70b",
        overrides=["lora.r=16", "train.checkpointing=full"],
        gpus=2,
        gpu="rtx-4090",
        nodes=1,
        network="ethernet-25g",
    )
    assert not plan_from_args(asked).fits
    (found, *_) = search_plans(asked).best
    assert found.plan.fits and found.config.train.checkpointing == "full" and found.config.lora.r == 16
    again = plan_from_args(asked, found.config)
    assert again.fits and again.time == found.plan.time
    (paged, *_) = search_plans(PlanArgs(**{**vars(asked), "overrides": ["lora.r=16", "parallel.base=paged"]})).best
    assert paged.plan.fits and 2**30 < paged.config.parallel.resident_bytes < paged.plan.gpu.memory_bytes
    result = CliRunner().invoke(app, ["plan", "smollm2-135m", "--search"])
    assert result.exit_code == 0, result.output
    (tmp_path / "found.yaml").write_text(result.stdout)
    assert load_config(tmp_path / "found.yaml").train.checkpointing == "none"  # memory suffices
    with pytest.raises(UserError, match="does not fit 1 x 1 rtx-3090 with any setting"):
        search_plans(
            PlanArgs(
                model="llama-3.1-405b",
                overrides=["data.seq_len=65536"],
                gpus=1,
                gpu="rtx-3090",
                nodes=1,
                network="ethernet-25g",
            )
        )


def test_search_prefers_a_base_on_the_device_and_few_settings_among_equally_fast_ones() -> None:
    asked = PlanArgs(model="llama-3.1-8b", overrides=[], gpus=2, gpu="rtx-4090", nodes=1, network="infiniband-400g")
    result = search_plans(asked)
    found = result.best[0]
    assert (found.config.parallel.offload, found.config.parallel.base) == ("none", "node")
    assert found.plan.time.step_s < 1.1 * min(other.plan.time.step_s for other in result.best)
    assert len(result.best) == 5 and result.num_fitting >= 5
    assert "parallel.offload: none, base" in result.sentence()
    assert f"Tried {result.num_tried} configurations, of which {result.num_fitting} fit" in result.sentence()
    # offloading is what is left where nothing else fits
    large = search_plans(
        PlanArgs(model="llama-3.1-70b", overrides=[], gpus=2, gpu="rtx-4090", nodes=1, network="infiniband-400g")
    )
    assert large.best[0].changed_settings == {"parallel.offload": "base"}


def test_search_reports_alternatives_and_the_number_tried() -> None:
    result = CliRunner().invoke(app, ["plan", "llama-3.1-8b", "--gpus", "2", "--gpu", "rtx-4090", "--search"])
    said = " ".join(result.stderr.split())
    assert "Configurations that fit: the one above, and the fastest of the others" in said
    assert "Among configurations within 10% of the fastest, the search prefers" in said
    as_json = CliRunner().invoke(app, ["plan", "smollm2-135m", "--search", "--json"])
    tree = json.loads(as_json.stdout)
    assert len(tree["best"]) == 5
    assert tree["best"][0]["step_s"] == tree["plan"]["step_s"]
    assert tree["tried"]["values"]["parallel.offload"] == ["none", "base"]


@pytest.mark.parametrize(("base", "shards"), [("replicate", 1), ("node", 2)])
def test_offloading_costs_time_for_embedding_and_head_which_no_computation_hides(base: str, shards: int) -> None:
    def step_s(offload: str) -> float:
        keys = ["optim.name=adamw", "train.checkpointing=none", f"parallel.base={base}", f"parallel.offload={offload}"]
        return plan_from_args(
            PlanArgs(model="llama-3.1-8b", overrides=keys, gpus=2, gpu="rtx-4090", nodes=1, network="infiniband-400g")
        ).time.step_s

    embedding_and_head = 2 * 2 * 128256 * 4096 / shards  # bf16
    micro_batches, bytes_per_s = 8, 22e9  # 16 rows over 2 ranks; host_gb_s of the card
    assert step_s("base") - step_s("none") >= micro_batches * embedding_and_head / bytes_per_s


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path: Path) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="--plot needs matplotlib"):
            CliRunner().invoke(app, ["plan", "smollm2-135m", "--plot", str(tmp_path / "p.png")], catch_exceptions=False)
    else:
        assert CliRunner().invoke(app, ["plan", "smollm2-135m", "--plot", str(tmp_path / "p.png")]).exit_code == 0
        assert (tmp_path / "p.png").stat().st_size > 10_000
