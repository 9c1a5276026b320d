"""If this fails, a misspelt key is silently ignored, or an error in the YAML ends in a traceback."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora_dist.config.config_errors import known_keys
from qlora_dist.config.config_file import dump_config, load_config
from qlora_dist.config.other_trainers import KEY_ADVICE
from qlora_dist.config.schema import Config
from qlora_dist.config.sections import SourceConfig
from qlora_dist.errors import UserError

BASE = "model: {base: m}\ndata: {train: [a.jsonl]}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def config_problems(path: Path, text: str | bytes, *overrides: str) -> list[str]:
    """Return the lines of the error message for a file, with FILE as its name."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(str(path), "FILE").split("\n")


def config_problem(path: Path, text: str | bytes, *overrides: str) -> str:
    """Return the error message for a file with one problem."""
    (sentence,) = config_problems(path, text, *overrides)
    return sentence


SOURCES = "model: {base: m}\ndata:\n  train:\n    - a.jsonl\n    - path: b.jsonl\n"


def test_a_source_is_a_path_or_a_mapping(path):
    path.write_text(SOURCES + "      weight: 2\n      format: alpaca\n  eval: {path: c, split: test}")
    data = load_config(path).data
    assert data.train == ["a.jsonl", SourceConfig(path="b.jsonl", weight=2, format="alpaca")]
    assert data.eval == SourceConfig(path="c", split="test")
    assert load_config(path, ["data.train=[a.jsonl,b.jsonl]"]).data.train == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("      wieght: 2", "FILE, line 6: data.train.wieght: unknown key; did you mean data.train.weight?"),
        ("      zzz: 2", "FILE, line 6: data.train.zzz: unknown key; this section has format, path, split, "),
        ("      weight: 0", "FILE, line 6: data.train.weight: should be greater than 0, not 0"),
        ("      format: parquet", "FILE, line 6: data.train.format: should be 'auto', 'messages', "),
        ("    - {weight: 2}", "FILE, line 6: data.train.path: is missing; add it"),
        ("    - 3", "FILE, line 6: data.train: should be a valid string, or be a valid dictionary, not 3"),
        ("    -", "FILE, line 6: data.train: should be a valid string, or be a valid dictionary, not None"),
        ("  eval: {path: b, splt: x}", "FILE, line 6: data.eval.splt: unknown key; did you mean data.eval.split?"),
        ("  eval: 3", "FILE, line 6: data.eval: should be a valid string, or be a valid dictionary, not 3"),
    ],
)
def test_errors_in_a_source_are_reported_with_their_line(path, text, message):
    assert config_problem(path, SOURCES + text).startswith(message)


def test_one_source_need_not_be_a_list(path):
    path.write_text("model: {base: m}\ndata: {train: a.jsonl, max_bad_rows: 1.5%}")
    config = load_config(path)
    assert (config.data.train, config.data.max_bad_rows) == (["a.jsonl"], "1.5%")
    assert load_config(path, ["data.train={path: b, weight: 2}"]).data.train == [SourceConfig(path="b", weight=2)]
    path.write_text(dump_config(config))
    assert load_config(path) == config
    for share in ("1", "-1%", "1 %", "101%"):
        assert "data.max_bad_rows: should " in config_problem(path, BASE, f"data.max_bad_rows='{share}'")


def test_errors_in_an_override_are_not_blamed_on_the_file(path):
    override = "data.train=[a.jsonl, {path: b.jsonl, wieght: 2}]"
    message = config_problem(path, SOURCES + "      weight: 1", override)
    assert message == f"override {override}: data.train.wieght: unknown key; did you mean data.train.weight?"


def test_defaults_are_qloras(path):
    path.write_text(BASE)
    config = load_config(path)
    assert (config.model.quant_type, config.model.block_size, config.model.double_quant) == ("nf4", 64, True)
    assert (config.lora.r, config.lora.alpha, config.lora.targets) == (64, 16, "all-linear")
    assert (config.optim.lr, config.optim.max_grad_norm, config.train.global_batch) == (2e-4, 0.3, 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {steps: 3}", "FILE, line 3: trian: unknown key; did you mean train?"),
        ("train:\n  seed: 1\n  stpes: 3", "FILE, line 5: train.stpes: unknown key; did you mean train.steps?"),
        ("optim: {learnrate: 1}", "FILE, line 3: optim.learnrate: unknown key; this section has beta1, "),
        ("data2: {}", "FILE, line 3: data2: unknown key; did you mean data?"),
        ("optim: {base: 1}", "FILE, line 3: optim.base: unknown key; did you mean model.base or parallel.base?"),
        ("optim: {globalbatch: 1}", "FILE, line 3: optim.globalbatch: unknown key; did you mean train.global_batch?"),
        ("train: {shufle: 1}", "FILE, line 3: train.shufle: unknown key; this section has checkpointing, "),
        ("lr: 3", "FILE, line 3: lr: unknown key; did you mean optim.lr?"),
        ("train: {max_grad_norm: 1.0}", "FILE, line 3: train.max_grad_norm: unknown key; did you mean optim.max_grad"),
        ("1: 2", "FILE, line 3: 1: unknown key; this section has data, lora, model, "),
        ("~: 2", "FILE: None: unknown key; this section has data, lora, model, "),
    ],
)
def test_unknown_keys_are_named_with_line_and_nearest_key(path, text, message):
    assert config_problem(path, BASE + text).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: many}", "FILE, line 3: train.steps: should be a valid integer, not 'many'"),
        ("train:\n  steps: 3.5", "FILE, line 4: train.steps: should be a valid integer, not 3.5"),
        ("train: {steps: true}", "FILE, line 3: train.steps: should be a valid integer, not True"),
        ("train: {steps: 0}", "FILE, line 3: train.steps: should be greater than or equal to 1, not 0"),
        ("train: {seed: }", "FILE, line 3: train.seed: should be a valid integer, not None"),
        ("train: {epochs: 0}", "FILE, line 3: train.epochs: should be greater than 0, not 0"),
        (
            "optim: {lr: '2e-4'}",
            "FILE, line 3: optim.lr: should be a valid number, not '2e-4'; write it without quotes",
        ),
        (
            "train: {compile: 'yes'}",
            "FILE, line 3: train.compile: should be a valid boolean, not 'yes'; write it without",
        ),
        ("train: {steps: 'many'}", "FILE, line 3: train.steps: should be a valid integer, not 'many'"),
        (
            "optim: paged_adamw_8bit",
            "FILE, line 3: optim: should be a valid dictionary, not 'paged_adamw_8bit'; write optim",
        ),
        ("run: {trackers: wandb}", "FILE, line 3: run.trackers: should be a valid list, not 'wandb'; write [wandb]"),
        ("optim: {lr: -1}", "FILE, line 3: optim.lr: should be greater than 0, not -1"),
        ("model2: {}", "FILE, line 3: model2: unknown key; did you mean model?"),
        ("lora:", "FILE, line 3: lora: is an empty section; fill it or take the line out"),
        ("lora: 3", "FILE, line 3: lora: should be a valid dictionary"),
        ("lora: {targets: [1]}", "FILE, line 3: lora.targets: should be 'all-linear', or be a valid string, not [1]"),
        ("lora: {targets: []}", "FILE, line 3: lora.targets: should be 'all-linear', or have at least 1 item"),
        (
            "parallel: {base: half}",
            "FILE, line 3: parallel.base: should be 'replicate', 'node', 'world' or 'paged', or be a",
        ),
        ("run: {name: ../up}", "FILE, line 3: run.name: should match pattern"),
        (
            "train:\n  global_batch: 16\n  micro_batch: 3",
            "FILE, line 4: train.global_batch: 16 is not a multiple of train.micro_batch: 3; change one of them",
        ),
        (
            "train: {steps: 50, epochs: 3}",
            "FILE, line 3: train.epochs: 3 and train.steps: 50 exclude each other; set one of them to null, or take",
        ),
    ],
)
def test_wrong_values_are_reported_with_line_and_expected_value(path, text, message):
    assert config_problem(path, BASE + text).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {base: m}", "FILE: data: is missing; add it"),
        ("data: {train: [a]}\nmodel:\n  quant_type: nf4", "FILE, line 2: model.base: is missing; add it"),
        ("- model\n- data", "FILE: holds no mapping of sections; start with `model:` and `data:`"),
        ("just text", "FILE: holds no mapping of sections"),
        (BASE + "model: {base: other}", "FILE, line 3: not valid YAML: the key 'model' appears twice"),
        (BASE + "train:\n  seed: 1\n  seed: 2", "FILE, line 5: not valid YAML: the key 'seed' appears twice"),
        (BASE + "train: {steps: 3", "FILE, line 3: not valid YAML: "),
        (BASE + "train:\n\tsteps: 3", "FILE, line 4: not valid YAML: "),
        (BASE + "run: {name: \0}", "FILE: not valid YAML: unacceptable character"),
        (BASE + "? [a, b]\n: 1", "FILE, line 3: not valid YAML: found unhashable key"),
        (BASE + "? {a: b}\n: 1", "FILE, line 3: not valid YAML: found unhashable key"),
        (BASE + "train: {steps: !!int x}", "FILE, line 3: not valid YAML: invalid literal"),
        (BASE + "train: !!python/object/apply:os.getcwd []", "FILE, line 3: not valid YAML: could not determine"),
        (BASE + "---\na: 1", "FILE, line 3: not valid YAML: "),
        (b"\xff\xfe\x00", "FILE: cannot be read ("),
    ],
)
def test_a_file_that_is_not_a_configuration_is_refused(path, text, message):
    assert config_problem(path, text).startswith(message)


def test_all_errors_are_in_one_message_each_with_its_line(path):
    text = """\
model:
  compute_dtype: bfloat16
  block_size: '64'
data: {train: 3}
lora: {rank: 16}
optim: {lr: "2e-4", warmup_steps: 200}
train: {global_batch: 5, micro_batch: 2, steps: 100, epochs: 2, seed: -1}
parallel: {base: paged, offload: base}
"""
    assert config_problems(path, text, "train.stpes=3", "train.steps=7") == [
        "FILE: 11 errors",
        "FILE, line 1: model.base: is missing; add it",
        "FILE, line 2: model.compute_dtype: should be 'bf16', 'fp16' or 'fp32', not 'bfloat16'",
        "FILE, line 3: model.block_size: should be 32, 64, 128, 256, 512, 1024, 2048 or 4096, not '64'; write it "
        "without quotes",
        "FILE, line 4: data.train: should be a valid list, not 3",
        "FILE, line 5: lora.rank: unknown key; write lora.r",
        "FILE, line 6: optim.lr: should be a valid number, not '2e-4'; write it without quotes",
        "FILE, line 7: train.seed: should be greater than or equal to 0, not -1",
        "FILE, line 7: train.epochs: 2 and train.steps: 7 exclude each other; set one of them to null, or take it out",
        "FILE, line 7: train.global_batch: 5 is not a multiple of train.micro_batch: 2; change one of them",
        "FILE, line 8: parallel.offload: base and parallel.base: paged exclude each other; leave parallel.offload out",
        "override train.stpes=3: train.stpes: unknown key; did you mean train.steps?",
    ]


def test_a_wrong_value_is_not_also_reported_as_a_contradiction(path):
    sentence = "FILE, line 3: train.micro_batch: should be greater than or equal to 1, not 0"
    assert config_problem(path, BASE + "train: {global_batch: 5, micro_batch: 0}") == sentence


def test_a_misspelt_section_or_key_is_one_error(path):
    assert (
        config_problem(path, "modle: {base: m}\ndata: {train: [a]}")
        == "FILE, line 1: modle: unknown key; did you mean model?"
    )
    assert config_problem(path, "model: {bass: m}\ndata: {train: [a]}") == (
        "FILE, line 1: model.bass: unknown key; did you mean model.base?"
    )
    missing = ["FILE: 2 errors", "FILE: model: is missing; add it", "FILE: data: is missing; add it"]
    assert config_problems(path, "") == missing
    assert config_problems(path, SOURCES + "    - {wieght: 2}") == [
        "FILE: 2 errors",
        "FILE, line 6: data.train.wieght: unknown key; did you mean data.train.weight?",
        "FILE, line 6: data.train.path: is missing; add it",
    ]


AXOLOTL = """\
base_model: NousResearch/Meta-Llama-3-8B
load_in_4bit: true
datasets:
  - path: mydata.jsonl
    type: chat_template
sequence_len: 4096
micro_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 0.0002
special_tokens: {pad_token: x}
seed: 1
loss_watchdog_patience: 3
"""


def test_a_file_of_another_trainer_gets_advice_from_the_migration_page(path):
    always = "leave it out: training is always QLoRA, with a base in 4 bit"
    assert config_problems(path, AXOLOTL) == [
        'FILE: looks like a configuration of axolotl; see docs/training.md, "Coming from another trainer"',
        "FILE, line 1: base_model: unknown key; write model.base",
        f"FILE, line 2: load_in_4bit: unknown key; {always}",
        "FILE, line 3: datasets: unknown key; write data.train",
        "FILE, line 6: sequence_len: unknown key; write data.seq_len",
        "FILE, line 7: micro_batch_size: unknown key; write train.micro_batch",
        "FILE, line 8: gradient_accumulation_steps: unknown key; write train.global_batch: rows of a step, over all "
        "ranks; only train.micro_batch is per rank",
        "FILE, line 9: learning_rate: unknown key; write optim.lr",
        "FILE, line 11: seed: unknown key; did you mean train.seed?",
        "FILE: no key of the same name or meaning: special_tokens, loss_watchdog_patience",
    ]
    trl = "model_name_or_path: m\ndataset_name: d\nuse_peft: true\nlora_r: 16\noptim: adamw_torch"
    assert config_problems(path, trl)[0].startswith("FILE: looks like a configuration of TRL; see ")
    factory = "model_name_or_path: m\nstage: sft\nfinetuning_type: lora\ndataset: d\ncutoff_len: 9"
    assert config_problems(path, factory)[0].startswith("FILE: looks like a configuration of LLaMA-Factory; see ")


def test_advice_for_another_trainers_key_names_a_key():
    known = {".".join(key) for key in known_keys(Config)}
    for key, advice in KEY_ADVICE.items():
        named = re.findall(r"\b(?:model|lora|data|parallel|optim|paging|train|run)\.\w+", advice)
        assert set(named) <= known, key


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: no such configuration file; give the path"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("2E-4", 2e-4),
        ("+2e-4", 2e-4),
        ("1e1", 10.0),
        (".5e1", 5.0),
        ("2.0e-4", 2e-4),
        ("1", 1),
        (".1", 0.1),
    ],
)
def test_numbers_as_people_write_them(path, text, value):
    path.write_text(BASE + f"optim: {{lr: {text}}}")
    assert load_config(path).optim.lr == value
    path.write_text(BASE)
    assert load_config(path, [f"optim.lr={text}"]).optim.lr == value


def test_a_date_is_a_name(path):
    path.write_text(BASE + "run: {name: 2026-01-31}")
    assert load_config(path).run.name == "2026-01-31"
    assert load_config(path, ["run.name=2026-13-45"]).run.name == "2026-13-45"


def test_a_section_may_be_merged_from_another(path):
    path.write_text(
        "model: &m {base: m}\ndata: {train: [a]}\n".replace("{base: m}", "\n  <<: {base: m}\n  block_size: 32")
    )
    assert load_config(path).model.base == "m"
    assert load_config(path).model.block_size == 32


def test_rows_that_are_packed_cannot_be_grouped_by_length(path):
    message = "data.group_by_length: packed rows have one length; set data.packing: none, or leave the key out"
    assert config_problem(path, BASE, "data.group_by_length=true") == f"override data.group_by_length=true: {message}"
    assert load_config(path, ["data.group_by_length=true", "data.packing=none"]).data.group_by_length


def test_epochs_instead_of_steps(path):
    path.write_text(BASE + "train: {steps: 50}")
    config = load_config(path, ["train.steps=null", "train.epochs=2", "optim.warmup_steps=1000"])
    assert (config.train.steps, config.train.epochs) == (None, 2)
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_overrides_win_in_their_order(path):
    path.write_text(BASE + "train: {steps: 30, seed: 7}\nlora:\n")
    config = load_config(
        path,
        [
            "train.steps=40",
            "train.steps=50",
            "lora.r=8",  # in a section that is empty in the file
            "lora.targets=[q_proj, v_proj]",
            "optim.max_grad_norm=null",  # in a section that the file lacks
            "parallel.base=2",
            "data={train: [b.jsonl], seq_len: 64}",  # a whole section
            "model.base=/a b/c=d",
            " run.name =x",
        ],
    )
    assert (config.train.steps, config.train.seed, config.lora.r, config.lora.targets) == (
        50,
        7,
        8,
        ["q_proj", "v_proj"],
    )
    assert (config.optim.max_grad_norm, config.parallel.base) == (None, 2)
    assert (config.data.train, config.data.seq_len) == (["b.jsonl"], 64)
    assert (config.model.base, config.run.name) == ("/a b/c=d", "x")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=3", "override train.stpes=3: train.stpes: unknown key; did you mean train.steps?"),
        ("trian.steps=3", "override trian.steps=3: trian: unknown key; did you mean train?"),
        ("steps=3", "override steps=3: steps: unknown key; did you mean train.steps?"),
        ("train.steps=many", "override train.steps=many: train.steps: should be a valid integer, not 'many'"),
        ("model=x", "override model=x: model: should be a valid dictionary"),
        ("train.steps", "'train.steps': an override is written section.key=value, such as train.steps=10"),
        ("--steps", "'--steps': an override is written section.key=value"),
        ("=3", "'=3': an override is written section.key=value"),
        ("train.=3", "'train.=3': an override is written section.key=value"),
        ("train.steps=[", "'train.steps=[': the value is not valid YAML; put it in quotes"),
        ("train={seed: 1, seed: 2}", "'train={seed: 1, seed: 2}': the value is not valid YAML"),
        ("model.base.x=3", "'model.base.x=3': base is not a section; write section.key=value"),
    ],
)
def test_wrong_overrides_are_named(path, override, message):
    assert config_problem(path, BASE, override).startswith(message)


# YAML reads these as line breaks, and the dumper does not quote them
texts = st.text(st.characters(exclude_characters="\x85\u2028\u2029", exclude_categories=["Cs"]))
names = st.text(st.characters(categories=["L", "N"], max_codepoint=122), min_size=1, max_size=8)
trees = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"base": texts}, optional={"block_size": st.sampled_from([32, 4096]), "double_quant": st.booleans()}
        ),
        "data": st.fixed_dictionaries({"train": st.lists(texts, min_size=1)}, optional={"eval": st.none() | texts}),
    },
    optional={
        "lora": st.fixed_dictionaries(
            {},
            optional={
                "alpha": st.floats(0, 1e30, exclude_min=True) | st.integers(1, 999),
                "targets": st.just("all-linear") | st.lists(texts, min_size=1),
            },
        ),
        "parallel": st.fixed_dictionaries({}, optional={"base": st.sampled_from(["node", "world"]) | st.integers(1)}),
        "optim": st.fixed_dictionaries(
            {"warmup_steps": st.just(0)},
            optional={"lr": st.floats(1e-300, 1e300), "max_grad_norm": st.none() | st.floats(1e-300, 1e300)},
        ),
        "train": st.fixed_dictionaries(
            {}, optional={"seed": st.integers(0, 2**32 - 1), "checkpointing": st.integers(1, 9)}
        ),
        "run": st.fixed_dictionaries({}, optional={"name": names | st.dates().map(str), "dir": texts}),
    },
)


@settings(deadline=None, max_examples=80)
@example({"model": {"base": "1e5"}, "data": {"train": ["2026-01-31", "0o7", "on", "~", "=", "<<"]}})
@given(trees)
def test_a_written_configuration_is_read_back_equal(tree):
    config = Config.model_validate(tree)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path) == config


def test_a_written_configuration_is_complete(path):
    path.write_text(BASE)
    written = yaml.safe_load(dump_config(load_config(path)))
    for section, field in Config.model_fields.items():
        fields = field.annotation.model_fields
        assert written[section].keys() == {inner.alias or key for key, inner in fields.items()}


def test_every_key_is_documented():
    for section, field in Config.model_fields.items():
        for key, inner in field.annotation.model_fields.items():
            assert inner.description, f"{section}.{key}"


@settings(deadline=None, max_examples=150)
@given(st.text(alphabet="abmodel:{}[]-? \n\t&*!|>'\"#%@,0123e.<=~\0é", max_size=40))
def test_no_text_causes_a_traceback(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError) as caught:
            load_config(path)
        lines = str(caught.value).replace(str(path), "FILE").split("\n")
        assert all(line.startswith("FILE") for line in lines)
        assert len(lines) == 1 or lines[0] == f"FILE: {len(lines) - 1} errors"
