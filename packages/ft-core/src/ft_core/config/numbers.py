"""Types of the configuration's values that take less than pydantic's own would."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["Number", "Section", "Switch", "Whole"]


def _only(value: Any) -> Any:
    """YAML reads `yes`, `on` and 1 in places where only true or false is meant; a number is no switch."""
    if isinstance(value, bool):
        return value
    raise ValueError("true or false")


def _no_switch(value: Any) -> Any:
    """And a switch is no number: `eval_split: true` would silently be one row."""
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


Switch = Annotated[bool, BeforeValidator(_only)]
Number = Annotated[float, BeforeValidator(_no_switch), Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_no_switch)]


class Section(BaseModel):
    """Keys with values, of which none is unknown."""

    model_config = ConfigDict(extra="forbid", validate_default=True)
