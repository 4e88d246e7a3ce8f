"""The subcommands of ``ft`` that ft-core brings: one module each, with ``add_arguments`` and ``run``."""

__all__: list[str] = []
