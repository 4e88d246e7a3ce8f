"""What ft-vision registers."""

from __future__ import annotations

from ft_core.plugins.specs import ArchitectureSpec, ModalitySpec

__all__ = [
    "GEMMA3",
    "IDEFICS3",
    "LLAVA",
    "LLAVA_NEXT",
    "MISTRAL3",
    "QWEN2_5_VL",
    "QWEN3_VL",
    "SMOLVLM",
    "VISION",
]

VISION = ModalitySpec(
    name="vision",
    summary="models that see: conversations with images",
    read="ft_vision.images:read_image",
    extensions=(".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
    load="ft_vision.loading:load_for_training",
    settings="ft_vision.settings:VisionSettings",
    methods=("sft", "dpo", "grpo", "gspo"),
    processor="ft_vision.loading:load_processor",
    columns="ft_vision.columns:as_messages",
    rows="ft_vision.rows:normalise",
    adapter="ft_vision.loading:adapter_options",
    rates="ft_vision.rates:rates",
    dataset="ft_vision.documents:dataset",
    collator="ft_vision.collating:collator",
    evaluate="ft_vision.evaluating:evaluate",
    knows="ft_vision.answering:knows",
    answerer="ft_vision.answering:VisionAnswerer",
    plan="ft_vision.planning:VisionFronts",
    inputs="ft_vision.beside:VisionInputs",
    verify="ft_vision.verifying:prepare",
)


def _family(name: str, summary: str, describe: str) -> ArchitectureSpec:
    return ArchitectureSpec(name=name, summary=summary, model_types=(name,), describe=f"ft_vision.families.{describe}")


QWEN3_VL = _family("qwen3_vl", "Qwen 3-VL, dense: positions of time, height and width", "qwen:describe_qwen3_vl")
QWEN2_5_VL = _family("qwen2_5_vl", "Qwen 2.5-VL: positions of time, height and width", "qwen:describe_qwen2_5_vl")
LLAVA = _family("llava", "LLaVA and Pixtral, over any text model that is known", "guests:describe_language_model")
LLAVA_NEXT = _family("llava_next", "LLaVA-NeXT, over any text model that is known", "guests:describe_language_model")
MISTRAL3 = _family("mistral3", "Mistral Small 3.1 and its relatives that see", "guests:describe_language_model")
SMOLVLM = _family("smolvlm", "SmolVLM, over any text model that is known", "guests:describe_text_model")
IDEFICS3 = _family("idefics3", "Idefics 3, over any text model that is known", "guests:describe_text_model")
GEMMA3 = _family("gemma3", "Gemma 3 with images, whose tokens see each other both ways", "gemma:describe_gemma3")
