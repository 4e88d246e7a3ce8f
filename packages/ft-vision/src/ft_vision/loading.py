"""Models that see and their processors: transformers' own objects, without torchvision."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from ft_core.errors import ConfigError, ModelError
from ft_vision.budgets import bound_pixels
from ft_vision.families.parts import Family, family_of, image_token_of
from ft_vision.families.processors import image_options, processor_class
from ft_vision.families.towers import tell_lengths
from ft_vision.settings import VisionSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ft_core.config import TrainConfig
    from ft_core.models import Device, ModelSource

__all__ = [
    "adapter_options", "config_of", "image_backend", "load_for_training", "load_processor", "processor_of",
    "settings_of",
]  # fmt: skip


def settings_of(config: TrainConfig) -> VisionSettings:
    """The configuration's section ``vision``, checked."""
    from ft_core.config.load import modality_settings

    return cast(VisionSettings, modality_settings(config))


def load_for_training(source: ModelSource, config: TrainConfig, device: Device, head: str) -> PreTrainedModel:
    """The model that ``config`` trains, as :func:`ft_core.models.load_for_training`; its parts frozen or not.

    With an adapter everything else is frozen by PEFT. Trained in full, the tower and the projector are frozen here
    unless the section ``vision`` says ``full``.

    Raises:
        ModelError: it cannot be loaded, or is of no known family.
        ConfigError: ``vision`` asks for what cannot be trained.
    """
    from transformers import AutoModelForImageTextToText

    from ft_core.models import load_for_training as load

    family = family_of(config_of(source), source.reference)
    settings = settings_of(config)
    for part in ("tower", "projector"):
        how = getattr(settings, part)
        if how == "lora" and config.lora is None:
            raise ConfigError(f"vision.{part}: lora needs lora (it is null: allowed are frozen, full)")
        if how == "full" and config.quantization != "none":
            raise ConfigError(
                f"vision.{part}: full needs quantization: none (it is {config.quantization}: allowed are frozen, lora)"
            )
    model = load(source, config, device, head, AutoModelForImageTextToText)
    model.config.get_text_config().use_cache = False
    if device.type == "cuda":
        tell_lengths(model)
    if config.lora is None:
        for name in _frozen(family, settings, ("frozen",)):
            model.get_submodule(f"model.{name}").requires_grad_(False)
        if settings.projector == "frozen":
            for name in family.loose:
                model.get_parameter(f"model.{name}").requires_grad_(False)
    return model


def adapter_options(model: Any, config: TrainConfig) -> dict[str, Any]:
    """What :func:`ft_core.add_lora` is told beside ``lora``: which parts have no adapter, which are trained whole.

    The names that ``lora.targets`` matches are often those of the tower's layers too, so that they are left out by
    their place, not by their name.
    """
    family, settings = family_of(model.config, config.model), settings_of(config)
    without = _frozen(family, settings, ("frozen", "full"))
    options: dict[str, Any] = {}
    if without:
        options["exclude"] = rf"(.*\.)?({'|'.join(map(re.escape, without))})(\..*)?"
    whole = [name for part in _frozen(family, settings, ("full",)) for name in _modules(model, part)]
    if whole:
        given = None if config.lora is None else config.lora.modules_to_save
        options["modules_to_save"] = [*(given or ()), *whole]
    return options


def _frozen(family: Family, settings: VisionSettings, how: tuple[str, ...]) -> list[str]:
    """The modules of the parts that are trained in one of these ways."""
    parts = ((settings.tower, family.tower), (settings.projector, family.projector))
    return [name for trained, names in parts if trained in how for name in names]


def _modules(model: Any, name: str) -> Iterator[str]:
    """A module by the end of its name that is no other's; of a list, which PEFT cannot put aside, its members."""
    import torch

    module = model.get_submodule(f"model.{name}")
    if isinstance(module, torch.nn.ModuleList):
        yield from (f"{name}.{number}" for number in range(len(module)))
    else:
        yield name


def config_of(source: ModelSource) -> Any:
    """The model's configuration, of transformers.

    Raises:
        ModelError: it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.path, trust_remote_code=False)
    except Exception as error:  # an unknown type, a key missing, or a field that the class refuses
        raise ModelError(f"the model {source.reference} cannot be used: {_line(error)}") from error


def load_processor(source: ModelSource, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model's processor for images and text, with this tokenizer and the pixel budget of ``vision``.

    Where a family's processor wants what images do not need (:mod:`ft_vision.families.processors`), it is made
    without.

    Raises:
        ModelError: it cannot be loaded, or it has no chat template.
        ConfigError: a pixel budget that the family has no choice for.
    """
    processor = processor_of(source, tokenizer, settings_of(config).backend)
    if processor.chat_template is None:
        raise ModelError(
            f"the processor of {source.reference} has no chat template, so that conversations cannot be written as it "
            "knows them: take a model that was tuned to answer"
        )
    bound_pixels(processor.image_processor, image_options(processor), settings_of(config), source.reference)
    return processor


def processor_of(source: ModelSource, tokenizer: PreTrainedTokenizerBase, backend: str = "auto") -> Any:
    """The model's processor with this tokenizer, as its files have it.

    Args:
        backend: what processes images (``vision.backend``).

    Raises:
        ModelError: it cannot be loaded, or the model is of no known family.
        ConfigError: the backend is not installed.
    """
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    own = config_of(source)
    family_of(own, source.reference)
    chosen = image_backend(backend)
    try:
        processor = processor_class(own, source.path).from_pretrained(source.path, trust_remote_code=False)
        if chosen is not None:
            processor.image_processor = AutoImageProcessor.from_pretrained(
                source.path, backend=chosen, trust_remote_code=False
            )
    except ImportError as error:
        raise ModelError(
            f"the processor of {source.reference} needs a library that is not installed{_missing(error)}"
        ) from error
    except Exception as error:  # its files may lack or hold anything
        raise ModelError(f"the processor of {source.reference} cannot be loaded: {_line(error)}") from error
    processor.tokenizer = tokenizer
    if processor.chat_template is None:
        processor.chat_template = tokenizer.chat_template
    _check_words(processor, own, source.reference)
    return processor


def image_backend(asked: str) -> str | None:
    """transformers' name of what processes images, by ``vision.backend``; None where the choice is its own.

    Both give the same image up to rounding, not to the bit: torchvision resizes 8-bit pixels with other arithmetic than
    Pillow. So what a model was trained with matters little, and its machine's choice is the quicker one.

    Raises:
        ConfigError: it asks for torchvision, which is not installed.
    """
    if _has_torchvision():
        return {"pillow": "pil", "torchvision": "torchvision"}.get(asked)
    if asked == "torchvision":
        raise ConfigError(
            "vision.backend: torchvision is not installed; install the one made for your torch "
            "(https://pytorch.org/get-started), or set backend: auto, which takes Pillow without it"
        )
    return None  # there is Pillow alone


def _has_torchvision() -> bool:
    from transformers.utils.import_utils import is_torchvision_available

    return bool(is_torchvision_available())


def _missing(error: ImportError) -> str:
    """The libraries that transformers asks for, as what to install; its own words where it names none."""
    line = _line(error)
    known = {"torchvision": "torchvision", "pil": "pillow", "pillow": "pillow", "sentencepiece": "sentencepiece"}
    named = [known[word] for word in re.findall(r"[a-z]+", line.lower()) if word in known]
    asked = [library for library in dict.fromkeys(named) if find_spec({"pillow": "PIL"}.get(library, library)) is None]
    return f"; pip install {' '.join(asked)}" if asked else f": {line}"


def _check_words(processor: Any, config: Any, name: str) -> None:
    """Refuse a processor whose files lack what an image's words follow from, or that is another model's."""
    from PIL import Image

    try:
        made = processor.image_processor([Image.new("RGB", (64, 64))], return_tensors="pt", **image_options(processor))
        word = processor.replace_image_token(made, image_idx=0)
    except Exception as error:  # a value that its configuration leaves out is None, in some computation or other
        raise ModelError(
            f"the processor of {name} cannot write an image as tokens: {_line(error)} (does its processor_config.json "
            "lack a value, such as patch_size?)"
        ) from error
    token = image_token_of(config)
    if token not in processor.tokenizer(word, add_special_tokens=False)["input_ids"]:
        raise ModelError(
            f"the processor of {name} writes images without the token {token}, which its config.json says stands for "
            "them: its files are not of one model"
        )


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "…"
