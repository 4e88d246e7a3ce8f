"""The one error of this package: something that the user can mend, said in one line."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

__all__ = ["ExportError", "one_line"]

P = ParamSpec("P")
R = TypeVar("R")


class ExportError(Exception):
    """The message is one line that says what, where, what is allowed and what to do; other lines are folded into it."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def one_line(function: Callable[P, R]) -> Callable[P, R]:
    """Turn what the file system says (a full disk, missing rights) into an :class:`ExportError`.

    safetensors reports a failed write by its own error, with the system's text inside.
    """

    @wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            # numpy says only how much of an array it could write
            reason = error.strerror or f"the disk is full or the file may not grow ({error})"
            if isinstance(error, PermissionError):
                raise ExportError(
                    f"{reason}{where}: nothing was written; the folder has to be one that may be written to (a run is "
                    "merged into its own folder first)"
                ) from error
            raise ExportError(f"{reason}{where}: nothing was written; free space or choose another folder") from error
        except Exception as error:
            if type(error).__name__ == "SafetensorError":
                raise ExportError(f"safetensors: {error}: nothing was written") from error
            raise

    return inner
