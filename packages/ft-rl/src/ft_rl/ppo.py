"""Proximal policy optimization: a policy, its values and its reference, as adapters of one base.

TRL has no such trainer any more. Rollouts, rewards and the loop are those of :mod:`ft_rl.grpo`; advantages and losses
are :mod:`ft_rl.objectives`'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ft_core.errors import ConfigError, DataError
from ft_rl.grpo import WritingSettings, evaluate, scored_by

if TYPE_CHECKING:
    from transformers import Trainer

    from ft_core.config import TrainConfig
    from ft_core.training import Job

__all__ = ["PpoSettings", "build", "check", "evaluate"]


class PpoSettings(WritingSettings):
    """The section ``ppo`` of a configuration: :class:`ft_rl.grpo.WritingSettings` and these, named as TRL named them.

    Attributes:
        num_ppo_epochs: updates that reuse one batch of completions.
        kl_coef: weight of the divergence from the reference in each token's reward; with ``kl_target`` the one to begin
            with. kl_estimator: of that divergence (``k1``, ``k2`` or ``k3``).
        kl_target: nats of a whole completion; the weight follows it (Ziegler et al. 2019, arXiv:1909.08593, section
            2.2). Unset: the weight stays. kl_gain: how fast it follows.
        cliprange: how far the ratio of probabilities may move from 1 (Schulman et al. 2017, arXiv:1707.06347, equation
            7). cliprange_value: how far a value may move from what it was.
        vf_coef: weight of the values' loss.
        gamma, lam: discount, and λ of the generalized advantage estimate (arXiv:1506.02438, equation 16).
        whiten_advantages: whether advantages of a batch get mean 0 and standard deviation 1.
        missing_eos_penalty: taken from the score of a completion that did not end; unset means nothing.
    """

    num_ppo_epochs: int = Field(default=4, ge=1)
    kl_coef: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_target: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    kl_gain: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    cliprange: float = Field(default=0.2, gt=0, allow_inf_nan=False)
    cliprange_value: float | None = Field(default=0.2, gt=0, allow_inf_nan=False)
    vf_coef: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    gamma: float = Field(default=1.0, gt=0, le=1)
    lam: float = Field(default=0.95, ge=0, le=1)
    whiten_advantages: bool = True
    missing_eos_penalty: float | None = Field(default=None, ge=0, allow_inf_nan=False)


def check(config: TrainConfig) -> None:
    """As :func:`ft_rl.grpo.check`, and what PPO cannot train, before anything is loaded.

    Raises:
        PluginError, ConfigError: see there. ConfigError: no adapter, or several processes.
    """
    from ft_core.training.ranks import Ranks
    from ft_rl import grpo
    from ft_rl.reference import check_reference

    if config.lora is None:
        raise ConfigError("lora: null is not allowed with ppo, whose policy and values are adapters of one base")
    if Ranks().count > 1:
        raise ConfigError("method: ppo trains in one process; start it without torchrun")
    check_reference(config)
    grpo.check(config)


def build(job: Job) -> Trainer:
    """The trainer of one run; see :class:`ft_core.training.Job`. A step updates on all completions of its batch.

    Raises:
        ConfigError: an adapter on the head; a model that ft's layers cannot compute; wrong rewards.
        DataError: no prompt is short enough, too few of them, or a reward's column is missing.
    """
    from trl import GRPOConfig

    from ft_core.training.sft import check_head
    from ft_rl.policy import check_layers
    from ft_rl.ppo_trainer import PpoTrainer
    from ft_rl.prompting import prompts_dataset

    settings, config = job.settings, job.config
    assert isinstance(settings, PpoSettings)
    check_head(job.model)
    check_layers(job.model, "ppo")
    if settings.kl_target is not None and not settings.kl_coef:
        raise ConfigError("ppo.kl_target: needs a ppo.kl_coef above 0 to begin with")
    world, rewards = scored_by(job, settings)
    lengths: list[int] = []
    train = prompts_dataset(job, job.train_rows, "train", lengths)
    held_out = prompts_dataset(job, job.eval_rows, "held_out") if job.eval_rows else None
    rewards.check_columns(train.column_names)
    rows = config.training.batch_size * config.training.gradient_accumulation
    if len(train) < rows:
        raise DataError(
            f"{len(train)} prompts are too few for a step of {rows}: add some, or lower training.batch_size or "
            "gradient_accumulation"
        )
    own = set(PpoSettings.model_fields) - set(WritingSettings.model_fields)
    arguments = GRPOConfig(
        **job.arguments,
        **{name: value for name, value in settings.given_to_trl.items() if name not in own},
        num_iterations=settings.num_ppo_epochs,
        num_generations=rows,
        num_generations_eval=1,
        reward_weights=rewards.weights,
        beta=0.0,
    )
    # Groups are GRPO's: its configuration wants two completions of a prompt at least, its trainer none.
    arguments.num_generations = 1
    return PpoTrainer(
        job,
        settings,
        world,
        prompt_tokens=lengths,
        model=job.model,
        reward_funcs=list(rewards.functions),
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=job.tokenizer,
        callbacks=job.callbacks,
    )
