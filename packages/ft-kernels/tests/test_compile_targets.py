"""Every kernel compiles for every card that it should run on, and fits: no GPU is needed for that."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
OPS = HERE.parent / "src/ft_kernels/ops"

# Shared memory that one program may use. All of these cards have 65536 registers for it and at most 255 for a thread.
SHARED = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
REGISTERS = 65536
# Bytes a thread that may go to memory and back for want of registers: a few values, not an array.
SPILLED = 256


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    if sys.platform != "linux":
        pytest.skip("triton's compiler is for Linux")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_targets.py")], check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("target", SHARED, ids="sm_{}".format)
def test_kernels_fit(lines, target):
    here = [line for line in lines if line["target"] == target]
    assert here
    if "skipped" in here[0]:
        pytest.skip(f"this triton does not compile for sm_{target}: {here[0]['skipped']}")
    wrong = []
    for line in here:
        if "error" in line or (
            line["shared"] > SHARED[target]
            or line["threads"] > 1024
            or line["registers"] * line["threads"] > REGISTERS
            or line["spilled"] > SPILLED
        ):
            wrong.append(line)
    assert not wrong, "\n".join(map(str, wrong))


def launched_kernels(file: Path) -> set[str]:
    """The functions marked ``@triton.jit`` that are named outside of such functions: those that are launched."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    jitted = {
        node.name: node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(mark) for mark in node.decorator_list)
    }
    inside = {id(inner) for node in jitted.values() for inner in ast.walk(node)}
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in inside}
    return {name for name in jitted if name in named}


def test_every_kernel_has_a_case(lines):
    compiled = {line["kernel"] for line in lines if "kernel" in line}
    expected = set()
    for file in OPS.rglob("*.py"):
        module = "ft_kernels.ops." + ".".join(file.relative_to(OPS).with_suffix("").parts)
        expected |= {f"{module}.{name}" for name in launched_kernels(file)}
    assert expected <= compiled, f"no case in compile_cases.py launches {sorted(expected - compiled)}"
