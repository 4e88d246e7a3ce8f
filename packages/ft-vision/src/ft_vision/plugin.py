"""What ft-vision registers."""

from __future__ import annotations

from ft_core.plugins.specs import ArchitectureSpec, ModalitySpec

__all__ = ["QWEN2_5_VL", "QWEN3_VL", "VISION"]

VISION = ModalitySpec(
    name="vision",
    summary="images, read and checked; training on them is not there yet",
    read="ft_vision.images:read_image",
    extensions=(".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
)


def _family(name: str, summary: str, module: str) -> ArchitectureSpec:
    describe = f"ft_vision.families.{module}:describe_{name}"
    return ArchitectureSpec(name=name, summary=summary, model_types=(name,), describe=describe)


QWEN3_VL = _family("qwen3_vl", "Qwen 3-VL, dense: images, and video by time, height and width", "qwen")
QWEN2_5_VL = _family("qwen2_5_vl", "Qwen 2.5-VL: images, and video by time, height and width", "qwen")
