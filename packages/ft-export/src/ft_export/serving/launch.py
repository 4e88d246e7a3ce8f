"""``launch.sh`` and ``compose.yaml``: how what was exported is started, on this machine or in a container."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_export.errors import ExportError
from ft_export.serving.limits import Limits

__all__ = ["MARKER", "Service", "mounts_of", "project_name", "write_launch"]

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
        mounts: paths in the container and what of the host lies there, read-only; see :func:`mounts_of`.
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


def mounts_of(folder: Path, there: str) -> dict[str, str]:
    """What has to be mounted so that a container has at ``there`` what lies in a folder of this machine.

    A link that leads out of the folder, as all do in the Hub's cache, would lead nowhere in the container: where there
    is one, each file is mounted by itself, as what it is a link to.

    Returns:
        Paths in the container and what of this machine lies there.

    Raises:
        ExportError: a link leads nowhere here.
    """
    folder = folder.absolute()
    root = folder.resolve()
    files = sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    if all(path.resolve().is_relative_to(root) for path in files):
        return {there: str(folder)}
    for path in files:
        if not path.exists():
            raise ExportError(f"{path} is a link to {path.readlink()}, which is not there")
    # folders have no entry of their own: those of the files make them
    return {f"{there}/{path.relative_to(folder).as_posix()}": str(path.resolve()) for path in files}


def project_name(name: str, target: str, path: Path) -> str:
    """What Docker Compose calls the services of one export, so that those of two runs stand side by side.

    Args:
        name: of the run.
        path: of the run, which tells runs of one name apart.
    """
    plain = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_") or "model"
    return f"{plain}-{target}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:6]}"


def write_launch(folder: Path, service: Service, limits: Limits, project: str) -> None:
    """Write both files; either way the server can be reached from this machine only.

    Args:
        project: see :func:`project_name`.
    """
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
    (folder / "compose.yaml").write_text(f"# docker compose up\n{told}{_compose(service, project)}", encoding="utf-8")


def _compose(service: Service, project: str) -> str:
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
            for there, here in service.mounts.items()
        ],
        "shm_size": "2gb",
        "deploy": {"resources": {"reservations": {"devices": [card]}}},
    }
    content = {"name": project, "services": {service.name: described}}
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
    return text


def _literal(word: str) -> str:
    """Compose replaces what begins with a dollar sign, unless it stands twice."""
    return word.replace("$", "$$")
