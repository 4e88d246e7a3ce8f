"""Answers by the fast layers with the kernels themselves, and steps replayed from a recorded graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ft_core.fast.decoding import Decoder, decoder_of

pytestmark = pytest.mark.gpu

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MAKE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=40)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=128)),
}
TEXTS = [list(range(3, 83)), [7], list(range(100, 130))]


def make(family: str, dtype: torch.dtype = torch.bfloat16, lora: bool = False) -> Any:
    torch.manual_seed(0)
    model: Any = MAKE[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() == 2 else 1).add_(torch.randn_like(parameter) * 0.02)
    model = model.to("cuda", dtype)
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    return model.eval()


def ready(model: Any) -> Decoder:
    decoder = decoder_of(model)
    assert decoder is not None
    assert decoder.reason is None, decoder.reason
    return decoder


def errors(model: Any, exact: Any, steps: int = 12) -> tuple[float, float, bool]:
    """Of the logits of each step on given tokens, in L2 against float64, ours and transformers'; and if recorded."""
    decoder = ready(model)
    session = decoder._session(len(TEXTS), 100)
    texts = [list(text) for text in TEXTS]
    ours = theirs = whole = 0.0
    logits = session.begin(texts)
    for step in range(steps):
        for row, text in enumerate(texts):
            ids = torch.tensor([text], device="cuda")
            with torch.no_grad():
                right = exact(ids).logits[0, -1].double()
                plain = model(ids).logits[0, -1].double()
            ours += float((logits[row].double() - right).square().sum())
            theirs += float((plain - right).square().sum())
            whole += float(right.square().sum())
        tokens = torch.tensor([11, 500 + step, 3], device="cuda")
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)
        logits = session.follow(tokens, steps - step)
    return (ours / whole) ** 0.5, (theirs / whole) ** 0.5, session.recorded


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize("lora", [False, True])
def test_as_exact_as_transformers(family: str, lora: bool) -> None:
    """Over steps kernel by kernel and replayed; the roundings are as many, at other places."""
    model = make(family, lora=lora)
    ours, theirs, recorded = errors(model, copy.deepcopy(model).double())
    assert recorded, ready(model).session.reason  # type: ignore[union-attr]
    assert ours <= 1.25 * theirs


def test_as_exact_with_four_bits() -> None:
    """Against float64 products with the numbers that the 4-bit weights stand for."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    from ft_core.fast.linears import numbers

    model = make("llama")
    exact = copy.deepcopy(model).double()
    for layer, wide in zip(model.model.layers, exact.model.layers, strict=True):
        for part, name in ((p, n) for p in ("self_attn", "mlp") for n, _ in list(getattr(layer, p).named_children())):
            old = getattr(getattr(layer, part), name)
            if isinstance(old, torch.nn.Linear):
                new = Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.bfloat16)
                new.weight = Params4bit(old.weight.data.cpu(), requires_grad=False, quant_type="nf4", module=new)
                setattr(getattr(layer, part), name, new.to("cuda"))
                getattr(getattr(wide, part), name).weight.data = numbers(new).double()  # type: ignore[union-attr]
    ours, theirs, recorded = errors(model, exact)
    assert recorded
    assert ours <= 1.25 * theirs


def test_replayed_as_kernel_by_kernel() -> None:
    """The same numbers, in one session after another, and with an adapter that has changed in place meanwhile."""
    model = make("qwen3", lora=True)
    decoder = ready(model)
    replayed = list(decoder.steps(TEXTS, new=40))
    session = decoder.session
    assert session is not None
    assert session.recorded, session.reason
    session._graph, session.reason = None, "to compare"
    assert list(decoder.steps(TEXTS, new=40)) == replayed
    session.reason = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1.0)
    changed = list(ready(model).steps(TEXTS, new=40))
    assert changed != replayed
    assert session.recorded
    session._graph, session.reason = None, "to compare"
    assert list(ready(model).steps(TEXTS, new=40)) == changed


def test_drawn_by_the_seed_and_ended_early() -> None:
    decoder = ready(make("llama"))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(list(decoder.steps(TEXTS, new=30, temperature=1.0, top_p=0.9)))
    assert drawn[0] == drawn[1] != drawn[2]
    steps = decoder.steps(TEXTS, new=30)
    first = [next(steps) for _ in range(12)]
    steps.close()
    assert list(decoder.steps(TEXTS, new=30))[:12] == first


def test_too_little_memory_is_seen_before() -> None:
    decoder = ready(make("llama"))
    assert decoder.why_not(1, 1000) is None
    assert "memory" in str(decoder.why_not(2**20, 10**6))
