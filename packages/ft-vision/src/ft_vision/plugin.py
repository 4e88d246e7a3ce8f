"""What ft-vision registers."""

from __future__ import annotations

from ft_core.plugins.specs import ModalitySpec

__all__ = ["VISION"]

VISION = ModalitySpec(
    name="vision",
    summary="models that see: conversations with images",
    read="ft_vision.images:read_image",
    extensions=(".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
    load="ft_vision.loading:load_for_training",
    settings="ft_vision.settings:VisionSettings",
    methods=("sft",),
    processor="ft_vision.loading:load_processor",
    rows="ft_vision.rows:normalise",
    adapter="ft_vision.loading:adapter_options",
    dataset="ft_vision.documents:dataset",
    collator="ft_vision.collating:collator",
    evaluate="ft_vision.evaluating:evaluate",
)
