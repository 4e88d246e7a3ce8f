"""The fast layers in a training: switched on where they pay, checked before the first step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ft_core.config import TrainConfig
from ft_core.console import counted
from ft_core.errors import RunError
from ft_core.memory import bytes_of, is_memory_error
from ft_core.models import Device, ModelSource
from ft_core.training.disk import disk_folder
from ft_core.training.modality import of_modality

if TYPE_CHECKING:
    from ft_core.fast.check import Comparison
    from ft_core.fast.swap import FastPath
    from ft_core.planning import Plan

__all__ = ["check_first_step", "foresee", "leave_disk", "plan_ahead", "recomputes", "runs_kernels", "speed_up"]

log = logging.getLogger(__name__)

CHECKED = 256
"""Tokens of the row that the first step is checked on."""
GAPS = 0.95
"""The share of the memory that a configuration allows which is planned with."""


def runs_kernels(device: Any) -> bool:
    """Whether the kernels run there: on a CPU their references would, which gain nothing."""
    return str(device.type) == "cuda"


def foresee(config: TrainConfig, source: ModelSource, device: Device, say: Callable[[str], None]) -> Plan | None:
    """Say in one line what a training will take of this GPU, before anything is loaded; None without one.

    A prediction that fails is logged and left out: whatever is wrong with the model is said when it is loaded.
    """
    if not runs_kernels(device):
        return None
    try:
        from ft_core.fast.spill import disk_room
        from ft_core.models.device import host_memory, processes_here
        from ft_core.planning import card_here, plan, with_memory
        from ft_core.planning.engine import CONTEXT
        from ft_core.planning.show import line

        card = card_here()
        if card is None:
            return None
        card = with_memory(card, min(device.memory, device.free + CONTEXT))  # others may be at work there
        folder = disk_folder(config)
        disk = 0 if folder is None else disk_room(folder) // processes_here()
        planned = plan(config, source, card, host=host_memory()[1], disk=disk, quick=True, lends=processes_here() == 1)
        said = line(planned)
    except Exception:
        log.debug("the training is not planned: its memory cannot be predicted", exc_info=True)
        return None
    say(said)
    return planned


def speed_up(model: Any, device: Device, say: Callable[[str], None], config: TrainConfig | None = None) -> None:
    """Let the model train on the fast layers, or say in one line why not: they do not know it, or fail here.
    ``config``: says the modality, which may have fast layers of its own."""
    if not runs_kernels(device):
        return
    from ft_core import fast

    try:
        own = None if config is None else of_modality(config, "fast")
        if own is not None and own(model) is not None:
            return
        path = fast.enable(model)
    except fast.NotFast as reason:
        say(f"trained on transformers' own layers, slower than need be: {reason}")
        return
    try:
        fast.trial(path)
    except Exception as error:
        if is_memory_error(error):
            raise
        fast.disable(model)
        words = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        say(f"trained on transformers' own layers: the fast ones fail on this machine ({words})")


def recomputes(
    model: Any, config: TrainConfig, device: Device, say: Callable[[str], None], planned: Plan | None = None
) -> bool:
    """Whether the trainer has to compute activations again (transformers' checkpointing of whole layers).

    The fast layers choose by themselves, as ``activations`` and ``memory`` say; a vision tower that is trained is
    computed again where that is asked for or planned. Without them ``activations: auto``
    keeps on a CPU and computes again on a GPU, and nothing is offloaded. Long sequences are computed in tiles where the
    plan has found that they would not fit whole.
    """
    from ft_core import fast
    from ft_core.fast.elsewhere import recompute_elsewhere

    path = fast.fast_path_of(model)
    if path is not None:
        # torch's own count of what it holds is above what is in use: rounding, and gaps.
        path.host.disk, path.host.say = disk_folder(config), say
        path.choose(config.activations, memory=None if config.memory == "auto" else int(GAPS * bytes_of(config.memory)))
        if planned is not None:
            path.tile = planned.peak.tile
            if planned.peak.lent:
                path.lend()
        if config.activations in ("recompute", "offload") or (planned is not None and planned.peak.tower_again):
            recompute_elsewhere(path)
        return False
    if config.activations == "offload":
        say("activations: offload needs the fast layers; they are computed again instead")
    return config.activations in ("recompute", "offload") or (config.activations == "auto" and device.type == "cuda")


def leave_disk(model: Any) -> None:
    """Give back what activations have taken of the disk."""
    from ft_core import fast

    path = fast.fast_path_of(model)
    if path is not None:
        path.host.leave_disk()


def plan_ahead(trainer: Any, say: Callable[[str], None]) -> None:
    """Let a trainer begin with its longest batch, and say what it plans anew; a trainer of others does neither."""
    trainer.say = say
    trainer.rehearses = runs_kernels(trainer.args.device)


def check_first_step(trainer: Any, config: TrainConfig, say: Callable[[str], None]) -> None:
    """Compare the fast layers with transformers' own on one short row, before they train anything.

    A row that cannot be cut anywhere, because it holds images, is one that the collator's ``checked(rows)`` gives; see
    :attr:`ft_core.plugins.ModalitySpec.collator`. Where it does not fit, its text alone is compared. The trainer of a
    model with fast layers of its own has a method ``compared()``, which gives a :class:`ft_core.fast.Comparison` and on
    what it was made, or None.

    Raises:
        RunError: they differ; it names the parameter.
    """
    from ft_core import fast

    model = trainer.accelerator.unwrap_model(trainer.model)
    path = fast.fast_path_of(model)
    if config.verify == "off" or len(trainer.train_dataset) == 0:
        return
    if (own := getattr(trainer, "compared", None)) is not None:
        if (made := own()) is not None:
            result, what = made
            _say_or_refuse(result, what, say)
        return
    if path is None or not path.on:
        return
    checked, holds = (getattr(trainer.data_collator, name, None) for name in ("checked", "holds"))
    holds = holds or "images"
    row = None if checked is None else checked(trainer.train_dataset)
    result, what = None, "a row"
    if row is not None:
        try:
            result = _compared(trainer, path, model, dict(trainer.data_collator([row])))
            what = f"{counted(len(row['input_ids']), 'token')} with {holds}"
        except Exception as error:  # transformers' own layers keep all that they compute
            if not is_memory_error(error):
                raise
            say(f"fast layers: a row with {holds} does not fit beside transformers' own; checked on text alone")
    if result is None:
        found = _first_batch(trainer, model)
        if found is None:
            say("fast layers: not checked, for the method's rows hold no tokens (`ft verify` checks them)")
            return
        result = _compared(trainer, path, model, found)
    _say_or_refuse(result, what, say)


def _say_or_refuse(result: Comparison, what: str, say: Callable[[str], None]) -> None:
    """Say how far the fast layers are from transformers' own on ``what``, or refuse to train on them."""
    if (name := result.mismatch) is not None:
        if name == "loss":
            wrong = "the loss is {:.6g}, transformers' own {:.6g}".format(*result.losses)
        else:
            distance = result.gradients[name]
            wrong = f"the gradient of {name} differs by {distance:.2g} (rounding explains {result.limit:.2g})"
        raise RunError(
            f"the fast layers do not compute what transformers' own do: {wrong}; nothing was trained. Please report "
            "it; `verify: off` trains on them unchecked"
        )
    worst = max(result.gradients.values(), default=0.0)
    say(f"fast layers: checked against transformers' own on {what}, gradients within {worst:.1g}")


def _compared(trainer: Any, path: FastPath, model: Any, given: dict[str, Any]) -> Comparison:
    import torch

    from ft_core import fast

    device = next(model.parameters()).device
    batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    arguments = trainer.args
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    return fast.compare(path, model, batch, dtype)


def _first_batch(trainer: Any, model: Any) -> dict[str, Any] | None:
    """A batch of the first row's first tokens, with labels, as the method's collator or a plain one makes it.

    Rows of other methods hold several sequences, or the text of a prompt, which the trainer's ``first_ids`` gives; or
    more than text, which its ``first_batch`` does (None for rows of text).
    """
    import torch

    whole = getattr(trainer, "first_batch", None)
    if whole is not None and (batch := whole()) is not None:
        return dict(batch)
    row = trainer.train_dataset[0]
    if "input_ids" in row:
        return dict(trainer.data_collator([_short(row)]))
    own = getattr(trainer, "first_ids", None)
    ids = own() if own is not None else next((row[name] for name in row if name.endswith("_ids")), None)
    if not ids:
        return None
    tokens = torch.tensor(list(ids)[:CHECKED])[None]
    scores = model.get_output_embeddings() is None  # a head of one score learns a number
    labels = torch.zeros(1, 1, dtype=torch.float32) if scores else tokens
    return {"input_ids": tokens, "labels": labels, "use_cache": False}


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """The first tokens of a row, as documents of their own."""
    taken, lengths = 0, []
    for length in row.get("seq_lengths") or [len(row["input_ids"])]:
        lengths.append(min(length, CHECKED - taken))
        taken += lengths[-1]
        if taken == CHECKED:
            break
    labels = list(row["labels"][:taken])
    if all(label == -100 for label in labels[1:]):
        labels = list(row["input_ids"][:taken])  # a row whose answer comes later
    return {"input_ids": list(row["input_ids"][:taken]), "labels": labels, "seq_lengths": lengths}
