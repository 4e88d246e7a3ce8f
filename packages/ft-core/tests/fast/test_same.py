"""The fast layers compute what transformers' own compute: losses, logits and every gradient, in every form of batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ft_core import fast

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MAKE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=24)),
}


def make(family: str, adapter: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model with random weights everywhere, norms and biases too."""
    torch.manual_seed(0)
    model: Any = MAKE[family]().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if adapter != "none":
        config = LoraConfig(
            r=5,
            lora_alpha=9,
            target_modules="all-linear" if adapter != "some" else ["q_proj", "down_proj"],
            init_lora_weights=False,
            use_dora=adapter == "dora",
            use_rslora=adapter == "rslora",
            modules_to_save=["lm_head"] if adapter == "saved" else None,
        )
        model = get_peft_model(model, config)
    return model.train()


def batch(form: str) -> dict[str, torch.Tensor]:
    """Two rows of twelve tokens, or one of 24 with three documents in it."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (2, 12), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    if form == "dense":
        return {"input_ids": ids, "labels": labels}
    if form == "packed":
        positions = torch.cat([torch.arange(7), torch.arange(5), torch.arange(12)])[None]
        return {"input_ids": ids.view(1, 24), "labels": labels.view(1, 24), "position_ids": positions}
    mask = torch.ones_like(ids)
    where = (0, slice(9, None)) if form == "right" else (1, slice(0, 5))
    mask[where], labels[where] = 0, -100
    labels[1, 5] = -100  # what would be predicted from padding
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def step(model: Any, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and the gradient of every parameter that has one."""
    model.zero_grad()
    loss = model(**given, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: Any, two: Any, share: float) -> None:
    assert abs(one[0] - two[0]) <= share * abs(two[0])
    assert one[1].keys() == two[1].keys()
    largest = max(g.norm() for g in two[1].values())
    for name, gradient in two[1].items():
        # The bias of k moves no score: its gradient is nothing but rounding.
        assert (one[1][name] - gradient).norm() <= share * max(gradient.norm(), 1e-3 * largest), name


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize("adapter", ["all", "none"])
@pytest.mark.parametrize("form", ["dense", "packed", "right", "left"])
def test_losses_and_gradients(family, adapter, form):
    model, given = make(family, adapter), batch(form)
    plain = step(model, given)
    fast.enable(model)
    # fp32: both round each of a few hundred sums at 6e-8.
    assert_same(step(model, given), plain, 3e-5)


@pytest.mark.parametrize("adapter", ["some", "dora", "rslora", "saved"])
def test_adapters_of_every_kind(adapter):
    model, given = make("llama", adapter), batch("packed")
    plain = step(model, given)
    fast.enable(model)
    assert_same(step(model, given), plain, 3e-5)


def test_float64():
    """What is left is transformers' own: it computes norms and rotations in fp32 whatever the dtype."""
    model, given = make("qwen3", "all", torch.float64), batch("packed")
    plain = step(model, given)
    fast.enable(model)
    assert_same(step(model, given), plain, 3e-6)


@pytest.mark.parametrize("form", ["dense", "packed", "right", "left"])
def test_logits_without_labels(form):
    model, given = make("mistral", "all").eval(), batch(form)
    labels = given.pop("labels")
    with torch.no_grad():
        plain = model(**given, use_cache=False).logits
        fast.enable(model)
        logits = model(**given, use_cache=False).logits
    kept = given.get("attention_mask", torch.ones_like(labels)).bool()
    torch.testing.assert_close(logits[kept], plain[kept], rtol=1e-4, atol=1e-4)


def test_documents_are_alone_in_a_row():
    model = make("qwen2", "all").eval()
    fast.enable(model)
    given = batch("packed")
    with torch.no_grad():
        packed = model(input_ids=given["input_ids"], position_ids=given["position_ids"], use_cache=False).logits
        alone = [model(input_ids=part, use_cache=False).logits for part in given["input_ids"].split([7, 5, 12], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["document_lengths", "cu_seq_lens_q"])
def test_documents_stated_by_the_collator(way):
    model, given = make("llama", "all"), batch("packed")
    fast.enable(model)
    by_positions = step(model, given)
    if way == "document_lengths":
        more: dict[str, Any] = {way: [7, 5, 12]}
    else:
        more = {"cu_seq_lens_q": torch.tensor([0, 7, 12, 24]), "max_length_q": 12}
    assert_same(step(model, {**given, **more}), by_positions, 1e-6)


def test_switched_off_and_taken_out():
    model, given = make("llama", "all"), batch("dense")
    names = [name for name, _ in model.named_parameters()]
    plain = step(model, given)
    path = fast.enable(model)
    assert fast.enable(model) is path
    assert fast.fast_path_of(model) is path
    assert [name for name, _ in model.named_parameters()] == names
    path.on = False
    off = step(model, given)
    fast.disable(model)
    out = step(model, given)
    for other in (off, out):
        assert other[0] == plain[0]
        assert all(torch.equal(other[1][name], gradient) for name, gradient in plain[1].items())
    assert fast.fast_path_of(model) is None
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_adapter_that_is_switched_off_is_off():
    model, given = make("llama", "all").eval(), batch("dense")
    fast.enable(model)
    with torch.no_grad():
        on = model(input_ids=given["input_ids"], use_cache=False).logits
        with model.disable_adapter():
            off = model(input_ids=given["input_ids"], use_cache=False).logits
    base = copy.deepcopy(make("llama", "none")).eval()
    with torch.no_grad():
        expected = base(input_ids=given["input_ids"], use_cache=False).logits
    torch.testing.assert_close(off, expected, rtol=1e-4, atol=1e-4)
    assert (on - off).abs().max() > 1e-2


def test_generation_and_caches_are_transformers_own():
    model, given = make("qwen3", "all").eval(), batch("left")
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    given.pop("labels")
    plain = model.generate(**given, **asked)
    fast.enable(model)
    assert torch.equal(model.generate(**given, **asked), plain)
    cached = model(**given, use_cache=True)
    assert cached.past_key_values.get_seq_length() == 12


def test_hooks_are_heard():
    model, given = make("mistral", "all"), batch("packed")
    plain = step(model, given)
    fast.enable(model)
    heard = []
    layers = model.get_base_model().model.layers
    layers[1].self_attn.q_proj.register_forward_hook(lambda module, args, output: heard.append(output.shape))
    assert_same(step(model, given), plain, 3e-5)
    assert heard == [(1, 24, 64)]


def test_recomputing_changes_nothing():
    model, given = make("llama", "all"), batch("packed")
    fast.enable(model)
    kept = step(model, given)
    for reentrant in (False, True):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_same(step(model, given), kept, 1e-6)


def test_hidden_states_are_recorded():
    model, given = make("llama", "none"), batch("dense")
    plain = model(**given, use_cache=False, output_hidden_states=True).hidden_states
    fast.enable(model)
    recorded = model(**given, use_cache=False, output_hidden_states=True).hidden_states
    assert len(recorded) == len(plain) == 3
    for one, two in zip(recorded, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("trained", "exact"),
    [("", True), ("q_proj.bias", True), ("k_proj.weight", True), ("v_proj", False), ("mlp", False), ("lora_", False)],
)
def test_exact_sums_only_where_projections_to_queries_and_keys_are_trained(monkeypatch, trained, exact):
    """An adapter leaves them as they are."""
    from ft_core.fast import layer

    asked, attention = [], layer.kernels.packed_attention

    def listening(*args: Any, **keywords: Any) -> torch.Tensor:
        asked.append(keywords.get("exact", False))
        return attention(*args, **keywords)

    monkeypatch.setattr(layer.kernels, "packed_attention", listening)
    model = make("qwen2", "all" if trained == "lora_" else "none")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    fast.enable(model)
    step(model, batch("packed"))
    assert set(asked) == {exact}


@pytest.mark.parametrize("some", [3, 0, torch.tensor([1, 4, 11])], ids=["last", "all", "positions"])
@pytest.mark.parametrize("training", [False, True])
def test_logits_of_some_positions(some: Any, training: bool) -> None:
    """As measuring asks for them."""
    model, given = make("llama", "all").train(training), batch("dense")
    del given["labels"]
    expected = model(**given, logits_to_keep=some, use_cache=False).logits
    fast.enable(model)
    found = model(**given, logits_to_keep=some, use_cache=False).logits
    torch.testing.assert_close(found, expected)
