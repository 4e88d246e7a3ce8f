"""What ft-rl relies on of the installed TRL, each seam by its name; and that our trainers train as TRL's own do.

Where a new version of TRL breaks ft-rl, a test here says which seam has moved: a method's parameters, how a trainer
asks the model for log-probabilities and what it reads of the answer, or the numbers of a whole training step.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.trainer.utils import FusedCausalLMOutput

from ft_core.config.load import check_config, method_settings
from ft_core.training.job import Job, build_trainer
from ft_rl import dpo, grpo, kto
from ft_rl import reward as reward_modelling
from ft_rl.collating import PairCollator
from ft_rl.dpo import DpoSettings
from ft_rl.grpo import GrpoSettings
from ft_rl.grpo_trainer import GrpoTrainer
from ft_rl.kto import KtoSettings
from ft_rl.policy import KNOWN, PolicyForward
from ft_rl.ppo import PpoSettings
from ft_rl.ppo_trainer import INPUTS
from ft_rl.reference import COPY
from ft_rl.reward import RewardSettings
from ft_rl.scoring import ASKED, ScoreForward
from ft_rl.trainers import PolicyTrainerMixin

VERSION = f"TRL {trl.__version__}"
BATCH, PROMPT, ANSWER = 4, 3, 5

SEAMS = {
    trl.RewardTrainer: {
        "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
        "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    },
    trl.DPOTrainer: {
        "_prepare_dataset": ["self", "dataset"],
        "_precompute_ref_logps": ["self", "dataset", "name", "batch_size"],
        "_compute_loss": ["self", "model", "inputs", "return_outputs"],
    },
    trl.KTOTrainer: {
        "_prepare_dataset": ["self", "dataset"],
        "_precompute_ref_logps": ["self", "dataset", "name", "batch_size"],
        "_compute_loss": ["self", "model", "inputs", "return_outputs"],
    },
    trl.GRPOTrainer: {
        "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"],
        "_tool_call_loop": ["self", "prompts", "prompt_ids"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_get_per_token_logps_and_entropies": [
            "self",
            "model",
            "input_ids",
            "attention_mask",
            "logits_to_keep",
            "batch_size",
        ],
        "_tokenize_prompts": ["self", "prompts"],
        "_compute_loss": ["self", "model", "inputs"],
        "_prepare_inputs": ["self", "generation_batch"],
        "_save_rng_state": ["self", "output_dir"],
        "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    },
}
OURS = {
    trl.DPOConfig: set(DpoSettings.model_fields),
    trl.KTOConfig: set(KtoSettings.model_fields),
    trl.RewardConfig: set(RewardSettings.model_fields),
    trl.GRPOConfig: (set(GrpoSettings().given_to_trl) | {"num_generations_eval", "reward_weights", "use_cpu"}),
}


@pytest.mark.parametrize(("trainer", "name"), [(trainer, name) for trainer, names in SEAMS.items() for name in names])
def test_methods_that_are_extended(trainer: type, name: str) -> None:
    method = getattr(trainer, name, None)
    assert method is not None, f"{VERSION}: {trainer.__name__}.{name} is gone"
    expected = SEAMS[trainer][name]
    found = list(inspect.signature(method).parameters)
    assert found[: len(expected)] == expected, f"{VERSION}: the parameters of {trainer.__name__}.{name} are {found}"


def test_entropies_can_be_asked_for() -> None:
    known = inspect.signature(trl.GRPOTrainer._get_per_token_logps_and_entropies).parameters
    assert "compute_entropy" in known, VERSION


@pytest.mark.parametrize("config", OURS)
def test_settings_have_trls_names(config: Any) -> None:
    missing = OURS[config] - {field.name for field in fields(config)}
    assert not missing, f"{VERSION}: {config.__name__} has no {sorted(missing)}"


def test_ppo_takes_grpos_rollouts() -> None:
    own = set(PpoSettings.model_fields) - set(grpo.WritingSettings.model_fields)
    given = set(PpoSettings().given_to_trl) - own | {"num_iterations", "num_generations", "beta"}
    assert given <= {field.name for field in fields(trl.GRPOConfig)}, VERSION


def test_the_answer_has_the_fields_that_are_given() -> None:
    names = {field.name for field in fields(FusedCausalLMOutput)}
    assert {"loss", "log_probs", "entropy", "is_top1", "mean_logits", "label_mask"} <= names, VERSION


def reward(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def adapted(folder: Path, method: str) -> Any:
    """In float32, with an adapter that changes nothing yet."""
    torch.manual_seed(0)
    if method == "reward":
        model: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made: Any = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return made


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """The adapter that is trained, by name."""
    return {name: p for name, p in model.named_parameters() if ".default." in name}


def move(model: Any) -> None:
    """Some training: else a policy is its reference and half of every loss is nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(model).values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def rows(toy: Any, method: str) -> list[dict[str, Any]]:
    pairs = toy.rows(BATCH, seed=3)
    if method in ("dpo", "reward"):
        return pairs
    if method == "kto":
        sides = ["chosen", "rejected", "rejected", "chosen"]
        return [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row, side in zip(pairs, sides, strict=True)
        ]
    return [{"prompt": row["prompt"].strip()} for row in pairs]


def common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
    }


def plain(toy: Any, model: Path, folder: Path, method: str, settings: dict[str, Any]) -> Any:
    """TRL's own trainer."""
    data, tokenizer = Dataset.from_list(rows(toy, method)), toy.make_tokenizer()
    arguments = common(folder) | settings
    given = {"model": adapted(model, method), "train_dataset": data, "processing_class": tokenizer}
    if method == "dpo":
        trainer: Any = trl.DPOTrainer(args=trl.DPOConfig(**arguments, max_length=None), **given)
    elif method == "reward":
        trainer = trl.RewardTrainer(args=trl.RewardConfig(**arguments, max_length=None), **given)
    elif method == "kto":
        trainer = trl.KTOTrainer(args=trl.KTOConfig(**arguments, max_length=None), **given)
    else:
        arguments |= {"num_generations": 2, "max_completion_length": ANSWER}
        trainer = trl.GRPOTrainer(args=trl.GRPOConfig(**arguments), reward_funcs=reward, **given)
    return ready(trainer)


def ours(toy: Any, model: Path, folder: Path, method: str, settings: dict[str, Any]) -> Any:
    """The trainer that a configuration gets."""
    (folder / "rewards.py").write_text(inspect.getsource(reward).replace(": Any", "").replace("list[str]", "list"))
    if method == "grpo":
        settings = settings | {"num_generations": 2, "max_completion_length": ANSWER}
    values = {
        "model": str(model),
        "method": method,
        "data": str(folder / "rows.jsonl"),
        "max_length": 32,
        "lora": {"r": 4},
        "training": {"batch_size": BATCH, "gradient_accumulation": 1},
        "output": str(folder),
        method: settings,
        **({"rewards": [f"{folder / 'rewards.py'}:reward"]} if method == "grpo" else {}),
    }
    config = check_config(values)
    given: list[dict[str, Any]] = rows(toy, method)
    job = Job(
        config, method_settings(config), adapted(model, method), toy.make_tokenizer(), given, None, common(folder), [],
        say=lambda line: None,
    )  # fmt: skip
    build = {"dpo": dpo.build, "kto": kto.build, "grpo": grpo.build, "reward": reward_modelling.build}[method]
    trainer = build_trainer(build, job)
    if method == "reward":
        assert isinstance(trainer.scores, ScoreForward)
        assert trainer.scores.padding_free
        return ready(trainer)
    assert isinstance(trainer, PolicyTrainerMixin)
    assert isinstance(trainer.policy, PolicyForward)
    return ready(trainer)


def ready(trainer: Any) -> Any:
    """As its loop would have it, within the first step."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def completions(vocabulary: int) -> dict[str, Any]:
    """A batch such as GRPO's trainer makes: prompts padded on the left, completions on the right."""
    generator = torch.Generator().manual_seed(2)
    prompt_mask = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]])
    completion_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    noise = [torch.randn(BATCH, ANSWER, generator=generator) * 0.3 for _ in range(2)]
    return {
        "prompt_ids": torch.randint(6, vocabulary, (BATCH, PROMPT), generator=generator) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(6, vocabulary, (BATCH, ANSWER), generator=generator) * completion_mask,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.3, -0.4, 0.7, -1.1]),
        "num_items_in_batch": completion_mask.sum(),
        "old_per_token_logps": noise[0] - 3.3,  # about a logarithm of 1 in 26
        "ref_per_token_logps": noise[1] - 3.3,
    }


def step(trainer: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a training step on a batch, and the gradients of the adapter."""
    trainer.model.zero_grad()
    given: Any = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    if isinstance(trainer, trl.GRPOTrainer):  # as if the batch's completions had been written a step ago
        trainer._buffered_inputs, trainer._step, trainer.num_iterations = [given], 1, 2
        given = []  # rows, which TRL looks at only when it writes completions
    loss = trainer.training_step(trainer.model, given, None)
    gradients = {name: p.grad.clone() for name, p in trained(trainer.model).items() if p.grad is not None}
    assert len(gradients) == len(trained(trainer.model))
    return float(loss), gradients


def check_equal(one: tuple[float, dict[str, torch.Tensor]], other: tuple[float, dict[str, torch.Tensor]]) -> None:
    """In float32 two ways of summing 32 products, twice a layer and in the head, are some units in the last place of a
    logit (below 4 here) apart: 1e-6. A loss is a mean of at most 4 answers of 8 such tokens, times β (0.1 or 0.05) or
    1/tokens: 1e-6 again. Gradients are held to their tensor's largest entry, which sums of both signs can miss tenfold.
    """
    assert one[0] == pytest.approx(other[0], rel=1e-6, abs=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in other[1].items():
        largest = float(gradient.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(
            one[1][name], gradient, rtol=0, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "reward": ("reward", {"center_rewards_coefficient": 0.01}),
    "dpo": ("dpo", {"beta": 0.1}),
    "dpo-ipo": ("dpo", {"beta": 0.1, "loss_type": ["ipo"]}),
    "kto": ("kto", {"beta": 0.1}),
    "grpo": ("grpo", {"beta": 0.05, "loss_type": "grpo"}),
    "dapo": ("grpo", {"beta": 0.05, "loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": ("grpo", {"beta": 0.0, "loss_type": "grpo", "importance_sampling_level": "sequence"}),
}


def batch_for(theirs: Any, method: str) -> dict[str, Any]:
    """By TRL's own tokenizing and padding."""
    if method == "grpo":
        return completions(theirs.model.config.vocab_size)
    made: dict[str, Any] = theirs.data_collator([theirs.train_dataset[i] for i in range(BATCH)])
    return made


@pytest.mark.parametrize("case", CASES)
def test_a_training_step_is_trls(toy: Any, tiny_model: Path, tmp_path: Path, case: str) -> None:
    method, settings = CASES[case]
    theirs = plain(toy, tiny_model, tmp_path, method, settings)
    mine = ours(toy, tiny_model, tmp_path, method, settings)
    needs_reference = bool(settings.get("beta"))
    # The reference of a fresh adapter is the base: TRL keeps a copy of the adapter for it, we switch the adapter off.
    assert (COPY in theirs.model.peft_config) == needs_reference, f"{VERSION}: add_adapter({COPY!r}) has moved"
    assert COPY not in mine.model.peft_config
    for trainer in (theirs, mine):
        move(trainer.model)
    batch = batch_for(theirs, method)
    expected = step(theirs, batch)
    check_equal(step(mine, batch), expected)
    if method in ("dpo", "reward"):  # and of our tokens and padding
        assert method == "reward" or isinstance(mine.data_collator, PairCollator)
        check_equal(step(mine, mine.data_collator([mine.train_dataset[i] for i in range(BATCH)])), expected)


class Recorder:
    """In the place of the head that TRL's constructor gave the model: what it is asked, and what is read of it."""

    def __init__(self, model: Any) -> None:
        self.forward, self.asked, self.read = model.forward, [], set()
        model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.forward(*args, **kwargs)
        if not kwargs.get("fused_lm_head"):
            return out
        self.asked.append({name for name, value in kwargs.items() if value is not None})
        recorder = self

        class Answer:
            def __getattr__(self, name: str) -> Any:
                recorder.read.add(name)
                return getattr(out, name)

        return Answer()


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo"])
def test_how_a_trainer_asks_the_model(toy: Any, tiny_model: Path, tmp_path: Path, method: str) -> None:
    theirs = plain(toy, tiny_model, tmp_path, method, {"beta": 0.1})
    recorder = Recorder(theirs.model.get_base_model())
    step(theirs, batch_for(theirs, method))
    assert recorder.asked, f"{VERSION}: {method} no longer calls the model with fused_lm_head"
    # What else it asked with would go past our head, to TRL's.
    for asked in recorder.asked:
        others = asked - KNOWN - {"fused_lm_head"} - {"output_attentions", "output_hidden_states", "return_dict"}
        assert not others, f"{VERSION}: {method} now gives the model {sorted(others)}"
    given = {
        "dpo": PolicyTrainerMixin.fields,
        "kto": ("log_probs", "entropy", "mean_logits"),
        "grpo": GrpoTrainer.fields,
    }
    assert recorder.read == set(given[method]), f"{VERSION}: {method} reads {sorted(recorder.read)}"


def test_how_the_reward_trainer_asks_the_model(toy: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Else its batches would be for the model's own forward, padding and all."""
    theirs = plain(toy, tiny_model, tmp_path, "reward", {})
    model, asked, read = theirs.model.get_base_model(), [], set()
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        asked.append(({name for name, value in kwargs.items() if value is not None}, kwargs["use_cache"], args))
        logits = own(*args, **kwargs).logits

        class Answer:
            def __getattr__(self, name: str) -> Any:
                read.add(name)
                return logits

        return Answer()

    model.forward = forward
    step(theirs, batch_for(theirs, "reward"))
    assert asked == [(set(ASKED) | (asked[0][0] & {"return_dict"}), False, ())], f"{VERSION}: it asks with {asked}"
    assert read == {"logits"}, f"{VERSION}: it reads {sorted(read)}"


def test_advantages_of_tokens(toy: Any, tiny_model: Path, tmp_path: Path) -> None:
    """GRPO's loss takes advantages ``[B, T]``: with a ratio of 1, minus their mean over a sequence's tokens."""
    theirs = plain(toy, tiny_model, tmp_path, "grpo", {"beta": 0.0, "loss_type": "grpo"})
    batch = completions(theirs.model.config.vocab_size)
    del batch["old_per_token_logps"], batch["ref_per_token_logps"]
    mask = batch["completion_mask"]
    batch["advantages"] = torch.randn(BATCH, ANSWER, generator=torch.Generator().manual_seed(4))
    loss, _ = step(theirs, batch)
    expected = -((batch["advantages"].double() * mask).sum(1) / mask.sum(1)).mean()
    # Eight sums of numbers below 3 in float32
    assert loss == pytest.approx(float(expected), abs=1e-6), f"{VERSION}: advantages of tokens are taken otherwise"


def test_what_is_made_of_completions(toy: Any, tiny_model: Path, tmp_path: Path) -> None:
    """The names that ppo and the correction for the sampler's log-probabilities read."""
    mine = ours(toy, tiny_model, tmp_path, "grpo", {})
    mine.state = SimpleNamespace(global_step=0, num_input_tokens_seen=0, epoch=0.0)
    prompt = {"prompt": mine.train_dataset[0]["prompt"]}
    made = mine._generate_and_score_completions([prompt] * BATCH)
    needed = {*INPUTS, "advantages", "num_items_in_batch", "sampling_per_token_logps"}
    assert needed <= set(made), f"{VERSION}: completions have no {sorted(needed - set(made))}"
    assert made["advantages"].shape == (BATCH,)
    assert made["sampling_per_token_logps"].shape == made["completion_ids"].shape
