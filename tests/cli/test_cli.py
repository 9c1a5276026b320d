"""If this fails, a user's error ends in a traceback, or is detected only after waiting for GPUs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_dist import __version__
from qlora_dist.cli.main import main
from tests.helpers import tiny_models

ROOT = Path(__file__).resolve().parents[2]
WORLD_OF_4 = {
    "RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29599",
}

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run a command line in this process, which saves importing torch, and return exit code, stdout and stderr."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qlora-dist", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        code = caught.value.code
        return (code if isinstance(code, int) else 0, *capfd.readouterr())

    return call


def assert_one_sentence(result: tuple[int, str, str], *parts: str) -> None:
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("qlora-dist: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    for part in parts:
        assert str(part) in err


def run_cli_process(
    *words: str | Path, options: tuple[str, ...] = (), **environ: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-m", "qlora_dist", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environ, capture_output=True, text=True, timeout=120)


# --- the real command, in a separate process ---


def test_quantize(cli, tiny_llama, tmp_path):
    out = tmp_path / "a name of many words, longer than a line of a terminal, with [brackets]" / "out"
    code, stdout, stderr = cli("quantize", tiny_llama, out, "--file-size", "30KB")
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    assert lines[0] == (
        f"{out}: 77.0 % of 179,648 parameters are in 4 bit, 99.7 % of those outside unquantized embeddings and output "
        "head"
    )
    assert "  not quantized: lm_head.weight (20,480)" in lines
    assert "  not quantized: model.layers.*.input_layernorm.weight (192)" in lines
    assert (out / "model-00002-of-00006.safetensors").exists()


def test_quantize_embeddings(cli, tiny_llama, tmp_path):
    code, out, err = cli("quantize", "--embeddings", tiny_llama, tmp_path / "out")
    assert (code, err) == (0, "")
    assert "99.8 % of 179,648 parameters are in 4 bit, 99.8 % of those outside unquantized embeddings" in out
    assert "lm_head" not in out


def imported(stderr: str) -> set[str]:
    """Return the packages that `-X importtime` lists."""
    return {line.split("|")[2].split(".")[0].strip() for line in stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["quantize", "--help"], ["preprocess", "--help"], ["version"]]
)
def test_help_comes_without_torch(words):
    done = run_cli_process(*words, options=("-X", "importtime"))
    assert done.returncode == 0
    assert (__version__ if words == ["version"] else "Usage") in done.stdout
    packages = imported(done.stderr)
    assert "typer" in packages
    assert not {"torch", "transformers", "bitsandbytes", "peft"} & packages


def test_mistakes_in_the_configuration_come_without_torch(tmp_path):
    path = tiny_models.make_config(tmp_path, tmp_path / "no-model")
    done = run_cli_process("train", path, "train.stpes=3", options=("-X", "importtime"))
    sentence = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert sentence == ["qlora-dist: override train.stpes=3: train.stpes: unknown key; did you mean train.steps?"]
    packages = imported(done.stderr)
    assert "yaml" in packages
    assert not {"torch", "transformers", "bitsandbytes", "peft"} & packages


def test_a_mesh_that_does_not_fit_is_refused_before_the_ranks_join(tiny_llama, tmp_path):
    # there is no other rank, so joining would wait
    path = tiny_models.make_config(tmp_path, tiny_llama)
    done = run_cli_process("train", path, "parallel.base=3", "--dry-run", **WORLD_OF_4)
    assert done.returncode == 2
    assert done.stderr == "qlora-dist: parallel.base: 3 does not divide the world of 4 ranks; use 1, 2 or 4\n"


# --- the same command line, called in this process ---


def test_version(cli):
    assert cli("version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        (None, [], ["config.yaml: no such configuration file; give the path of a YAML file"]),
        ("model: [", [], ["config.yaml, line 1: not valid YAML"]),
        ("model: {base: m}\nmodel: {base: n}", [], ["line 2", "the key 'model' appears twice"]),
        ("modle: {base: m}\ndata: {train: [a]}", [], ["line 1: modle: unknown key; did you mean model?"]),
        ("model: {base: m}\ndata: {trian: [a]}", [], ["line 2: data.trian: unknown key; did you mean data.train?"]),
        ("model: {base: m}\ndata: {}", [], ["line 2: data.train: is missing; add it"]),
        ("model: {base: m}\ndata: {train: 3}", [], ["line 2: data.train: should be a valid list, not 3"]),
        ("model: {base: m}\ndata: {train: [a]}", ["train.steps"], ["an override is written section.key=value"]),
        ("model: {base: m}\ndata: {train: [a]}", ["run.name=\0"], ["not valid YAML"]),
        ("model: {base: m}\ndata: {train: [a]}\nrun: {name: \0}", [], ["not valid YAML"]),
    ],
)
def test_mistakes_in_the_configuration(cli, tmp_path, text, overrides, parts):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    assert_one_sentence(cli("train", path, *overrides), *parts)


def test_several_mistakes_in_the_configuration_have_a_line_each(cli, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {base: m}\ndata: {train: [a]}\nlora: {rank: 8}\noptim: {lr: no}")
    code, out, err = cli("train", path, "train.steps=0")
    assert (code, out) == (2, "")
    assert err.replace(str(path), "FILE").splitlines() == [
        "qlora-dist: FILE: 3 errors",
        "FILE, line 3: lora.rank: unknown key; write lora.r",
        "FILE, line 4: optim.lr: should be a valid number, not False",
        "override train.steps=0: train.steps: should be greater than or equal to 1, not 0",
    ]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [(["--lora.r=16"], "lora.r=16"), (["--lora.r", "16"], "lora.r=16"), (["--data.eval"], "data.eval=VALUE")],
)
def test_a_key_written_as_an_option_is_refused_with_the_right_form(cli, tmp_path, words, remedy):
    path = tiny_models.make_config(tmp_path, tmp_path / "no-model")
    sentence = f"{words[0]}: keys of the configuration have no dashes; write {remedy}\n"
    assert_one_sentence(cli("train", path, *words), sentence)


def test_minus_h_is_help(cli):
    code, out, _ = cli("train", "-h")
    assert code == 0
    assert "Usage" in out


def truncate_weights(folder: Path) -> Path:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return folder


def convert_to_pickle(folder: Path) -> Path:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def remove_file(name: str) -> Callable[[Path], Path]:
    def remove(folder: Path) -> Path:
        (folder / name).unlink()
        return folder

    return remove


def set_config(**changes: object) -> Callable[[Path], Path]:
    def change(folder: Path) -> Path:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return change


def remove_tokenizer(folder: Path) -> Path:
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "chat_template.jinja").unlink()
    return folder


DAMAGED_MODELS = {
    "gone": (lambda folder: shutil.rmtree(folder), "no such folder; give the folder of a Hugging Face model"),
    "a pickle": (
        convert_to_pickle,
        "pytorch_model.bin is a pickle, which is never read; save the model as safetensors",
    ),
    "truncated": (truncate_weights, "model.safetensors: is truncated: "),
    "no config": (remove_file("config.json"), "config.json: is missing"),
    "unknown architecture": (
        set_config(model_type="gpt99", architectures=["Gpt99ForCausalLM"]),
        "cannot build a causal language model from it",
    ),
    "no language model": (set_config(model_type="vit"), "cannot build a causal language model from it"),
    "another shape": (set_config(num_hidden_layers=4), "the weight model.layers.3."),
}


@pytest.mark.parametrize("verb", ["quantize", "train"])
@pytest.mark.parametrize("damage", DAMAGED_MODELS)
def test_a_model_that_cannot_be_used(cli, tiny_llama, tmp_path, verb, damage):
    change, message = DAMAGED_MODELS[damage]
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    path = tiny_models.make_config(tmp_path, folder)
    change(folder)
    words = ["quantize", folder, tmp_path / "out"] if verb == "quantize" else ["train", path]
    assert_one_sentence(cli(*words), str(folder), message)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "runs").exists()


def test_quantize_refuses_what_is_in_4_bit(cli, tiny_llama_nf4, tmp_path):
    result = cli("quantize", tiny_llama_nf4, tmp_path / "out")
    assert_one_sentence(result, tiny_llama_nf4, "is in 4 bit already; use it as model.base")


def test_quantize_keeps_an_existing_result(cli, tiny_llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    assert_one_sentence(cli("quantize", tiny_llama, tmp_path / "out"), "is there already; remove it")
    assert (tmp_path / "out" / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    ("option", "value"),
    [("--quant-type", "int4"), ("--block-size", "63"), ("--device", "tpu"), ("--file-size", "large")],
)
def test_quantize_options_out_of_range(cli, tiny_llama, tmp_path, option, value):
    assert_one_sentence(cli("quantize", tiny_llama, tmp_path / "out", option, value), f"{option} {value}: ")


DAMAGED_DATA = {
    "gone": (lambda path: path.unlink(), "train.jsonl: no such data file"),
    "empty": (lambda path: path.write_text(""), "no rows; write one JSON object"),
    "a broken line": (
        lambda path: path.write_text(path.read_text() + '{"messages": [\n'),
        "train.jsonl, line 81: not valid JSON",
    ),
    "another format": (lambda path: path.write_text('{"prompt": "a"}\n'), "line 1: its fields (`prompt`)"),
    "no content": (
        lambda path: path.write_text('{"messages": [{"role": "user"}]}\n'),
        "line 1: message 1 has no `content`",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_DATA)
def test_data_that_cannot_be_used(cli, tiny_llama, tmp_path, damage):
    path = tiny_models.make_config(tmp_path, tiny_llama)
    change, message = DAMAGED_DATA[damage]
    change(tmp_path / "train.jsonl")
    assert_one_sentence(cli("train", path), str(tmp_path / "train.jsonl"), message)
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_without_chat_template(cli, tiny_llama, tmp_path):
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    remove_file("chat_template.jinja")(folder)
    path = tiny_models.make_config(tmp_path, folder)
    assert_one_sentence(cli("train", path), "chat template")


def test_a_model_without_tokenizer(cli, tiny_llama, tmp_path):
    folder = remove_tokenizer(Path(shutil.copytree(tiny_llama, tmp_path / "model")))
    path = tiny_models.make_config(tmp_path, folder)
    assert_one_sentence(cli("train", path), f"{folder}: holds no tokenizer")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.targets=[q_proj, query]"], "lora.targets: query is no quantized layer of"),
        (["lora.targets=[lm_head]"], "choose from down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        (["parallel.base=3"], "parallel.base: 3 does not divide the world of 1 rank"),
        (["train.micro_batch=3", "train.global_batch=4"], "train.global_batch: 4 is not a multiple of"),
    ],
)
def test_configurations_that_do_not_fit_the_model_or_the_ranks(cli, tiny_llama, tmp_path, overrides, message):
    path = tiny_models.make_config(tmp_path, tiny_llama)
    assert_one_sentence(cli("train", path, *overrides), message)


def test_an_existing_run_is_not_overwritten(cli, tiny_llama, tmp_path):
    path = tiny_models.make_config(tmp_path, tiny_llama)
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    assert_one_sentence(cli("train", path), run, "holds a run already", "run.overwrite=true")
    assert (run / "metrics.jsonl").read_text() == "{}\n"


def test_a_dry_run_checks_the_runs_name_last(cli, tiny_llama, tmp_path):
    path = tiny_models.make_config(tmp_path, tiny_llama)
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    assert_one_sentence(cli("train", path, "--dry-run", "lora.targets=[query]"), "query is no quantized layer")
    assert_one_sentence(cli("train", path, "--dry-run"), run, "holds a run already")


def test_half_of_torchruns_environment(cli, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    path = tiny_models.make_config(tmp_path, tiny_llama)
    assert_one_sentence(cli("train", path), "not WORLD_SIZE; start with torchrun")


def test_every_rank_refuses_and_only_the_first_reports_it(cli, tiny_llama, tmp_path, monkeypatch):
    path = tiny_models.make_config(tmp_path, tiny_llama)
    for name, value in WORLD_OF_4.items():
        monkeypatch.setenv(name, value)
    assert_one_sentence(cli("train", path, "lora.targets=[none]"), "lora.targets: none is no quantized layer")
    monkeypatch.setenv("RANK", "3")
    assert cli("train", path, "lora.targets=[none]") == (2, "", "")


def test_a_dry_run_checks_all_and_prints_the_whole_configuration(cli, tiny_llama, tmp_path, monkeypatch):
    path = tiny_models.make_config(tmp_path, tiny_llama)
    for name, value in WORLD_OF_4.items():
        monkeypatch.setenv(name, value)
    code, out, err = cli("train", path, "train.steps=7", "--dry-run")
    assert code == 0, err
    assert "80 sequences; 2,816 tokens, 734 trained; packed into 34 rows" in err
    assert "held out: " in err
    assert not (tmp_path / "runs").exists()
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(out)
    assert cli("train", resolved, "--dry-run") == (0, out, err)
    lines = err.splitlines()
    assert lines[0].startswith("base: ")
    assert any(line.startswith("7 steps of 12 rows = ") for line in lines)
    assert lines[-2].startswith("plan: each rank holds ")
    assert lines[-1] == "ok: configuration, model folder and data are fine; no weights were read"
    code, _, cut = cli("train", resolved, "data.seq_len=24", "data.packing=none", "--dry-run")
    assert code == 0 and "cut to 24 tokens, " in cut and "lost to the length" in cut
    assert "steps: 7\n" in out
