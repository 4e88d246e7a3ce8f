"""The errors that a user can mend. The command line prints each as one line and exits with 2."""

from __future__ import annotations

__all__ = ["ConfigError", "DataError", "FormError", "FtError", "ModelError", "PluginError", "RunError"]


class FtError(Exception):
    """Something that the user can put right; the message says what, where, what is allowed and what to do.

    The message is one line: anything that would break it (a library's multi-line text, say) is folded.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ConfigError(FtError):
    """A configuration key or value that cannot be used."""


class DataError(FtError):
    """A data file or row that cannot be used."""


class FormError(DataError):
    """A row of no form that is known to the task."""


class ModelError(FtError):
    """A model or tokenizer that cannot be loaded."""


class PluginError(FtError):
    """A plugin that is missing, duplicated, too new or fails to import."""


class RunError(FtError):
    """A run folder that is missing, incomplete, taken, or cannot be written."""
