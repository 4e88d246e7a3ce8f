"""Each package imports only what it declares, statement by statement; the design's table says what it may declare."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parent.parent / "packages"
# Which of ft's packages and of the heavy libraries a package may depend on; small ones are free, save in ft-kernels.
MAY = {
    "ft-kernels": {"torch", "triton"},
    "ft-core": {
        *("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "safetensors", "accelerate"),
        "huggingface-hub",  # which transformers brings anyway: a model's files are looked up before it is loaded
        "gguf",  # by the extra `quickstart`: a model in a package may be a GGUF file
        *("ft-kernels", "ft-rl", "ft-vision", "ft-speech", "ft-export"),  # all but the first by extras
    },
    "ft-rl": {"torch", "transformers", "peft", "trl", "datasets", "safetensors", "ft-core", "ft-kernels"},
    # huggingface-hub is what transformers brings anyway: images that were fetched lie in its cache
    "ft-vision": {"torch", "transformers", "pillow", "ft-core", "huggingface-hub"},
    "ft-speech": {
        *("torch", "transformers", "soundfile", "jiwer", "ft-core", "torchaudio"),
        "ft-kernels",  # Whisper's fast layers are of its own making
        "datasets",  # rows of recordings lie in Arrow, not in the memory of each worker
        *("safetensors", "huggingface-hub"),  # codecs' weights are read, and looked up
    },
    "ft-export": {
        "torch",
        "transformers",
        "peft",
        "safetensors",
        "huggingface-hub",
        "gguf",
        "xllamacpp",
        "bitsandbytes",
        "pillow",  # by the extra `vision`: models that see are proven on images
        "soundfile",  # by the extra `speech`: models that listen are proven on sounds
        "ctranslate2",  # by the extra of its name: it converts, and the proof runs it
    },
}
# What a package uses where its user has installed it and asks for it by name, and never depends on.
ON_REQUEST = {"ft-kernels": {"flash-attn"}}  # packed_attention(backend="flash_attn")
HEAVY = set().union(*MAY.values()) | {"torchvision", "vllm", "sglang", "scipy", "pandas"}
# The siblings that a package may import from; ft-core reaches the others by entry points alone.
SIBLINGS = {"ft-core": {"ft-kernels"}}
# The one module of ft-export that ft_core imports, and not the other way round.
PLUGIN_OF_EXPORT = PACKAGES / "ft-export/src/ft_export/plugin.py"


def names(requirements: list[str]) -> set[str]:
    return {re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", line)[0]).lower() for line in requirements}


def project(package: str) -> dict[str, object]:
    return tomllib.loads((PACKAGES / package / "pyproject.toml").read_text())["project"]


def declared(package: str) -> set[str]:
    table = project(package)
    lines = [
        *table["dependencies"],
        *(line for extra in table.get("optional-dependencies", {}).values() for line in extra),
    ]
    return names(lines) - {package}


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names


@pytest.mark.parametrize("package", MAY)
def test_what_is_declared_is_allowed(package: str) -> None:
    assert declared(package) & HEAVY <= MAY[package]
    if package == "ft-kernels":
        assert declared(package) == MAY[package]


@pytest.mark.parametrize("package", MAY)
def test_what_is_imported_is_declared(package: str) -> None:
    distributions = packages_distributions()
    allowed = declared(package) | {package} | ON_REQUEST.get(package, set())
    siblings = {name for name in allowed if name in MAY and name != package}
    allowed -= siblings - SIBLINGS.get(package, siblings)
    files = list((PACKAGES / package / "src").rglob("*.py"))
    assert files
    wrong = {}
    for file in files:
        extra = {"ft-core"} if file == PLUGIN_OF_EXPORT else set()
        for name in imported(file):
            owners = names(distributions.get(name, [name]))
            if not owners & (allowed | extra):
                wrong[f"{file.relative_to(PACKAGES)}: import {name}"] = sorted(owners)
    assert not wrong


def test_the_check_would_notice(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import os\nfrom . import here\ndef f():\n    from torchvision.io import x\n    import PIL.Image as y\n"
    )
    assert imported(file) == {"torchvision", "PIL"}


@pytest.mark.parametrize("package", MAY)
def test_siblings_are_asked_for_by_compatible_ranges(package: str) -> None:
    table = project(package)
    lines = [
        *table["dependencies"],
        *(line for extra in table.get("optional-dependencies", {}).values() for line in extra),
    ]
    for line in lines:
        (name,) = names([line])
        if name in MAY and name != package:
            assert re.fullmatch(rf"{name}(\[[\w,]+\])?>=0\.1,<0\.2", line), line
