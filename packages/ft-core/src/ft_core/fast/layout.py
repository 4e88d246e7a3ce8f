"""Where the parts of a decoder lie: what a model family states about itself so that its layers can be computed fast.

A layout holds names and numbers only. A name is an attribute path, from the causal language model for the parts that
there is one of, from a layer for those that every layer has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Activation", "Attention", "Layout", "Mlp", "Norm", "Norms", "activation", "at"]

Activation = Literal["silu", "gelu", "gelu_tanh"]


def at(module: Any, path: str) -> Any:
    """The attribute at a dotted path."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


@dataclass(frozen=True, kw_only=True)
class Norm:
    """How the family's root mean square norms are stored.

    Attributes:
        eps: the attribute of the norm module that holds what is added to the mean square.
        offset: added to the weight; 1 for families that store it around zero (Gemma).
    """

    eps: str = "variance_epsilon"
    offset: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Norms:
    """The norms of a layer, by their attribute names; None where the family has none there.

    Attributes:
        attention: before the projections of q, k and v.
        mlp: before the projections of gate and up.
        after_attention, after_mlp: of a branch's result, before it is added to the residual (Gemma 2 and 3).
    """

    attention: str = "input_layernorm"
    mlp: str = "post_attention_layernorm"
    after_attention: str | None = None
    after_mlp: str | None = None


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The attention of a layer.

    Attributes:
        module: the attention module; the other names are attributes of it.
        qkv: the projections of q, k and v; one name where they are one linear layer (Phi 3).
        out: the output projection.
        q_norm, k_norm: norms over each head's dimensions, before the rotation (Qwen 3, Gemma 3), or None.
        rotary: which dimensions of a head are turned together.
        scaling: the attribute that multiplies the products of q and k.
        window: the attribute that holds the sliding window, or None where every layer sees everything before.
        softcap: the attribute that holds the bound on the scores (Gemma 2), or None.
    """

    module: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    q_norm: str | None = None
    k_norm: str | None = None
    rotary: Literal["half", "interleaved"] = "half"
    scaling: str = "scaling"
    window: str | None = None
    softcap: str | None = None


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """The gated perceptron of a layer.

    Attributes:
        module: the module; the other names are attributes of it.
        gate_up: the projections of gate and up; one name where they are one linear layer (Phi 3).
        down: the projection back.
        activation: of the gate.
    """

    module: str = "mlp"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    activation: Activation = "silu"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A decoder of the family.

    Attributes:
        layer_class: the name of the class of its layers: a model with another one is not this family's.
        backbone: the path of the stack of layers.
        body: the path of what calls the stack of layers, where images or sounds are merged with the text before; None
            where the head follows the stack itself.
        together: a keyword of the body's, int ``[B, S]``: neighbours of which it is 1 see what follows among them, too,
            as an image's tokens do in Gemma 3. None where all tokens see only what is before them.
        layers, norm, rotary: attributes of the stack: the list of layers, the last norm, the module of the angles.
        head: the path of the language-model head.
        heads, kv_heads, head_dim: sizes of the attention.
        norms, norm_form, attention, mlp: the parts of a layer.
        residual_scale: multiplies a branch's result before it is added to the residual (Granite); 1 without.
        logit_softcap: the bound on the logits (Gemma 2), or None.
        logit_scale: multiplies the logits (Cohere, Granite); 1 without.
        plain: the model is nothing but its embedding, these layers one after the other, the last norm and the head: no
            number is multiplied to the embedding, say. Only such a model answers without its own code (see
            :mod:`ft_core.fast.decoding`).
    """

    layer_class: str
    heads: int
    kv_heads: int
    head_dim: int
    backbone: str = "model"
    body: str | None = None
    together: str | None = None
    layers: str = "layers"
    norm: str = "norm"
    rotary: str = "rotary_emb"
    head: str = "lm_head"
    norms: Norms = field(default_factory=Norms)
    norm_form: Norm = field(default_factory=Norm)
    attention: Attention = field(default_factory=Attention)
    mlp: Mlp = field(default_factory=Mlp)
    residual_scale: float = 1.0
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    plain: bool = False

    @property
    def outer(self) -> str:
        """The path of what takes the model's inputs and gives the states that the head reads."""
        return self.body or self.backbone

    @classmethod
    def of(cls, config: Any, layer_class: str, **parts: Any) -> Layout:
        """A layout with the sizes that transformers' configurations state under their usual names."""
        heads = int(config.num_attention_heads)
        return cls(
            layer_class=layer_class,
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            **parts,
        )


ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""transformers' names of activations that the kernels compute."""


def activation(config: Any) -> Activation:
    """The activation that a configuration names.

    Raises:
        ValueError: one that the kernels do not compute.
    """
    name = str(getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None))
    if name not in ACTIVATIONS:
        raise ValueError(f"its activation {name} is none of {', '.join(sorted(set(ACTIVATIONS)))}")
    return ACTIVATIONS[name]
