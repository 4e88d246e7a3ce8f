"""Whisper's fast layers compute what transformers' own do: on the CPU by the kernels' references, on a GPU by them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import WhisperConfig, WhisperForConditionalGeneration

from ft_core.fast import NotFast
from ft_core.fast.check import bound
from ft_core.fast.verify import verify
from ft_speech.fast.choosing import Chosen
from ft_speech.fast.whisper import enable, path_of

TINY: dict[str, Any] = {
    "vocab_size": 200, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 20,
    "max_source_positions": 50, "max_target_positions": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
LIMIT = bound(torch.float32, 4, 150)
"""What rounding explains in float32: four layers, sums over 3 x 50 states."""


def whisper(**changed: Any) -> Any:
    torch.manual_seed(0)
    return WhisperForConditionalGeneration(WhisperConfig(**{**TINY, **changed})).train()


def adapted(model: Any, targets: Any = "all-linear", dropout: float = 0.0) -> Any:
    """With an adapter that is not zero, as after some steps."""
    found = get_peft_model(model, LoraConfig(r=4, target_modules=targets, lora_dropout=dropout))
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return found.train()


def batch(rows: int = 3) -> dict[str, Any]:
    """Noise, and random tokens: one sequence is shorter than the others."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(4, 200, (rows, 12), generator=generator)
    labels[1, 8:] = -100
    return {"input_features": torch.randn(rows, 20, 100, generator=generator), "labels": labels}


def step(model: Any, given: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one: tuple[float, dict[str, torch.Tensor]], two: tuple[float, dict[str, torch.Tensor]], limit: float) -> None:
    assert one[0] == pytest.approx(two[0], rel=limit)
    assert one[1].keys() == two[1].keys()
    largest = max(float(g.norm()) for g in one[1].values())
    for name, grad in one[1].items():
        assert float((grad - two[1][name]).norm()) <= limit * max(float(grad.norm()), 1e-3 * largest), name


def frozen_encoder(model: Any) -> Any:
    found = adapted(model, r".*decoder.*\.(q_proj|v_proj|fc1)")
    assert not any("encoder.layers" in name for name, p in found.named_parameters() if p.requires_grad)
    return found


MADE: dict[str, Callable[[Any], Any]] = {
    "lora": adapted,
    "some": lambda model: adapted(model, ["q_proj", "v_proj"]),
    "frozen-encoder": frozen_encoder,
    "full": lambda model: model,
}


@pytest.mark.parametrize("choice", ["keep", "recompute", "offload"])
@pytest.mark.parametrize("made", MADE)
def test_loss_and_gradients_are_transformers(made: str, choice: Any) -> None:
    model = MADE[made](whisper())
    plain = step(model, batch())
    path = enable(model)
    path.choose(choice)
    path.host.least = 1
    same(plain, step(model, batch()), LIMIT)
    moved = any(pool.bytes for pool in path.host.pools.values())
    assert moved == (choice == "offload")


def test_batches_that_cannot_be_divided_alike() -> None:
    model = adapted(whisper())
    path = enable(model)
    path.choose("offload")
    for rows in (8, 3, 5, 2):
        path.on = False
        plain = step(model, batch(rows))
        path.on = True
        same(plain, step(model, batch(rows)), LIMIT)
    assert path.chosen.pieces == 8


def test_by_the_number_of_tokens_and_by_given_prompts() -> None:
    model = adapted(whisper())
    given = batch()
    given["decoder_input_ids"] = torch.randint(4, 200, (3, 12), generator=torch.Generator().manual_seed(2))
    plain = model(**given).loss
    counted = int((given["labels"] != -100).sum())
    enable(model)
    assert model(**given).loss.item() == pytest.approx(plain.item(), rel=LIMIT)
    twice = model(**given, num_items_in_batch=2 * counted).loss
    assert twice.item() == pytest.approx(plain.item() / 2, rel=LIMIT)


def test_no_logits_are_made_in_training_alone() -> None:
    model = whisper()
    enable(model)
    assert model(**batch()).logits is None
    model.eval()
    assert model(**batch()).logits.shape == (3, 12, 200)


def test_a_batch_in_parts_is_the_batch() -> None:
    model = adapted(whisper())
    given = batch(rows=4)
    plain = step(model, given)
    path = enable(model)
    path.choose("recompute")
    path.plan(given["input_features"], 32)
    path.chosen = Chosen({id(layer): "recompute" for layer in path.layers}, pieces=4)
    same(plain, step(model, given), LIMIT)


def test_dropout_of_adapters_is_drawn_again_as_it_was() -> None:
    model = adapted(whisper(), dropout=0.3)
    path = enable(model)
    found = []
    for choice in ("keep", "recompute"):
        path.choose(choice)  # type: ignore[arg-type]
        torch.manual_seed(5)
        found.append(step(model, batch()))
    same(found[0], found[1], LIMIT)
    torch.manual_seed(6)
    assert step(model, batch())[0] != pytest.approx(found[0][0], rel=1e-4)  # it is drawn at all


def test_generating_and_taking_them_out() -> None:
    model = adapted(whisper()).eval()
    features = batch()["input_features"]
    path = enable(model)
    assert enable(model) is path
    assert path_of(model) is path
    fast = model.generate(input_features=features, max_new_tokens=8, do_sample=False)
    path.undo()
    assert path_of(model) is None
    assert "forward" not in vars(model.get_base_model().model.encoder.layers[0])
    assert torch.equal(fast, model.generate(input_features=features, max_new_tokens=8, do_sample=False))


def test_a_layer_that_somebody_listens_to_is_called() -> None:
    model = whisper()
    plain = step(model, batch())
    enable(model)
    heard: list[str] = []
    for name in ("encoder", "decoder"):
        layer = getattr(model.model, name).layers[0]
        layer.fc1.register_forward_hook(lambda *_, name=name: heard.append(name))
    same(plain, step(model, batch()), LIMIT)
    assert heard == ["encoder", "decoder"]


def test_what_a_measurement_makes_can_be_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights get room for updates when they are first used, which may be in inference mode."""
    monkeypatch.setattr("ft_core.fast.wide._can_move", lambda weight: not weight.requires_grad)
    model = adapted(whisper())
    plain = step(model, batch())
    path = enable(model)
    with torch.inference_mode():
        model.eval()(**batch())
    same(plain, step(model.train(), batch()), LIMIT)
    path.on = False
    same(plain, step(model, batch()), LIMIT)


def test_a_copy_has_layers_of_its_own() -> None:
    model = whisper()
    path = enable(model)
    other = copy.deepcopy(model)
    copied = path_of(other)
    assert copied is not None
    assert copied is not path
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert other(**batch()).loss.item() != pytest.approx(model(**batch()).loss.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("changed", "why"),
    [({"dropout": 0.1}, "dropout 0.1"), ({"activation_function": "relu"}, "its activation is relu")],
)
def test_what_they_do_not_compute_is_refused(changed: dict[str, Any], why: str) -> None:
    with pytest.raises(NotFast, match=why):
        enable(whisper(**changed))


def against_float64(device: str, dtype: torch.dtype) -> None:
    given = [{name: value.to(device) for name, value in batch().items()}]
    ledger = verify(lambda exact: whisper().to(device), name="tiny", dtype=dtype, inputs=given, fast=enable)
    assert not ledger.mismatches
    assert ledger.family == "whisper"


def test_errors_against_float64_are_no_larger() -> None:
    against_float64("cpu", torch.float32)


@pytest.mark.gpu
def test_errors_against_float64_on_a_gpu() -> None:
    against_float64("cuda", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("choice", ["keep", "recompute", "offload"])
def test_recorded_steps_are_the_steps(choice: Any) -> None:
    """By the same kernels in the same order: bit for bit, for batches of other numbers of one shape."""
    model = adapted(whisper(d_model=128, encoder_ffn_dim=256, decoder_ffn_dim=256).cuda().bfloat16())
    path = enable(model)
    path.choose(choice)
    path.host.least = 1

    def taken(seed: int) -> tuple[float, dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(8, 20, 100, generator=generator).cuda()
        labels = torch.randint(4, 200, (8, 12 + seed % 3), generator=generator).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            return step(model, {"input_features": features, "labels": labels})

    path.graphs.on = False
    expected = [taken(seed) for seed in range(8)]
    path.graphs.on = True
    found = [taken(seed) for seed in range(8)]
    assert path.graphs.replays, path.graphs.reason
    for one, two in zip(expected, found, strict=True):
        assert one[0] == two[0]
        assert all(torch.equal(grad, two[1][name]) for name, grad in one[1].items())
