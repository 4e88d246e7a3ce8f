"""Group advantages and the sampler's weights against what TRL's trainer makes of a batch of rollouts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ft_rl.objectives import flatten, group_advantages, sampler_weights

REWARDS = {
    "mixed": [0.0, 1.0, 0.25, -2.0, 0.5, 0.5, 3.0, 0.125],
    "one group alike": [0.3, 0.3, 0.3, 0.3, 1.0, 0.0, 0.0, 2.0],
    "all alike": [0.1] * 8,
    "some missing": [1.0, None, 0.5, 0.0, None, None, 2.0, None],
    "all missing": [None] * 8,
}
COMPLETIONS = [[7, 8, 1], [9, 10, 11, 12, 1], [6, 1], [13, 14, 15, 1], [16, 1], [8, 8, 8, 8, 8, 1], [1], [20, 21, 1]]


@pytest.fixture(scope="module")
def trainer(trl: Any) -> Any:
    """TRL's trainer; the given answers and sampler's log-probabilities stand in for generation."""
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        return list(made.rewards_given)

    options = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 12}
    made = trl(GRPOTrainer, GRPOConfig, {"prompt": ["the sun", "cats"]}, options, reward_funcs=reward)
    made.sampled = None

    def generate(prompts: list[str]) -> tuple[Any, ...]:
        texts = ["x"] * len(COMPLETIONS)
        return [[6, 7]] * len(COMPLETIONS), COMPLETIONS, None, texts, made.sampled, {}, None, None

    made._generate = generate
    made.model.train()
    return made


def rollout(trainer: Any) -> dict[str, torch.Tensor]:
    trainer._metrics["train"].clear()
    prompts = [{"prompt": "the sun"}] * 4 + [{"prompt": "cats"}] * 4
    result: dict[str, torch.Tensor] = trainer._generate_and_score_completions(prompts)
    return result


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("name", REWARDS)
def test_trls_trainer_computes_the_same(trainer: Any, name: str, scale: str) -> None:
    trainer.rewards_given, trainer.scale_rewards, trainer.use_vllm, trainer.sampled = REWARDS[name], scale, False, None
    theirs = rollout(trainer)["advantages"]
    rewards = torch.tensor([math.nan if r is None else r for r in REWARDS[name]])
    ours, metrics = group_advantages(rewards, 4, scale=scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    logged = trainer._metrics["train"]
    assert float(metrics["reward_mean"]) == pytest.approx(logged["reward"][-1], rel=1e-6, nan_ok=True)
    assert float(metrics["reward_std"]) == pytest.approx(logged["reward_std"][-1], rel=1e-6, abs=1e-6, nan_ok=True)
    assert float(metrics["zero_std"]) == pytest.approx(logged["frac_reward_zero_std"][-1], abs=1e-6)


def test_by_hand() -> None:
    """A group of 0, 1: mean 1/2, unbiased deviation 1/sqrt(2)."""
    advantages, _ = group_advantages(torch.tensor([0.0, 1.0, 5.0, 5.0], dtype=torch.float64), 2)
    one = 0.5 / (math.sqrt(0.5) + 1e-4)
    torch.testing.assert_close(advantages, torch.tensor([-one, one, 0, 0], dtype=torch.float64), rtol=1e-15, atol=0)


def test_one_completion_a_prompt_has_no_advantage() -> None:
    for scale in ("group", "batch", "none"):
        advantages, metrics = group_advantages(torch.tensor([1.0, 3.0]), 1, scale=scale)
        assert advantages.tolist() == [0.0, 0.0]
        assert float(metrics["reward_mean"]) == 2.0


def test_an_infinite_reward_harms_no_other() -> None:
    infinite, _ = group_advantages(torch.tensor([1.0, 3.0, math.inf]), 3)
    missing, _ = group_advantages(torch.tensor([1.0, 3.0, math.nan]), 3)
    assert torch.equal(infinite, missing)
    assert infinite[2] == 0.0
    assert infinite[1] > 0.5


def test_advantages_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"shape \[G \* 4\], num_generations a prompt, G > 0, not \[6\]"):
        group_advantages(torch.zeros(6), 4)
    with pytest.raises(ValueError, match="G > 0"):
        group_advantages(torch.zeros(0), 4)
    with pytest.raises(ValueError, match="scale is 'group', 'batch' or 'none', not 'std'"):
        group_advantages(torch.zeros(4), 4, scale="std")  # type: ignore[arg-type]


@pytest.mark.parametrize("bounds", [(None, 1.4), (0.7, None), (0.8, 1.3)])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_samplers_weights_are_trls(
    trainer: Any, level: str, mode: str, bounds: tuple[float | None, float | None]
) -> None:
    trainer.rewards_given, trainer.scale_rewards = REWARDS["mixed"], "group"
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    trainer.vllm_importance_sampling_mode = f"{level}_{mode}"
    trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = bounds
    generator = torch.Generator().manual_seed(0)
    # The tiny model gives each of its 35 words about 1/35; the sampler's drift from that is of either sign.
    trainer.sampled = [
        (-math.log(35) + 0.3 * torch.randn(len(ids), generator=generator)).tolist() for ids in COMPLETIONS
    ]
    trainer.sampled[1][2] = None  # a log-probability the engine did not give
    result = rollout(trainer)

    mask = result["completion_mask"]
    model, sequences = flatten(result["old_per_token_logps"], mask)
    sampler, _ = flatten(result["sampling_per_token_logps"], mask)
    assert int(sampler.isnan().sum()) == 1
    floor, cap = bounds
    weights, metrics = sampler_weights(
        model, sampler, sequences, num_sequences=8, level=level, mode=mode, cap=cap, floor=floor
    )
    theirs, _ = flatten(result["importance_sampling_ratio"].expand_as(mask), mask)
    torch.testing.assert_close(weights, theirs, rtol=1e-6, atol=0)
    assert len(set(weights.tolist())) > 2
    logged = {name.removeprefix("sampling/"): values[-1] for name, values in trainer._metrics["train"].items()}
    for ours_name, theirs_name in {
        "gap_mean": "sampling_logp_difference/mean",
        "gap_max": "sampling_logp_difference/max",
        "ratio_min": "importance_sampling_ratio/min",
        "ratio_mean": "importance_sampling_ratio/mean",
        "ratio_max": "importance_sampling_ratio/max",
    }.items():
        assert float(metrics[ours_name]) == pytest.approx(logged[theirs_name], rel=1e-6)


def test_equal_log_probabilities_leave_the_loss_as_it_is() -> None:
    model, sequences = -torch.rand(7), torch.tensor([0, 0, 0, 2, 2, 2, 2])
    for level in ("token", "sequence"):
        weights, metrics = sampler_weights(model, model, sequences, num_sequences=3, level=level)
        assert weights.tolist() == [1.0] * 7
        assert (float(metrics["gap_max"]), float(metrics["ratio_min"]), float(metrics["ratio_max"])) == (0.0, 1.0, 1.0)


def test_an_engine_far_off_gives_no_nan() -> None:
    model, sampler = torch.tensor([-1e4, -1.0, -2.0]), torch.tensor([-1.0, -1e4, -torch.inf])
    for level in ("token", "sequence"):
        for mode in ("truncate", "mask"):
            weights, _ = sampler_weights(
                model, sampler, torch.tensor([0, 1, 1]), num_sequences=2, level=level, mode=mode
            )
            assert weights.tolist() == ([0.0, 3.0, 3.0] if mode == "truncate" else [0.0, 0.0, 0.0])


def test_no_tokens_no_gap() -> None:
    nothing = torch.zeros(0)
    weights, metrics = sampler_weights(nothing, nothing, nothing.long(), num_sequences=2, level="token")
    assert weights.shape == (0,)
    assert set(map(float, metrics.values())) == {0.0}


def test_weights_that_cannot_be() -> None:
    two, where = torch.zeros(2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"sampler_logprobs is of shape \[2\]"):
        sampler_weights(two, torch.zeros(3), where, num_sequences=2)
    with pytest.raises(ValueError, match="level is 'token' or 'sequence', not 'word'"):
        sampler_weights(two, two, where, num_sequences=2, level="word")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode is 'truncate' or 'mask', not 'drop'"):
        sampler_weights(two, two, where, num_sequences=2, mode="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cap or floor must be given"):
        sampler_weights(two, two, where, num_sequences=2, cap=None)
    with pytest.raises(ValueError, match="floor is below cap, not 3 with a cap of 2"):
        sampler_weights(two, two, where, num_sequences=2, cap=2, floor=3)
