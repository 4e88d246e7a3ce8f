"""A training step of DPO and GRPO on images, loss and gradients, is that of TRL's plain trainers on the same rows."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import seen
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from ft_core import fast
from ft_core.config.load import check_config, method_settings
from ft_core.models import load_tokenizer
from ft_core.models.source import find_model
from ft_core.training.job import Job, build_trainer
from ft_rl import dpo, grpo
from ft_vision import read_image
from ft_vision.loading import load_processor
from ft_vision.rows import normalise

family = seen.family

TARGETS = r".*language_model.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@pytest.fixture(autouse=True)
def plain_numbers() -> Any:
    torch.manual_seed(0)


def adapted(folder: Path) -> Any:
    """In float32, with an adapter on the language model that changes nothing yet."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS))


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".default." in name}


def move(model: Any) -> None:
    """Some training: else a policy is its reference and half of every loss is nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(model).values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def common(folder: Path, count: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": count,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
    }


def job_of(folder: Path, model: Any, where: Path, rows: list[dict[str, Any]], method: str, settings: Any) -> Job:
    """What a configuration's trainer is made of."""
    from ft_core.data import FORMATS

    values = {
        "model": str(where),
        "task": "vision",
        "method": method,
        "data": str(folder / "rows.jsonl"),
        "max_length": 128,
        "lora": {"r": 4},
        "training": {"batch_size": len(rows), "gradient_accumulation": 1},
        "output": str(folder),
        method: settings,
        **({"rewards": [f"{folder / 'rewards.py'}:reward"]} if method == "grpo" else {}),
    }
    config = check_config(values)
    source = find_model(str(where))
    tokenizer = load_tokenizer(source)
    kind = FORMATS["preference" if method == "dpo" else "prompt"]
    given = [normalise(row, kind, folder) for row in rows]
    return Job(
        config, method_settings(config), model, tokenizer, given, None, common(folder, len(rows)), [],
        say=lambda line: None, processor=load_processor(source, config, tokenizer),
    )  # fmt: skip


def as_trls(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as TRL has them: the images in a column, the prompt's text alone."""
    made = []
    for row in rows:
        parts = row["prompt"][0]["content"]
        pictures = [read_image(part["image"]) for part in parts if part["type"] == "image"]
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        made.append({**row, "prompt": [{"role": "user", "content": text}], "images": pictures})
    return made


def step(trainer: Any, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a training step on a batch, and the gradients of the adapter."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, batch, None)
    gradients = {name: p.grad.clone() for name, p in trained(trainer.model).items() if p.grad is not None}
    assert len(gradients) == len(trained(trainer.model))
    return float(loss), gradients


def check_equal(one: tuple[float, dict[str, torch.Tensor]], other: tuple[float, dict[str, torch.Tensor]]) -> None:
    """In float32 two ways of summing products of 32 terms, in two layers of the tower and two of the text, differ by
    some units in the last place of a logit: these models' weights are five times a fresh one's, and logits reach 30,
    so 30 · 2⁻²³ · sqrt(4 · 16) = 3e-5 a log-probability, times β = 0.1 and sqrt(8) of a batch's tokens: 1e-5. Gradients
    are held to their tensor's largest entry, which sums of both signs can miss fivefold.
    """
    assert one[0] == pytest.approx(other[0], rel=1e-5, abs=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in other[1].items():
        largest = float(gradient.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(
            one[1][name], gradient, rtol=0, atol=5e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("layers", ["transformers'", "fast"])
@pytest.mark.parametrize("name", seen.FAMILIES)
def test_a_step_of_dpo_is_trls(name: str, layers: str, family: Any, tmp_path: Path) -> None:
    """Two of four pairs ask the same of two images of one size: their prompts' tokens are equal, the images not."""
    rows = seen.pairs(tmp_path, 4, sizes=((56, 56), (56, 56), (84, 56)))
    rows[2]["prompt"][0]["content"].insert(1, dict(rows[1]["prompt"][0]["content"][0]))  # one shows two
    where = family(name)
    settings = {"beta": 0.1}
    job = job_of(tmp_path, adapted(where), where, rows, "dpo", settings)
    if layers == "fast":
        fast.enable(job.model)
    mine = build_trainer(dpo.build, job)
    arguments = trl.DPOConfig(**common(tmp_path, len(rows)), **settings, max_length=None)
    theirs = trl.DPOTrainer(
        model=adapted(where),
        args=arguments,
        train_dataset=Dataset.from_list(as_trls(rows)),
        processing_class=job.processor,
    )
    for trainer in (mine, theirs):
        move(trainer.model)
    batch = theirs.data_collator([theirs.train_dataset[i] for i in range(len(rows))])
    expected = step(theirs, dict(batch))
    ours = mine.data_collator([mine.train_dataset[i] for i in range(len(rows))])
    assert torch.equal(ours["input_ids"], batch["input_ids"])
    assert torch.equal(ours["completion_mask"], batch["completion_mask"])
    check_equal(step(mine, ours), expected)
    # and the images count: with those of other rows it is another loss
    wrong = mine.data_collator(
        [
            {**mine.train_dataset[i], "given": mine.train_dataset[j]["given"]}
            for i, j in ((0, 1), (1, 0), (2, 2), (3, 3))
        ]
    )
    assert abs(step(mine, wrong)[0] - expected[0]) > 1e-3


def reward(completions: list[Any], **columns: Any) -> list[float]:
    return [float(sum(map(ord, message[0]["content"])) % 7) for message in completions]


@pytest.mark.parametrize("layers", ["transformers'", "fast"])
@pytest.mark.parametrize("name", seen.FAMILIES)
def test_a_step_of_grpo_is_trls(name: str, layers: str, family: Any, tmp_path: Path) -> None:
    """On completions that TRL's trainer has written, of a group of two for each of two images of one size."""
    (tmp_path / "rewards.py").write_text(inspect.getsource(reward).replace(": Any", "").replace(": list[Any]", ""))
    rows = [row for row in seen.prompts(tmp_path, 2) for _ in range(2)]
    where = family(name)
    settings = {"beta": 0.05, "num_generations": 2, "max_completion_length": 4, "loss_type": "grpo"}
    job = job_of(tmp_path, adapted(where), where, rows, "grpo", settings)
    if layers == "fast":
        fast.enable(job.model)
    mine = build_trainer(grpo.build, job)
    theirs = trl.GRPOTrainer(
        model=adapted(where),
        reward_funcs=reward,
        args=trl.GRPOConfig(**common(tmp_path, len(rows)), **settings),
        train_dataset=Dataset.from_list(as_trls(rows)),
        processing_class=job.processor,
    )
    for trainer in (mine, theirs):
        move(trainer.model)
    theirs.model.train()
    batch = theirs._generate_and_score_completions([theirs.train_dataset[i] for i in range(len(rows))])
    assert batch["advantages"].any()
    noise = torch.randn(batch["completion_ids"].shape, generator=torch.Generator().manual_seed(2)) * 0.3
    batch["old_per_token_logps"] = batch["ref_per_token_logps"] + noise
    # what we make of the same prompts, beside TRL's completions
    text = {name: value for name, value in batch.items() if not name.endswith(("type_ids", "pixel_values", "grid_thw"))}
    text = {name: value for name, value in text.items() if name != "num_images"} | {"row": torch.arange(len(rows))}
    mine._numbers = text["row"].tolist()
    asked = mine._tokenize_prompts([])[0]
    assert [ids[mask.bool()].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)] == (
        asked
    )
    found = []
    for trainer, given in ((theirs, batch), (mine, text)):
        trainer._buffered_inputs, trainer._step, trainer.num_iterations = [given], 1, 2  # as if written a step ago
        found.append(step(trainer, []))
    check_equal(found[1], found[0])
    mine._buffered_inputs, mine._step = [text | {"row": text["row"].flip(0)}], 1
    assert abs(step(mine, [])[0] - found[0][0]) > 1e-3
