"""The body of a process that trains, and kills itself at a point of its own choice.

It is given VALUES, the configuration; LOG, the file that takes what it prints; and KILL, where to: ``at`` is
``rollout`` (a completion is half written), ``backward`` (some layers have gradients) or ``update`` (the weights are
new, and nothing says so), and ``after`` how many optimizer steps come first.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from ft_core.training import train
from ft_rl.rollouts import own_model

TOKENS = 5
"""At which token of a rollout the process dies: neither the first nor the last."""


class Killer:
    """Counts optimizer steps, and then kills the process."""

    def __init__(self, after: int, at: str) -> None:
        self.left, self.at, self.drawn = after, at, 0

    def stepped(self, optimizer: Any, *_: Any) -> None:
        if self.left == 0 and self.at == "update":
            die()
        self.left -= 1
        if self.left == 0 and self.at == "backward":
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            parameters[len(parameters) // 2].register_post_accumulate_grad_hook(die)

    def draws(self) -> None:
        self.drawn += self.left <= 0
        if self.drawn == TOKENS:
            die()


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


log = os.open(globals()["LOG"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(log, 1)
os.dup2(log, 2)
sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  # open for as long as the process is there
sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
killer = Killer(**globals()["KILL"])
register_optimizer_step_post_hook(killer.stepped)
if killer.at == "rollout":
    draw = own_model.draw

    def counted(*args: Any, **kwargs: Any) -> Any:
        killer.draws()
        return draw(*args, **kwargs)

    own_model.draw = counted
train(globals()["VALUES"], say=print)
