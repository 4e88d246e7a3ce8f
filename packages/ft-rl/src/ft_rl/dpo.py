"""Direct preference optimization on TRL's DPOTrainer: padding-free, and the reference is the adapter switched off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

if TYPE_CHECKING:
    from transformers import Trainer

    from ft_core.evaluation import Evaluation, EvaluationJob
    from ft_core.training import Job

__all__ = ["DpoSettings", "build", "evaluate", "margins_of"]

Loss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


OF_A_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
"""The losses that another divergence than the reverse KL can be had with, as TRL says."""


def _listed(losses: Any) -> list[str]:
    return list(losses) if isinstance(losses, list) else [losses]


class DpoSettings(BaseModel):
    """The section ``dpo`` of a configuration; the names are those of TRL's ``DPOConfig``.

    Attributes:
        beta: how closely the model is held to the reference; of ``ipo`` the regularisation τ.
        loss_type: ``sigmoid`` (Rafailov et al. 2023, arXiv:2305.18290, equation 7), ``hinge`` (SLiC), ``ipo``
            (arXiv:2310.12036), ``robust`` (arXiv:2403.00409), ``sigmoid_norm`` (by length) or another of TRL's; or a
            list, whose losses are added with ``loss_weights``.
        loss_weights: of each in the list; unset means 1.
        label_smoothing: the share of labels that is taken to be wrong (``robust``, ``exo_pair``).
        f_divergence_type, f_alpha_divergence_coef: the divergence from the reference (arXiv:2309.16240).
        ld_alpha: how much tokens beyond the shorter answer's length count (LD-DPO, arXiv:2409.06411); unset means all.
        discopop_tau: the temperature of ``discopop``.
        precompute_ref_log_probs: work the reference's log-probabilities out before training, so that no step computes
            them. Unset: with full fine-tuning, where the model itself is the reference only then.
        disable_dropout: whether to switch off every dropout, the adapter's too.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True)

    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    loss_type: Loss | list[Loss] = "sigmoid"
    loss_weights: list[float] | None = None
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    f_alpha_divergence_coef: float = Field(default=0.5, allow_inf_nan=False)
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    discopop_tau: float = Field(default=0.05, gt=0)
    precompute_ref_log_probs: bool | None = None
    disable_dropout: bool = True

    @field_validator("loss_type")
    @classmethod
    def _at_least_one(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("at least one loss")
        return value

    @field_validator("label_smoothing")
    @classmethod
    def _smooth_where_it_must_be(cls, value: float, info: Any) -> float:
        if not value and "exo_pair" in _listed(info.data.get("loss_type")):
            raise ValueError("a number above 0 with exo_pair, whose paper recommends 0.001")
        return value

    @field_validator("f_divergence_type")
    @classmethod
    def _divergence_of_a_loss_that_has_one(cls, value: str, info: Any) -> str:
        others = sorted(set(_listed(info.data.get("loss_type"))) - OF_A_DIVERGENCE)
        if value != "reverse_kl" and others:
            raise ValueError(f"reverse_kl with {', '.join(others)}")
        return value

    @field_validator("loss_weights")
    @classmethod
    def _one_each(cls, value: list[float] | None, info: Any) -> list[float] | None:
        count = len(_listed(info.data.get("loss_type")))
        if value is not None and len(value) != count:
            raise ValueError(f"one weight for each loss: {count}")
        return value


def build(job: Job) -> Trainer:
    """The trainer of one run; see :class:`ft_core.training.Job`.

    Raises:
        ConfigError: an adapter on the head; images, and a model that ft's layers cannot score.
        DataError: the rows cannot be tokenized, or none is short enough for ``max_length``.
    """
    from trl import DPOConfig, DPOTrainer

    from ft_core.training.sft import check_head
    from ft_core.training.trainer import RunTrainerMixin
    from ft_rl.collating import PairCollator
    from ft_rl.inputs import GIVEN, first_batch, prepare_inputs
    from ft_rl.preference import pairs_dataset, say_dropout
    from ft_rl.trainers import PolicyTrainerMixin

    class DpoTrainer(PolicyTrainerMixin, RunTrainerMixin, DPOTrainer):
        """TRL's trainer with whole checkpoints, no telemetry, and the policy's head."""

        def first_batch(self) -> dict[str, Any] | None:
            """The first pair with images, its chosen answer, by which the fast layers are checked."""
            if self.inputs is None:
                return None
            row = next((row for row in self.train_dataset if row[GIVEN]), None)
            return None if row is None else first_batch(self.inputs, row["chosen_ids"], row[GIVEN])

    settings = job.settings
    assert isinstance(settings, DpoSettings)
    check_head(job.model)
    inputs = DpoTrainer.inputs = prepare_inputs(job)
    if inputs is not None:
        job.arguments["dataloader_num_workers"] = inputs.workers(job.arguments["use_cpu"])
    say_dropout(job, settings.disable_dropout)
    train = pairs_dataset(job, job.train_rows, "train")
    held_out = pairs_dataset(job, job.eval_rows, "held_out") if job.eval_rows else None
    values = settings.model_dump()
    if values["precompute_ref_log_probs"] is None:
        values["precompute_ref_log_probs"] = job.config.lora is None
    values["loss_type"] = _listed(values["loss_type"])
    return DpoTrainer(
        model=job.model,
        args=DPOConfig(**job.arguments, max_length=None, **values),
        data_collator=PairCollator(job.tokenizer.pad_token_id, inputs),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=job.tokenizer,
        callbacks=job.callbacks,
    )


def evaluate(job: EvaluationJob) -> Evaluation:
    """How well the model tells held-out answers apart.

    ``margin`` is the mean difference of the implicit rewards β·(log π − log π_ref) of chosen and rejected answers and
    ``accuracy`` the share of pairs where it is positive; both need the reference, so of a model that was trained in
    full they are None. ``likelier`` is the share of pairs whose chosen answer has the higher mean log-probability.

    Raises:
        DataError: the rows cannot be tokenized, or none is short enough.
    """
    return margins_of(job, float(getattr(job.settings, "beta", 1.0)))


def margins_of(job: EvaluationJob, beta: float) -> Evaluation:
    """What :func:`evaluate` says, with a β of the caller's; :func:`evaluate` says what it raises."""
    from ft_core.evaluation import Evaluation
    from ft_rl.inputs import beside_of, inputs_of, usable_rows
    from ft_rl.likelihoods import likelihoods
    from ft_rl.pairs import tokenize_pairs
    from ft_rl.preference import pair_samples, shown, too_long
    from ft_rl.reference import adapter_off

    inputs = inputs_of(job)
    among = usable_rows(job, inputs, job.rows, "held_out")
    pairs = tokenize_pairs(job.rows, job.tokenizer, max_length=job.config.max_length, inputs=inputs, among=among)
    if not pairs.rows:
        raise too_long(len(job.rows), "held-out", job.config.max_length)
    count = len(pairs.rows)
    sequences, prompts = [*pairs.chosen_ids, *pairs.rejected_ids], pairs.prompt_lengths * 2
    pad = job.tokenizer.pad_token_id
    beside = None if inputs is None else beside_of(inputs, [job.rows[n][inputs.column] for n in pairs.rows] * 2)

    made = likelihoods(job.model, sequences, prompts, pad, shown(job, "answers"), beside)
    chosen, rejected = made.means[:count], made.means[count:]
    margin = accuracy = margins = None
    with adapter_off(job.model) as known:
        if known:
            said = shown(job, "the reference's answers")
            reference = likelihoods(job.model, sequences, prompts, pad, said, beside)
            rewards = beta * (made.sums - reference.sums)
            margins = rewards[:count] - rewards[count:]
            margin, accuracy = float(margins.mean()), float((margins > 0).double().mean())

    def answer(i: int) -> str:
        text = f"log-probability per token: chosen {chosen[i]:.3f}, rejected {rejected[i]:.3f}"
        return text if margins is None else f"{text}; margin {margins[i]:+.3f}"

    metrics = {"likelier": float((chosen > rejected).double().mean()), "accuracy": accuracy, "margin": margin}
    return Evaluation(metrics, pair_samples(job, pairs, answer), count)
