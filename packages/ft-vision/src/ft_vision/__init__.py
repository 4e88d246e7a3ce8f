"""Vision for ft: images read safely, whatever the file holds.

>>> from ft_vision import read_image
>>> image = read_image("photo.jpg")  # doctest: +SKIP

Pillow is imported when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft_vision.images import ImageError, read_image

__version__ = "0.1.0"

__all__ = ["ImageError", "__version__", "read_image"]


def __getattr__(name: str) -> Any:
    if name in ("ImageError", "read_image"):
        from ft_vision import images

        return getattr(images, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
