"""The language side of every family computes by the fast layers what transformers' own compute, with images in it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

import ft_kernels
from ft_core import fast
from ft_core.data.collating import LENGTHS
from ft_core.fast.find import unwrapped
from ft_core.fast.verify import verify

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import FAMILIES, SEEN, START, TEXT, VOCABULARY, make

SHARE = 5e-5
"""fp32, a few hundred sums in each of some ten layers, rounded at 6e-8: of each, and of their gradients."""


def step(model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradient of every parameter that has one.

    transformers' own layers have no use for the lengths, and keep documents apart only where no cache is made.
    """
    path = fast.fast_path_of(model)
    if path is None or not path.on:
        given = {name: value for name, value in batch.items() if name != LENGTHS or path is not None}
        given["use_cache"] = False
    else:
        given = dict(batch)
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: Any, two: Any, share: float = SHARE) -> None:
    assert abs(one[0] - two[0]) <= share * abs(two[0])
    assert one[1].keys() == two[1].keys()
    largest = max(g.norm() for g in two[1].values())
    for name, gradient in two[1].items():
        # Some gradients are nothing but rounding: that of k's bias moves no score.
        assert (one[1][name] - gradient).norm() <= share * max(gradient.norm(), 1e-3 * largest), name


@contextmanager
def attentions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The plans that packed attention is called with: the proof that the fast layers compute."""
    plans: list[Any] = []
    own = ft_kernels.packed_attention

    def spy(*args: Any, **keywords: Any) -> Tensor:
        plans.append(keywords.get("plan"))
        return own(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(ft_kernels, "packed_attention", spy)
        yield plans


def batches(family: str, model: Any) -> dict[str, dict[str, Any]]:
    """Images alone and beside text, padded, and packed into a row."""
    made, plain = FAMILIES[family], unwrapped(model)
    documents = [made.document(plain, 1, 2), made.document(plain, 2, 0), made.document(plain, 3, 1, 7)]
    return {
        "one": documents[0],
        "text": documents[1],
        "padded": made.padded([documents[0], documents[2]]),
        "packed": made.packed(plain, [documents[0], documents[2]]),
        "mixed": made.packed(plain, documents),
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trained", ["lora", "all", "projector"])
def test_losses_and_gradients_are_those_of_transformers_layers(family, trained, monkeypatch):
    model = make(family, trained)
    forms = batches(family, model)
    if trained == "projector":
        del forms["text"]  # nothing of it is trained
    plain = {form: step(model, batch) for form, batch in forms.items()}
    path = fast.enable(model)
    if FAMILIES[family].packs_wrongly:
        path.on = False
        plain |= {form: step(model, batch) for form, batch in forms.items() if LENGTHS in batch}
        path.on = True
    for form, batch in forms.items():
        with attentions(monkeypatch) as plans:
            found = step(model, batch)
        assert len(plans) == 3, form  # one for each layer
        if LENGTHS in batch:
            assert all(list(plan.lengths) == batch[LENGTHS] for plan in plans)
        assert_same(found, plain[form])
    towers = [name for name in plain["one"][1] if FAMILIES[family].tower in name]
    projectors = [name for name in plain["one"][1] if FAMILIES[family].projector in name]
    assert bool(towers) == (trained != "projector")
    # Gemma's projector is a bare matrix, which LoRA does not reach.
    assert bool(projectors) == ((family, trained) != ("gemma3", "lora"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_in_a_row_is_as_it_is_alone(family):
    model = make(family, "lora")
    made, plain = FAMILIES[family], unwrapped(model)
    documents = [made.document(plain, 1, 1), made.document(plain, 2, 2, 12), made.document(plain, 3, 0)]
    fast.enable(model)
    counts = [int((each["labels"][:, 1:] != -100).sum()) for each in documents]
    alone = [step(model, each) for each in documents]
    loss = sum(n * each[0] for n, each in zip(counts, alone, strict=True)) / sum(counts)
    # Every document alone: a text's alone has no gradient for the tower.
    gradients = {
        name: sum(n * each[1][name] for n, each in zip(counts, alone, strict=True) if name in each[1]) / sum(counts)
        for name in alone[0][1]
    }
    row = made.packed(plain, documents)
    assert_same(step(model, row), (loss, gradients))
    # The text positions say as well where documents begin, without any lengths.
    lengths = torch.tensor(row.pop(LENGTHS))
    assert_same(step(model, row), (loss, gradients))
    # And so do transformers' own keywords, which a tower must not take for its own.
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    row |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    assert_same(step(model, row), (loss, gradients))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gemmas_images_in_a_row_by_transformers_layers(attention):
    """transformers' masks for layers with a window have images where the first document has them. Ours are handed to
    its layers while the fast ones are off, so that it can be told whether these are right."""
    model, made = make("gemma3", "lora"), FAMILIES["gemma3"]
    plain = unwrapped(model)
    plain.set_attn_implementation(attention)
    documents = [made.document(plain, 1, 1), made.document(plain, 3, 2, 12)]
    counts = [int((each["labels"][:, 1:] != -100).sum()) for each in documents]
    alone = [step(model, each) for each in documents]
    loss = sum(n * each[0] for n, each in zip(counts, alone, strict=True)) / sum(counts)
    gradients = {
        name: sum(n * each[1][name] for n, each in zip(counts, alone, strict=True)) / sum(counts)
        for name in alone[0][1]
    }
    row = made.packed(plain, documents)
    path = fast.enable(model)
    path.on = False
    assert_same(step(model, row), (loss, gradients))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_document_changes_nothing(family):
    """Bit for bit: what the second document is does not reach the first one's states."""
    model = make(family, "projector").eval()
    fast.enable(model)
    made = FAMILIES[family]
    first, second = made.document(model, 1, 1), made.document(model, 2, 1)
    row = made.packed(model, [second, first])
    other = {**row, "input_ids": row["input_ids"].clone()}
    length = second["input_ids"].shape[1]
    other["input_ids"][:, 0] = START
    for each in (row, other):
        del each["labels"]
    with torch.no_grad():
        one, two = (model(**each, use_cache=False).logits for each in (row, other))
    assert torch.equal(one[:, length:], two[:, length:])
    assert not torch.equal(one[:, :length], two[:, :length])


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_transformers_own(family):
    model = make(family, "projector").eval()
    document = FAMILIES[family].document(model, 1, 1)
    del document["labels"]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCABULARY}
    plain = model.generate(**document, **settings)
    fast.enable(model)
    assert torch.equal(model.generate(**document, **settings), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_switched_off_and_taken_out(family, monkeypatch):
    model = make(family, "lora")
    given = batches(family, model)["padded" if FAMILIES[family].packs_wrongly else "packed"]
    plain = step(model, given)
    path = fast.enable(model)
    path.on = False
    with attentions(monkeypatch) as plans:
        assert_same(step(model, given), plain, 0.0)
    path.on = True
    path.undo()
    assert not plans
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    copy.deepcopy(model)


def test_gemma_without_types_and_with_somebody_listening(monkeypatch):
    """Without token types all is causal; a layer that somebody listens to runs on its own code, by the same mask."""
    model, made = make("gemma3", "lora"), FAMILIES["gemma3"]
    document = made.document(unwrapped(model), 1, 2)
    bare = {name: value for name, value in document.items() if name != made.types}
    plain = [step(model, each) for each in (document, bare)]
    assert plain[0][0] != plain[1][0]
    fast.enable(model)
    for each, expected in zip((document, bare), plain, strict=True):
        with attentions(monkeypatch) as plans:
            assert_same(step(model, each), expected)
        assert len(plans) == 3
    for layer in unwrapped(model).model.language_model.layers:
        layer.mlp.register_forward_hook(lambda module, given, output: None)
    for each, expected in zip((document, bare), plain, strict=True):
        with attentions(monkeypatch) as plans:
            assert_same(step(model, each), expected)
        assert not plans


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parameters", ["adapter", "all"])
def test_verify_with_images(family, parameters):
    """Against real float64: towers and projectors too, in rows of documents and in rows of their own."""
    made, plain = FAMILIES[family], make(family, "projector")
    documents = [made.document(plain, 1, 2), made.document(plain, 2, 0, 12), made.document(plain, 3, 1)]
    inputs = [made.packed(plain, documents), made.padded([documents[0], documents[2]]), documents[1]]
    ledger = verify(
        lambda exact: make(family, "none"),
        name="tiny",
        dtype=torch.float32,
        parameters=parameters,
        inputs=inputs,
    )
    assert not ledger.mismatches
    assert (ledger.family, ledger.layers, ledger.batches) == (FAMILIES[family].type or family, 3, 3)
    assert ledger.tokens == max(each["input_ids"].numel() for each in inputs)
    assert ledger.ratio < 1.5
    assert any(made.tower in line.name for line in ledger.lines)
    assert 0 < ledger.summary()["median_plain"] < 100 * torch.finfo(torch.float32).eps


def test_verify_finds_what_is_wrong_with_images(monkeypatch):
    made, plain = FAMILIES["gemma3"], make("gemma3", "projector")
    inputs = [made.document(plain, 1, 1)]
    causal = ft_kernels.plan_attention
    monkeypatch.setattr("ft_core.fast.documents.plan_attention", lambda together=None, **given: causal(**given))
    ledger = verify(lambda exact: make("gemma3", "none"), name="tiny", dtype=torch.float32, inputs=inputs)
    assert ledger.mismatches


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_before_training(family):
    model = make(family, "lora")
    path = fast.enable(model)
    fast.trial(path)
    for form, batch in batches(family, model).items():
        result = fast.compare(path, model, {**batch, "use_cache": False})
        assert result.mismatch is None, form


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", ["recompute", ["offload-input", "inputs", "keep"]], ids=str)
def test_layers_computed_again(family, choice):
    """Gradients are the same bit for bit, what is added between layers included; a trainer's checkpointing stays out
    of the layers, and in the tower."""
    model = make(family, "lora")
    path = fast.enable(model)
    given = batches(family, model)["packed"]
    path.choose("keep")
    kept = step(model, given)
    path.choose(choice)
    assert_same(step(model, given), kept, 0.0)
    unwrapped(model).gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    with pytest.warns(UserWarning, match="gradient_checkpointing is left out"):
        assert_same(step(model, given), kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_saved_and_loaded_by_transformers(family, tmp_path):
    """A few steps on the fast layers lower the loss; plain transformers reads what is saved and answers alike."""
    model, made = make(family, "all"), FAMILIES[family]
    path = fast.enable(model)
    row = batches(family, model)["mixed"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        loss = model(**row).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    fresh = type(model).from_pretrained(tmp_path).eval()
    assert fast.fast_path_of(fresh) is None
    model.eval()
    document = made.document(model, 5, 1)
    with torch.no_grad():
        ours, theirs = (each(**document, use_cache=False) for each in (model, fresh))
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=SHARE, atol=0.0)
    del document["labels"]
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCABULARY}
    assert torch.equal(model.generate(**document, **settings), fresh.generate(**document, **settings))
    assert path.on


def test_a_text_model_that_nobody_knows():
    config = LlavaConfig(
        text_config={"model_type": "olmo2", **TEXT}, vision_config={**SEEN, "model_type": "clip_vision_model"}
    )
    with pytest.raises(fast.NotFast, match="the family olmo2 is not known to them"):
        fast.enable(LlavaForConditionalGeneration(config))


def test_an_encoder_is_no_gemma_of_ours():
    model = make("gemma3", "none")
    model.config.text_config.use_bidirectional_attention = True
    with pytest.raises(fast.NotFast, match="its text model is an encoder"):
        fast.enable(model)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_video(family, monkeypatch):
    """Frames by time, height and width; Qwen 3-VL has those of each time in a run of their own, between timestamps."""
    model = make(family, "lora")
    generator = torch.Generator().manual_seed(0)
    runs = [[93] * 4, [93] * 4] if family == "qwen3_vl" else [[93] * 8]
    ids = [5, 6, *[token for run in runs for token in (7, START, *run, 92)], 8, 9, 10, 11]
    given = {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([[-100] * (len(ids) - 3) + ids[-3:]]),
        "mm_token_type_ids": torch.tensor([[2 * (token == 93) for token in ids]]),
        "pixel_values_videos": torch.randn(2 * 4 * 4, 3 * 2 * 8 * 8, generator=generator),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }
    plain = step(model, given)
    assert any(FAMILIES[family].tower in name for name in plain[1])
    fast.enable(model)
    with attentions(monkeypatch) as plans:
        assert_same(step(model, given), plain)
    assert len(plans) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_under_autocast(family):
    """As it is trained on a GPU, against float64: weights in bf16, pixels as the processor made them."""
    made, plain = FAMILIES[family], make(family, "projector")
    inputs = [made.document(plain, seed, 2, 12) for seed in range(1, 4)]
    ledger = verify(
        lambda exact: make(family, "none").to(torch.bfloat16), name="tiny", dtype=torch.bfloat16, inputs=inputs
    )
    assert not ledger.mismatches
    assert ledger.ratio < 1.25
    # The check before the first step, at which B is still zero, says nothing either.
    model = make(family, "lora").to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float().mul_("lora_A" in name)
    path = fast.enable(model)
    for each in inputs:
        assert fast.compare(path, model, {**each, "use_cache": False}, torch.bfloat16).mismatch is None
