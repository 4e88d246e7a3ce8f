"""How to get a sibling package that is missing: from where this ft-core came from, since a clone's are on no index."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

__all__ = ["SIBLINGS", "how_to_install", "what_knows"]

SIBLINGS = {"rl": "ft-rl", "vision": "ft-vision", "speech": "ft-speech", "export": "ft-export[gguf]"}
"""What each extra of ft-core brings."""


def how_to_install(extra: str) -> str:
    """A command that installs what an extra of ft-core brings, beside this ft-core and from the same place.

    pip notes where a package came from if that was no index (PEP 610): a folder, perhaps editable, a repository, or a
    wheel. Of the index, and where the sibling is not found, the extra itself is named.

    Args:
        extra: one of :data:`SIBLINGS`.
    """
    return "pip install " + (_beside(SIBLINGS[extra], _origin()) or f'"ft-core[{extra}]"')


def what_knows(model_type: str) -> str | None:
    """In words, what to install for a family of models that is known and not there; else None."""
    from ft_core.plugins import EXTRAS, registry

    group = "ft.architectures"
    extra = None if model_type in registry().names(group) else EXTRAS[group].get(model_type)
    return None if extra is None else f"what `{how_to_install(extra)}` brings"


def _origin() -> dict[str, Any]:
    try:
        noted = json.loads(distribution("ft-core").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError, OSError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _beside(sibling: str, origin: dict[str, Any]) -> str | None:
    """The sibling in pip's words, as it lies beside ft-core; None where it doesn't, as far as can be told."""
    url, name = str(origin.get("url", "")), sibling.partition("[")[0]
    if isinstance(origin.get("vcs_info"), dict):
        said, where = origin["vcs_info"], str(origin.get("subdirectory") or "")
        inside = PurePosixPath(where).parent / name
        commit = f"@{said['commit_id']}" if said.get("commit_id") else ""
        return f'"{sibling} @ {said.get("vcs", "git")}+{url}{commit}#subdirectory={inside}"' if where else None
    if not url.startswith("file:"):
        return None
    path = Path(url2pathname(urlsplit(url).path))
    if "dir_info" in origin:
        folder = path.parent / name
        if not (folder / "pyproject.toml").is_file():
            return None
        editable = "-e " if (origin["dir_info"] or {}).get("editable") else ""
        return editable + shlex.quote(f"{folder}{sibling.removeprefix(name)}")
    if any(path.parent.glob(f"{name.replace('-', '_')}-*.whl")):
        return f"--find-links {shlex.quote(str(path.parent))} {shlex.quote(sibling)}"
    return None
