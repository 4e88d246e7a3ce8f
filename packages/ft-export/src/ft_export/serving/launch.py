"""``launch.sh`` and ``compose.yaml``: how what was exported is started, on this machine or in a container."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_export.serving.limits import Limits

__all__ = ["MARKER", "Service", "write_launch"]

MARKER = "launch.sh"
"""The file by which a folder that may be overwritten is known."""


@dataclass(frozen=True)
class Service:
    """How a server is started.

    Attributes:
        name: of the service in the compose file.
        image: of the container, with its version.
        start: the words that start it on this machine.
        entrypoint: those that start it in the container.
        arguments: what follows on this machine, in the export's folder; address and port apart.
        contained: what follows in the container.
        port: where it listens.
        environment: variables for both.
        mounts: host paths and where they lie in the container, read-only.
    """

    name: str
    image: str
    start: Sequence[str]
    entrypoint: Sequence[str]
    arguments: Sequence[str]
    contained: Sequence[str]
    port: int
    environment: Mapping[str, str]
    mounts: Mapping[str, str]


def write_launch(folder: Path, service: Service, limits: Limits) -> None:
    """Write both files; either way the server can be reached from this machine only."""
    told = "".join(f"# {line}\n" for line in limits.told())
    words = [*service.start, *service.arguments, "--host", "127.0.0.1", "--port", str(service.port)]
    exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in service.environment.items())
    script = folder / MARKER
    script.write_text(
        "#!/bin/sh\n"
        "# Serves this folder to this machine alone. Words given to this script go to the server, last.\n"
        f'{told}set -eu\ncd "$(dirname "$0")"\n{exports}exec {shlex.join(words)} "$@"\n',
        encoding="utf-8",
    )
    (folder / "compose.yaml").write_text(f"# docker compose up\n{told}{_compose(service)}", encoding="utf-8")


def _compose(service: Service) -> str:
    import yaml

    card = {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    command = [*service.contained, "--host", "0.0.0.0", "--port", str(service.port)]  # in the container alone
    described: dict[str, Any] = {
        "image": service.image,
        "entrypoint": list(service.entrypoint),
        "command": [_literal(word) for word in command],
        "environment": {key: _literal(value) for key, value in service.environment.items()},
        "ports": [f"127.0.0.1:{service.port}:{service.port}"],
        "volumes": [
            {"type": "bind", "source": _literal(here), "target": there, "read_only": True}
            for here, there in service.mounts.items()
        ],
        "shm_size": "2gb",
        "deploy": {"resources": {"reservations": {"devices": [card]}}},
    }
    text: str = yaml.safe_dump({"services": {service.name: described}}, sort_keys=False, allow_unicode=True, width=120)
    return text


def _literal(word: str) -> str:
    """Compose replaces what begins with a dollar sign, unless it stands twice."""
    return word.replace("$", "$$")
