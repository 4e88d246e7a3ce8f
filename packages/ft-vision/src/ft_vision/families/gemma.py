"""Gemma 3 with images (arXiv:2503.19786).

Tokens of one image see those that follow them in it, too; ``token_type_ids``, which its processor makes, say which they
are. Without them every token sees only what is before it, as in transformers. A layer's window bounds what is before.
"""

from __future__ import annotations

from typing import Any

from ft_core.fast.layout import Attention, Layout, Mlp, Norm, Norms, activation

__all__ = ["describe_gemma3"]


def describe_gemma3(config: Any) -> Layout:
    """The layout of a Gemma 3, four layers of five or more of which have a sliding window.

    Raises:
        ValueError: all its tokens see each other, as in an encoder.
    """
    text = config.get_text_config()
    if text.use_bidirectional_attention:
        raise ValueError("its text model is an encoder (use_bidirectional_attention)")
    return Layout.of(
        text,
        "Gemma3DecoderLayer",
        backbone="model.language_model",
        body="model",
        together="token_type_ids",
        norms=Norms(
            mlp="pre_feedforward_layernorm",
            after_attention="post_attention_layernorm",
            after_mlp="post_feedforward_layernorm",
        ),
        norm_form=Norm(eps="eps", offset=1.0),
        attention=Attention(
            window="sliding_window", softcap="attn_logit_softcapping", q_norm="q_norm", k_norm="k_norm"
        ),
        mlp=Mlp(activation=activation(text)),
    )
