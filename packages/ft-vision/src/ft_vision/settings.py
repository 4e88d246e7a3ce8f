"""The section ``vision`` of a configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ft_core.config.numbers import Number, Section, Switch, Whole

__all__ = ["MOST_FRAMES", "VisionSettings"]

MOST_FRAMES = 1024
"""The most that ``vision.video_frames`` may be."""

Trained = Literal["frozen", "lora", "full"]


def _hosts(value: Any) -> Any:
    if isinstance(value, bool) or (
        isinstance(value, list) and value and all(isinstance(host, str) and _is_host(host) for host in value)
    ):
        return value
    raise ValueError("true, false, or a list of hosts such as images.example.org or 127.0.0.1:8000")


def _is_host(text: str) -> bool:
    return bool(text) and not any(mark in text for mark in "/@?# ")


class VisionSettings(Section):
    """How a model that sees is trained, and what its images may be.

    Attributes:
        tower: what is trained of the vision tower: nothing, adapters on its linear layers, or all of its weights.
        projector: the same of what leads from the tower to the language model.
        tower_learning_rate: the peak of the learning rate of what is trained of the tower; unset means
            ``training.learning_rate``. It follows the same schedule.
        projector_learning_rate: the same of the projector.
        max_pixels: an image of more is made smaller, for families with a choice: Qwen's; Pixtral and Mistral 3, whose
            images' longer edge it bounds; SmolVLM and Idefics 3, whose tiles it counts (:mod:`ft_vision.budgets`).
        min_pixels: an image of fewer is made larger, for Qwen's families.
        video_frames: how many frames are taken of a video, evenly; of one that has fewer, all.
        allow_urls: whether images may be http and https URLs: ``false``, ``true`` (hosts on the public internet), or a
            list of the hosts that may be asked, such as ``images.example.org`` or ``127.0.0.1:8000``, private ones too.
            They are fetched once, before training, into the Hugging Face cache.
        backend: what processes images: ``torchvision``, ``pillow``, or ``auto``, which is transformers' choice:
            torchvision where it is installed.
        on_bad_image: what to do where an image is missing, damaged, too large or of no pixels: ``stop`` with a line
            that names it, or ``skip`` its row and count it.
        workers: processes that read images and make batches ahead; unset means 4 for a GPU, and none for a CPU.
        ignore_case: whether upper and lower case are the same where answers are measured.
        whitespace: how white space in answers is taken; see :class:`ft_core.text_metrics.Normalisation`.
    """

    tower: Trained = "frozen"
    projector: Trained = "frozen"
    tower_learning_rate: Number | None = Field(default=None, gt=0)
    projector_learning_rate: Number | None = Field(default=None, gt=0)
    max_pixels: Whole | None = Field(default=None, ge=1)
    min_pixels: Whole | None = Field(default=None, ge=1)
    video_frames: Whole = Field(default=8, ge=1, le=MOST_FRAMES)
    allow_urls: Annotated[Switch | list[str], BeforeValidator(_hosts)] = False
    backend: Literal["auto", "pillow", "torchvision"] = "auto"
    on_bad_image: Literal["stop", "skip"] = "stop"
    workers: Whole | None = Field(default=None, ge=0, le=64)
    ignore_case: Switch = False
    whitespace: Literal["collapse", "strip", "keep"] = "collapse"

    @model_validator(mode="after")
    def _in_order(self) -> VisionSettings:
        if self.max_pixels is not None and self.min_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"vision.min_pixels: {self.min_pixels} is more than vision.max_pixels {self.max_pixels}")
        for part in ("tower", "projector"):
            rate = getattr(self, f"{part}_learning_rate")
            if rate is not None and getattr(self, part) == "frozen":
                raise ValueError(
                    f"vision.{part}_learning_rate: {rate} is for a part that is frozen: set vision.{part} to lora or "
                    "full, or remove the key"
                )
        return self
