"""What methods need where rows hold more than text; whole runs with images are tests of the packages together."""

from __future__ import annotations

import pytest
import torch

from ft_rl.grpo_trainer import _grouped
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
