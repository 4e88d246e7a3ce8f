"""What Whisper hears with beside its weights: features, and the settings of transformers' ``generate``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ft_core.errors import ModelError
from ft_speech.whisper.vocabulary import Vocabulary

if TYPE_CHECKING:
    from ft_core.models.opening import Target

__all__ = ["FALLBACK", "Frames", "chances_kept", "generation_of", "processor_of"]

FALLBACK: dict[str, Any] = {
    "temperature": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    "compression_ratio_threshold": 1.35,
    "logprob_threshold": -1.0,
    "no_speech_threshold": 0.6,
}
"""When a window is heard again with a higher temperature, or taken for silence: section 3.8 of the paper. The ratio is
of token numbers, as transformers compresses them; the paper's 2.4 is of text."""


def processor_of(target: Target, model: Any) -> Any:
    """What makes features of samples for a model, from its run's or its own files.

    Where there is none, as in folders that were made of other programs' weights, it is the one that all Whisper models
    have.

    Raises:
        ModelError: its files cannot be read, or are another model's.
    """
    from transformers import WhisperFeatureExtractor

    from ft_core.models.source import find_model

    if target.run is not None:
        own = target.run.adapter if target.run.adapter.is_dir() else target.run.model
        folders = [own] if own == target.run.model else [own, find_model(target.run.config.model).path]
    else:
        assert target.source is not None
        folders = [target.source.path]
    config = (model.get_base_model() if hasattr(model, "get_base_model") else model).config
    for folder in folders:
        if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
            continue
        try:
            features = WhisperFeatureExtractor.from_pretrained(folder)
        except Exception as error:  # its files may lack or hold anything
            line = " ".join(str(error).split())
            raise ModelError(f"the feature extractor in {folder} cannot be loaded: {line[:300]}") from error
        if features.feature_size != config.num_mel_bins:
            raise ModelError(
                f"the feature extractor in {folder} makes {features.feature_size} mel bands, the model "
                f"{target.reference} hears {config.num_mel_bins}: its files are not of one model"
            )
        return features
    return WhisperFeatureExtractor(feature_size=config.num_mel_bins)


class Frames:
    """A callback of transformers, which tells frames, that tells seconds since the last call."""

    def __init__(self, report: Callable[[float], None], seconds: float) -> None:
        self._report, self._seconds, self._told = report, seconds, 0

    def __call__(self, places: Any) -> None:
        """``places``: ``[1, 2]``, the frame that is heard now and the number of all."""
        now = int(places[0, 0])
        if now > self._told:
            self._report((now - self._told) * self._seconds)
            self._told = now


def generation_of(model: Any, vocabulary: Vocabulary) -> Any:
    """A model's generation configuration, with what an older one, or none, leaves out."""
    own, known = copy.deepcopy(model.generation_config), vocabulary
    told: dict[str, Any] = {
        "decoder_start_token_id": known.start,
        "eos_token_id": known.end,
        "pad_token_id": known.end if own.pad_token_id is None else own.pad_token_id,
        "no_timestamps_token_id": known.no_timestamps,
        "prev_sot_token_id": known.previous,
        "is_multilingual": bool(known.languages),
        "forced_decoder_ids": None,
        "condition_on_prev_tokens": False,
        "return_timestamps": False,
        "max_length": None,  # max_new_tokens says it
    }
    if known.languages:
        told["lang_to_id"] = {f"<|{code}|>": number for code, number in known.languages.items()}
        told["task_to_id"] = known.tasks
    else:  # transformers would look for the language wherever it finds these
        for name in ("lang_to_id", "task_to_id"):
            own.__dict__.pop(name, None)
    for name, value in told.items():
        setattr(own, name, value)
    return own


@contextmanager
def chances_kept(device: Any) -> Iterator[None]:
    """The same random numbers in each call, for windows that are heard again; the caller's are left as they were."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
