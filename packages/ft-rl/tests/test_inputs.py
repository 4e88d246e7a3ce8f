"""What methods need where rows hold more than text; whole runs with images are tests of the packages together."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ft_core.evaluation import EvaluationJob
from ft_rl import grpo
from ft_rl.grpo_trainer import _grouped
from ft_rl.inputs import first_batch
from ft_rl.pairs import show
from ft_rl.rollouts.drawing import draw
from ft_rl.rollouts.protocol import Sampling
from ft_rl.samples_log import readable

PROMPT = [
    {"role": "user", "content": [{"type": "image", "image": "/a/7.png"}, {"type": "text", "text": "which digit?"}]}
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_never_to_be_drawn_is_not(temperature: float) -> None:
    """And the others' probabilities are those among them."""
    torch.manual_seed(0)
    logits = torch.tensor([[9.0, 1.0, 0.0, 0.5]]).repeat(64, 1)
    tokens, logprobs = draw(logits, Sampling(1, temperature, never=frozenset({0})))
    assert not (tokens == 0).any()
    expected = logits[:, 1:].log_softmax(-1).gather(1, tokens[:, None] - 1)[:, 0]
    torch.testing.assert_close(logprobs, expected)
    assert (draw(logits, Sampling(1, 0.0))[0] == 0).all()


def test_images_are_named_for_people() -> None:
    assert show(PROMPT) == "[/a/7.png] which digit?"
    assert readable(PROMPT) == "[/a/7.png]\nwhich digit?"
    inside = {"type": "image", "image": "data:image/png;base64,AA"}
    assert show([{"role": "user", "content": [inside]}]) == "[image]"
    assert show([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]) == "[image] a"


def test_prompts_are_read_once_for_their_completions() -> None:
    assert _grouped([3, 3, 1, 1]) == ([0, 2], 2)
    assert _grouped([[1], [1], [2]]) == ([0, 1, 2], 1)
    assert _grouped([[1], [2]]) == ([0, 1], 1)


class Picture:
    """Stands for an open image."""

    def __init__(self, name: str) -> None:
        self.name = name


class Pictured:
    """Inputs of a model of text: pictures are counted while somebody holds them, and say nothing to the model."""

    column = "images"

    def __init__(self, tokenizer: Any, never: frozenset[int] = frozenset()) -> None:
        self.tokenizer, self.never = tokenizer, never
        self.open: weakref.WeakSet[Picture] = weakref.WeakSet()
        self.most = self.times = 0

    def usable(self, rows: Sequence[Any]) -> tuple[list[int], list[str]]:
        return list(range(len(rows))), []

    def named(self, messages: Sequence[Mapping[str, Any]], given: Sequence[str]) -> list[dict[str, Any]]:
        return [dict(message) for message in messages]

    def ids(self, messages: Any, given: Any, *, prompting: bool = False, options: Any = None) -> list[int]:
        return list(self.tokenizer(messages[0]["content"])["input_ids"])

    def beside(self, given: Any, ids: Any, mask: Any) -> None:
        return None

    def opened(self, given: Sequence[str]) -> list[Picture]:
        found = [Picture(name) for name in given]
        self.open.update(found)
        self.times += len(found)
        self.most = max(self.most, len(self.open))
        return found


def test_an_evaluation_opens_images_for_some_rows_at_a_time(
    toy: Any, steep_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """For those that rewards are asked about, and lets them go; each value stands at its own row."""
    from transformers import AutoModelForCausalLM

    from ft_core.config.load import check_config, method_settings

    count = 3 * grpo.OPENED + 1
    (tmp_path / "mine.py").write_text(
        "def number(prompts, completions, images, number, **columns):\n"
        "    assert [[f'{n}.png'] for n in number] == [[one.name for one in row] for row in images]\n"
        "    assert len(prompts) == len(completions) == len(columns['completion_ids'])\n"
        "    return [float(n) for n in number]\n"
        "def none(prompts, completions, number, **columns):\n"
        "    return [None if n % 2 else 0.5 for n in number]\n"
    )
    rewards = [f"{tmp_path}/mine.py:number", f"{tmp_path}/mine.py:none"]
    config = check_config({
        "model": str(steep_model), "method": "grpo", "data": "p.jsonl", "rewards": rewards,
        "grpo": {"max_completion_length": 2},
    })  # fmt: skip
    made = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "images": [f"{n}.png"], "number": n}
        for n, row in enumerate(toy.rows(count, seed=3))
    ]
    pictured = Pictured(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(steep_model).eval()
    job = EvaluationJob(config, method_settings(config), model, tokenizer, made, kept={"inputs": pictured})
    found = grpo.evaluate(job)
    assert pictured.times == count
    assert pictured.most <= grpo.OPENED
    assert not pictured.open
    assert found.rows == count
    assert found.metrics["number"] == pytest.approx((count - 1) / 2)
    assert found.metrics["none"] == 0.5
    evens = len(range(0, count, 2))
    assert found.metrics["reward"] == pytest.approx((count - 1) / 2 + 0.5 * evens / count)
    assert found.samples[2].answer.endswith("[reward 2.5]")


def test_tokens_of_images_are_no_labels_of_the_check() -> None:
    """Here an image's token is numbered past the head's rows, as a family may have it."""
    rows, image = 10, 12
    batch = first_batch(Pictured(None, frozenset({image})), [3, image, image, 4], ["a.png"])
    assert batch["input_ids"].tolist() == [[3, image, image, 4]]
    assert batch["labels"].tolist() == [[3, -100, -100, 4]]
    loss = torch.nn.functional.cross_entropy(torch.zeros(4, rows), batch["labels"][0])
    torch.testing.assert_close(loss, torch.tensor(rows).log())
