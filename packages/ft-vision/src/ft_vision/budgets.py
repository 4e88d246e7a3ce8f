"""A pixel budget, in each image processor's own words, so that it is saved with the processor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ft_core.errors import ConfigError
from ft_vision.settings import VisionSettings

__all__ = ["bound_pixels", "can_be_bounded"]


def bound_pixels(images: Any, options: Mapping[str, Any], settings: VisionSettings, name: str) -> None:
    """Give an image processor the ``max_pixels`` and ``min_pixels`` of ``vision``, where they are set.

    Three kinds of processors have a size to choose. Qwen's keeps an image's shape between two numbers of pixels.
    Pixtral's bounds its longer edge: the edge becomes the longest multiple of a patch whose square is within the
    budget. SmolVLM's and Idefics 3's bring it to one edge and cut it into square tiles: the edge becomes that of as
    many tiles, squared, as the budget holds. The last two are never raised above the model's own.

    Args:
        images: the image processor; its ``size`` is changed.
        options: what its processor tells it beside the images.
        settings: the section ``vision``.
        name: the model's, for messages.

    Raises:
        ConfigError: the model has no such choice, or none within the budget; it says what to do.
    """
    given = [key for key in ("max_pixels", "min_pixels") if getattr(settings, key) is not None]
    if not given:
        return
    kind, size, told = _kind(images), _size(images), {**vars(images), **options}
    if kind == "LlavaNextImageProcessor":
        raise ConfigError(
            f"vision.{given[0]}: {name} cuts every image into tiles by a list of its own (image_grid_pinpoints, in its "
            "config.json too); remove the key"
        )
    if not can_be_bounded(images, options):
        raise ConfigError(f"vision.{given[0]}: {name} sees every image at the same size, {size}; remove the key")
    if kind == "Qwen2VLImageProcessor":
        made = _between(size, _patch(told) * int(told["merge_size"]), settings, name)
    elif kind == "PixtralImageProcessor":
        made = _edge(size["longest_edge"], _patch(told), settings, name)
    else:
        made = _edge(size["longest_edge"], dict(images.max_image_size)["longest_edge"], settings, name)
    images.size = made if isinstance(images.size, dict) else type(images.size)(**made)


def can_be_bounded(images: Any, options: Mapping[str, Any]) -> bool:
    """Whether an image processor has a size to choose; the arguments are those of :func:`bound_pixels`."""
    kind = _kind(images)
    if kind in ("Idefics3ImageProcessor", "SmolVLMImageProcessor"):
        return bool({**vars(images), **options}.get("do_image_splitting", True))
    return kind == "Qwen2VLImageProcessor" or (kind == "PixtralImageProcessor" and "longest_edge" in _size(images))


def _kind(images: Any) -> str:
    """The class's name, whichever library it works with."""
    return type(images).__name__.removesuffix("Pil").removesuffix("Fast")


def _size(images: Any) -> dict[str, int]:
    return {key: value for key, value in dict(images.size).items() if value is not None}


def _between(size: Mapping[str, int], edge: int, settings: VisionSettings, name: str) -> dict[str, int]:
    """Qwen's: the names are transformers', but they are numbers of pixels, not of edges. ``edge`` is a token's."""
    if settings.max_pixels is not None and settings.max_pixels < edge * edge:
        raise ConfigError(
            f"vision.max_pixels: {settings.max_pixels} is less than {name} can see an image with, {edge} x {edge} = "
            f"{edge * edge}; give at least that"
        )
    made = dict(size)
    if settings.max_pixels is not None:
        made["longest_edge"] = settings.max_pixels
        made["shortest_edge"] = min(made["shortest_edge"], settings.max_pixels)
    if settings.min_pixels is not None:
        made["shortest_edge"] = settings.min_pixels
        made["longest_edge"] = max(made["longest_edge"], settings.min_pixels)
    return made


def _edge(own: int, step: int, settings: VisionSettings, name: str) -> dict[str, int]:
    """The longest edge, a multiple of ``step``, whose square is within the budget, and at most the model's own."""
    if settings.min_pixels is not None:
        raise ConfigError(f"vision.min_pixels: {name} has no smallest size of an image to choose; remove the key")
    assert settings.max_pixels is not None
    edge = math.isqrt(settings.max_pixels) // step * step
    if edge == 0:
        raise ConfigError(
            f"vision.max_pixels: {settings.max_pixels} is less than {name} can see an image with, {step} x {step} = "
            f"{step * step}; give at least that"
        )
    return {"longest_edge": min(edge, own)}


def _patch(told: Mapping[str, Any]) -> int:
    """The edge of a patch, after merging, in pixels."""
    patch = told["patch_size"]
    if isinstance(patch, int):
        return patch
    given = dict(patch)
    return max(int(given["height"]), int(given["width"]))
