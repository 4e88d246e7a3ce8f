"""Gemma 2, Gemma 3, Phi-3 and Phi-4 in llama.cpp, with tokenizers of their kind; what is refused of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')

import gguf

from ft_export import ExportError, export_gguf
from ft_export.gguf import convert

GEMMA: dict[str, Any] = {"pieces": "gemma", "tie_word_embeddings": True, "query_pre_attn_scalar": 16}
LOCAL = {"rope_type": "default", "rope_theta": 500.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.5, 3.0, 7.0, 11.0],
    "original_max_position_embeddings": 256,
    "partial_rotary_factor": 0.5,
}
WINDOWS = {**GEMMA, "sliding_window": 8}
FULL, SLIDING = "full_attention", "sliding_attention"
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": (
        "Gemma2",
        {**WINDOWS, "num_hidden_layers": 4, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    ),
    "gemma2, other layers": ("Gemma2", {**WINDOWS, "num_hidden_layers": 3, "layer_types": [FULL, SLIDING, SLIDING]}),
    "gemma3": (
        "Gemma3",
        {
            **WINDOWS,
            "num_hidden_layers": 7,
            "rope_parameters": {FULL: {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, SLIDING: LOCAL},
        },
    ),
    "gemma3, other layers": (
        "Gemma3",
        {**WINDOWS, "num_hidden_layers": 3, "layer_types": [FULL, SLIDING, FULL], "final_logit_softcapping": 5.0},
    ),
    "gemma3, no window": ("Gemma3", {**WINDOWS, "layer_types": [FULL, FULL]}),
    "phi3": ("Phi3", {"pieces": "phi3"}),
    "phi4": (
        "Phi3",
        {"tie_word_embeddings": True, "rope_parameters": LONGROPE, "original_max_position_embeddings": 256},
    ),
    "llama2": ("Llama", {"pieces": "llama2"}),
    "mistral": ("Mistral", {"pieces": "llama2", "sliding_window": None}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_families_in_llama_cpp(family: str, type: str, make_model: Any, tmp_path: Path) -> None:
    kind, settings = FAMILIES[family]
    model = make_model(tmp_path / "a model", kind, **settings)
    made = export_gguf(model, tmp_path / "out", type=type)
    found = json.loads(made.proof.read_text())["files"][made.file.name]["continuations"]
    assert found["tokens"] >= 24
    assert found["error"]["largest"] <= found["bound_largest"]
    assert any("byte for byte" in line for line in made.lines)
