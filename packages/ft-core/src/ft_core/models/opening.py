"""Opens what a command is pointed at, for inference: a run, or a model as a configuration names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ft_core.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_reference", "open_model"]


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


def open_model(reference: str, *, say: Callable[[str], None] = print) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and tokenizer of a run folder (adapter on its base, or full model), or of a folder or Hub name.

    Raises:
        RunError: as :func:`check_reference`; the run isn't finished, or its method trains a model that writes no text.
        ModelError: as :func:`ft_core.models.load`.
    """
    check_reference(reference)
    from ft_core.models.loading import load_found, load_run
    from ft_core.models.source import find_model
    from ft_core.plugins import MethodSpec, registry
    from ft_core.runs import Run
    from ft_core.training.modality import check_text_only

    run = Run(reference)
    if not (run.path.is_dir() and run.is_run):
        model, tokenizer = load_found(find_model(reference))
        say(f"{reference} on {model.device}")
        return model, tokenizer
    run = Run.open(reference)
    check_text_only(run.config, "this command")
    method = run.config.method
    if registry().get(MethodSpec, method).head != "language-model":
        raise RunError(f"{reference} was trained with {method}: its model gives scores and writes no text")
    return load_run(run, say=say)
