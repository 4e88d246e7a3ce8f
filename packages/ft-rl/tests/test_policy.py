"""The policy's head against TRL's own: the same numbers and gradients, of padded and of packed batches."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer import utils
from trl.trainer.utils import add_fused_lm_head

import ft_core as ft
from ft_core import fast
from ft_core.errors import ConfigError
from ft_core.fast import scores
from ft_core.fast.scores import Scorer
from ft_core.training import train
from ft_rl.policy import FIELDS, PolicyForward, put_head
from ft_rl.reference import adapter_off, put_switch, take_switch

RUNS = [(0, 24), (3, 11), (9, 24), (5, 17)]
"""Where the tokens of each row of the batch begin and end: padded on the left, on the right, on both sides."""


def make(tiny_model: Path, *, r: int = 4) -> Any:
    """A model with an adapter that has been trained, in float64."""
    model, _ = ft.load(str(tiny_model), dtype="float32")
    adapted: Any = ft.add_lora(model, r=r)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return adapted.double().train()


def batch(vocabulary: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (len(RUNS), 24), generator=generator)
    mask = torch.zeros_like(ids)
    for row, (begin, end) in enumerate(RUNS):
        mask[row, begin:end] = 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :12] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def ask(model: Any, **options: Any) -> tuple[Any, list[torch.Tensor]]:
    given = batch(model.config.vocab_size)
    out = model(**given, use_cache=False, fused_lm_head=True, **options)
    weights = torch.linspace(-1, 1, given["input_ids"].shape[1] - 1, dtype=torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    return out, list(torch.autograd.grad((out.log_probs * weights).sum(), trained))


@pytest.fixture
def no_trl_head(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whoever comes to TRL's own head from now on is told."""

    def forbid() -> None:
        def never(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("TRL's head was asked")

        monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", never)

    return forbid


@pytest.mark.parametrize("layers", ["transformers", "fast"])
@pytest.mark.parametrize("padding_free", [True, False])
def test_what_trl_reads_is_what_its_own_head_says(
    tiny_model: Path, no_trl_head: Any, layers: str, padding_free: bool
) -> None:
    model = make(tiny_model)
    if layers == "fast":
        fast.enable(model)
    add_fused_lm_head(model.get_base_model(), temperature=0.7, outputs=FIELDS)
    theirs, expected = ask(model)
    head = put_head(model, temperature=0.7, fields=FIELDS)
    assert isinstance(head, PolicyForward)
    assert head.padding_free
    head.padding_free = padding_free
    no_trl_head()
    ours, gradients = ask(model)
    # TRL's head computes in float32: a sum of 32 products and a logarithm, some units in its last place.
    near = {"rtol": 1e-5, "atol": 1e-5}
    seen = ours.label_mask
    for field in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(getattr(ours, field)[seen].float(), getattr(theirs, field)[seen].float(), **near)
        assert not getattr(ours, field)[~seen].any()
    assert torch.equal(ours.is_top1, theirs.is_top1 & seen)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.loss.float(), theirs.loss.float(), **near)


def test_packed_and_padded_are_one(tiny_model: Path) -> None:
    model = make(tiny_model)
    add_fused_lm_head(model.get_base_model(), outputs=FIELDS)
    head = put_head(model, fields=FIELDS)
    assert head is not None
    results = []
    for head.padding_free in (True, False):
        out, gradients = ask(model)
        results.append([out.log_probs, out.entropy, *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shared", [8, 15], ids=["a part of the prompt", "prompt and three tokens of the answer"])
def test_what_rows_share_is_computed_once(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, shared: int) -> None:
    """Rows that begin alike give what they do by themselves, gradients too."""
    model = make(tiny_model)
    fast.enable(model)
    add_fused_lm_head(model.get_base_model(), outputs=FIELDS)
    head = put_head(model, fields=FIELDS)
    assert head is not None
    given = batch(model.config.vocab_size)
    ids, mask = given["input_ids"], given["attention_mask"]
    runs = [slice(int(row.argmax()), int(row.argmax() + row.sum())) for row in mask]
    alike = [(0, 2), (1, 3)]
    for one, other in alike:
        n = min(shared, int(mask[one].sum()) - 1, int(mask[other].sum()) - 1)
        ids[other, runs[other]][:n] = ids[one, runs[one]][:n]
    computed, results = [], []
    states = Scorer.states

    def counted(self: Scorer, **inputs: Any) -> torch.Tensor:
        computed.append(inputs["input_ids"].numel())
        return states(self, **inputs)

    monkeypatch.setattr(Scorer, "states", counted)
    for least in (0.01, 1.0):
        monkeypatch.setattr(scores, "LEAST", least)
        out = model(**given, use_cache=False, fused_lm_head=True)
        weights = torch.linspace(-1, 1, ids.shape[1] - 1, dtype=torch.float64)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad((out.log_probs * weights).sum(), trained)
        results.append([out.log_probs, out.entropy, *gradients])
    assert computed[1] == mask.sum()
    assert computed[0] <= computed[1] - 2 * min(shared, 7)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_frozen_copy_is_the_reference(tiny_model: Path) -> None:
    model = make(tiny_model)
    frozen, _ = ft.load(str(tiny_model), dtype="float32")
    frozen = frozen.double()
    for one in (model.get_base_model(), frozen):
        add_fused_lm_head(one)
    put_head(model)
    given = batch(model.config.vocab_size)
    with torch.no_grad(), adapter_off(model) as known:
        shared = model(**given, fused_lm_head=True).log_probs
    assert known
    separate = frozen(**given, fused_lm_head=True).log_probs.masked_fill(~(given["labels"][:, 1:] != -100), 0)
    seen = (given["labels"][:, 1:] != -100) & given["attention_mask"][:, :-1].bool()
    torch.testing.assert_close(shared[seen].float(), separate[seen].float(), rtol=1e-5, atol=1e-5)


def test_a_quicker_switch_does_what_pefts_does(tiny_model: Path) -> None:
    model = make(tiny_model)
    ids = batch(model.config.vocab_size)["input_ids"][:1]
    on = model(input_ids=ids).logits
    with torch.no_grad(), model.disable_adapter():
        expected = model(input_ids=ids).logits
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    put_switch(model)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert not torch.equal(expected, on)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(model(input_ids=ids).logits, on)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    twin = copy.deepcopy(model)
    with torch.no_grad(), twin.disable_adapter():
        assert torch.equal(twin(input_ids=ids).logits, expected)
        assert torch.equal(model(input_ids=ids).logits, on)
    take_switch(model)
    take_switch(model)
    assert "disable_adapter" not in vars(model)


def test_a_reference_is_rounded_as_the_policy_is(tiny_model: Path) -> None:
    """Where training begins the two are equal bit for bit, by the fast layers too, in whatever type."""
    model, _ = ft.load(str(tiny_model), dtype="bfloat16")
    adapted: Any = ft.add_lora(model, r=8).train()
    fast.enable(adapted)
    add_fused_lm_head(adapted.get_base_model())
    put_head(adapted)
    given = batch(adapted.config.vocab_size)
    with torch.autocast("cpu", torch.bfloat16):
        policy = adapted(**given, fused_lm_head=True).log_probs
        with torch.no_grad(), adapter_off(adapted):
            reference = adapted(**given, fused_lm_head=True).log_probs
    assert torch.equal(policy.detach(), reference)
    assert all(not layer.disable_adapters for layer in adapted.modules() if hasattr(layer, "lora_A"))


def test_other_calls_are_the_models_own(tiny_model: Path) -> None:
    model = make(tiny_model)
    given = batch(model.config.vocab_size)
    plain = model(**given).loss
    add_fused_lm_head(model.get_base_model())
    put_head(model)
    assert torch.equal(model(**given).loss, plain)
    ids = given["input_ids"][:1]
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3
    with pytest.raises(ValueError, match=r"unknown fields \['logits'\]; allowed are log_probs, entropy, mean_logits"):
        put_head(model, fields=("logits",))


@pytest.mark.parametrize("method", ["ppo", "orpo"])
@pytest.mark.parametrize(
    ("changes", "lora", "why"),
    [
        ({"attention_dropout": 0.1}, {}, "its attention has a dropout of 0.1"),
        ({}, {"modules_to_save": ["lm_head"]}, r"its head 'lm_head' is trained in full \(lora.modules_to_save\)"),
    ],
)
def test_why_a_method_cannot_have_a_model(
    toy: Any, tiny_model: Path, tmp_path: Path, method: str, changes: dict[str, Any], lora: dict[str, Any], why: str
) -> None:
    """The family is known in either case, and was said not to be."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | changes))
    rows = toy.rows(8, seed=1)
    values = {
        "model": str(base),
        "method": method,
        "data": str(toy.write_rows(tmp_path / "rows.jsonl", rows)),
        "max_length": 32,
        "lora": {"r": 4, **lora},
        "training": {"max_steps": 1, "batch_size": 2, "gradient_accumulation": 1},
        "output": str(tmp_path / "run"),
    }
    values |= {"rewards": ["format"], "ppo": {"max_completion_length": 4}} if method == "ppo" else {}
    said = f"method: {method} needs ft's layers, which cannot compute this model: {why}"
    with pytest.raises(ConfigError, match=said):
        train(values, say=lambda line: None)
