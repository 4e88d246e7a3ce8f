"""The operations as plain functions. Each takes torch tensors on any device and gives the same result everywhere."""

from ft_kernels.functional.activations import geglu, swiglu
from ft_kernels.functional.attention import AttentionPlan, packed_attention, plan_attention
from ft_kernels.functional.blocks import AttentionBlock, Keep, MLPBlock, Norm, attention_block, mlp_block
from ft_kernels.functional.few_rows import decode_attention, gather_rows, nf4_linear, rope_append, row_linear
from ft_kernels.functional.heads import Lora, TokenLogProbs, linear_cross_entropy, linear_logprob
from ft_kernels.functional.lora import lora_linear, lora_qkv
from ft_kernels.functional.lora_mlp import Activation, lora_mlp
from ft_kernels.functional.lora_weights import BaseWeight, Fp8Weight, Int8Weight, NF4Weight, WideWeight, widen
from ft_kernels.functional.losses import Reduction, cross_entropy
from ft_kernels.functional.norms import add_rms_norm, layer_norm, rms_norm
from ft_kernels.functional.quantization import NestedScales, fp8_quantize, int8_dequantize, nf4_dequantize, nf4_quantize
from ft_kernels.functional.rope import RopeLayout, rope

__all__ = [
    "Activation",
    "AttentionBlock",
    "AttentionPlan",
    "BaseWeight",
    "Fp8Weight",
    "Int8Weight",
    "Keep",
    "Lora",
    "MLPBlock",
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
    "decode_attention",
    "fp8_quantize",
    "gather_rows",
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
    "nf4_linear",
    "nf4_quantize",
    "packed_attention",
    "plan_attention",
    "rms_norm",
    "rope",
    "rope_append",
    "row_linear",
    "swiglu",
    "widen",
]
