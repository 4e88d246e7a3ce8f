"""Pixtral's and Mistral 3's processor with Pillow alone.

transformers' own cannot be imported without torchvision: its module takes one function, which counts tokens for other
programs, from beside the image processor that uses it. This class has its name, its settings and its files, so that
each reads what the other saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import ProcessorMixin

__all__ = ["PixtralProcessor"]


class PixtralProcessor(ProcessorMixin):
    """Writes an image as rows of tokens: one for every square of merged patches, a break after each row but the last,
    which an end follows (Pixtral 12B, arXiv:2410.07073, section 2.2).

    Args:
        image_processor: ``PixtralImageProcessorPil``.
        tokenizer: the model's.
        patch_size: pixels of a patch's edge.
        spatial_merge_size: patches of an edge that the projector merges into one token.
        chat_template: of Jinja.
        image_token, image_break_token, image_end_token: the words.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
        **_: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.patch_size = patch_size
        self.spatial_merge_size = spatial_merge_size
        self.image_token = image_token
        self.image_break_token = image_break_token
        self.image_end_token = image_end_token
        self.image_token_id, self.image_break_token_id, self.image_end_token_id = (
            tokenizer.convert_tokens_to_ids(word) for word in (image_token, image_break_token, image_end_token)
        )

    @property
    def image_token_ids(self) -> list[int]:
        """The ids of all three words, which ``mm_token_type_ids`` counts to an image."""
        return [self.image_token_id, self.image_break_token_id, self.image_end_token_id]

    @property
    def model_input_names(self) -> list[str]:
        """What the model is handed."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names, "image_sizes"]

    def _process_images(self, images: Any, **options: Any) -> Any:
        return super()._process_images(images, **{**options, "patch_size": self._square})

    @property
    def _square(self) -> int:
        """Pixels of the edge of what one token stands for."""
        return self.patch_size * self.spatial_merge_size

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **_: Any) -> str:
        """The words for one image of what the image processor made."""
        height, width = (int(edge) // self._square for edge in image_inputs["image_sizes"][image_idx])
        return self.image_break_token.join([self.image_token * width] * height) + self.image_end_token
