"""DPO's losses against TRL's trainer, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_rl.objectives import dpo, flatten, sequence_lengths, sequence_sums

LOSSES = ["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"]


@pytest.fixture(scope="module")
def trainer(trl: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    rows = {"prompt": ["the sun"], "chosen": ["is round"], "rejected": ["sleep"]}
    return trl(DPOTrainer, DPOConfig, rows, {})


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_trls_trainer_computes_the_same(
    trainer: Any, lab: Any, loss_type: str, beta: float, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    lengths = [(2, 5), (1, 9), (4, 1), (3, 3), (2, 8), (5, 4), (1, 2), (3, 7)]  # four chosen, four rejected
    attended, trained = lab.completion_masks(lengths, 12)
    table = (-2 * torch.rand(8, 11, dtype=dtype)).requires_grad_()
    reference = -2 * torch.rand(8, 11, dtype=dtype) * trained[:, 1:]
    ref_chosen, ref_rejected = reference.sum(1).chunk(2)

    trainer.precompute_ref_logps, trainer.beta = True, beta
    trainer.loss_types, trainer.loss_weights, trainer.label_smoothing = [loss_type], [1.0], 0.2
    trainer._metrics["train"].clear()
    inputs = {
        "input_ids": torch.ones(8, 12, dtype=torch.long),
        "attention_mask": attended,
        "completion_mask": trained,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    trainer.model.train()
    theirs = trainer._compute_loss(lab.Scored(table), inputs, False)

    tokens, sequences = flatten(table, trained[:, 1:])
    chosen, rejected = sequence_sums(tokens, sequences, 8).chunk(2)
    chosen_lengths, rejected_lengths = sequence_lengths(sequences, 8).chunk(2)
    ours, metrics = dpo(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=0.2 if loss_type == "robust" else 0.0,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    lab.assert_same(ours, theirs, [table], tolerance)
    for ours_name, theirs_name in {
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
        "chosen_logprob": "logps/chosen",
        "rejected_logprob": "logps/rejected",
    }.items():
        assert float(metrics[ours_name]) == pytest.approx(trainer._metrics["train"][theirs_name][-1], rel=1e-5)
        assert not metrics[ours_name].requires_grad


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_derivative(loss_type: str) -> None:
    torch.manual_seed(1)
    policy = [(5 * torch.randn(4, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    reference = [torch.randn(4, dtype=torch.float64) for _ in range(2)]
    options = {"chosen_lengths": torch.arange(4), "rejected_lengths": torch.tensor([3, 1, 9, 2])}  # a 0 counts as 1
    smoothing = 0.3 if loss_type == "robust" else 0.0

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return dpo(chosen, rejected, *reference, beta=0.3, loss_type=loss_type, label_smoothing=smoothing, **options)[0]

    assert torch.autograd.gradcheck(loss, policy)


@settings(deadline=None, max_examples=50)
@given(
    loss_type=st.sampled_from(LOSSES),
    sums=st.lists(st.floats(-1e5, 0, width=32), min_size=4, max_size=4),
)
def test_extreme_log_probabilities_stay_finite(loss_type: str, sums: list[float]) -> None:
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor([x], requires_grad=True) for x in sums)
    one = torch.ones(1)
    loss, metrics = dpo(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        beta=0.1,
        loss_type=loss_type,
        chosen_lengths=one,
        rejected_lengths=one,
    )
    loss.backward()
    assert all(torch.isfinite(x).all() for x in [loss, chosen.grad, rejected.grad, *metrics.values()])


def test_sixteen_bits_are_computed_in_float32() -> None:
    sums = [torch.tensor([-20.0, -31.5], dtype=torch.bfloat16) + i for i in range(4)]
    loss, _ = dpo(*sums, beta=0.1)
    assert loss.dtype == torch.float32
    assert loss == dpo(*(x.float() for x in sums), beta=0.1)[0]


def test_what_is_refused() -> None:
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ValueError, match=r"one shape \[B\], B > 0, not chosen \[2\], rejected \[3\]"):
        dpo(two, three, two, two, beta=0.1)
    with pytest.raises(ValueError, match="B > 0"):
        dpo(*[torch.zeros(0)] * 4, beta=0.1)
    with pytest.raises(ValueError, match="beta is above 0, not 0"):
        dpo(two, two, two, two, beta=0)
    with pytest.raises(ValueError, match="label_smoothing is for loss_type 'robust' alone"):
        dpo(two, two, two, two, beta=0.1, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing is from 0 to below 0\.5, not 0\.5"):
        dpo(two, two, two, two, beta=0.1, loss_type="robust", label_smoothing=0.5)
    with pytest.raises(ValueError, match="loss_type 'ipo' needs chosen_lengths"):
        dpo(two, two, two, two, beta=0.1, loss_type="ipo")
    with pytest.raises(ValueError, match=r"rejected_lengths is of shape \[2\]"):
        dpo(two, two, two, two, beta=0.1, loss_type="ipo", chosen_lengths=two, rejected_lengths=three)
    with pytest.raises(ValueError, match="or 'sigmoid_norm', not 'kto'"):
        dpo(two, two, two, two, beta=0.1, loss_type="kto")  # type: ignore[arg-type]
