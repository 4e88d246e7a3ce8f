"""Recognisers of speech by one interface: what ``ft transcribe`` and measurements hear with.

Each family has one, in a module of its own that is imported when it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeAlias, cast

from ft_core.errors import DataError, ModelError
from ft_speech.listening.transcripts import Transcript

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ft_core.models.opening import Target

    Samples: TypeAlias = npt.NDArray[np.float32]

__all__ = [
    "LONG_FORMS", "RECOGNISERS", "TASKS", "TIMESTAMPS", "LongForm", "Recogniser", "Timestamps", "check_task",
    "open_recogniser", "recognise", "transcribe",
]  # fmt: skip

RECOGNISERS = {
    "whisper": "ft_speech.whisper.transcribing:WhisperRecogniser",
    "qwen3_asr": "ft_speech.qwen_asr.transcribing:QwenRecogniser",
}
"""The class of each family's recogniser, by ``model_type``."""

Timestamps = Literal["none", "segment", "word"]
LongForm = Literal["pauses", "sequential"]
TASKS = ("transcribe", "translate")
TIMESTAMPS = ("none", "segment", "word")
LONG_FORMS = ("pauses", "sequential")


class Recogniser(Protocol):
    """A model that writes down what is said, opened.

    Attributes:
        sampling_rate: that it hears at, in Hz.
    """

    sampling_rate: int

    @classmethod
    def open(cls, target: Target, say: Callable[[str], None] = print) -> Self:
        """Load what was found.

        Raises:
            FtError: it cannot be loaded.
        """
        ...

    def check(self, *, language: str | None, task: str, timestamps: Timestamps, **options: Any) -> None:
        """Refuse what the model cannot do, before any recording is read; the options are those of :meth:`transcribe`.

        Raises:
            DataError: a language that it does not know, a task or timestamps that it does not have.
        """
        ...

    def transcribe(
        self,
        samples: Sequence[Samples],
        *,
        language: str | None = None,
        task: str = "transcribe",
        timestamps: Timestamps = "none",
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 8,
        long_form: LongForm = "pauses",
        progress: Callable[[float], None] | None = None,
    ) -> list[Transcript]:
        """What is said in recordings of any length.

        Args:
            samples: of one channel each, float32 ``[samples]`` at :attr:`sampling_rate`, full scale -1 to 1.
            language: a code such as ``en``, or an English name; None: it is found out, for each recording.
            task: ``transcribe``, or ``translate`` into English.
            timestamps: whether the transcripts have segments, and these words.
            prompt: words that may be expected, such as names, or a text in the spelling that is wanted.
            max_new_tokens: the longest text of one window; None: the longest that the model can write.
            batch_size: windows that are heard together.
            long_form: how what is longer than a window is heard.
            progress: called with the seconds of audio that have been heard since the last call.

        Returns:
            A transcript for each recording, in order.

        Raises:
            DataError: as :meth:`check`.
            RunError: the memory is too small.
        """
        ...


def open_recogniser(reference: str, *, say: Callable[[str], None] = lambda line: None) -> Recogniser:
    """The recogniser of a run (adapter or full model), a model folder or a Hub name.

    Raises:
        RunError: no such folder, or a run that isn't finished.
        ModelError: it is no model that recognises speech, or it cannot be loaded.
    """
    from ft_core.models.opening import find_target
    from ft_core.models.source import find_model
    from ft_core.plugins.specs import resolve
    from ft_speech.families import model_type_of

    target = find_target(reference)
    if target.run is not None:
        name = target.run.config.model
        source = find_model(str(target.run.model) if target.run.model.is_dir() else name)
    else:
        assert target.source is not None
        source = target.source
    kind = model_type_of(source)
    if kind not in RECOGNISERS:
        raise ModelError(
            f"{reference} recognises no speech: its model is {f'a {kind}' if kind else 'of no type'} "
            f"(what does is of the types {', '.join(sorted(RECOGNISERS))})"
        )
    return cast(Recogniser, resolve(RECOGNISERS[kind]).open(target, say))


def recognise(
    model: str | Recogniser, samples: Sequence[Samples], sampling_rate: int, language: str | None = None
) -> list[str]:
    """The texts of recordings, without times: what measuring by a recogniser needs.

    Args:
        model: what :func:`open_recogniser` takes, or gives; opened once, it can be asked again and again.
        samples: of one channel each, floats ``[samples]``, full scale -1 to 1.
        sampling_rate: theirs, in Hz; they are resampled to the recogniser's.
        language: as for :meth:`Recogniser.transcribe`.

    Raises:
        FtError: as :func:`open_recogniser` and :meth:`Recogniser.transcribe`.
    """
    import numpy as np

    from ft_speech.audio import resample

    recogniser = open_recogniser(model) if isinstance(model, str) else model
    heard = [resample(np.asarray(one, dtype=np.float32), sampling_rate, recogniser.sampling_rate) for one in samples]
    return [one.text for one in recogniser.transcribe(heard, language=language)]


def transcribe(
    model: str | os.PathLike[str] | Recogniser,
    files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    language: str | None = None,
    task: str = "transcribe",
    timestamps: Timestamps = "segment",
    **options: Any,
) -> list[Transcript]:
    """What is said in audio files.

    Args:
        model: a run or a model, as :func:`open_recogniser` takes it, or what that gives.
        files: a path, or several.
        language, task, timestamps, options: as for :meth:`Recogniser.transcribe`.

    Returns:
        A transcript for each file, in order.

    Raises:
        AudioError: a file cannot be used.
        FtError: as :func:`open_recogniser` and :meth:`Recogniser.transcribe`.
    """
    from ft_speech.audio import read_audio

    paths = [files] if isinstance(files, str | os.PathLike) else list(files)
    recogniser = open_recogniser(os.fspath(model)) if isinstance(model, str | os.PathLike) else model
    recogniser.check(language=language, task=task, timestamps=timestamps, **options)
    samples = [read_audio(path, sampling_rate=recogniser.sampling_rate)[0] for path in paths]
    return recogniser.transcribe(samples, language=language, task=task, timestamps=timestamps, **options)


def check_task(task: str, timestamps: str, long_form: str, allowed: Sequence[str] = TIMESTAMPS) -> None:
    """Refuse values that no recogniser has.

    Raises:
        DataError: names the value and what is allowed.
    """
    for name, value, known in (
        ("task", task, TASKS), ("timestamps", timestamps, allowed), ("long_form", long_form, LONG_FORMS)
    ):  # fmt: skip
        if value not in known:
            raise DataError(f"{name}: {value!r} is not allowed (allowed: {', '.join(known)})")
