"""The trainer of proximal policy optimization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ft_core.data.collating import IGNORE
from ft_rl.grpo_trainer import GrpoTrainer
from ft_rl.objectives import (
    AdaptiveKL,
    FixedKL,
    flatten,
    gae,
    penalised_rewards,
    ppo_policy,
    ppo_value,
    unflatten,
    whiten,
)  # fmt: skip
from ft_rl.ppo import PpoSettings
from ft_rl.reference import adapter_off
from ft_rl.values import ValueModel

if TYPE_CHECKING:
    from ft_core.training import Job
    from ft_rl.environments import EnvironmentClass

__all__ = ["PpoTrainer"]


class PpoTrainer(GrpoTrainer):
    """Rollouts, rewards and the loop of :class:`ft_rl.grpo_trainer.GrpoTrainer`, with values and PPO's losses.

    Attributes:
        value_model: the values. controller: of the divergence's weight.
    """

    def __init__(self, job: Job, settings: PpoSettings, world: EnvironmentClass | None = None, **kwargs: Any) -> None:
        super().__init__(job, settings, world, **kwargs)
        self._ppo = settings
        assert self.policy is not None  # the family is known
        self.value_model = ValueModel(self.model, self.policy)
        self.controller: FixedKL | AdaptiveKL = (
            FixedKL(settings.kl_coef)
            if settings.kl_target is None
            else AdaptiveKL(settings.kl_coef, settings.kl_target, settings.kl_gain)
        )
        self._scores: Tensor | None = None

    def finish(self) -> None:
        """Called once all steps are done: the values are taken out of the model."""
        super().finish()
        self.value_model.remove()

    def made_up(self, lengths: Sequence[int]) -> dict[str, Any]:
        """As GRPO's, with values and returns; advantages are of tokens."""
        batch = super().made_up(lengths)
        each = torch.zeros_like(batch["old_per_token_logps"])
        return batch | {"advantages": each, "values": each, "returns": each}

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        made = super()._calculate_rewards(*args, **kwargs)
        weights = self.reward_weights.to(made.device)
        self._scores = (made * weights).nansum(1)  # a completion that nobody scores has 0
        return made

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """As TRL's; then values, rewards of tokens, and from them advantages and returns ``[B, T]``."""
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        assert self._scores is not None
        scores, mask = self._scores, _trained(batch)
        if self._ppo.missing_eos_penalty is not None:
            scores = scores - self._ppo.missing_eos_penalty * (~self._ended(batch)).float()
        size = self.args.per_device_train_batch_size
        parts = [self._judged({name: batch[name][i : i + size] for name in INPUTS}) for i in range(0, len(mask), size)]
        old, reference, values = (torch.cat(each) for each in zip(*parts, strict=True))
        (logprobs, sequences), (ref, _), (known, _) = (flatten(x, mask) for x in (old, reference, values))
        rewards, measured = penalised_rewards(
            scores, logprobs, ref, sequences, coefficient=self.controller.coefficient, estimator=self._ppo.kl_estimator
        )
        advantages, returns = gae(rewards, known, sequences, gamma=self._ppo.gamma, lam=self._ppo.lam)
        if self._ppo.whiten_advantages:
            advantages = whiten(advantages)
        mode = self._metrics["train" if self.model.training else "eval"]
        mode["kl"].append(float(measured["kl"]))
        mode["kl_coef"].append(self.controller.coefficient)
        mode["value"].append(float(known.mean()))
        if self.model.training:
            self.controller.update(float(measured["kl"]))
        for name, flat in (("advantages", advantages), ("returns", returns), ("values", known)):
            batch[name] = unflatten(flat, mask)
        batch["old_per_token_logps"] = old
        return batch

    @torch.no_grad()
    def _judged(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities by policy and reference, and values, of a micro-batch's completions; each ``[B, T]``."""
        old, _, _ = self._get_per_token_logps_and_entropies(self.model, *_asked(batch))
        with adapter_off(self.accelerator.unwrap_model(self.model)):
            reference, _, _ = self._get_per_token_logps_and_entropies(self.model, *_asked(batch))
        with self.value_model.active(), self.accelerator.autocast():
            values = self._values(batch)
        return old, reference, unflatten(values, batch["completion_mask"])

    def _values(self, batch: Mapping[str, Tensor]) -> Tensor:
        ids, mask, kept = _asked(batch)
        labels = ids.masked_fill(mask == 0, IGNORE)
        labels[:, :-kept] = IGNORE
        return self.value_model.values(ids, mask, labels[:, 1:] != IGNORE)

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """Equations 7 and 9 of the paper. The values' part is differentiated at once, by their own adapter."""
        batch = dict(inputs)
        mask, items = _trained(batch), batch["num_items_in_batch"]
        with (
            self.value_model.active(),
            self.accelerator.autocast(),
        ):  # first, so that the two passes' activations do not wait side by side
            known, returns = (flatten(batch[name], mask)[0] for name in ("values", "returns"))
            values = flatten(unflatten(self._values(batch), batch["completion_mask"]), mask)[0]
            value_loss, of_values = ppo_value(
                values, known, returns, clip_range=self._ppo.cliprange_value, num_items=items
            )
            value_loss = self._ppo.vf_coef * value_loss
            if torch.is_grad_enabled():
                self.accelerator.backward(value_loss)
        self._batch = batch
        try:
            logprobs, entropies, _ = self._get_per_token_logps_and_entropies(
                model, *_asked(batch), compute_entropy=True
            )
        finally:
            self._batch = None
        new, old, advantages = (
            flatten(x, mask)[0] for x in (logprobs, batch["old_per_token_logps"], batch["advantages"])
        )
        loss, measured = ppo_policy(new, old, advantages, clip_range=self._ppo.cliprange, num_items=items)
        mode = self._metrics["train" if self.model.training else "eval"]
        for name, value in (*measured.items(), *((f"value/{k}", v) for k, v in of_values.items())):
            mode[name].append(float(value))
        mode["entropy"].append(float(entropies.detach()[mask].mean()))
        return loss + value_loss.detach()

    def _ended(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Whether each completion's last token is one that ends it, ``[B]``."""
        last = batch["completion_mask"].sum(1).clamp(min=1) - 1
        tokens = batch["completion_ids"].gather(1, last[:, None])[:, 0]
        return torch.isin(tokens, torch.tensor(self.eos_token_ids, device=tokens.device))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        self.value_model.save(folder, {"controller": self.controller.state_dict()})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = self.value_model.load(Path(resume_from_checkpoint))
        self.controller.load_state_dict(state["controller"])


INPUTS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


def _trained(batch: Mapping[str, Tensor]) -> Tensor:
    """Which tokens of completions are the model's own, bool ``[B, T]``: an environment's words are not."""
    mask = batch["completion_mask"].bool()
    return mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask


def _asked(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """Tokens and mask of prompts and completions, ``[B, P + T]``, and T."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    return ids, mask, batch["completion_ids"].shape[1]
