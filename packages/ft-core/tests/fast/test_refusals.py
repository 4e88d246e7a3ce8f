"""A model that is not what the layouts know keeps transformers' own layers, and the reason is said."""

from __future__ import annotations

import functools
from importlib.metadata import entry_points

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from ft_core import fast
from ft_core.fast import find
from ft_core.plugins import Registry


def tiny(**more):
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, **more))


def refused(model) -> str:
    with pytest.raises(fast.NotFast) as caught:
        fast.enable(model)
    assert not any("forward" in vars(module) for module in model.modules() if module is not model.model.layers[0])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_family():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    with pytest.raises(fast.NotFast, match="the family gpt2 is not known"):
        fast.enable(model)


def test_an_activation_that_the_kernels_have_not():
    assert "its activation relu is none of" in refused(tiny(hidden_act="relu"))


def test_dropout_in_attention():
    assert "its attention has a dropout of 0.1" in refused(tiny(attention_dropout=0.1))


@pytest.mark.parametrize("place", ["", "self_attn", "mlp"])
def test_a_part_that_the_family_has_not(place):
    model = tiny()
    inside = model.model.layers[1].get_submodule(place)
    inside.extra = torch.nn.Linear(32, 32)
    assert f"a part {f'{place}.extra'.lstrip('.')!r}" in refused(model)


def test_a_parameter_that_the_family_has_not():
    model = tiny()
    model.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    assert "a part 'self_attn'" in refused(model)


def test_a_layer_of_another_class():
    model = tiny()

    class Other(type(model.model.layers[0])):
        pass

    model.model.layers[0].__class__ = Other
    assert "its layers are Other, not LlamaDecoderLayer" in refused(model)


def test_a_forward_that_somebody_replaced():
    model = tiny()
    layer = model.model.layers[0]
    layer.forward = layer.forward  # its class's own, as whoever replaces it for a while puts it back
    fast.enable(model)
    fast.disable(model)
    layer.forward = functools.partial(layer.forward)
    assert "something else has replaced the forward of its LlamaDecoderLayer" in refused(model)


def test_a_family_of_a_package_that_is_not_here(monkeypatch):
    """A LLaVA's layers are a Llama's, but it is no Llama; the words say what knows it."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    seen = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **vision}
    config = LlavaConfig(vision_config=seen, text_config={"model_type": "llama", "vocab_size": 50, **text})
    model = LlavaForConditionalGeneration(config)
    monkeypatch.setattr(
        find, "registry", lambda: Registry([p for p in entry_points(group="ft.architectures") if p.name == "llama"])
    )
    with pytest.raises(fast.NotFast, match="the family llava needs a package that is not here: pip install"):
        fast.enable(model)
