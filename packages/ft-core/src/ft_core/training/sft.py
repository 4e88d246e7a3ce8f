"""Supervised fine-tuning on TRL's SFTTrainer: rows tokenized, masked, packed and collated by ft_core.data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from transformers import Trainer

    from ft_core.training.job import Job

__all__ = ["SftSettings", "build"]


class SftSettings(BaseModel):
    """The section ``sft`` of a configuration.

    Attributes:
        train_on: which tokens the loss is taken over: those of the answers, or all. Plain text is always trained whole.
    """

    model_config = ConfigDict(extra="forbid")

    train_on: Literal["answers", "all"] = "answers"


def build(job: Job) -> Trainer:
    """The trainer of one run; see :class:`ft_core.training.Job`.

    Raises:
        DataError: no row has a token to train on within ``max_length``.
    """
    from trl import SFTConfig, SFTTrainer

    from ft_core.data import Collator, keeps_documents_apart
    from ft_core.training.trainer import RunTrainerMixin

    class SftTrainer(RunTrainerMixin, SFTTrainer):  # type: ignore[misc]
        """TRL's trainer with whole checkpoints and no telemetry."""

    padding_free = keeps_documents_apart(job.model)
    if not padding_free:
        job.say("this model would mix the documents of a packed row: each is a padded row of its own")
    train = _dataset(job, job.train_rows, "train")
    held_out = _dataset(job, job.eval_rows, "held_out") if job.eval_rows else None
    # Rows come prepared: TRL neither tokenizes, packs nor pads.
    arguments = SFTConfig(
        **job.arguments,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return SftTrainer(
        model=job.model,
        args=arguments,
        data_collator=Collator(job.tokenizer.pad_token_id, padding_free=padding_free),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=job.tokenizer,
        callbacks=job.callbacks,
    )


def _dataset(job: Job, rows: Any, name: str) -> Any:
    """Tokenized rows, packed into rows of up to ``max_length`` tokens where packing is on."""
    from ft_core.data import Packed, tokenize_rows

    config = job.config
    what = name.replace("_", "-")
    train_on = getattr(job.settings, "train_on", "answers")
    tokens = tokenize_rows(rows, job.tokenizer, max_length=config.max_length, train_on=train_on)
    job.counts |= {f"{name}_tokens": tokens.tokens}
    if name == "train":
        job.counts |= {
            "trained_tokens": tokens.trained_tokens,
            "overlong_rows": tokens.overlong,
            "dropped_rows": tokens.dropped,
        }
    if tokens.overlong:
        done = "split" if tokens.pieces else "cut"
        job.say(
            f"{tokens.overlong} of {tokens.rows} {what} rows are longer than max_length {config.max_length}: {done}"
        )
    if tokens.dropped:
        job.say(f"{tokens.dropped} {what} rows were left out: no token of their answer is within max_length")
    return Packed(tokens, config.max_length).dataset() if config.packing else tokens.dataset()
