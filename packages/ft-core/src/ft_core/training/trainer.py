"""What every ft trainer adds to the transformers or TRL trainer it derives from."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ft_core.errors import RunError
from ft_core.training.behind import LogsBehindMixin
from ft_core.training.optimizers import Rates, forget_overrides, give_rates, queued
from ft_core.training.replan import ReplanningMixin
from ft_core.training.schedule import renewed, rising
from ft_core.training.walks import clearing_known, mode_known, parameters_known

__all__ = ["MANIFEST", "RunTrainerMixin", "last_whole_checkpoint", "storage_error"]

MANIFEST = "checkpoint.json"
PARTIAL = ".partial"


class RunTrainerMixin(LogsBehindMixin, ReplanningMixin):
    """Checkpoints that are whole or not there, steps that are planned anew where they do not fit, no waiting between
    them, and nothing sent or written that was not asked for.

    Put it before the trainer class: ``class SftTrainer(RunTrainerMixin, trl.SFTTrainer)``. transformers writes a
    checkpoint in place, so one cut short would be resumed from; here it is written beside its place, flushed to the
    disk, listed in a manifest with the sizes of its files, and renamed.
    """

    _staging: Path | None = None
    _flops_a_token: int | None = None
    _has_mode: bool = False
    optimizer_cls_and_kwargs: Any
    lr_scheduler: Any
    keep_checkpoints: int = 2
    rates: Rates = {}  # noqa: RUF012  # never changed in place

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        arguments = kwargs.get("args")
        if arguments is not None and arguments.n_gpu > 1:
            # On several GPUs and in one process transformers would wrap the model in nn.DataParallel, which multiplies
            # the batch and is slower than torchrun's processes. TrainingArguments has no public setting against it.
            arguments._n_gpu = 1
        super().__init__(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        staging = folder / PARTIAL
        is_main = self.accelerator.is_main_process
        try:
            if is_main:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._staging = staging
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes the state of its own random numbers
            if is_main:
                _seal(staging / name, self.state.global_step)
                _put(staging / name, folder / name)
        except Exception as error:
            reason = storage_error(error, folder)
            if reason is None:
                raise
            last = last_whole_checkpoint(folder)
            kept = f"the last good checkpoint is {last.name}" if last else "there is no earlier checkpoint"
            raise RunError(
                f"cannot save the checkpoint of step {self.state.global_step} in {folder}: {reason}; {kept}; "
                "free some space and go on with --resume"
            ) from error
        finally:
            self._staging = None
            if is_main:
                shutil.rmtree(staging, ignore_errors=True)
        if is_main:
            for old in _checkpoints(folder)[: -self.keep_checkpoints]:
                shutil.rmtree(old, ignore_errors=True)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own; afterwards nothing but the trainer holds the model."""
        self._has_mode = False
        try:
            with clearing_known(self.model, self._trained):
                return super().train(*args, **kwargs)
        finally:
            forget_overrides(self.model)

    def finish(self) -> None:
        """Called once all steps are done, before the result is saved and measured; a method may tidy up here."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Counts tokens too, all but padding, which transformers counts where pad and end are one token.

        A method whose batches are written in the step, of which it is handed the prompts' rows, counts them itself.
        """
        given = inputs if isinstance(inputs, Mapping) else {}
        mask, ids = given.get("attention_mask"), given.get("input_ids")
        count = mask.sum() if mask is not None else None if ids is None else torch.tensor(ids.numel())
        if count is not None:
            if self.accelerator.num_processes > 1:
                count = self.accelerator.reduce(count.to(self.args.device))
            # Without a mask one process counts on the host; a sum on a GPU, a mask's or all processes', is waited for.
            self.state.num_input_tokens_seen += int(count)
        # The first step sets every module's mode: an adapter's wrapping is in training mode around a model that is not.
        with mode_known(model) if self._has_mode else nullcontext():
            loss = super().training_step(model, inputs, *args, **kwargs)
        self._has_mode = True
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        with parameters_known(model, self._trained) if model is self.model else nullcontext():
            return super()._clip_grad_norm(model)

    def _trained(self) -> list[torch.Tensor]:
        """What the optimizer updates; all parameters before there is one."""
        if self.optimizer is None:
            return list(type(self.model).parameters(self.model))
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As transformers counts them, but its walk over all parameters, at each step, is made once."""
        name = getattr(self.model, "main_input_name", "input_ids")
        if name not in inputs:
            return int(super().floating_point_ops(inputs))
        if self._flops_a_token is None:
            self._flops_a_token = int(super().floating_point_ops({name: torch.empty(1)}))
        return self._flops_a_token * int(inputs[name].numel())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' choice, without what would let the GPU wait (see :mod:`ft_core.training.optimizers`)."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            chosen, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer_cls_and_kwargs = (queued(chosen), settings)
        super().create_optimizer(*args, **kwargs)
        if self.rates and not self.optimizer.state:  # once, before its first step
            model = next((one for one in (*args, kwargs.get("model")) if one is not None), self.model)
            give_rates(self.optimizer, model, self.rates)
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the trainer's own, with the rates of the parts that have their own: one schedule scales them all."""
        if self.rates and logs.get("learning_rate") is not None:
            share = logs["learning_rate"] / self.args.learning_rate
            logs = {**logs, **{f"{name}_learning_rate": rate * share for name, (_, rate) in self.rates.items()}}
        super().log(logs, *args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """transformers' choice, but its first step trains (see :mod:`ft_core.training.schedule`)."""
        if self.lr_scheduler is None:  # else it is the user's, or was made here
            asked = self.args.warmup_steps
            # The last step is no part of the rise: a run of one step has the whole rate, and transformers' polynomial
            # schedule divides by the steps that are left.
            warmup = max(min(self.args.get_warmup_steps(num_training_steps), num_training_steps - 1), 0)
            self.args.warmup_steps = warmup
            try:
                self.lr_scheduler = rising(super().create_scheduler(num_training_steps, optimizer), warmup)
            finally:
                self.args.warmup_steps = asked
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.lr_scheduler = renewed(self.lr_scheduler)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Draws from no random numbers of the training: how often one measures changes no loss."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            return super().evaluate(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No model card in every checkpoint: the run's report says more."""

    def _send_telemetry(self) -> None:
        """TRL reports each trainer's construction to the Hub; ft sends nothing that was not asked for."""


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first."""
    found = [(p.name.rpartition("-")[2], p) for p in folder.glob("checkpoint-*") if p.is_dir()]
    return [path for _, path in sorted((int(step), path) for step, path in found if step.isdigit())]


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose manifest agrees with its files, or None; what is unfinished is passed over."""
    for path in reversed(_checkpoints(folder)):
        try:
            sizes = json.loads((path / MANIFEST).read_text())["files"]
            if all((path / name).stat().st_size == size for name, size in sizes.items()):
                return path
        except (OSError, ValueError, KeyError):
            continue
    return None


def _seal(folder: Path, step: int) -> None:
    """Flush a finished checkpoint to the disk and write its manifest."""
    # A pickle that nothing reads, and a model card that nobody has filled in.
    for name in ("training_args.bin", "README.md"):
        (folder / name).unlink(missing_ok=True)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for file in files:
        _sync(file)
    manifest = folder / MANIFEST
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    manifest.write_text(json.dumps({"step": step, "files": sizes}))
    _sync(manifest)


def _put(made: Path, target: Path) -> None:
    """Rename a sealed checkpoint into its place; one of the same step, from before an interruption, makes way."""
    if target.exists():
        shutil.rmtree(target)
    os.replace(made, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder to flush it
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
WORDS = ("no space left", "file too large", "disk quota", "read-only file system", "os error 28", "os error 27")


def storage_error(error: BaseException, folder: Path) -> str | None:
    """Why the storage failed, if that is what ``error`` (or its cause) says; None for any other error.

    safetensors and torch wrap the system's error in types of their own, and torch drops its number, so the text and
    the space left are looked at too.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in FULL:
            return os.strerror(cause.errno)
        text = str(cause).lower()
        for word in WORDS:
            if word in text:
                return word[0].upper() + word[1:] if "os error" not in word else "no space left on device"
        if "pytorchstreamwriter" in text or "unexpected pos" in text or "iostream" in text:
            free = shutil.disk_usage(folder).free
            return f"a file could not be written in full ({free / 2**20:.0f} MiB are free)"
        cause = cause.__cause__ or cause.__context__
    return None
