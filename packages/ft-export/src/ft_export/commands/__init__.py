"""The subcommands of ``ft`` that this package brings."""

__all__: list[str] = []
