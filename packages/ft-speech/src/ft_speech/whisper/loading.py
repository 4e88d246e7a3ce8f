"""Whisper and its processor, loaded for training: transformers' own objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

from ft_core.errors import ConfigError, ModelError
from ft_speech.listening.settings import SttSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ft_core.config import TrainConfig
    from ft_core.models import Device, ModelSource

__all__ = ["adapter_options", "encoder_of", "load_for_training", "load_processor", "settings_of"]

ENCODER = "model.encoder"
EXCLUDED = r"(.*\.)?model\.encoder(\..*)?"


def settings_of(config: TrainConfig) -> SttSettings:
    """The configuration's section ``stt``, checked.

    Raises:
        ConfigError: silence is to be trimmed, and times learnt.
    """
    from ft_core.config.load import modality_settings

    settings = cast(SttSettings, modality_settings(config))
    if settings.trim_silence is not None and settings.timestamps:
        raise ConfigError("stt.trim_silence would move the times that stt.timestamps trains (allowed: one of them)")
    return settings


def encoder_of(config: TrainConfig) -> Literal["frozen", "lora", "full"]:
    """What is trained of the encoder; unset, what is of the decoder.

    Raises:
        ConfigError: ``stt.encoder`` asks for what cannot be trained.
    """
    chosen = settings_of(config).encoder
    if chosen == "lora" and config.lora is None:
        raise ConfigError("stt.encoder: lora needs lora (it is null: allowed are frozen, full)")
    if chosen == "full" and config.quantization != "none":
        raise ConfigError(
            f"stt.encoder: full needs quantization: none (it is {config.quantization}: allowed are frozen, lora)"
        )
    return chosen or ("full" if config.lora is None else "lora")


def load_for_training(source: ModelSource, config: TrainConfig, device: Device, head: str) -> PreTrainedModel:
    """The model that ``config`` trains, as :func:`ft_core.models.load_for_training`; its encoder frozen or not.

    With an adapter everything else is frozen by PEFT. Trained in full, the encoder is frozen here where ``stt.encoder``
    says so. What it computes is the same for any frozen encoder, and no gradient is kept for it.

    Raises:
        ModelError: it cannot be loaded.
        ConfigError: ``stt`` asks for what cannot be trained.
    """
    from transformers import AutoModelForSpeechSeq2Seq

    from ft_core.models import load_for_training as load

    encoder = encoder_of(config)
    model = load(source, config, device, head, AutoModelForSpeechSeq2Seq)
    if config.lora is None and encoder == "frozen":
        model.get_submodule(ENCODER).requires_grad_(False)
    return model


def adapter_options(model: Any, config: TrainConfig) -> dict[str, Any]:
    """What :func:`ft_core.add_lora` is told beside ``lora``: whether the encoder has an adapter, or is trained whole.

    The names that ``lora.targets`` matches are those of the encoder's layers too, so that it is left out by its place.
    """
    encoder = encoder_of(config)
    if encoder == "lora":
        return {}
    options: dict[str, Any] = {"exclude": EXCLUDED}
    if encoder == "full":
        given = None if config.lora is None else config.lora.modules_to_save
        options["modules_to_save"] = [*(given or ()), ENCODER]
    return options


def load_processor(source: ModelSource, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model's ``WhisperProcessor``, with this tokenizer.

    Raises:
        ModelError: it cannot be loaded, or makes other features than the model takes.
    """
    from transformers import AutoConfig, WhisperFeatureExtractor, WhisperProcessor

    try:
        model = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
        features = WhisperFeatureExtractor.from_pretrained(source.path)
    except Exception as error:  # the files may lack or hold anything
        line = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the feature extractor of {source.reference} cannot be loaded (preprocessor_config.json): {line}"
        ) from error
    made = (features.feature_size, features.nb_max_frames)
    taken = (model.num_mel_bins, 2 * model.max_source_positions)
    if made != taken:
        raise ModelError(
            f"the feature extractor of {source.reference} makes {made[0]} x {made[1]} features of a recording, its "
            f"model takes {taken[0]} x {taken[1]}: preprocessor_config.json is not that of this model"
        )
    return WhisperProcessor(features, tokenizer)
