"""`ft verify` finds what is wrong, calls right what is right, and measures it against real float64."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ft_core.fast import layer
from ft_core.fast.verify import Float64, verify

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def loader(dtype):
    def load(exact):
        torch.manual_seed(0)
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=24)).to(dtype)

    return load


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("parameters", ["adapter", "all"])
def test_the_fast_layers_are_as_exact(dtype, parameters):
    ledger = verify(loader(dtype), name="tiny", dtype=dtype, parameters=parameters, batches=3, tokens=48)
    assert not ledger.mismatches
    assert ledger.family == "qwen3"
    assert ledger.layers == 2
    count = 2 * 7 * 2 if parameters == "adapter" else len(list(loader(dtype)(False).parameters()))
    assert len(ledger.lines) == count
    eps = torch.finfo(dtype).eps
    found = ledger.summary()
    assert 0 < found["median_plain"] < 20 * eps
    assert found["median_fast"] <= 1.1 * found["median_plain"]
    assert json.loads(json.dumps(ledger.as_json()))["mismatches"] == []


@pytest.mark.parametrize("fault", ["angle", "norm", "scale"])
def test_a_fault_is_called_one(monkeypatch, fault):
    rms_norm, attention = layer.kernels.rms_norm, layer.kernels.packed_attention
    if fault == "angle":
        block = layer.kernels.AttentionBlock
        call = block.__call__
        monkeypatch.setattr(block, "__call__", lambda self, x, *, sin, **words: call(self, x, sin=sin * 1.02, **words))
    elif fault == "norm":
        monkeypatch.setattr(layer.kernels, "rms_norm", lambda x, w, e, **words: rms_norm(x, w * 1.02, e, **words))
    else:
        monkeypatch.setattr(
            layer.kernels, "packed_attention", lambda *a, **words: attention(*a, **{**words, "scale": 0.25})
        )
    ledger = verify(loader(torch.float32), name="tiny", dtype=torch.float32, batches=1, tokens=48)
    assert ledger.mismatches
    assert ledger.mismatches[0].ratio > 2


def test_float64_is_float64():
    """transformers' own norms and angles within the mode, against the formulas."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).double()
    x = torch.randn(3, 64, dtype=torch.float64)
    norm = model.model.norm
    right = x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    with torch.no_grad():
        assert (norm(x) - right).abs().max() > 1e-9
        with Float64():
            assert (norm(x) - right).abs().max() < 1e-14
            cos, _ = model.model.rotary_emb(x, torch.arange(5)[None])
            angles = torch.arange(5, dtype=torch.float64)[:, None] * model.model.rotary_emb.inv_freq
            assert (cos[0, :, :8] - angles.cos()).abs().max() < 1e-15


def test_the_command(ft, tiny, tmp_path):
    out = tmp_path / "ledger.json"
    done = ft("verify", tiny, "--layers", "1", "--batches", "1", "--tokens", "24", "--dtype", "float32", "--json", out)
    assert done.code == 0, done.err
    assert "the same: no gradient is over" in done.out
    assert json.loads(out.read_text())["layers"] == 1
    done = ft("verify", tiny, "--quantization", "nf4", "--layers", "2", "--batches", "1", "--tokens", "24")
    assert done.code == 0, done.err
    done = ft("verify", tiny, "--quantization", "nf4", "--parameters", "all")
    assert (done.code, len(done.err.strip().splitlines())) == (2, 1)
    assert "quantized weights have no gradients" in done.err


def test_the_list_of_families(ft):
    rows = json.loads(ft("models", "--json").out)
    assert {"llama", "mistral", "qwen2", "qwen3"} <= {row["name"] for row in rows}
    assert all(row["fast"] for row in rows)
    assert "all on the fast path" in ft("models").out
