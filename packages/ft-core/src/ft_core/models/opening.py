"""Opens what a command is pointed at, for inference: a run, or a model as a configuration names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ft_core.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ft_core.models.source import ModelSource
    from ft_core.runs import Run

__all__ = ["Target", "check_reference", "find_target", "open_model", "open_target"]


def check_reference(reference: str) -> None:
    """Refuse a path at which nothing is, before anything heavy is imported and before the Hub is asked for it.

    ``org/name`` may be either: it is taken for a path if it lies in ``runs``, where runs go by default, or in another
    folder that holds runs.

    Raises:
        RunError: there is no such folder; names the runs that are there.
    """
    from ft_core.models.source import HUB_NAME
    from ft_core.runs import Run, no_run, runs_in

    if reference.startswith("package:") or reference.endswith(".gguf"):
        return
    path = Run(reference).path
    if path.exists():
        return
    is_name = HUB_NAME.fullmatch(reference) and not reference.startswith("runs/")
    if not is_name or ("/" in reference and runs_in(path.parent)):
        raise RunError(no_run(path, "run or model folder"))


@dataclass(frozen=True)
class Target:
    """What a command is pointed at, found and not loaded.

    Attributes:
        reference: as it was given.
        task: the modality of its model.
        run: a run folder, or None.
        source: the model, where it is none.
    """

    reference: str
    task: str
    run: Run | None = None
    source: ModelSource | None = None


def find_target(reference: str) -> Target:
    """A run folder (adapter on its base, or full model), or a folder or Hub name, whose model writes text.

    Raises:
        RunError: as :func:`check_reference`; or the run's method trains a model that writes no text.
        ModelError: as :func:`ft_core.models.find_model`.
    """
    check_reference(reference)
    from ft_core.models.source import find_model
    from ft_core.plugins import MethodSpec, ModalitySpec, registry
    from ft_core.runs import Run
    from ft_core.training.modality import is_of

    run = Run(reference)
    if not (run.path.is_dir() and run.is_run):
        source = find_model(reference)
        names = registry().names(ModalitySpec.group)
        task = next((name for name in names if is_of(name, source)), "text")
        return Target(reference, task, source=source)
    run = Run.open(reference)
    method = run.config.method
    if registry().get(MethodSpec, method).head != "language-model":
        raise RunError(f"{reference} was trained with {method}: its model gives scores and writes no text")
    return Target(reference, run.config.task, run=run)


def open_target(
    target: Target, *, auto: Any = None, say: Callable[[str], None] = print
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and tokenizer of what was found.

    Args:
        auto: the auto class of transformers that knows a model that is no run's, where it is no language model.

    Raises:
        RunError: the run isn't finished.
        ModelError: as :func:`ft_core.models.load`.
    """
    from ft_core.models.loading import load_found, load_run

    if target.run is not None:
        return load_run(target.run, say=say)
    assert target.source is not None
    model, tokenizer = load_found(target.source, auto=auto)
    say(f"{target.reference} on {model.device}")
    return model, tokenizer


def open_model(reference: str, *, say: Callable[[str], None] = print) -> tuple[Any, PreTrainedTokenizerBase]:
    """The language model and tokenizer of a run folder, or of a folder or Hub name.

    Raises:
        RunError: as :func:`check_reference`; the run isn't finished, or its method trains a model that writes no text.
        ConfigError: it is a run of another modality.
        ModelError: as :func:`ft_core.models.load`.
    """
    from ft_core.training.modality import check_text_only

    target = find_target(reference)
    if target.run is not None:
        check_text_only(target.run.config, "this command")
    return open_target(target, say=say)
