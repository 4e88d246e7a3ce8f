"""Adapters as GGUF files against those of llama.cpp's own converter: every tensor, bit for bit."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')

import gguf

from ft_export.gguf.adapter import read_lora, write_lora
from ft_export.runs import open_source

SOURCE = (
    "https://files.pythonhosted.org/packages/ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/"
    "llama_cpp_python-0.3.36.tar.gz"
)
DIGEST = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
CONVERTERS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py")
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {}, {}),
    "llama, head": ("Llama", {}, {"target_modules": ["q_proj", "lm_head"]}),
    "llama, rslora": ("Llama", {}, {"use_rslora": True}),
    "mistral": ("Mistral", {"sliding_window": None}, {"r": 8}),
    "qwen2": ("Qwen2", {}, {}),
    "qwen3": ("Qwen3", {}, {}),
}


@pytest.fixture(scope="session")
def upstream(request: pytest.FixtureRequest) -> Path:
    """A folder with llama.cpp's converters (MIT) and what they import; fetched once, kept in pytest's cache."""
    assert request.config.cache is not None
    folder = Path(request.config.cache.mkdir("llama.cpp-lora-converter"))
    if (folder / "done").is_file():
        return folder
    shutil.rmtree(folder)
    folder.mkdir(parents=True)
    archive = folder / "source.tar.gz"
    try:
        with urllib.request.urlopen(SOURCE, timeout=60) as answer, archive.open("wb") as file:
            shutil.copyfileobj(answer, file)
    except (urllib.error.URLError, OSError) as error:
        pytest.skip(f"needs {SOURCE}: {error}")
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == DIGEST
    with tarfile.open(archive) as members:
        for member in members:
            name = member.name.partition("/vendor/llama.cpp/")[2]
            if member.isfile() and (name.startswith(("conversion/", "gguf-py/")) or name in CONVERTERS):
                source = members.extractfile(member)
                assert source is not None
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(source.read())
    archive.unlink()
    words = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "site"), "sentencepiece==0.2.3"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs sentencepiece: {done.stderr[-300:]}")
    (folder / "done").touch()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("type", ["f16", "f32"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_tensors_of_llama_cpp_s_converter(
    kind: str, type: str, upstream: Path, make_model: Any, make_adapter: Any, tmp_path: Path
) -> None:
    name, settings, lora = MODELS[kind]
    base = make_model(tmp_path / "base", name, **settings)
    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    mine = read_lora(open_source(adapter))
    write_lora(mine, tmp_path / "mine.gguf", type, "adapter")
    words = [upstream / "convert_lora_to_gguf.py", adapter, "--base", base]
    words += ["--outfile", tmp_path / "theirs.gguf", "--outtype", type]
    environment = {**os.environ, "PYTHONPATH": f"{upstream / 'gguf-py'}{os.pathsep}{upstream / 'site'}"}
    subprocess.run([sys.executable, *words], env=environment, check=True, capture_output=True)
    ours, theirs = (gguf.GGUFReader(tmp_path / f"{whose}.gguf") for whose in ("mine", "theirs"))
    found = {tensor.name: tensor for tensor in ours.tensors}
    wanted = {tensor.name: tensor for tensor in theirs.tensors}
    assert set(found) == set(wanted)
    for tensor in wanted:
        assert found[tensor].tensor_type == wanted[tensor].tensor_type
        assert (found[tensor].data == wanted[tensor].data).all(), tensor
    keys = ["general.type", "general.architecture", "adapter.type"]
    # of rsLoRA theirs says the plain alpha, which llama.cpp divides by r and not by its root
    keys += [] if kind == "llama, rslora" else ["adapter.lora.alpha"]
    for key in keys:
        assert ours.fields[key].contents() == theirs.fields[key].contents()
