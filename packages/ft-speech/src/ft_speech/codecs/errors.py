"""What goes wrong with a codec and can be put right by its user."""

from __future__ import annotations

from ft_core.errors import FtError

__all__ = ["CodecError"]


class CodecError(FtError):
    """A codec that cannot be found, read, fitted or written; the message names it and the reason."""
