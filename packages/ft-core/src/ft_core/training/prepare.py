"""What stands between a configuration and its training: rows, model, the facts about them, and whether to go on."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ft_core.config import TrainConfig
from ft_core.errors import ConfigError, RunError
from ft_core.models import Device, ModelSource
from ft_core.plugins import MethodSpec, registry, resolve
from ft_core.runs import RUN_FORMAT, Run
from ft_core.training.modality import of_modality

__all__ = [
    "check_method",
    "check_resumable",
    "check_reward_files",
    "check_same_rows",
    "check_unfinished",
    "environment",
    "fingerprint",
    "prepare_model",
    "prepare_processor",
    "prepare_rows",
]

LIBRARIES = ("transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "bitsandbytes", "triton")

Rows = Sequence[dict[str, Any]]


def check_resumable(run: Run, config: TrainConfig) -> None:
    """Refuse to go on with a run of another version or configuration, or one that is seen to be finished.

    Raises:
        RunError: one line that says why.
    """
    run = Run.open(run.path)
    run.check_same(config)
    if config.training.max_steps is not None:
        check_unfinished(run, config.training.max_steps)
    elif run.finished:  # epochs are steps once the rows are packed, but no more epochs are no more steps
        was = run.values()["training"]
        if was.get("max_steps") is None and config.training.epochs <= was["epochs"]:
            check_unfinished(run, 0)


def check_unfinished(run: Run, total: int) -> None:
    """Refuse to go on with a finished run that already has the ``total`` steps that are asked for.

    Raises:
        RunError: it has.
    """
    steps = (run.summary() or {}).get("steps", 0)
    if run.finished and total <= steps:
        raise RunError(f"{run.path} is finished, at step {steps}: nothing to resume (--overwrite starts anew)")


def check_method(config: TrainConfig) -> None:
    """Let the method refuse what its settings alone do not show, before anything is loaded.

    A finished run may do without what is looked for here, so that this is no part of checking a configuration.

    Raises:
        FtError: one line, the method's.
    """
    check = registry().get(MethodSpec, config.method).check
    if check is not None:
        resolve(check)(config)


def check_reward_files(config: TrainConfig) -> None:
    """Refuse a reward of the user's whose file is not there, before anything is loaded.

    A finished run needs its rewards' files no more, so that this is no part of checking a configuration.

    Raises:
        ConfigError: names the entry and the file.
    """
    for number, entry in enumerate(config.rewards or ()):
        if entry.file is not None and not Path(entry.file[0]).expanduser().is_file():
            raise ConfigError(f"rewards.{number}: no file {entry.file[0]}, looked for from {Path.cwd()}")


def prepare_rows(
    config: TrainConfig, spec: MethodSpec, held_out: Rows = (), say: Callable[[str], None] = print
) -> tuple[Rows, Rows | None]:
    """Training rows and held-out rows, or None where nothing is held out.

    Args:
        held_out: the held-out rows of the run that is resumed. What was measured before training was measured on
            them, so they are not read again from ``eval_data``, which may have changed.
        say: told of rows that are on both sides.
    """
    from ft_core.data import read_rows, split
    from ft_core.data.rows import shared

    seed = config.training.seed
    form = of_modality(config, "rows")
    rows = read_rows(config.data, spec.formats, seed=seed, form=form)
    if config.eval_data is not None:
        if held_out:
            return rows, held_out
        measured = read_rows(config.eval_data, spec.formats, seed=seed, form=form)
        if count := shared(rows, measured):
            verb = "is" if count == 1 else "are"
            say(
                f"warning: {count} of the {len(measured)} held-out rows {verb} trained on too, "
                "word for word: what is measured on them looks better than it is"
            )
        return rows, measured
    if config.eval_split is not None:
        return split(rows, config.eval_split, seed=seed)
    return rows, None


def fingerprint(rows: Rows) -> str:
    """SHA-256 of the rows, in hexadecimal."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode())
    return digest.hexdigest()


def prepare_processor(config: TrainConfig, source: ModelSource, tokenizer: Any) -> Any:
    """What makes tensors of the task's other inputs, sharing the tokenizer; None where there are none."""
    load = of_modality(config, "processor")
    return None if load is None else load(source, config, tokenizer)


def prepare_model(
    config: TrainConfig, spec: MethodSpec, source: ModelSource, device: Device, say: Callable[[str], None]
) -> Any:
    """The model to train, its adapter attached where the configuration has one."""
    from transformers import set_seed

    from ft_core.adapters import add_lora, dense_targets

    load, adapter = of_modality(config, "load"), of_modality(config, "adapter")
    set_seed(config.training.seed)  # the adapter, and a new head, start from random numbers
    model = load(source, config, device, spec.head)
    if config.lora is None:
        return model
    if config.lora.targets == "all-linear" and (targets := dense_targets(model)) is not None:
        say(f"the experts of this model stay frozen (adapters on them cannot be merged); trained: {', '.join(targets)}")
    options = {} if adapter is None else adapter(model, config)
    return add_lora(model, **{**config.lora.model_dump(), **options})


def check_same_rows(run: Run, left_out: list[int]) -> None:
    """Refuse to go on with other rows than those that the run began with: what could not be read then may be there now.

    Raises:
        RunError: some are; it names the first.
    """
    before = run.environment.get("left_out_rows", [])
    if before == left_out:
        return
    number = min(set(before) ^ set(left_out))
    now = "cannot be used any more" if number in left_out else "was left out when it began and can be used now"
    raise RunError(
        f"cannot resume {run.path}: row {number + 1} of the training data {now}, so that the rows would come in "
        "another order; make its files what they were, or begin anew with --overwrite"
    )


def environment(
    config: TrainConfig, source: ModelSource, device: Device, model: Any, data_sha256: str, left_out: list[int]
) -> dict[str, Any]:
    """The content of ``environment.json``."""
    import torch

    import ft_core

    libraries = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            libraries[name] = version(name)
    base = {"reference": source.reference, "path": source.location, "name": source.name}
    if config.rope_scaling is not None:  # an adapter's own files have no place for what it needs of its base
        text = model.config.get_text_config()
        base |= {"max_position_embeddings": text.max_position_embeddings, "rope_parameters": text.rope_parameters}
    return {
        "run_format": RUN_FORMAT,
        "ft_core": ft_core.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "libraries": libraries,
        "device": device.type,
        "device_name": device.name,
        "dtype": device.dtype,
        "base_model": base,
        "data_sha256": data_sha256,
        **({"left_out_rows": left_out} if left_out else {}),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
