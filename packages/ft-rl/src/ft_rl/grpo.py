"""Group relative policy optimization on TRL's GRPOTrainer, and GSPO, which is the same with weights of whole sequences.

Completions are written by one of the rollout engines, the reference is the adapter switched off, log-probabilities come
of packed rows and the chunked head; the loss is TRL's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ft_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from transformers import Trainer

    from ft_core.config import TrainConfig
    from ft_core.evaluation import Evaluation, EvaluationJob
    from ft_core.training import Job
    from ft_core.training.inputs import Inputs
    from ft_rl.environments import EnvironmentClass
    from ft_rl.rewards import Rewards

__all__ = [
    "GrpoSettings", "GspoSettings", "WritingSettings", "build", "check", "evaluate", "generations_of",
    "scored_by",
]  # fmt: skip

GENERATIONS = 8
"""Completions of a prompt where nothing else is said."""
KEPT = "rewards"
"""The name by which a job keeps its environment and rewards."""
AT_ONCE = 32
"""Held-out prompts that are answered at a time."""
OPENED = 8
"""Held-out prompts with images that rewards are asked about at a time: those of 12 megapixels are 288 MB."""


class WritingSettings(BaseModel):
    """What the methods have in common whose model writes the completions that it learns from; names as TRL has them.

    Attributes:
        max_completion_length: tokens a completion may have.
        temperature, top_p, top_k, min_p, repetition_penalty: how tokens are drawn.
        disable_dropout: whether to switch off every dropout.
        chat_template_kwargs: for the chat template, such as ``enable_thinking``.
        rollouts: the engine that writes completions, and its settings: a name, or a mapping with ``engine``.
        sampling_correction: ``auto`` corrects the gradient for the gap between the engine's log-probabilities and the
            trainer's where its mean is above ``sampling_bound``; ``always``, ``never``.
        sampling_bound: nats. sampling_clip_max: the largest factor of a token (truncated importance sampling).
        environment: ``file.py:Class`` of yours, which takes turns with the model (``reset`` and ``step``), or has tools
            that it calls, as TRL's ``environment_factory``; what an episode was worth is a reward beside ``rewards``.
        max_turns: of the model in an episode; ``max_completion_length`` is that of all of it.
    """

    model_config = ConfigDict(extra="forbid")

    max_completion_length: int = Field(default=512, ge=1)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, lt=1)
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    disable_dropout: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    rollouts: str | dict[str, Any] = "transformers"
    sampling_correction: Literal["auto", "always", "never"] = "auto"
    sampling_bound: float = Field(default=0.02, ge=0, allow_inf_nan=False)
    sampling_clip_max: float = Field(default=2.0, ge=1, allow_inf_nan=False)
    environment: str | None = None
    max_turns: int = Field(default=4, ge=1)

    @field_validator("rollouts")
    @classmethod
    def _engine_is_named(cls, value: Any) -> Any:
        if isinstance(value, dict) and not isinstance(value.get("engine"), str):
            raise ValueError("a mapping with 'engine', the name of one (see ft plugins)")
        return value

    @property
    def engine(self) -> tuple[str, dict[str, Any]]:
        """The engine's name, and its own settings."""
        if isinstance(self.rollouts, str):
            return self.rollouts, {}
        return str(self.rollouts["engine"]), {key: value for key, value in self.rollouts.items() if key != "engine"}

    @property
    def given_to_trl(self) -> dict[str, Any]:
        """The values that go to TRL's configuration under the same names."""
        ours = {"rollouts", "sampling_correction", "sampling_bound", "sampling_clip_max", "environment", "max_turns"}
        return self.model_dump(exclude=ours & set(type(self).model_fields))


class GrpoSettings(WritingSettings):
    """The section ``grpo`` of a configuration: :class:`WritingSettings` and these, named as in TRL's ``GRPOConfig``.

    Attributes:
        num_generations: completions of each prompt, among which the advantage is relative; unset means 8, or the
            largest smaller divisor of ``training.batch_size`` times ``training.gradient_accumulation``.
        beta: weight of the divergence from the reference (k3); 0 needs no reference.
        num_iterations: updates that reuse one batch of completions (μ of the paper).
        steps_per_generation: micro-batches that completions are written for at a time; unset means
            ``training.gradient_accumulation``.
        epsilon, epsilon_high: how far the ratio may move below and above 1; ``epsilon_high`` unset means ``epsilon``
            (DAPO's clip-higher, arXiv:2503.14476, recommends 0.28). delta: a bound from above where the advantage is
            negative.
        loss_type: how tokens are averaged: ``grpo`` (each sequence alike; Shao et al. 2024, arXiv:2402.03300),
            ``dapo`` (each token of the batch alike), ``bnpo`` (of the micro-batch), ``dr_grpo`` (by the longest length;
            Liu et al. 2025, arXiv:2503.20783), or another of TRL's.
        importance_sampling_level: whether ratios are of ``token`` or ``sequence`` (GSPO).
        scale_rewards: whether advantages are divided by the standard deviation of their ``group``, of the ``batch``, or
            not at all (``none``, as Dr. GRPO).
        mask_truncated_completions: leave completions that did not end out of the loss (DAPO).
        top_entropy_quantile: train the share of tokens with the highest entropy only (arXiv:2506.01939).
        entropy_coef: weight of an entropy bonus.
    """

    num_generations: int | None = Field(default=None, ge=2)
    beta: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    num_iterations: int = Field(default=1, ge=1)
    steps_per_generation: int | None = Field(default=None, ge=1)
    epsilon: float = Field(default=0.2, gt=0, allow_inf_nan=False)
    epsilon_high: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    delta: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    loss_type: Literal["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo"] = "dapo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    mask_truncated_completions: bool = False
    top_entropy_quantile: float = Field(default=1.0, gt=0, le=1)
    entropy_coef: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class GspoSettings(GrpoSettings):
    """The section ``gspo``: :class:`GrpoSettings` with the defaults of Zheng et al. 2025 (arXiv:2507.18071, section 5).

    Ratios are of whole sequences, the geometric mean of their tokens' (equation 7), so the range they may move in is
    much smaller. It equals GRPO until a batch of completions is reused.
    """

    epsilon: float = Field(default=3e-4, gt=0, allow_inf_nan=False)
    epsilon_high: float | None = Field(default=4e-4, gt=0, allow_inf_nan=False)
    loss_type: Literal["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo"] = "grpo"
    importance_sampling_level: Literal["token", "sequence"] = "sequence"


def check(config: TrainConfig) -> None:
    """Refuse an engine, an environment or groups that cannot be had, before anything is loaded.

    Raises:
        PluginError: there is no engine of that name; lists those that are installed.
        ConfigError: the engine refuses the configuration, groups do not fill a step, what an adapter trains is not
            taken back for a reference, what rows hold beside text is not read, or as
            :func:`ft_rl.environments.resolve_environment`.
    """
    from ft_core.config.load import method_settings
    from ft_core.plugins import RolloutSpec, registry, resolve
    from ft_core.training.ranks import Ranks
    from ft_rl.environments import resolve_environment
    from ft_rl.inputs import check_inputs
    from ft_rl.reference import check_reference

    settings = method_settings(config)
    assert isinstance(settings, WritingSettings)
    check_inputs(config)
    name, values = settings.engine
    spec = registry().get(RolloutSpec, name)
    if spec.check is not None:
        resolve(spec.check)(config, values)
    if settings.environment is not None:
        resolve_environment(settings.environment, f"{config.method}.environment")
    if isinstance(settings, GrpoSettings):
        generations_of(config, settings, Ranks().count)
        if settings.beta:
            check_reference(config)


def generations_of(config: TrainConfig, settings: GrpoSettings, processes: int = 1) -> int:
    """How many completions a prompt gets.

    Raises:
        ConfigError: a step's completions are not whole groups.
    """
    t = config.training
    rows = t.batch_size * (settings.steps_per_generation or t.gradient_accumulation) * processes
    wanted = settings.num_generations
    if wanted is None:
        wanted = next((n for n in range(min(GENERATIONS, rows), 1, -1) if rows % n == 0), 0)
    name = f"{config.method}.num_generations"
    if wanted < 2:
        raise ConfigError(
            f"{name}: a step has {rows} completion, and a group needs two at least: raise training.batch_size or "
            "training.gradient_accumulation"
        )
    if rows % wanted:
        allowed = [n for n in range(2, rows + 1) if rows % n == 0]
        raise ConfigError(
            f"{name}: {wanted} does not divide the {rows} completions of a step (training.batch_size times "
            f"gradient_accumulation; allowed: {', '.join(map(str, allowed))})"
        )
    return wanted


def build(job: Job) -> Trainer:
    """The trainer of one run; see :class:`ft_core.training.Job`.

    Raises:
        ConfigError: no or wrong rewards, groups that do not fill a step, no room for a prompt, an adapter on the head.
        DataError: no prompt is short enough, too few of them, or a reward's column is missing.
    """
    from trl import GRPOConfig

    from ft_core.training.ranks import Ranks
    from ft_core.training.sft import check_head
    from ft_rl.grpo_trainer import GrpoTrainer
    from ft_rl.inputs import prepare_inputs
    from ft_rl.prompting import prompts_dataset
    from ft_rl.reference import check_reference

    settings = job.settings
    assert isinstance(settings, GrpoSettings)
    check_head(job.model)
    prepare_inputs(job)
    if settings.beta:
        check_reference(job.config)
    world, rewards = scored_by(job, settings)
    generations = generations_of(job.config, settings, Ranks().count)
    lengths: list[int] = []
    seen: list[dict[str, Any]] = []
    train = prompts_dataset(job, job.train_rows, "train", lengths, seen)
    held_out = prompts_dataset(job, job.eval_rows, "held_out", seen=seen) if job.eval_rows else None
    rewards.check_columns([*seen[0]] if seen else train.column_names)
    arguments = GRPOConfig(
        **job.arguments,
        **(settings.given_to_trl | {"num_generations": generations}),
        num_generations_eval=1,
        reward_weights=rewards.weights,
    )
    at_once = arguments.generation_batch_size // generations
    if len(train) < at_once:
        raise DataError(
            f"{len(train)} prompts are too few for a step of {at_once}: add some, or lower training.batch_size or "
            "gradient_accumulation"
        )
    return GrpoTrainer(
        job,
        settings,
        world,
        prompt_tokens=lengths,
        seen=seen,
        model=job.model,
        reward_funcs=list(rewards.functions),
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=job.tokenizer,
        callbacks=job.callbacks,
    )


def scored_by(job: Job | EvaluationJob, settings: WritingSettings) -> tuple[EnvironmentClass | None, Rewards]:
    """The environment that a configuration names, and its rewards, which may be none where the environment has its own.

    They are made once a job: a reward model is loaded for the training and all measurements together, and a file of the
    user's runs once, whether environment, rewards or both are in it, so that they share what it holds. (:func:`check`
    has run that of the environment before there was a job.)

    Raises:
        ConfigError: as :func:`ft_rl.environments.resolve_environment` and :func:`ft_rl.rewards.resolve_rewards`.
    """
    if KEPT not in job.kept:
        job.kept[KEPT] = _scored_by(job, settings)
    found: tuple[EnvironmentClass | None, Rewards] = job.kept[KEPT]
    return found


def _scored_by(job: Job | EvaluationJob, settings: WritingSettings) -> tuple[EnvironmentClass | None, Rewards]:
    from ft_rl.environments import resolve_environment
    from ft_rl.rewards import Rewards, resolve_rewards
    from ft_rl.rewards.guest import Policy

    config, world = job.config, None
    modules: dict[Path, ModuleType] = {}
    if settings.environment is not None:
        world = resolve_environment(settings.environment, f"{config.method}.environment", modules)
        if world.owns_reward and not config.rewards:
            return world, Rewards(())
    policy = Policy(job.model, config, job.say)
    return world, resolve_rewards(config.rewards, say=job.say, policy=policy, modules=modules)


def evaluate(job: EvaluationJob) -> Evaluation:
    """The rewards of the model's likeliest completions (greedy) of held-out prompts, or of episodes with its turns.

    Tools of an environment are not called here. Rewards are asked about all completions at once, but about 8 at a time
    where prompts have images.

    ``reward`` is the mean weighted sum; then each reward's mean, by its name, where there are several; ``length``, the
    mean number of a completion's tokens.

    Raises:
        ConfigError, DataError: as :func:`build`.
    """
    from ft_core.evaluation import Evaluation
    from ft_rl.episodes import REWARD, Episodes
    from ft_rl.inputs import beside_of, inputs_of, usable_rows
    from ft_rl.pairs import show
    from ft_rl.preference import asked_of, samples_of
    from ft_rl.prompting import ids_of
    from ft_rl.prompts import as_completion
    from ft_rl.rollouts.own_model import OwnModel
    from ft_rl.rollouts.protocol import EngineJob, Sampling
    from ft_rl.stops import stops_of

    assert isinstance(job.settings, WritingSettings)
    world, rewards = scored_by(job, job.settings)
    options, new = job.settings.chat_template_kwargs, job.settings.max_completion_length
    inputs = inputs_of(job)
    rows = [job.rows[number] for number in usable_rows(job, inputs, job.rows, "held_out")]
    never = frozenset() if inputs is None else inputs.never
    sampling = Sampling(new, 0.0, stops=stops_of(job.model, job.tokenizer), never=never)
    engine = OwnModel(EngineJob(job.model, job.tokenizer, {}, None, job.say))
    prompts = [asked_of(job, row) for row in rows]
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
    ids: list[list[int]] = []
    completions: list[Any] = []
    for start in range(0, len(prompts), AT_ONCE):
        job.progress(start, len(prompts), "completions")
        given = prompts[start : start + AT_ONCE]
        if world is not None and world.kind == "turns":
            played = Episodes(world, engine, job.tokenizer, sampling, job.settings.max_turns, options)
            for one in played.written(given, rows[start : start + AT_ONCE], step=0):
                assert one.episode is not None
                ids.append(one.ids)
                completions.append(one.episode.completion)
                columns.setdefault(REWARD, []).append(one.episode.reward)
            continue
        some = rows[start : start + AT_ONCE]
        tokens = [ids_of(row, job.tokenizer, options, f"row {start + i}", inputs) for i, row in enumerate(some, 1)]
        beside = None if inputs is None else beside_of(inputs, [row[inputs.column] for row in some])
        ids += [one[0].ids for one in engine.generate(tokens, 1, sampling, step=0, beside=beside)]
        texts = [job.tokenizer.decode(one, skip_special_tokens=True) for one in ids[start:]]
        completions += map(as_completion, given, texts)
    job.progress(len(prompts), len(prompts), "completions")
    each, totals = _scored(rewards, inputs, prompts, completions, {"completion_ids": ids, **columns})
    if REWARD in columns:
        own = columns[REWARD]
        totals = [(total or 0.0) + worth for total, worth in zip(totals, own, strict=True)] if totals else own
    totals = totals or [None] * len(prompts)  # of tools, which are not called here, nobody says what they were worth
    metrics: dict[str, float | None] = {"reward": _mean(totals)}
    if len(rewards.names) > 1:
        metrics |= {name: _mean(values) for name, values in zip(rewards.names, each, strict=True)}
    metrics["length"] = _mean([float(len(one)) for one in ids])

    def answer(i: int) -> str:
        score = "not scored" if totals[i] is None else f"reward {totals[i]:.3g}"
        return f"{show(completions[i])} [{score}]"

    samples = samples_of(job, prompts, lambda i: f"row {i + 1}", lambda i: None, answer)
    return Evaluation(metrics, samples, len(rows))


def _scored(
    rewards: Rewards, inputs: Inputs | None, prompts: list[Any], completions: list[Any], columns: dict[str, list[Any]]
) -> tuple[list[list[float | None]], list[float | None]]:
    """As :meth:`ft_rl.rewards.Rewards.score`; where rows have images, of some rows at a time, whose images are opened
    for that and let go: an image of 12 megapixels is 36 MB of pixels.

    Args:
        columns: a value for each prompt; that of the inputs' column are references.
    """
    if inputs is None:
        return rewards.score(prompts, completions, **columns)
    each: list[list[float | None]] = [[] for _ in rewards.names]
    totals: list[float | None] = []
    for start in range(0, len(prompts), OPENED):
        part = slice(start, start + OPENED)
        some = {name: values[part] for name, values in columns.items()}
        some[inputs.column] = [inputs.opened(given) for given in some[inputs.column]]
        scores, sums = rewards.score(prompts[part], completions[part], **some)
        for values, more in zip(each, scores, strict=True):
            values += more
        totals += sums
        del some  # before the next are opened
    return each, totals


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
