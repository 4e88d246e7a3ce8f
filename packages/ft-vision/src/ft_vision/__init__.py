"""Vision for ft: images read safely, whatever the file holds."""

__all__ = ["__version__"]
__version__ = "0.1.0"
