"""Plans with frozen weights in the host's memory: when they are made, and what they count."""

from __future__ import annotations

from typing import Any

from ft_core.planning.show import line, table

GIB = 2**30
LAYERS = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096) // 2
"""Bytes of the layers' weights of Llama 3.1 8B in NF4, without their scales."""
ENDS = 2 * 2 * 128256 * 4096
"""Bytes of its embedding and its head."""


def test_weights_are_lent_where_that_is_faster(planned: Any) -> None:
    plan = planned("H200", 2, 4096, quantization="nf4", memory="10GiB")
    assert plan.fits
    assert plan.peak.lent == LAYERS + ENDS
    assert plan.as_json()["memory"]["lent"] == LAYERS + ENDS
    assert plan.as_json()["memory"]["host"] >= LAYERS + ENDS
    own = plan.planner
    own.lends = False
    before = own.peak(plan.config, plan.card)
    assert not before.lent
    assert own.times(plan.config, plan.card, before).step > plan.times.step
    assert "9.1 GiB" not in line(plan)
    assert f"{(LAYERS + ENDS) / GIB:.1f} GiB of weights in the host's memory" in line(plan)
    assert f"weights        {(LAYERS + ENDS) / GIB:.2f} GiB of them in the host's memory" in table(plan)


def test_what_is_there_of_lent_weights(planned: Any) -> None:
    """Two layers' at each time, and the head's where logits are made."""
    plan = planned("H200", 2, 4096, quantization="nf4", memory="10GiB")
    own = plan.planner
    step = own._step(plan.config, plan.card, None, "offload-input", "adamw_8bit")
    from dataclasses import replace

    from ft_core.planning.peak import peak_of

    outline = own.outline(plan.config)
    here, lent = (peak_of(own.blueprint, outline, replace(step, lends=lends)) for lends in (False, True))
    assert here.parts["weights"] - lent.parts["weights"] == LAYERS + ENDS
    assert lent.parts["weights under way"] == 2 * (LAYERS // 32)
    assert here.moment == lent.moment == "layer" or lent.moment in ("head", "forward")
    assert lent.total < here.total - LAYERS - ENDS / 2 + 2 * LAYERS / 32 + GIB / 100


def test_weights_stay_where_all_is_kept(planned: Any) -> None:
    assert not planned("H200", 2, 4096, quantization="nf4").peak.lent


def test_weights_stay_where_they_cannot_be_lent(planned: Any) -> None:
    given: dict[str, Any] = {"quantization": "nf4", "memory": "10GiB"}
    assert planned("H200", 2, 4096, **given).peak.lent
    assert not planned("H200", 2, 4096, **given, host=4 * GIB).peak.lent
    assert not planned("H200", 2, 4096, **given, activations="recompute").peak.lent
    assert not planned("H200", 1, 512, **{**given, "memory": "5GiB"}).peak.lent  # too little to load them
    pairs = planned("H200", 1, 4096, **given, method="dpo")
    assert not pairs.peak.lent
    whole = planned("H200", 2, 4096, lora=None, memory="100GiB")
    assert not whole.peak.lent
