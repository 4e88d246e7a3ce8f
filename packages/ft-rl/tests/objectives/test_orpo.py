"""ORPO against TRL's trainer, values and gradients, and where TRL's goes wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_rl.objectives import flatten, orpo, sequence_lengths, sequence_sums


@pytest.fixture(scope="module")
def trainer(trl: Any) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    rows = {"prompt": ["the sun "], "chosen": ["is round"], "rejected": ["cats sleep"]}
    return trl(ORPOTrainer, ORPOConfig, rows, {"beta": 0.25, "max_length": 32, "remove_unused_columns": False})


def test_trls_odds_ratio_loss_is_the_same(trainer: Any, lab: Any) -> None:
    """On means from nearly certain to hopeless; TRL computes in float32."""
    means = -torch.logspace(-5, 1.5, 64)
    chosen = means[torch.randperm(64, generator=torch.Generator().manual_seed(0))].requires_grad_()
    rejected = means.clone().requires_grad_()
    losses, chosen_rewards, rejected_rewards, ratio, odds = trainer.odds_ratio_loss(chosen, rejected)
    ours, metrics = orpo(chosen, rejected, torch.tensor(0.0), beta=0.25)
    # log(1 - p) of a p rounded to float32 near 1 differs by up to 2**-24 / (1 - p): 6e-3 at the nearest mean, 1e-5.
    # Both take it of expm1 there, which has no such loss, so what remains are roundings of log-odds of up to 31.
    lab.assert_same(ours, -losses.mean(), [chosen, rejected], 1e-6)
    assert float(metrics["odds_loss"]) == pytest.approx(-float(ratio.detach()), rel=1e-6)
    assert float(metrics["log_odds_ratio"]) == pytest.approx(float(odds.detach()), abs=31 * 2**-23)
    assert float(metrics["chosen_reward"]) == pytest.approx(float(chosen_rewards.mean()), rel=1e-6)
    assert float(metrics["rejected_reward"]) == pytest.approx(float(rejected_rewards.mean()), rel=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx(float((chosen_rewards > rejected_rewards).float().mean()))
    assert not any(value.requires_grad for value in metrics.values())


def test_trls_whole_loss_is_the_same(trainer: Any) -> None:
    """Through a model: its means over answers and its imitation loss over all tokens, as TRL takes them."""
    torch.manual_seed(0)
    model = trainer.model.eval()
    prompts, answers = [3, 2, 4], {"chosen": [5, 1, 3], "rejected": [2, 6, 4]}
    batch: dict[str, torch.Tensor] = {}
    for side, lengths in answers.items():
        width = max(p + a for p, a in zip(prompts, lengths, strict=True))
        ids = torch.randint(3, 30, (3, width))
        place = torch.arange(width)
        attended = place < torch.tensor([p + a for p, a in zip(prompts, lengths, strict=True)])[:, None]
        answer = attended & (place >= torch.tensor(prompts)[:, None])
        batch[f"{side}_input_ids"] = ids
        batch[f"{side}_attention_mask"] = attended.long()
        batch[f"{side}_labels"] = ids.masked_fill(~answer, -100)
    model.zero_grad()
    theirs, their_metrics = trainer.get_batch_loss_metrics(model, batch)
    theirs.backward()
    their_gradients = [p.grad.clone() for p in model.parameters()]

    means, nll = [], None
    model.zero_grad()
    for side in answers:
        ids, attended, labels = (batch[f"{side}_{x}"] for x in ("input_ids", "attention_mask", "labels"))
        logits = model(ids, attention_mask=attended).logits[:, :-1]
        table = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        tokens, sequences = flatten(table, labels[:, 1:] != -100)
        means.append(sequence_sums(tokens, sequences, 3) / sequence_lengths(sequences, 3))
        if side == "chosen":
            nll = -table[attended[:, 1:].bool()].mean()
    ours, metrics = orpo(*means, nll, beta=0.25)
    ours.backward()
    # The forward runs here at other widths than in TRL's joint batch; its sums round differently by some 1e-7.
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    for parameter, other in zip(model.parameters(), their_gradients, strict=True):
        torch.testing.assert_close(parameter.grad, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    assert float(metrics["nll"]) == pytest.approx(their_metrics["nll_loss"], rel=1e-6)
    assert float(metrics["margin"]) == pytest.approx(their_metrics["rewards/margins"], rel=1e-4)


def test_the_derivative() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [-3 * torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(2)]
    inputs.append(torch.tensor(1.5, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda c, r, n: orpo(c, r, n, beta=0.4)[0], [x.requires_grad_() for x in inputs])


def test_a_certain_answer_has_a_finite_gradient() -> None:
    """At a mean of 0 the odds are infinite: a certain chosen answer's loss is 0, its slope -odds(rejected)."""
    chosen, rejected = torch.tensor([0.0], requires_grad=True), torch.tensor([-0.5], requires_grad=True)
    loss, _ = orpo(chosen, rejected, torch.tensor(0.0), beta=1.0)
    loss.backward()
    # L = log(1 + expm1(-c) / expm1(-r)), whose slope by c at 0 is -1 / expm1(-r)
    slope = float(-1 / torch.expm1(torch.tensor(0.5)))
    assert float(loss) == pytest.approx(-torch.finfo(torch.float32).eps * slope, rel=1e-5)
    assert float(chosen.grad) == pytest.approx(slope, rel=1e-5)


@settings(deadline=None, max_examples=100)
@given(means=st.tuples(*[st.floats(-1e4, 0, width=32)] * 2))
def test_extreme_means_stay_finite(means: tuple[float, float]) -> None:
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in means)
    loss, metrics = orpo(chosen, rejected, torch.tensor(1.0), beta=0.1)
    loss.backward()
    assert all(torch.isfinite(x).all() for x in [loss, chosen.grad, rejected.grad, *metrics.values()])
    assert chosen.grad <= 0 <= rejected.grad


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[B\], B > 0, not \[2\] and \[3\]"):
        orpo(torch.zeros(2), torch.zeros(3), torch.tensor(0.0), beta=0.1)
    with pytest.raises(ValueError, match="B > 0"):
        orpo(torch.zeros(0), torch.zeros(0), torch.tensor(0.0), beta=0.1)
    with pytest.raises(ValueError, match=r"chosen_nll is a scalar, not of shape \[2\]"):
        orpo(torch.zeros(2), torch.zeros(2), torch.zeros(2), beta=0.1)
