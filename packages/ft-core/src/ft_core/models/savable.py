"""Generation configurations that transformers reads but refuses to write."""

from __future__ import annotations

from typing import Any

__all__ = ["make_savable"]

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""The fields of a generation configuration that mean something only if it samples."""


def make_savable(model: Any) -> None:
    """Mend a generation configuration that transformers reads but refuses to write, which would end the first save.

    Published models have a temperature without ``do_sample``, say. Such fields have no effect; the tokens that begin,
    end and pad a text are kept in any case.
    """
    config = getattr(model, "generation_config", None)
    if config is None or _is_savable(config):
        return
    if config.do_sample is not True:
        for name in SAMPLING:
            setattr(config, name, None)
    if not _is_savable(config):
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = type(config)(**{name: getattr(config, name) for name in tokens})


def _is_savable(config: Any) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True
