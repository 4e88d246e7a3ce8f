"""What an optimizer of another library's costs beside its updates, taken out; and parts with a rate of their own."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ft_core.config import TrainConfig
from ft_core.errors import ConfigError

if TYPE_CHECKING:
    from ft_core.planning import Plan

__all__ = ["QueuedUpdates", "Rates", "check_rates", "forget_overrides", "give_rates", "optimizer_of", "queued"]

Rates = Mapping[str, tuple[str, float]]
"""Learning rates of parts: by a part's name what the whole names of its parameters match, and the rate's peak."""

PAGEABLE = "adamw_8bit"
"""The optimizer whose state a plan may page to the host; ``paged_adamw_8bit`` makes the same updates."""
MOMENTS = ("state1", "state2")
MARKS = ("is_paged", "page_deviceid")
"""By which bitsandbytes knows a tensor in memory that the system moves between host and GPU."""


def optimizer_of(config: TrainConfig, planned: Plan | None) -> str:
    """The optimizer, by transformers' name: the configuration's own, with its state where it was planned to lie."""
    named = config.training.optimizer
    return named if planned is None or named != PAGEABLE else planned.peak.optimizer


class QueuedUpdates:
    """Put before a class of bitsandbytes': its updates are queued one after the other.

    Its own ``step`` waits for the GPU after each parameter. An adapter on all linear layers of 32 has 448 of them, for
    which the GPU idled 25 ms a step where the updates themselves take one. Nothing needs the waits but paged states,
    which the system moves; the updates are the library's own.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        this: Any = self
        if this.is_paged or not this.initialized:
            return super().step(closure)  # type: ignore[misc]
        import torch

        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for number, group in enumerate(this.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if parameter.grad is None:
                        continue
                    if not this.state[parameter]:
                        this.init_state(group, parameter, number, index)
                    this.update_step(group, parameter, number, index)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **keywords: Any) -> None:
        """Take a state, and page again what is to be: of paged memory a file keeps the numbers, and the mark of it."""
        this: Any = self
        super().load_state_dict(state_dict, *args, **keywords)  # type: ignore[misc]
        for group in this.param_groups:
            for parameter in group["params"]:
                _page_again(this, parameter)


def _page_again(optimizer: Any, parameter: Any) -> None:
    import torch

    from ft_core.planning.weights import PAGED

    state = optimizer.state.get(parameter, {})
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        for mark in MARKS:
            vars(tensor).pop(mark, None)
        if name in MOMENTS and optimizer.is_paged and parameter.is_cuda and parameter.numel() >= PAGED:
            state[name] = optimizer.get_state_buffer(parameter, dtype=tensor.dtype)
            state[name].copy_(tensor)
        elif name in MOMENTS:
            state[name] = tensor.to(parameter.device)


def queued(optimizer: Any) -> Any:
    """A class of bitsandbytes' optimizers with queued updates; any other class, or what makes one, as it is."""
    if not isinstance(optimizer, type) or not optimizer.__module__.startswith("bitsandbytes."):
        return optimizer
    # transformers looks at the name of the class and of its module.
    return type(optimizer.__name__, (QueuedUpdates, optimizer), {"__module__": optimizer.__module__})


def check_rates(model: Any, rates: Rates, section: str) -> None:
    """Refuse the rate of a part of which nothing is trained.

    Args:
        section: the configuration's section in which the rates stand, ``NAME_learning_rate`` each.

    Raises:
        ConfigError: names the key.
    """
    for name, (pattern, rate) in rates.items():
        if not any(p.requires_grad and re.fullmatch(pattern, key) for key, p in model.named_parameters()):
            raise ConfigError(
                f"{section}.{name}_learning_rate: {rate} is for parameters of which none is trained: lora.targets "
                "reaches none of them; name some of their layers, or remove the key"
            )


def give_rates(optimizer: Any, model: Any, rates: Rates) -> None:
    """Divide the groups of an optimizer that has made no step: the parts' parameters get groups with their rates.

    Any optimizer takes a rate from a parameter's group, and so does the scheduler, which multiplies each group's by the
    same factor. The first group stays one of the run's own rate, which is what is logged as the learning rate; what
    else a group says, its weight decay first, is kept.
    """
    rate_of = {
        id(parameter): rate
        for key, parameter in model.named_parameters()
        for pattern, rate in rates.values()
        if re.fullmatch(pattern, key)
    }
    own, others = [], []
    for group in optimizer.param_groups:
        divided: dict[float | None, list[Any]] = {None: []}
        for parameter in group["params"]:
            divided.setdefault(rate_of.get(id(parameter)), []).append(parameter)
        own.append({**group, "params": divided.pop(None)})
        others += [{**group, "params": params, "lr": rate} for rate, params in divided.items()]
    optimizer.param_groups[:] = own + others


def forget_overrides(model: Any) -> None:
    """Let go of a model's layers whose training is over.

    For an 8-bit optimizer transformers asks bitsandbytes for 32-bit states of embeddings, trained or not. It keeps a
    list of such layers as long as the process lives: each training would leave its embedding on the GPU, a gigabyte of
    a large vocabulary.
    """
    library = sys.modules.get("bitsandbytes.optim")
    if library is None:
        return
    manager: Any = library.GlobalOptimManager.get_instance()
    modules, parameters = set(map(id, model.modules())), set(map(id, model.parameters()))
    kept = [one for one in manager.module_weight_config_triple if id(one[0]) not in modules]
    manager.module_weight_config_triple[:] = kept
    dropped = [manager.pid2config.pop(key) for key in parameters & manager.pid2config.keys()]
    for place in [place for place, config in manager.index2config.items() if any(config is one for one in dropped)]:
        del manager.index2config[place]
