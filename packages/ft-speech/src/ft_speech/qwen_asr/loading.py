"""Qwen3-ASR and its processor: transformers' own objects, parts of the model frozen as ``stt`` says."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

from ft_core.errors import ConfigError, DataError, ModelError
from ft_speech.qwen_asr.languages import told
from ft_speech.qwen_asr.parts import ENCODER, SAMPLING_RATE, audio_tokens
from ft_speech.qwen_asr.waits import tell_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ft_core.config import TrainConfig
    from ft_core.models import Device, ModelSource
    from ft_speech.listening.settings import SttSettings

__all__ = ["adapter_options", "load_for_training", "load_processor", "settings_of"]

TRIED = (3_000, 20_001, 48_160)
"""Samples of silence by which the processor's count of tokens is held to :func:`audio_tokens`."""


def settings_of(config: TrainConfig) -> SttSettings:
    """The configuration's section ``stt``, checked; the encoder frozen where it says nothing, the language by its code.

    Raises:
        ConfigError: it asks for what Qwen3-ASR cannot learn.
    """
    from ft_core.config.load import modality_settings

    settings = cast("SttSettings", modality_settings(config))
    language = settings.language
    try:
        language = None if language is None else told(language)
    except DataError as error:
        raise ConfigError(f"stt.{error}") from None
    if settings.task == "translate":
        raise ConfigError("stt.task: translate: Qwen3-ASR writes in the language that it hears (allowed: transcribe)")
    if settings.timestamps:
        raise ConfigError("stt.timestamps: true: Qwen3-ASR writes no times (allowed: false; Whisper does)")
    if settings.trim_silence is not None:
        raise ConfigError(
            "stt.trim_silence: Qwen3-ASR's tokens are counted by a recording's length, which stays as it is (allowed: "
            "null; trim the files themselves)"
        )
    if settings.augment.speed is not None:
        raise ConfigError(
            "stt.augment.speed: Qwen3-ASR's tokens are counted by a recording's length, which stays as it is (allowed: "
            "null; spec and noise vary it)"
        )
    return settings.model_copy(update={"encoder": settings.encoder or "frozen", "language": language})


def load_for_training(source: ModelSource, config: TrainConfig, device: Device, head: str) -> PreTrainedModel:
    """The model that ``config`` trains, as :func:`ft_core.models.load_for_training`; its encoder frozen or not.

    With an adapter everything else is frozen by PEFT. Trained in full, the encoder and the projector are frozen here
    unless ``stt.encoder`` says ``full``.

    Raises:
        ModelError: it cannot be loaded, or this transformers does not know the family.
        ConfigError: ``stt`` asks for what cannot be trained.
    """
    from transformers import AutoModelForSpeechSeq2Seq

    from ft_core.models import load_for_training as load

    _check_known(source.reference)
    encoder = settings_of(config).encoder
    if encoder == "lora" and config.lora is None:
        raise ConfigError("stt.encoder: lora needs lora (it is null: allowed are frozen, full)")
    if encoder == "full" and config.quantization != "none":
        raise ConfigError(
            f"stt.encoder: full needs quantization: none (it is {config.quantization}: allowed are frozen, lora)"
        )
    model = load(source, config, device, head, AutoModelForSpeechSeq2Seq)
    model.config.get_text_config().use_cache = False
    if device.type == "cuda":
        tell_lengths(model)
    if config.lora is None and encoder != "full":
        for name in ENCODER:
            model.get_submodule(f"model.{name}").requires_grad_(False)
    return model


def adapter_options(model: Any, config: TrainConfig) -> dict[str, Any]:
    """What :func:`ft_core.add_lora` is told beside ``lora``: whether the encoder has an adapter, or is trained whole.

    The names that ``lora.targets`` matches are those of the encoder's layers too, so that it is left out by its place.
    """
    encoder = settings_of(config).encoder
    options: dict[str, Any] = {}
    if encoder != "lora":
        options["exclude"] = rf"(.*\.)?({'|'.join(map(re.escape, ENCODER))})(\..*)?"
    if encoder == "full":
        given = None if config.lora is None else config.lora.modules_to_save
        options["modules_to_save"] = [*(given or ()), *ENCODER]
    return options


def load_processor(source: ModelSource, config: TrainConfig | None, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model's processor for recordings and text, with this tokenizer.

    Raises:
        ModelError: it cannot be loaded, has no chat template, or makes other tokens of a recording than the family's
            do.
    """
    from transformers import AutoConfig, AutoProcessor

    _check_known(source.reference)
    try:
        own = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
        processor = AutoProcessor.from_pretrained(source.path, trust_remote_code=False)
    except Exception as error:  # its files may lack or hold anything
        raise ModelError(f"the processor of {source.reference} cannot be loaded: {_line(error)}") from error
    if not hasattr(processor, "feature_extractor"):
        raise ModelError(
            f"the processor of {source.reference} cannot be loaded: there is none for recordings in the folder "
            "(processor_config.json, or preprocessor_config.json)"
        )
    processor.tokenizer = tokenizer
    if processor.chat_template is None:
        processor.chat_template = tokenizer.chat_template
    if processor.chat_template is None:
        raise ModelError(
            f"the processor of {source.reference} has no chat template, so that what the model is asked cannot be "
            "written as it knows it"
        )
    _check_counts(processor, own, source.reference)
    return processor


def _check_known(name: str) -> None:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if "qwen3_asr" not in CONFIG_MAPPING:
        raise ModelError(
            f"the model {name} is a qwen3_asr, which transformers {transformers.__version__} does not know: "
            "pip install -U 'transformers>=5.17,<6'"
        )


def _check_counts(processor: Any, config: Any, name: str) -> None:
    """Refuse a processor whose files are of another model, or by which a recording is another number of tokens."""
    import numpy as np

    for samples in TRIED:
        try:
            made = processor(
                text=[processor.audio_token], audio=[np.zeros(samples, np.float32)], sampling_rate=SAMPLING_RATE
            )
            found = made["input_ids"][0].tolist()
        except Exception as error:  # a value that its configuration leaves out is None, in some computation or other
            raise ModelError(f"the processor of {name} cannot write a recording as tokens: {_line(error)}") from error
        if config.audio_token_id not in found:
            raise ModelError(
                f"the processor of {name} writes recordings without the token {config.audio_token_id}, which its "
                "config.json says stands for them: its files are not of one model"
            )
        if (count := found.count(config.audio_token_id)) != audio_tokens(samples):
            raise ModelError(
                f"the processor of {name} makes {count} tokens of {samples / SAMPLING_RATE:g} s, where Qwen3-ASR has "
                f"{audio_tokens(samples)}: its files are not those of such a model"
            )


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "…"
