"""Times the parts of a configuration's own training step, without training anything that is kept."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ft_core.config import TrainConfig
from ft_core.config.load import check_config, method_settings
from ft_core.models import Device, ModelSource, find_model, load_tokenizer, pick_device
from ft_core.models.device import peak_memory
from ft_core.models.positions import fit_to_model
from ft_core.plugins import MethodSpec, registry
from ft_core.runs import Run
from ft_core.training.arguments import trainer_arguments
from ft_core.training.job import Job, build_trainer
from ft_core.training.longest import tokens_in
from ft_core.training.memory import memory_capped
from ft_core.training.modality import trainer_of, with_task
from ft_core.training.optimizers import optimizer_of
from ft_core.training.prepare import prepare_model, prepare_processor, prepare_rows
from ft_core.training.speed import foresee, recomputes, speed_up

__all__ = ["PARTS", "Timing", "time_steps"]

PARTS = ("data", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Timing:
    """What a step of a configuration takes.

    Attributes:
        device, fast: on what, and whether the fast layers compute it.
        seconds: the median of each part over the steps, by name (``PARTS``).
        tokens: the mean tokens of a step.
        memory: bytes at the peak (on a GPU what torch allocated, else the process).
        load_seconds: from nothing to a model that can train.
        first_seconds: the first step, with all that is compiled for it.
    """

    device: str
    fast: bool
    seconds: dict[str, float]
    tokens: float
    memory: int
    load_seconds: float
    first_seconds: float

    @property
    def step(self) -> float:
        """Seconds of a whole step."""
        return sum(self.seconds.values())

    def as_json(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {**asdict(self), "step_seconds": self.step, "tokens_per_second": self.tokens / self.step}


def time_steps(
    config: TrainConfig | Mapping[str, Any], steps: int = 10, warm: int = 3, *, say: Callable[[str], None] = print
) -> Timing:
    """Run a few steps of a configuration's training and time their parts; its run folder is not touched.

    A step here is one micro-batch and its optimizer step, whatever ``gradient_accumulation`` says.

    Raises:
        FtError: as :func:`ft_core.train`.
    """
    config = check_config(config)
    source = find_model(config.model)
    config = with_task(config, source)
    config = fit_to_model(config, source, say=say)
    spec = registry().get(MethodSpec, config.method)
    device = pick_device()
    say(f"{source.name}, {config.method}, on {device}")
    with memory_capped(config, device, say):
        return _time(config, source, spec, device, steps, warm, say)


def _time(
    config: TrainConfig, source: ModelSource, spec: MethodSpec, device: Device, steps: int, warm: int,
    say: Callable[[str], None],
) -> Timing:  # fmt: skip
    rows, _ = prepare_rows(config.model_copy(update={"eval_split": None, "eval_data": None}), spec)
    planned = foresee(config, source, device, say)
    began = time.perf_counter()
    tokenizer = load_tokenizer(source)
    processor = prepare_processor(config, source, tokenizer)
    model = prepare_model(config, spec, source, device, say)
    speed_up(model, device, say, config)
    loaded = time.perf_counter() - began
    from ft_core.fast import fast_path_of

    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder)
        recompute = recomputes(model, config, device, say, planned)
        optimizer = optimizer_of(config, planned)
        arguments = trainer_arguments(config, run, device, evaluates=False, recompute=recompute, optimizer=optimizer)
        path = fast_path_of(model)
        if path is not None and path.host.disk is not None and config.disk == "auto":
            path.host.disk = Path(folder)  # there is no run folder
        arguments |= {"max_steps": warm + steps, "gradient_accumulation_steps": 1, "save_strategy": "no"}
        job = Job(
            config=config, settings=method_settings(config), model=model, tokenizer=tokenizer,
            train_rows=rows, eval_rows=None, arguments=arguments, callbacks=[], say=say, processor=processor,
        )  # fmt: skip
        return _timed(build_trainer(trainer_of(config, spec), job), device, loaded, steps, warm)


def _timed(trainer: Any, device: Any, loaded: float, steps: int, warm: int) -> Timing:
    import torch

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    batches = trainer.get_train_dataloader()
    trainer.create_optimizer_and_scheduler(num_training_steps=steps + warm)
    model, optimizer = trainer.model.train(), trainer.optimizer
    autocast = _autocast(trainer.args, device)
    taken: list[dict[str, float]] = []
    tokens: list[int] = []
    source = iter(batches)
    for _ in range(warm + steps):
        marks = [now()]
        try:
            batch = next(source)
        except StopIteration:
            source = iter(batches)
            batch = next(source)
        batch = trainer._prepare_inputs(batch)
        marks.append(now())
        with autocast():
            loss = trainer.compute_loss(model, batch)
        marks.append(now())
        loss.backward()
        marks.append(now())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(now())
        taken.append({part: b - a for part, a, b in zip(PARTS, marks, marks[1:], strict=False)})
        mask = batch.get("attention_mask")
        tokens.append(tokens_in(batch) if mask is None else int(mask.sum()))
    from ft_core.fast import fast_path_of

    path = fast_path_of(model)
    return Timing(
        device=str(device),
        fast=getattr(trainer, "fast_layers", path is not None and path.on),
        seconds={part: statistics.median(row[part] for row in taken[warm:]) for part in PARTS},
        tokens=statistics.mean(tokens[warm:]),
        memory=peak_memory(),
        load_seconds=loaded,
        first_seconds=sum(taken[0].values()),
    )


def _autocast(arguments: Any, device: Any) -> Callable[[], Any]:
    import torch

    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    return nullcontext if dtype is None else lambda: torch.autocast(device.type, dtype)
