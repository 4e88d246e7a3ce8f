"""Fast, exact Triton kernels for training and inference, each beside a plain torch reference."""

__all__ = ["__version__"]
__version__ = "0.1.0"
