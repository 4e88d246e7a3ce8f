"""Which of a Whisper's tensors each variable of CTranslate2's ``model.bin`` is made of.

Written down here a second time, beside CTranslate2's own converter, which writes the file: what is in it is checked by
other code than what put it there. Attention's products are stored together: query, key and value of self-attention, key
and value of the decoder's attention on the encoder; keys have no bias, which is a row of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = ["EMBEDDINGS", "HEAD", "Part", "variables_of"]

EMBEDDINGS, HEAD = "decoder/embeddings/weight", "decoder/projection/weight"


class Part(NamedTuple):
    """Attributes:
    parameter: of transformers' model; None: zeros. rows: how many.
    """

    parameter: str | None
    rows: int


def variables_of(config: Any) -> dict[str, tuple[Part, ...]]:
    """By the name of each variable the parameters whose rows it is, one after the other.

    Args:
        config: of a Whisper.
    """
    found: dict[str, tuple[Part, ...]] = {}
    wide = config.d_model
    for number in (1, 2):
        for kind in ("weight", "bias"):
            found[f"encoder/conv{number}/{kind}"] = (Part(f"model.encoder.conv{number}.{kind}", wide),)
    for side, layers, positions, inner in (
        ("encoder", config.encoder_layers, config.max_source_positions, config.encoder_ffn_dim),
        ("decoder", config.decoder_layers, config.max_target_positions, config.decoder_ffn_dim),
    ):
        found[f"{side}/position_encodings/encodings"] = (Part(f"model.{side}.embed_positions.weight", positions),)
        found.update(_norm(f"{side}/layer_norm", f"model.{side}.layer_norm", wide))
        for layer in range(layers):
            here, there = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            found.update(_norm(f"{here}/self_attention/layer_norm", f"{there}.self_attn_layer_norm", wide))
            found.update(_attention(f"{here}/self_attention", f"{there}.self_attn", wide, ("qkv", "o")))
            if side == "decoder":
                found.update(_norm(f"{here}/attention/layer_norm", f"{there}.encoder_attn_layer_norm", wide))
                found.update(_attention(f"{here}/attention", f"{there}.encoder_attn", wide, ("q", "kv", "o")))
            found.update(_norm(f"{here}/ffn/layer_norm", f"{there}.final_layer_norm", wide))
            for number, rows in enumerate((inner, wide)):
                for kind in ("weight", "bias"):
                    part = Part(f"{there}.fc{number + 1}.{kind}", rows)
                    found[f"{here}/ffn/linear_{number}/{kind}"] = (part,)
    found[EMBEDDINGS] = (Part("model.decoder.embed_tokens.weight", config.vocab_size),)
    found[HEAD] = (Part("proj_out.weight", config.vocab_size),)
    return found


def _norm(here: str, there: str, wide: int) -> Iterator[tuple[str, tuple[Part, ...]]]:
    for name, kind in (("gamma", "weight"), ("beta", "bias")):
        yield f"{here}/{name}", (Part(f"{there}.{kind}", wide),)


def _attention(here: str, there: str, wide: int, groups: tuple[str, ...]) -> Iterator[tuple[str, tuple[Part, ...]]]:
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    for number, group in enumerate(groups):
        for kind in ("weight", "bias"):
            parts = (
                Part(None if (one, kind) == ("k", "bias") else f"{there}.{names[one]}.{kind}", wide) for one in group
            )
            yield f"{here}/linear_{number}/{kind}", tuple(parts)
