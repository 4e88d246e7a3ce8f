"""The section ``tts`` of a configuration."""

from __future__ import annotations

import string
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ft_core.config.numbers import Number, Section
from ft_speech.csm.settings import CsmSettings

__all__ = ["PLACES", "TtsSettings"]

PLACES = ("text", "voice", "style")
"""What a prompt may have places for."""


def _prompt(value: Any) -> Any:
    if value is None:
        return value
    known = "text with {text} in it, and {voice} and {style} where they are wanted, such as '{voice}: {text}'"
    if not isinstance(value, str):
        raise ValueError(known)
    try:
        names = [(name, form, how) for _, name, form, how in string.Formatter().parse(value) if name is not None]
    except ValueError:
        raise ValueError(known) from None
    if any(name not in PLACES or form or how for name, form, how in names) or "text" not in [one[0] for one in names]:
        raise ValueError(known)
    return value


class TtsSettings(Section):
    """How a model that speaks is trained.

    Attributes:
        codec: the codec whose tokens a language model writes, a name of ``ft.codecs``. (A CSM has its own.)
        codec_model: the folder or the Hub name of the codec's weights.
        prompt: what stands before the sound, with places for ``{text}``, ``{voice}`` and ``{style}``. Unset, it is
            ``voice: <style> text``, without what a row does not have.
        train_on: which tokens the loss is taken over: those of the sound (``answers``), or the text's too (``all``).
        max_seconds: rows whose recording is longer are left out; no longer speech is made when the model is measured.
        trim_silence: recordings lose the silence at their ends, what lies so many dB below their loudest (40, say), but
            for a margin of 0.05 s; in training and when the model is measured. Unset: they are taken as they are.
        on_bad_audio: what to do where a recording is missing, damaged or empty: ``stop`` with a line that names it, or
            ``skip`` its row and count it.
        recogniser: a model or a run that recognises speech; where it is given, measuring has it write down what the
            model speaks, and counts the words that differ.
        language: of the texts, for the recogniser: a code such as ``en``. Unset, it finds out.
        csm: what concerns CSM alone.
    """

    codec: str = Field(default="snac", min_length=1)
    codec_model: str | None = Field(default=None, min_length=1)
    prompt: Annotated[str | None, BeforeValidator(_prompt)] = None
    train_on: Literal["answers", "all"] = "answers"
    max_seconds: Number = Field(default=30.0, gt=0, le=600)
    trim_silence: Number | None = Field(default=None, gt=0, le=120)
    on_bad_audio: Literal["stop", "skip"] = "stop"
    recogniser: str | None = Field(default=None, min_length=1)
    language: str | None = Field(default=None, min_length=1)
    csm: CsmSettings = Field(default_factory=CsmSettings)
