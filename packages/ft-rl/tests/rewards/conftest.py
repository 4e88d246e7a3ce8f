"""Whether this machine can isolate a process, by the system's own tool: a sandbox that is broken must not skip."""

from __future__ import annotations

import shutil
import subprocess

import pytest


@pytest.fixture(scope="session")
def isolation() -> None:
    """Skips where namespaces cannot be had."""
    tool = shutil.which("unshare")
    if tool is None:
        pytest.skip("no unshare here, by which to ask whether namespaces can be had")
    words = [tool, "--user", "--map-root-user", "--net", "--mount", "--pid", "--ipc", "--uts", "--fork", "true"]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip(f"this machine allows no namespaces: {result.stderr.strip()}")
