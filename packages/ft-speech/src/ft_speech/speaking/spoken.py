"""What is measured of speech that a model made: whether a recogniser understands it, and how far it is from recordings
of the same texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ft_speech.speaking.distortion import mel_cepstral_distortion

if TYPE_CHECKING:
    from ft_speech.speaking.settings import TtsSettings

__all__ = ["Spoken", "measured"]

RECOGNISER = "speech_recogniser"
"""The key of ``job.kept`` under which the recogniser is."""


@dataclass(frozen=True)
class Spoken:
    """A text as a model spoke it.

    Attributes:
        row: in normal form. samples: what was spoken, mono, perhaps none. recorded: the row's own recording, at the
            same rate.
        cut: whether it was ended because it was too long.
    """

    row: Mapping[str, Any]
    samples: npt.NDArray[np.float32]
    recorded: npt.NDArray[np.float32]
    cut: bool = False


def measured(
    spoken: Sequence[Spoken],
    sample_rate: int,
    settings: TtsSettings,
    *,
    kept: dict[str, Any],
    also: Callable[[str], str] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> tuple[dict[str, float | None], list[str] | None]:
    """``wer`` and ``cer`` of what ``tts.recogniser`` writes down of speech, where one is given, and ``mcd``.

    ``mcd`` is the mean of :func:`ft_speech.speaking.distortion.mel_cepstral_distortion` (dB) over the texts of which
    something was spoken; the rates are those of :func:`ft_speech.listening.metrics.word_and_character_errors`.

    Args:
        kept: where the recogniser is kept for the next measurement: ``job.kept``.
        also: applied to both texts before they are compared.

    Returns:
        The numbers, and what was written down, or None without a recogniser.

    Raises:
        FtError: the recogniser cannot be loaded.
    """
    heard: list[str] | None = None
    metrics: dict[str, float | None] = {}
    if settings.recogniser is not None and spoken:
        from ft_speech.listening.metrics import word_and_character_errors
        from ft_speech.listening.recogniser import open_recogniser, recognise

        if RECOGNISER not in kept:
            kept[RECOGNISER] = open_recogniser(settings.recogniser)
        heard = []
        for done, one in enumerate(spoken):
            progress(done, len(spoken), "texts heard")
            said = (
                recognise(kept[RECOGNISER], [one.samples], sample_rate, settings.language) if len(one.samples) else [""]
            )
            heard.append(said[0].strip())
        progress(len(spoken), len(spoken), "texts heard")
        texts = [str(one.row["text"]) for one in spoken]
        metrics |= word_and_character_errors(heard, texts, settings.language, also=also)
    distances = [mel_cepstral_distortion(one.samples, one.recorded, sample_rate) for one in spoken if len(one.samples)]
    metrics["mcd"] = float(np.mean(distances)) if distances else None
    return metrics, heard
