"""Reward modelling on TRL's RewardTrainer: a scalar head learns to rank the chosen answer above the rejected one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from transformers import Trainer

    from ft_core.evaluation import Evaluation, EvaluationJob
    from ft_core.training import Job

__all__ = ["RewardSettings", "build", "evaluate"]

TOKENS_AT_ONCE = 4096
"""An evaluation scores about this many tokens at a time, padding included."""


class RewardSettings(BaseModel):
    """The section ``reward`` of a configuration; the names are those of TRL's ``RewardConfig``.

    Attributes:
        center_rewards_coefficient: weight of the term that holds the mean reward at zero (Eisenstein et al. 2023,
            arXiv:2312.09244, equation 2; 0.01 is recommended). None: no such term.
        disable_dropout: whether to switch off every dropout in the model, the adapter's too. Both answers of a pair
            are then scored by the same function.
        pad_to_multiple_of: pad batches to a multiple of this many tokens. None: to the longest sequence.
    """

    model_config = ConfigDict(extra="forbid")

    center_rewards_coefficient: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    disable_dropout: bool = True
    pad_to_multiple_of: int | None = Field(default=None, ge=1)


def build(job: Job) -> Trainer:
    """The trainer of one run; see :class:`ft_core.training.Job`.

    TRL's batches of padded pairs are computed without their padding where the family is known (:mod:`ft_rl.scoring`);
    the configuration's ``packing`` has no meaning here.

    Raises:
        DataError: the rows cannot be tokenized, or none is short enough for ``max_length``.
    """
    from trl import RewardConfig
    from trl import RewardTrainer as TrlRewardTrainer

    from ft_core.training.trainer import RunTrainerMixin
    from ft_rl.preference import pairs_dataset, say_dropout
    from ft_rl.scoring import ScoreForward, put_scores

    class RewardTrainer(RunTrainerMixin, TrlRewardTrainer):
        """TRL's trainer with whole checkpoints, no telemetry, and a pass without padding.

        Attributes:
            scores: the model's forward, or None where it is transformers'.
        """

        scores: ScoreForward | None = None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.scores = put_scores(self.model)

        @property
        def shares_prompts(self) -> bool:
            """Where padding is left out alone."""
            return self.scores is not None and self.scores.padding_free and super().shares_prompts

        def batch_tokens(self, lengths: Sequence[int]) -> int:
            """Chosen and rejected answers are rows alike: without padding, or padded to the longest of all."""
            if self.scores is not None and self.scores.padding_free:
                return sum(lengths)
            multiple = getattr(self.data_collator, "pad_to_multiple_of", None) or 1
            return len(lengths) * -(-max(lengths) // multiple) * multiple

    settings = job.settings
    assert isinstance(settings, RewardSettings)
    say_dropout(job, settings.disable_dropout)
    train = pairs_dataset(job, job.train_rows, "train")
    held_out = pairs_dataset(job, job.eval_rows, "held_out") if job.eval_rows else None
    arguments = RewardConfig(
        **job.arguments,
        max_length=None,  # over-long rows are left out, and counted, by pairs_dataset
        **settings.model_dump(),
    )
    return RewardTrainer(
        model=job.model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=job.tokenizer,
        callbacks=job.callbacks,
    )


def evaluate(job: EvaluationJob) -> Evaluation:
    """How well the model ranks held-out pairs.

    The metrics are those of :func:`ft_rl.objectives.bradley_terry`: ``loss`` (without margin and centring),
    ``accuracy`` (the share of pairs whose chosen answer scores higher) and ``margin`` (mean difference of the scores).
    A sample's answer is the two scores. Rows longer than the configuration's ``max_length`` are left out.

    Raises:
        DataError: the rows cannot be tokenized, or none is short enough.
    """
    from ft_core.evaluation import Evaluation
    from ft_rl.objectives import bradley_terry
    from ft_rl.pairs import tokenize_pairs
    from ft_rl.preference import pair_samples, shown, too_long
    from ft_rl.scoring import score_sequences, scorer_of

    pairs = tokenize_pairs(job.rows, job.tokenizer, max_length=job.config.max_length)
    if not pairs.rows:
        raise too_long(len(job.rows), "held-out", job.config.max_length)
    score, pad = scorer_of(job.model), job.tokenizer.pad_token_id
    # As TRL does: the model finds the last token of a padded sequence by this id, which the base model may lack.
    job.model.config.get_text_config().pad_token_id = pad
    scores = score_sequences(
        score, [*pairs.chosen_ids, *pairs.rejected_ids], pad=pad, tokens=TOKENS_AT_ONCE, progress=shown(job, "scores")
    )
    chosen, rejected = scores.chunk(2)
    loss, metrics = bradley_terry(chosen.double(), rejected.double())
    samples = pair_samples(job, pairs, lambda i: f"chosen {chosen[i]:+.3f}, rejected {rejected[i]:+.3f}")
    measured = {"loss": loss, "accuracy": metrics["accuracy"], "margin": metrics["margin"]}
    return Evaluation({name: float(value) for name, value in measured.items()}, samples, len(pairs.rows))
