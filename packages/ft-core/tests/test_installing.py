"""What is advised to install, by where this ft-core came from: read from metadata as pip writes it."""

from __future__ import annotations

import json
import re
import shlex
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest

from ft_core.installing import SIBLINGS, how_to_install


@pytest.fixture
def came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`came(direct_url)`: makes ft-core a distribution that came from there; None is the index."""

    def come(noted: Any) -> None:
        info = tmp_path / "site" / "ft_core-0.1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ft-core\nVersion: 0.1.0\n", encoding="utf-8")
        if noted is not None:
            text = noted if isinstance(noted, str) else json.dumps(noted)
            (info / "direct_url.json").write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(str(info.parent))

    return come


def _clone(folder: Path, *packages: str) -> str:
    for package in packages:
        (folder / "packages" / package).mkdir(parents=True)
        (folder / "packages" / package / "pyproject.toml").touch()
    return (folder / "packages" / "ft-core").as_uri()


def test_an_extra_brings_what_is_said_to_be_its_package() -> None:
    listed = [re.sub(r"[<>=].*", "", line) for line in requires("ft-core") or () if "extra ==" in line]
    assert set(SIBLINGS.values()) <= set(listed)
    for extra, sibling in SIBLINGS.items():
        assert any(
            re.match(rf"{re.escape(sibling)}[<>].*extra == '{extra}'", line) for line in requires("ft-core") or ()
        )


@pytest.mark.parametrize("noted", [None, {}, "{", "[1]", {"url": "https://x/y.whl", "archive_info": {}}])
def test_from_an_index(came: Any, noted: Any) -> None:
    came(noted)
    assert how_to_install("rl") == 'pip install "ft-core[rl]"'


def test_in_a_clone(came: Any, tmp_path: Path) -> None:
    url = _clone(tmp_path / "a clone", "ft-core", "ft-rl", "ft-export")
    came({"url": url, "dir_info": {"editable": True}})
    packages = tmp_path / "a clone" / "packages"
    assert shlex.split(how_to_install("rl")) == ["pip", "install", "-e", f"{packages}/ft-rl"]
    assert shlex.split(how_to_install("export")) == ["pip", "install", "-e", f"{packages}/ft-export[gguf]"]
    assert how_to_install("vision") == 'pip install "ft-core[vision]"'  # ft-core's folder alone was copied, say


def test_copied_from_a_clone(came: Any, tmp_path: Path) -> None:
    came({"url": _clone(tmp_path / "clone", "ft-core", "ft-speech"), "dir_info": {}})
    assert how_to_install("speech") == f"pip install {tmp_path}/clone/packages/ft-speech"


def test_from_a_repository(came: Any) -> None:
    vcs = {"vcs": "git", "commit_id": "abc123"}
    came({"url": "https://example.org/ft.git", "vcs_info": vcs, "subdirectory": "packages/ft-core"})
    assert how_to_install("export") == (
        'pip install "ft-export[gguf] @ git+https://example.org/ft.git@abc123#subdirectory=packages/ft-export"'
    )


def test_from_a_wheel(came: Any, tmp_path: Path) -> None:
    for name in ("ft_core", "ft_vision"):
        (tmp_path / f"{name}-0.1.0-py3-none-any.whl").touch()
    came({"url": (tmp_path / "ft_core-0.1.0-py3-none-any.whl").as_uri(), "archive_info": {}})
    assert how_to_install("vision") == f"pip install --find-links {tmp_path} ft-vision"
    assert how_to_install("rl") == 'pip install "ft-core[rl]"'


def test_a_method_that_is_missing_in_a_clone(came: Any, tmp_path: Path) -> None:
    from ft_core.errors import PluginError
    from ft_core.plugins import Registry

    came({"url": _clone(tmp_path, "ft-core", "ft-rl", "ft-vision"), "dir_info": {"editable": True}})
    for group, name, package in (("ft.methods", "reward", "ft-rl"), ("ft.modalities", "vision", "ft-vision")):
        with pytest.raises(
            PluginError, match=f"{name}' is not installed: pip install -e {tmp_path}/packages/{package}$"
        ):
            Registry([]).load(group, name)
