"""What differs between the families of models that see: where their parts lie, and what their forward passes take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ft_core.errors import ModelError

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclass(frozen=True)
class Family:
    """A family of vision-language models, as transformers has it.

    Attributes:
        tower: the modules of the vision tower, below ``model``.
        projector: the modules that lead from it to the language model.
        has_grids: whether images have a size of their own, told to the model in patches (``image_grid_thw``), and
            positions have three coordinates (Qwen2-VL, arXiv:2409.12191, section 2.1).
        types: the keyword that says of each token whether it stands for a piece of an image; None if there is none.
    """

    tower: tuple[str, ...]
    projector: tuple[str, ...]
    has_grids: bool = False
    types: str | None = None


_QWEN = "mm_token_type_ids"
_APART = (("vision_tower",), ("multi_modal_projector",))

FAMILIES: dict[str, Family] = {
    "gemma3": Family(*_APART, types="token_type_ids"),
    "llava": Family(*_APART),
    "qwen2_5_vl": Family(("visual.patch_embed", "visual.blocks"), ("visual.merger",), has_grids=True, types=_QWEN),
    "qwen3_vl": Family(
        ("visual.patch_embed", "visual.pos_embed", "visual.blocks"),
        ("visual.merger", "visual.deepstack_merger_list"),
        has_grids=True,
        types=_QWEN,
    ),
}
"""The families by the ``model_type`` of their configurations."""


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
