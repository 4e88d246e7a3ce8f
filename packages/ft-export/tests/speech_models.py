"""Tiny random models that listen or speak, of transformers' own classes, with tokenizers, adapters and run folders."""

from __future__ import annotations

import base64
import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np

SPECIAL = [
    "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|fr|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>",
    "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>",
]  # fmt: skip
"""Whisper's special tokens, in its order: the two that stand for many languages stand for all."""
TIMES = 51
"""Tokens of a time, from 0 to 1 second."""
TEXTS = ("hello there", "a small model", "nothing to see", "it is what it is")


def whisper_tokenizer(learned: Any) -> Any:
    """A Whisper's tokenizer around the byte-level merges of another one."""
    from transformers import WhisperTokenizer

    model = json.loads(learned.backend_tokenizer.to_str())["model"]
    words = [word for word in sorted(model["vocab"], key=model["vocab"].__getitem__) if not word.startswith("<|")]
    vocabulary = {word: number for number, word in enumerate(words)}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    tokenizer.add_tokens([f"<|{0.02 * step:.2f}|>" for step in range(TIMES)])
    tokenizer.set_prefix_tokens(language="en", task="transcribe", predict_timestamps=False)
    return tokenizer


def make_whisper(folder: Path, learned: Any, *, dtype: str = "bfloat16", seed: int = 0, **settings: Any) -> Path:
    """A random Whisper of two layers on each side that hears two seconds, with opinions, saved with its processor."""
    import torch
    import transformers as t

    tokenizer = whisper_tokenizer(learned)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config = t.WhisperConfig(
        **{
            "vocab_size": len(tokenizer), "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
            "num_mel_bins": 16, "max_source_positions": 100, "max_target_positions": 64,
            "decoder_start_token_id": ids["<|startoftranscript|>"], "eos_token_id": ids["<|endoftext|>"],
            "bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"], "suppress_tokens": None,
            "begin_suppress_tokens": None, **settings,
        }
    )  # fmt: skip
    torch.manual_seed(seed)
    model = t.WhisperForConditionalGeneration(config)
    _shake(model, 0.2)
    model.generation_config = t.GenerationConfig(
        eos_token_id=ids["<|endoftext|>"], pad_token_id=ids["<|endoftext|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"], max_length=64, is_multilingual=True,
        lang_to_id={"<|en|>": ids["<|en|>"], "<|fr|>": ids["<|fr|>"]},
        task_to_id={"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
        no_timestamps_token_id=ids["<|notimestamps|>"], suppress_tokens=[3, 5],
        begin_suppress_tokens=[7, ids["<|endoftext|>"]], alignment_heads=[[1, 0], [1, 2]],
    )  # fmt: skip
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    extractor = t.WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    tokenizer.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


def make_qwen_asr(folder: Path, tokenizer: Any, *, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """A random Qwen3-ASR: an encoder, a projector and a Qwen3 of two layers each."""
    import torch
    import transformers as t

    tokenizer.add_special_tokens({"additional_special_tokens": ["<|audio_start|>", "<|audio_pad|>", "<|audio_end|>"]})
    config = t.Qwen3ASRConfig(
        audio_config={
            "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "d_model": 32,
            "output_dim": 64, "downsample_hidden_size": 16,
        },
        text_config={
            "vocab_size": len(tokenizer) + 3, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        },
        audio_token_id=tokenizer.convert_tokens_to_ids("<|audio_pad|>"), pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = t.AutoModelForSpeechSeq2Seq.from_config(config)
    _shake(model, 0.2)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    t.Qwen3ASRFeatureExtractor(feature_size=16).save_pretrained(folder)
    return folder


def make_csm(folder: Path, tokenizer: Any, *, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """A random CSM: backbone and depth decoder of two layers each, and a small Mimi."""
    import torch
    import transformers as t

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 16}
    mimi = {
        "hidden_size": 32, "num_filters": 4, "num_residual_layers": 1, "upsampling_ratios": [4, 4], "codebook_size": 32,
        "codebook_dim": 16, "vector_quantization_hidden_dimension": 16, "num_quantizers": 4,
        "num_semantic_quantizers": 1, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "frame_rate": 12.5, "sampling_rate": 400, "upsample_groups": 32,
    }  # fmt: skip
    config = t.CsmConfig(
        num_codebooks=4, vocab_size=35, text_vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, **heads,
        max_position_embeddings=128, codec_config={"model_type": "mimi", **mimi}, audio_token_id=1,
        audio_eos_token_id=2,
        depth_decoder_config={
            "num_codebooks": 4, "backbone_hidden_size": 64, "vocab_size": 35, "hidden_size": 32,
            "intermediate_size": 48, "max_position_embeddings": 8, **heads,
        },
        codebook_pad_token_id=33, codebook_eos_token_id=32, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = t.CsmForConditionalGeneration(config)
    _shake(model, 0.2, without="codec_model.")
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    t.EncodecFeatureExtractor(feature_size=1, sampling_rate=400).save_pretrained(folder)
    return folder


def _shake(model: Any, size: float, without: str = "nothing") -> None:
    """Weights large enough for what is heard to matter; norms and biases that are not ones and zeros."""
    import torch

    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if not parameter.is_floating_point() or "inv_freq" in name or name.startswith(without):
            continue
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif parameter.dim() > 1 and "encoder.embed_positions" not in name:
            parameter.data.normal_(std=size)


def add_speech_adapter(folder: Path, base: Path, *, seed: int = 1, size: float = 0.1, **settings: Any) -> Path:
    """A LoRA adapter on a model of speech, as PEFT saves it."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = transformers.AutoConfig.from_pretrained(base)
    kind = transformers.AutoModelForTextToWaveform if config.model_type == "csm" else None
    kind = kind or transformers.AutoModelForSpeechSeq2Seq
    model = kind.from_pretrained(base, dtype=torch.float32)
    targets = {"target_modules": ["q_proj", "v_proj", "out_proj", "fc1", "o_proj", "up_proj"]}
    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **targets, **settings}))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn_like(parameter)
    wrapped.save_pretrained(folder)
    return folder


def wav(seconds: float, rate: int = 16_000, seed: int = 0) -> bytes:
    """A file of 16 bits, mono."""
    from ft_export.sounds import make_sound

    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((make_sound(seconds, rate, seed) * 32767).astype(np.int16).tobytes())
    return file.getvalue()


def write_speech_run(run: Path, base: Path, task: str = "stt", rows: int = 4) -> Path:
    """A run folder with held-out rows, one of a file and others of ``data:`` URLs, without a trained model."""
    run.mkdir(parents=True)
    (run / "environment.json").write_text(json.dumps({"run_format": 1, "base_model": {"path": str(base)}}))
    (run / "config.yaml").write_text(f"model: {base}\nmethod: sft\ntask: {task}\nquantization: none\n")
    (run.parent / "a.wav").write_bytes(wav(1.5, 8_000))
    said = []
    for number in range(rows):
        sound = wav(1.0 + 0.2 * number, seed=number)
        url = f"data:audio/wav;base64,{base64.b64encode(sound).decode()}"
        said.append({"audio": str(run.parent / "a.wav") if number == 0 else url, "text": TEXTS[number % len(TEXTS)]})
    (run / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    return run


def sound_tokens() -> list[str]:
    return ["<|speech_start|>", "<|speech_end|>", *(f"<|audio_{number}|>" for number in range(58))]


def grow(folder: Path, base: Path, tokenizer: Any, how: str) -> Path:
    """A run of a language model that got a codec's tokens: 60 of them, under ft-speech's names.

    Args:
        how: its embeddings are trained ``whole``, by a ``low rank``, or only ``saved``, as PEFT does where they grew;
            ``whole, tied`` trains both ends as one.
    """
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    run = write_speech_run(folder / "run", base, "tts")
    tokenizer.add_tokens(sound_tokens(), special_tokens=True)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    whole: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]} if how == "whole" else {}
    if how == "whole, tied":
        whole = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    targets = ["q_proj", "up_proj", *(["embed_tokens", "lm_head"] if how == "low rank" else [])]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **whole)
    wrapped = get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(run / "adapter")
    tokenizer.save_pretrained(run / "adapter")
    (run / "adapter" / "speech.json").write_text('{"codec": "mel"}')
    return run
