"""KTO's losses and its KL estimate against TRL's trainer, values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_rl.objectives import flatten, kto, kto_kl, sequence_sums


@pytest.fixture(scope="module")
def trainer(trl: Any) -> Any:
    from trl import KTOConfig, KTOTrainer

    rows = {"prompt": ["the sun", "cats"], "completion": ["is round", "sleep"], "label": [True, False]}
    # A batch of one would leave the KL estimate without a mismatched answer, and TRL refuses it.
    return trl(KTOTrainer, KTOConfig, rows, {"per_device_train_batch_size": 2})


@pytest.mark.parametrize("moved", [-0.4, 0.4], ids=["clamped", "moved"])
@pytest.mark.parametrize("labels", ["mixed", "all good", "all bad"])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_trls_trainer_computes_the_same(
    trainer: Any, lab: Any, loss_type: str, labels: str, moved: float, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    lengths, others = [(2, 5), (1, 9), (4, 1), (3, 3), (2, 8), (5, 4)], [(2, 7), (1, 3), (3, 2), (2, 2), (5, 5), (1, 1)]
    desirable = {
        "mixed": torch.tensor([True, False, False, True, False, True]),
        "all good": torch.ones(6, dtype=torch.bool),
        "all bad": torch.zeros(6, dtype=torch.bool),
    }[labels]
    attended, trained = lab.completion_masks(lengths, 11)
    kl_attended, kl_trained = lab.completion_masks(others, 10)
    table = (-2 * torch.rand(6, 10, dtype=dtype)).requires_grad_()
    kl_table = -2 * torch.rand(6, 9, dtype=dtype)
    reference = (-2 * torch.rand(6, 10, dtype=dtype) * trained[:, 1:]).sum(1)
    kl_sums = (kl_table * kl_trained[:, 1:]).sum(1)
    ref_kl = kl_sums - moved + 0.1 * torch.randn(6, dtype=dtype)

    trainer.precompute_ref_logps, trainer.beta, trainer.loss_type = True, 0.3, loss_type
    trainer.calculate_KL = loss_type == "kto"
    trainer.desirable_weight, trainer.undesirable_weight = 1.2, 0.7
    trainer._metrics["train"].clear()
    trainer.model.train()
    inputs = {
        "input_ids": torch.ones(6, 11, dtype=torch.long),
        "attention_mask": attended,
        "completion_mask": trained,
        "KL_input_ids": torch.ones(6, 10, dtype=torch.long),
        "KL_attention_mask": kl_attended,
        "KL_completion_mask": kl_trained,
        "label": desirable,
        "ref_logps": reference,
        "ref_KL_logps": ref_kl,
    }
    tables = [kl_table, table] if loss_type == "kto" else [table]
    theirs = trainer._compute_loss(lab.Scored(*tables), inputs, False)

    sums = sequence_sums(*flatten(table, trained[:, 1:]), 6)
    reference_point = kto_kl(kl_sums, ref_kl)
    assert bool(reference_point > 0) == (moved > 0)
    ours, metrics = kto(
        sums,
        reference,
        desirable,
        reference_point if loss_type == "kto" else None,
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.7,
        loss_type=loss_type,
    )
    lab.assert_same(ours, theirs, [table], tolerance)
    logged = trainer._metrics["train"]
    assert float(metrics["kl"]) == pytest.approx(logged["kl"][-1], rel=1e-5)
    for side, count in (("chosen", desirable.sum()), ("rejected", (~desirable).sum())):
        for ours_name, theirs_name in ((f"{side}_reward", f"rewards/{side}"), (f"{side}_logprob", f"logps/{side}")):
            if count:
                assert float(metrics[ours_name]) == pytest.approx(logged[theirs_name][-1], rel=1e-5)
            else:
                assert math.isnan(metrics[ours_name])
    if labels == "mixed":
        assert float(metrics["margin"]) == pytest.approx(logged["rewards/margins"][-1], rel=1e-5)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_the_derivative(loss_type: str) -> None:
    torch.manual_seed(1)
    policy = (5 * torch.randn(6, dtype=torch.float64)).requires_grad_()
    reference, kl = torch.randn(6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    desirable = torch.tensor([True, False, True, True, False, False])

    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        return kto(logprobs, reference, desirable, kl, beta=0.2, undesirable_weight=1.3, loss_type=loss_type)[0]

    assert torch.autograd.gradcheck(loss, policy)


def test_the_reference_point_has_no_gradient() -> None:
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    assert not kto_kl(policy, torch.tensor([-3.0, -3.0])).requires_grad
    point = torch.tensor(1.0, requires_grad=True)
    loss, _ = kto(policy, torch.zeros(2), torch.tensor([True, False]), point, beta=0.1)
    assert torch.autograd.grad(loss, [policy, point], allow_unused=True)[1] is None


@settings(deadline=None, max_examples=50)
@given(sums=st.lists(st.floats(-1e5, 0, width=32), min_size=4, max_size=4), desirable=st.booleans())
def test_extreme_log_probabilities_stay_finite(sums: list[float], desirable: bool) -> None:
    policy, reference, kl_policy, kl_reference = (torch.tensor([x]) for x in sums)
    policy.requires_grad_()
    loss, _ = kto(policy, reference, torch.tensor([desirable]), kto_kl(kl_policy, kl_reference), beta=0.1)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(policy.grad).all()


def test_what_is_refused() -> None:
    two, good = torch.zeros(2), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"logprobs and ref_logprobs are of shape \[B\], B > 0, not \[2\] and \[3\]"):
        kto(two, torch.zeros(3), good, torch.tensor(0.0), beta=0.1)
    with pytest.raises(ValueError, match=r"desirable is bool of shape \[2\], not torch.int64 of shape \[2\]"):
        kto(two, two, good.long(), torch.tensor(0.0), beta=0.1)
    with pytest.raises(ValueError, match="beta is above 0, not -1"):
        kto(two, two, good, torch.tensor(0.0), beta=-1)
    with pytest.raises(ValueError, match="needs kl, the scalar that kto_kl gives"):
        kto(two, two, good, None, beta=0.1)
    with pytest.raises(ValueError, match="'kto' or 'apo_zero_unpaired', not 'dpo'"):
        kto(two, two, good, two[0], beta=0.1, loss_type="dpo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"kl_logprobs and ref_kl_logprobs are of shape \[B\], B > 0"):
        kto_kl(torch.zeros(0), torch.zeros(0))
