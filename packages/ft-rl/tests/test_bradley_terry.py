"""The objective against its equation in float64 and against TRL's trainer, values and gradients."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ft_rl.objectives import bradley_terry


def rewards(pairs: int = 64, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (3 * torch.randn(pairs, generator=generator) for _ in range(2))
    return chosen.to(dtype), rejected.to(dtype), torch.rand(pairs, generator=generator)


def by_hand(chosen: list[float], rejected: list[float], margin: list[float], center: float) -> float:
    """The docstring's equation, term by term in Python's floats."""
    terms = [
        -math.log(1 / (1 + math.exp(-(c - r - m)))) + center * (c + r) ** 2
        for c, r, m in zip(chosen, rejected, margin, strict=True)
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("center", [None, 0.01, 0.3])
@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # The rewards are given, so 16 bits cost nothing; float32 rounds each term by 2**-24, some five times.
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)],
)
def test_the_equation(center: float | None, with_margin: bool, dtype: torch.dtype, tolerance: float) -> None:
    chosen, rejected, margin = rewards(dtype=dtype)
    loss, metrics = bradley_terry(chosen, rejected, margin=margin if with_margin else None, center=center)
    c, r = chosen.double().tolist(), rejected.double().tolist()
    expected = by_hand(c, r, margin.double().tolist() if with_margin else [0.0] * len(c), center or 0.0)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(loss) == pytest.approx(expected, rel=tolerance)
    assert float(metrics["accuracy"]) == sum(a > b for a, b in zip(c, r, strict=True)) / len(c)
    assert float(metrics["margin"]) == pytest.approx((sum(c) - sum(r)) / len(c), rel=1e-5, abs=1e-6)
    assert float(metrics["mean_reward"]) == pytest.approx(sum(c + r) / len(c + r), rel=1e-5, abs=1e-6)
    assert (float(metrics["min_reward"]), float(metrics["max_reward"])) == (min(c + r), max(c + r))


def test_the_gradient_is_the_equations() -> None:
    """d/dr+ = -sigma(-(r+ - r- - m)) / B + 2 c (r+ + r-) / B, and the mirror image for r-."""
    chosen, rejected, margin = (x.double() for x in rewards())
    chosen.requires_grad_()
    rejected.requires_grad_()
    loss, metrics = bradley_terry(chosen, rejected, margin=margin, center=0.1)
    loss.backward()
    with torch.no_grad():
        wins = torch.sigmoid(-(chosen - rejected - margin)) / len(chosen)
        centring = 0.2 * (chosen + rejected) / len(chosen)
    assert torch.allclose(chosen.grad, -wins + centring, rtol=1e-13, atol=1e-15)
    assert torch.allclose(rejected.grad, wins + centring, rtol=1e-13, atol=1e-15)
    assert not any(value.requires_grad for value in metrics.values())
    assert torch.autograd.gradcheck(lambda c, r: bradley_terry(c, r, margin=margin, center=0.1)[0], (chosen, rejected))


def test_far_apart_rewards_stay_finite() -> None:
    chosen = torch.tensor([-300.0, 300.0], requires_grad=True)
    loss, _ = bradley_terry(chosen, -chosen.detach())
    loss.backward()
    assert loss.item() == 300.0  # -log sigma(-600) = 600 and -log sigma(600) = 0, averaged
    assert torch.isfinite(chosen.grad).all()


def test_a_tie_is_no_win() -> None:
    _, metrics = bradley_terry(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
    assert float(metrics["accuracy"]) == 0.5


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"shape \[B\], B > 0, not \[2, 1\] and \[2, 1\]"):
        bradley_terry(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"not \[2\] and \[3\]"):
        bradley_terry(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"B > 0"):
        bradley_terry(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match=r"margin is of shape \[2\]"):
        bradley_terry(torch.zeros(2), torch.zeros(2), margin=torch.zeros(1))


@pytest.fixture(scope="module")
def trl_trainer(tiny_model: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    class Quiet(RewardTrainer):  # type: ignore[misc]
        def _send_telemetry(self) -> None:
            pass

    return Quiet(
        model=AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1),
        args=RewardConfig(str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_dict({"chosen_ids": [[5, 6]], "rejected_ids": [[7]]}),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("center", [None, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_trls_trainer_computes_the_same(trl_trainer: Any, center: float | None, with_margin: bool) -> None:
    """TRL's own compute_loss, on rewards that a model hands it: equal values, gradients and metrics."""
    chosen, rejected, margin = rewards(16)
    given = torch.cat([chosen, rejected])[:, None].requires_grad_()

    def model(**inputs: Any) -> Any:
        return SimpleNamespace(logits=given)

    trl_trainer.args.center_rewards_coefficient = center
    trl_trainer._metrics["train"].clear()
    trl_trainer.model.train()
    inputs = {"attention_mask": torch.ones(32, 3)} | ({"margin": margin} if with_margin else {})
    theirs = trl_trainer.compute_loss(model, inputs)
    (their_gradient,) = torch.autograd.grad(theirs, given)

    halves = given.detach()[:, 0].chunk(2)
    ours, metrics = bradley_terry(
        *(half.requires_grad_() for half in halves), margin=margin if with_margin else None, center=center
    )
    our_gradient = torch.cat(torch.autograd.grad(ours, halves))[:, None]
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    assert torch.allclose(our_gradient, their_gradient, rtol=1e-6, atol=1e-8)
    for name, value in metrics.items():
        assert float(value) == pytest.approx(trl_trainer._metrics["train"][name][-1], rel=1e-6)
