"""Tiny random models of the families whose images are cut into tiles or keep their shape, with processors of theirs.

The chat templates are those of the published checkpoints of each family, with these tokenizers' end of a turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TILE = 56
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": 14,
}
TILES = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"] + [
    f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)
]
PIXTRAL = ["[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]

UTTERANCES = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == "
    "'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""SmolVLM's and Idefics 3's: a content is a list of parts, never a string."""

NEXT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}{% for content in "
    "message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for content in "
    "message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}{{' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '<|im_end|> '}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
"""LLaVA-NeXT's over Mistral: a turn's images stand before its text, wherever they were."""

MISTRAL = (
    "{{- bos_token }}{%- for message in messages %}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('After the optional system message, conversation roles must alternate') }}{%- endif %}"
    "{%- if message['role'] == 'user' %}{{- '[INST]' }}{%- endif %}{%- if message['content'] is not string %}"
    "{%- for chunk in message['content'] %}{%- if chunk['type'] == 'text' %}{{- chunk['text'] }}"
    "{%- elif chunk['type'] == 'image' %}{{- '[IMG]' }}{%- endif %}{%- endfor %}{%- else %}{{- message['content'] }}"
    "{%- endif %}{%- if message['role'] == 'user' %}{{- '[/INST]' }}{%- else %}{{- eos_token }}{%- endif %}"
    "{%- endfor %}"
)
"""Pixtral's and Mistral 3's."""

Parts = tuple[Callable[..., Any], Callable[..., dict[str, Any]], Callable[[Any, Path], None]]


def _pieces(folder: Path, tokenizer: Any, images: Any, name: str, template: str, **settings: Any) -> None:
    """A processor by its files, as where it cannot be made for what it wants and images do not need."""
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": name, **settings}))


def _tiled(folder: Path, parts: Parts, kind: str) -> None:
    import transformers as t

    make_tokenizer, text, save = parts
    tokenizer = make_tokenizer(folder, TILES, "<image>", {"image_token": "<image>"})
    tokenizer.eos_token = "<end_of_utterance>"
    config = getattr(t, f"{kind}Config")(
        text_config={**text(tokenizer, eos_token_id=tokenizer.eos_token_id), "model_type": "llama"},
        vision_config=dict(TOWER),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    save(getattr(t, f"{kind}ForConditionalGeneration")(config), folder)
    try:
        images = getattr(t, f"{kind}ImageProcessorPil")(
            size={"longest_edge": 2 * TILE}, max_image_size={"longest_edge": TILE}
        )
    except ImportError:  # so it is in transformers 5.17
        pytest.skip(f"this transformers makes the pixels of {kind} with torchvision alone")
    _pieces(folder, tokenizer, images, f"{kind}Processor", UTTERANCES, image_seq_len=4)


def _llava_next(folder: Path, parts: Parts) -> None:
    import transformers as t

    make_tokenizer, text, save = parts
    tokenizer = make_tokenizer(folder, ["<image>", "[INST]", "[/INST]"], "<image>", {"image_token": "<image>"})
    config = t.LlavaNextConfig(
        text_config={**text(tokenizer), "model_type": "mistral"},
        vision_config={**TOWER, "model_type": "clip_vision_model"},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    save(t.LlavaNextForConditionalGeneration(config), folder)
    images = t.LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS
    )
    settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    _pieces(folder, tokenizer, images, "LlavaNextProcessor", NEXT, **settings)


def _pixtral(folder: Path, parts: Parts, merged: int) -> None:
    """A Pixtral, or of ``merged`` patches an edge a Mistral 3."""
    import transformers as t

    make_tokenizer, text, save = parts
    tokenizer = make_tokenizer(folder, PIXTRAL, "[IMG]", {"image_token": "[IMG]"})
    common: dict[str, Any] = {
        "text_config": {**text(tokenizer), "model_type": "mistral", "sliding_window": None},
        "vision_config": {**TOWER, "model_type": "pixtral", "image_size": 2 * TILE, "head_dim": 16},
        "image_token_index": tokenizer.convert_tokens_to_ids("[IMG]"),
        "vision_feature_layer": -1,
    }
    if merged == 1:
        config: Any = t.LlavaConfig(**common, vision_feature_select_strategy="full")
        save(t.LlavaForConditionalGeneration(config), folder)
    else:
        config = t.Mistral3Config(**common, spatial_merge_size=merged)
        save(t.Mistral3ForConditionalGeneration(config), folder)
    images = t.PixtralImageProcessorPil(size={"longest_edge": 2 * TILE}, patch_size={"height": 14, "width": 14})
    settings = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    _pieces(
        folder, tokenizer, images, "PixtralProcessor", MISTRAL, patch_size=14, spatial_merge_size=merged, **settings
    )


MORE: dict[str, Callable[[Path, Parts], None]] = {
    "idefics3": lambda folder, parts: _tiled(folder, parts, "Idefics3"),
    "llava_next": _llava_next,
    "mistral3": lambda folder, parts: _pixtral(folder, parts, 2),
    "pixtral": lambda folder, parts: _pixtral(folder, parts, 1),
    "smolvlm": lambda folder, parts: _tiled(folder, parts, "SmolVLM"),
}
