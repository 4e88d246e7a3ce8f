"""What models that see have before their language model, and what llama.cpp computes of it (its ``mtmd``).

The checks are of graphs, and of constants in them that no key says: what a model has otherwise is refused, some of it
because llama.cpp would end the process. Sources: ``clip.cpp``, ``models/qwen3vl.cpp`` and ``models/siglip.cpp`` in
llama.cpp's ``tools/mtmd``, and for names and keys its ``conversion/qwen3vl.py`` and ``gemma.py``, all as
llama-cpp-python 0.3.36 has them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ft_export.errors import ExportError
from ft_export.gguf import gemma
from ft_export.gguf.rope import check_rope, head_size
from ft_export.gguf.rules import Operation, same
from ft_export.seeing import sees, text_config

if TYPE_CHECKING:
    import torch

__all__ = ["TOWERS", "Tower", "check_gemma3_vl", "check_qwen3_vl", "tower_of", "unturned"]

GELU = "gelu_pytorch_tanh"
EPS = 1e-6
"""Of Qwen 3-VL's norms in the tower, which no configuration says."""

Targets = tuple[tuple[str, Operation], ...]


@dataclass(frozen=True)
class Tower:
    """How the tower and the projector of an architecture become an ``mmproj`` file.

    Attributes:
        projector: llama.cpp's name of it.
        targets: from a parameter's name to the names in the file and how they are made; empty: it is left out; None: it
            is not known.
        keys: writes the keys that are this tower's own.
        kinds: endings of names with the types that they have, by that of the file (``f16``, ``bf16``, ``f32``); all
            other weights of two and more dimensions have the file's.
        grid: whether images have sizes of their own, in multiples of a patch.
        written: what the chat template writes for an image.
        around: the text that stands around an image's own tokens in a conversation, which transformers' processor puts
            there and llama.cpp does not.
    """

    projector: str
    targets: Callable[[str, Any], Targets | None]
    keys: Callable[[Any, Any, Mapping[str, Any]], None]
    kinds: Mapping[str, Mapping[str, str]]
    grid: bool
    written: str
    around: str = ""


def tower_of(config: Any) -> Tower | None:
    """The row for a configuration; None for a model that does not see, or that is not in the table."""
    names = set(getattr(config, "architectures", None) or [])
    return next((TOWERS[name] for name in names if name in TOWERS), None) if sees(config) else None


def check_qwen3_vl(config: Any) -> None:
    """
    Raises:
        ExportError: llama.cpp's Qwen 3-VL has not what the configuration says.
    """
    vision, text = config.vision_config, text_config(config)
    check_rope(text, "Qwen3VLForConditionalGeneration", has_factors=False)
    needs = {"spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "hidden_act": GELU}
    _need("qwen3vl", vision, needs)
    if not (text.rope_parameters or {}).get("mrope_section"):
        raise ExportError("llama.cpp's qwen3vl rotates in sections, this model has no mrope_section")
    if sum(text.rope_parameters["mrope_section"]) * 2 != head_size(text):
        raise ExportError(
            f"llama.cpp's qwen3vl turns all of a head, this model has sections {text.rope_parameters['mrope_section']} "
            f"for {head_size(text)} values (mrope_section)"
        )
    layers = list(vision.deepstack_visual_indexes)
    if layers != sorted(set(layers)):
        raise ExportError(f"llama.cpp's qwen3vl stacks layers in their order, this model has {layers}")
    if len(layers) >= text.num_hidden_layers:  # it would end this very process
        raise ExportError(
            f"llama.cpp's qwen3vl adds no image to its last layer, this model has {len(layers)} of them for "
            f"{text.num_hidden_layers} layers (deepstack_visual_indexes)"
        )
    if math.isqrt(vision.num_position_embeddings) ** 2 != vision.num_position_embeddings:
        raise ExportError(
            f"llama.cpp's qwen3vl has a square of positions, this model {vision.num_position_embeddings} of them"
        )
    if (vision.hidden_size // vision.num_heads) % 4:
        raise ExportError(f"llama.cpp's qwen3vl needs heads of a multiple of 4, not {vision.hidden_size} values")


def check_gemma3_vl(config: Any) -> None:
    """
    Raises:
        ExportError: llama.cpp's Gemma 3 has not what the configuration says.
    """
    vision = config.vision_config
    gemma.check_gemma3(text_config(config))
    _need("gemma3", vision, {"hidden_act": GELU, "num_channels": 3})
    side, tokens = vision.image_size // vision.patch_size, math.isqrt(config.mm_tokens_per_image)
    if tokens**2 != config.mm_tokens_per_image or side % tokens:
        raise ExportError(
            f"llama.cpp's gemma3 pools squares, this model has {config.mm_tokens_per_image} tokens for {side} x {side} "
            "patches (mm_tokens_per_image)"
        )
    if vision.intermediate_size == vision.hidden_size:  # by which it knows files whose two are the wrong way round
        raise ExportError("llama.cpp's gemma3 needs a tower whose intermediate_size is not its hidden_size")
    window = text_config(config).sliding_window
    if window and window < config.mm_tokens_per_image:
        raise ExportError(f"llama.cpp's gemma3 sees an image in one window, this model has a window of {window} tokens")


def _need(name: str, vision: Any, needs: Mapping[str, Any]) -> None:
    for key, value in needs.items():
        if getattr(vision, key, None) != value:
            raise ExportError(f"llama.cpp's {name} has {key} {value}, this model's tower {getattr(vision, key, None)}")


def unturned(config: Any) -> list[int]:
    """The frequencies of queries and keys that llama.cpp's Qwen 3-VL does not turn, by their numbers.

    transformers turns those that fall to no section of height or width by the time; llama.cpp only as many as the
    time's own section has, and the others by a fourth position, which is 0 (``ggml_mrope_cache_init`` in
    ``ggml/src/ggml-cpu/ops.cpp``). Of the published models these are two of the slowest frequencies.
    """
    if TOWERS["Qwen3VLForConditionalGeneration"] is not tower_of(config):
        return []
    sections = text_config(config).rope_parameters["mrope_section"]
    return [number for number in range(sum(sections)) if number >= 3 * sections[number % 3]]


QWEN3_VL_PARTS = {
    "norm1": "ln1", "norm2": "ln2", "attn.qkv": "attn_qkv", "attn.proj": "attn_out", "mlp.linear_fc1": "ffn_up",
    "mlp.linear_fc2": "ffn_down",
}  # fmt: skip
MERGER = {"norm": "v.post_ln", "linear_fc1": "mm.0", "linear_fc2": "mm.2"}
STACKED = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}
SIGLIP_PARTS = {
    "layer_norm1": "ln1", "layer_norm2": "ln2", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
}  # fmt: skip


def _frame(number: int) -> Operation:
    """Of a convolution over two frames, one's."""

    def make(tensors: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
        return tensors[0][:, :, number].contiguous()

    return make


def _qwen3_vl(name: str, config: Any) -> Targets | None:
    found = re.fullmatch(r"model\.visual\.(?P<rest>.+)\.(?P<kind>weight|bias)", name)
    if found is None:
        return None
    rest, kind = found["rest"], found["kind"]
    if rest == "patch_embed.proj":
        if kind == "bias":
            return (("v.patch_embd.bias", same),)
        return ("v.patch_embd.weight", _frame(0)), ("v.patch_embd.weight.1", _frame(1))
    if rest == "pos_embed":
        return (("v.position_embd.weight", same),)
    where, _, part = rest.partition(".")
    number, _, inner = part.partition(".")
    to = None
    if where == "blocks" and inner in QWEN3_VL_PARTS:
        to = f"v.blk.{number}.{QWEN3_VL_PARTS[inner]}"
    elif where == "merger":
        to = MERGER.get(part)
    elif where == "deepstack_merger_list" and inner in STACKED:
        to = f"v.deepstack.{config.vision_config.deepstack_visual_indexes[int(number)]}.{STACKED[inner]}"
    return None if to is None else ((f"{to}.{kind}", same),)


def _gemma3(name: str, config: Any) -> Targets | None:
    if name == "model.multi_modal_projector.mm_input_projection_weight":
        return (("mm.input_projection.weight", same),)
    if name == "model.multi_modal_projector.mm_soft_emb_norm.weight":
        return (("mm.soft_emb_norm.weight", gemma.plus_one),)
    found = re.fullmatch(r"model\.vision_tower\.(?:vision_model\.)?(?P<rest>.+?)(?:\.(?P<kind>weight|bias))?", name)
    if found is None:
        return None
    rest, kind = found["rest"], found["kind"]
    if rest.partition(".")[0] == "head":  # pools an image to one vector, which no language model is given
        return ()
    known = {
        "embeddings.patch_embedding": "v.patch_embd", "embeddings.position_embedding": "v.position_embd",
        "post_layernorm": "v.post_ln",
    }  # fmt: skip
    layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", rest)
    to = known.get(rest) if layer is None else SIGLIP_PARTS.get(layer[2])
    if to is None or kind is None:
        return None
    return ((f"{to}.{kind}" if layer is None else f"v.blk.{layer[1]}.{to}.{kind}", same),)


def _common_keys(writer: Any, config: Any, said: Mapping[str, Any], sizes: Sequence[int]) -> None:
    """Keys of both, with the image's edge, the layers and the heads, in llama.cpp's converter's order."""
    image, layers, heads = sizes
    vision = config.vision_config
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_projection_dim(text_config(config).hidden_size)
    writer.add_vision_image_size(image)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(heads)
    writer.add_vision_image_mean([float(value) for value in said["image_mean"]])
    writer.add_vision_image_std([float(value) for value in said["image_std"]])


def _qwen3_vl_keys(writer: Any, config: Any, said: Mapping[str, Any]) -> None:
    vision = config.vision_config
    edge = math.isqrt(vision.num_position_embeddings) * vision.patch_size
    _common_keys(writer, config, said, (edge, vision.depth, vision.num_heads))
    writer.add_clip_projector_type("qwen3vl_merger")
    writer.add_vision_use_gelu(True)
    writer.add_vision_spatial_merge_size(vision.spatial_merge_size)
    writer.add_vision_attention_layernorm_eps(EPS)
    stacked = set(vision.deepstack_visual_indexes)
    writer.add_vision_is_deepstack_layers([layer in stacked for layer in range(vision.depth)])


def _gemma3_keys(writer: Any, config: Any, said: Mapping[str, Any]) -> None:
    vision = config.vision_config
    _common_keys(writer, config, said, (vision.image_size, vision.num_hidden_layers, vision.num_attention_heads))
    writer.add_clip_projector_type("gemma3")
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_use_gelu(True)
    writer.add_vision_projector_scale_factor(
        vision.image_size // vision.patch_size // math.isqrt(config.mm_tokens_per_image)
    )


F32 = dict.fromkeys(("f16", "bf16", "f32"), "F32")
PATCHES = {**F32, "f16": "F16"}

TOWERS: dict[str, Tower] = {
    "Qwen3VLForConditionalGeneration": Tower(
        projector="qwen3vl_merger",
        targets=_qwen3_vl,
        keys=_qwen3_vl_keys,
        kinds={"v.patch_embd.weight": PATCHES, "v.patch_embd.weight.1": PATCHES, "v.position_embd.weight": F32},
        grid=True,
        written="<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "Gemma3ForConditionalGeneration": Tower(
        projector="gemma3",
        targets=_gemma3,
        keys=_gemma3_keys,
        kinds={
            "v.patch_embd.weight": F32,
            "v.position_embd.weight": F32,
            "mm.input_projection.weight": dict.fromkeys(("f16", "bf16", "f32"), "F16"),
        },
        grid=False,
        written="<start_of_image>",
        around="\n\n",
    ),
}
"""By the transformers class, as ``architectures`` in config.json names it."""
