"""The body of a process that trains, and kills itself at a point of its own choice.

It is given VALUES, the configuration; LOG, the file that takes what it prints; and KILL, where to: ``at`` is ``rollout``
(a completion is half written), ``backward`` (some layers have gradients) or ``update`` (the weights are new, and nothing
says so), and ``after`` how many optimizer steps come first.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from ft_core.training import train
from ft_rl.rollouts import own_model

LATER = 5
"""At which call of a hook, after the last of those steps, the process dies: neither the first nor the last."""


class Killer:
    """Counts optimizer steps, and calls of a hook after them."""

    def __init__(self, after: int, at: str) -> None:
        self.left, self.calls, self.at = after, 0, at

    def stepped(self, *_: Any) -> None:
        if self.left == 0 and self.at == "update":
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def called(self, *_: Any) -> None:
        self.calls += self.left <= 0
        if self.calls == LATER:
            os.kill(os.getpid(), signal.SIGKILL)


log = os.open(globals()["LOG"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(log, 1)
os.dup2(log, 2)
sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  # open for as long as the process is there
sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
killer = Killer(**globals()["KILL"])
torch.optim.optimizer.register_optimizer_step_post_hook(killer.stepped)
if killer.at == "backward":
    torch.nn.modules.module.register_module_full_backward_hook(killer.called)
elif killer.at == "rollout":
    draw = own_model.draw

    def counted(*args: Any, **kwargs: Any) -> Any:
        killer.called()
        return draw(*args, **kwargs)

    own_model.draw = counted
train(globals()["VALUES"], say=print)
