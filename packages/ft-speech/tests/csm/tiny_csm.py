"""A tiny random CSM with its codec, of transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CODEBOOKS, CODES, VOCABULARY = 4, 32, 35
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|AUDIO|>", "<|audio_eos|>"]


def make(folder: Path) -> Path:
    """The model's folder: two layers each, frames of 4 codes below 32 at 12.5 a second."""
    import torch
    import transformers as t
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["one two three four"], trainer)
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[2]
    )
    layers: dict[str, Any] = {"num_hidden_layers": 2, "num_key_value_heads": 1, "num_attention_heads": 2}
    codec = t.MimiConfig(
        sampling_rate=24_000, hidden_size=16, num_filters=4, codebook_size=CODES, codebook_dim=8,
        num_quantizers=CODEBOOKS, vector_quantization_hidden_dimension=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, intermediate_size=16, upsample_groups=16, use_cache=False,
    )  # fmt: skip
    depth = t.CsmDepthDecoderConfig(
        num_codebooks=CODEBOOKS, backbone_hidden_size=32, vocab_size=VOCABULARY, hidden_size=24, intermediate_size=32,
        max_position_embeddings=CODEBOOKS + 1, **layers,
    )  # fmt: skip
    config = t.CsmConfig(
        num_codebooks=CODEBOOKS, vocab_size=VOCABULARY, text_vocab_size=len(tokenizer), hidden_size=32,
        intermediate_size=48, max_position_embeddings=512, bos_token_id=0, pad_token_id=2, audio_token_id=2,
        audio_eos_token_id=3, codebook_pad_token_id=VOCABULARY - 1, codebook_eos_token_id=0,
        depth_decoder_config=depth, codec_config=codec, **layers,
    )  # fmt: skip
    torch.manual_seed(0)
    t.CsmForConditionalGeneration(config).save_pretrained(folder)
    t.CsmProcessor(t.EncodecFeatureExtractor(sampling_rate=24_000, feature_size=1), tokenizer).save_pretrained(folder)
    return folder
