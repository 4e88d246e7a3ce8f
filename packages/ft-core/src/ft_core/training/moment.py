"""How things are before a step, so that it may be begun again as if it had not been."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ft_core.models.rotary import changes

__all__ = ["Moment", "changed_by_forward"]

KEPT = ("_metrics", "_total_train_tokens", "_step", "_current_train_step_time")
"""What TRL's trainers count while they compute a loss."""
FREQUENCIES = ("inv_freq", "max_seq_len_cached", "attention_scaling")
"""How the names end under which transformers' rotary embeddings keep what they change; a type of layer may precede."""


def changed_by_forward(model: nn.Module) -> list[nn.Module]:
    """The modules that a forward pass changes: running averages, and frequencies of the longest text so far."""
    norm = nn.modules.batchnorm._NormBase
    return [module for module in model.modules() if isinstance(module, norm) or changes(module, ("dynamic",))]


@dataclass(frozen=True)
class Moment:
    """What computing a loss changes beside gradients: random numbers drawn, buffers, and a trainer's own counts."""

    python: Any
    numpy: Any
    cpu: Tensor
    gpu: Tensor | None
    modules: list[_Module]
    counts: dict[str, Any]

    @classmethod
    def of(cls, trainer: Any, modules: Iterable[nn.Module]) -> Moment:
        """Now, with the state of these modules (see :func:`changed_by_forward`). Nothing waits for a CUDA GPU."""
        device, gpu = trainer.args.device, None
        if device.type == "cuda":
            gpu = torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            gpu = torch.mps.get_rng_state()
        counts = {name: _copied(getattr(trainer, name)) for name in KEPT if hasattr(trainer, name)}
        states = [_Module.of(module) for module in modules]
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu, states, counts)

    def restore(self, trainer: Any) -> None:
        """As it was."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.gpu is not None and trainer.args.device.type == "mps":
            torch.mps.set_rng_state(self.gpu)
        elif self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, trainer.args.device)
        for state in self.modules:
            state.restore()
        for name, value in self.counts.items():
            now = getattr(trainer, name)
            if isinstance(now, dict):  # held by others too
                _restore(now, value)
            else:
                setattr(trainer, name, value)


@dataclass(frozen=True)
class _Module:
    """A module's buffers, each with a copy, for its values may change or another tensor take its place."""

    module: nn.Module
    buffers: dict[str, tuple[Tensor, Tensor]]
    frequencies: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> _Module:
        buffers = {
            name: (buffer, buffer.clone())
            for name, buffer in module._buffers.items()
            if buffer is not None and not nn.parameter.is_lazy(buffer)
        }
        return cls(module, buffers, _frequencies(module))

    def restore(self) -> None:
        with torch.no_grad():
            for name, (buffer, was) in self.buffers.items():
                buffer.copy_(was)
                self.module._buffers[name] = buffer
        for name in _frequencies(self.module):
            if name not in self.frequencies:
                delattr(self.module, name)
        for name, value in self.frequencies.items():
            setattr(self.module, name, value)


def _frequencies(module: nn.Module) -> dict[str, Any]:
    """The plain attributes by which a rotary embedding remembers the longest text."""
    if not changes(module):
        return {}
    return {name: value for name, value in vars(module).items() if name.endswith(FREQUENCIES)}


def _copied(value: Any) -> Any:
    """Dictionaries and lists copied, what is in them not."""
    if isinstance(value, dict):
        return {key: _copied(below) for key, below in value.items()}
    return list(value) if isinstance(value, list) else value


def _restore(now: dict[Any, Any], was: dict[Any, Any]) -> None:
    for key in [key for key in now if key not in was]:
        del now[key]
    for key, value in was.items():
        if isinstance(value, dict) and isinstance(now.get(key), dict):
            _restore(now[key], value)
        else:
            now[key] = _copied(value)
