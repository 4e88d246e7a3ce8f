"""The part ``tts.csm`` of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field

from ft_core.config.numbers import Number, Section

if TYPE_CHECKING:
    from ft_core.config import TrainConfig
    from ft_speech.speaking.settings import TtsSettings

__all__ = ["AMORTISED", "MOST_SPEAKERS", "CsmSettings", "csm_of", "tts_of"]

AMORTISED = 1 / 16
"""The share of a batch's frames that the depth decoder is trained on: Sesame's own, "Crossing the uncanny valley of
conversational voice" (2025)."""
MOST_SPEAKERS = 1000
"""Speakers are numbered below this."""


def _speakers(value: Any) -> Any:
    if value is None:
        return value
    if not isinstance(value, dict) or not value:
        raise ValueError("names of voices with the numbers of speakers, such as {anna: 0, bob: 1}")
    for name, number in value.items():
        if not isinstance(name, str | int) or isinstance(name, bool) or not str(name).strip():
            raise ValueError(f"the name {name!r} is no text")
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < MOST_SPEAKERS:
            raise ValueError(f"{name}: {number!r} is no whole number from 0 to {MOST_SPEAKERS - 1}")
    return {str(name).strip(): number for name, number in value.items()}


class CsmSettings(Section):
    """How a CSM is trained.

    Attributes:
        depth_decoder: what is trained of the depth decoder, which gives a frame's codes after the first: adapters on
            its linear layers, nothing, or all of its weights but the embedding of codes, which is the backbone's too.
            Unset means ``lora`` under an adapter; in full training ``full``, shared embedding included.
        depth_frames: the share of the frames of a batch, drawn anew for each, that the depth decoder is trained on; 1
            is all, as in transformers. The backbone is always trained on all.
        speakers: the number of each voice's speaker, ``{anna: 0, bob: 1}``. Unset, voices that are numbers are their
            own, and names are numbered in their alphabetical order.
    """

    depth_decoder: Literal["lora", "frozen", "full"] | None = None
    depth_frames: Number = Field(default=AMORTISED, gt=0, le=1)
    speakers: Annotated[dict[str, int] | None, BeforeValidator(_speakers)] = None


def tts_of(config: TrainConfig) -> TtsSettings:
    """The section ``tts`` of a configuration, checked."""
    from ft_core.config.load import modality_settings

    return cast("TtsSettings", modality_settings(config))


def csm_of(config: TrainConfig) -> CsmSettings:
    """Its part ``tts.csm``."""
    return tts_of(config).csm
