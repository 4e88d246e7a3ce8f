"""The configuration's ``rope_scaling``: how a model gets more positions than it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ft_core.config.numbers import Number, Section, Whole

__all__ = ["RopeScaling", "RopeType", "named"]

RopeType = Literal["linear", "dynamic", "yarn", "llama3", "longrope"]

OF = {
    "original_max_position_embeddings": ("yarn", "llama3", "longrope"),
    "attention_factor": ("yarn", "longrope"),
    "beta_fast": ("yarn",),
    "beta_slow": ("yarn",),
    "low_freq_factor": ("llama3",),
    "high_freq_factor": ("llama3",),
    "short_factor": ("longrope",),
    "long_factor": ("longrope",),
}
"""The types that read a key."""

Positive = Annotated[Number, Field(gt=0)]


class RopeScaling(Section):
    """How rotary embeddings reach more positions than the model has. A type's name alone is the same as ``rope_type``.

    The names are those of transformers' ``rope_parameters``. Only ``rope_type`` is needed where ``max_length`` is set.

    Attributes:
        rope_type: ``linear``: every angle divided by ``factor`` (Chen et al. 2023, arXiv:2306.15595); ``dynamic``: a
            larger base, growing with the text (NTK-aware scaling; Peng et al. 2023, arXiv:2309.00071, appendix B);
            ``yarn``: long waves divided, short ones kept, a ramp between them, and attention scaled (the same paper);
            ``llama3``: long waves divided, short ones kept (Llama 3.1; arXiv:2407.21783); ``longrope``: a searched
            factor for each wave (Ding et al. 2024, arXiv:2402.13753).
        factor: how many times the original positions there are; unset: what ``max_length`` needs.
        original_max_position_embeddings: how many tokens long the texts of pre-training were (``yarn``, ``llama3``,
            ``longrope``); unset: the model's own.
        attention_factor: multiplies cos and sin (``yarn``, ``longrope``); unset: the papers' formulas.
        beta_fast, beta_slow: turns over the original positions above which a wave is kept, and below which it is
            divided whole (``yarn``); unset: 32 and 1.
        low_freq_factor, high_freq_factor: the same in other words (``llama3``); unset: 1 and 4.
        short_factor, long_factor: a divisor for each pair of rotated dimensions, for texts up to the original
            positions and for longer ones (``longrope``); unset: the model's own.
    """

    rope_type: RopeType
    factor: Number | None = Field(default=None, ge=1)
    original_max_position_embeddings: Whole | None = Field(default=None, ge=1)
    attention_factor: Number | None = Field(default=None, gt=0)
    beta_fast: Number | None = Field(default=None, gt=0)
    beta_slow: Number | None = Field(default=None, gt=0)
    low_freq_factor: Number | None = Field(default=None, gt=0)
    high_freq_factor: Number | None = Field(default=None, gt=0)
    short_factor: list[Positive] | None = None
    long_factor: list[Positive] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> RopeScaling:
        for key, types in OF.items():
            if getattr(self, key) is not None and self.rope_type not in types:
                raise ValueError(f"{key} with {' or '.join(types)} only")
        if (self.beta_fast or 32) <= (self.beta_slow or 1):
            raise ValueError("beta_fast, 32 if unset, above beta_slow, 1 if unset")
        if (self.high_freq_factor or 4) <= (self.low_freq_factor or 1):
            raise ValueError("high_freq_factor, 4 if unset, above low_freq_factor, 1 if unset")
        if (self.short_factor is None) != (self.long_factor is None):
            raise ValueError("short_factor and long_factor both, or neither")
        return self

    @model_serializer(mode="wrap")
    def _what_is_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keys of other types would be eight lines of null in each run's configuration."""
        return {key: value for key, value in handler(self).items() if value is not None}


def named(value: Any) -> Any:
    """A type's name as keys with values; and ``type``, transformers' older word, as ``rope_type``."""
    if isinstance(value, str):
        return {"rope_type": value}
    if isinstance(value, Mapping):
        older = "type" in value and "rope_type" not in value
        return {"rope_type" if older and key == "type" else key: inner for key, inner in value.items()}
    if value is None or isinstance(value, RopeScaling):
        return value
    raise ValueError("a type such as yarn, or keys with values")
