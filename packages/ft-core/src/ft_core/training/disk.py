"""Where activations go that neither the GPU nor the host's memory holds; asked before torch is imported."""

from __future__ import annotations

from pathlib import Path

from ft_core.config import TrainConfig
from ft_core.errors import ConfigError
from ft_core.runs import Run

__all__ = ["disk_folder"]


def disk_folder(config: TrainConfig) -> Path | None:
    """Where activations may go that nothing else holds: the run's folder, the configuration's, or None for nowhere.

    Raises:
        ConfigError: the folder is not there.
    """
    if config.disk == "off":
        return None
    if config.disk == "auto":
        return Run(str(config.output)).path
    folder = Path(config.disk).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"disk: {config.disk!r} is no folder (allowed: auto, off, or a folder that is there)")
    return folder
