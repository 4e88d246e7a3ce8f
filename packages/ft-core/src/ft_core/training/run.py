"""One training from a configuration to a finished run folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_core.config import TrainConfig, to_yaml
from ft_core.config.load import check_config, method_settings
from ft_core.console import counted
from ft_core.data.rendering import alpaca_template
from ft_core.errors import FtError, RunError
from ft_core.evaluation import Evaluation, EvaluationJob, compare
from ft_core.generation import stop_ids
from ft_core.models import Device, ModelSource, find_model, load_tokenizer, pick_device
from ft_core.models.device import count_peak_anew, peak_memory
from ft_core.models.positions import fit_to_model
from ft_core.models.source import read_ahead
from ft_core.plugins import MethodSpec, registry
from ft_core.report import write_report
from ft_core.runs import Run, write_json, write_text
from ft_core.training.arguments import few_steps, total_steps, trainer_arguments
from ft_core.training.callbacks import Interruption, MetricsWriter, Progress
from ft_core.training.disk import disk_folder
from ft_core.training.job import LEFT_OUT, Job, build_trainer
from ft_core.training.lock import held
from ft_core.training.memory import InUse, memory_capped, memory_errors_said
from ft_core.training.modality import measure_of, rates_of, trainer_of, with_task
from ft_core.training.optimizers import optimizer_of
from ft_core.training.prepare import (
    check_method,
    check_resumable,
    check_reward_files,
    check_same_rows,
    check_unfinished,
    environment,
    fingerprint,
    prepare_model,
    prepare_processor,
    prepare_rows,
)
from ft_core.training.ranks import Ranks
from ft_core.training.speed import check_first_step, foresee, leave_disk, plan_ahead, recomputes, speed_up
from ft_core.training.trainer import last_whole_checkpoint, storage_error
from ft_core.training.wrapped import as_loaded, as_saved, widen_whole

__all__ = ["TrainResult", "train"]

SAMPLES = 8
"""How many held-out rows are answered before and after training, for the report."""

EVALUATED = 200
"""How many held-out rows are measured before and after; `ft eval` measures all."""

PHASES = ("load", "train", "save", "evaluate")


@dataclass(frozen=True)
class TrainResult:
    """What a training made.

    Attributes:
        run: the run folder.
        status: ``finished`` or ``interrupted``.
        steps: optimizer steps done, over all sessions of the run.
        train_loss: mean loss over the last tenth of the steps.
        evaluation: the content of ``evaluation.json``, if there is held-out data.
    """

    run: Path
    status: str
    steps: int
    train_loss: float | None
    evaluation: dict[str, Any] | None


def train(
    config: TrainConfig | Mapping[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> TrainResult:
    """Train as the configuration says, and write the run folder (its layout: the documentation's page on run folders).

    Args:
        config: a :class:`ft_core.config.TrainConfig` or its values.
        resume: go on from the newest whole checkpoint of the run in ``output``; a run that isn't there is begun.
        overwrite: replace a run that is there.
        say: prints one line.

    Raises:
        FtError: a subclass of it for every mistake that its user can mend; nothing is written or lost then.
    """
    ranks = Ranks()
    say = say if ranks.is_main else _silent
    config = check_config(config)
    run = Run(str(config.output))
    with ExitStack() as stack:
        _hold(run, ranks, stack)
        run.check_free(resume=resume, overwrite=overwrite)
        check_reward_files(config)
        check_method(config)
        source = find_model(config.model)
        config = with_task(config, source)
        read_ahead(source)
        config = fit_to_model(config, source, say=say)
        disk_folder(config)  # whether it is there is asked before anything is loaded
        device = pick_device()
        with memory_errors_said(run, config) as used, memory_capped(config, device, say):
            if resume and last_whole_checkpoint(run.checkpoints) is None:
                missing = "checkpoint" if run.is_run else "run"
                say(f"there is no {missing} in {run.path} to go on with: it begins anew")
            return _train(config, source, run, ranks, device, used, resuming=resume and run.is_run, say=say)


def _train(
    config: TrainConfig,
    source: ModelSource,
    run: Run,
    ranks: Ranks,
    device: Device,
    used: InUse,
    *,
    resuming: bool,
    say: Callable[[str], None],
) -> TrainResult:
    spec = registry().get(MethodSpec, config.method)
    if resuming:
        check_resumable(run, config)
    say(f"{source.name}, {config.method if config.task == 'text' else f'{config.task}, {config.method}'}, on {device}")
    _say_other_gpus(device, ranks, say)
    planned = foresee(config, source, device, say)
    used.optimizer = optimizer_of(config, planned)
    tokenizer = load_tokenizer(source)
    processor = prepare_processor(config, source, tokenizer)
    train_rows, held_out = prepare_rows(config, spec, run.held_out() if resuming else (), say)
    data_sha256 = fingerprint(train_rows)
    if resuming and run.environment.get("data_sha256") != data_sha256:
        raise RunError(f"cannot resume {run.path}: the training data has changed since the run began")

    ranks.wait()  # the others have checked the folder before the main process claims it
    with run.claim() if ranks.is_main and not resuming else nullcontext():
        ranks.wait()
        model = prepare_model(config, spec, source, device, say)
        speed_up(model, device, say, config)
        job = Job(
            config=config,
            settings=method_settings(config),
            model=model,
            tokenizer=tokenizer,
            train_rows=train_rows,
            eval_rows=held_out,
            arguments=trainer_arguments(
                config,
                run,
                device,
                evaluates=bool(held_out),
                recompute=recomputes(model, config, device, say, planned),
                optimizer=used.optimizer,
            ),
            callbacks=[],
            counts={"train_rows": len(train_rows), "held_out_rows": len(held_out or ())},
            say=say,
            processor=processor,
        )
        session = _Session(run, spec, job, ranks, {"load": peak_memory()})
        left_out = job.kept.get(LEFT_OUT, {}).get("train", [])
        if resuming:
            check_unfinished(run, session.total)
            check_same_rows(run, left_out)
        if ranks.is_main:
            write_text(run.path / run.CONFIG, to_yaml(config))  # on resuming too: its length may have changed
        if ranks.is_main and not resuming:
            if held_out:
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in held_out)
                write_text(run.path / run.HELD_OUT, "".join(lines))
            write_json(run.path / run.ENVIRONMENT, environment(config, source, device, model, data_sha256, left_out))
    ranks.wait()
    return session.train()


class _Session:
    """The time from a built trainer to the end of the run, or to its interruption."""

    def __init__(self, run: Run, spec: MethodSpec, job: Job, ranks: Ranks, memory: dict[str, int]) -> None:
        self.run, self.spec, self.job, self.ranks, self.memory = run, spec, job, ranks, memory
        from transformers import PrinterCallback

        self.checkpoint = last_whole_checkpoint(run.checkpoints)
        step = int(self.checkpoint.name.rpartition("-")[2]) if self.checkpoint else 0
        metrics = run.path / run.METRICS if ranks.is_main else None
        self.writer = MetricsWriter(metrics, seconds=run.seconds_until(step))
        self.interruption = Interruption(job.say, ranks.any)
        job.callbacks += [self.writer, *([Progress(self.writer)] if ranks.is_main else []), self.interruption]
        self.trainer: Any = build_trainer(trainer_of(job.config, spec), job)
        self.trainer.rates = rates_of(job.model, job.config)
        if job.config.method == "sft":  # others ask the model for answers as it is wrapped
            widen_whole(job.model)
        self.trainer.remove_callback(PrinterCallback)  # it prints every log as a dict; Progress shows what matters
        plan_ahead(self.trainer, job.say)
        self.trainer.keep_checkpoints = job.config.training.keep_checkpoints
        self.step = step
        self.total = total_steps(self.trainer, job.config)
        if (doubt := few_steps(job.config, self.total)) is not None:
            job.say(doubt)
        # A checkpoint every tenth of the run, between every 20 and every 500 steps, unless the configuration says when.
        self.trainer.args.save_steps = job.config.training.save_every or min(500, max(20, self.total // 10))

    def train(self) -> TrainResult:
        from transformers import set_seed

        run, job, trainer = self.run, self.job, self.trainer
        comparison = self._before()
        if self.checkpoint:
            job.say(f"going on from step {self.step} ({self.checkpoint})")
        check_first_step(trainer, job.config, job.say)
        if job.model.device.type == "cuda":
            # What a first batch takes is measured; what was used before, loading or measuring, would hide it.
            self.memory["measure"] = peak_memory()
            count_peak_anew()
        if self.ranks.is_main:
            run.truncate(self.step)
        # What was measured before training must not change the training.
        set_seed(job.config.training.seed)
        try:
            if self.checkpoint and self.step >= self.total:
                self._load_last(self.checkpoint)
            else:
                with self.interruption.listen():
                    trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        except Exception as error:
            reason = None if isinstance(error, FtError) else storage_error(error, run.path)
            if reason:
                raise RunError(f"cannot write in {run.path}: {reason}; free some space, go on with --resume") from error
            raise
        finally:
            self.writer.close()
            leave_disk(job.model)
        self.memory["train"] = peak_memory()
        steps = int(trainer.state.global_step)
        if self.interruption.asked and steps < trainer.state.max_steps:
            return TrainResult(run.path, "interrupted", steps, self._loss(), comparison)
        getattr(trainer, "finish", lambda: None)()  # a third party's trainer may have none
        if self.ranks.is_main:
            self._save()
            comparison = self._after(comparison)
            self._summary(steps)
            write_report(run.path)
        self.ranks.wait()
        return TrainResult(run.path, "finished", steps, self._loss(), comparison)

    def _load_last(self, checkpoint: Path) -> None:
        """What the last step left, where only saving was interrupted: transformers would train one step more."""
        from transformers import TrainerState

        self.trainer._load_from_checkpoint(str(checkpoint))
        self.trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def _measure(self, what: str) -> Evaluation:
        job = self.job
        rows = list((job.eval_rows or [])[:EVALUATED])
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        model.eval()
        total = len(job.eval_rows or [])
        cut = f"the first {len(rows)} of {total} held-out rows (ft eval measures all)"
        job.say(f"measuring {what} training on {cut if len(rows) < total else counted(total, 'held-out row')}")
        with as_loaded(model):
            evaluate = measure_of(job.config, self.spec)
            asked = EvaluationJob(job.config, job.settings, model, job.tokenizer, rows, answers=SAMPLES)
            asked.kept, asked.say, asked.processor = job.kept, job.say, job.processor
            measured: Evaluation = evaluate(asked)
        # Eight answers are for reading; a share of eight would not be a measurement.
        measured.metrics.pop("exact_match", None)
        return measured

    def _before(self) -> dict[str, Any] | None:
        """Measure the model as it is before the first step; a resumed run has done so already."""
        if not self.job.eval_rows:
            return None
        path = self.run.path / self.run.EVALUATION
        if self.ranks.is_main and not path.is_file():
            write_json(path, compare(self._measure("before"), None, self.run.HELD_OUT))
        self.ranks.wait()
        return self.run.evaluation()

    def _after(self, before: dict[str, Any] | None) -> dict[str, Any] | None:
        if before is None:
            return None
        comparison = compare(before, self._measure("after"), self.run.HELD_OUT)
        write_json(self.run.path / self.run.EVALUATION, comparison)
        self.memory["evaluate"] = peak_memory()
        return comparison

    def _save(self) -> None:
        """Write the adapter or the model beside its place, and rename it."""
        run, model = self.run, self.trainer.accelerator.unwrap_model(self.trainer.model)
        target = run.model if self.job.config.lora is None else run.adapter
        beside = target.with_name(f".{target.name}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        try:
            if self.job.config.lora is None:
                _to_sixteen_bits(model, self.trainer.args)
                model.config.use_cache = True
                if model.can_generate():  # whatever loads the model has to stop where it learnt to
                    ends = stop_ids(model, self.job.tokenizer)  # Whisper's own generation compares with a number
                    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
                model.save_pretrained(beside)
            else:
                with as_saved(model):
                    model.save_pretrained(beside)
                (beside / "README.md").unlink(missing_ok=True)  # PEFT's card is a form that nobody has filled in
                _name_base(beside / "adapter_config.json", self.run.environment["base_model"]["path"])
            template = alpaca_template(self.job.tokenizer, self.job.train_rows)
            if template is not None:
                self.job.tokenizer.chat_template = template
                self.job.say("the tokenizer is saved with Alpaca's prompt as its chat template: ask as was trained")
            (self.job.processor or self.job.tokenizer).save_pretrained(beside)
            if target.exists():
                shutil.rmtree(target)
            os.replace(beside, target)
        except BaseException as error:  # an interruption leaves nothing behind either
            shutil.rmtree(beside, ignore_errors=True)
            reason = storage_error(error, run.path)
            if reason is None:
                raise
            last = last_whole_checkpoint(run.checkpoints)
            kept = f"; the checkpoint {last.name} is whole" if last else ""
            raise RunError(f"cannot save {target}: {reason}{kept}; free some space and go on with --resume") from error
        self.memory["save"] = peak_memory()

    def _loss(self) -> float | None:
        losses = [
            row["loss"] for row in self.run.metrics() if row.get("kind") == "train" and row.get("loss") is not None
        ]
        last = losses[-max(1, len(losses) // 10) :]
        return sum(last) / len(last) if last else None

    def _summary(self, steps: int) -> None:
        rows = [row for row in self.run.metrics() if row.get("kind") == "train"]
        model = self.trainer.model
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        summary = {
            "status": "finished",
            "steps": steps,
            "tokens": rows[-1].get("tokens") if rows else 0,
            "seconds": rows[-1].get("seconds") if rows else 0.0,
            "train_loss": self._loss(),
            "parameters": int(getattr(model, "num_parameters", lambda: sum(p.numel() for p in model.parameters()))()),
            "trainable_parameters": trainable,
            "data": self.job.counts,
            "memory": {phase: self.memory[phase] for phase in PHASES if phase in self.memory},
        }
        write_json(self.run.path / self.run.SUMMARY, summary)


def _silent(line: str) -> None:
    """What is said once is said by the main process."""


def _hold(run: Run, ranks: Ranks, stack: ExitStack) -> None:
    """Let the main process hold the folder until the stack is unwound; every process fails if it cannot."""
    failure: FtError | None = None
    if ranks.is_main:
        try:
            stack.enter_context(held(run.path))
            run.recover()
        except FtError as error:
            failure = error
    if ranks.any(failure is not None):
        raise failure or RunError(f"the main process cannot have {run.path}")


def _say_other_gpus(device: Device, ranks: Ranks, say: Callable[[str], None]) -> None:
    import torch

    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if ranks.count == 1 and count > 1:
        say(f"one of {count} GPUs is used; for all of them: torchrun --nproc-per-node {count} -m ft_core train …")


def _name_base(config: Path, location: str) -> None:
    """Let the adapter name its base by the Hub's name rather than by this machine's cache, where it came from there."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values["base_model_name_or_path"] = location
    write_json(config, values)


def _to_sixteen_bits(model: Any, arguments: Any) -> None:
    """A model trained in full keeps float32 weights while it trains; it is saved in the format it was computed in."""
    import torch

    if arguments.bf16 or arguments.fp16:
        model.to(torch.bfloat16 if arguments.bf16 else torch.float16)
