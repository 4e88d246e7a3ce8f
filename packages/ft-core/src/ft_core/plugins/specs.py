"""What a plugin declares: one small frozen dataclass a kind, found through an entry point of that kind's group.

A spec holds names, never code: every callable is a reference ``"package.module:attribute"`` that is imported when it
is first used. So a module of specs imports in no time, and listing plugins costs nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

__all__ = [
    "API_VERSION",
    "GROUPS",
    "ArchitectureSpec",
    "CodecSpec",
    "CommandSpec",
    "ExportRequest",
    "ExportResult",
    "ExporterSpec",
    "MethodSpec",
    "ModalitySpec",
    "RewardSpec",
    "RolloutSpec",
    "Spec",
    "resolve",
]

API_VERSION = 1
"""The version of this interface. A plugin states the one it was written for; a newer one than this is refused."""


def resolve(reference: str) -> Any:
    """Import ``"package.module:attribute"`` and return the attribute.

    Raises:
        ValueError: the reference is not of that form.
        ImportError, AttributeError: as Python's own import raises them.
    """
    module, colon, attribute = reference.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"a reference is 'package.module:attribute', not {reference!r}")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What every plugin states about itself.

    Attributes:
        name: the name that configurations and commands use; equal to the entry point's name.
        summary: one line for listings.
        api_version: the version of this interface that the plugin was written for.
    """

    group: ClassVar[str] = ""
    name: str
    summary: str
    api_version: int = API_VERSION


@dataclass(frozen=True, kw_only=True)
class CommandSpec(Spec):
    """A subcommand of ``ft``.

    Attributes:
        module: a module with ``add_arguments(parser: argparse.ArgumentParser) -> None`` and
            ``run(args: argparse.Namespace) -> int | None`` (the exit code; None is 0). It may have
            ``more_help() -> str``, what ``ft NAME --help`` shows below the options. It is imported when the command is
            called, so it may import what it likes, but ``ft NAME --help`` is quicker when ``run`` imports late.
    """

    group: ClassVar[str] = "ft.commands"
    module: str


@dataclass(frozen=True, kw_only=True)
class MethodSpec(Spec):
    """A training method, named by the configuration's ``method``.

    Attributes:
        settings: reference to the pydantic model of the method's own section of the configuration.
        trainer: reference to ``build(job: ft_core.training.Job) -> transformers.Trainer``. The job holds the model with
            its adapter, tokenizer, rows and trainer arguments; the run folder, checkpoints, resuming and reporting are
            ft_core's.
        formats: names of the data formats (``ft_core.data.FORMATS``) that the method can train on.
        head: what the model ends in: a language-model head, or a scalar score per sequence.
        evaluate: reference to ``evaluate(job: ft_core.evaluation.EvaluationJob) -> ft_core.evaluation.Evaluation``.
        rewards: whether the method scores what its model writes, by the configuration's ``rewards``. Without it the
            key is refused.
        load: reference to ``load(config: TrainConfig) -> ft_core.planning.Load``, what a micro-batch of the method is
            to the memory; None where it is that of ``sft``.
        check: reference to ``check(config: TrainConfig) -> None``, which refuses by a ``ConfigError`` what the settings
            alone do not show, such as a file that is not there; called when a training begins, before anything is
            loaded. None where there is no more to check.
        inputs: whether the method sees itself to what rows hold beside text, by :attr:`ModalitySpec.inputs`, and
            measures so; of others that is the modality's ``dataset``, ``collator`` and ``evaluate``.
    """

    group: ClassVar[str] = "ft.methods"
    settings: str
    trainer: str
    formats: tuple[str, ...]
    evaluate: str
    head: Literal["language-model", "score"] = "language-model"
    rewards: bool = False
    load: str | None = None
    check: str | None = None
    inputs: bool = False


@dataclass(frozen=True, kw_only=True)
class ModalitySpec(Spec):
    """A kind of input besides (or with) text.

    Attributes:
        read: reference to a function from a path to the decoded object, or None where the input is text.
        extensions: file name endings that ``read`` takes, lower case, with the dot.
        load: reference to the function that loads a model of this modality for training, or None where the installed
            version cannot train one yet: a configuration that asks for it is refused in one line.
        settings: reference to the pydantic model of the modality's own section of the configuration, which stands under
            its name; None if it has none.
        methods: the methods that train it; empty: all.
        processor: reference to ``f(source, config, tokenizer)``, what turns this input into tensors. It is handed on in
            ``Job.processor`` and saved beside what was trained (``save_pretrained``).
        columns: reference to ``f(row) -> row``, which is asked before a row's format is recognised: it gives the
            columns of data sets of this kind those of a format, and leaves other rows as they are.
        rows: reference to ``f(row, format, folder) -> row``, which brings a row to a normal form that can be written as
            JSON, instead of ``format.normalise(row)``; ``folder`` is that of the data file, None for the Hub's. It is
            handed the configuration too where it takes a keyword ``config``.
        adapter: reference to ``f(model, config) -> dict``, keyword arguments of :func:`ft_core.add_lora` that take the
            place of the configuration's.
        rates: reference to ``f(model, config) -> dict[str, tuple[str, float]]``, the parts with a learning rate of
            their own: by a part's name a regular expression that the whole name of each of its parameters matches, and
            the peak of its rate, which follows the run's schedule and is logged as ``NAME_learning_rate``.
        dataset: reference to ``f(job, rows, name) -> datasets.Dataset`` of training rows, instead of tokenized text;
            ``name`` is ``train`` or ``held_out``.
        collator: reference to ``f(job)``, which makes a collator of those rows, as :class:`ft_core.data.Collator` is.
            It may set ``dataloader_*`` arguments in ``job.arguments``. Where a row cannot be cut anywhere, it has a
            method ``checked(rows) -> row | None``: a short row of whole documents, on which the fast layers are
            compared with transformers' own before the first step; its attribute ``holds`` says what such a row holds
            beside text (``images`` where there is none).
        evaluate: reference to a function that measures in the place of the method's.
        knows: reference to ``f(source: ft_core.models.ModelSource) -> bool``, whether a model that is no run's, found
            and not loaded, is of this modality; None where none is taken for one.
        answerer: reference to ``f(target: ft_core.models.opening.Target)``, which makes what `ft generate` and
            `ft chat` answer with, an :class:`ft_core.answering.Answerer`.
        plan: reference to ``f(config, source: ft_core.models.ModelSource)``, which makes what a plan knows of the parts
            before the language model, a :class:`ft_core.planning.front.Fronts`; of ``source`` only ``config.json`` need
            be there.
        inputs: reference to ``f(config, model, processor)``, which makes a :class:`ft_core.training.inputs.Inputs` for
            methods that make batches of their own; None where there are none such among ``methods``.
        verify: reference to ``f(source, device, *, quantization, dtype, layers, batches, tokens) -> (load, inputs)``,
            what ``ft verify`` compares of such a model: as :func:`ft_core.fast.verify.verify` takes them. None in their
            place: that is text.
        trainer: reference to ``f(job) -> transformers.Trainer | None``, which makes the trainer in the method's place;
            None of it where the model is trained as the method does: as a language model on ``dataset`` and
            ``collator``.
        fast: reference to ``f(model)``, which puts fast layers of its own into a model that ft_core's are not made for,
            and returns a handle with ``on`` and ``undo()`` (see :func:`ft_core.fast.enable`); None of it for others.
        claims: whether a configuration that names no task has this one where ``knows`` takes its model for one.
        next: commands that a run of this modality can be handed to, as words after ``ft``; ``{run}`` is its folder.
    """

    group: ClassVar[str] = "ft.modalities"
    read: str | None = None
    extensions: tuple[str, ...] = ()
    load: str | None = None
    settings: str | None = None
    methods: tuple[str, ...] = ()
    processor: str | None = None
    columns: str | None = None
    rows: str | None = None
    adapter: str | None = None
    rates: str | None = None
    dataset: str | None = None
    collator: str | None = None
    evaluate: str | None = None
    knows: str | None = None
    answerer: str | None = None
    plan: str | None = None
    inputs: str | None = None
    verify: str | None = None
    trainer: str | None = None
    fast: str | None = None
    claims: bool = False
    next: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class ArchitectureSpec(Spec):
    """How a model family maps onto fast layers.

    Attributes:
        model_types: the ``model_type`` values of transformers configurations that it covers.
        describe: reference to a function from a transformers configuration to the family's layout; None where its
            layers are no stack of a decoder's, and its modality's ``fast`` puts others into it.
        parts: what of the family is computed by the kernels, for listings, where no layout tells it.
    """

    group: ClassVar[str] = "ft.architectures"
    model_types: tuple[str, ...]
    describe: str | None = None
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RewardSpec(Spec):
    """A reward function, named by the configuration's ``rewards``.

    Attributes:
        reward: reference to ``f(prompts, completions, **columns) -> list[float | None]``, called as TRL calls its
            reward functions: all by keyword, ``completion_ids``, ``trainer_state`` and each column of the data among
            them; None is a sample that it does not score. Where ``settings`` is given, reference to a function that
            makes such a one: ``make(settings) -> f``. It is handed the policy too where it takes a keyword ``policy``
            (``ft_rl.rewards.guest.Policy``, or None where there is none). What ``f`` needs of the data it may name in
            an attribute ``columns``, a tuple of names (``a|b``: either), so that their absence is said before the
            training.
        settings: reference to the pydantic model of the reward's own settings, the keys that stand beside its name in
            the configuration; None if it has none.
    """

    group: ClassVar[str] = "ft.rewards"
    reward: str
    settings: str | None = None


@dataclass(frozen=True, kw_only=True)
class RolloutSpec(Spec):
    """An engine that samples completions during training.

    Attributes:
        engine: reference to its class, made of an ``ft_rl.rollouts.protocol.EngineJob``.
        check: reference to ``check(config: TrainConfig, settings: Mapping[str, Any]) -> None``, which refuses by a
            ``ConfigError`` what cannot work, before anything is loaded; ``settings`` are the engine's own. None where
            the engine itself does that when it is made.
    """

    group: ClassVar[str] = "ft.rollouts"
    engine: str
    check: str | None = None


@dataclass(frozen=True, kw_only=True)
class CodecSpec(Spec):
    """An audio codec: ``codec`` refers to a class with ``encode``, ``decode`` and ``sample_rate``."""

    group: ClassVar[str] = "ft.codecs"
    codec: str


@dataclass(frozen=True, kw_only=True)
class ExporterSpec(Spec):
    """A target of ``ft export RUN --to NAME``.

    Attributes:
        export: reference to ``export(request: ExportRequest) -> ExportResult``.
        types: what ``--type`` may be, the default first; empty where there is nothing to choose.
        options: what the ``key=value`` words may be, each with a line on what it is, for ``ft export --help``. The
            exporter itself refuses others.
    """

    group: ClassVar[str] = "ft.exporters"
    export: str
    types: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What ``ft export`` asks of an exporter.

    Attributes:
        run: the run folder (see the documentation's page on run folders), or a model's or an adapter's.
        out: the folder to write to; it may not exist yet. An exporter writes beside it and renames.
        type: one of the spec's ``types``, or None where it has none.
        overwrite: whether files of an earlier export in ``out`` may be replaced.
        options: further ``key=value`` words of the command line.
        skip_proof: leave out the checks in the engine, and say so loudly.
    """

    run: Path
    out: Path
    type: str | None = None
    overwrite: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    skip_proof: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an exporter made.

    Attributes:
        files: the files or folders written, the main one first.
        checks: lines that say what was checked and found, printed as they are.
        next_command: a command that uses the result, or None.
    """

    files: tuple[Path, ...]
    checks: tuple[str, ...] = ()
    next_command: str | None = None


GROUPS: dict[str, type[Spec]] = {
    spec.group: spec
    for spec in (
        MethodSpec,
        ModalitySpec,
        ArchitectureSpec,
        RewardSpec,
        RolloutSpec,
        CodecSpec,
        ExporterSpec,
        CommandSpec,
    )
}
"""The spec class of each entry-point group."""
