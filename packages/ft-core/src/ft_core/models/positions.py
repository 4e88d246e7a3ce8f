"""How many positions a model has, and how rotary scaling gives it more: on its configuration, before it is built.

The mathematics is transformers' own (``modeling_rope_utils``), which reads ``rope_parameters`` and
``max_position_embeddings``. What is decided here is their values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ft_core.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from ft_core.config import RopeScaling, TrainConfig
    from ft_core.models.source import ModelSource

__all__ = ["check_length", "check_scaled", "fit_to_model", "positions", "rope_of", "scale"]

RELATIVE = ("yarn", "llama3", "longrope")
"""The types whose mathematics reads how many positions there were before."""

EXTENDED = ("linear", "dynamic", "yarn", "llama3")
"""The types by which more positions follow from a factor alone."""


def positions(config: Any) -> int | None:
    """The most tokens of a sequence that a model's configuration provides for; None if it sets no bound.

    Two types of scaling may leave ``max_position_embeddings`` at what it was before: ``dynamic``, whose mathematics
    needs it there, and ``yarn``, as Qwen's documentation has it written.
    """
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not (isinstance(most, int) and most > 0):
        return None
    rope = rope_of(config) or {}
    before = {"dynamic": most, "yarn": rope.get("original_max_position_embeddings")}.get(str(rope.get("rope_type")))
    return max(most, round(before * _factor(rope))) if before else most


def rope_of(config: Any) -> dict[str, Any] | None:
    """A configuration's ``rope_parameters``; None where it has none, or several for different kinds of layers."""
    rope = getattr(config.get_text_config(), "rope_parameters", None)
    return rope if isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()) else None


def _factor(rope: dict[str, Any]) -> float:
    factor = rope.get("factor")
    return float(factor) if isinstance(factor, int | float) and factor >= 1 else 1.0


def check_length(config: Any, max_length: int | None, name: str) -> None:
    """Refuse a length beyond the positions of the model ``name``.

    Raises:
        ModelError: it is; says what to lower it to, and which scaling would reach it.
    """
    most = positions(config)
    if not (max_length and most and max_length > most):
        return
    from ft_core.config import RopeScaling

    rope = rope_of(config) or {}
    own = str(rope.get("rope_type", "default"))
    way = ""
    with suppress(ConfigError, ValueError):
        asked = RopeScaling.model_validate({"rope_type": "yarn" if own == "default" else own})
        scale(copy.deepcopy(config), asked, max_length, name)
        way = f", or set rope_scaling: {asked.rope_type}"
    raise ModelError(f"max_length {max_length} is more than the {most} positions of {name}: lower it to {most}{way}")


def scale(config: Any, asked: RopeScaling, max_length: int | None, name: str) -> RopeScaling:
    """Write a scaling into a model's configuration: ``rope_parameters`` and, but for ``dynamic``, the new positions.

    A model that is scaled already is extended by its own type only, relative to what it was before: ``factor`` is that
    of the whole, and every other parameter stays.

    Args:
        config: a transformers configuration, as it was read; it is changed.
        asked: what the user wants.
        max_length: the longest sequence, in tokens; None where ``asked`` states the factor.
        name: of the model, for messages.

    Returns:
        ``asked`` with the factor, and with the parameters of its type that were left to defaults. Applied to the same
        configuration it gives the same again.

    Raises:
        ConfigError: the model's rotary embedding cannot be scaled so, or the factor and the length don't fit.
    """
    text = config.get_text_config()
    rope, most = rope_of(config), positions(config)
    if rope is None or most is None:
        what = "several rotary embeddings" if getattr(text, "rope_parameters", None) else "no rotary embedding"
        raise ConfigError(f"rope_scaling: {name} has {what} and cannot be scaled: leave it out")
    kind, own = asked.rope_type, str(rope.get("rope_type", "default"))
    if own not in ("default", kind):
        way = f"set rope_scaling: {own}, or leave it out" if own in EXTENDED else "leave it out"
        raise ConfigError(
            f"rope_scaling: {name} has its {most} positions by {own} already, which {kind} would replace: {way}"
        )
    before = _before(rope, asked, most, own, name)
    factor, reach = _reach(asked, before, most, max_length, name)
    if kind == "longrope":
        _check_factors(text, rope, asked, most, name)
    if own == "yarn" and rope.get("attention_factor") is not None and asked.attention_factor is None:
        raise ConfigError(
            f"rope_scaling: {name} states an attention_factor ({rope['attention_factor']}) for its own factor: give "
            f"rope_scaling.attention_factor for {factor:g}"
        )
    given: dict[str, Any] = asked.model_dump() | {"factor": factor}
    if kind in RELATIVE:
        original = rope.get("original_max_position_embeddings") if own == kind else None
        given["original_max_position_embeddings"] = int(
            original or asked.original_max_position_embeddings or text.max_position_embeddings
        )
        if hasattr(text, "original_max_position_embeddings"):  # Phi-3's, which goes before the one in the parameters
            text.original_max_position_embeddings = given["original_max_position_embeddings"]
    if kind == "llama3":
        given = {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **_only(rope, "low_freq_factor", "high_freq_factor"),
            **given,
        }
    if kind != "dynamic":  # whose base grows with the length relative to the positions of before
        text.max_position_embeddings = reach
    text.rope_parameters = {**{key: value for key, value in rope.items() if key != "type"}, **given}
    try:
        text.validate_rope()
    except (ValueError, KeyError) as error:  # Phi-3 knows no scaling but longrope
        raise ConfigError(f"rope_scaling: {kind} is not for {name}: {' '.join(str(error).split())}") from error
    return asked.model_copy(update=given)


def _only(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: values[key] for key in keys if values.get(key) is not None}


def _before(rope: dict[str, Any], asked: RopeScaling, most: int, own: str, name: str) -> float:
    """How many positions a factor of 1 stands for."""
    original = asked.original_max_position_embeddings
    if own == "default":
        if original is not None and original > most:
            raise ConfigError(
                f"rope_scaling.original_max_position_embeddings: {original} is more than the {most} positions of {name}"
            )
        return original or most
    known = rope.get("original_max_position_embeddings")
    if original is not None and original != known:
        raise ConfigError(f"rope_scaling.original_max_position_embeddings: {original} is not {name}'s own, {known}")
    if own in ("yarn", "longrope") and known:
        return float(known)
    # Llama 3.1 has 131072 positions by a factor of 8 over 8192: twice the product.
    return most / _factor(rope)


def _reach(asked: RopeScaling, before: float, most: int, max_length: int | None, name: str) -> tuple[float, int]:
    """The factor, and the positions that there are with it."""
    if asked.factor is None:
        if max_length is None:
            raise ConfigError(
                f"rope_scaling: {asked.rope_type}: its factor follows from max_length, which is not set: set "
                "max_length, or rope_scaling.factor"
            )
        if max_length <= most:
            raise ConfigError(
                f"rope_scaling: {asked.rope_type}: max_length {max_length} is within the {most} positions of {name}: "
                "leave rope_scaling out, or give rope_scaling.factor"
            )
        return max_length / before, max_length
    reach = round(asked.factor * before)
    if reach <= most:
        raise ConfigError(
            f"rope_scaling.factor: {asked.factor:g} times {before:g} positions is no more than the {most} of {name}: "
            "give a larger factor, or leave rope_scaling out"
        )
    if max_length is not None and max_length > reach:
        raise ConfigError(
            f"rope_scaling.factor: {asked.factor:g} times {before:g} positions is {reach}, fewer than max_length "
            f"{max_length}: leave the factor out, or give at least {max_length / before:g}"
        )
    return asked.factor, reach


def _check_factors(text: Any, rope: dict[str, Any], asked: RopeScaling, most: int, name: str) -> None:
    """LongRoPE's factors were searched for one model and one length: there are no others to be computed."""
    if asked.short_factor is None or asked.long_factor is None:
        carried = rope.get("long_factor") is not None
        what = f"those of {name} were searched for its {most} positions" if carried else f"{name} carries none"
        raise ConfigError(
            f"rope_scaling: longrope needs short_factor and long_factor searched for this length; {what}: give both, "
            f"or set max_length to at most {most}"
        )
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    pairs = int(size * (rope.get("partial_rotary_factor") or 1.0)) // 2
    for key in ("short_factor", "long_factor"):
        count = len(getattr(asked, key))
        if count != pairs:
            raise ConfigError(f"rope_scaling.{key}: {count} numbers are not one for each of {name}'s {pairs} pairs")


def check_scaled(model: Any, scaling: RopeScaling, name: str) -> None:
    """Refuse a model class whose rotary embedding doesn't read the scaling: it would be trained without.

    Raises:
        ConfigError: no module of the model has the scaling's type.
    """
    if not any(getattr(module, "rope_type", None) == scaling.rope_type for module in model.modules()):
        kind = type(model).__name__
        raise ConfigError(f"rope_scaling: transformers' {kind} ({name}) computes no {scaling.rope_type}: leave it out")


def fit_to_model(config: TrainConfig, source: ModelSource, *, say: Callable[[str], None] = print) -> TrainConfig:
    """The configuration with what follows from the model: ``rope_scaling`` with its factor, and a ``max_length`` that
    nobody set lowered to the model's positions.

    Raises:
        ConfigError: as :func:`scale`.
        ModelError: as :func:`check_length`.
    """
    from transformers import AutoConfig

    is_set = "max_length" in config.model_fields_set
    try:
        loaded = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
    except Exception:  # what is wrong with the model is said when it is loaded
        return config
    if config.rope_scaling is not None:
        scaling = scale(loaded, config.rope_scaling, config.max_length if is_set else None, source.reference)
        config = config.model_copy(update={"rope_scaling": scaling})
    elif is_set:
        check_length(loaded, config.max_length, source.reference)
    most = positions(loaded)
    if is_set or not most or most >= config.max_length:
        return config
    say(f"max_length is {most}: {source.name} has no more positions")
    return config.model_copy(update={"max_length": most})
