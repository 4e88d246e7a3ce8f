"""A step that runs out of memory is computed once more by a tighter plan; the longest batch is tried before the first.

What a layer keeps, in how many tiles it is computed, and how many logits exist at a time change no result, so a step
may be begun again as long as nothing of it is left: its gradients are dropped, the random numbers are those that it
began with, and its batches are the same. The optimizer has not moved.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ft_core.memory import StillOutOfMemory, is_memory_error
from ft_core.models.device import peak_memory

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

__all__ = ["ReplanningMixin", "longest_batch"]

KEPT = ("_metrics", "_total_train_tokens")
"""What TRL's trainers count while they compute a loss."""


class ReplanningMixin(_Base):
    """Computes a step once more where it did not fit, by a plan that keeps less (see :class:`RunTrainerMixin`).

    Attributes:
        rehearses: whether the first step is preceded by one of the longest batch of the first epoch, which is thrown
            away: what does not fit is seen at once, and the fast layers plan by it.
        replans: whether a step may be begun again; not where computing one changes more than gradients, random
            numbers and TRL's counts.
        replanned: the tighter plan in words, once there is one. There is one a training.
        say: prints one line.
    """

    rehearses: bool = False
    replans: bool = True
    replanned: str | None = None
    _so_far: _SoFar | None = None

    def say(self, line: str) -> None:
        """Print one line; the trainer's owner may put another function here."""
        print(line)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' training, from a step that has not begun."""
        self._so_far = None
        return super().train(*args, **kwargs)

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
            so_far = self._so_far = _SoFar(self.state.global_step, _Moment.of(self))
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
        from ft_core.fast.tighten import tighten

        if not self.replans or self.accelerator.num_processes > 1:
            return None  # the other processes are in the middle of their step
        path = fast_path_of(self.model)
        if path is not None and path.on:
            return tighten(path, _tokens(inputs), self.args.device)
        on = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        if on or not getattr(self.model, "supports_gradient_checkpointing", False):
            return None
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        return "every layer is computed again in backward"

    def _drop(self, model: Any) -> None:
        """Let go of all that a step has left."""
        model.zero_grad(set_to_none=True)
        gc.collect()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()

    def _rehearse(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward and backward of the longest batch, of which nothing is left but what the layers learnt of memory."""
        if any(getattr(module, "rope_type", None) == "dynamic" for module in model.modules()):
            return  # it would go on with the frequencies of the longest text so far
        began = _Moment.of(self)
        averages = [
            (buffer, buffer.clone())
            for module in model.modules()
            if isinstance(module, torch.nn.modules.batchnorm._NormBase)
            for buffer in module.buffers(recurse=False)
        ]
        try:
            batch = longest_batch(self)
            if batch is None:
                return
            self._computed(model, _SoFar(-1, began, [(batch, args, kwargs)]), "the longest batch, before step 1")
        finally:
            self._drop(model)
            began.restore(self)
            for buffer, was in averages:
                buffer.copy_(was)
        self.say(
            f"the longest batch fits: {_tokens(batch):,} tokens, {peak_memory() / 2**30:.1f} GiB at the peak so far"
        )


@dataclass
class _SoFar:
    """The micro-batches of one optimizer step that have been begun, each with its arguments.

    Attributes:
        step: updates before it. began: how things were before the first.
    """

    step: int
    began: _Moment
    calls: list[tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


@dataclass(frozen=True)
class _Moment:
    """What computing a loss changes beside gradients: random numbers drawn, and a trainer's own counts."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    gpu: torch.Tensor | None
    counts: dict[str, Any]

    @classmethod
    def of(cls, trainer: Any) -> _Moment:
        """Now. Nothing waits for the GPU."""
        device = trainer.args.device
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        counts = {name: _copied(getattr(trainer, name)) for name in KEPT if hasattr(trainer, name)}
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu, counts)

    def restore(self, trainer: Any) -> None:
        """As it was."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, trainer.args.device)
        for name, value in self.counts.items():
            now = getattr(trainer, name)
            if isinstance(now, dict):  # held by others too
                _restore(now, value)
            else:
                setattr(trainer, name, value)


def _copied(value: Any) -> Any:
    """Dictionaries and lists copied, what is in them not."""
    if isinstance(value, dict):
        return {key: _copied(below) for key, below in value.items()}
    return list(value) if isinstance(value, list) else value


def _restore(now: dict[Any, Any], was: dict[Any, Any]) -> None:
    for key in [key for key in now if key not in was]:
        del now[key]
    for key, value in was.items():
        if isinstance(value, dict) and isinstance(now.get(key), dict):
            _restore(now[key], value)
        else:
            now[key] = _copied(value)


def _tokens(inputs: dict[str, Any]) -> int:
    """Tokens of a batch, padding included; 0 where it has none that we know."""
    ids = inputs.get("input_ids")
    return int(ids.numel()) if isinstance(ids, torch.Tensor) else 0


def longest_batch(trainer: Any) -> dict[str, Any] | None:
    """The batch of the first epoch with the most tokens, padding included, as the trainer's collator makes it.

    Only the lengths of the rows are read, and those rows that make the batch. None for data whose rows cannot be
    counted before they are read: a stream, or rows without token ids.
    """
    loader = trainer.get_train_dataloader()
    sampler, dataset = getattr(loader, "batch_sampler", None), loader.dataset
    lengths = _lengths(dataset)
    if sampler is None or lengths is None:
        return None
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(0)
    measures: tuple[Callable[[Sequence[int]], int], ...] = (sum, lambda found: max(found) * len(found))
    best: list[tuple[int, list[int]]] = [(0, [])] * len(measures)  # without padding, and with it
    for indices in sampler:
        found = [lengths[index] for index in indices]
        for place, measure in enumerate(measures):
            if measure(found) > best[place][0]:
                best[place] = measure(found), list(indices)
    chosen = {tuple(indices) for _, indices in best if indices}
    batches = (loader.collate_fn([dataset[index] for index in indices]) for indices in sorted(chosen))
    return max(batches, key=_tokens, default=None)


def _lengths(dataset: Any) -> list[int] | None:
    """Tokens of each row."""
    names = getattr(dataset, "column_names", None)
    if names is None or not hasattr(dataset, "with_format"):
        try:
            return [len(dataset[index]["input_ids"]) for index in range(len(dataset))]
        except (TypeError, KeyError):
            return None
    columns = ["input_ids"] if "input_ids" in names else [name for name in names if name.endswith("_ids")]
    return list(_counted(dataset, columns)) if columns else None


def _counted(dataset: Any, columns: list[str]) -> Iterator[int]:
    import pyarrow.compute as pc

    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        each = [pc.list_value_length(table[name]).to_pylist() for name in columns]
        yield from map(sum, zip(*each, strict=True))
