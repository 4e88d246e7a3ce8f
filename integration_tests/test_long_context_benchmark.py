"""The benchmark of long rows: a model whose first layers alone are computed, and a model folder with more positions."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
long_context = pytest.importorskip("long_context")


@pytest.fixture
def model() -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, use_cache=False,
    )  # fmt: skip
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), adapter).train()


def test_the_layers_that_are_left_out_stay_and_have_gradients(model: Any) -> None:
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    layers = long_context.Layers(model)
    ids = torch.arange(24)[None]

    def loss() -> Any:
        return model(input_ids=ids, labels=ids).loss

    whole = loss().item()
    path = layers.compute(2)
    assert len(path.layers) == 2
    assert path.on
    layers.gradients()
    shortened = loss()
    assert shortened.item() != pytest.approx(whole)
    shortened.backward()
    assert all(p.grad is not None for p in trained)
    for p in trained:
        p.grad = None
    layers.compute(4)
    assert loss().item() == pytest.approx(whole)
    layers.gradients()
    assert all(p.grad is None for p in trained)


def test_the_same_files_with_more_positions(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(b"numbers")
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 8, "hidden_size": 4}))
    for _ in range(2):
        made = long_context.stretched(folder)
        values = json.loads((made / "config.json").read_text())
        assert values == {"max_position_embeddings": long_context.POSITIONS, "hidden_size": 4}
        assert (made / "weights.safetensors").read_bytes() == b"numbers"
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 8
