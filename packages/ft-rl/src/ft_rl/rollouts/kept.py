"""Completions that serve several updates, in a checkpoint: without them a run that goes on would write others.

TRL's GRPOTrainer keeps what it has generated for ``num_iterations`` × ``steps_per_generation`` micro-batches, and
counts these; its checkpoints hold neither, so that a resumed run writes new completions, and goes on to renew them at
other steps than before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_kept", "save_kept"]

NAME = "rollout-{rank}.safetensors"


def save_kept(folder: Path, rank: int, micro_steps: int, batches: Sequence[dict[str, Any]]) -> None:
    """Write the completions in use beside the other files of a checkpoint.

    Args:
        folder: the checkpoint. rank: of this process, which has completions of its own.
        micro_steps: micro-batches trained so far.
        batches: what each micro-batch of the completions holds, tensors and plain values; none where new completions
            are due.
    """
    from safetensors.torch import save_file

    tensors = {
        f"{number}.{name}": value.detach().cpu().contiguous().clone()
        for number, batch in enumerate(batches)
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    plain = [{name: v for name, v in batch.items() if not isinstance(v, torch.Tensor)} for batch in batches]
    metadata = {"micro_steps": json.dumps(micro_steps), "plain": json.dumps(plain)}
    save_file(tensors, folder / NAME.format(rank=rank), metadata)


def load_kept(folder: Path, rank: int, device: torch.device) -> tuple[int, list[dict[str, Any]]] | None:
    """What :func:`save_kept` wrote; None where there is no such file, as in a run of more processes than before."""
    from safetensors import safe_open

    path = folder / NAME.format(rank=rank)
    if not path.is_file():
        return None
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata = file.metadata()
        batches: list[dict[str, Any]] = json.loads(metadata["plain"])
        for key in file.keys():  # noqa: SIM118  # no mapping
            number, _, name = key.partition(".")
            batches[int(number)][name] = file.get_tensor(key)
    return int(json.loads(metadata["micro_steps"])), batches
