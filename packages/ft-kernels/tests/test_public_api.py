"""The public names, spelt out: a change here is a change for users and belongs in the changelog."""

from __future__ import annotations

import importlib

import pytest

PUBLIC = {
    "ft_kernels": [
        "AttentionPlan",
        "Fp8Weight",
        "Int8Weight",
        "NF4Weight",
        "NestedScales",
        "Norm",
        "WideWeight",
        "__version__",
        "add_rms_norm",
        "attention_block",
        "cross_entropy",
        "fp8_quantize",
        "geglu",
        "int8_dequantize",
        "layer_norm",
        "linear_cross_entropy",
        "linear_logprob",
        "lora_linear",
        "lora_mlp",
        "lora_qkv",
        "mlp_block",
        "nf4_dequantize",
        "nf4_quantize",
        "nn",
        "packed_attention",
        "plan_attention",
        "rms_norm",
        "rope",
        "swiglu",
        "widen",
    ],
    "ft_kernels.dispatch": ["Rows", "allocate", "interpreting", "launch", "launches", "native", "use_triton"],
    "ft_kernels.functional": [
        "Activation",
        "AttentionPlan",
        "BaseWeight",
        "Fp8Weight",
        "Int8Weight",
        "Keep",
        "Lora",
        "NF4Weight",
        "NestedScales",
        "Norm",
        "Reduction",
        "RopeLayout",
        "TokenLogProbs",
        "WideWeight",
        "add_rms_norm",
        "attention_block",
        "cross_entropy",
        "fp8_quantize",
        "geglu",
        "int8_dequantize",
        "layer_norm",
        "linear_cross_entropy",
        "linear_logprob",
        "lora_linear",
        "lora_mlp",
        "lora_qkv",
        "mlp_block",
        "nf4_dequantize",
        "nf4_quantize",
        "packed_attention",
        "plan_attention",
        "rms_norm",
        "rope",
        "swiglu",
        "widen",
    ],
    "ft_kernels.nn": [
        "AddRMSNorm",
        "CrossEntropyLoss",
        "GEGLU",
        "LayerNorm",
        "LinearCrossEntropyLoss",
        "LoRALinear",
        "PackedAttention",
        "RMSNorm",
        "RotaryEmbedding",
        "SwiGLU",
    ],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    imported = importlib.import_module(module)
    assert sorted(imported.__all__) == PUBLIC[module]
    assert all(hasattr(imported, name) for name in imported.__all__)
