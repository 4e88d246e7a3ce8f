"""Vocabularies that grew in training: an adapter that holds more rows of embeddings than its base has."""

from __future__ import annotations

from pathlib import Path

from ft_export.bases import empty_model, read_config
from ft_export.errors import ExportError
from ft_export.merging.adapter import Adapter, LowRank, Replacement

__all__ = ["grown_rows"]


def grown_rows(adapter: Adapter, base: Path) -> int | None:
    """How many tokens the merged model has, where that is another number than the base's; else None.

    Raises:
        ExportError: the adapter holds the embeddings and the head in different sizes, or only one of the two.
    """
    if not any(name.rpartition(".")[0].rpartition(".")[2] in PLACES for name in adapter.changes):
        return None  # nothing is built for an adapter on other layers
    model = empty_model(base, read_config(base))
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [weight for module in modules if (weight := getattr(module, "weight", None)) is not None]
    names = {
        name: parameter.shape[0]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(parameter is weight for weight in weights)
    }
    found = {name: rows for name in names if (rows := _rows(adapter, name)) is not None}
    grown = {name: rows for name, rows in found.items() if rows != names[name]}
    if not grown:
        return None
    if len(set(found.values())) > 1:
        said = " and ".join(f"{name} with {rows} rows" for name, rows in found.items())
        raise ExportError(f"{adapter.path} holds {said}: they do not belong together")
    tied = len(weights) == 2 and weights[0] is weights[1]
    missing = sorted(set(names) - set(found))
    if missing and not tied:
        raise ExportError(
            f"{adapter.path} holds {next(iter(grown))} for {next(iter(grown.values()))} tokens, and not {missing[0]}: "
            "train both as modules_to_save"
        )
    return next(iter(grown.values()))


PLACES = ("embed_tokens", "lm_head", "proj_out", "wte", "embed_in", "embed_out", "word_embeddings")
"""What embeddings and heads are called."""


def _rows(adapter: Adapter, name: str) -> int | None:
    """How many rows the adapter has for an embedding or a head that it holds; None where it holds none."""
    change = adapter.changes.get(name)
    if isinstance(change, Replacement):
        return adapter.files.shape(change.key)[0]
    if isinstance(change, LowRank) and "base" in change.parts:
        return adapter.files.shape(change.parts["base"])[0]
    return None
