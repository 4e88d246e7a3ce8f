"""The trainer of odds ratio preference optimization, on transformers' own."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ft_core.data.collating import IGNORE
from ft_core.training.trainer import RunTrainerMixin
from ft_rl.objectives import orpo
from ft_rl.orpo import OrpoSettings
from ft_rl.policy import check_layers, put_head

__all__ = ["MetricsMixin", "OrpoTrainer"]


class MetricsMixin(Trainer):
    """Means of what a loss measures, logged with the steps they are of."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # by this name ft_core keeps them where a step is begun again
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}

    def measure(self, values: dict[str, Any]) -> None:
        """Remember a micro-batch's numbers until the next log."""
        mode = self._metrics["train" if self.model.training else "eval"]
        for name, value in values.items():
            mode[name].append(float(value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers', with the means since the last log."""
        mode = "train" if self.model.training else "eval"
        prefix = "eval_" if mode == "eval" else ""
        means = {f"{prefix}{name}": sum(values) / len(values) for name, values in self._metrics[mode].items()}
        super().log({**logs, **means}, start_time)
        self._metrics[mode].clear()


class OrpoTrainer(RunTrainerMixin, MetricsMixin):
    """Trains on batches of :class:`ft_rl.collating.PairCollator`."""

    def __init__(self, settings: OrpoSettings, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs: transformers divides by micro-batches
        if settings.disable_dropout:
            for module in self.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        check_layers(self.model, "orpo")
        self.policy = put_head(self.model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Equation 6 of the paper, over the pairs of a micro-batch."""
        ids, mask, answers = (inputs[name] for name in ("input_ids", "attention_mask", "completion_mask"))
        pairs = len(ids) // 2
        trained = answers.bool()
        if self.settings.train_on == "all":
            trained = torch.cat([mask[:pairs].bool(), trained[pairs:]])
        labels = ids.masked_fill(~trained, IGNORE)
        out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        logprobs, answered = out.log_probs, (answers[:, 1:].bool() & out.label_mask)
        means = _means(logprobs, answered)
        likelihood = logprobs[:pairs][out.label_mask[:pairs]].mean()
        loss, measured = orpo(means[:pairs], means[pairs:], -likelihood, beta=self.settings.beta)
        self.measure(measured)
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The loss alone: there are no logits."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None


def _means(logprobs: Tensor, answered: Tensor) -> Tensor:
    """The mean log-probability of each sequence's answer ``[B]``; 0 for one without tokens."""
    return (logprobs * answered).sum(1) / answered.sum(1).clamp(min=1)
