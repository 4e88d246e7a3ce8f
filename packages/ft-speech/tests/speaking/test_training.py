"""A language model that learns to speak: what is trained, measured, saved and loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from songs import WORDS, Outcome, Songs, sung

from ft_core.errors import ConfigError, DataError
from ft_core.evaluation import evaluate
from ft_core.training import train
from ft_speech import write_audio
from ft_speech.codecs import load_codec
from ft_speech.silence import sounding
from ft_speech.speaking.distortion import mel_cepstral_distortion
from ft_speech.speaking.recordings import key_of, read_recording
from ft_speech.speaking.speaker import open_speaker, speak


def test_what_was_heard_is_sung(singer: Path) -> None:
    """Texts sound like their own recordings: of twelve, six or more are nearest to theirs and about as long, which
    chance gives in 2 of 10,000 cases. Of texts that were held out the loss and the distortion fall; how they are
    understood is measured by the slow proof."""
    texts = [*WORDS, *(f"{one} {two}" for one in WORDS for two in WORDS)]
    speaker = open_speaker(str(singer))
    spoken = [speak(speaker, text, voice="ann", temperature=0.0)[0] for text in texts]
    right = 0
    for number, one in enumerate(spoken):
        distances = [mel_cepstral_distortion(one, sung(text), 16_000) for text in texts]
        right += int(np.argmin(distances)) == number and 0.7 < len(one) / len(sung(texts[number])) < 1.4
    assert right >= 6, right
    result = json.loads((singer / "evaluation.json").read_text())["metrics"]
    assert result["loss"]["after"] < result["loss"]["before"] / 2
    assert result["mcd"]["after"] < result["mcd"]["before"]


@pytest.mark.parametrize("base", ["base", "tied"])
def test_an_adapter_holds_its_new_tokens(base: str, songs: Songs, tmp_path: Path) -> None:
    """Measured again after loading, it has the loss that it had when it was saved; plain PEFT loads it too."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = train(songs.config(tmp_path / "run", lora={"r": 4}, model=str(getattr(songs, base))), say=print).run
    saved = json.loads((run / "evaluation.json").read_text())["metrics"]["loss"]["after"]
    again = evaluate(str(run))["metrics"]["loss"]["after"]
    assert again == pytest.approx(saved, rel=1e-3)  # weights of bfloat16 in both
    assert saved < json.loads((run / "evaluation.json").read_text())["metrics"]["loss"]["before"]
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(getattr(songs, base), dtype=torch.float32)
    plain.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    adapted = PeftModel.from_pretrained(plain, run / "adapter").merge_and_unload()
    speaker = open_speaker(str(run))
    ids = torch.tensor([[1, *speaker.processor.tokens.place(0)[:5]]])  # type: ignore[attr-defined]
    with torch.inference_mode():
        own = speaker.model(input_ids=ids).logits.float()  # type: ignore[attr-defined]
        assert adapted(input_ids=ids).logits == pytest.approx(own.numpy(), abs=0.05)


def test_bad_recordings(songs: Songs, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in songs.train.read_text().splitlines()]
    for row in rows:
        row["audio"] = str(songs.folder / row["audio"])
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    rows[2]["audio"] = str(tmp_path / "broken.wav")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = songs.config(tmp_path / "run", data=str(data))
    with pytest.raises(DataError, match=r"row 3: .*broken.wav.* \(tts.on_bad_audio: skip leaves such rows out\)"):
        train(values, say=lambda line: None)
    assert not (tmp_path / "run").exists()
    lines: list[str] = []
    values["tts"] = {**values["tts"], "on_bad_audio": "skip", "max_seconds": 0.5}
    run = train(values, say=lines.append).run
    assert any(line.startswith("left out: train row 3: ") for line in lines)
    assert any("with more than 0.5 s of sound (tts.max_seconds)" in line for line in lines)
    counts = json.loads((run / "summary.json").read_text())["data"]
    assert counts["bad_audio_rows"] == 1
    assert counts["trained_tokens"] < counts["train_tokens"]
    lines.clear()
    evaluate(str(run), data=str(data), answers=0, say=lines.append)
    assert sum(line.startswith("left out: held-out row 3: ") for line in lines) == 1


def test_what_is_trimmed_is_not_kept(tmp_path: Path) -> None:
    """Neither the silence nor its memory; and stretches of one file are told apart."""
    path = tmp_path / "a.wav"
    tone = np.sin(np.arange(16_000) / 5).astype(np.float32) / 2
    write_audio(path, np.concatenate([np.zeros(160_000, np.float32), tone]), 16_000)
    samples = read_recording({"audio": str(path)}, 16_000, 40.0).samples
    assert 16_000 <= len(samples) < 20_000
    assert samples.base is None
    assert key_of({"audio": "a", "start": 1.0}) != key_of({"audio": "a", "start": 2.0}) != key_of({"audio": "a"})


def test_the_codec_must_be_named(songs: Songs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tts\.codec_model: give the folder or the Hub name of the codec snac's"):
        train(songs.config(tmp_path / "run", tts={}), say=lambda line: None)
    with pytest.raises(DataError, match="longer than max_length 8"):
        train(songs.config(tmp_path / "run", max_length=8), say=lambda line: None)


def test_a_recogniser_hears_what_is_spoken(singer: Path, songs: Songs, ft: Callable[..., Outcome]) -> None:
    """A tiny Whisper of random weights understands nothing, and says so in figures."""
    import yaml
    from tiny_whisper import make_whisper

    whisper = make_whisper(songs.folder / "whisper", width=32)
    config = yaml.safe_load((singer / "config.yaml").read_text())
    config["tts"] |= {"recogniser": str(whisper), "language": "en"}
    (singer / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = evaluate(str(singer), answers=2)["metrics"]
    assert metrics["wer"]["after"] >= 0.5
    assert metrics["mcd"]["after"] > 0


def test_silence_is_trimmed_and_clipped_recordings_counted(songs: Songs, tmp_path: Path) -> None:
    """Each recording is given half a second of silence at both ends, and one is cut off at a quarter of its peak."""
    rows = [json.loads(line) for line in songs.train.read_text().splitlines()][:8]
    whole = trimmed = 0
    rate = 16_000
    for number, row in enumerate(rows):
        audio = np.concatenate([np.zeros(rate // 2), sung(row["text"]), np.zeros(rate // 2)]).astype(np.float32)
        if number == 3:
            audio = np.clip(audio, -np.abs(audio).max() / 4, np.abs(audio).max() / 4)
        row["audio"] = str(tmp_path / f"{number}.wav")
        write_audio(row["audio"], audio, rate, subtype="FLOAT")
        first, last = sounding(audio, rate, threshold_db=30) or (0, 0)
        whole += len(audio)
        trimmed += last - first + 2 * round(0.05 * rate)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = {}
    for decibels in (None, 30):
        tts = {"codec": "mel", "codec_model": str(songs.codec), "trim_silence": decibels}
        lines: list[str] = []
        values = songs.config(tmp_path / f"run-{decibels}", data=str(data), tts=tts, max_length=512)
        run = train(values, say=lines.append).run
        counts[decibels] = json.loads((run / "summary.json").read_text())["data"]
        assert lines.count("clipped: 1 train recording cut off at the peaks, which the model learns too") == 1
        assert counts[decibels]["clipped_recordings"] == 1
    # The codec gives a token for each of its codebooks and frame; a recording may be a frame off.
    codec = load_codec("mel", str(songs.codec))
    books, frame = len(codec.layout.sizes), codec.frame_samples
    fewer = counts[None]["trained_tokens"] - counts[30]["trained_tokens"]
    assert abs(fewer - (whole - trimmed) / frame * books) <= len(rows) * books
