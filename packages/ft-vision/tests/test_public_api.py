"""What others may import. A change here is a change of the interface, for the changelog."""

from __future__ import annotations

import importlib

EXPECTED = {
    "ft_vision": ["ImageError", "__version__", "read_image"],
    "ft_vision.answering": ["VisionAnswerer", "knows"],
    "ft_vision.asking": ["ASKING", "normalise_asking"],
    "ft_vision.beside": ["VisionInputs"],
    "ft_vision.boxes": [
        "Box",
        "CONVENTIONS",
        "Convention",
        "from_model",
        "read_boxes",
        "seen_size",
        "to_model",
        "write_boxes",
    ],
    "ft_vision.budgets": ["bound_pixels", "can_be_bounded"],
    "ft_vision.collating": ["TRIED", "UnusableImage", "VisionCollator", "collator", "collator_for", "drawn", "packs"],
    "ft_vision.columns": ["as_messages"],
    "ft_vision.documents": [
        "COUNTS",
        "IMAGES",
        "VisionRenderer",
        "dataset",
        "fault_of",
        "image_token_of",
        "images_of",
        "tokenize",
    ],
    "ft_vision.evaluating": ["evaluate"],
    "ft_vision.families": [],
    "ft_vision.families.gemma": ["describe_gemma3"],
    "ft_vision.families.guests": ["describe_language_model", "describe_text_model"],
    "ft_vision.families.parts": ["FAMILIES", "Family", "family_of", "image_token_of"],
    "ft_vision.families.pixtral": ["PixtralProcessor"],
    "ft_vision.families.processors": ["image_options", "processor_class"],
    "ft_vision.families.qwen": ["describe_qwen2_5_vl", "describe_qwen3_vl"],
    "ft_vision.families.towers": ["tell_lengths"],
    "ft_vision.fetching": ["LISTED", "MAX_FETCHED", "cached", "check_url", "is_url", "url_of"],
    "ft_vision.frames": ["PREFIX", "frame_of", "frame_references", "read_frame", "spread", "video_frames"],
    "ft_vision.images": [
        "FORMATS",
        "ImageError",
        "MAX_BYTES",
        "MAX_FRAMES",
        "MAX_PIXELS",
        "frame_count",
        "image_format",
        "image_size",
        "read_frames",
        "read_image",
    ],
    "ft_vision.loading": [
        "adapter_options",
        "config_of",
        "image_backend",
        "load_for_training",
        "load_processor",
        "processor_of",
        "settings_of",
    ],
    "ft_vision.pixels": ["is_turned", "to_8_bit", "upright"],
    "ft_vision.planning": ["VisionFronts", "materialize"],
    "ft_vision.plugin": [
        "GEMMA3",
        "IDEFICS3",
        "LLAVA",
        "LLAVA_NEXT",
        "MISTRAL3",
        "QWEN2_5_VL",
        "QWEN3_VL",
        "SMOLVLM",
        "VISION",
    ],
    "ft_vision.rates": ["rates"],
    "ft_vision.references": [
        "DATA",
        "absolute_path",
        "decoded",
        "image_name",
        "kind_of",
        "open_reference",
        "reference",
        "reference_of",
        "said_of",
        "settings_or_default",
        "short",
    ],
    "ft_vision.rows": ["ANSWERS", "image_name", "normalise", "open_reference", "reference_of", "said_of"],
    "ft_vision.seen": ["SEEN", "Seen", "check_text", "flat", "has_place"],
    "ft_vision.settings": ["MOST_FRAMES", "VisionSettings"],
    "ft_vision.tower": ["Counted", "count_tower"],
    "ft_vision.verifying": ["prepare"],
}


def test_the_public_names() -> None:
    found = {module: sorted(importlib.import_module(module).__all__) for module in EXPECTED}
    assert found == EXPECTED


def test_every_public_name_is_there() -> None:
    for module, names in EXPECTED.items():
        for name in names:
            assert getattr(importlib.import_module(module), name) is not None
