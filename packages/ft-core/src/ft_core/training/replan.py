"""A step that runs out of memory is computed once more by a tighter plan; the longest batch is tried before the first.

What a layer keeps, in how many tiles it is computed, and how many logits exist at a time change no result, so a step
may be begun again as long as nothing of it is left: its gradients are dropped, the random numbers are those that it
began with, and its batches are the same. The optimizer has not moved.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ft_core.memory import StillOutOfMemory, is_memory_error
from ft_core.models.device import peak_memory
from ft_core.models.rotary import changes
from ft_core.training.longest import longest_batch, tokens_in
from ft_core.training.moment import Moment, changed_by_forward

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

__all__ = ["ReplanningMixin", "longest_batch"]


class ReplanningMixin(_Base):
    """Computes a step once more where it did not fit, by a plan that keeps less (see :class:`RunTrainerMixin`).

    Attributes:
        rehearses: whether the first step is preceded by one of the longest batch of the first epoch, which is thrown
            away: what does not fit is seen at once, and the fast layers plan by it.
        replans: whether a step may be begun again; not where computing one changes more than gradients, random
            numbers, running averages, dynamic frequencies and TRL's counts.
        replanned: the tighter plan in words, once there is one. There is one a training.
        say: prints one line.
    """

    rehearses: bool = False
    replans: bool = True
    replanned: str | None = None
    _so_far: _SoFar | None = None
    _changed: list[torch.nn.Module] | None = None

    def say(self, line: str) -> None:
        """Print one line; the trainer's owner may put another function here."""
        print(line)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' training, from a step that has not begun."""
        self._so_far = self._changed = None
        return super().train(*args, **kwargs)

    @property
    def shares_prompts(self) -> bool:
        """Whether the prompt of a pair is computed once for both answers."""
        from ft_core.fast import fast_path_of

        path = fast_path_of(self.model)
        return path is not None and path.on

    def batch_tokens(self, lengths: Sequence[int]) -> int | None:
        """Tokens, padding included, of a batch of rows whose documents have these lengths; None where nobody knows.

        The data collator's own ``batch_tokens`` says it. A trainer with another collator may override this.
        """
        tokens = getattr(self.data_collator, "batch_tokens", None)
        return None if tokens is None else int(tokens(lengths))

    def longest(self) -> dict[str, Any] | None:
        """The batch that is tried before the first step, or None; see :func:`longest_batch`. A trainer whose rows are
        not what it trains on may override this."""
        return longest_batch(self)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a micro-batch, its gradients added to those that are there.

        Raises:
            StillOutOfMemory: it does not fit by the tighter plan either.
        """
        if self.rehearses:
            self.rehearses = False
            self._rehearse(model, args, kwargs)
        so_far = self._so_far
        if so_far is None or so_far.step != self.state.global_step:
            so_far = self._so_far = _SoFar(self.state.global_step, self._now())
        so_far.calls.append((inputs, args, kwargs))
        loss = self._computed(model, so_far, f"step {so_far.step + 1}")
        count = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        if len(so_far.calls) >= count:
            self._so_far = None  # the update is next
        return loss

    def _computed(self, model: Any, so_far: _SoFar, what: str) -> Any:
        """The last of these micro-batches; all of them, where that needs a tighter plan."""
        inputs, args, kwargs = so_far.calls[-1]
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        except Exception as error:  # its traceback holds the step's memory until this block ends
            if not is_memory_error(error):
                raise
            if self.replanned is not None:
                raise StillOutOfMemory(self.replanned) from error
            words = self._tighter(inputs)
            if words is None:
                raise
        self.replanned = words
        self._drop(model)
        so_far.began.restore(self)
        self.say(f"out of memory in {what}: planned anew, {words}; it is computed again")
        try:
            for inputs, args, kwargs in so_far.calls:
                loss = super().training_step(model, inputs, *args, **kwargs)
        except Exception as error:
            if not is_memory_error(error):
                raise
            raise StillOutOfMemory(words) from error
        return loss

    def _tighter(self, inputs: dict[str, Any]) -> str | None:
        """Let the model keep less from now on, and say how in words; None where that cannot be."""
        from ft_core.fast import fast_path_of
        from ft_core.fast.elsewhere import recompute_elsewhere
        from ft_core.fast.tighten import tighten

        if not self.replans or self.accelerator.num_processes > 1:
            return None  # the other processes are in the middle of their step
        path = fast_path_of(self.model)
        if path is not None and path.on:
            recompute_elsewhere(path)
            return tighten(path, tokens_in(inputs), self.args.device)
        on = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        if on or not getattr(self.model, "supports_gradient_checkpointing", False):
            return None
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        return "every layer is computed again in backward"

    def _drop(self, model: Any) -> None:
        """Let go of all that a step has left."""
        from ft_core.fast import fast_path_of

        model.zero_grad(set_to_none=True)
        path = fast_path_of(model)
        if path is not None and path.lent is not None:
            path.lent.reset()
        gc.collect()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.args.device.type == "mps":
            torch.mps.empty_cache()

    def _now(self) -> Moment:
        """What a step changes, as it is; the modules are looked for once a training."""
        if self._changed is None:
            self._changed = changed_by_forward(self.model)
        return Moment.of(self, self._changed)

    def _rehearse(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward and backward of the longest batch, of which nothing is left but what the layers learnt of memory."""
        if any(changes(module, ("dynamic",)) for module in model.modules()):
            return  # its frequencies follow the longest text so far
        began = self._now()
        try:
            batch = self.longest()
            if batch is None:
                return
            self._computed(model, _SoFar(-1, began, [(batch, args, kwargs)]), "the longest batch, before step 1")
        finally:
            self._drop(model)
            began.restore(self)
        self.say(
            f"the longest batch fits: {tokens_in(batch):,} tokens, {peak_memory() / 2**30:.1f} GiB at the peak so far"
        )


@dataclass
class _SoFar:
    """The micro-batches of one optimizer step that have been begun, each with its arguments.

    Attributes:
        step: updates before it. began: how things were before the first.
    """

    step: int
    began: Moment
    calls: list[tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
