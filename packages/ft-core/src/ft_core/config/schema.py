"""The configuration's keys, their types, defaults and bounds."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ft_core.config.numbers import Number, Section, Switch, Whole
from ft_core.config.rope import RopeScaling, named
from ft_core.memory import bytes_of

__all__ = ["DataSource", "LoraSettings", "RewardEntry", "TrainConfig", "TrainingSettings"]


def _no_null(value: Any) -> Any:
    return "none" if value is None else value


def _off(value: Any) -> Any:
    """YAML reads `off` as false."""
    return "off" if value is False else value


def _start(value: Any) -> Any:
    """The number 1 equals true, and is none of the ways to begin."""
    if value is True or value in ("gaussian", "loftq"):
        return value
    raise ValueError("true, gaussian, loftq")


class DataSource(Section):
    """One source of training data.

    Attributes:
        path: a file (.jsonl, .json, .csv, .parquet, .txt), a folder of such files, or a Hub data set: ``name`` (its
            split ``train``), ``name:split`` or ``name:config:split``.
        weight: how often each row appears per epoch, on average (0.5: a seeded half of the rows; 2: each twice).
        format: the name of the row format, where the columns don't tell it.
    """

    path: str = Field(min_length=1)
    weight: Number = Field(default=1.0, gt=0, le=1000)
    format: str | None = None


def _amount(value: Any) -> Any:
    """`auto`, or an amount of memory as it was written."""
    if value != "auto":
        bytes_of(value if isinstance(value, str) else "")
    return value


def _sources(value: Any) -> Any:
    """A list may hold plain paths too."""
    if isinstance(value, list):
        if not value:
            raise ValueError("at least one source")
        return [{"path": item} if isinstance(item, str) else item for item in value]
    return value


def _rewards(value: Any) -> Any:
    """A list may hold plain names too."""
    if isinstance(value, list):
        if not value:
            raise ValueError("at least one reward")
        return [{"name": item} if isinstance(item, str) else item for item in value]
    return value


def _paths(sources: str | list[DataSource] | None) -> set[str]:
    """What sources name, two spellings of a path being one."""
    paths = [sources] if isinstance(sources, str) else [source.path for source in sources or ()]
    return {os.path.normpath(os.path.expanduser(path.removesuffix(":train"))) for path in paths}


Sources = Annotated[str | list[DataSource], BeforeValidator(_sources)]


Start = Annotated[Literal[True, "gaussian", "loftq"], BeforeValidator(_start)]


class LoraSettings(Section):
    """The adapter. The names on the left are ours, those of ``peft.LoraConfig`` on the right.

    Attributes:
        r: rank (``r``).
        alpha: scaling numerator (``lora_alpha``); unset means 2r. The update is scaled by alpha/r, or alpha/sqrt(r)
            with ``rslora``.
        dropout: dropout on the adapter's input (``lora_dropout``).
        targets: ``all-linear`` (every linear layer save the head) or a list of module names (``target_modules``).
        rslora: rank-stabilised scaling (``use_rslora``; Kalajdzievski 2023, arXiv:2312.03732).
        dora: weight-decomposed adapters (``use_dora``; Liu et al. 2024, arXiv:2402.09353).
        bias: which biases are trained (``bias``).
        modules_to_save: modules trained whole and saved with the adapter, such as ``embed_tokens`` and ``lm_head``.
        init_lora_weights: what the adapter begins as (``init_lora_weights``). ``true``: nothing (A random, B zero);
            ``gaussian``: the same with another distribution; ``loftq``: the part of the weights that nf4 lost, as far
            as the rank holds it (Li et al. 2023, arXiv:2310.08659). An adapter that began so belongs to the quantized
            model: `ft merge` merges it into that model's dequantized weights, of a run and of the adapter's folder
            alone, whose ``loftq.json`` says so.
    """

    r: Whole = Field(default=16, ge=1, le=4096)
    alpha: Number | None = Field(default=None, gt=0)
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | list[str] = "all-linear"
    rslora: Switch = False
    dora: Switch = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    init_lora_weights: Start = True


Optimizer = Literal[
    "adamw_8bit",
    "paged_adamw_8bit",
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "sgd",
    "lion_8bit",
    "lion_32bit",
    "paged_adamw_32bit",
]
Scheduler = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
]


class TrainingSettings(Section):
    """How the optimizer runs.

    Attributes:
        epochs: passes over the training data; a fraction is allowed.
        max_steps: optimizer steps, instead of ``epochs``.
        batch_size: rows per device and micro-step; with packing a row holds up to ``max_length`` tokens.
        gradient_accumulation: micro-steps per optimizer step; the loss is averaged over the tokens of all of them.
        learning_rate: the peak of the schedule.
        optimizer: of ``adamw_8bit`` the state lies in the host's memory where only that makes the training fit, as
            that of ``paged_adamw_8bit`` always does: the same updates. Any other is taken as it is.
        warmup_ratio: the share of the steps over which the rate rises: w steps, rounded up and the last not among them,
            have k/(w+1) of the peak, k from 1 to w.
        save_every: optimizer steps between checkpoints; unset means a tenth of the run, at least 20 and at most 500.
        keep_checkpoints: how many of the newest checkpoints stay.
        eval_every: optimizer steps between measurements of the loss on held-out data; unset means at the end only.
        seed: of everything random: data order, adapter initialisation, dropout.
    """

    epochs: Number = Field(default=1.0, gt=0)
    max_steps: Whole | None = Field(default=None, ge=1)
    batch_size: Whole = Field(default=2, ge=1)
    gradient_accumulation: Whole = Field(default=4, ge=1)
    learning_rate: Number = Field(default=2.0e-4, gt=0)
    optimizer: Optimizer = "adamw_8bit"
    scheduler: Scheduler = "cosine"
    warmup_ratio: Number = Field(default=0.03, ge=0, le=1)
    weight_decay: Number = Field(default=0.0, ge=0)
    max_grad_norm: Number = Field(default=1.0, ge=0)
    save_every: Whole | None = Field(default=None, ge=1)
    keep_checkpoints: Whole = Field(default=2, ge=1)
    eval_every: Whole | None = Field(default=None, ge=1)
    seed: Whole = Field(default=0, ge=0, lt=2**32)


class RewardEntry(BaseModel):
    """One reward of a method that scores what its model writes. Keys beside these are the reward's own settings.

    Attributes:
        name: a reward in `ft plugins`, or ``file.py:function`` of yours.
        weight: what its value is multiplied by before all are added; below 0, it punishes.
        on_error: what to do where the reward raises or returns something that is no finite number: ``stop`` the
            training, ``skip`` (this reward adds nothing to this sample's sum and leaves it out of its own mean; a
            sample that no reward scores is left out of its group), or ``zero`` (it counts as 0).
    """

    model_config = ConfigDict(extra="allow", validate_default=True)

    name: str = Field(min_length=1)
    weight: Number = 1.0
    on_error: Literal["stop", "skip", "zero"] = "stop"

    @property
    def settings(self) -> dict[str, Any]:
        """The reward's own settings, not yet validated."""
        return dict(self.model_extra or {})

    @property
    def file(self) -> tuple[str, str] | None:
        """Path and function, where the name is ``file.py:function``."""
        path, colon, function = self.name.rpartition(":")
        return (path, function) if colon and path.endswith(".py") else None


class TrainConfig(BaseModel):
    """A run's configuration; the documentation's page on configuration explains each key.

    A method's own settings sit in a section under the method's name (``sft: {train_on: all}``). ``activations``,
    ``memory``, ``disk`` and ``verify``: the documentation's page on the fast path.

    Raises:
        pydantic.ValidationError: a key or value that is not allowed. ``ft_core.config.load_config`` turns it into a
            one-line :class:`ft_core.errors.ConfigError`.
    """

    # Methods add sections by name, so unknown keys are sorted out below rather than by pydantic.
    model_config = ConfigDict(extra="allow", validate_default=True)

    model: str = Field(min_length=1)
    method: str = "sft"
    data: Sources
    eval_split: Number | Whole | None = None
    eval_data: Sources | None = None
    quantization: Annotated[Literal["none", "nf4", "int8"], BeforeValidator(_no_null)] = "none"
    max_length: Whole = Field(default=2048, ge=2)
    rope_scaling: Annotated[RopeScaling | None, BeforeValidator(named)] = None
    packing: Switch = True
    lora: LoraSettings | None = Field(default_factory=LoraSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    activations: Literal["auto", "keep", "recompute", "offload"] = "auto"
    memory: Annotated[str, BeforeValidator(_amount)] = "auto"
    disk: Annotated[str, Field(min_length=1), BeforeValidator(_off)] = "auto"
    verify: Annotated[Literal["first-step", "off"], BeforeValidator(_off)] = "first-step"
    task: str = "text"
    rewards: Annotated[list[RewardEntry] | None, BeforeValidator(_rewards)] = None
    output: str | None = Field(default=None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _sections_may_be_empty(cls, values: Any) -> Any:
        """`training:` with nothing below it is null in YAML and means the defaults (`lora: null` does not)."""
        if isinstance(values, dict) and values.get("training", ...) is None:
            values = {**values, "training": {}}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.eval_split is not None and self.eval_data is not None:
            raise ValueError("eval_split and eval_data exclude each other: give one")
        if shared := sorted(_paths(self.data) & _paths(self.eval_data)):
            raise ValueError(
                f"eval_data: {shared[0]!r} is trained on too, so it measures nothing: name other rows, another split "
                "of a Hub data set (name:split), or give eval_split"
            )
        # 1.0 is neither: who means all rows and who means one row must not be told apart by a dot.
        if self.eval_split is not None and not (
            0 < self.eval_split < 1 or (isinstance(self.eval_split, int) and self.eval_split > 0)
        ):
            raise ValueError(
                f"eval_split: {self.eval_split} is not allowed (allowed: a share below 1, or a whole number of rows)"
            )
        if self.training.eval_every is not None and self.eval_split is None and self.eval_data is None:
            raise ValueError(
                f"training.eval_every: {self.training.eval_every} needs held-out data: give eval_split or eval_data"
            )
        if (
            self.rope_scaling is not None
            and self.rope_scaling.factor is None
            and "max_length" not in self.model_fields_set
        ):
            raise ValueError(
                f"rope_scaling: {self.rope_scaling.rope_type}: its factor follows from max_length, which is not set: "
                "set max_length, or rope_scaling.factor"
            )
        if self.quantization != "none" and self.lora is None:
            raise ValueError(f"quantization: {self.quantization} needs lora (quantized weights cannot be trained)")
        if self.lora is not None and self.lora.init_lora_weights == "loftq":
            if self.quantization != "nf4":
                raise ValueError(
                    f"lora.init_lora_weights: loftq needs quantization: nf4 (it is {self.quantization}), "
                    "whose errors the adapter begins with"
                )
            if self.lora.dora:
                raise ValueError("lora.init_lora_weights: loftq and lora.dora exclude each other: give one")
        if self.lora is not None and self.lora.targets == []:
            raise ValueError("lora.targets is empty: give all-linear or at least one module name")
        if self.output is None:
            self.output = (
                f"runs/{self.model.rstrip('/').split('/')[-1].split(':')[-1].removesuffix('.gguf')}-{self.method}"
            )
        return self

    @property
    def sections(self) -> dict[str, Any]:
        """The keys that are not in the schema: methods' own sections, not yet validated."""
        return dict(self.model_extra or {})
