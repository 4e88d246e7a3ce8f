"""The compose file: Open WebUI and the engine that serves the model, with nothing open to other machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ft_export.errors import ExportError
from ft_export.serving.launch import mounts_of

__all__ = ["ENGINES", "IMAGES", "Wiring", "check_compose", "compose"]

ENGINES = ("llama-server", "ollama", "vllm")
IMAGES = {
    "open-webui": "ghcr.io/open-webui/open-webui:v0.12.4",
    "llama-server": "ghcr.io/ggml-org/llama.cpp:server-b11206",
    "ollama": "ollama/ollama:0.33.3",
    "vllm": "vllm/vllm-openai:v0.32.0",
}
PORTS = {"llama-server": 8080, "ollama": 11434, "vllm": 8000}
"""Where the engines listen, inside the compose network alone."""


@dataclass(frozen=True)
class Wiring:
    """What the services are made of.

    Attributes:
        engine: one of ``ENGINES``.
        name: what the engine calls the model.
        source: the file or folder that the engine mounts: ``./FILE`` beside the compose file, or a whole path.
        context: tokens that a prompt and its answer may have.
        port: Open WebUI's on this machine.
        projector: the file beside the compose file with the tower and projector of a model that sees.
        budget: the least and the most tokens that it may make of an image.
        project: what Docker Compose calls the services together; tells them from those of another run.
    """

    engine: str
    name: str
    source: str
    context: int
    port: int
    project: str
    projector: str | None = None
    budget: tuple[int, int] | None = None


def compose(wiring: Wiring) -> dict[str, Any]:
    """The file's content.

    Open WebUI asks for an account (``WEBUI_AUTH``), the first of which is the administrator's, and is reached from this
    machine alone. The model is mounted read-only.
    """
    web = {
        "image": IMAGES["open-webui"],
        "restart": "unless-stopped",
        "depends_on": [wiring.engine],
        "ports": [f"127.0.0.1:{wiring.port}:8080"],
        "volumes": ["open-webui:/app/backend/data"],
        "environment": {"WEBUI_AUTH": "true", **_connection(wiring.engine)},
    }
    services: dict[str, Any] = {"open-webui": web, wiring.engine: _engine(wiring)}
    volumes: dict[str, Any] = {"open-webui": {}}
    if wiring.engine == "ollama":
        services["create"] = _create(wiring)
        volumes["ollama"] = {}
    return {"name": wiring.project, "services": services, "volumes": volumes}


def _connection(engine: str) -> dict[str, str]:
    address = f"http://{engine}:{PORTS[engine]}"
    if engine == "ollama":
        return {"ENABLE_OPENAI_API": "false", "OLLAMA_BASE_URL": address}
    return {"ENABLE_OLLAMA_API": "false", "OPENAI_API_BASE_URLS": f"{address}/v1", "OPENAI_API_KEYS": "none"}


def _engine(wiring: Wiring) -> dict[str, Any]:
    service: dict[str, Any] = {"image": IMAGES[wiring.engine], "restart": "unless-stopped"}
    if wiring.engine == "ollama":
        return {**service, "volumes": ["ollama:/root/.ollama"]}
    port = str(PORTS[wiring.engine])
    if wiring.engine == "llama-server":
        place = f"/model/{Path(wiring.source).name}"
        words = ["-m", place, "--alias", wiring.name, "--ctx-size", str(wiring.context), "--jinja"]
        volumes = _mounts(wiring, place)
        if wiring.projector is not None:
            eyes = f"/model/{Path(wiring.projector).name}"
            words += ["--mmproj", eyes]
            volumes += _mounts(replace(wiring, source=wiring.projector), eyes)
        if wiring.budget is not None:
            least, most = wiring.budget
            words += ["--image-min-tokens", str(least), "--image-max-tokens", str(most)]
        return {**service, "command": [*words, "--host", "0.0.0.0", "--port", port], "volumes": volumes}
    words = ["/model", "--served-model-name", wiring.name, "--max-model-len", str(wiring.context)]
    gpu = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    return {
        **service,
        "entrypoint": ["vllm", "serve"],  # what the image begins with has changed over its versions
        "command": [*words, "--port", port],
        "volumes": _mounts(wiring, "/model"),
        "ipc": "host",
        "deploy": {"resources": {"reservations": {"devices": [gpu]}}},
    }


def _create(wiring: Wiring) -> dict[str, Any]:
    """Makes the model in Ollama once it listens, and ends."""
    return {
        "image": IMAGES["ollama"],
        "restart": "on-failure",
        "depends_on": ["ollama"],
        "environment": {"OLLAMA_HOST": f"http://ollama:{PORTS['ollama']}"},
        "volumes": _mounts(wiring, "/model"),
        "command": ["create", wiring.name, "-f", "/model/Modelfile"],
    }


def _mounts(wiring: Wiring, target: str) -> list[dict[str, Any]]:
    whole = Path(wiring.source).is_absolute()  # else it lies beside the compose file, and has no links
    mounts = mounts_of(Path(wiring.source), target) if whole else {target: wiring.source}
    # a $ begins a variable in a compose file
    return [
        {"type": "bind", "source": here.replace("$", "$$"), "target": there, "read_only": True}
        for there, here in mounts.items()
    ]


def check_compose(content: Mapping[str, Any], folder: Path) -> None:
    """See that what the file names is there: services, volumes, and what is mounted.

    Raises:
        ExportError: something is not; names it.
    """
    services, volumes = content["services"], content["volumes"]
    for name, service in services.items():
        for other in service.get("depends_on", []):
            if other not in services:
                raise ExportError(f"compose.yaml: {name} depends on {other}, which is no service")
        for value in service.get("environment", {}).values():
            host = value.partition("://")[2].partition(":")[0]
            if host and host not in services:
                raise ExportError(f"compose.yaml: {name} asks {host}, which is no service")
        for volume in service.get("volumes", []):
            if isinstance(volume, str):
                there = volume.partition(":")[0] in volumes
            else:
                there = (folder / volume["source"].replace("$$", "$")).exists()
            if not there:
                raise ExportError(f"compose.yaml: {name} mounts {volume}, which is not there")
