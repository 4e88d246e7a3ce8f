"""The section ``stt`` of a configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ft_core.config.numbers import Number, Section, Switch, Whole

__all__ = ["AugmentSettings", "SttSettings"]


def _range(value: Any) -> Any:
    if value is None:
        return None
    numbers = isinstance(value, list | tuple) and [isinstance(one, int | float) for one in value]
    if numbers == [True, True] and not any(isinstance(one, bool) for one in value) and value[0] <= value[1]:
        return list(value)
    raise ValueError("two numbers, the smaller first, such as [0.9, 1.1]")


Range = Annotated[list[Number], BeforeValidator(_range)]


class AugmentSettings(Section):
    """How recordings are varied each time that they are trained on; never those that are measured.

    Attributes:
        spec: SpecAugment (Park et al. 2019, arXiv:1904.08779): bands of frequency and stretches of time are blanked.
        noise: white noise is added, by a signal-to-noise ratio in dB drawn from this range; unset: none.
        speed: played faster or slower, by a factor drawn from this range, which changes the pitch too; unset: as it is.
    """

    spec: Switch = False
    noise: Range | None = None
    speed: Annotated[list[Annotated[Number, Field(ge=0.5, le=2)]], BeforeValidator(_range)] | None = None


class SttSettings(Section):
    """How a recogniser is trained.

    Attributes:
        encoder: what is trained of the audio encoder: nothing, adapters on its linear layers, or all of its weights.
            Unset, Whisper's is trained as its decoder is (adapters, or with ``lora: null`` whole), that of a recogniser
            around a language model not at all.
        language: the language of rows that name none, by its code, such as ``en``, or its English name.
        task: what is written down: what is said (``transcribe``), or that in English (``translate``); for rows that do
            not say it.
        timestamps: whether rows with ``segments`` are trained with the times at which these begin and end.
        trim_silence: recordings are heard without the silence at their ends, what lies so many dB below their loudest
            (40, say), but for a margin of 0.05 s; in training and when the model is measured. Unset: as they are.
        augment: how recordings are varied.
        normalizer: what makes no difference to error rates: ``english`` and ``basic`` are Whisper's own; ``auto`` takes
            the one of a row's language; ``none`` compares texts as they are.
        on_bad_audio: what to do where a recording is missing, damaged or empty: ``stop`` with a line that names it, or
            ``skip`` its row and count it.
        workers: processes that read recordings and make batches ahead; unset means 4 for a GPU, and none for a CPU.
    """

    encoder: Literal["frozen", "lora", "full"] | None = None
    language: str | None = Field(default=None, min_length=1)
    task: Literal["transcribe", "translate"] = "transcribe"
    timestamps: Switch = False
    trim_silence: Number | None = Field(default=None, gt=0, le=120)
    augment: AugmentSettings = AugmentSettings()
    normalizer: Literal["auto", "english", "basic", "none"] = "auto"
    on_bad_audio: Literal["stop", "skip"] = "stop"
    workers: Whole | None = Field(default=None, ge=0, le=64)
