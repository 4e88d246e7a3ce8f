"""The processes of one training, started by torchrun or accelerate: the main one writes, the others compute."""

from __future__ import annotations

import os

__all__ = ["Ranks"]


class Ranks:
    """This process among the training's processes; a training started plainly has one.

    accelerate and torch do the communication: the process group is theirs, begun from the environment variables that
    torchrun sets.
    """

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.is_main = True
        if self.count > 1:
            import torch
            from accelerate import PartialState

            self._state = PartialState(cpu=not torch.cuda.is_available())
            self.count = int(self._state.num_processes)
            self.is_main = bool(self._state.is_main_process)

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            self._state.wait_for_everyone()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        if self.count == 1:
            return flag
        import torch
        import torch.distributed

        value = torch.tensor(int(flag), device=self._state.device)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
        return bool(value)
