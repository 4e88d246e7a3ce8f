"""A reward model that is stored as an adapter: what it stands on, and whether a policy's base is that.

Files of names and numbers are read here, no weights, so that ``ft plan`` can ask as well, and decides as training does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_core.config import TrainConfig
from ft_core.errors import ModelError, RunError
from ft_core.runs import Run

if TYPE_CHECKING:
    from ft_core.planning.blueprint import Blueprint

__all__ = ["HEAD", "PART", "WEIGHTS", "StoredAdapter", "run_of", "stored_adapter", "why_no_score"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEAD = "base_model.model.score.weight"
PART = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
"""Of an adapter's tensor: the layer and the matrix."""
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

        The bases have to be the same to the last bit, so whatever is not known to change nothing is a reason. Of the
        policy's model the ``config.json`` is read.

        Raises:
            ModelError: the adapter's file cannot be read.
            ConfigError: ``lora`` names a layer that the policy's model doesn't have.
        """
        return _why_policy(config) or self._why_base(config) or self._why_adapter(config) or self._why_layers(config)

    def why_unfit(self, hidden: int, layers: Mapping[str, tuple[int, int]]) -> str | None:
        """Why its tensors are none for a policy; None where they are. Their names and shapes are asked, not they.

        Args:
            hidden: numbers of a hidden state. layers: what goes out of each adapted layer and into it, by its name.

        Raises:
            ModelError: the adapter's file cannot be read.
        """
        shapes, rank = self.shapes, self.settings.get("r")
        if shapes.pop(HEAD, None) != [1, hidden]:
            return "its adapter has no head of one score that fits"
        found: dict[str, dict[str, list[int]]] = {}
        for name, shape in sorted(shapes.items()):
            part = PART.fullmatch(name)
            if part is None:
                return f"its adapter has a part {name}"
            found.setdefault(part[1], {})[part[2]] = shape
        for path, parts in found.items():
            if path not in layers:
                return f"the policy has no adapter on {path}"
            out, into = layers[path]
            if parts != {"A": [rank, into], "B": [out, rank]}:
                return f"its adapter does not fit {path}"
        return None

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

    def _why_layers(self, config: TrainConfig) -> str | None:
        from ft_core.planning.blueprint import outline_of

        try:
            folder = outline_of(config.model).path
            built = _built(folder, (folder / "config.json").stat().st_mtime_ns)
        except (ModelError, OSError) as error:
            return f"the policy's layers are not known beforehand ({error})"
        why, blueprint = built
        if why is not None:
            return why
        adapted = blueprint.outline(config.lora).targets
        layers = {matrix.name: (matrix.out, matrix.into) for matrix in blueprint.linears if matrix.name in adapted}
        return self.why_unfit(blueprint.text.hidden_size, layers)


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


@lru_cache(maxsize=4)
def _built(folder: Path, when: int) -> tuple[str | None, Blueprint]:
    """Why a model of this folder can have no guest, whatever that is, and its sizes; ``when`` its file was written
    tells whether it may have changed, since a planner asks hundreds of times.
    """
    from transformers import AutoConfig

    from ft_core.models.source import ModelSource
    from ft_core.planning.blueprint import Blueprint

    blueprint = Blueprint.of(ModelSource(str(folder), folder, folder.name))
    if blueprint.layout is None:
        return f"ft's layers cannot compute the policy: {blueprint.reason}", blueprint
    return why_no_score(AutoConfig.from_pretrained(folder, trust_remote_code=False)), blueprint


def why_no_score(config: Any) -> str | None:
    """Why a classifier cannot be computed as the model's backbone with one linear layer behind it; None where it can.

    Args:
        config: the model's, of transformers.
    """
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as KNOWN

    if type(config) in KNOWN and KNOWN[type(config)].forward is GenericForSequenceClassification.forward:
        return None
    return f"transformers' classifier of the family {config.model_type} is not its model with one layer behind it"
