"""With scaled rotary embeddings the fast layers compute what transformers' own do, below and beyond the original
positions: also where the angles change with the length of the text (dynamic, longrope)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ft_core import fast
from ft_core.config.load import read_rope_scaling
from ft_core.models.positions import scale

VOCABULARY = 97
BEFORE, AFTER = 16, 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": BEFORE,
}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
FACTORS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [1.0 + i for i in range(8)]}
TYPES = ("linear", "dynamic", "yarn", "llama3", "longrope")


def make(family: str, kind: str, adapter: bool = True) -> Any:
    make_config, make_model = FAMILIES[family]
    config = make_config(**SIZES, **({"head_dim": 16} if family == "qwen3" else {}))
    scaling = read_rope_scaling({"rope_type": kind, **(FACTORS if kind == "longrope" else {})})
    assert scaling is not None
    scale(config, scaling, AFTER, family)
    torch.manual_seed(0)
    model: Any = make_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Scores far from each other, so that the angles matter.
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(8)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model.train()


def batch(length: int, packed: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (1 if packed else 2, length), generator=torch.Generator().manual_seed(length))
    given = {"input_ids": ids, "labels": ids.clone()}
    if packed:  # one short document, and one of what is left
        given["position_ids"] = torch.cat([torch.arange(9), torch.arange(length - 9)])[None]
    return given


def step(model: Any, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss, logits, and every gradient."""
    with torch.no_grad():
        logits = model(**{key: value for key, value in given.items() if key != "labels"}, use_cache=False).logits
    model.zero_grad()
    loss = model(**given, use_cache=False).loss
    loss.backward()
    return loss.detach(), logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one: Any, two: Any, share: float) -> None:
    assert abs(one[0] - two[0]) <= share * abs(two[0])
    assert (one[1] - two[1]).norm() <= share * two[1].norm()
    assert one[2].keys() == two[2].keys()
    largest = max(g.norm() for g in two[2].values())
    for name, gradient in two[2].items():
        # The bias of k moves no score: its gradient is nothing but rounding.
        assert (one[2][name] - gradient).norm() <= share * max(gradient.norm(), 1e-3 * largest), name


def frequencies(model: Any) -> torch.Tensor:
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return plain.model.rotary_emb.inv_freq.clone()


# Below the original positions, beyond them, longer still, and back: dynamic scaling remembers the longest text.
LENGTHS = (12, 40, 64, 24, 12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", TYPES)
def test_losses_logits_and_gradients(family: str, kind: str) -> None:
    plain = make(family, kind)
    quick = copy.deepcopy(plain)
    fast.enable(quick)
    seen = []
    for length in LENGTHS:
        for packed in (False, True):
            given = batch(length, packed)
            # fp32: both round each of a few hundred sums at 6e-8, and the softmax of sharp scores four times that.
            assert_same(step(quick, given), step(plain, given), 1e-4)
            assert torch.equal(frequencies(quick), frequencies(plain))
        seen.append(frequencies(quick))
    changes = not all(torch.equal(one, seen[0]) for one in seen)
    assert changes == (kind in ("dynamic", "longrope"))


@pytest.mark.parametrize("kind", TYPES)
def test_the_scaling_is_seen(kind: str) -> None:
    """The comparison above would be none if angles did not matter: without the scaling everything is another."""
    given = batch(40)
    scaled, other = make("llama", kind, adapter=False), FAMILIES["llama"][1](LlamaConfig(**SIZES)).train()
    other.load_state_dict(scaled.state_dict())
    fast.enable(scaled)
    logits, unscaled = step(scaled, given)[1], step(other, given)[1]
    assert (logits - unscaled).norm() > 1e-2 * unscaled.norm()


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_answers_by_the_fast_layers(kind: str) -> None:
    from ft_core.fast.decoding import decoder_of

    model = make("llama", kind).eval()
    prompts = [batch(30)["input_ids"][0].tolist(), batch(11)["input_ids"][0].tolist()]
    plain = [
        model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=20, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )[0, len(ids) :].tolist()
        for ids in prompts
    ]  # fmt: skip
    decoder = decoder_of(model, anywhere=True)
    assert decoder is not None
    assert decoder.reason is None
    assert decoder.answers(prompts, new=20, stops=[], temperature=0.0, top_p=1.0) == plain


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_answers_by_transformers_where_angles_change(kind: str) -> None:
    from ft_core.fast.decoding import decoder_of

    decoder = decoder_of(make("llama", kind), anywhere=True)
    assert decoder is not None
    assert decoder.reason == f"its rotary embedding ({kind}) changes with the length of the text"


@pytest.mark.parametrize("kind", TYPES)
def test_a_step_is_recorded_only_where_angles_stay(kind: str) -> None:
    """A recorded step has no host in it that would look at the length of the text."""
    model = make("llama", kind)
    fast.enable(model)
    looked = model.get_base_model().forward._looks(False)
    assert (looked is None) == (kind in ("dynamic", "longrope"))
