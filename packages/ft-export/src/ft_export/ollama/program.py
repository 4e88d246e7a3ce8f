"""The ``ollama`` program, where there is one: making a model of a Modelfile and pushing it to a registry."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from ft_export.errors import ExportError

__all__ = ["check_name", "create", "push", "require_ollama", "run_name"]

NAME = re.compile(r"(?:[A-Za-z0-9_][\w.:-]*/){0,2}[A-Za-z0-9_][\w.-]*(?::[A-Za-z0-9_][\w.-]*)?", re.ASCII)


def run_name(name: str) -> str:
    """What a model of this name is called in Ollama: in small ASCII letters, digits and ``._-``."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "model"


def check_name(option: str, name: str) -> str:
    """
    Raises:
        ExportError: Ollama has no such names.
    """
    if not NAME.fullmatch(name):
        raise ExportError(f"{option}={name} is no name of Ollama's (such as me/dates or dates:q8_0)")
    return name


def require_ollama() -> str:
    """The program's path.

    Raises:
        ExportError: it is not on PATH.
    """
    found = shutil.which("ollama")
    if found is None:
        raise ExportError("there is no ollama on PATH: install Ollama, or leave create= and push= out")
    return found


def create(name: str, folder: Path) -> None:
    """``ollama create`` of a folder's Modelfile.

    Raises:
        ExportError: Ollama refuses; its last line, and what to do.
    """
    _run(["create", name, "-f", "Modelfile"], folder)


def push(name: str, folder: Path) -> None:
    """``ollama push`` of a model that was made.

    Raises:
        ExportError: as :func:`create`.
    """
    _run(["push", name], folder)


def _run(words: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            [require_ollama(), *words], cwd=folder, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise ExportError(f"ollama cannot be started: {error}") from error
    if done.returncode:
        said = [line for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()] or ["(nothing)"]
        raise ExportError(
            f"ollama {' '.join(words)} failed with {done.returncode}: {said[-1].strip()}; {folder} is whole, "
            f"go on there with: ollama {' '.join(words)}"
        )
