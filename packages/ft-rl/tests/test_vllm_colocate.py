"""The engine ``vllm-colocate``: TRL's own ``VLLMGeneration`` against a module ``vllm`` that is none.

The stand-in takes what vLLM takes, and nothing else, has weights of its own that it writes by, and loses them when it
sleeps, as vLLM does at level 2. No vLLM is run here: what is tested is what TRL and ft ask of it. A real one, awake and
on a processor, is in ``integration_tests/serve/colocate.py``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import random
import re
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator

import ft_core as ft
from ft_core.config import load
from ft_core.errors import ConfigError, RunError
from ft_core.training import train
from ft_rl.environments import EnvironmentClass
from ft_rl.episodes import Episodes
from ft_rl.rollouts import vllm_colocate
from ft_rl.rollouts.own_model import OwnModel
from ft_rl.rollouts.protocol import Completion, EngineJob, Sampling
from ft_rl.rollouts.vllm_colocate import VARIABLES, ColocateSettings, VllmColocate, merged_parameters

REWARD = """
KIND = {"please", "gladly", "thanks", "welcome", "sure"}

def kindness(prompts, completions, **columns):
    return [sum(word in KIND for word in text.split()) / max(len(text.split()), 1) for text in completions]
"""
LOST = float("nan")
NEEDED = {"weights", "kv_cache"}


@dataclasses.dataclass
class SamplingParams:
    """The fields of vLLM's that TRL and ft set; another one is an error."""

    n: int
    repetition_penalty: float
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    logprobs: int
    stop_token_ids: list[int]
    ignore_eos: bool


@dataclasses.dataclass(kw_only=True, eq=False)
class LLM:
    """vLLM's entrance, with the arguments that TRL gives it.

    ``calls`` are the names of what was asked, in order; ``loaded`` the weights that came since it lost its own.
    """

    model: str
    tensor_parallel_size: int
    gpu_memory_utilization: float
    max_model_len: int | None
    max_num_seqs: int | None
    enable_sleep_mode: bool
    model_impl: str
    distributed_executor_backend: str
    seed: int
    max_num_batched_tokens: int
    logprobs_mode: str
    quantization: str | None
    trust_remote_code: bool

    made = []  # noqa: RUF012  # all there were, for the tests
    refuses: Exception | None = None

    def __post_init__(self) -> None:
        if type(self).refuses is not None:
            raise type(self).refuses
        self.environment = {name: os.environ.get(name) for name in (*VARIABLES, "VLLM_NO_USAGE_STATS")}
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)
        own, self._tokenizer = ft.load(self.model, dtype="float32")
        self.own = own.requires_grad_(False)
        self.calls: list[str] = []
        self.params: list[SamplingParams] = []
        self.awake, self.loaded = set(NEEDED), set(dict(self.own.named_parameters()))
        self.all = set(self.loaded)
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load_weights))
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=executor)
        self.made.append(self)

    def _load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        assert "weights" in self.awake
        for name, weight in weights:
            own = self.own.get_parameter(name)  # which raises for one that it does not have
            assert own.shape == weight.shape
            own.copy_(weight)
            self.loaded.add(name)
        if self.calls[-1:] != ["load_weights"]:
            self.calls.append("load_weights")

    def sleep(self, level: int) -> None:
        assert self.enable_sleep_mode
        assert level == 2
        self.calls.append("sleep")
        self.awake.clear()
        self.loaded.clear()
        for parameter in self.own.parameters():
            parameter.fill_(LOST)

    def wake_up(self, tags: list[str]) -> None:
        assert self.enable_sleep_mode
        assert set(tags) < NEEDED
        self.calls += [f"wake_up {tag}" for tag in tags]
        self.awake |= set(tags)

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")

    def generate(self, prompts: list[dict[str, list[int]]], sampling_params: SamplingParams, use_tqdm: bool) -> Any:
        assert self.awake == NEEDED
        assert self.loaded == self.all
        assert not use_tqdm
        assert sampling_params.n == 1
        assert sampling_params.ignore_eos
        self.calls.append("generate")
        self.params.append(sampling_params)
        engine = OwnModel(EngineJob(self.own, self._tokenizer, {}, None, print))
        p = sampling_params
        sampling = Sampling(
            p.max_tokens, p.temperature, p.top_p, p.top_k, p.min_p, p.repetition_penalty, frozenset(p.stop_token_ids)
        )
        asked = [prompt["prompt_token_ids"] for prompt in prompts]
        made = [one for (one,) in engine.generate(asked, 1, sampling, step=0)]
        return [self._output(ids, self._ended(ids, one)) for ids, one in zip(asked, made, strict=True)]

    def _ended(self, asked: list[int], one: Completion) -> Completion:
        """As vLLM's scheduler does: no prompt as long as all it may have, and no token beyond."""
        if self.max_model_len is None:
            return one
        room = self.max_model_len - len(asked)
        assert room > 0
        return Completion(one.ids[:room], one.logprobs[:room])

    def _output(self, asked: list[int], one: Completion) -> Any:
        said = [
            {token: SimpleNamespace(logprob=logprob, rank=1)}
            for token, logprob in zip(one.ids, one.logprobs, strict=True)
        ]
        return SimpleNamespace(
            prompt_token_ids=asked, outputs=[SimpleNamespace(token_ids=tuple(one.ids), logprobs=said)]
        )


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[LLM]]:
    """The stand-in as the module ``vllm``; TRL's module is read anew with it, and without it again."""
    module, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    module.__spec__, module.__version__, module.__file__ = ModuleSpec("vllm", None), "0.31.0", "vllm/__init__.py"  # type: ignore[attr-defined]
    module.LLM, module.RequestOutput, module.SamplingParams = LLM, object, SamplingParams  # type: ignore[attr-defined]
    params.StructuredOutputsParams = object  # type: ignore[attr-defined]
    own = importlib.import_module("trl.generation.vllm_generation")
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    importlib.reload(own)
    monkeypatch.setattr(LLM, "made", [])
    monkeypatch.setattr(LLM, "refuses", None)
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    yield LLM
    monkeypatch.undo()
    importlib.reload(own)


def config(toy: Any, model: Path, folder: Path, method: str = "grpo", **changes: Any) -> dict[str, Any]:
    prompts = [{"prompt": row["prompt"].strip()} for row in toy.rows(48, seed=1)]
    toy.write_rows(folder / "prompts.jsonl", prompts)
    (folder / "kind.py").write_text(REWARD)
    return {
        "model": str(model),
        "method": method,
        "data": str(folder / "prompts.jsonl"),
        "rewards": [f"{folder / 'kind.py'}:kindness"],
        "max_length": 32,
        "lora": {"r": 8},
        "output": str(folder / "run"),
        "training": {
            "max_steps": 8 if method == "ppo" else 4,
            "batch_size": 16,
            "gradient_accumulation": 2,
            "learning_rate": 2e-2,
        },
        method: {
            "max_completion_length": 8,
            "temperature": 0.7,
            "rollouts": {"engine": "vllm-colocate", **changes.pop("rollouts", {})},
        },
    } | changes


def rollouts_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train" and "reward" in row]


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("grpo", {}),
        ("grpo", {"lora": None}),
        ("grpo", {"lora": {"r": 4, "dora": True}}),
        ("ppo", {}),
        ("ppo", {"lora": {"r": 8, "modules_to_save": ["embed_tokens"]}}),
    ],
    ids=["grpo", "in full", "dora", "ppo", "ppo with a saved module"],
)
def test_a_training_is_written_for_by_the_weights_of_each_step(
    toy: Any, steep_model: Path, tmp_path: Path, vllm: Any, method: str, changes: dict[str, Any]
) -> None:
    values = config(toy, steep_model, tmp_path, method, **changes)
    said: list[str] = []
    rows = rollouts_of(train(values, say=said.append).run)
    assert len(rows) == (2 if method == "ppo" else 4)  # PPO writes at every fourth step
    # In float32 the two differ by rounding; by weights that are a step old, see below, by a hundredth of a nat.
    assert all(row["sampling/gap"] < 1e-4 and row["sampling/corrected"] == 0 for row in rows)
    (made,) = vllm.made
    once = ["wake_up weights", "load_weights", "reset_prefix_cache", "wake_up kv_cache", "generate", "sleep"]
    assert made.calls == ["sleep", *once * len(rows)]
    assert made.max_model_len == 32
    assert (made.gpu_memory_utilization, made.max_num_seqs, made.model_impl) == (0.3, None, "vllm")
    assert (made.logprobs_mode, made.quantization, made.trust_remote_code) == ("processed_logprobs", None, False)
    assert made.distributed_executor_backend == "external_launcher"
    assert "rollouts: vLLM writes in this process, and sleeps between phases" in said


@pytest.mark.usefixtures("float32", "vllm")
def test_weights_that_are_a_step_old_are_seen(
    toy: Any, steep_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the bound of the test above is worth."""
    first: list[tuple[str, torch.Tensor]] = []

    def old(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        first.extend((name, weight.clone()) for name, weight in merged_parameters(model) if len(first) < 1000)
        return iter(first)

    monkeypatch.setattr(vllm_colocate, "merged_parameters", lambda model: iter(first) if first else old(model))
    values = config(toy, steep_model, tmp_path)
    gaps = [row["sampling/gap"] for row in rollouts_of(train(values, say=lambda line: None).run)]
    assert gaps[0] < 1e-4
    assert min(gaps[1:]) > 1e-2


@pytest.mark.usefixtures("float32")
def test_without_sleep_weights_go_when_they_have_changed(
    toy: Any, steep_model: Path, tmp_path: Path, vllm: Any
) -> None:
    rollouts = {"enable_sleep_mode": False, "gpu_memory_utilization": 0.5, "max_num_seqs": 16, "model_impl": "auto"}
    values = config(toy, steep_model, tmp_path, rollouts={**rollouts, "max_model_length": 40})
    values["training"]["max_steps"] = 3
    rows = rollouts_of(train(values, say=lambda line: None).run)
    assert all(row["sampling/gap"] < 1e-4 for row in rows)
    (made,) = vllm.made
    assert made.calls == ["load_weights", "reset_prefix_cache", "generate"] * 3
    assert (made.gpu_memory_utilization, made.max_num_seqs, made.model_impl) == (0.5, 16, "auto")
    assert made.max_model_len == 40


@pytest.fixture
def made(tiny_model: Path, tmp_path: Path, vllm: Any) -> SimpleNamespace:
    """A model with a trained adapter in bfloat16, and what makes an engine of it."""
    model, tokenizer = ft.load(str(tiny_model), dtype="bfloat16")
    adapted: Any = ft.add_lora(model, r=4)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)

    def engine(**settings: Any) -> VllmColocate:
        return VllmColocate(
            EngineJob(adapted, tokenizer, settings, str(tmp_path), lambda line: None, 32, Accelerator(cpu=True))
        )

    return SimpleNamespace(vllm=vllm, model=adapted, tokenizer=tokenizer, engine=engine)


PROMPTS = [[10, 11, 12], [13]]
SAMPLING = Sampling(6, 0.5, 0.9, 20, 0.05, 1.1, frozenset({1}))


def test_what_is_asked_of_vllm(made: Any) -> None:
    engine = made.engine()
    found = engine.generate(PROMPTS, 3, SAMPLING, step=0)
    assert [len(group) for group in found] == [3, 3]
    assert len({tuple(one.ids) for one in found[0]}) > 1
    assert all(len(one.ids) == len(one.logprobs) for group in found for one in group)
    engine.generate(PROMPTS, 1, dataclasses.replace(SAMPLING, max_new_tokens=2), step=0)
    (fake,) = made.vllm.made
    one, other = fake.params
    assert dataclasses.asdict(one) == {
        "n": 1, "repetition_penalty": 1.1, "temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.05,
        "max_tokens": 6, "logprobs": 0, "stop_token_ids": [1], "ignore_eos": True,
    }  # fmt: skip
    assert other.max_tokens == 2
    assert fake.calls.count("load_weights") == 2  # it has slept in between
    assert engine.generate([], 2, SAMPLING, step=0) == []
    engine.close()
    engine.close()
    assert engine.generate(PROMPTS, 2, SAMPLING, step=0)  # it may be used again
    assert len(made.vllm.made) == 2


def test_starting_leaves_the_process_as_it_was(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "4711")
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    made.engine()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert {name: os.environ.get(name) for name in VARIABLES} == dict.fromkeys(VARIABLES) | {"MASTER_PORT": "4711"}
    (fake,) = made.vllm.made
    assert fake.environment["WORLD_SIZE"] == "1"
    assert fake.environment["VLLM_NO_USAGE_STATS"] == "1"  # vLLM would report to its makers


def test_the_base_stays_bit_for_bit(made: Any) -> None:
    """TRL's own way leaves a base in 16 bits rounded; this is why it is not taken."""
    model = made.model
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    sent = {name: weight.clone() for name, weight in merged_parameters(model)}
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name][0]
        assert torch.equal(p, before[name][1])
    assert not any(getattr(module, "merged", False) for module in model.modules())
    model.merge_adapter()
    merged = {vllm_colocate.file_name(name): p for name, p in model.named_parameters() if "lora_" not in name}
    assert sent.keys() == merged.keys()
    assert all(torch.equal(sent[name], merged[name]) for name in sent)  # the numbers are PEFT's
    model.unmerge_adapter()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name][1])]
    assert changed


def test_a_fault_in_the_middle_leaves_nothing_merged(made: Any) -> None:
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    engine = made.engine()
    (fake,) = made.vllm.made

    def fail(weights: list[tuple[str, torch.Tensor]]) -> None:
        if "down_proj" in weights[0][0]:
            raise KeyError("model.layers.0.mlp.down_proj.weight\nsecond line")

    fake.llm_engine.model_executor.driver_worker.model_runner.model.load_weights = fail
    with pytest.raises(RunError, match=r"fails as it is handed the weights \(KeyError: .*down_proj.weight"):
        engine.generate(PROMPTS, 2, SAMPLING, step=0)
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters())
    assert not any(getattr(module, "merged", False) for module in made.model.modules())


@pytest.mark.parametrize(
    ("where", "doing"),
    [
        ("wake_up", "is handed the weights"),
        ("reset_prefix_cache", "is handed the weights"),
        ("generate", "writes"),
        ("sleep", "writes"),
    ],
)
def test_what_vllm_raises_is_one_line_and_a_want_of_memory_is_as_it_was(
    made: Any, monkeypatch: pytest.MonkeyPatch, where: str, doing: str
) -> None:
    engine = made.engine()
    (fake,) = made.vllm.made

    def fails(error: Exception) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(fake, where, fail)

    fails(ValueError("the engine is dead\nsecond line"))
    with pytest.raises(RunError, match=rf"vLLM fails as it {doing} \(ValueError: the engine is dead\): ") as caught:
        engine.generate(PROMPTS, 2, SAMPLING, step=0)
    assert "second line" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)
    for error in (torch.OutOfMemoryError("full"), RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp")):
        fails(error)
        with pytest.raises(type(error)) as kept:
            engine.generate(PROMPTS, 2, SAMPLING, step=1)
        assert kept.value is error
    said = RunError("rollouts: said already")
    fails(said)
    with pytest.raises(RunError) as passed:
        engine.generate(PROMPTS, 2, SAMPLING, step=2)
    assert passed.value is said


def test_saved_modules_and_biases_go_too(tiny_model: Path) -> None:
    model, _ = ft.load(str(tiny_model), dtype="float32")
    plain = set(dict(model.named_parameters()))
    adapted: Any = ft.add_lora(model, r=4, modules_to_save=["lm_head"])
    with torch.no_grad():
        adapted.get_output_embeddings().modules_to_save["default"].weight.fill_(0.25)
    sent = {name: weight.clone() for name, weight in merged_parameters(adapted)}
    assert set(sent) == plain
    assert (sent["lm_head.weight"] == 0.25).all()


@pytest.mark.parametrize("name", ["default", "policy"])
def test_of_a_saved_module_the_active_adapters_copy_goes(
    made: Any, tiny_model: Path, tmp_path: Path, name: str
) -> None:
    """PPO's values are a second adapter, with copies of its own."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = ft.load(str(tiny_model), dtype="float32")
    plain = set(dict(model.named_parameters()))
    settings = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    adapted: Any = get_peft_model(model, settings, adapter_name=name)
    adapted.add_adapter("value", settings)
    copies = adapted.get_input_embeddings().modules_to_save
    with torch.no_grad():
        copies[name].weight.fill_(0.25)
        copies["value"].weight.fill_(0.5)
    for active, value in ((name, 0.25), ("value", 0.5)):
        adapted.set_adapter(active)
        sent = [(each, weight.clone()) for each, weight in merged_parameters(adapted)]
        assert sorted(each for each, _ in sent) == sorted(plain)  # each once
        assert (dict(sent)["model.embed_tokens.weight"] == value).all()
    job = EngineJob(adapted, tokenizer, {}, str(tmp_path), lambda line: None, 32, Accelerator(cpu=True))
    assert VllmColocate(job).generate(PROMPTS, 1, SAMPLING, step=0)  # the stand-in refuses other names


def test_there_has_to_be_room(made: Any) -> None:
    with pytest.raises(RunError, match=r"was started for 32 tokens, .* up to 53: set rollouts.max_model_length to 53"):
        made.engine().generate(PROMPTS, 2, Sampling(50), step=0)
    assert made.engine(max_model_length=64).generate(PROMPTS, 2, Sampling(50, stops=frozenset({1})), step=0)


class Talkative:
    """In the place of the model: three words and an end to a long conversation, an end alone to a short one."""

    def __init__(self, job: EngineJob) -> None:
        pass

    def generate(self, prompts: Any, copies: int, sampling: Sampling, *, step: int) -> list[list[Completion]]:
        ids = [([8] * (3 if len(prompt) >= 12 else 0) + [1])[: sampling.max_new_tokens] for prompt in prompts]
        return [[Completion(each, [-1.0] * len(each))] for each in ids]


class Talks:
    def reset(self, **row: Any) -> None:
        return None

    def step(self, completion: str) -> tuple[str, float, bool]:
        return "the sun is round", 1.0, False


def test_each_conversation_is_judged_by_its_own_room(
    made: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest conversation with the largest room of another would need more than any of them."""
    monkeypatch.setitem(globals(), "OwnModel", Talkative)
    talks = [[{"role": "user", "content": " ".join(["sun"] * words)}] for words in (12, 1)]
    prompts = [len(tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]) for talk in talks]
    assert prompts[0] > 12 > prompts[1]
    new = 16
    engine = made.engine(max_model_length=prompts[0] + new)  # there is room for each, and none to spare
    world = EnvironmentClass(Talks, "turns", "Talks", owns_reward=True)
    played = Episodes(world, engine, tokenizer, Sampling(new, stops=frozenset({1})), 3).written(talks, [{}, {}], step=0)
    assert [len(one.prompt) for one in played] == prompts
    (fake,) = made.vllm.made
    told = 7  # a turn of the environment's
    assert [p.max_tokens for p in fake.params] == [new, new - 1 - told]
    assert [one.mask[:-1].count(0) for one in played] == [told, told]
    assert all(len(one.prompt) + len(one.ids) <= engine._length for one in played)
    with pytest.raises(RunError, match=rf"takes up to {prompts[0] + new + 1}:"):
        engine.generate([[5] * prompts[0], [5]], 1, Sampling(new + 1, limits=(new + 1, 1)), step=0)


def test_vllm_that_does_not_start_is_one_line(made: Any) -> None:
    made.vllm.refuses = ValueError("Free memory on device (3/80 GiB) on startup is less than desired\nsecond line")
    with pytest.raises(RunError, match=r"does not start in this process \(Free memory .* desired\);") as caught:
        made.engine()
    assert "\n" not in str(caught.value)
    assert "rollouts.gpu_memory_utilization" in str(caught.value)


REFUSED = [
    (
        {"quantization": "nf4"},
        {},
        r"^rollouts: vllm-colocate hands vLLM merged weights, and quantization: nf4 has none",
    ),
    ({"quantization": "int8"}, {}, "quantization: int8 has none"),
    ({"memory": "12GiB"}, {}, "which memory: 12GiB cannot bound; set memory: auto"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {}, "without rope_scaling; leave it out"),
    (
        {},
        {"gpu_memory_utilisation": 0.5},
        r"unknown key 'rollouts.gpu_memory_utilisation' \(allowed with engine vllm-c",
    ),
    ({}, {"gpu_memory_utilization": 1.5}, "rollouts.gpu_memory_utilization: 1.5 is not allowed .*less than or equal"),
    ({}, {"model_impl": "terratorch"}, "rollouts.model_impl: 'terratorch' is not allowed"),
]


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(("changes", "rollouts", "said"), REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    toy: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, rollouts: Any, said: str
) -> None:
    monkeypatch.setattr(
        importlib.import_module("ft_core.training.run"), "_train", lambda *args, **kwargs: pytest.fail("loaded")
    )
    with pytest.raises(ConfigError, match=said) as caught:
        train(config(toy, tiny_model, tmp_path, rollouts=rollouts, **changes), say=lambda line: None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_without_vllm_it_says_what_to_install(toy: Any, tiny_model: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is not None:  # type: ignore[attr-defined]
        pytest.skip("vLLM is installed here")
    with pytest.raises(
        ConfigError, match=r"needs vLLM in this environment, .*: pip install 'trl\[vllm\]', on a machine"
    ):
        train(config(toy, tiny_model, tmp_path), say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(
    toy: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_colocate, "Ranks", lambda: SimpleNamespace(count=2))
    with pytest.raises(ConfigError, match="vllm-colocate serves a training of one process"):
        vllm_colocate.check(load.check_config(config(toy, tiny_model, tmp_path)), {})


def test_models_that_vllm_could_not_be_handed_are_refused(made: Any, tiny_model: Path, tmp_path: Path) -> None:
    vars(made.model.peft_config["default"])["trainable_token_indices"] = [1]
    with pytest.raises(ConfigError, match="cannot merge trained tokens"):
        made.engine()
    vars(made.model.peft_config["default"])["trainable_token_indices"] = None
    made.model.get_base_model().model.layers[1].mlp.strange = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"its files have no model\.layers\.1\.mlp\.strange\.weight and 1 more"):
        made.engine()
    tied, tokenizer = ft.load(str(tiny_model), dtype="float32")
    tied.lm_head.weight = tied.model.embed_tokens.weight
    adapted = ft.add_lora(tied, r=4, targets=["embed_tokens", "q_proj"])
    with pytest.raises(ConfigError, match="cannot merge an adapter on an embedding that is the head too"):
        VllmColocate(EngineJob(adapted, tokenizer, {}, str(tmp_path), print, 32))
    assert not made.vllm.made


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "cannot hand vLLM a trained copy of an embedding that is the head too"),
        ({"modules_to_save": ["lm_head"]}, "cannot hand vLLM a trained copy of an embedding that is the head too"),
        (
            {"modules_to_save": ["embed_tokens", "lm_head"]},
            "cannot hand vLLM a trained copy of an embedding that is the head too",
        ),
        ({"targets": ["lm_head"]}, "cannot merge an adapter on an embedding that is the head too"),
    ],
    ids=["embedding", "head", "both", "adapted head"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of tied weights
def test_a_tied_head_stays_what_it_is(
    tiny_model: Path, tmp_path: Path, vllm: Any, changes: dict[str, Any], said: str
) -> None:
    for tied in (True, False):
        model, tokenizer = ft.load(str(tiny_model), dtype="float32")
        if tied:
            model.config.tie_word_embeddings = True
            model.lm_head.weight = model.model.embed_tokens.weight
        adapted = ft.add_lora(model, r=4, **{"targets": ["q_proj"], **changes})
        job = EngineJob(adapted, tokenizer, {}, str(tmp_path), lambda line: None, 32, Accelerator(cpu=True))
        if not tied:
            assert VllmColocate(job).generate(PROMPTS, 1, SAMPLING, step=0)
            continue
        with pytest.raises(ConfigError, match=said) as caught:
            VllmColocate(job)
        assert "\n" not in str(caught.value)
        assert not vllm.made


def test_the_class_is_as_it_is_used() -> None:
    """What is relied on of the installed TRL."""
    from trl import GRPOConfig
    from trl.generation.vllm_generation import VLLMGeneration

    given = set(inspect.signature(VLLMGeneration.__init__).parameters)
    wanted = "model accelerator processing_class mode gpu_memory_utilization max_model_length max_num_seqs"
    assert {*wanted.split(), "enable_sleep_mode", "model_impl", "trust_remote_code", "logprobs"} <= given
    assert list(inspect.signature(VLLMGeneration.generate).parameters)[:4] == [
        "self", "prompts", "images", "num_generations",
    ]  # fmt: skip
    assert list(inspect.signature(VLLMGeneration._iter_named_params).parameters) == ["self"]
    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    ours = ColocateSettings().model_dump(exclude={"enable_sleep_mode", "max_num_seqs"})
    assert {name: defaults[f"vllm_{name}"] for name in ours} == ours


def test_the_readme_names_the_settings() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"## vLLM in the training's process\n(.*?)\n## ", readme, re.DOTALL)
    (example,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    given = yaml.safe_load(example)["grpo"]["rollouts"]
    assert given.pop("engine") == "vllm-colocate"
    ColocateSettings.model_validate(given)
    named = re.findall(r"^\| `(\w+)` \| `?([^`|]+?)`? \|", section, re.MULTILINE)
    assert {name: yaml.safe_load(default) for name, default in named} == ColocateSettings().model_dump()
