"""Forwards of single instances: ft's own, told from those that somebody else has put there."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from ft_core.fast.swap import FastPath

__all__ = ["Forward", "Replaced", "has_other", "silent"]


class Replaced:
    """A forward of one instance. An object, not a function, so that a copy of the model has forwards of its own."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own = module, module.forward
        wrapper: Any = self
        functools.update_wrapper(wrapper, self.own, updated=())  # generate() and trainers look at the signature


class Forward(Replaced):
    """A forward of the fast path's."""

    def __init__(self, path: FastPath, module: nn.Module) -> None:
        super().__init__(module)
        self.path = path


def has_other(module: nn.Module) -> bool:
    """Whether an instance has a forward that is neither ft's nor its class's own.

    The class's own is often there as an attribute: whoever replaces a forward for a while puts it back like that.
    """
    forward = vars(module).get("forward")
    if forward is None or isinstance(forward, Replaced):
        return False
    return not (
        getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward
    )


def silent(modules: Sequence[nn.Module]) -> bool:
    """Whether no part of these has code of a user's to run: hooks, or a forward of its own."""
    parts = list(modules)
    while parts:
        part = parts.pop()
        own = vars(part)
        if has_other(part):
            return False
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            hooks = [own[f"_{when}_hooks"] for when in ("forward", "forward_pre", "backward", "backward_pre")]
            # transformers' enable_input_require_grads: it asks for a gradient, and computes nothing.
            if any(getattr(h, "__name__", "") != "make_inputs_require_grads" for h in chain(*map(dict.values, hooks))):
                return False
        if own["_modules"]:
            parts += [child for child in own["_modules"].values() if child is not None]
    return True
