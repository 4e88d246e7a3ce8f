"""Model folders that hold nothing but a `config.json`, and plans of configurations on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
"""The shape of Llama 3.1 8B."""


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """`folder(**changes)`: a folder with the config.json of Llama 3.1 8B, with these keys changed."""

    def make(**changes: Any) -> Path:
        path = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps({**LLAMA, **changes}), encoding="utf-8")
        return path

    return make


@pytest.fixture
def planned(folder: Callable[..., Path]) -> Callable[..., Any]:
    """`planned(gpu, rows, length, shape={}, training={}, **keys)`: the plan of a configuration, unpacked rows."""
    from ft_core.config.load import check_config
    from ft_core.models.source import ModelSource
    from ft_core.planning import find_card, plan, with_memory

    def make(
        gpu: str, rows: int = 2, length: int = 2048, *, shape: dict[str, Any] | None = None, gib: float | None = None,
        training: dict[str, Any] | None = None, host: int | None = None, disk: int = 0, **keys: Any,
    ) -> Any:  # fmt: skip
        path = folder(**(shape or {}))
        values = {
            "model": str(path), "data": str(path / "none.jsonl"), "max_length": length, "packing": False,
            "training": {"batch_size": rows, "gradient_accumulation": 1, **(training or {})}, **keys,
        }  # fmt: skip
        card = find_card(gpu)
        card = card if gib is None else with_memory(card, int(gib * 2**30))
        return plan(check_config(values), ModelSource(str(path), path, path.name), card, host=host, disk=disk)

    return make
