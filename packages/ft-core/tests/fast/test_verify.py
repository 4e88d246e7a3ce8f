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


def test_the_ratio_and_what_it_is_worth():
    """By hand: medians of means over the batches, and a jackknife."""
    from ft_core.fast.verify import Ledger, Line

    errors = {"a": ((1.0, 2.0), (3.0, 2.0)), "b": ((2.0, 2.0), (2.0, 3.0)), "c": ((9.0, 1.0), (9.0, 1.0))}
    lines = tuple(
        Line(name, sum(f for f, _ in each) / 2, sum(p for _, p in each) / 2, each) for name, each in errors.items()
    )
    ledger = Ledger("m", "llama", "float32", "none", "all", 1, 2, 12, (0.0, 0.0), lines, 1e-8)
    assert ledger.ratio == 2 / 2  # of 2, 2, 9 and 2, 2.5, 1
    without_first, without_second = 3 / 2, 2 / 2
    assert ledger.deviation == pytest.approx(abs(without_first - without_second) / 2)
    assert ledger.summary()["ratio"] == 1.0


def test_float16_is_measured_with_a_scaled_loss():
    """As it is trained: without, what is smaller than 6e-8 in backward is lost."""
    from ft_core.fast import verify as module

    def load(exact):
        model = loader(torch.float16)(exact)
        with torch.no_grad():
            model.lm_head.weight.mul_(1e-3)  # all gradients but its own get that small
        return model

    def median_plain():
        ledger = verify(load, name="tiny", dtype=torch.float16, batches=1, tokens=48)
        return ledger.summary()["median_plain"]

    scaled, kept = median_plain(), module.SCALE
    module.SCALE = 1.0
    try:
        assert scaled < 0.5 * median_plain()
    finally:
        module.SCALE = kept
    assert scaled < 20 * torch.finfo(torch.float16).eps


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
    assert json.loads(out.read_text())["summary"]["deviation"] is None  # of one batch
    assert json.loads(out.read_text())["layers"] == 1
    done = ft("verify", tiny, "--quantization", "nf4", "--layers", "2", "--batches", "1", "--tokens", "24")
    assert done.code == 0, done.err
    done = ft("verify", tiny, "--quantization", "nf4", "--parameters", "all")
    assert (done.code, len(done.err.strip().splitlines())) == (2, 1)
    assert "quantized weights have no gradients" in done.err


def test_a_run_is_its_model(ft, configure, tmp_path, sums, write_rows):
    """Its base, quantized as it was trained; or what it trained in full."""
    rows = write_rows(tmp_path / "rows.jsonl", sums(4))
    words = ("--layers", "1", "--batches", "1", "--tokens", "24", "--dtype", "float32")
    made = ft("train", configure(data=str(rows), quantization="nf4", training={"max_steps": 1}))
    assert made.code == 0, made.err
    done = ft("verify", tmp_path / "run", *words)
    assert done.code == 0, done.err
    assert ", nf4: " in done.out
    done = ft("verify", tmp_path / "run", *words, "--quantization", "none")
    assert ", nf4: " not in done.out
    done = ft("verify", tmp_path / "run", *words, "--parameters", "all")
    assert (done.code, len(done.message.splitlines())) == (2, 1)
    assert "give --quantization none" in done.message
    made = ft("train", configure(data=str(rows), lora=None, training={"max_steps": 1}), "--overwrite")
    assert made.code == 0, made.err
    done = ft("verify", tmp_path / "run", *words)
    assert done.code == 0, done.err
    assert done.out.startswith("model (llama), 1 layer, float32: ")


def test_the_list_of_families(ft):
    rows = json.loads(ft("models", "--json").out)
    assert {"llama", "mistral", "qwen2", "qwen3"} <= {row["name"] for row in rows}
    assert all(row["fast"] for row in rows if row["name"] not in ("csm", "whisper"))
    assert "all on the fast path" in ft("models").out
    whole = ("csm", "llama", "mistral", "qwen2", "qwen3", "whisper")
    for row in rows:
        assert (row["side"] == "language") == (row["name"] not in whole)
