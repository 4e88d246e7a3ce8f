"""What a training method is handed: everything but the trainer, which is the method's to build."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from ft_core.config import TrainConfig

__all__ = ["LEFT_OUT", "Job", "build_trainer"]

LEFT_OUT = "left_out"
"""The key of :attr:`Job.kept` under which a data set says which rows could not be used, by ``train`` and ``held_out``.
A run that goes on must leave out the same."""


@dataclass
class Job:
    """One training, prepared by ft_core and handed to a method's ``build(job) -> transformers.Trainer``.

    Attributes:
        config: the resolved configuration.
        settings: the method's own section, an instance of the method's settings model.
        model: the model to train, its adapter attached (``peft.PeftModel``) unless it is trained in full.
        tokenizer: its tokenizer, with a pad token.
        train_rows: training rows in the normal form of one of the method's formats.
        eval_rows: held-out rows, or None.
        arguments: keyword arguments for the method's ``transformers.TrainingArguments`` subclass: folders, schedule,
            precision, seed, logging and saving. A method adds its own and overrides none of these.
        processor: what makes tensors of the task's other inputs (``ModalitySpec.processor``), or None.
        callbacks: callbacks to hand to the trainer (metrics, progress, interruption).
        counts: numbers about the data for the run's summary; a method adds to it (``train_tokens``, …).
        say: prints one line to the person who started the run.
        kept: what the method keeps for the length of the job, by names of its own; the measurements before and after
            are handed it too.
    """

    config: TrainConfig
    settings: BaseModel
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train_rows: Sequence[dict[str, Any]]
    eval_rows: Sequence[dict[str, Any]] | None
    arguments: dict[str, Any]
    callbacks: list[TrainerCallback]
    counts: dict[str, int] = field(default_factory=dict)
    say: Callable[[str], None] = print
    kept: dict[str, Any] = field(default_factory=dict)
    processor: Any = None


def build_trainer(build: Callable[[Job], Any], job: Job) -> Any:
    """The method's trainer, the adapter's weights as they were: TRL's trainers round those of a quantized model.

    They hold them in bfloat16 (Dettmers et al. 2023 did), where most updates of a usual learning rate are lost.
    """
    trained = [(p, p.data) for p in job.model.parameters() if p.requires_grad]
    trainer = build(job)
    for parameter, data in trained:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)
    return trainer
