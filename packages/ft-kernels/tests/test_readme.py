"""The README's examples run as they stand, each in a process of its own; its numbers are those that were measured."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
REPOSITORY = Path(__file__).parents[3]
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def run(example: str, folder: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", example], check=False, capture_output=True, text=True, env=env, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(tmp_path, example):
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", run(example, tmp_path))]
    assert losses == sorted(losses, reverse=True)
    if example == EXAMPLES[0]:
        assert losses[-1] < losses[0] / 4


def test_numbers_are_the_measured_ones():
    program, results = (REPOSITORY / "benchmarks" / name for name in ("kernels_readme.py", "results/kernels.jsonl"))
    if not program.exists():
        pytest.skip("the results are in the repository, not in the package")
    spec = importlib.util.spec_from_file_location("kernels_readme", program)
    kernels_readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels_readme)
    inside = TEXT.partition(kernels_readme.BEGIN)[2].partition(kernels_readme.END)[0].strip()
    assert kernels_readme.END in TEXT
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    assert inside == (kernels_readme.text(kernels_readme.newest(lines)) if lines else "")
