"""The section ``vision`` of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ft_core.config.numbers import Section, Switch, Whole

__all__ = ["VisionSettings"]

Trained = Literal["frozen", "lora", "full"]


class VisionSettings(Section):
    """How a model that sees is trained, and what its images may be.

    Attributes:
        tower: what is trained of the vision tower: nothing, adapters on its linear layers, or all of its weights.
        projector: the same of what leads from the tower to the language model.
        max_pixels: an image of more is made smaller, for families whose images have a size of their own.
        min_pixels: an image of fewer is made larger, for the same families.
        on_bad_image: what to do where an image is missing, damaged, too large or of no pixels: ``stop`` with a line
            that names it, or ``skip`` its row and count it.
        workers: processes that read images and make batches ahead; unset means 4 for a GPU, and none for a CPU.
        ignore_case: whether upper and lower case are the same where answers are measured.
        whitespace: how white space in answers is taken; see :class:`ft_core.text_metrics.Normalisation`.
    """

    tower: Trained = "frozen"
    projector: Trained = "frozen"
    max_pixels: Whole | None = Field(default=None, ge=1)
    min_pixels: Whole | None = Field(default=None, ge=1)
    on_bad_image: Literal["stop", "skip"] = "stop"
    workers: Whole | None = Field(default=None, ge=0, le=64)
    ignore_case: Switch = False
    whitespace: Literal["collapse", "strip", "keep"] = "collapse"

    @model_validator(mode="after")
    def _in_order(self) -> VisionSettings:
        if self.max_pixels is not None and self.min_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"vision.min_pixels: {self.min_pixels} is more than vision.max_pixels {self.max_pixels}")
        return self
