"""The section ``tts`` of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ft_core.config.numbers import Section
from ft_speech.csm.settings import CsmSettings

__all__ = ["TtsSettings"]


class TtsSettings(Section):
    """How a model that speaks is trained.

    Attributes:
        on_bad_audio: what to do where a recording is missing, damaged or empty: ``stop`` with a line that names it, or
            ``skip`` its row and count it.
        csm: what concerns CSM alone.
    """

    on_bad_audio: Literal["stop", "skip"] = "stop"
    csm: CsmSettings = Field(default_factory=CsmSettings)
