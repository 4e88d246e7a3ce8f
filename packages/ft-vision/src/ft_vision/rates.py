"""Learning rates of the vision tower and the projector, where they are not the run's."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ft_vision.families.parts import family_of
from ft_vision.loading import settings_of

if TYPE_CHECKING:
    from ft_core.config import TrainConfig

__all__ = ["rates"]


def rates(model: Any, config: TrainConfig) -> dict[str, tuple[str, float]]:
    """The parts with a rate of their own; see :attr:`ft_core.plugins.ModalitySpec.rates`.

    A part's parameters are its loose ones and all below its modules: weights, adapters, and the copies that PEFT trains
    whole.
    """
    family, settings = family_of(model.config, config.model), settings_of(config)
    parts = {
        "tower": (family.tower, settings.tower_learning_rate),
        "projector": ((*family.projector, *family.loose), settings.projector_learning_rate),
    }
    return {
        name: (rf"(.*\.)?({'|'.join(map(re.escape, modules))})(\..*)?", rate)
        for name, (modules, rate) in parts.items()
        if rate is not None
    }
