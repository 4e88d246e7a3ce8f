"""Our files against those of llama.cpp's own converter: every tensor bit for bit, and every key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')

import gguf

from ft_export.gguf import convert

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FULL, SLIDING = "full_attention", "sliding_attention"
GEMMA3_ROPE = {
    FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5],
    "long_factor": [1.5, 3.0, 7.0, 11.0, 20.0, 30.0],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
}
GEMMA: dict[str, Any] = {
    "pieces": "gemma",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 16,
    "sliding_window": 64,
    "num_hidden_layers": 7,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama 2": ("Llama", {"pieces": "llama2"}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1,
                          "hidden_size": 48}),
    "mistral": ("Mistral", {"pieces": "llama2", "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
    "qwen3 moe": ("Qwen3Moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                               "norm_topk_prob": True}),
    "deepseek": ("DeepseekV3", {
        "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 32,
        "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 8,
        "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                            "original_max_position_embeddings": 128},
    }),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3", {**GEMMA, "rope_parameters": GEMMA3_ROPE}),
    "phi3": ("Phi3", {"pieces": "phi3"}),
    "phi4": ("Phi3", {"tie_word_embeddings": True, "rope_parameters": LONGROPE,
                      "original_max_position_embeddings": 64}),
}  # fmt: skip


BYTE_LEVEL = ("llama", "llama 3", "smollm2", "qwen2", "qwen3", "qwen3 moe", "deepseek", "phi4")
GEMMAS = ("gemma2", "gemma3")
DIFFERENCES: dict[str, tuple[tuple[str, ...], str]] = {
    "general.size_label": (tuple(ARCHITECTURES), "the number of weights in words; nothing reads it"),
    "general.name": (("phi3",), "by it llama.cpp knows that special tokens take the spaces after them, whoever names"),
    "tokenizer.ggml.add_bos_token": (
        (*BYTE_LEVEL, "phi3"),
        "ours says what the tokenizer does; theirs leaves it to llama.cpp, which adds one for SentencePiece",
    ),
    "tokenizer.ggml.add_eos_token": (tuple(ARCHITECTURES), "ours says what the tokenizer does"),
    "tokenizer.ggml.add_sep_token": (
        ("llama 2", "mistral", *GEMMAS),
        "for pairs of texts, which a decoder is not given",
    ),
    "tokenizer.ggml.add_space_prefix": (
        ("llama 2", "mistral", "phi3"),
        "ours says what the tokenizer does; theirs leaves it to llama.cpp, which puts one before each piece of text",
    ),
    "tokenizer.ggml.eot_token_id": (
        ("phi3", *GEMMAS),
        "ours names every token that ends an answer; theirs leaves those that are not eos to llama.cpp's list of texts",
    ),
    "tokenizer.ggml.unknown_token_id": (("qwen2",), "transformers' tokenizer of that class has one, its files do not"),
    "deepseek2.expert_gating_func": (
        ("deepseek",),
        "transformers computes sigmoid and writes no scoring_func, without which theirs has llama.cpp compute softmax",
    ),
    "gemma2.rope.freq_base": (("gemma2",), "theirs leaves it to llama.cpp's 10000, whatever the model's is"),
}
"""Keys that are not equal: where, and why ours is as it is. No tensor is among them."""


def _both(kind: str, type: str, make_model: Any, save_pieces_model: Any, upstream: Path, work: Path) -> list[Any]:
    name, settings = ARCHITECTURES[kind]
    model = make_model(work / "model", name, **settings)
    if settings.get("pieces"):
        save_pieces_model(model, settings["pieces"])
    elif kind == "phi4":  # by which upstream knows that it is no SentencePiece tokenizer
        path = model / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "GPT2Tokenizer"}))
    made = convert(model, work / "ours.gguf", type=type, name="Model")
    script = Path(__file__).with_name("convert_by_llama_cpp.py")
    environment = {**os.environ, "PYTHONPATH": str(upstream / "site")}
    words = [script, upstream, model, work / "theirs.gguf", type, made.vocabulary.pre]
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [gguf.GGUFReader(work / f"{side}.gguf") for side in ("ours", "theirs")]


def _values(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_files_are_upstream_s(
    kind: str, make_model: Any, save_pieces_model: Any, upstream: Path, tmp_path: Path
) -> None:
    ours, theirs = _both(kind, "f16", make_model, save_pieces_model, upstream, tmp_path)
    mine, expected = ({tensor.name: tensor for tensor in reader.tensors} for reader in (ours, theirs))
    assert set(mine) == set(expected)
    for name, tensor in expected.items():
        assert mine[name].tensor_type == tensor.tensor_type, name
        assert mine[name].shape.tolist() == tensor.shape.tolist(), name
        assert mine[name].data.tobytes() == tensor.data.tobytes(), name
    said, stated = _values(ours), _values(theirs)
    different = {key for key in said.keys() | stated.keys() if said.get(key) != stated.get(key)}
    assert different == {key for key, (where, _) in DIFFERENCES.items() if kind in where}


@pytest.mark.slow
@pytest.mark.parametrize("type", ["f32", "bf16", "q8_0"])
def test_other_types_are_upstream_s(
    type: str, make_model: Any, save_pieces_model: Any, upstream: Path, tmp_path: Path
) -> None:
    ours, theirs = _both("gemma3", type, make_model, save_pieces_model, upstream, tmp_path)
    mine = {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in ours.tensors}
    assert mine == {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in theirs.tensors}
    assert _values(ours)["general.file_type"] == _values(theirs)["general.file_type"]
