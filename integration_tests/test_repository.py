"""What is written down in more than one place says the same in each."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.name for path in (ROOT / "packages").iterdir() if path.is_dir())
COMMANDS = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.M)


def test_the_readme_has_two_commands_and_the_second_is_what_ci_runs() -> None:
    start = "python3 -m venv .venv && .venv/bin/python -m pip install -q nox=="
    assert all(command.startswith(start) for command in COMMANDS)
    first, second = COMMANDS
    assert first == f"{second} -s quickstart"
    assert first in (ROOT / "docs/tutorial.md").read_text()


def test_the_pinned_nox_is_the_one_that_the_noxfile_needs() -> None:
    (needed,) = re.findall(r'^nox\.needs_version = ">=(.*)"$', (ROOT / "noxfile.py").read_text(), re.M)
    for command in COMMANDS:
        assert f"nox=={needed} " in command


def test_pre_commit_has_the_ruff_of_the_lint_session() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["dev"]
    (ruff,) = (tool for tool in tools if tool.startswith("ruff=="))
    hooks = [
        h for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for h in repo["hooks"]
    ]
    assert [h["additional_dependencies"] for h in hooks if h["id"].startswith("ruff")] == [[ruff], [ruff]]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_complete(package: str) -> None:
    folder = ROOT / "packages" / package
    module = package.replace("-", "_")
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", f"src/{module}/py.typed", "tests"):
        assert (folder / name).exists(), name
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    (version,) = re.findall(r'^__version__ = "(.*)"$', (folder / f"src/{module}/__init__.py").read_text(), re.M)
    assert re.search(rf"^## {re.escape(version)}\b", (folder / "CHANGELOG.md").read_text(), re.M)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_is_over_400_lines(package: str) -> None:
    long = {
        str(file.relative_to(ROOT)): lines
        for file in (ROOT / "packages" / package / "src").rglob("*.py")
        if (lines := file.read_text().count("\n")) > 400
    }
    assert not long
