"""One folder an operation: ``reference`` (plain torch), ``kernels`` (Triton), ``autograd`` (the torch op)."""

__all__: list[str] = []
