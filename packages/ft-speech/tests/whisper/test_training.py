"""`ft train` with Whisper, from a configuration to a whole run folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch


def steps(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in steps(run)]


def test_it_learns_words_and_the_run_is_whole(configure: Any, ft: Any, words: Any, tmp_path: Path) -> None:
    path = configure(
        rows=words(64),
        eval_split=8,
        training={"max_steps": 120, "batch_size": 8, "learning_rate": 5.0e-3, "save_every": 1000},
    )
    made = ft("train", path)  # without task: the model tells it, and the section does
    assert made.code == 0, made.err
    run = tmp_path / "run"
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert list(evaluation["metrics"]) == ["wer", "cer", "loss"]
    # Four words, one or two at a time: who does not listen and always says the likeliest one has at most a third of
    # them right.
    assert evaluation["metrics"]["wer"]["before"] > 0.9
    assert evaluation["metrics"]["wer"]["after"] < 0.5
    assert evaluation["answers"] == len(evaluation["samples"]) == 8
    assert evaluation["samples"][0]["prompt"].startswith("[0-")
    assert evaluation["compared"] == {"normalizer": "auto"}
    assert {"config.yaml", "environment.json", "summary.json", "report.html", "held_out.jsonl", "model"} <= {
        file.name for file in run.iterdir()
    }
    summary = json.loads((run / "summary.json").read_text())
    assert summary["data"]["train_rows"] == 56
    # 56 recordings of 0.4 or 0.8 s
    assert 22 <= summary["data"]["audio_seconds"] <= 45
    assert summary["tokens"] == steps(run)[-1]["tokens"] > 0

    # plain transformers loads it, and hears what it learnt
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from ft_speech import read_audio

    plain = WhisperForConditionalGeneration.from_pretrained(run / "model", dtype=torch.float32)
    processor = WhisperProcessor.from_pretrained(run / "model")
    assert plain.generation_config.eos_token_id == 256
    held_out = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    heard = [read_audio(row["audio"])[0] for row in held_out]
    features = processor(heard, sampling_rate=16_000, return_tensors="pt").input_features
    ids = plain.generate(features, language="en", task="transcribe", max_new_tokens=30)
    said = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    after = {one["expected"]: one["after"] for one in evaluation["samples"]}
    # bfloat16 there, float32 here: most are the same to the letter
    assert sum(after[row["text"]] == text for row, text in zip(held_out, said, strict=True)) >= 5

    # `ft eval` measures the same again
    measured = ft("eval", run, "--json")
    assert measured.code == 0, measured.err
    metrics = json.loads(measured.out[measured.out.index("{") :])["metrics"]
    assert metrics["wer"]["before"] == pytest.approx(evaluation["metrics"]["wer"]["before"])
    assert metrics["wer"]["after"] < 0.5


@pytest.mark.parametrize("encoder", ["frozen", "lora", "full", None])
def test_each_half_is_trained_as_the_configuration_says(
    encoder: str | None, configure: Any, ft: Any, tmp_path: Path, whisper: Path
) -> None:
    made = ft("train", configure(lora={"r": 4}, stt={} if encoder is None else {"encoder": encoder}))
    assert made.code == 0, made.err
    from peft import PeftModel
    from transformers import WhisperForConditionalGeneration

    plain = WhisperForConditionalGeneration.from_pretrained(whisper, dtype=torch.float32)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    after = PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter").merge_and_unload().state_dict()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert any(".decoder." in key for key in changed)
    heard = [key for key in changed if ".encoder." in key]
    assert bool(heard) == (encoder != "frozen")
    if encoder == "full":
        assert "model.encoder.conv1.weight" in changed
    else:
        assert all(before[key].dim() == 2 for key in changed)
    assert ft("eval", tmp_path / "run", "--data", tmp_path / "rows.jsonl", "--limit", 2).code == 0


def test_a_frozen_encoder_of_a_training_in_full(configure: Any, ft: Any, tmp_path: Path, whisper: Path) -> None:
    made = ft("train", configure(stt={"encoder": "frozen"}))
    assert made.code == 0, made.err
    from transformers import WhisperForConditionalGeneration

    before, after = (
        WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
        for folder in (whisper, tmp_path / "run" / "model")
    )
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed
    assert not [key for key in changed if ".encoder." in key]


def test_a_quantized_model_under_an_adapter(configure: Any, ft: Any, tmp_path: Path) -> None:
    made = ft("train", configure(lora={"r": 4}, quantization="nf4", eval_split=2))
    assert made.code == 0, made.err
    assert len(losses(tmp_path / "run")) == 2


def test_a_run_that_was_stopped_goes_on_the_same(configure: Any, ft: Any, tmp_path: Path) -> None:
    training = {"max_steps": 4, "save_every": 2}
    assert ft("train", configure(training=training, output=str(tmp_path / "whole"))).code == 0
    path = configure(training=training)
    assert ft("train", path).code == 0
    run = tmp_path / "run"
    # As if it had been killed after the checkpoint of step 2.
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    shutil.rmtree(run / "model")
    (run / "summary.json").unlink()
    made = ft("train", path, "--resume")
    assert made.code == 0, made.err
    assert "going on from step 2" in made.out + made.err
    assert losses(run) == losses(tmp_path / "whole")


def test_accumulated_batches_weigh_tokens_alike(configure: Any, ft: Any, tmp_path: Path, words: Any) -> None:
    """One step of four rows, and the same in two micro-batches of unequal lengths: one loss and one gradient."""
    rows = words(4)
    for name, batch, parts in (("one", 4, 1), ("two", 2, 2)):
        training = {"max_steps": 1, "batch_size": batch, "gradient_accumulation": parts}
        assert ft("train", configure(rows=rows, training=training, output=str(tmp_path / name))).code == 0
    one, two = steps(tmp_path / "one")[0], steps(tmp_path / "two")[0]
    assert one["tokens"] == two["tokens"]
    # bfloat16's products: sums of another order, 2^-8 of each term at most
    assert two["loss"] == pytest.approx(one["loss"], rel=2**-8)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=2**-5)


def test_batches_are_made_by_workers_and_varied(configure: Any, ft: Any, tmp_path: Path) -> None:
    stt = {"workers": 1, "augment": {"spec": True, "noise": [5, 20], "speed": [0.9, 1.1]}}
    made = ft("train", configure(stt=stt, eval_split=2))
    assert made.code == 0, made.err
    assert len(losses(tmp_path / "run")) == 2


def test_on_the_fast_layers(configure: Any, ft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU too the fast layers compute the same, by their kernels' references, when they are told to be there."""
    from ft_core.training import speed

    common: dict[str, Any] = {"lora": {"r": 4}, "training": {"max_steps": 3}}
    assert ft("train", configure(**common, output=str(tmp_path / "plain"))).code == 0
    monkeypatch.setattr(speed, "runs_kernels", lambda device: True)
    made = ft("train", configure(**common, activations="recompute", output=str(tmp_path / "fast")))
    assert made.code == 0, made.err
    assert "slower than need be" not in made.out + made.err
    assert "the longest batch fits: " in made.out + made.err
    # Adapters begin at zero, and three steps of bfloat16 add up in another order: 2^-7 of a loss of about seven.
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "plain"), rel=2**-7)
