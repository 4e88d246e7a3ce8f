"""``ft doctor``: what this machine can do, what is there, what is missing and how to get it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ft_core.installing import how_to_install

__all__ = ["add_arguments", "run"]

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "safetensors", "triton")
PACKAGES = {"ft-kernels": "", "ft-rl": "rl", "ft-vision": "vision", "ft-speech": "speech", "ft-export": "export"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _advice(device: Any, libraries: dict[str, str | None]) -> list[str]:
    found = []
    if device.type == "cpu":
        found.append(
            "no GPU was found: training works, slowly; on a machine with one, check the driver with nvidia-smi"
        )
        if device.dtype == "float32":
            found.append("this CPU multiplies bfloat16 no faster than float32: models take 4 bytes a weight")
    if libraries["bitsandbytes"] is None:
        found.append("bitsandbytes is missing: pip install bitsandbytes (quantization nf4 and int8, 8-bit optimizers)")
    if device.type == "cuda" and libraries["triton"] is None:
        found.append("triton is missing: pip install triton (fast kernels)")
    for name, extra in PACKAGES.items():
        if extra and _version(name) is None:
            found.append(f"{name} is not installed: {how_to_install(extra)}")
    if _version("ft-export") and not (importlib.util.find_spec("gguf") and importlib.util.find_spec("xllamacpp")):
        found.append("GGUF export is not ready: pip install gguf xllamacpp")
    return found


def _images() -> str | None:
    """What makes pixels of images; None where nothing here reads any."""
    if _version("ft-vision") is None:
        return None
    torchvision = _version("torchvision")
    without = "no torchvision, which nothing here needs" if torchvision is None else f"torchvision {torchvision}"
    return f"Pillow {_version('pillow')}, {without}"


def run(args: argparse.Namespace) -> int:
    from ft_core.models.device import pick_device
    from ft_core.plugins import registry

    device = pick_device()
    libraries = {name: _version(name) for name in LIBRARIES}
    disk = shutil.disk_usage(Path.cwd())
    problems = [f"{p.entry.name} ({p.entry.group}) of {p.entry.source}: {p.reason}" for p in registry().check()]
    packages = {name: _version(name) for name in ("ft-core", *PACKAGES)}
    methods = registry().names("ft.methods")
    tasks = registry().names("ft.modalities")
    exporters = registry().names("ft.exporters")
    advice = _advice(device, libraries)
    if args.json:
        report = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": vars(device),
            "libraries": libraries,
            "packages": packages,
            "methods": methods,
            "tasks": tasks,
            "images": _images(),
            "exporters": exporters,
            "disk_free": disk.free,
            "missing": advice,
            "broken_plugins": problems,
        }
        print(json.dumps(report, indent=1))
        return 0
    rows = [
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", platform.platform()),
        ("device", str(device)),
        ("disk", f"{disk.free / 2**30:.0f} GiB free here"),
        ("libraries", ", ".join(f"{n} {v}" for n, v in libraries.items() if v)),
        ("packages", ", ".join(f"{n} {v}" for n, v in packages.items() if v)),
        ("methods", ", ".join(methods)),
        ("tasks", ", ".join(tasks)),
        *([("images", images)] if (images := _images()) else []),
        ("exporters", ", ".join(exporters) or "none"),
    ]
    for name, value in rows:
        print(f"{name:<10} {value}")
    for line in advice:
        print(f"missing    {line}")
    for line in problems:
        print(f"broken     {line}")
    if not advice and not problems:
        print("nothing is missing")
    return 0
