"""A CSM to be trained: its codec frozen and in float32, its depth decoder trained as the configuration says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ft_core.errors import ConfigError, ModelError
from ft_speech.csm.settings import csm_of

if TYPE_CHECKING:
    from ft_core.config import TrainConfig
    from ft_core.models import Device, ModelSource

__all__ = [
    "CODEC", "DEPTH", "adapter_options", "check_parts", "depth_of", "load_for_training", "load_processor", "plain",
    "restore_codec",
]  # fmt: skip

CODEC, DEPTH = "codec_model", "depth_decoder"
"""Attributes of ``CsmForConditionalGeneration``."""


def load_for_training(source: ModelSource, config: TrainConfig, device: Device, head: str) -> Any:
    """The model that ``config`` trains, as :func:`ft_core.models.load_for_training`.

    Its codec is frozen and has float32 weights whatever the rest has: rounded ones give other codes.

    Raises:
        ModelError: it cannot be loaded, or its parts do not fit together.
        ConfigError: ``tts.csm`` or ``quantization`` asks for what cannot be trained.
    """
    from transformers import CsmForConditionalGeneration

    from ft_core.models import load_for_training as load

    depth = depth_of(config)
    if config.quantization != "none":
        raise ConfigError(
            f"quantization: {config.quantization} would quantize the codec of a csm too, whose codes would change "
            "(allowed: none)"
        )
    model: Any = load(source, config, device, head, CsmForConditionalGeneration)
    check_parts(model, source.reference)
    restore_codec(model, source.path)
    model.codec_model.requires_grad_(False)
    model.depth_decoder.model.register_forward_pre_hook(_all_seen, with_kwargs=True)
    if config.lora is None:
        if depth == "frozen":
            model.depth_decoder.requires_grad_(False)
        model.save_pretrained = _Saving(model, source.path)
    return model


def depth_of(config: TrainConfig) -> Literal["lora", "frozen", "full"]:
    """What is trained of the depth decoder.

    Raises:
        ConfigError: adapters without ``lora``.
    """
    asked = csm_of(config).depth_decoder
    if asked == "lora" and config.lora is None:
        raise ConfigError("tts.csm.depth_decoder: lora needs lora (it is null: allowed are frozen, full)")
    return asked or ("full" if config.lora is None else "lora")


def check_parts(model: Any, name: str) -> None:
    """Refuse a codec that the backbone and the depth decoder were not made for.

    Raises:
        ModelError: it has too few codebooks, or more codes than they have numbers.
    """
    config, codec = model.config, model.codec_model.config
    if codec.model_type != "mimi":
        raise ModelError(f"the model {name} has a codec of type {codec.model_type}, where a csm has mimi")
    if codec.num_quantizers < config.num_codebooks or codec.codebook_size > config.vocab_size:
        raise ModelError(
            f"the model {name} is made for frames of {config.num_codebooks} codes below {config.vocab_size}, its codec "
            f"makes {codec.num_quantizers} below {codec.codebook_size}"
        )


def load_processor(source: ModelSource, config: TrainConfig, tokenizer: Any) -> Any:
    """transformers' processor of the model, with this tokenizer.

    Raises:
        ModelError: it cannot be loaded, or the tokenizer is not of the model's.
    """
    from transformers import CsmConfig, CsmProcessor

    try:
        processor = CsmProcessor.from_pretrained(source.path, trust_remote_code=False)
        own = CsmConfig.from_pretrained(source.path)
    except Exception as error:  # its files may lack or hold anything
        words = " ".join(str(error).split())
        raise ModelError(f"the processor of {source.reference} cannot be loaded: {words[:300]}") from error
    processor.tokenizer = tokenizer
    for token in ("bos_token", "eos_token"):
        if getattr(tokenizer, token) is None:
            raise ModelError(f"the tokenizer of {source.reference} has no {token}, between which a csm's texts stand")
    if processor.audio_token_id != own.audio_token_id or processor.audio_eos_token_id != own.audio_eos_token_id:
        raise ModelError(
            f"the tokenizer of {source.reference} has {processor.audio_token} and {processor.audio_eos_token} as "
            f"{processor.audio_token_id} and {processor.audio_eos_token_id}, its config.json as {own.audio_token_id} "
            f"and {own.audio_eos_token_id}: its files are not of one model"
        )
    return processor


def adapter_options(model: Any, config: TrainConfig) -> dict[str, Any]:
    """What :func:`ft_core.add_lora` is told beside ``lora``: no adapters in the codec, and what the depth decoder has.

    Trained whole, it is put aside module by module, all but its embedding: that one is the backbone's, and a copy would
    no longer be when the adapter is merged.
    """
    depth = depth_of(config)
    without = [CODEC] if depth == "lora" else [CODEC, DEPTH]
    options: dict[str, Any] = {"exclude": rf"(.*\.)?({'|'.join(map(re.escape, without))})(\..*)?"}
    if depth == "full":
        given = None if config.lora is None else config.lora.modules_to_save
        layers = len(model.depth_decoder.model.layers)
        parts = [*(f"model.layers.{number}" for number in range(layers)), "model.norm", "model.inputs_embeds_projector"]
        options["modules_to_save"] = [*(given or ()), *(f"{DEPTH}.{part}" for part in parts), f"{DEPTH}.codebooks_head"]
    return options


def plain(model: Any) -> Any:
    """The ``CsmForConditionalGeneration`` in what may be wrapped around it; adapters stay in its layers."""
    from ft_core.fast.find import unwrapped

    return unwrapped(model)


def restore_codec(model: Any, folder: Path) -> None:
    """Give the codec the weights that the model's files hold, in float32.

    Raises:
        ModelError: they do not hold them all.
    """
    import torch
    from safetensors import safe_open
    from transformers import MimiModel

    prefix, found = f"{CODEC}.", {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # no dict
                if key.startswith(prefix):
                    found[key.removeprefix(prefix)] = file.get_tensor(key)
    # By transformers: in files its weights have other names than in the model.
    made, report = MimiModel.from_pretrained(
        None, config=model.config.codec_config, state_dict=found, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"the model {folder} lacks {len(missing)} weights of its codec, {missing[0]} first")
    model.codec_model.float().load_state_dict(made.state_dict())


def _all_seen(module: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Say that no place of the depth decoder's rows is padding. Without a mask and a cache transformers (5.23 at least)
    looks for packed documents in its positions, and fails where there are as many rows as places in a row."""
    ids = keywords.get("input_ids")
    if ids is not None and keywords.get("attention_mask") is None and keywords.get("past_key_values") is None:
        keywords = {**keywords, "attention_mask": ids.new_ones(ids.shape)}
    return args, keywords


class _Saving:
    """``save_pretrained`` of a model that was trained in full, which is rounded to 16 bits as a whole before: its codec
    is written as it was read. Nor is a text's end written as what ends its speech, which for a CSM is a frame of codes.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self._model, self._folder, self._own = model, folder, model.save_pretrained
        self._stop = model.generation_config.eos_token_id

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self._model.generation_config.eos_token_id = self._stop
        if next(self._model.codec_model.parameters()).dtype.itemsize < 4:
            restore_codec(self._model, self._folder)
        return self._own(*args, **keywords)
