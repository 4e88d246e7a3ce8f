"""Processors without what images do not need: a part for videos, torchvision where Pillow does, words for numbers.

Each is transformers' own class with the one piece left out, is saved under that class's name, and gives the same ids
and pixels.
"""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["image_options", "processor_class"]

VIDEO = "video_preprocessor_config.json"
IMAGES = "preprocessor_config.json"


def processor_class(config: Any, folder: Path) -> Any:
    """What has the ``from_pretrained`` that makes the processor of the model in ``folder``.

    Args:
        config: the model's, of transformers.

    Raises:
        ImportError, KeyError: transformers has no processor for such a model here.
    """
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name

    named = _named(folder)
    if named == "PixtralProcessor" or (named is None and config.model_type == "mistral3"):
        return _pixtral()
    known = None if named is None else processor_class_from_name(named)
    known = PROCESSOR_MAPPING[type(config)] if known is None else known
    if "video_processor" not in known.get_attributes():
        return AutoProcessor
    return _without_videos(known, folder)


def _named(folder: Path) -> str | None:
    """The class that a model's files name for its processor, looked for where transformers looks."""
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("processor_class")
        except (OSError, ValueError, AttributeError):  # what is wrong with a file is said by who needs it
            continue
        if found is not None:
            return str(found)
    return None


def _pixtral() -> Any:
    """transformers' own, which it cannot import without torchvision, though nothing for training needs that."""
    try:
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor
    except ImportError:
        from ft_vision.families.pixtral import PixtralProcessor
    return PixtralProcessor


def _without_videos(known: Any, folder: Path) -> Any:
    """A processor's class that is made of an image processor and a tokenizer alone, and saved under its own name."""

    class Processor(known):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            made = super().save_pretrained(save_directory, *args, **kwargs)
            # For whoever reads it where there is one for videos: its own file, or the one that stands in for it.
            for name in (VIDEO, IMAGES):
                if (folder / name).is_file() and not (Path(save_directory) / name).exists():
                    shutil.copyfile(folder / name, Path(save_directory) / name)
                    break
            return made

    found = _without_numbers(Processor) if known.__name__ == "SmolVLMProcessor" else Processor
    found.__name__ = found.__qualname__ = known.__name__
    return found


def _without_numbers(known: Any) -> Any:
    """SmolVLM's, which asks for num2words to write how many frames a video has, and its template for their number."""
    from transformers import ProcessorMixin

    class Processor(known):
        def __init__(
            self, image_processor: Any, tokenizer: Any, image_seq_len: int = 169, chat_template: Any = None
        ) -> None:
            try:
                super().__init__(image_processor, tokenizer, None, image_seq_len, chat_template=chat_template)
            except ImportError:  # num2words is looked for last: all that belongs to images is set by then
                ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            return ProcessorMixin.apply_chat_template(self, *args, **kwargs)

    return Processor


class _Heard(Exception):
    """Ends a call whose keywords were noted."""


class _Listener:
    """Stands for an image processor, and notes what it is told."""

    def __init__(self, own: Any) -> None:
        self.own = own
        self.told: dict[str, Any] = {}

    def __call__(self, images: Any, **told: Any) -> Any:
        self.told = told
        raise _Heard

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["own"], name)


def image_options(processor: Any) -> dict[str, Any]:
    """What a processor tells its image processor beside the images, from its class and its files.

    Found by listening to it: these defaults win over the image processor's own, and some are computed (the patches of
    Pixtral's after merging).
    """
    from PIL import Image

    other = copy.copy(processor)
    other.image_processor = listener = _Listener(processor.image_processor)
    with suppress(_Heard):
        other(images=[Image.new("RGB", (1, 1))], return_tensors="pt")
    return {name: value for name, value in listener.told.items() if name != "return_tensors"}
