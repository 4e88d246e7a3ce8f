"""Tiny random models that see, of transformers' own configuration classes, with image processors and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FAMILIES = (
    "qwen3_vl", "qwen2_5_vl", "gemma3", "llava", "pixtral", "llava_next", "smolvlm", "idefics3", "mistral3",
)  # fmt: skip
BEGIN, IMAGE, END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}PICTURE{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
PIXTRAL = {**VISION, "model_type": "pixtral", "head_dim": 16}
SIGLIP, CLIP = {**VISION, "vision_use_head": False}, {**VISION, "model_type": "clip_vision_model"}
GRID = [[56, 112], [112, 56]]
SQUARE = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
ROW = {"do_image_splitting": False, "size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 56}}


def make_seeing(folder: Path, family: str, tokenizer: Any, seed: int = 0, dtype: str = "bfloat16", **text: Any) -> Path:
    """A random model of two layers behind a tower of two, saved under the names that the Hub's files have."""
    import torch
    import transformers

    gemma = family == "gemma3"
    picture = {"gemma3": "<start_of_image>"}.get(family, BEGIN + IMAGE + END if "qwen" in family else IMAGE)
    words = ["<start_of_image>", "<image_soft_token>", "<end_of_image>"] if gemma else [BEGIN, IMAGE, END]
    tokenizer.add_special_tokens({"additional_special_tokens": words})
    if gemma:
        turns = CHAT.replace("<|im_start|>", "<start_of_turn>").replace("<|im_end|>", "<end_of_turn>")
        tokenizer.chat_template = "{{ bos_token }}" + turns.replace("PICTURE", picture)
    else:
        tokenizer.chat_template = CHAT.replace("PICTURE", picture)
    begin, image, end = tokenizer.convert_tokens_to_ids(words)
    settings = {
        "vocab_size": len(tokenizer) + 3, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 3 if family == "qwen3_vl" else 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, **text,
    }  # fmt: skip
    torch.manual_seed(seed)
    config, processor = _config(family, settings, (begin, image, end))
    # the text's own end stands at the top too, where transformers' generation looks first
    model = transformers.AutoModelForImageTextToText.from_config(config)
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if not parameter.is_floating_point() or "rotary" in name or "inv_freq" in name:
            continue
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif parameter.dim() > 1:
            parameter.data.normal_(std=0.2)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    if family in ("gemma3", "llava", "llava_next"):
        _name_as_published(folder / "model.safetensors")
    return folder


def _name_as_published(path: Path) -> None:
    """transformers 5.23 leaves out a part of their towers' names when it saves."""
    from safetensors.torch import load_file, save_file

    def published(name: str) -> str:
        plain = name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model.")
        return name.replace("vision_tower.", "vision_tower.vision_model.") if plain else name

    tensors = load_file(path)
    save_file({published(name): value for name, value in tensors.items()}, path, {"format": "pt"})


def _config(family: str, text: dict[str, Any], ids: tuple[int, int, int]) -> tuple[Any, Any]:
    import transformers as t

    begin, image, end = ids
    llama, mistral = {**text, "model_type": "llama"}, {**text, "model_type": "mistral"}
    if family.startswith("qwen"):
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
        vision: dict[str, Any] = {
            "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
            "out_hidden_size": text["hidden_size"],
        }  # fmt: skip
        pixels = t.Qwen2VLImageProcessorPil(
            patch_size=14, size={"shortest_edge": 28 * 28 * 8, "longest_edge": 28 * 28 * 64}
        )
        known = {
            "image_token_id": image, "video_token_id": text["vocab_size"] - 1, "vision_start_token_id": begin,
            "vision_end_token_id": end, "tie_word_embeddings": False,
        }  # fmt: skip
        if family == "qwen3_vl":
            vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
            rope["mrope_interleaved"] = True
            return t.Qwen3VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **known), pixels
        vision |= {"fullatt_block_indexes": [1], "window_size": 56}
        return t.Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **known), pixels
    if family == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        inner = {"sliding_window": 64, "query_pre_attn_scalar": 16, "layer_types": layers, **text}
        config = t.Gemma3Config(
            text_config=inner, vision_config=SIGLIP, mm_tokens_per_image=4, boi_token_index=begin, eoi_token_index=end,
            image_token_index=image, eos_token_id=text["eos_token_id"],
        )  # fmt: skip
        return config, t.Gemma3ImageProcessorPil(size={"height": 56, "width": 56}, image_seq_length=4)
    known = {"image_token_id": image, "tie_word_embeddings": False}
    if family in ("llava", "pixtral"):
        tower = {"vision_config": CLIP, "vision_feature_layer": -1}
        pixels: Any = t.LlavaImageProcessorPil(**SQUARE)
        if family == "pixtral":
            tower = {"vision_config": PIXTRAL, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
            pixels = t.PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14})
        return t.LlavaConfig(text_config=mistral if family == "pixtral" else llama, **tower, **known), pixels
    if family == "llava_next":
        config = t.LlavaNextConfig(text_config=llama, vision_config=CLIP, image_grid_pinpoints=GRID, **known)
        return config, t.LlavaNextImageProcessorPil(**SQUARE, image_grid_pinpoints=GRID)
    if family == "mistral3":
        config = t.Mistral3Config(text_config=mistral, vision_config=PIXTRAL, spatial_merge_size=2, **known)
        return config, t.PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size={"height": 28, "width": 28})
    kind = "SmolVLM" if family == "smolvlm" else "Idefics3"
    config = getattr(t, f"{kind}Config")(text_config=llama, vision_config=VISION, scale_factor=2, **known)
    try:
        return config, getattr(t, f"{kind}ImageProcessorPil")(**ROW)
    except ImportError:
        pytest.skip("before transformers 5.23 this processor needs torchvision")


def add_adapter(folder: Path, base: Path, whole: list[str] | None = None, seed: int = 1) -> Path:
    """A LoRA adapter on all linear layers, tower and projector too, but for the parts that are trained whole."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    without = rf"(.*\.)?({'|'.join(whole)})(\..*)?" if whole else None
    wrapped = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=without, modules_to_save=whole),
    )
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(folder)
    return folder


def write_run(run: Path, base: Path, picture: Path) -> Path:
    """A run folder of ``task: vision`` with held-out rows, without a trained model in it."""
    from ft_export.seeing import draw

    run.mkdir(parents=True)
    draw(84, 56, seed=3).save(picture)
    (run / "environment.json").write_text(json.dumps({"run_format": 1, "base_model": {"path": str(base)}}))
    (run / "config.yaml").write_text(f"model: {base}\nmethod: sft\ntask: vision\nquantization: none\n")
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What is {n}?"}]},
                {"role": "assistant", "content": str(n)},
            ],
            "images": [str(picture)],
        }
        for n in range(4)
    ]
    (run / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run
