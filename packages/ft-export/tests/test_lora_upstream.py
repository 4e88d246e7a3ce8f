"""Adapters as GGUF files against those of llama.cpp's own converter: every tensor, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')

import gguf

from ft_export.gguf.adapter import read_lora, write_lora
from ft_export.runs import open_source

MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {}, {}),
    "llama, head": ("Llama", {}, {"target_modules": ["q_proj", "lm_head"]}),
    "llama, rslora": ("Llama", {}, {"use_rslora": True}),
    "mistral": ("Mistral", {"sliding_window": None}, {"r": 8}),
    "qwen2": ("Qwen2", {}, {}),
    "qwen3": ("Qwen3", {}, {}),
}


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
