"""PPO, GAE and the KL estimates against the papers' equations, evaluated in loops over Python's floats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_rl.objectives import AdaptiveKL, FixedKL, gae, kl, penalised_rewards, ppo_policy, ppo_value, whiten

LENGTHS = [5, 1, 0, 17, 8]
"""One of the sequences has no token."""


def tokens(dtype: torch.dtype, count: int = 3) -> tuple[torch.Tensor, ...]:
    """``sequences``, and tensors of shape [N]."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    made = (torch.randn(len(sequences), generator=generator, dtype=torch.float64) for _ in range(count))
    return sequences, *(x.to(dtype) for x in made)


def close(ours: torch.Tensor, expected: list[float], tolerance: float) -> None:
    exact = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ours.detach().double(), exact, rtol=tolerance, atol=tolerance)


def gae_by_hand(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Equation 16 of Schulman et al. 2015 for one sequence: the sum as it is written, term by term."""
    following = [*values[1:], 0.0] if values else []
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [
        math.fsum((gamma * lam) ** step * delta for step, delta in enumerate(deltas[t:])) for t in range(len(deltas))
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.9, 0.0), (0.0, 0.9)])
@pytest.mark.parametrize("shuffled", [False, True], ids=["", "interleaved"])
def test_gae_is_the_equations(gamma: float, lam: float, shuffled: bool, dtype: torch.dtype, tolerance: float) -> None:
    sequences, rewards, values, _ = tokens(dtype)
    if shuffled:  # the sequences' tokens mixed, each sequence's in order
        mixed = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(1))
        mixed = sequences[mixed]
        places = torch.cat([(mixed == i).nonzero()[:, 0] for i in range(len(LENGTHS))])
        order = torch.empty_like(places)
        order[places] = torch.arange(len(places))
        sequences, rewards, values = (x[order] for x in (sequences, rewards, values))
    advantages, returns = gae(rewards, values, sequences, gamma=gamma, lam=lam)
    assert advantages.dtype == returns.dtype == dtype
    for i in range(len(LENGTHS)):
        mine = sequences == i
        r, v = rewards[mine].tolist(), values[mine].tolist()
        expected = gae_by_hand(r, v, gamma, lam)
        # Sums of up to 17 terms of a few units, where lambda is 1.
        close(advantages[mine], expected, 5 * tolerance)
        close(returns[mine], [a + b for a, b in zip(expected, v, strict=True)], 5 * tolerance)


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_gae_of_any_lengths(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    rewards, values = (torch.randn(len(sequences), generator=generator, dtype=torch.float64) for _ in range(2))
    advantages, _ = gae(rewards, values, sequences, gamma=gamma, lam=lam)
    for i in range(len(lengths)):
        mine = sequences == i
        close(advantages[mine], gae_by_hand(rewards[mine].tolist(), values[mine].tolist(), gamma, lam), 1e-12)


def test_gae_refuses() -> None:
    where = torch.tensor([0, 0])
    with pytest.raises(ValueError, match=r"gamma and lam are from 0 to 1, not 1\.1 and 0\.9"):
        gae(torch.zeros(2), torch.zeros(2), where, gamma=1.1, lam=0.9)
    with pytest.raises(ValueError, match=r"values is of shape \[2\], a value for each token of sequences, not \[3\]"):
        gae(torch.zeros(2), torch.zeros(3), where, gamma=1, lam=1)
    with pytest.raises(ValueError, match="the numbers in sequences are 0 or more, not from -1 to 0"):
        gae(torch.zeros(2), torch.zeros(2), where - torch.tensor([0, 1]), gamma=1, lam=1)


def test_whitening(dtype: torch.dtype, tolerance: float) -> None:
    _, values, choice, _ = tokens(dtype)
    values, mask = 3 * values + 2, choice > 0
    some = [x for x, chosen in zip(values.tolist(), mask.tolist(), strict=True) if chosen]
    mean = math.fsum(some) / len(some)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in some) / len(some) + 1e-8)
    close(whiten(values, mask)[mask], [(x - mean) / deviation for x in some], 2 * tolerance)
    assert not whiten(values, mask)[~mask].any()
    whole = whiten(values)
    assert abs(float(whole.mean())) < tolerance
    assert float(whole.square().mean()) == pytest.approx(1, rel=max(tolerance, 1e-8))  # the 1e-8 below the root
    assert whiten(values[:1]).tolist() == [0.0]
    poisoned = torch.where(mask, values, torch.nan)
    assert torch.equal(whiten(poisoned, mask), whiten(values, mask))
    with pytest.raises(ValueError, match=r"mask is bool of shape \[31\], like the values, not torch.int64"):
        whiten(values, mask.long())


@pytest.mark.parametrize("num_items", [None, 50])
def test_the_policy_loss_is_equation_7(num_items: int | None, dtype: torch.dtype, tolerance: float) -> None:
    _, old, drift, advantages = tokens(dtype)
    policy = (old + 0.4 * drift).requires_grad_()
    ratios = [math.exp(a - b) for a, b in zip(policy.tolist(), old.tolist(), strict=True)]
    total, slopes, stopped = 0.0, [], 0
    for w, a in zip(ratios, advantages.tolist(), strict=True):
        clipped = min(max(w, 0.8), 1.2)
        total -= min(w * a, clipped * a)
        stopped += clipped * a < w * a
        slopes.append(0.0 if clipped * a < w * a else -a * w)  # d(w a)/d(log p) = w a, unless the clip is the minimum
    count = num_items or len(ratios)
    loss, metrics = ppo_policy(policy, old, advantages, clip_range=0.2, num_items=num_items)
    loss.backward()
    assert loss.dtype == dtype
    assert float(loss) == pytest.approx(total / count, rel=tolerance, abs=tolerance)
    close(policy.grad, [s / count for s in slopes], tolerance)
    assert 0 < stopped < len(ratios)
    assert float(metrics["clip_fraction"]) == pytest.approx(stopped / len(ratios))
    assert float(metrics["ratio_mean"]) == pytest.approx(sum(ratios) / len(ratios), rel=1e-6)
    assert float(metrics["approx_kl"]) == pytest.approx(
        sum(w - 1 - math.log(w) for w in ratios) / len(ratios), rel=1e-5
    )
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("clip_range", [None, 0.3])
@pytest.mark.parametrize("num_items", [None, 50])
def test_the_value_loss_is_the_clipped_square(
    num_items: int | None, clip_range: float | None, dtype: torch.dtype, tolerance: float
) -> None:
    _, old, drift, returns = tokens(dtype)
    values = (old + 0.5 * drift).requires_grad_()
    total, slopes, larger = 0.0, [], 0
    for v, o, r in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
        near = v if clip_range is None else min(max(v, o - clip_range), o + clip_range)
        total += max((v - r) ** 2, (near - r) ** 2) / 2
        larger += (near - r) ** 2 > (v - r) ** 2
        slopes.append(0.0 if (near - r) ** 2 > (v - r) ** 2 else v - r)
    count = num_items or len(slopes)
    loss, metrics = ppo_value(values, old, returns, clip_range=clip_range, num_items=num_items)
    loss.backward()
    assert float(loss) == pytest.approx(total / count, rel=tolerance)
    # Within the range both squares are one number, up to the rounding of o + (v - o): its error, some 2**-24 of v.
    close(values.grad, [s / count for s in slopes], 2 * tolerance)
    assert bool(larger) == (clip_range is not None)
    if dtype == torch.float64 and clip_range is None:
        assert float(metrics["clip_fraction"]) == 0
    assert float(metrics["error"]) == pytest.approx(float((values.detach() - returns).square().mean()), rel=1e-6)
    assert not any(value.requires_grad for value in metrics.values())


def test_the_derivatives() -> None:
    _, old, drift, target = tokens(torch.float64)
    inputs = (old + 0.5 * drift).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ppo_policy(x, old, target, clip_range=0.2)[0], inputs)
    assert torch.autograd.gradcheck(lambda x: ppo_value(x, old, target, clip_range=0.3)[0], inputs)
    for estimator in ("k1", "k2", "k3"):
        assert torch.autograd.gradcheck(lambda x, e=estimator: kl(x, old, e), inputs)


@settings(deadline=None, max_examples=100)
@given(pair=st.tuples(*[st.floats(-1e4, 0, width=32)] * 2), advantage=st.sampled_from([-1.0, 0.0, 1.0]))
def test_extreme_ratios_give_no_nan(pair: tuple[float, float], advantage: float) -> None:
    policy, old = torch.tensor([pair[0]], requires_grad=True), torch.tensor([pair[1]])
    loss, metrics = ppo_policy(policy, old, torch.tensor([advantage]))
    loss = loss + sum(kl(policy, old, e).sum() for e in ("k1", "k2", "k3"))
    loss.backward()
    assert all(torch.isfinite(x).all() for x in [loss, policy.grad, *metrics.values()])


def test_the_kl_estimates(dtype: torch.dtype, tolerance: float) -> None:
    """Each by its formula; and the three agree about the divergence of two distributions, given enough samples."""
    _, policy, reference, _ = tokens(dtype)
    log_r = [b - a for a, b in zip(policy.tolist(), reference.tolist(), strict=True)]
    close(kl(policy, reference, "k1"), [-x for x in log_r], tolerance)
    close(kl(policy, reference, "k2"), [x * x / 2 for x in log_r], 4 * tolerance)  # squares of up to some 8
    close(kl(policy, reference, "k3"), [math.exp(x) - 1 - x for x in log_r], 4 * tolerance)

    generator = torch.Generator().manual_seed(0)
    p = (0.3 * torch.randn(50, generator=generator, dtype=torch.float64)).log_softmax(0)
    q = (0.3 * torch.randn(50, generator=generator, dtype=torch.float64)).log_softmax(0)
    for estimator in ("k1", "k3"):  # the expectation, exactly: both are unbiased
        assert float((p.exp() * kl(p, q, estimator)).sum()) == pytest.approx(
            float((p.exp() * (p - q)).sum()), rel=1e-12
        )
    assert float((kl(p, q, "k3")).min()) >= 0


def test_kl_refuses() -> None:
    with pytest.raises(ValueError, match=r"one shape, not \[2\] and \[3\]"):
        kl(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="estimator is 'k1', 'k2' or 'k3', not 'k4'"):
        kl(torch.zeros(2), torch.zeros(2), "k4")  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_penalised_rewards(estimator: Any, dtype: torch.dtype, tolerance: float) -> None:
    sequences, policy, reference, _ = tokens(dtype)
    scores = torch.tensor([1.5, -2.0, 100.0, 0.25, 3.0], dtype=dtype)
    rewards, metrics = penalised_rewards(scores, policy, reference, sequences, coefficient=0.2, estimator=estimator)
    formula = {"k1": lambda x: -x, "k2": lambda x: x * x / 2, "k3": lambda x: math.exp(x) - 1 - x}[estimator]
    expected, sums = [], [0.0] * len(LENGTHS)
    where = sequences.tolist()
    for t, (a, b) in enumerate(zip(policy.tolist(), reference.tolist(), strict=True)):
        last = t + 1 == len(where) or where[t + 1] != where[t]
        cost = formula(b - a)
        sums[where[t]] += cost
        expected.append(-0.2 * cost + (float(scores[where[t]]) if last else 0.0))
    close(rewards, expected, 4 * tolerance)
    assert rewards.dtype == dtype
    assert float(metrics["kl"]) == pytest.approx(sum(sums) / len(sums), rel=1e-5)
    assert float(metrics["score_mean"]) == pytest.approx(20.55, rel=1e-6)
    with pytest.raises(ValueError, match=r"scores are of shape \[B\], one a sequence, not \[5, 1\]"):
        penalised_rewards(scores[:, None], policy, reference, sequences, coefficient=0.2)


def test_the_adaptive_weight_is_section_2_2() -> None:
    weight = AdaptiveKL(coefficient=0.2, target=6.0, gain=0.1)
    weight.update(6.6)  # a tenth too much: e = 0.1
    assert weight.coefficient == pytest.approx(0.2 * 1.01)
    weight.update(60.0)  # e is at most 0.2
    assert weight.coefficient == pytest.approx(0.2 * 1.01 * 1.02)
    weight.update(-1.0)  # an estimate may be negative; e is at least -0.2
    assert weight.coefficient == pytest.approx(0.2 * 1.01 * 1.02 * 0.98)
    again = AdaptiveKL(coefficient=9.0)
    again.load_state_dict(weight.state_dict())
    assert again == weight
    with pytest.raises(ValueError, match="finite number, not nan"):
        weight.update(math.nan)
    assert again == weight
    with pytest.raises(ValueError, match="target is a number above 0, not 0"):
        AdaptiveKL(target=0)


def test_the_fixed_weight_stays() -> None:
    weight = FixedKL(0.3)
    weight.update(1e9)
    assert weight.state_dict() == {"coefficient": 0.3}
    other = FixedKL()
    other.load_state_dict(weight.state_dict())
    assert other == weight


def test_ppo_refuses() -> None:
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ValueError, match=r"one shape \[N\], not logprobs \[2\], old_logprobs \[2\], advantages \[3\]"):
        ppo_policy(two, two, three)
    with pytest.raises(ValueError, match=r"one shape \[N\], not values \[1, 2\]"):
        ppo_value(two[None], two[None], two[None])
    with pytest.raises(ValueError, match="clip_range is 0 or more, not -1"):
        ppo_policy(two, two, two, clip_range=-1)
    with pytest.raises(ValueError, match="clip_range is 0 or more, or None, not -1"):
        ppo_value(two, two, two, clip_range=-1)


def test_nothing_to_train_on_is_a_zero_that_can_be_differentiated() -> None:
    nothing = torch.zeros(0, requires_grad=True)
    for loss, metrics in (ppo_policy(nothing, nothing, nothing), ppo_value(nothing, nothing, nothing)):
        loss.backward()
        assert float(loss) == 0.0
        assert set(map(float, metrics.values())) == {0.0}
