"""What a configuration means to a transformers trainer."""

from __future__ import annotations

import math
from typing import Any

from ft_core.config import TrainConfig
from ft_core.console import counted
from ft_core.models import Device
from ft_core.runs import Run

__all__ = ["few_steps", "total_steps", "trainer_arguments"]

FEW = 10
"""Optimizer steps below which it is doubtful that a training changes anything worth having."""


def trainer_arguments(
    config: TrainConfig, run: Run, device: Device, *, evaluates: bool, recompute: bool, optimizer: str
) -> dict[str, Any]:
    """Keyword arguments for ``transformers.TrainingArguments`` and its subclasses.

    Args:
        evaluates: whether there is held-out data. recompute: whether the trainer checkpoints.
        optimizer: the one that is used (:func:`ft_core.training.optimizers.optimizer_of`).
    """
    t = config.training
    return {
        "output_dir": str(run.checkpoints),
        "per_device_train_batch_size": t.batch_size,
        "per_device_eval_batch_size": t.batch_size,
        "gradient_accumulation_steps": t.gradient_accumulation,
        "num_train_epochs": t.epochs,
        "max_steps": t.max_steps or -1,
        "learning_rate": t.learning_rate,
        "optim": optimizer,
        "lr_scheduler_type": t.scheduler,
        "warmup_steps": min(t.warmup_ratio, 0.999999),  # below one it is a share of the run
        "weight_decay": t.weight_decay,
        "max_grad_norm": t.max_grad_norm,
        "seed": t.seed,
        "data_seed": t.seed,
        "bf16": device.dtype == "bfloat16",
        "fp16": device.dtype == "float16",
        "use_cpu": device.type == "cpu",
        "gradient_checkpointing": recompute,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if recompute else None,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "eval_strategy": "steps" if evaluates and t.eval_every else "no",
        "eval_steps": t.eval_every,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        # A batch is copied from pinned memory while the GPU still computes the last one; nobody waits for it.
        "dataloader_pin_memory": device.type == "cuda",
        "accelerator_config": {"non_blocking": device.type == "cuda"},
    }


def total_steps(trainer: Any, config: TrainConfig) -> int:
    """Optimizer steps of the whole run."""
    t = config.training
    if t.max_steps is not None:
        return t.max_steps
    per_epoch = math.ceil(len(trainer.get_train_dataloader()) / t.gradient_accumulation)
    return math.ceil(per_epoch * t.epochs)


def few_steps(config: TrainConfig, steps: int) -> str | None:
    """What to say of a run of so few optimizer steps, and what makes more of them; None where there are enough.

    Who sets ``max_steps`` has said how many, and is not told.
    """
    t = config.training
    if t.max_steps is not None or not 0 < steps < FEW:
        return None
    batch = [f"training.{name} (now {getattr(t, name)})" for name in ("gradient_accumulation", "batch_size")]
    smaller = [words for words in batch if "(now 1)" not in words]
    each = math.floor((steps - 1) / t.epochs) + 1  # of an epoch, at least: the run's are rounded up
    way = f"raise training.epochs to {math.ceil(FEW / each)} or more"
    if smaller:
        way += f", or lower {' or '.join(smaller)}"
    return f"only {counted(steps, 'step')} in all: that may be too few to learn from; {way}"
