"""Odds ratio preference optimization: likelihood of chosen answers and their odds against rejected ones, in one loss.

The trainer is ours: TRL's is experimental, and makes whole logits. It needs no reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from transformers import Trainer

    from ft_core.evaluation import Evaluation, EvaluationJob
    from ft_core.training import Job

__all__ = ["OrpoSettings", "build", "evaluate"]


class OrpoSettings(BaseModel):
    """The section ``orpo`` of a configuration.

    Attributes:
        beta: weight of the odds ratio's term (Hong et al. 2024, arXiv:2403.07691, equation 6, where it is λ).
        train_on: whose likelihood the other term is: that of ``all`` tokens of the chosen sequence, as TRL has it, or
            of the ``answers`` alone, as the paper writes it.
        disable_dropout: whether to switch off every dropout, the adapter's too.
    """

    model_config = ConfigDict(extra="forbid")

    beta: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    train_on: Literal["all", "answers"] = "all"
    disable_dropout: bool = True


def build(job: Job) -> Trainer:
    """The trainer of one run; see :class:`ft_core.training.Job`.

    Raises:
        ConfigError: an adapter on the head.
        DataError: the rows cannot be tokenized, or none is short enough for ``max_length``.
    """
    from transformers import TrainingArguments

    from ft_core.training.sft import check_head
    from ft_rl.collating import PairCollator
    from ft_rl.orpo_trainer import OrpoTrainer
    from ft_rl.preference import pairs_dataset, say_dropout

    settings = job.settings
    assert isinstance(settings, OrpoSettings)
    check_head(job.model)
    say_dropout(job, settings.disable_dropout)
    train = pairs_dataset(job, job.train_rows, "train")
    held_out = pairs_dataset(job, job.eval_rows, "held_out") if job.eval_rows else None
    return OrpoTrainer(
        settings,
        model=job.model,
        args=TrainingArguments(**job.arguments),
        data_collator=PairCollator(job.tokenizer.pad_token_id),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=job.tokenizer,
        callbacks=job.callbacks,
    )


def evaluate(job: EvaluationJob) -> Evaluation:
    """How well the model tells held-out answers apart, without a reference.

    ``accuracy`` is the share of pairs whose chosen answer has the higher mean log-probability, ``log_odds_ratio`` the
    mean log odds ratio, ``log_likelihood`` the mean log-probability of a chosen answer's token.

    Raises:
        DataError: the rows cannot be tokenized, or none is short enough.
    """
    from ft_core.evaluation import Evaluation
    from ft_rl.likelihoods import likelihoods
    from ft_rl.objectives import orpo
    from ft_rl.pairs import tokenize_pairs
    from ft_rl.preference import pair_samples, shown, too_long

    pairs = tokenize_pairs(job.rows, job.tokenizer, max_length=job.config.max_length)
    if not pairs.rows:
        raise too_long(len(job.rows), "held-out", job.config.max_length)
    count = len(pairs.rows)
    made = likelihoods(
        job.model, [*pairs.chosen_ids, *pairs.rejected_ids], pairs.prompt_lengths * 2, job.tokenizer.pad_token_id,
        shown(job, "answers"),
    )  # fmt: skip
    chosen, rejected = made.means[:count], made.means[count:]
    _, measured = orpo(chosen, rejected, -chosen.mean(), beta=1.0)
    tokens = made.counts[:count].sum()
    metrics: dict[str, float | None] = {
        "accuracy": float((chosen > rejected).double().mean()),
        "log_odds_ratio": float(measured["log_odds_ratio"]),
        "log_likelihood": float(made.sums[:count].sum() / tokens) if tokens else None,
    }
    samples = pair_samples(
        job, pairs, lambda i: f"log-probability per token: chosen {chosen[i]:.3f}, rejected {rejected[i]:.3f}"
    )
    return Evaluation(metrics, samples, count)
