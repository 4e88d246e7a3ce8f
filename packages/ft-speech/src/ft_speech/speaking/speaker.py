"""Speakers by one interface: what ``ft speak`` and measurements speak with.

Each family has one, in a module of its own that is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias, cast

from ft_core.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ft_core.models.opening import Target

    Samples: TypeAlias = npt.NDArray[np.float32]

__all__ = ["ANY", "SPEAKERS", "Speaker", "open_speaker", "speak"]

SPEAKERS = {"csm": "ft_speech.csm.speaking:CsmSpeaker"}
"""The class of each family's speaker, by ``model_type``."""
ANY = "ft_speech.orpheus.speaking:OrpheusSpeaker"
"""The class for language models that write a codec's tokens."""


class Speaker(Protocol):
    """A model that speaks, opened.

    Attributes:
        sample_rate: samples per second, in Hz, of what it speaks.
        cut: whether the last speech ended because it was as long as it might be.
    """

    sample_rate: int
    cut: bool

    @classmethod
    def open(
        cls, target: Target, say: Callable[[str], None] = print, *, codec: str | None, codec_model: str | None
    ) -> Self:
        """Load what was found.

        Args:
            codec, codec_model: as in :class:`ft_speech.speaking.settings.TtsSettings`, in the place of what the run or
                the model says; a model with a codec of its own refuses them.

        Raises:
            FtError: it cannot be loaded.
        """
        ...

    def speak(
        self,
        text: str,
        *,
        voice: str | None = None,
        style: str | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        seed: int = 0,
        max_seconds: float = 30.0,
    ) -> Iterator[Samples]:
        """Speak a text, piece by piece: mono, full scale -1 to 1.

        Args:
            voice, style: whose voice, and how it is said, as the rows had it that the model was trained on.
            temperature: 0 takes the likeliest code each time; above, draws.
            top_p: nucleus sampling's share.
            seed: of what is drawn; the same on the same machine gives the same speech.
            max_seconds: where the speech is ended if the model does not end it.

        Raises:
            DataError: the text cannot be spoken.
        """
        ...


def open_speaker(
    reference: str,
    *,
    codec: str | None = None,
    codec_model: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Speaker:
    """The speaker of a run (adapter or full model), a model folder or a Hub name.

    Raises:
        RunError: no such folder, or a run that isn't finished.
        ModelError: it is no model that speaks, or it cannot be loaded.
        ConfigError: it says no codec, and none is given.
    """
    from ft_core.models.opening import find_target
    from ft_core.models.source import find_model
    from ft_core.plugins.specs import resolve
    from ft_speech.families import FAMILIES, model_type_of

    target = find_target(reference)
    if target.run is not None:
        if target.run.config.task != "tts":
            raise ModelError(f"{reference} was trained with task: {target.run.config.task}, it does not speak")
        kept = target.run.model
        source = find_model(str(kept) if kept.is_dir() else target.run.config.model)
    else:
        assert target.source is not None
        source = target.source
    kind = model_type_of(source)
    if kind in FAMILIES["stt"]:
        raise ModelError(f"{reference} recognises speech, it does not speak: use ft transcribe")
    made = resolve(SPEAKERS.get(kind, ANY)).open(target, say, codec=codec, codec_model=codec_model)
    return cast(Speaker, made)


def speak(model: str | Speaker, text: str, **options: Any) -> tuple[Samples, int]:
    """A text as samples, float32 ``[samples]``, and their rate in Hz.

    Args:
        model: what :func:`open_speaker` takes, or gives; opened once, it can be asked again and again.
        options: those of :meth:`Speaker.speak`.

    Raises:
        FtError: as :func:`open_speaker` and :meth:`Speaker.speak`.
    """
    import numpy as np

    speaker = open_speaker(model) if isinstance(model, str) else model
    pieces = list(speaker.speak(text, **options))
    return np.concatenate([np.zeros(0, np.float32), *pieces]), speaker.sample_rate
