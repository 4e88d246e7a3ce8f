"""What differs between the families of models that see: where their parts lie, and what their forward passes take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ft_core.errors import ModelError

__all__ = ["FAMILIES", "Family", "family_of", "image_token_of"]


@dataclass(frozen=True)
class Family:
    """A family of vision-language models, as transformers has it.

    Attributes:
        tower: the modules of the vision tower, below ``model``.
        projector: the modules that lead from it to the language model.
        loose: parameters below ``model`` that belong to the projector and are of no module of their own.
        has_grids: whether images have a size of their own, told to the model in patches (``image_grid_thw``), and
            positions have three coordinates (Qwen2-VL, arXiv:2409.12191, section 2.1).
        types: the keyword that says of each token whether it stands for a piece of an image; None if there is none.
        nested: whether pixels lie in a row for each row of tokens, [B, tiles, 3, height, width], filled up with zeros.
        tried: what the image processor is told, beside the usual, of the images that a model is tried with, so that
            they are few tokens.
    """

    tower: tuple[str, ...]
    projector: tuple[str, ...]
    loose: tuple[str, ...] = ()
    has_grids: bool = False
    types: str | None = None
    nested: bool = False
    tried: Mapping[str, Any] = field(default_factory=dict)


_QWEN = "mm_token_type_ids"
_APART = (("vision_tower",), ("multi_modal_projector",))
_IDEFICS = Family(("vision_model",), ("connector",), nested=True, tried={"do_image_splitting": False})

FAMILIES: dict[str, Family] = {
    "gemma3": Family(*_APART, types="token_type_ids"),
    "idefics3": _IDEFICS,
    "llava": Family(*_APART),
    "llava_next": Family(*_APART, loose=("image_newline",)),
    "mistral3": Family(*_APART),
    "qwen2_5_vl": Family(("visual.patch_embed", "visual.blocks"), ("visual.merger",), has_grids=True, types=_QWEN),
    "qwen3_vl": Family(
        ("visual.patch_embed", "visual.pos_embed", "visual.blocks"),
        ("visual.merger", "visual.deepstack_merger_list"),
        has_grids=True,
        types=_QWEN,
    ),
    "smolvlm": _IDEFICS,
}
"""The families by the ``model_type`` of their configurations. A Pixtral is a ``llava`` whose tower is one."""


def family_of(config: Any, name: str) -> Family:
    """The family of a model's configuration.

    Raises:
        ModelError: it is none of them; ``name`` is the model's.
    """
    kind = str(getattr(config, "model_type", None))
    if kind not in FAMILIES:
        raise ModelError(
            f"the model {name} is of the type {kind!r}, which task: vision does not train "
            f"(allowed: {', '.join(sorted(FAMILIES))})"
        )
    return FAMILIES[kind]


def image_token_of(config: Any) -> int:
    """The id of the token that stands for a piece of an image, by a model's configuration."""
    found = getattr(config, "image_token_id", None)
    return int(config.image_token_index if found is None else found)
