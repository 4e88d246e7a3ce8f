"""A reward model that is stored as an adapter: what it stands on, and whether a policy's base is that.

Files of names and numbers are read here, no weights, so that ``ft plan`` can ask as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_core.config import TrainConfig
from ft_core.errors import ModelError, RunError
from ft_core.runs import Run

__all__ = ["HEAD", "WEIGHTS", "StoredAdapter", "run_of", "stored_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEAD = "base_model.model.score.weight"
HEADS = frozenset({"classifier", "score"})
"""What PEFT saves beside the adapter of a classifier."""
FREE = frozenset({
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_lora_weights", "lora_alpha",
    "lora_dropout", "modules_to_save", "peft_type", "peft_version", "r", "target_modules", "task_type", "use_rslora",
})  # fmt: skip
"""Fields of PEFT's configuration that change nothing of a stored adapter's function, or are looked at here."""


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter with a head of one score.

    Attributes:
        folder: with PEFT's files. settings: its ``adapter_config.json``.
        reference, path: the base, as the configuration that it was trained with calls it, and where it was found.
        trained: that configuration; None of an adapter that ft has not made, which stands on weights that are not
            quantized.
    """

    folder: Path
    settings: Mapping[str, Any]
    reference: str
    path: str
    trained: TrainConfig | None

    @property
    def quantization(self) -> str:
        """Of the base: ``none``, ``nf4`` or ``int8``."""
        return "none" if self.trained is None else str(self.trained.quantization)

    @property
    def scores(self) -> bool:
        """Whether it says that it is for a classifier."""
        return self.settings.get("task_type") == "SEQ_CLS"

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of the adapter's and its head's tensors, by the header of their file.

        Raises:
            ModelError: there is no such file, or no whole one.
        """
        file = self.folder / WEIGHTS
        try:
            with open(file, "rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            return {name: list(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"the adapter {self.folder} has no {WEIGHTS} that can be read ({error})") from error

    def why_apart(self, config: TrainConfig) -> str | None:
        """Why it cannot be a further adapter on the base of the policy that a configuration trains; None where it can.

        The bases have to be the same to the last bit, so whatever is not known to change nothing is a reason.
        """
        return _why_policy(config) or self._why_base(config) or self._why_adapter(config)

    def _why_base(self, config: TrainConfig) -> str | None:
        if self.settings.get("revision") is not None:
            return f"its base is the revision {self.settings['revision']}"
        if not _is_same(config.model, self.reference, self.path):
            return f"its base is {self.reference}, the policy's {config.model}"
        if self.trained is not None and self.settings.get("base_model_name_or_path") != self.path:
            return f"{self.folder / CONFIG} names the base {self.settings.get('base_model_name_or_path')}"
        if self.quantization != config.quantization:
            return f"its base has quantization {self.quantization}, the policy's {config.quantization}"
        scaling = None if self.trained is None else self.trained.rope_scaling
        length = None if self.trained is None else self.trained.max_length
        if scaling != config.rope_scaling or (scaling is not None and length != config.max_length):
            return "the positions of its base are scaled otherwise (rope_scaling, max_length)"
        return None

    def _why_adapter(self, config: TrainConfig) -> str | None:
        from peft import LoraConfig

        settings, usual = self.settings, LoraConfig().to_dict()
        if settings.get("peft_type") != "LORA":
            return f"its adapter is {settings.get('peft_type')}, not LoRA"
        if not set(settings.get("modules_to_save") or ()) <= HEADS:
            return "modules beside its head were trained in full"
        if settings.get("init_lora_weights") not in (True, False, "gaussian"):
            return f"its adapter began with init_lora_weights {settings.get('init_lora_weights')}"
        if (
            self.trained is not None
            and self.trained.lora is not None
            and self.trained.lora.init_lora_weights == "loftq"
        ):
            return "its adapter began with init_lora_weights loftq, on a base of its own"
        for name in sorted(settings.keys() - FREE):
            if settings[name] not in (usual.get(name), None, False, {}, []):
                return f"its adapter has {name}"
        assert config.lora is not None  # else it was said before
        targets, ours = settings.get("target_modules"), config.lora.targets
        if ours != "all-linear":
            lasts = {name.rpartition(".")[2] for name in ours}
            others = [targets] if isinstance(targets, str) else sorted({t.rpartition(".")[2] for t in targets or ()})
            if missing := [name for name in others if name not in lasts]:
                return f"the policy has no adapter on {', '.join(missing)} (lora.targets)"
        return None


def run_of(reference: str) -> Run | None:
    """The run that a reward model's reference names: by its folder, by its ``adapter/``, or by a checkpoint's of an
    adapter. None where it names no part of a run.
    """
    run = Run(reference)
    if not run.path.is_dir() or run.is_run:
        return run if run.path.is_dir() else None
    for path in (run.path.absolute(), run.path.resolve()):  # a link's own place may say it, or where it leads
        above = path.parent
        if path.parent.name == run.checkpoints.name and (path / CONFIG).is_file():
            above = path.parent.parent
        elif path.name != run.adapter.name:
            continue
        if Run(above).is_run:
            return Run(above)
    return None


def stored_adapter(reference: str) -> StoredAdapter | None:
    """The adapter that a reward model's reference names; None where it names a whole model.

    Args:
        reference: a run's folder, its checkpoint's, an adapter's, a model's, or a Hub name.

    Raises:
        RunError: of a run, its files cannot be read. ModelError: the adapter's cannot.
    """
    path, run = Run(reference).path, run_of(reference)
    if run is None:
        if not (path / CONFIG).is_file():
            return None
        settings = _settings(path)
        base = str(settings.get("base_model_name_or_path") or "")
        local = Path(base).expanduser()
        return StoredAdapter(path, settings, base, str(local.resolve()) if local.is_dir() else base, None)
    run = Run.open(run.path)
    whole = path.resolve() in (run.path.resolve(), run.adapter.resolve())
    folder = run.adapter if whole else path
    if not folder.is_dir():
        return None
    found = run.environment.get("base_model") or {}
    if not isinstance(found.get("path"), str):
        raise RunError(f"{run.path / run.ENVIRONMENT} does not say which base the run was trained on")
    # A checkpoint has no word of its own on how the base was quantized or its positions scaled; its run has.
    return StoredAdapter(folder, _settings(folder), run.config.model, found["path"], run.config)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        assert isinstance(found, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise ModelError(f"the adapter {folder} has no {CONFIG} that can be read ({error})") from error
    return found


def _is_same(model: str, reference: str, path: str) -> bool:
    """Whether a configuration's model is a base: the same folder, or what is called the same elsewhere."""
    local = Path(model).expanduser()
    return str(local.resolve()) == path if local.is_dir() else model == reference


def _why_policy(config: TrainConfig) -> str | None:
    lora = config.lora
    if lora is None:
        return "the policy is trained in full"
    if lora.bias != "none":
        return f"the policy's training changes biases of its base (lora.bias: {lora.bias})"
    if lora.modules_to_save:
        return "the policy's training changes modules of its base (lora.modules_to_save)"
    if lora.init_lora_weights == "loftq":
        return "the policy's training begins with other weights (lora.init_lora_weights: loftq)"
    return None
