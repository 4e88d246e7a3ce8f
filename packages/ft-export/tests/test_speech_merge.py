"""Merging models that listen and that speak: adapters on encoder and decoder, parts trained whole, tied heads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from speech_models import (
    add_speech_adapter,
    grow,
    make_csm,
    make_qwen_asr,
    make_whisper,
    write_speech_run,
)

from ft_export import ExportError, merge
from ft_export.checkpoints import Checkpoint
from ft_export.hearing import features_of, heard_rows
from ft_export.samples import read_rows
from ft_export.sounds import Sound, make_sound


def test_a_merged_whisper_says_what_its_adapter_says(make_tokenizer: Any, tmp_path: Path) -> None:
    base = make_whisper(tmp_path / "base", make_tokenizer())
    run = write_speech_run(tmp_path / "run", base)
    add_speech_adapter(run / "adapter", base)
    made = merge(run)
    assert made.logprobs is not None
    # three of attention's in each of six attentions, one of the feed-forward in each of four layers
    assert (made.weights.merged, made.weights.replaced) == (6 * 3 + 4, 0)
    assert "each of 4 texts was read with the sound of it: 4 of the rows' own, none made" in made.lines
    assert set(Checkpoint(made.folder)) == set(Checkpoint(base))
    names = {path.name for path in made.folder.iterdir()}
    assert {"generation_config.json", "preprocessor_config.json", "tokenizer.json", "merge.json"} <= names
    assert json.loads((made.folder / "merge.json").read_text())["samples"] == "held_out.jsonl"

    # in plain transformers all weights are there, it hears, and it generates
    model, told = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(
        made.folder, dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    processor = transformers.AutoProcessor.from_pretrained(made.folder)
    texts = list(heard_rows(read_rows(run / "held_out.jsonl"), processor.tokenizer, made.folder, model))
    said = [
        model(decoder_input_ids=torch.tensor([list(texts[0])]), input_features=text.inputs["input_features"]).logits
        for text in texts[:2]
    ]
    assert (said[0] - said[1]).abs().max() > 1e-3
    answer = model.generate(texts[0].inputs["input_features"], max_new_tokens=4, language="en", task="transcribe")
    assert processor.tokenizer.convert_ids_to_tokens(answer[0, :3].tolist())[0] != "<|endoftext|>"


def test_parts_trained_whole_and_the_two_ends_of_a_tied_head(make_tokenizer: Any, tmp_path: Path) -> None:
    base = make_whisper(tmp_path / "base", make_tokenizer())
    run = write_speech_run(tmp_path / "run", base)
    add_speech_adapter(run / "adapter", base, modules_to_save=["conv1", "proj_out"], task_type="SEQ_2_SEQ_LM")
    made = merge(run)
    assert made.weights.replaced == 3
    # only the head was trained: it gets a tensor of its own, and the embeddings stay
    assert json.loads((made.folder / "config.json").read_text())["tie_word_embeddings"] is False
    merged, was = Checkpoint(made.folder), Checkpoint(base)
    embeddings = "model.decoder.embed_tokens.weight"
    assert merged.tensor(embeddings).equal(was.tensor(embeddings))
    assert not merged.tensor("proj_out.weight").equal(was.tensor(embeddings))
    model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(made.folder)
    assert model.proj_out.weight.equal(merged.tensor("proj_out.weight").to(model.dtype))


def test_an_encoder_that_was_trained_whole(make_tokenizer: Any, tmp_path: Path) -> None:
    """As ft trains it with ``stt.encoder: full``: an adapter on the decoder, the encoder among saved modules."""
    base = make_whisper(tmp_path / "base", make_tokenizer())
    run = write_speech_run(tmp_path / "run", base)
    without = r"(.*\.)?(model\.encoder)(\..*)?"
    add_speech_adapter(run / "adapter", base, modules_to_save=["model.encoder"], exclude_modules=without)
    made = merge(run)
    encoder = [name for name in Checkpoint(base) if name.startswith("model.encoder.")]
    assert (made.weights.merged, made.weights.replaced) == (4 * 3 + 2, len(encoder))
    assert set(Checkpoint(made.folder)) == set(Checkpoint(base))


def test_what_the_run_saved_of_its_processor_goes_along(make_tokenizer: Any, tmp_path: Path) -> None:
    """transformers 5 saves a processor as one file; engines read the feature extractor's own."""
    base = make_whisper(tmp_path / "base", make_tokenizer())
    adapter = add_speech_adapter(tmp_path / "adapter", base)
    processor = transformers.AutoProcessor.from_pretrained(base)
    processor.save_pretrained(adapter)
    assert not (adapter / "preprocessor_config.json").exists()
    (base / "preprocessor_config.json").unlink()
    made = merge(adapter)
    assert json.loads((made.folder / "preprocessor_config.json").read_text())["feature_size"] == 16
    assert "each of 4 texts was read with the sound of it: 0 of the rows' own, 4 made (4 for a row without audio)" in (
        made.lines
    )
    again = transformers.AutoProcessor.from_pretrained(made.folder)
    assert again.feature_extractor.chunk_length == 2


def test_a_base_without_a_feature_extractor_is_refused_before_the_merge(make_tokenizer: Any, tmp_path: Path) -> None:
    base = make_whisper(tmp_path / "base", make_tokenizer())
    add_speech_adapter(tmp_path / "adapter", base)
    (base / "preprocessor_config.json").unlink()
    with pytest.raises(ExportError, match="has no feature extractor that transformers loads"):
        merge(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "merged").exists()
    assert any(line.startswith("NOT PROVEN") for line in merge(tmp_path / "adapter", skip_proof=True).lines)


def test_a_whisper_that_is_not_the_trained_one_is_found(
    make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors are right, but the written configuration has other heads."""
    from ft_export.merging import outline

    base = make_whisper(tmp_path / "base", make_tokenizer())
    run = write_speech_run(tmp_path / "run", base)
    add_speech_adapter(run / "adapter", base)
    save = outline.Outline.save_config

    def other(self: Any, folder: Path, dtype: torch.dtype) -> None:
        self.config.encoder_attention_heads = 2
        save(self, folder, dtype)

    monkeypatch.setattr(outline.Outline, "save_config", other)
    with pytest.raises(ExportError, match="does not say what the adapter on its base says"):
        merge(run)
    assert not (run / "merged").exists()


def test_a_whisper_that_was_trained_in_4_bits_is_merged_into_the_whole_one(make_tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = make_whisper(tmp_path / "base", make_tokenizer())
    run = write_speech_run(tmp_path / "run", base, rows=2)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("none", "nf4"))
    add_speech_adapter(run / "adapter", base)
    made = merge(run)
    assert any("log-probabilities against the nf4 run: largest" in line for line in made.lines)


def test_a_run_trained_in_full_has_nothing_to_merge(make_tokenizer: Any, tmp_path: Path) -> None:
    base = make_whisper(tmp_path / "base", make_tokenizer())
    run = write_speech_run(tmp_path / "run", base)
    shutil.copytree(base, run / "model")
    with pytest.raises(ExportError, match="nothing is to be merged"):
        merge(run)


def test_qwen3_asr_is_merged_with_its_encoder_and_projector(make_tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers.models.qwen3_asr")
    base = make_qwen_asr(tmp_path / "base", make_tokenizer())
    run = write_speech_run(tmp_path / "run", base)
    add_speech_adapter(run / "adapter", base, modules_to_save=["multi_modal_projector"])
    made = merge(run)
    assert made.weights.replaced == 4
    assert made.weights.merged >= 2 * 4 + 2 * 4
    assert "each of 4 texts was read with the sound of it: 4 of the rows' own, none made" in made.lines
    assert set(Checkpoint(made.folder)) == set(Checkpoint(base))
    model, told = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(made.folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert type(model).__name__ == "Qwen3ASRForConditionalGeneration"


def test_csm_with_its_depth_decoder_trained_whole_keeps_its_codec(make_tokenizer: Any, tmp_path: Path) -> None:
    """As ft trains it with ``tts.csm.depth_decoder: full``; the codec of an fp32 base is not rounded with the rest."""
    base = make_csm(tmp_path / "base", make_tokenizer(), dtype="float32")
    run = write_speech_run(tmp_path / "run", base, "tts")
    parts = [*(f"model.layers.{number}" for number in range(2)), "model.norm", "model.inputs_embeds_projector"]
    whole = [*(f"depth_decoder.{part}" for part in parts), "depth_decoder.codebooks_head"]
    without = r"(.*\.)?(codec_model|depth_decoder)(\..*)?"
    add_speech_adapter(run / "adapter", base, exclude_modules=without, modules_to_save=whole)
    made = merge(run)
    assert made.weights.replaced == 2 * 9 + 3
    merged, was = Checkpoint(made.folder), Checkpoint(base)
    codec = [name for name in merged if name.startswith("codec_model.")]
    assert all(merged.tensor(name).equal(was.tensor(name)) for name in codec)
    assert merged.dtype("lm_head.weight") == torch.bfloat16


def test_csm_is_merged_with_its_depth_decoder(make_tokenizer: Any, tmp_path: Path) -> None:
    base = make_csm(tmp_path / "base", make_tokenizer())
    run = write_speech_run(tmp_path / "run", base, "tts")
    add_speech_adapter(
        run / "adapter", base, target_modules=r"(backbone_model|depth_decoder)\..*\.(q_proj|v_proj|up_proj)",
        modules_to_save=["embed_text_tokens"],
    )  # fmt: skip
    made = merge(run)
    assert (made.weights.merged, made.weights.replaced) == (4 * 3, 1)
    assert made.logprobs is not None
    assert made.logprobs.merged.tokens == 4 * 12 * 4
    assert any("read with codes after it, drawn by chance: 48 frames" in line for line in made.lines)
    assert set(Checkpoint(made.folder)) == set(Checkpoint(base))
    _, told = transformers.AutoModelForTextToWaveform.from_pretrained(made.folder, output_loading_info=True)
    assert not told["missing_keys"]
    # the end of its speech is a code: no token of a text is written into what it generates by
    assert "eos_token_id" not in json.loads((made.folder / "generation_config.json").read_text()) or (
        (base / "generation_config.json").read_text() == (made.folder / "generation_config.json").read_text()
    )


@pytest.mark.parametrize(
    ("how", "tied"),
    [("whole", True), ("whole", False), ("whole, tied", True), ("saved", True), ("low rank", False)],
)
def test_a_vocabulary_that_grew_is_merged(
    how: str, tied: bool, make_model: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base", "Llama", tie_word_embeddings=tied)
    run = grow(tmp_path, base, make_tokenizer(), how)
    made = merge(run)
    tokens = len(transformers.AutoTokenizer.from_pretrained(run / "adapter"))
    assert f"the vocabulary grew in training: the merged model has {tokens} tokens" in made.lines
    model, told = transformers.AutoModelForCausalLM.from_pretrained(made.folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert model.get_input_embeddings().weight.shape[0] == tokens == model.config.vocab_size
    assert len(transformers.AutoTokenizer.from_pretrained(made.folder)) == tokens
    assert model.config.tie_word_embeddings == (how in ("saved", "whole, tied"))
    # what says which codec the tokens belong to goes along, and an answer ends where the sound does
    assert (made.folder / "speech.json").read_text() == '{"codec": "mel"}'
    ends = json.loads((made.folder / "generation_config.json").read_text())["eos_token_id"]
    assert transformers.AutoTokenizer.from_pretrained(made.folder).convert_tokens_to_ids("<|speech_end|>") in ends


def test_a_vocabulary_that_grew_at_one_end_is_refused(make_model: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = grow(tmp_path, make_model(tmp_path / "base", "Llama"), make_tokenizer(), "whole")
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if "lm_head" not in name}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ExportError, match=r"and not lm_head.weight: train both as modules_to_save"):
        merge(run)


def test_features_of_both_recognisers(make_tokenizer: Any, tmp_path: Path) -> None:
    base = make_whisper(tmp_path / "base", make_tokenizer())
    extractor = transformers.AutoFeatureExtractor.from_pretrained(base)
    config = transformers.AutoConfig.from_pretrained(base)
    made = features_of(extractor, Sound(make_sound(0.5, 16_000), ""), config)
    assert {name: tuple(value.shape) for name, value in made.items()} == {"input_features": (1, 16, 200)}
