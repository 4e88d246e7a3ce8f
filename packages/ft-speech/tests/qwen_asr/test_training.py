"""`ft train` on a Qwen3-ASR, from a configuration to a whole run folder, and what plain transformers makes of it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_it_learns_to_tell_sounds_apart(
    configure: Any, ft: Any, sounds: Any, parts: Any, folder: Path, tmp_path: Path
) -> None:
    """And what was saved does so in plain transformers, by its own processor and `generate`."""
    training = {"max_steps": 65, "batch_size": 2, "learning_rate": 3.0e-3, "scheduler": "constant", "save_every": 1000}
    path = configure(rows=sounds(24, kinds=(0, 1, 3)), eval_split=6, lora=None, stt={"encoder": "full"},
                     training=training)  # fmt: skip
    made = ft("train", path)
    assert made.code == 0, made.err
    run = tmp_path / "run"
    found = json.loads((run / "evaluation.json").read_text())["metrics"]
    assert found["wer"]["after"] == found["cer"]["after"] == 0
    assert found["wer"]["before"] > 0.5
    # Of an answer's five tokens the word alone differs from row to row: who does not listen gets ln(3) / 5 at best.
    assert found["loss"]["after"] < 0.5 * math.log(3) / 5

    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

    model = AutoModelForSpeechSeq2Seq.from_pretrained(run / "model", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(run / "model")
    for kind, name in ((0, "low"), (1, "high"), (3, "noise")):
        given = processor.apply_transcription_request([parts.sound(kind, 99)])
        made_ids = model.generate(**given, max_new_tokens=20)[:, given["input_ids"].shape[1] :]
        assert processor.decode(made_ids, return_format="parsed") == [{"language": "English", "transcription": name}]
    # The rest of the three values are the same: an encoder that stayed as it was has not learnt it.
    before = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float32)
    conv = "model.audio_tower.conv2d1.weight"
    assert not torch.equal(before.get_parameter(conv), model.get_parameter(conv))


@pytest.mark.parametrize("encoder", [None, "lora", "full"])
def test_the_encoder_is_trained_as_the_configuration_says(
    encoder: str | None, configure: Any, ft: Any, folder: Path, tmp_path: Path
) -> None:
    made = ft("train", configure(stt={} if encoder is None else {"encoder": encoder}, training={"max_steps": 2}))
    assert made.code == 0, made.err
    from peft import PeftModel
    from transformers import AutoModelForSpeechSeq2Seq

    plain = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float32)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    after = PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter").merge_and_unload().state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    heard = {key for key in changed if "audio_tower" in key or "multi_modal_projector" in key}
    assert any("language_model" in key for key in changed)
    if encoder is None:
        assert not heard
    elif encoder == "lora":
        assert heard
        assert all(before[key].dim() == 2 for key in heard)
    else:
        assert any(before[key].dim() == 4 for key in heard)
        assert any("multi_modal_projector" in key for key in heard)


@pytest.mark.parametrize("tied", [False, True], ids=["", "a tied head"])
def test_trained_in_full_the_encoder_stays_unless_it_is_told(
    tied: bool, configure: Any, ft: Any, parts: Any, folder: Path, tmp_path: Path
) -> None:
    if tied:
        folder, tokenizer = tmp_path / "tied", parts.make_tokenizer()
        parts.make_model(tokenizer, tied=True).save_pretrained(folder)
        parts.make_processor(tokenizer).save_pretrained(folder)
    made = ft("train", configure(model=str(folder), lora=None, training={"max_steps": 2}))
    assert made.code == 0, made.err
    from transformers import AutoModelForSpeechSeq2Seq

    saved = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "run" / "model")
    assert (saved.lm_head.weight is saved.model.language_model.embed_tokens.weight) == tied
    before, after = (
        AutoModelForSpeechSeq2Seq.from_pretrained(one, dtype=torch.bfloat16).state_dict()
        for one in (folder, tmp_path / "run" / "model")
    )
    assert {key.split(".")[1] for key in before if not torch.equal(before[key], after[key])} == {
        "language_model", "weight",
    }  # fmt: skip


def test_a_run_that_was_stopped_goes_on_the_same(configure: Any, ft: Any, tmp_path: Path) -> None:
    common: dict[str, Any] = {"training": {"max_steps": 4, "save_every": 2}}
    assert ft("train", configure(**common, output=str(tmp_path / "whole"))).code == 0
    path = configure(**common)
    assert ft("train", path).code == 0
    run = tmp_path / "run"
    # As if it had been killed after the checkpoint of step 2.
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    shutil.rmtree(run / "adapter")
    (run / "summary.json").unlink()
    made = ft("train", path, "--resume")
    assert made.code == 0, made.err
    assert "going on from step 2" in made.err + made.out
    assert losses(run) == losses(tmp_path / "whole")


def test_training_rows_are_varied_and_others_are_not(configure: Any, ft: Any, tmp_path: Path) -> None:
    common: dict[str, Any] = {"training": {"max_steps": 1, "learning_rate": 1.0e-12}, "eval_split": 2}
    found: dict[str, Any] = {}
    for name, augment in (("plain", {}), ("noisy", {"noise": [0, 0]}), ("blanked", {"spec": True})):
        made = ft("train", configure(**common, stt={"augment": augment}, output=str(tmp_path / name)))
        assert made.code == 0, made.err
        metrics = json.loads((tmp_path / name / "evaluation.json").read_text())["metrics"]
        found[name] = (losses(tmp_path / name), metrics["loss"]["before"])
    assert len({tuple(trained) for trained, _ in found.values()}) == 3
    assert len({measured for _, measured in found.values()}) == 1


def test_batches_are_the_same_from_a_worker(configure: Any, ft: Any, tmp_path: Path) -> None:
    assert ft("train", configure(stt={"workers": 0}, training={"max_steps": 2})).code == 0
    path = configure(stt={"workers": 1}, training={"max_steps": 2}, output=str(tmp_path / "ahead"))
    made = ft("train", path)
    assert made.code == 0, made.err
    assert losses(tmp_path / "ahead") == losses(tmp_path / "run")


def test_packing_changes_no_loss(configure: Any, sounds: Any, ft: Any, tmp_path: Path) -> None:
    """All rows in one step: packed into few rows, each a row of its own."""
    rows = sounds(6, seconds=(0.4, 1.3, 2.2))
    common: dict[str, Any] = {"rows": rows, "lora": None, "training": {"max_steps": 1, "batch_size": 6}}
    assert ft("train", configure(**common)).code == 0
    assert ft("train", configure(**common, packing=False, output=str(tmp_path / "apart"))).code == 0
    packed, apart = losses(tmp_path / "run")[0], losses(tmp_path / "apart")[0]
    # The forward pass is in bfloat16: 8 bits, and the mean of a loss near 6 over some 60 tokens.
    assert abs(packed - apart) < 2.0**-8 * packed


def test_the_fast_layers_train_alike(configure: Any, ft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with the references in the kernels' places: the losses are those of transformers' own layers."""
    import dataclasses

    from ft_core.models import device, loading
    from ft_core.training import run, speed

    pick = device.pick_device
    for module in (run, loading):
        monkeypatch.setattr(module, "pick_device", lambda: dataclasses.replace(pick(), dtype="float32"))
    found = []
    for kernels in (False, True):
        monkeypatch.setattr(speed, "runs_kernels", lambda device, kernels=kernels: kernels)
        output = str(tmp_path / f"run-{kernels}")
        steps = {"max_steps": 3, "batch_size": 2, "learning_rate": 1.0e-2}
        made = ft("train", configure(output=output, training=steps))
        assert made.code == 0, made.err
        said = made.out + made.err
        assert ("fast layers: checked against transformers' own" in said) == kernels
        assert ("tokens with recordings" in said) == kernels
        found.append(losses(Path(output)))
    # Rounding in float32, which AdamW's first steps, by the signs of gradients, carry on.
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_it_is_verified(ft: Any, folder: Path) -> None:
    made = ft("verify", folder, "--dtype", "float32", "--batches", "1", "--tokens", "24")
    assert made.code == 0, made.err
    assert "qwen3_asr" in made.out + made.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stt": {"encoder": "half"}}, "stt.encoder: 'half' is not allowed (allowed: frozen, lora, full"),
        ({"stt": {"encoder": "lora"}, "lora": None}, "stt.encoder: lora needs lora"),
        ({"stt": {"encoder": "full"}, "quantization": "nf4"}, "stt.encoder: full needs quantization: none"),
        ({"stt": {"task": "translate"}}, "stt.task: translate: Qwen3-ASR writes in the language that it hears"),
        ({"stt": {"timestamps": True}}, "stt.timestamps: true: Qwen3-ASR writes no times"),
        ({"stt": {"trim_silence": 40}}, "stt.trim_silence: Qwen3-ASR's tokens are counted"),
        ({"stt": {"augment": {"speed": [0.9, 1.1]}}}, "stt.augment.speed: Qwen3-ASR's tokens are counted"),
        ({"stt": {"language": "Klingon"}}, "stt.language: 'Klingon' is not known"),
        ({"max_length": 20}, "none of 12 train rows can be trained on: 12 longer than max_length 20"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, Any], message: str, configure: Any, ft: Any) -> None:
    made = ft("train", configure(**changes))
    assert made.code == 2
    assert message in made.message


def test_bad_recordings_stop_or_are_counted(configure: Any, ft: Any, sounds: Any, tmp_path: Path) -> None:
    rows = sounds(6)
    (tmp_path / "sounds" / "1.wav").write_bytes((tmp_path / "sounds" / "1.wav").read_bytes()[:900])
    made = ft("train", configure(rows=rows))
    assert made.code == 2
    assert "row 2: " in made.message
    assert "1.wav: is cut short" in made.message
    assert "stt.on_bad_audio: skip leaves such rows out" in made.message
    made = ft("train", configure(rows=rows, stt={"on_bad_audio": "skip"}, training={"max_steps": 1}), "--overwrite")
    assert made.code == 0, made.err
    data = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]
    assert (data["bad_audio_rows"], data["audio_seconds"]) == (1, 3)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["left_out_rows"] == [1]


def test_what_is_measured_is_what_transformers_would(
    configure: Any, ft: Any, sounds: Any, folder: Path, tmp_path: Path
) -> None:
    """On held-out rows of several lengths, one of which cannot be heard, one of which is a stretch."""
    rows = sounds(5, seconds=(0.4, 1.3, 0.6))
    rows[3] |= {"start": 0.1, "end": 0.35}
    (tmp_path / "sounds" / "1.wav").write_bytes(b"no sound")
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = configure(rows=[rows[0]], eval_data=str(held_out), stt={"on_bad_audio": "skip", "normalizer": "none"},
                     training={"max_steps": 1})  # fmt: skip
    made = ft("train", path)
    assert made.code == 0, made.err
    measured = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (measured["rows"], measured["answers"]) == (4, 4)
    # Said once, though measured before the training and after it; and by a measurement alone.
    assert (made.out + made.err).count("left out: held-out row 2: ") == 1
    again = ft("eval", tmp_path / "run", "--data", held_out)
    assert again.code == 0, again.err
    assert again.err.count("left out: held-out row 2: ") == 1
    assert [one["prompt"] for one in measured["samples"]][2] == "[3.wav] from 0.1 s to 0.35 s"

    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

    from ft_speech import read_audio

    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.bfloat16).eval()
    processor = AutoProcessor.from_pretrained(folder)
    losses_of, count = 0.0, 0
    for row in (rows[0], *rows[2:]):
        samples, _ = read_audio(tmp_path / row["audio"], start=row.get("start", 0.0), end=row.get("end"))
        given = processor.apply_transcription_request([samples])
        said = processor.tokenizer(f"language English<asr_text>{row['text']}<|im_end|>", return_tensors="pt")
        ids = torch.cat([given["input_ids"], said["input_ids"]], dim=1)
        labels = torch.where(torch.arange(ids.shape[1]) < given["input_ids"].shape[1], -100, ids)
        given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        given["input_features"] = given["input_features"].bfloat16()
        with torch.no_grad():
            number = said["input_ids"].shape[1]
            losses_of, count = losses_of + float(model(**given).loss) * number, count + number
    # Both in bfloat16; the logits of other positions are left out in one, so that sums may be of another order.
    assert measured["metrics"]["loss"]["before"] == pytest.approx(losses_of / count, rel=2.0**-8)


def test_a_recording_that_changed_since_it_was_counted_stops_the_run(
    configure: Any, ft: Any, sounds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ft_speech.qwen_asr import family

    own = family.dataset

    def dataset(job: Any, rows: Any, name: str) -> Any:
        made = own(job, rows, name)
        soundfile.write(tmp_path / "sounds" / "0.wav", np.zeros(48_000), 16_000)
        return made

    monkeypatch.setattr(family, "dataset", dataset)
    made = ft("train", configure(rows=sounds(1), training={"max_steps": 1}))
    assert made.code == 2
    assert "0.wav: has 3.00 s, and had 0.60 s" in made.message


def test_a_transformers_without_the_family_is_named(configure: Any, ft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    monkeypatch.delitem(CONFIG_MAPPING._mapping, "qwen3_asr")
    monkeypatch.setattr(transformers, "__version__", "5.1.0")
    made = ft("train", configure())
    assert made.code == 2
    assert "is a qwen3_asr, which transformers 5.1.0 does not know" in made.message
