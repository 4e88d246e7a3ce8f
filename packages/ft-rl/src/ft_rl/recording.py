"""What a trainer with rollouts records beside TRL's metrics: samples to read, rewards' shares, the rollouts' rate."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from ft_core.runs import Run
from ft_rl.samples_log import SamplesLog

if TYPE_CHECKING:
    from ft_core.training import Job

__all__ = ["RolloutRecords", "shares"]


class RolloutRecords(GRPOTrainer):
    """TRL's trainer, with more in ``metrics.jsonl``, and ``samples.jsonl`` beside it.

    The metrics: ``completions/count`` of a step, ``completions/seconds`` that it took to write them and
    ``completions/per_second``, of all processes; with several rewards, ``rewards/NAME/share``.
    """

    _job: Job

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._samples_log: SamplesLog | None = None
        super().__init__(*args, **kwargs)

    def _generate(self, prompts: list[Any]) -> Any:
        start = time.perf_counter()
        made = super()._generate(prompts)
        spent = time.perf_counter() - start
        if not self.model.training:
            return made
        mode = self._metrics["train"]
        # A step may write several times; TRL would log their mean.
        count = sum(mode["completions/count"]) + len(prompts) * self.accelerator.num_processes
        seconds = sum(mode["completions/seconds"]) + spent
        mode["completions/count"], mode["completions/seconds"] = [float(count)], [seconds]
        mode["completions/per_second"] = [count / max(seconds, 1e-9)]
        return made

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        """Of all processes' completions, ``[completions, rewards]``, NaN where a reward has no opinion."""
        made = super()._calculate_rewards(*args, **kwargs)
        if len(self.reward_func_names) > 1:
            mode = self._metrics["train" if self.model.training else "eval"]
            parts = shares(made, self.reward_weights).tolist()
            for name, share in zip(self.reward_func_names, parts, strict=True):
                mode[f"rewards/{name}/share"].append(share)
        return made

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mode, groups = ("train", self.num_generations) if self.model.training else ("eval", self.num_generations_eval)
        if groups == 1:  # alone, a completion differs from none
            self._metrics[mode].pop("frac_reward_zero_std", None)
        # A rollout outside of train(), where a step is timed, or of held-out prompts, is no sample of the training.
        if self.is_in_train and self.model.training and self.accelerator.is_main_process:
            self._write_samples(len(inputs) * self.accelerator.num_processes)
        return batch

    def _write_samples(self, count: int) -> None:
        """TRL keeps what it has just written, all processes', at the end of its logs."""
        if self._samples_log is None:
            self._samples_log = SamplesLog(Run(str(self._job.config.output)).path, self.state.max_steps)
        rewards = {name: list(values)[-count:] for name, values in self._logs["rewards"].items()}
        each = torch.tensor(list(rewards.values()), dtype=torch.float64).T
        totals = (each * self.reward_weights.to(each)).nansum(1)
        totals[each.isnan().all(1)] = torch.nan
        prompts, completions = (list(self._logs[name])[-count:] for name in ("prompt", "completion"))
        self._samples_log.write(self.state.global_step + 1, prompts, completions, rewards, totals.tolist())


def shares(rewards: Tensor, weights: Tensor) -> Tensor:
    """What each reward adds to the mean total, ``[rewards]``; they add up to it.

    Args:
        rewards: ``[completions, rewards]``, NaN where one has no opinion. Completions without any are left out, as TRL
            leaves them out of the mean. weights: ``[rewards]``.
    """
    scored = ~rewards.isnan().all(1)
    return (rewards * weights.to(rewards.device)).nansum(0) / scored.sum()
