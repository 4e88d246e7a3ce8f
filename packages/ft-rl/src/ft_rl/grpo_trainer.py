"""The trainer of GRPO and GSPO."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from ft_core.plugins import RolloutSpec, registry, resolve
from ft_core.training.trainer import RunTrainerMixin
from ft_rl.begun_again import BegunAgainMixin, made_up
from ft_rl.episodes import REWARD, Episodes, environment_reward
from ft_rl.given import GivenMixin
from ft_rl.grpo import WritingSettings
from ft_rl.inputs import inputs_of
from ft_rl.policy import put_head
from ft_rl.prompts import prompt_ids
from ft_rl.rollouts.kept import load_kept, save_kept
from ft_rl.rollouts.protocol import Completion, Engine, EngineJob, Sampling, SeeingEngine
from ft_rl.stops import stops_of
from ft_rl.trainers import PolicyTrainerMixin

if TYPE_CHECKING:
    from ft_core.training import Job
    from ft_rl.environments import EnvironmentClass

__all__ = ["GrpoTrainer", "make_engine"]


def make_engine(job: Job, settings: WritingSettings, accelerator: Any = None) -> Engine:
    """The rollout engine that a configuration names.

    Args:
        accelerator: the trainer's.

    Raises:
        PluginError: there is none of that name; lists those that are installed.
        ConfigError: the engine refuses its settings.
    """
    name, values = settings.engine
    spec = registry().get(RolloutSpec, name)
    made: Engine = resolve(spec.engine)(
        EngineJob(job.model, job.tokenizer, values, job.config.output, job.say, job.config.max_length, accelerator)
    )
    return made


class GrpoTrainer(PolicyTrainerMixin, BegunAgainMixin, RunTrainerMixin, GivenMixin):
    """TRL's trainer with whole checkpoints, no telemetry, the policy's head, and completions by an engine of ours.

    Attributes:
        engine: writes completions.
    """

    fields = ("log_probs", "entropy")
    _begun: Sequence[list[int]] = ()
    """The prompts of conversations that tools are called in, while they are."""

    def __init__(
        self,
        job: Job,
        settings: WritingSettings,
        world: EnvironmentClass | None = None,
        prompt_tokens: Sequence[int] = (),
        seen: Sequence[Mapping[str, Any]] = (),
        **kwargs: Any,
    ) -> None:
        self.inputs = inputs_of(job)
        # what images take is not counted: the longest prompts are not tried ahead
        self.prompt_tokens = prompt_tokens if self.inputs is None else ()
        self.seen, self.options = seen, settings.chat_template_kwargs
        self._job, self._own, self._world = job, settings, world
        self._batch: dict[str, Any] | None = None
        self._rows: list[dict[str, Any]] = []
        self._turns: list[Any] | None = None
        if world is not None and world.kind == "tools":
            kwargs["environment_factory"] = world.make
        elif world is not None:
            kwargs["rollout_func"] = self._play
            kwargs["reward_funcs"] = [*kwargs["reward_funcs"], environment_reward]
            kwargs["args"].reward_weights = [*kwargs["args"].reward_weights, 1.0]
        with warnings.catch_warnings():  # that TRL may change these is for us to follow, not for who trains
            warnings.filterwarnings("ignore", message="You are using '(rollout_func|environment_factory)'")
            super().__init__(**kwargs)
        if self.inputs is not None and self.ref_model is not None:
            packs = self.inputs.packs(self.ref_model)
            put_head(self.ref_model, temperature=self.head_temperature, fields=self.fields, packs=packs)
        self.engine = make_engine(job, settings, self.accelerator)
        stops = stops_of(self.model, job.tokenizer)
        self.eos_token_ids: list[int] = sorted(stops.union(self.eos_token_ids))
        self._sampling = Sampling(
            settings.max_completion_length,
            settings.temperature,
            settings.top_p,
            settings.top_k,
            settings.min_p,
            settings.repetition_penalty,
            frozenset(self.eos_token_ids),
            job.config.training.seed,
            never=frozenset() if self.inputs is None else self.inputs.never,
        )

    @property
    def head_temperature(self) -> float:
        """Log-probabilities are those of the distribution that tokens are drawn from."""
        return float(self.temperature)

    @property
    def head_entropy(self) -> Literal[True, "detached"]:
        """Trained with an entropy bonus."""
        return True if self._entropy_bonus_enabled else "detached"

    def first_ids(self) -> list[int]:
        """The first prompt's tokens, on which the fast layers are checked."""
        return prompt_ids(self.train_dataset[0]["prompt"], self.processing_class, self._own.chat_template_kwargs)

    def made_up(self, lengths: Sequence[int]) -> dict[str, Any]:
        """See :func:`ft_rl.begun_again.made_up`."""
        return made_up(self.first_ids(), lengths, self._own.max_completion_length, self.accelerator.device)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's; afterwards the engine holds nothing."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.engine.close()

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        *args: Any,
        **kw: Any,
    ) -> Any:
        """Completions and their log-probabilities; TRL repeats each prompt as often as it wants completions."""
        if images is not None or multimodal_fields:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, *args, **kw)
        places, copies = _grouped(prompt_ids if self.inputs is None else list(self._numbers))
        with self.accelerator.autocast():
            made = self._written([prompt_ids[i] for i in places], copies, places)
        flat = [completion for group in made for completion in group]
        return [one.ids for one in flat], [one.logprobs for one in flat]

    def _written(self, prompts: list[list[int]], copies: int, places: Sequence[int]) -> list[list[Completion]]:
        """Completions, of a conversation with tools as long as it has room for; none where it has none.

        Args:
            places: where each prompt stands in the batch.
        """
        step, sampling = int(self.state.global_step), self._sampling
        if self.inputs is not None:
            beside = self.beside_prompts([self._numbers[place] for place in places])
            engine = cast(SeeingEngine, self.engine)
            return engine.generate(prompts, copies, sampling, step=step, beside=beside)
        if not self._begun:
            return self.engine.generate(prompts, copies, sampling, step=step)
        rooms = [_room(ids, self._begun, sampling.max_new_tokens) for ids in prompts]
        going = [i for i, room in enumerate(rooms) if room > 0]
        made = [[Completion([], [])] * copies for _ in prompts]
        if going:
            limits = tuple(rooms[i] for i in going)
            sampling = replace(sampling, max_new_tokens=max(limits), limits=limits)
            asked = self.engine.generate([prompts[i] for i in going], copies, sampling, step=step)
            for i, written in zip(going, asked, strict=True):
                made[i] = written
        return made

    def _tool_call_loop(self, prompts: list[Any], prompt_ids: list[list[int]], *args: Any, **kw: Any) -> Any:
        """As TRL's, which cuts what a conversation has no room for; the engine is told that room."""
        self._begun = prompt_ids
        try:
            return super()._tool_call_loop(prompts, prompt_ids, *args, **kw)
        finally:
            self._begun = ()

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        made: dict[str, Any] = super()._generate_and_score_completions(inputs)
        return made

    def _play(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """What TRL asks of a ``rollout_func``: one episode for each row of the batch."""
        assert self._world is not None
        player = Episodes(
            self._world, self.engine, self.processing_class, self._sampling, self._own.max_turns,
            self._own.chat_template_kwargs,
        )  # fmt: skip
        with self.accelerator.autocast():
            made = player.written(prompts, self._rows, step=int(self.state.global_step))
        self._turns = [one.episode.completion for one in made if one.episode is not None]
        return {
            "prompt_ids": [one.prompt for one in made],
            "completion_ids": [one.ids for one in made],
            "logprobs": [one.logprobs for one in made],
            "env_mask": [one.mask for one in made],
            REWARD: [one.episode.reward for one in made if one.episode is not None],
        }

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        """As TRL's; of episodes rewards see the turns, not one text of all that was said."""
        turns, self._turns = self._turns, None
        return super()._calculate_rewards(inputs, prompts, turns or completions, completion_ids_list)

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        self._batch = dict(inputs)
        try:
            return super()._compute_loss(model, self._batch)
        finally:
            self._batch = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's. Within the loss the gap to the engine's is measured, and the advantages are corrected for it."""
        made = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        batch = self._batch
        if batch is not None and "sampling_per_token_logps" in batch and self.importance_sampling_level:
            trained = batch.get("old_per_token_logps")
            self._correct(batch, made[0].detach() if trained is None else trained)
        return made

    def _correct(self, batch: dict[str, Any], logprobs: Tensor) -> None:
        """Measure the gap, and weigh each token by the ratio of the trainer's probability to the engine's.

        The weights do not depend on the policy that is trained, and are positive: multiplying the advantage by them is
        multiplying the loss, clipped or not. TRL takes advantages of tokens, ``[B, T]``, too.
        """
        sampled = batch["sampling_per_token_logps"]
        known = (batch["completion_mask"] * batch.get("tool_mask", 1)).bool() & ~sampled.isnan()
        mask, difference = known.long(), torch.where(known, logprobs - sampled, 0.0)
        count = mask.sum().clamp(min=1)
        gap = difference.abs().sum() / count
        mode = self._metrics["train" if self.model.training else "eval"]
        mode["sampling/gap"].append(float(gap))
        mode["sampling/gap_max"].append(float(difference.abs().max()))
        kind, bound = self._own.sampling_correction, self._own.sampling_bound
        corrected = kind == "always" or (kind == "auto" and float(gap) > bound)
        mode["sampling/corrected"].append(float(corrected))
        if corrected:
            ratio = difference.exp().clamp(max=self._own.sampling_clip_max)
            mode["sampling/ratio"].append(float((ratio * mask).sum() / count))
            batch["advantages"] = batch["advantages"].view(len(mask), -1) * ratio

    def _save_rng_state(self, output_dir: str) -> None:
        """As transformers', in each process; then the completions that the next updates will use."""
        super()._save_rng_state(output_dir)
        due = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        kept = [] if due else self._buffered_inputs or []
        save_kept(Path(output_dir), self.args.process_index, self._step, kept)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        found = load_kept(Path(resume_from_checkpoint), self.args.process_index, self.accelerator.device)
        if found is not None:
            self._step, kept = found
            self._buffered_inputs = kept or None


def _room(ids: list[int], begun: Sequence[list[int]], new: int) -> int:
    """What a conversation has left of the ``new`` tokens that may follow the prompt that it began with."""
    prompt = max((len(prompt) for prompt in begun if ids[: len(prompt)] == prompt), default=len(ids))
    return new - (len(ids) - prompt)


def _grouped(prompts: Sequence[Any]) -> tuple[list[int], int]:
    """The places of prompts without their repetitions, and how often each stands there in a row; all of them, and 1,
    where that is not the same."""
    firsts = [i for i, prompt in enumerate(prompts) if i == 0 or prompts[i - 1] != prompt]
    counts = {after - before for before, after in pairwise([*firsts, len(prompts)])}
    return (firsts, counts.pop()) if len(counts) == 1 else (list(range(len(prompts))), 1)
