"""The exporter ``open-webui``: a model to import, a compose file, and the model for the engine beside them."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_export.bases import load_tokenizer, read_config
from ft_export.conversations import Serving, serving, whole_number
from ft_export.errors import ExportError, one_line
from ft_export.exporting import PROOF, Exported, check_options, check_target, save_proof, whole_model
from ft_export.folders import new_folder
from ft_export.gguf.converter import check_convertible, check_type, require_gguf
from ft_export.gguf.engine import llama_cpp, require_llama_cpp
from ft_export.gguf.export import export as export_gguf
from ft_export.gguf.export import new_folder_with_gguf, projector_beside
from ft_export.gguf.pictures import budget_of
from ft_export.gguf.towers import tower_of
from ft_export.merging.merger import MARKER
from ft_export.ollama.export import fill
from ft_export.ollama.program import run_name
from ft_export.open_webui.compose import ENGINES, IMAGES, Wiring, check_compose, compose
from ft_export.open_webui.model_json import model_json, unescaped
from ft_export.progress import Progress, silent
from ft_export.runs import Source, open_source, read_json
from ft_export.seeing import sees
from ft_export.serving.launch import project_name
from ft_export.serving.listening import refuse_speech

__all__ = ["COMPOSE", "MODEL", "OPTIONS", "export"]

OPTIONS = {
    "engine": "llama-server (the default), ollama or vllm",
    "system": "a system prompt in place of the data's; empty for none",
    "num_ctx": "tokens of context",
    "suggestions": "no keeps questions of the held-out rows out of the model's page",
    "port": "of Open WebUI on this machine, 3000 by default",
    "pre": "as for gguf",
    "template": "as for ollama",
}
"""The ``key=value`` options, and what each is."""
MODEL, COMPOSE = "model.json", "compose.yaml"
ASKED = 64
"""Tokens of context with which the engine is asked whether it serves the model under its name, beyond the question."""


@dataclass(frozen=True)
class _Served:
    """What an engine has to serve.

    Attributes:
        source: what it mounts.
        settings: what it is told.
        lines: what was checked and found.
        sees: whether it takes images.
        projector: the file of its tower and projector, for ``llama-server``; None where it has none.
        budget: the least and the most tokens that may be made of an image, where that is said.
    """

    source: str
    settings: Serving
    lines: tuple[str, ...]
    sees: bool = False
    projector: str | None = None
    budget: tuple[int, int] | None = None


@one_line
def export(
    path: Path | str,
    out: Path | str | None = None,
    *,
    type: str = "f16",
    overwrite: bool = False,
    options: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> Exported:
    """Write ``OUT/model.json``, ``OUT/compose.yaml``, ``OUT/proof.json`` and, but for vLLM, the GGUF file.

    Args:
        path: a run folder, a PEFT adapter folder or a transformers model folder.
        out: the folder to write to; ``path/export/open-webui`` by default. Only an earlier export of this kind is
            replaced.
        type: of the GGUF file; vLLM serves the model's folder in 16 bits, and takes no other.
        overwrite: whether an earlier export may be replaced.
        options: ``engine``: ``llama-server`` (the default), ``ollama`` or ``vllm``. ``system``: a system prompt in
            place of the one that all held-out rows have; empty for none. ``num_ctx``: tokens of context.
            ``suggestions``: ``no`` keeps questions of the held-out rows out of ``model.json``. ``port``: Open WebUI's
            on this machine, 3000. ``pre``: as for ``gguf``; ``template``: as for ``ollama``.
        progress: of a merge; see :func:`ft_export.merge`.

    Raises:
        ExportError: bad input, a missing library, no space, or a check that failed; nothing is left then.
    """
    source = open_source(Path(path))
    folder = Path(out).expanduser() if out is not None else source.path / "export" / "open-webui"
    said = check_options(options, OPTIONS, "open-webui")
    engine, port, suggest = _settings(said, type)
    check_target(folder, source, MODEL, overwrite)
    name = run_name(source.name)
    called = f"{name}:latest" if engine == "ollama" else name
    with new_folder(folder) if engine == "vllm" else new_folder_with_gguf(folder, source, type) as partial:
        served = _serve(partial, source, engine, type, said, progress)
        system = said.get("system", served.settings.system) or None
        content = model_json(
            called, source.name, _description(source), served.settings, engine, system=system, suggest=suggest,
            sees=served.sees,
        )  # fmt: skip
        lines = [*served.lines]
        if engine == "llama-server":
            lines.append(_check_served(partial, served, name, system))
        _check_model(content, served.settings)
        project = project_name(source.name, "open-webui", source.path)
        wiring = Wiring(
            engine, name, served.source, served.settings.context, port, project, served.projector, served.budget
        )
        _write(partial, content, wiring)
        lines += _told(content["models"][0], engine, port)
        _write_proof(partial, content, engine, served.settings, lines)
    return Exported(
        folder, folder / PROOF, tuple(lines), f"docker compose -f {shlex.quote(str(folder / COMPOSE))} up -d"
    )


def _settings(said: dict[str, str], type: str) -> tuple[str, int, bool]:
    engine, suggest = said.get("engine", ENGINES[0]), said.get("suggestions", "yes")
    if engine not in ENGINES:
        raise ExportError(f"engine={engine} is not known (allowed: {', '.join(ENGINES)})")
    if suggest not in ("yes", "no"):
        raise ExportError(f"suggestions={suggest} is not known (allowed: yes, no)")
    if "template" in said and engine != "ollama":
        raise ExportError(f"template= is Ollama's, {engine} has the chat template itself: leave it out")
    if engine == "vllm" and type != "f16":
        raise ExportError(f"--type {type} is for a GGUF file, and vLLM serves the model's folder: leave it out")
    port = whole_number(said, "port") or 3000
    if port > 65535:
        raise ExportError(f"port={port} is no port (allowed: 1 to 65535)")
    return engine, port, suggest == "yes"


def _serve(folder: Path, source: Source, engine: str, type: str, said: dict[str, str], progress: Progress) -> _Served:
    """Make what the engine serves, in the folder or, for vLLM, where the whole model is."""
    if engine == "ollama":
        known = {key: value for key, value in said.items() if key in ("system", "num_ctx", "pre", "template")}
        filled = fill(folder, source, type, known, progress)
        return _Served(".", filled.settings, filled.lines, filled.sees)
    context, lines = whole_number(said, "num_ctx"), list[str]()

    def speechless(base: Path, _: Path) -> None:
        refuse_speech(base, "open-webui", source.task)

    if engine == "vllm":
        model = whole_model(source, lines, progress, speechless)
        refuse_speech(model, "open-webui", source.task)
        lines.append(f"vLLM is given the model's folder {model} as it is")
        settings = serving(source, model, load_tokenizer(model), context)
        return _Served(str(model.absolute()), settings, tuple(lines), sees(read_config(model)))
    check_type(type)
    require_gguf()
    require_llama_cpp()
    pre = said.get("pre")

    def check(base: Path, words: Path) -> None:
        speechless(base, words)
        check_convertible(base, words, pre, source.rope)

    model = whole_model(source, lines, progress, check)
    refuse_speech(model, "open-webui", source.task)
    settings = serving(source, model, load_tokenizer(model), context)
    made = export_gguf(source.path, folder, type=type, options={"pre": pre} if pre else {}, progress=progress)
    lines += [line for line in made.lines if not line.startswith("used the merge")]
    eyes, config = projector_beside(made.file), read_config(model)
    tower = tower_of(config)
    return _Served(
        f"./{made.file.name}", settings, tuple(lines), eyes is not None, None if eyes is None else f"./{eyes.name}",
        None if tower is None else budget_of(model, config, tower),
    )  # fmt: skip


def _check_served(folder: Path, served: _Served, name: str, system: str | None) -> str:
    """Ask llama-server over the OpenAI interface, by the name that ``model.json`` refers to.

    Raises:
        ExportError: it does not serve the model under that name, or does not answer.
    """
    settings = served.settings
    eyes: dict[str, Any] = (
        {} if served.projector is None else {"projector": folder / served.projector, "budget": served.budget}
    )
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": next(iter(settings.questions), "Hi")})
    room = sum(len(message["content"].encode()) for message in messages) + 2 * ASKED
    with llama_cpp(folder / served.source, min(room, settings.context), name, **eyes) as engine:
        names = engine.models()
        _, answered = engine.chat(name, messages, 8)
    if names != [name] or answered != name:
        raise ExportError(f"llama-server calls the model {', '.join([*names, answered])}, model.json calls it {name}")
    return f"llama-server serves the model as {name}, and answers a chat under that name"


def _check_model(content: dict[str, Any], settings: Serving) -> None:
    """
    Raises:
        ExportError: Open WebUI would not take the model, or read other stop texts than the model has.
    """
    model = content["models"][0]
    if model["id"] == model["base_model_id"] or not model["id"] or any(sign.isspace() for sign in model["id"]):
        raise ExportError(f"Open WebUI takes no model called {model['id']!r}")
    if unescaped(model["params"]) != list(settings.stops):
        raise ExportError(f"Open WebUI would read other stop texts than {', '.join(settings.stops)}")


def _description(source: Source) -> str:
    base: Any = read_json(source.path / "environment.json").get("base_model") if source.is_run else None
    of = base.get("name") if isinstance(base, dict) else None
    return f"{source.name}, fine-tuned from {of}" if of else source.name


def _write(folder: Path, content: dict[str, Any], wiring: Wiring) -> None:
    import yaml

    (folder / MODEL).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    services = compose(wiring)
    text = yaml.safe_dump(services, sort_keys=False, allow_unicode=True, width=120)
    if yaml.safe_load(text) != services:
        raise ExportError("compose.yaml is not read back as it was written")
    check_compose(services, folder)
    (folder / COMPOSE).write_text(text, encoding="utf-8")


def _told(model: dict[str, Any], engine: str, port: int) -> list[str]:
    offered = len(model["meta"]["suggestion_prompts"] or [])
    lines = [
        f"compose.yaml: Open WebUI at http://127.0.0.1:{port}, asking for an account, and {engine} "
        f"({IMAGES['open-webui']}, {IMAGES[engine]})",
        f"model.json: {model['id']} over {model['base_model_id']}, to import at Workspace, Models; "
        f"{offered} questions of the held-out rows are suggested",
    ]
    if "{{" in model["params"].get("system", ""):
        lines.append(
            "the system prompt has {{: Open WebUI puts values in the place of its own variables, such as {{USER_NAME}}"
        )
    return lines


def _write_proof(folder: Path, content: dict[str, Any], engine: str, settings: Serving, lines: list[str]) -> None:
    """Add ``open_webui`` to the proof of the GGUF file; for vLLM, what the merge found is taken in."""
    path = folder / PROOF
    proof: dict[str, Any] = read_json(path) if path.is_file() else {"proof_format": 1}
    if engine == "vllm":
        import yaml

        mounted = yaml.safe_load((folder / COMPOSE).read_text(encoding="utf-8"))["services"]["vllm"]["volumes"][0]
        merge = Path(mounted["source"].replace("$$", "$")) / MARKER
        proof["merge"] = read_json(merge) if merge.is_file() else None
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (MODEL, COMPOSE)}
    proof["open_webui"] = {
        "engine": engine,
        "images": {name: IMAGES[name] for name in ("open-webui", engine)},
        "sha256": digests,
        "model": content["models"][0]["id"],
        "base_model": content["models"][0]["base_model_id"],
        "context": settings.context,
        "stop_tokens": settings.stops,
        "asked_over_http": engine == "llama-server",
        "checks": lines,
    }
    save_proof(folder, proof)
