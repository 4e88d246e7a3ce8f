"""Kahneman-Tversky optimization on TRL's KTOTrainer: answers that are each wanted or not, without a counterpart."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from transformers import Trainer

    from ft_core.config import TrainConfig
    from ft_core.evaluation import Evaluation, EvaluationJob
    from ft_core.training import Job

__all__ = ["KtoSettings", "build", "check", "evaluate"]


class KtoSettings(BaseModel):
    """The section ``kto`` of a configuration; the names are those of TRL's ``KTOConfig``.

    Attributes:
        beta: how closely the model is held to the reference.
        loss_type: ``kto`` (Ethayarajh et al. 2024, arXiv:2402.01306, equation 7), or ``apo_zero_unpaired``
            (arXiv:2408.06266), which needs no estimate of the divergence.
        desirable_weight, undesirable_weight: of the losses of wanted and unwanted answers; where there are more of one,
            equation 8 of the paper recommends weights that make up for it.
        precompute_ref_log_probs, disable_dropout: as :class:`ft_rl.dpo.DpoSettings` has them.
    """

    model_config = ConfigDict(extra="forbid")

    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    undesirable_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    precompute_ref_log_probs: bool | None = None
    disable_dropout: bool = True


def check(config: TrainConfig) -> None:
    """Refuse what KTO cannot train with, before anything is loaded.

    Raises:
        ConfigError: trained biases, or a batch of one row, which has no other answer.
    """
    from ft_core.config.load import method_settings
    from ft_core.errors import ConfigError
    from ft_rl.reference import check_reference

    settings = method_settings(config)
    assert isinstance(settings, KtoSettings)
    if settings.loss_type == "kto" and config.training.batch_size < 2:
        raise ConfigError(
            "training.batch_size: 1 is not allowed with kto, which estimates the divergence from the other rows of a "
            "batch: raise it (and lower training.gradient_accumulation), or set kto.loss_type: apo_zero_unpaired"
        )
    check_reference(config)


def build(job: Job) -> Trainer:
    """The trainer of one run; see :class:`ft_core.training.Job`.

    Pairs are taken too, each as a wanted and an unwanted answer. The rows are in an order drawn by the seed, the same
    in each epoch: the divergence is estimated from a batch's prompts with each other's answers.

    Raises:
        ConfigError: an adapter on the head.
        DataError: the rows cannot be tokenized, or none is short enough for ``max_length``.
    """
    from trl import KTOConfig, KTOTrainer

    from ft_core.errors import DataError
    from ft_core.training.sft import check_head
    from ft_core.training.trainer import RunTrainerMixin
    from ft_rl.collating import LabelledCollator
    from ft_rl.preference import say_dropout
    from ft_rl.trainers import PolicyTrainerMixin

    class KtoTrainer(PolicyTrainerMixin, RunTrainerMixin, KTOTrainer):
        """TRL's trainer with whole checkpoints, no telemetry, and the policy's head."""

        fields = ("log_probs", "entropy", "mean_logits")

    settings = job.settings
    assert isinstance(settings, KtoSettings)
    estimates = settings.loss_type == "kto"
    check_head(job.model)
    say_dropout(job, settings.disable_dropout)
    train = _dataset(job, job.train_rows, "train")
    held_out = _dataset(job, job.eval_rows, "held_out") if job.eval_rows else None
    values = settings.model_dump()
    if values["precompute_ref_log_probs"] is None:
        values["precompute_ref_log_probs"] = job.config.lora is None
    rows = job.config.training.batch_size
    if estimates and len(train) < rows:
        raise DataError(
            f"{len(train)} answers are too few for a batch of {rows}: add some, or lower training.batch_size"
        )
    if estimates and (rest := len(train) % rows):
        job.say(f"{rest} of {len(train)} answers fill no batch of {rows} and are left out")
    # A last batch of one row would have no other answer.
    arguments = KTOConfig(**job.arguments, max_length=None, dataloader_drop_last=estimates, **values)
    return KtoTrainer(
        model=job.model,
        args=arguments,
        data_collator=LabelledCollator(job.tokenizer.pad_token_id, kl=estimates, max_length=job.config.max_length),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=job.tokenizer,
        callbacks=job.callbacks,
    )


def evaluate(job: EvaluationJob) -> Evaluation:
    """How well the model tells wanted answers from unwanted ones.

    Of the implicit rewards β·(log π − log π_ref) of held-out answers: ``reward_wanted`` and ``reward_unwanted``, their
    means, and ``margin``, the difference; ``accuracy``, how often a wanted answer's is higher than an unwanted one's,
    over all such pairs (the area under the curve; 0.5 for a tie). None where they need what is not there: a reference
    (a model trained in full has none), or answers of that kind. ``log_likelihood``: the mean log-probability of a token
    of wanted answers.

    Raises:
        DataError: the rows cannot be tokenized, or none is short enough.
    """
    import torch

    from ft_core.evaluation import Evaluation
    from ft_rl.likelihoods import likelihoods
    from ft_rl.pairs import show, tokenize_labelled
    from ft_rl.preference import samples_of, shown, too_long
    from ft_rl.reference import adapter_off

    data = tokenize_labelled(job.rows, job.tokenizer, max_length=job.config.max_length)
    if not data.rows:
        raise too_long(len(job.rows), "held-out", job.config.max_length)
    beta, pad = float(getattr(job.settings, "beta", 1.0)), job.tokenizer.pad_token_id

    made = likelihoods(job.model, data.ids, data.prompt_lengths, pad, shown(job, "answers"))
    wanted = torch.tensor(data.labels)
    metrics: dict[str, float | None] = dict.fromkeys(("accuracy", "margin", "reward_wanted", "reward_unwanted"))
    rewards = None
    with adapter_off(job.model) as known:
        if known:
            reference = likelihoods(
                job.model, data.ids, data.prompt_lengths, pad, shown(job, "the reference's answers")
            )
            rewards = beta * (made.sums - reference.sums)
            good, bad = rewards[wanted], rewards[~wanted]
            metrics["reward_wanted"] = float(good.mean()) if len(good) else None
            metrics["reward_unwanted"] = float(bad.mean()) if len(bad) else None
            if len(good) and len(bad):
                metrics["margin"] = float(good.mean() - bad.mean())
                ordered = bad.sort().values.contiguous()
                below, up_to = (torch.searchsorted(ordered, good.contiguous(), right=side) for side in (False, True))
                metrics["accuracy"] = float((below + up_to).double().mean() / (2 * len(bad)))
    counts = made.counts[wanted].sum()
    metrics["log_likelihood"] = float(made.sums[wanted].sum() / counts) if counts else None

    def target(i: int) -> str:
        row = job.rows[data.rows[i]]
        return show(row["completion" if "completion" in row else "chosen" if data.labels[i] else "rejected"])

    def answer(i: int) -> str:
        said = f"{'wanted' if data.labels[i] else 'unwanted'}; log-probability per token {made.means[i]:.3f}"
        return said if rewards is None else f"{said}; reward {rewards[i]:+.3f}"

    prompts = [job.rows[row].get("prompt") for row in data.rows]
    samples = samples_of(job, prompts, lambda i: f"answer {i + 1}", target, answer)
    return Evaluation(metrics, samples, len(data.rows))


def _dataset(job: Job, rows: Sequence[dict[str, Any]], name: str) -> Any:
    from datasets import Dataset

    from ft_rl.pairs import tokenize_labelled
    from ft_rl.preference import too_long

    data = tokenize_labelled(rows, job.tokenizer, max_length=job.config.max_length)
    what = name.replace("_", "-")
    job.counts |= {f"{name}_tokens": data.tokens}
    if not data.rows:
        raise too_long(len(rows), what, job.config.max_length)
    if data.overlong:
        total, verb = len(data.rows) + data.overlong, "is" if data.overlong == 1 else "are"
        job.say(
            f"{data.overlong} of {total} {what} answers {verb} longer than max_length {job.config.max_length}: left out"
        )
    if name == "train":
        job.counts |= {"overlong_rows": data.overlong}
        wanted = sum(data.labels)
        job.say(f"{wanted} wanted and {len(data.labels) - wanted} unwanted answers")
    order = list(range(len(data.ids)))
    random.Random(job.config.training.seed).shuffle(order)
    columns: dict[str, list[Any]] = {
        "completion_ids": data.ids,
        "prompt_length": data.prompt_lengths,
        "label": data.labels,
    }
    return Dataset.from_dict({column: [values[i] for i in order] for column, values in columns.items()})
