"""A tiny random Llama with a tokenizer of its own, and a preference that it can learn in seconds."""

from __future__ import annotations

import dataclasses
import importlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for real_model.py, which is no test

KIND = ("please", "gladly", "thanks", "welcome", "sure")
RUDE = ("never", "whatever", "nonsense", "boring", "no")
PLAIN = ("the", "sun", "is", "round", "cats", "sleep", "a", "lot", "what", "do", "you", "know", "about", "tell", "me")
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def rows(count: int, seed: int, *, messages: bool = False, twins: bool = False) -> list[dict[str, Any]]:
    """Pairs that differ in the tone of one word among plain ones, at a random place; of twins in nothing else."""
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        prompt = " ".join(chance.choices(PLAIN, k=4)) + " "
        answers = []
        for tone in (KIND, RUDE):
            if not twins or not answers:
                words = chance.choices(PLAIN, k=chance.randint(2, 6))
                place = chance.randint(0, len(words))
            answers.append(" ".join([*words[:place], chance.choice(tone), *words[place:]]))
        if messages:
            turns = [[{"role": "assistant", "content": answer}] for answer in answers]
            made.append({"prompt": [{"role": "user", "content": prompt}], "chosen": turns[0], "rejected": turns[1]})
        else:
            made.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    return made


def write_rows(path: Path, made: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def make_tokenizer(*, template: bool = True) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>", *PLAIN, *KIND, *RUDE]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    if template:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def toy() -> SimpleNamespace:
    """The functions above, for tests."""
    return SimpleNamespace(rows=rows, write_rows=write_rows, make_tokenizer=make_tokenizer)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a causal Llama of 25,000 weights; its configuration names no pad token."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def steep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a steeper head: what its layers learn can make a token likely, not only likelier."""
    return make_model(tmp_path_factory.mktemp("models") / "steep-llama", steepness=10.0)


@pytest.fixture(scope="session")
def make_judge() -> Callable[..., Path]:
    """`make_judge(model, folder, …)`: a run of reward modelling that has learnt to prefer kind words."""

    def make(model: Path, folder: Path, training: dict[str, Any] | None = None, **changes: Any) -> Path:
        from ft_core.training import train

        values = {
            "model": str(model),
            "method": "reward",
            "data": str(write_rows(folder / "pairs.jsonl", rows(256, seed=1))),
            "max_length": 32,
            "lora": {"r": 8},
            "training": {"max_steps": 30, "batch_size": 16, "gradient_accumulation": 1, "learning_rate": 1e-2}
            | (training or {}),
            "output": str(folder / "judge"),
        }
        return train(values | changes, say=lambda line: None).run

    return make


@pytest.fixture(scope="session")
def judge(make_judge: Any, steep_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a run on the steep model."""
    made: Path = make_judge(steep_model, tmp_path_factory.mktemp("judge"))
    return made


def make_model(folder: Path, steepness: float = 1.0) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight *= steepness
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings compute in float32 also where the processor is fast in a 16-bit format, as stand-ins for engines do."""
    run = importlib.import_module("ft_core.training.run")
    device = dataclasses.replace(run.pick_device(), dtype="float32")
    monkeypatch.setattr(run, "pick_device", lambda: device)
