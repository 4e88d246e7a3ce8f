"""A reward model on the policy's base: the scores of one that is loaded, a policy that notices nothing, one base."""

from __future__ import annotations

import gc
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ft_core as ft
from ft_core import fast
from ft_core.config import TrainConfig
from ft_core.errors import FtError, RunError
from ft_core.models import loading
from ft_core.training import train
from ft_rl.policy import put_head
from ft_rl.reference import adapter_off
from ft_rl.rewards import resolve_rewards, reward_model
from ft_rl.rewards.guest import Guest, NotShared, Policy
from ft_rl.rewards.reward_model import RewardModelSettings, Scorer
from ft_rl.rewards.stored import StoredAdapter, stored_adapter
from ft_rl.values import ValueModel

SHARED = "scores on the policy's base, as a further adapter"


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are loaded in float32, whatever 16 bits this machine computes in."""
    pick = loading.pick_device
    monkeypatch.setattr(loading, "pick_device", lambda: replace(pick(), dtype="float32"))


def config(model: Path, **changes: Any) -> TrainConfig:
    values = {"model": str(model), "method": "ppo", "data": "prompts.jsonl", "max_length": 32, "lora": {"r": 4}}
    return TrainConfig(**(values | changes))


def policy(model: Path, say: Any = None, **changes: Any) -> Policy:
    """With an adapter that has been trained."""
    made, _ = ft.load(str(model), dtype="float32")
    adapted: Any = ft.add_lora(made, r=4)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return Policy(adapted, config(model, **changes), say or (lambda line: None))


def texts(toy: Any, count: int = 40) -> dict[str, list[str]]:
    rows = toy.rows(count, seed=5)
    completions = [row["rejected" if i % 2 else "chosen"] for i, row in enumerate(rows)]
    return {"prompts": [row["prompt"] for row in rows], "completions": completions}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(6, 20)[None]).logits
    return found


def state(model: Any) -> Any:
    """All that a trainer, an optimizer and a checkpoint see of a model."""
    return (
        [(name, id(p), p.requires_grad, p.data_ptr(), p._version) for name, p in model.named_parameters()],
        list(model.state_dict()),
        [name for name, _ in model.named_modules()],
        list(model.peft_config),
        model.active_adapters,
        [
            (m._active_adapter, m._disable_adapters, dict(m.scaling))
            for m in model.modules()
            if hasattr(m, "lora_A")
        ],
        model.training,
        model.config.to_dict(),
    )  # fmt: skip


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("layers", ["transformers", "fast"])
@pytest.mark.parametrize("tokens", [24, 100_000])
def test_the_scores_are_those_of_one_that_is_loaded(
    toy: Any, steep_model: Path, judge: Path, layers: str, tokens: int
) -> None:
    settings = RewardModelSettings(model=str(judge), batch_tokens=tokens)
    separate = reward_model.reward_model(settings)
    assert next(separate.model.parameters()).dtype == torch.float32
    expected = separate(**texts(toy))
    assert max(expected) - min(expected) > 1  # it prefers something
    said: list[str] = []
    host = policy(steep_model, said.append)
    if layers == "fast":
        fast.enable(host.model)
    shared = reward_model.reward_model(settings, policy=host)
    assert said == [f"the reward model {judge} {SHARED}"]
    assert shared(**texts(toy)) == pytest.approx(expected, abs=1e-5)
    with adapter_off(host.model):  # as a run is measured before training
        assert shared(**texts(toy)) == pytest.approx(expected, abs=1e-5)
    head = put_head(host.model)
    assert head is not None
    values = ValueModel(host.model, head)
    with values.active():
        assert shared(**texts(toy)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("in_float32")
def test_on_a_quantized_base(toy: Any, steep_model: Path, make_judge: Any, tmp_path: Path) -> None:
    judge = make_judge(steep_model, tmp_path, quantization="int8", training={"max_steps": 5})
    settings = RewardModelSettings(model=str(judge))
    expected = reward_model.reward_model(settings)(**texts(toy))
    made, _ = ft.load(str(steep_model), quantization="int8", dtype="float32")
    said: list[str] = []
    host = Policy(ft.add_lora(made, r=4), config(steep_model, quantization="int8"), said.append)
    shared = reward_model.reward_model(settings, policy=host)
    assert said[0].endswith(SHARED)
    assert shared(**texts(toy)) == pytest.approx(expected, abs=1e-5)
    assert "quantization int8, the policy's none" in str(_stored(judge).why_apart(config(steep_model)))


@pytest.mark.usefixtures("in_float32")
def test_a_checkpoint_stands_on_the_base_of_its_run(
    toy: Any, steep_model: Path, make_judge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own files do not say how that was quantized: taken for an adapter of nobody's, it scored on another base."""
    judge = make_judge(steep_model, tmp_path, quantization="int8", training={"max_steps": 8, "save_every": 4})
    early, late = (judge / "checkpoints" / f"checkpoint-{step}" for step in (4, 8))
    for reference in (early, late):
        stored = _stored(reference)
        assert (stored.folder, stored.reference, stored.quantization) == (reference, str(steep_model), "int8")
        assert "its base has quantization int8, the policy's none" in str(stored.why_apart(config(steep_model)))
        assert stored.why_apart(config(steep_model, quantization="int8")) is None
    said: list[str] = []
    made = reward_model.reward_model(RewardModelSettings(model=str(late)), policy=policy(steep_model, said.append))
    assert said == [
        f"the reward model {late} is loaded beside the policy: its base has quantization int8, the policy's none"
    ]
    # The last checkpoint is what the run ended with, the first is not; by any name of it.
    whole = reward_model.reward_model(RewardModelSettings(model=str(judge)))(**texts(toy, 8))
    assert made(**texts(toy, 8)) == pytest.approx(whole, abs=1e-5)
    monkeypatch.chdir(early.parent)
    first = reward_model.reward_model(RewardModelSettings(model=f"./{early.name}"))
    assert first(**texts(toy, 8)) != pytest.approx(whole, abs=1e-2)
    host, _ = ft.load(str(steep_model), quantization="int8", dtype="float32")
    guest = reward_model.reward_model(
        RewardModelSettings(model=str(early)),
        policy=Policy(ft.add_lora(host, r=4), config(steep_model, quantization="int8"), said.append),
    )
    assert said[-1].endswith(SHARED)
    assert guest(**texts(toy, 8)) == pytest.approx(first(**texts(toy, 8)), abs=1e-5)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("layers", ["transformers", "fast"])
def test_the_policy_notices_nothing(toy: Any, steep_model: Path, judge: Path, layers: str) -> None:
    host = policy(steep_model)
    if layers == "fast":
        fast.enable(host.model)
    host.model.train()
    shared = reward_model.reward_model(RewardModelSettings(model=str(judge)), policy=host)
    for context in (nullcontext(), adapter_off(host.model)):
        with context:
            before, numbers, chance = logits(host.model), state(host.model), torch.get_rng_state()
            scores = shared(**texts(toy, 8))
            assert torch.equal(logits(host.model), before)
            assert state(host.model) == numbers
            assert torch.equal(torch.get_rng_state(), chance)
            assert shared(**texts(toy, 8)) == scores
    known, numbers = logits(host.model), state(host.model)
    guest = Guest(host, _stored(judge))

    def fail() -> None:
        with guest.there():
            assert not torch.equal(logits(host.model), known)  # it is there
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert state(host.model) == numbers
    host.model.merge_adapter()
    with pytest.raises(RunError, match="cannot score on the policy's base while an adapter is merged into it"):
        shared(**texts(toy, 8))
    host.model.unmerge_adapter()


def _stored(judge: Path) -> StoredAdapter:
    found = stored_adapter(str(judge))
    assert found is not None
    return found


def held() -> dict[int, int]:
    """Bytes by the place of each storage that a tensor of floats lies in."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.is_floating_point() and not x.is_meta]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.usefixtures("in_float32")
def test_there_is_one_copy_of_the_base(toy: Any, steep_model: Path, judge: Path) -> None:
    host = policy(steep_model)
    model = host.model.get_base_model()
    weights = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    before = held()
    shared = reward_model.reward_model(RewardModelSettings(model=str(judge)), policy=host)
    shared(**texts(toy, 8))
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == weights
    assert shared.model is host.model
    added = {place: size for place, size in held().items() if place not in before}
    shapes = _stored(judge).shapes
    # Nothing but the adapter and the head, in float32; rotary frequencies and causal masks may be cached in a few KiB.
    wanted = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    base = sum(p.untyped_storage().nbytes() for p in model.parameters())
    assert wanted <= sum(added.values()) < wanted + 2**12 < base


def ppo(toy: Any, model: Path, judge: Path, folder: Path, method: str = "ppo", **changes: Any) -> dict[str, Any]:
    prompts = [{"prompt": row["prompt"].strip()} for row in toy.rows(24, seed=1)]
    training = {"max_steps": 4, "batch_size": 4, "gradient_accumulation": 1, "learning_rate": 5e-3, "save_every": 2}
    settings = {"ppo": {"num_ppo_epochs": 2}, "grpo": {"num_generations": 2, "beta": 0.05}}[method]
    return {
        "model": str(model),
        "method": method,
        "data": str(toy.write_rows(folder / "prompts.jsonl", prompts)),
        "eval_split": 8,
        "rewards": [{"name": "reward-model", "model": str(judge)}],
        "max_length": 32,
        "lora": {"r": 4},
        "training": training,
        "output": str(folder / f"run-{method}"),
        method: {"max_completion_length": 6, **settings},
        **changes,
    }


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_training_with_it(
    toy: Any,
    steep_model: Path,
    judge: Path,
    tmp_path: Path,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ft_core.cli import main

    apart = ppo(toy, steep_model, judge, tmp_path, method, output=str(tmp_path / "apart"))
    with monkeypatch.context() as patch:
        patch.setattr(reward_model, "_shared", lambda settings, policy: None)
        separate = train(apart, say=lambda line: None)
    loads: list[str] = []
    load = reward_model._load
    monkeypatch.setattr(reward_model, "_load", lambda reference: loads.append(reference) or load(reference))
    said: list[str] = []
    result = train(ppo(toy, steep_model, judge, tmp_path, method), say=said.append)
    assert f"the reward model {judge} {SHARED}" in said
    assert not loads
    summary, other = (json.loads((run.run / "summary.json").read_text()) for run in (result, separate))
    assert summary["trainable_parameters"] == other["trainable_parameters"]
    assert summary["parameters"] == other["parameters"]
    for folder in (result.run / "adapter", *(result.run / "checkpoints").glob("checkpoint-*")):
        inside = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        assert not any("reward" in str(path) for path in inside)
        for path in inside:
            if path.name == "adapter_model.safetensors":
                assert not any("reward" in name or "score" in name for name in load_file(folder / path))
    # Both score the same completions before training: bfloat16 rounds each of some 20 results on the way to a score of
    # about 4 by 2^-9 of itself.
    assert result.evaluation is not None
    assert separate.evaluation is not None
    mine, theirs = (run.evaluation["metrics"]["reward"]["before"] for run in (result, separate))  # type: ignore[index]
    assert mine == pytest.approx(theirs, abs=4 * 20 * 2**-9)
    capsys.readouterr()
    assert main(["eval", str(result.run), "--json"]) == 0
    printed = capsys.readouterr()
    again = json.loads(printed.out)  # and nothing else is there
    assert f"the reward model {judge} {SHARED}\n" in printed.err
    assert not loads
    assert again["metrics"]["reward"]["before"] == pytest.approx(mine, abs=4 * 20 * 2**-9)


REASONS: list[tuple[dict[str, Any], str]] = [
    ({"lora": None}, "the policy is trained in full"),
    ({"lora": {"r": 4, "bias": "all"}}, r"changes biases of its base \(lora.bias: all\)"),
    ({"lora": {"r": 4, "modules_to_save": ["lm_head"]}}, r"changes modules of its base \(lora.modules_to_save\)"),
    ({"lora": {"r": 4, "init_lora_weights": "loftq"}, "quantization": "nf4"}, "begins with other weights"),
    ({"quantization": "nf4"}, "its base has quantization none, the policy's nf4"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "are scaled otherwise"),
    ({"lora": {"r": 4, "targets": ["q_proj", "v_proj"]}}, r"the policy has no adapter on down_proj, .*lora.targets"),
]


@pytest.mark.parametrize(("changes", "reason"), REASONS)
def test_why_it_needs_a_base_of_its_own(steep_model: Path, judge: Path, changes: dict[str, Any], reason: str) -> None:
    import re

    stored = _stored(judge)
    assert stored.why_apart(config(steep_model)) is None
    found = stored.why_apart(config(steep_model, **changes))
    assert found is not None
    assert re.search(reason, found)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "its adapter has use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "its adapter has rank_pattern"),
        ({"something_new": 3}, "its adapter has something_new"),
        ({"peft_type": "LOHA"}, "its adapter is LOHA, not LoRA"),
        ({"modules_to_save": ["score", "embed_tokens"]}, "modules beside its head were trained in full"),
        ({"init_lora_weights": "pissa"}, "its adapter began with init_lora_weights pissa"),
        ({"revision": "v2"}, "its base is the revision v2"),
        ({"base_model_name_or_path": "elsewhere"}, "names the base elsewhere"),
    ],
)
def test_what_an_adapters_own_settings_forbid(
    steep_model: Path, judge: Path, changes: dict[str, Any], reason: str
) -> None:
    stored = _stored(judge)
    found = replace(stored, settings={**stored.settings, **changes}).why_apart(config(steep_model))
    assert found is not None
    assert found.endswith(reason)


def test_another_base_is_loaded_beside(toy: Any, tiny_model: Path, judge: Path) -> None:
    said: list[str] = []
    host = policy(tiny_model, said.append)
    separate = reward_model.reward_model(RewardModelSettings(model=str(judge)), policy=host)
    assert isinstance(separate, Scorer)
    assert separate.model is not host.model
    (line,) = said
    assert line.startswith(f"the reward model {judge} is loaded beside the policy: its base is ")
    # Nothing is said of a model that is none, or no adapter.
    resolve_rewards([{"name": "format"}], policy=host)
    assert len(said) == 1


def test_layers_that_the_policy_does_not_adapt(steep_model: Path, judge: Path, tmp_path: Path) -> None:
    made, _ = ft.load(str(steep_model), dtype="float32")
    adapted = ft.add_lora(made, r=4, targets=["q_proj", "v_proj"])
    with pytest.raises(NotShared, match=r"the policy has no adapter on model\.layers\.0\.mlp\.down_proj"):
        Guest(Policy(adapted, config(steep_model)), _stored(judge))
    stored = _stored(judge)
    tensors = load_file(stored.folder / "adapter_model.safetensors")
    for name, tensor, reason in (
        ("base_model.model.model.norm.weight", torch.ones(32), "its adapter has a part base_model.model.model.norm"),
        ("base_model.model.score.weight", torch.ones(2, 32), "its adapter has no head of one score that fits"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", torch.ones(2, 32), "does not fit model"),
    ):
        save_file({**tensors, name: tensor}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(NotShared, match=reason):
            Guest(policy(steep_model), replace(stored, folder=tmp_path))


@pytest.mark.usefixtures("in_float32")
def test_an_adapter_that_ft_has_not_made(toy: Any, steep_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    """By plain PEFT: rank-stabilised, of any alpha; on the policy's base, and alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(2)
    base = AutoModelForSequenceClassification.from_pretrained(
        steep_model, num_labels=1, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id
    )
    settings = LoraConfig(r=2, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "up_proj"], task_type="SEQ_CLS")
    model = get_peft_model(base, settings).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "score" in name:
            parameter.data.normal_(std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    asked = texts(toy, 12)
    expected = []
    for prompt, completion in zip(*asked.values(), strict=True):
        ids = tokenizer(prompt + completion + "<eos>", return_tensors="pt").input_ids
        with torch.no_grad():
            expected.append(float(model(input_ids=ids).logits))
    said: list[str] = []
    given = RewardModelSettings(model=str(tmp_path / "adapter"))
    shared = reward_model.reward_model(given, policy=policy(steep_model, said.append))
    assert said[0].endswith(SHARED)
    assert shared(**asked) == pytest.approx(expected, abs=1e-5)
    separate = reward_model.reward_model(given)
    separate.model.float()
    spread = max(expected) - min(expected)
    assert separate(**asked) == pytest.approx(expected, abs=0.1 * spread)  # its base was rounded to 16 bits
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "score" not in name}, path)
    with pytest.raises(FtError, match=r"is no reward model's: it lacks base_model\.model\.score\.weight"):
        reward_model.reward_model(given)


def _in_place(judge: Path, base: Path, folder: Path) -> Path:
    """The judge's adapter as anybody's, for another base."""
    shutil.copytree(judge / "adapter", folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    return folder


def _dropout(base: Path, adapter: Path) -> None:
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.1}))


def _family(base: Path, adapter: Path) -> None:
    from transformers import StableLmConfig, StableLmForCausalLM

    sizes = json.loads((base / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    StableLmForCausalLM(StableLmConfig(**{name: sizes[name] for name in names})).save_pretrained(base)


def _tensor(name: str, tensor: torch.Tensor) -> Any:
    def change(base: Path, adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        save_file({**load_file(file), name: tensor}, file)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda base, adapter: None, None),
        (_dropout, "ft's layers cannot compute the policy: its attention has a dropout of 0.1"),
        (_family, "ft's layers cannot compute the policy: the family stablelm is not known"),
        (_tensor("base_model.model.score.weight", torch.ones(2, 32)), "its adapter has no head of one score that fits"),
        (_tensor("base_model.model.model.norm.weight", torch.ones(32)), "its adapter has a part base_model.model.mod"),
        (
            _tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", torch.ones(2, 32)),
            "its adapter does not fit model.layers.0.self_attn.q_proj",
        ),
    ],
)
def test_a_plan_decides_as_training_does(
    steep_model: Path, judge: Path, tmp_path: Path, change: Any, reason: str | None
) -> None:
    from ft_core.planning.load import load_of

    base = tmp_path / "base"
    shutil.copytree(steep_model, base)
    adapter = _in_place(judge, base, tmp_path / "judge")
    change(base, adapter)
    said: list[str] = []
    host = policy(base, said.append)
    shared = reward_model._shared(RewardModelSettings(model=str(adapter)), host)
    rewards = [{"name": "reward-model", "model": str(adapter)}]
    (held,) = load_of(config(base, rewards=rewards)).held
    if reason is None:
        assert shared is not None
        assert held.model is None
        return
    assert shared is None
    assert held.model == str(base)
    assert said[0].startswith(f"the reward model {adapter} is loaded beside the policy: {reason}")
