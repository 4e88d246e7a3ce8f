"""What an optimizer of another library's costs beside its updates, taken out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["QueuedUpdates", "queued"]


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


def queued(optimizer: Any) -> Any:
    """A class of bitsandbytes' optimizers with queued updates; any other class, or what makes one, as it is."""
    if not isinstance(optimizer, type) or not optimizer.__module__.startswith("bitsandbytes."):
        return optimizer
    # transformers looks at the name of the class and of its module.
    return type(optimizer.__name__, (QueuedUpdates, optimizer), {"__module__": optimizer.__module__})
