"""A language model that is to speak: its codec, its tokens, and the rows of embeddings that these take."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ft_core.errors import ConfigError, ModelError
from ft_speech.orpheus.tokens import SpeechTokens, grow, speech_tokens

if TYPE_CHECKING:
    from ft_core.config import TrainConfig
    from ft_core.models import Device, ModelSource
    from ft_speech.codecs.protocol import Codec
    from ft_speech.speaking.settings import TtsSettings

__all__ = [
    "FILE", "SpeechProcessor", "adapter_options", "codec_of", "load_for_training", "load_processor", "settings_of",
]  # fmt: skip

FILE = "speech.json"
"""The file beside a tokenizer that says what its tokens of sound are."""

_NEW = "speech_tokens_are_new"
"""The attribute of a model that has been given rows for them."""


class SpeechProcessor:
    """What makes tokens of texts and sounds.

    Attributes:
        tokenizer: of the model, with the tokens of sound.
        codec: that makes codes of sounds. tokens: of codes.
        prompt: as in :class:`ft_speech.speaking.settings.TtsSettings`.
    """

    def __init__(self, tokenizer: Any, codec: Codec, name: str, model: str, prompt: str | None) -> None:
        self.tokenizer, self.codec, self.prompt = tokenizer, codec, prompt
        self.tokens: SpeechTokens = speech_tokens(tokenizer, codec.layout)
        self._said = {"codec": name, "codec_model": model, "prompt": prompt, "sample_rate": codec.sample_rate}

    def save_pretrained(self, folder: Any) -> None:
        """Write the tokenizer, and beside it what its tokens of sound are."""
        self.tokenizer.save_pretrained(folder)
        (Path(folder) / FILE).write_text(json.dumps(self._said, indent=2) + "\n", encoding="utf-8")


def settings_of(config: TrainConfig) -> TtsSettings:
    """The section ``tts`` of a configuration, checked."""
    from ft_core.config.load import modality_settings

    return cast("TtsSettings", modality_settings(config))


@lru_cache(maxsize=1)
def _codec(name: str, reference: str, device: str) -> Codec:
    from ft_speech.codecs.loading import load_codec

    return load_codec(name, reference, device)


def codec_of(name: str, reference: str | None) -> Codec:
    """The codec of this name with these weights, on the best device; loaded once.

    Raises:
        ConfigError: no weights are named. CodecError: as :func:`ft_speech.codecs.loading.load_codec`.
    """
    from ft_core.models import pick_device

    if reference is None:
        example = " such as hubertsiuzdak/snac_24khz" if name == "snac" else ""
        raise ConfigError(f"tts.codec_model: give the folder or the Hub name of the codec {name}'s weights{example}")
    return _codec(name, reference, pick_device().type)


def load_processor(source: ModelSource, config: TrainConfig, tokenizer: Any) -> SpeechProcessor:
    """The codec, and the tokenizer with the tokens of its codes: those that it lacks are added to it.

    Raises:
        ConfigError, ModelError, CodecError: as :func:`codec_of` and :func:`ft_speech.orpheus.tokens.grow`.
    """
    settings = settings_of(config)
    codec = codec_of(settings.codec, settings.codec_model)
    grow(tokenizer, codec.layout)
    return SpeechProcessor(tokenizer, codec, settings.codec, str(settings.codec_model), settings.prompt)


def load_for_training(source: ModelSource, config: TrainConfig, device: Device, head: str) -> Any:
    """The model that ``config`` trains, as :func:`ft_core.models.load_for_training`, with a row of its embeddings and
    its head for each token of sound.

    New rows are drawn about the mean of the others, with their covariance (Hewitt 2021, "Initializing new word
    embeddings for pretrained language models"), from torch's random numbers.

    Raises:
        ModelError: it cannot be loaded, or is no language model.
    """
    from ft_core.models import load_for_training as load
    from ft_core.models import load_tokenizer

    settings = settings_of(config)
    model: Any = load(source, config, device, head)
    tokenizer = load_tokenizer(source)
    added = grow(tokenizer, codec_of(settings.codec, settings.codec_model).layout)
    embeddings = model.get_input_embeddings()
    if model.get_output_embeddings() is None:
        raise ModelError(f"the model {source.reference} has no head for tokens: task: tts trains language models")
    if len(tokenizer) > embeddings.weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    setattr(model, _NEW, bool(added))
    return model


def adapter_options(model: Any, config: TrainConfig) -> dict[str, Any]:
    """What :func:`ft_core.add_lora` is told beside ``lora``: where tokens of sound are new, the embeddings and the head
    are trained whole, and saved with the adapter."""
    if not getattr(model, _NEW, False):
        return {}
    parts = {id(module): module for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    names = [name for name, module in model.named_modules() if id(module) in parts]
    given = list((config.lora.modules_to_save if config.lora is not None else None) or ())
    return {"modules_to_save": [*given, *(last for name in names if (last := name.rpartition(".")[2]) not in given)]}
