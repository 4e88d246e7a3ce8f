"""What ft-vision registers."""

from __future__ import annotations

from ft_core.plugins.specs import ModalitySpec

__all__ = ["VISION"]

VISION = ModalitySpec(
    name="vision",
    summary="images, read and checked; training on them is not there yet",
    read="ft_vision.images:read_image",
    extensions=(".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
)
