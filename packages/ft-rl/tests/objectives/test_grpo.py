"""GRPO and its kin against TRL's trainer, values and gradients; GSPO-token against its paper's equations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_rl.objectives import flatten, grpo, overlong_penalty, unflatten

LENGTHS = [5, 9, 1, 3, 8, 4]


@pytest.fixture(scope="module")
def trainer(trl: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    options = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 12}
    return trl(GRPOTrainer, GRPOConfig, {"prompt": ["the sun", "cats"]}, options, reward_funcs=lambda **_: [0.0])


def batch(dtype: torch.dtype, drift: float = 0.3, empty: bool = False) -> dict[str, torch.Tensor]:
    """Tables of [6, 9] log-probabilities, their mask, and advantages of both signs and 0."""
    torch.manual_seed(0)
    lengths = torch.tensor([0 if empty and i == 2 else n for i, n in enumerate(LENGTHS)])
    old = -0.1 - 2 * torch.rand(6, 9, dtype=dtype)
    return {
        "mask": (torch.arange(9) < lengths[:, None]).long(),
        "old": old,
        "policy": (old + drift * torch.randn(6, 9, dtype=dtype)).requires_grad_(),
        "reference": old + 0.5 * torch.randn(6, 9, dtype=dtype),
        "weights": torch.rand(6, 9, dtype=dtype),
        "advantages": torch.tensor([1.3, -0.7, 0.4, -1.5, 0.0, 0.9], dtype=dtype),
    }


def flat(made: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Our loss of that batch."""
    mask = made["mask"]
    policy, sequences = flatten(made["policy"], mask)
    if options.pop("weighted", False):
        options["importance_weights"] = flatten(made["weights"], mask)[0]
    reference = flatten(made["reference"], mask)[0] if options.get("beta") else None
    old = flatten(made["old"], mask)[0]
    return grpo(policy, old, made["advantages"], sequences, ref_logprobs=reference, **options)


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("empty", [False, True], ids=["", "one empty"])
@pytest.mark.parametrize("variant", ["plain", "delta", "kl", "kl corrected", "weighted"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_trls_trainer_computes_the_same(
    trainer: Any,
    lab: Any,
    loss_type: str,
    level: str,
    variant: str,
    empty: bool,
    accumulated: int,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    made = batch(dtype, empty=empty)
    low, high = (0.15, 0.22) if level == "token" else (0.04, 0.06)  # a mean of logarithms strays less than one
    options: dict[str, Any] = {"epsilon_low": low, "epsilon_high": high, "importance_sampling_level": level}
    options |= {"delta": {"delta": 1 + high + 0.05}, "weighted": {"weighted": True, "beta": 0.2}}.get(variant, {})
    options |= {"kl": {"beta": 0.2}, "kl corrected": {"beta": 0.2, "bias_correction_kl": True}}.get(variant, {})

    trainer.loss_type, trainer.importance_sampling_level = loss_type, level
    trainer.epsilon_low, trainer.epsilon_high = low, high
    trainer.args.delta, trainer.beta = options.get("delta"), options.get("beta", 0.0)
    trainer.args.use_bias_correction_kl = variant == "kl corrected"
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = variant == "weighted"
    trainer.max_completion_length = 12
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = accumulated
    trainer._metrics["train"].clear()
    trainer.model.train()
    prompt = torch.ones(6, 2, dtype=torch.long)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": torch.ones(6, 9, dtype=torch.long),
        "completion_mask": made["mask"],
        "advantages": made["advantages"],
        "old_per_token_logps": made["old"],
        "ref_per_token_logps": made["reference"],
        "importance_sampling_ratio": made["weights"],
        "num_items_in_batch": torch.tensor(71),
    }
    # TRL's model scores all positions but the first; the prompt's are not looked at.
    table = torch.cat([torch.zeros(6, 1, dtype=dtype), made["policy"]], dim=1)
    theirs = trainer._compute_loss(lab.Scored(table), inputs)

    ours, metrics = flat(made, loss_type=loss_type, max_completion_length=12, num_items=71, **options)
    lab.assert_same(ours if loss_type == "dapo" else ours / accumulated, theirs, [made["policy"]], tolerance)
    logged = trainer._metrics["train"]
    if not (empty and level == "sequence"):  # TRL counts a completion without tokens among the unclipped, we don't
        for name in ("low", "high", "region"):
            assert float(metrics[f"clip_{name}"]) == pytest.approx(logged[f"clip_ratio/{name}_mean"][-1], abs=1e-6)
    assert float(metrics["clip_region"]) > 0
    assert ("kl" in metrics) == ("beta" in options)
    if "beta" in options:
        assert float(metrics["kl"]) == pytest.approx(logged["kl"][-1], rel=1e-5)
    assert not any(value.requires_grad for value in metrics.values())


def test_gspo_by_its_equations() -> None:
    """Equations 5 to 7 and 13 to 14 of the GSPO paper, in a loop over plain numbers."""
    made = batch(torch.float64)
    policy, old, mask = made["policy"].tolist(), made["old"].tolist(), made["mask"]
    total, ratios = 0.0, []
    for i, length in enumerate(LENGTHS):
        ratio = math.exp(sum(policy[i][t] - old[i][t] for t in range(length)) / length)
        clipped = min(max(ratio, 1 - 0.03), 1 + 0.04)
        advantage = float(made["advantages"][i])
        ratios.append(ratio)
        total -= min(ratio * advantage, clipped * advantage) / len(LENGTHS)
    options = {"loss_type": "grpo", "epsilon_low": 0.03, "epsilon_high": 0.04}
    gradients = {}
    for level in ("sequence", "sequence_token"):
        loss, metrics = flat(made, importance_sampling_level=level, **options)
        assert float(loss) == pytest.approx(total, rel=1e-12)
        (gradients[level],) = torch.autograd.grad(loss, made["policy"])
    assert float(metrics["ratio_mean"]) == pytest.approx(
        sum(r * n for r, n in zip(ratios, LENGTHS, strict=True)) / sum(LENGTHS), rel=1e-12
    )
    assert not (gradients["sequence"][mask == 0]).any()
    # With one advantage a completion both have one gradient: the paper's equations 11 and 17.
    torch.testing.assert_close(gradients["sequence_token"], gradients["sequence"], rtol=1e-12, atol=1e-15)


def test_the_token_variant_clips_by_the_sequence_and_moves_by_the_token() -> None:
    """What parts GSPO-token from GSPO: a weight on one token acts on that token's gradient alone."""
    made = batch(torch.float64, drift=0.01)
    made["weights"] = torch.zeros_like(made["weights"])
    made["weights"][1, 2] = 1.0
    for level, touched in (("sequence", LENGTHS[1]), ("sequence_token", 1)):
        loss, _ = flat(made, importance_sampling_level=level, loss_type="grpo", weighted=True)
        (gradient,) = torch.autograd.grad(loss, made["policy"])
        assert int((gradient != 0).sum()) == touched


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_gspo_is_grpo_until_a_batch_is_used_again(loss_type: str) -> None:
    fresh, used = batch(torch.float64), batch(torch.float64)
    fresh["policy"] = fresh["old"].clone().requires_grad_()
    for made, alike in ((fresh, True), (used, False)):
        results = []
        for level in ("token", "sequence", "sequence_token"):
            options = {"loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": 12}
            loss, metrics = flat(made, **options)
            results.append((loss.detach(), torch.autograd.grad(loss, made["policy"])[0]))
            assert (float(metrics["ratio_mean"]) == 1.0) == alike
        (token, by_token), (sequence, by_sequence), _ = results
        assert torch.allclose(token, sequence, rtol=1e-12) == alike
        if alike:
            torch.testing.assert_close(by_token, by_sequence, rtol=1e-12, atol=0)
        else:
            assert not torch.allclose(by_token, by_sequence, rtol=0.05)


def test_sequences_may_lie_in_any_order() -> None:
    """A packed batch whose completions were laid out otherwise is the padded batch."""
    made = batch(torch.float64)
    policy, sequences = flatten(made["policy"], made["mask"])
    old, reference = (flatten(made[x], made["mask"])[0] for x in ("old", "reference"))
    order = torch.cat([(sequences == i).nonzero()[:, 0] for i in (4, 0, 5, 2, 1, 3)])
    for level in ("token", "sequence", "sequence_token"):
        options = {"loss_type": "grpo", "importance_sampling_level": level, "beta": 0.1}
        padded, _ = flat(made, **options)
        packed, _ = grpo(
            policy[order], old[order], made["advantages"], sequences[order], ref_logprobs=reference[order], **options
        )
        torch.testing.assert_close(packed, padded, rtol=1e-14, atol=0)
        torch.testing.assert_close(
            *(torch.autograd.grad(x, made["policy"], retain_graph=True)[0] for x in (packed, padded)),
            rtol=1e-14,
            atol=1e-16,
        )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_the_derivative(loss_type: str, level: str, kl_estimator: str) -> None:
    made = batch(torch.float64)
    policy, sequences = flatten(made["policy"].detach(), made["mask"])
    old, reference = (flatten(made[x], made["mask"])[0] for x in ("old", "reference"))

    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        return grpo(
            logprobs,
            old,
            made["advantages"],
            sequences,
            loss_type=loss_type,
            importance_sampling_level=level,
            max_completion_length=12,
            delta=1.4,
            beta=0.3,
            ref_logprobs=reference,
            kl_estimator=kl_estimator,
            bias_correction_kl=True,
        )[0]

    assert torch.autograd.gradcheck(loss, policy.requires_grad_())


def test_a_batch_without_trained_tokens_is_a_zero_that_can_be_differentiated() -> None:
    nothing = torch.zeros(0, requires_grad=True)
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
        loss, metrics = grpo(
            nothing,
            nothing.detach(),
            torch.ones(2),
            torch.zeros(0, dtype=torch.int64),
            loss_type=loss_type,
            max_completion_length=4,
            importance_sampling_level="sequence",
        )
        loss.backward()
        assert float(loss) == 0.0
        assert set(map(float, metrics.values())) == {0.0}


@settings(deadline=None, max_examples=100)
@given(
    tokens=st.lists(st.tuples(*[st.floats(-1e4, 0, width=32)] * 3), min_size=1, max_size=4),
    advantage=st.sampled_from([-2.0, 0.0, 2.0]),
    level=st.sampled_from(["token", "sequence", "sequence_token"]),
)
def test_extreme_ratios_give_no_nan(tokens: list[tuple[float, ...]], advantage: float, level: str) -> None:
    policy, old, reference = (torch.tensor(x) for x in zip(*tokens, strict=True))
    policy.requires_grad_()
    loss, metrics = grpo(
        policy,
        old,
        torch.tensor([advantage]),
        torch.zeros(len(tokens), dtype=torch.int64),
        beta=0.1,
        ref_logprobs=reference,
        importance_sampling_level=level,
    )
    loss.backward()
    assert all(torch.isfinite(x).all() for x in [loss, policy.grad, *metrics.values()])


def test_a_long_completions_ratio_keeps_its_digits() -> None:
    """20,480 float32 terms added one after another would be off by some 1e-5 of their sum."""
    generator = torch.Generator().manual_seed(0)
    policy = -torch.rand(20480, generator=generator)
    old = policy - 0.1 * torch.rand(20480, generator=generator)
    exact = math.exp(math.fsum((policy - old).tolist()) / 20480)
    one = torch.zeros(20480, dtype=torch.int64)
    _, metrics = grpo(policy, old, torch.ones(1), one, importance_sampling_level="sequence")
    assert float(metrics["ratio_mean"]) == pytest.approx(exact, rel=3e-7)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
def test_sixteen_bits_are_computed_in_float32(level: str) -> None:
    short, wide = batch(torch.float32), batch(torch.float32)
    for made in (short, wide):
        for name in ("policy", "old", "reference", "advantages"):
            made[name] = made[name].detach().bfloat16().to(torch.bfloat16 if made is short else torch.float32)
    losses = [flat(made, importance_sampling_level=level, beta=0.1)[0] for made in (short, wide)]
    assert losses[0].dtype == torch.float32
    assert torch.equal(*losses)


def test_there_and_back() -> None:
    made = batch(torch.float32)
    values, sequences = flatten(made["policy"], made["mask"])
    assert sequences.bincount().tolist() == LENGTHS
    torch.testing.assert_close(unflatten(values, made["mask"]), made["policy"] * made["mask"], rtol=0, atol=0)
    unflatten(values, made["mask"]).sum().backward()
    assert torch.equal(made["policy"].grad, made["mask"].float())
    with pytest.raises(ValueError, match="30 places for 29 values"):
        unflatten(values[:-1], made["mask"])
    with pytest.raises(ValueError, match=r"one shape \[B, L\], not \[2\] and \[2\]"):
        flatten(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"shape \[N\] and mask of shape \[B, L\], not \[2\] and \[2\]"):
        unflatten(torch.zeros(2), torch.zeros(2))


def test_the_overlong_penalty_is_trls() -> None:
    from trl.rewards import get_soft_overlong_punishment

    lengths = [0, 79, 80, 81, 93, 99, 100, 101, 400]
    for cache in (20, 100, 0):
        theirs = get_soft_overlong_punishment(100, cache)([[1] * n for n in lengths])
        ours = overlong_penalty(torch.tensor(lengths), max_length=100, cache=cache)
        torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float32), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="cache is from 0 to max_length, 100, not 101"):
        overlong_penalty(torch.tensor(lengths), max_length=100, cache=101)


def test_what_is_refused() -> None:
    three, two, where = torch.zeros(3), torch.zeros(2), torch.tensor([0, 0, 1])
    with pytest.raises(ValueError, match=r"advantages are of shape \[B\]"):
        grpo(three, three, torch.zeros(2, 1), where)
    with pytest.raises(
        ValueError, match=r"old_logprobs is of shape \[3\], a value for each token of sequences, not \[2\]"
    ):
        grpo(three, two, two, where)
    with pytest.raises(ValueError, match=r"importance_weights is of shape \[3\].* not \[2\]"):
        grpo(three, three, two, where, importance_weights=two)
    with pytest.raises(ValueError, match="sequences is int64"):
        grpo(three, three, two, where.float())
    with pytest.raises(ValueError, match="the numbers in sequences are from 0 to 0, not from 0 to 1"):
        grpo(three, three, torch.zeros(1), where)
    with pytest.raises(ValueError, match="at least one sequence"):
        grpo(three, three, torch.zeros(0), where)
    with pytest.raises(ValueError, match="ref_logprobs are needed when beta is not 0"):
        grpo(three, three, two, where, beta=0.1)
    with pytest.raises(ValueError, match="needs max_completion_length"):
        grpo(three, three, two, where, loss_type="dr_grpo")
    with pytest.raises(ValueError, match="'grpo', 'bnpo', 'dr_grpo' or 'dapo', not 'ppo'"):
        grpo(three, three, two, where, loss_type="ppo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'token', 'sequence' or 'sequence_token', not 'word'"):
        grpo(three, three, two, where, importance_sampling_level="word")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epsilon_low and epsilon_high are 0 or more"):
        grpo(three, three, two, where, epsilon_low=-0.1)
