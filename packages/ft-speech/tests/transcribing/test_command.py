"""``ft transcribe``, called in this process with a tiny Whisper whose text is known."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile

RATE = 16_000
SAID = "<|0.10|> Hallo,<|0.40|><|0.40|> Welt.<|0.80|>"


@pytest.fixture
def plain(parrot: Any, tmp_path: Path) -> Path:
    """A model that says this where no times are asked for."""
    parrot.says(" Hallo, Welt.")
    return parrot.save(tmp_path / "models" / "plain")


@pytest.fixture
def timed(parrot: Any, tmp_path: Path) -> Path:
    """A model that says it where they are."""
    parrot.recogniser._plain.generation_config.alignment_heads = [[0, 0]]
    parrot.says(SAID, timed=True)
    return parrot.save(tmp_path / "models" / "timed")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_is_said_is_printed_and_faults_are_named(ft: Any, plain: Path, recordings: Path) -> None:
    found = ft("transcribe", plain, recordings / "a.wav")
    assert (found.code, found.out) == (0, "Hallo, Welt.\n")
    assert "1/1 files  1/1 s of audio" in found.err
    missing = recordings / "missing.wav"
    found = ft("transcribe", plain, recordings, missing)
    assert found.code == 2
    assert found.out == f"{recordings}/a.wav: Hallo, Welt.\n{recordings}/more/b.flac: Hallo, Welt.\n"
    faults = [line for line in found.err.splitlines() if line.startswith("ft transcribe: ")]
    assert faults == [
        f"ft transcribe: {recordings}/damaged.wav: is no readable wav, flac, ogg or mp3 file",
        f"ft transcribe: {recordings}/empty.mp3: is empty",
        f"ft transcribe: {missing}: cannot be read: No such file or directory",
    ]


def test_times_and_subtitles(ft: Any, timed: Path, recordings: Path) -> None:
    one = recordings / "a.wav"
    lines = "[00:00:00.100 --> 00:00:00.400] Hallo,\n[00:00:00.400 --> 00:00:00.800] Welt.\n"
    assert ft("transcribe", timed, one, "--timestamps", "segment").out == lines
    assert ft("transcribe", timed, one, "--format", "srt").out.startswith(
        "1\n00:00:00,100 --> 00:00:00,400\nHallo,\n\n2\n"
    )
    row = json.loads(ft("transcribe", timed, one, "--json", "--language", "German").out)
    assert row == {
        "audio": str(one), "seconds": 1.0, "language": "de", "task": "transcribe", "text": "Hallo, Welt.",
        "segments": [{"start": 0.1, "end": 0.4, "text": "Hallo,"}, {"start": 0.4, "end": 0.8, "text": "Welt."}],
    }  # fmt: skip
    words = json.loads(ft("transcribe", timed, one, "--json", "--timestamps", "word").out)["segments"]
    assert [[word["text"] for word in segment["words"]] for segment in words] == [["Hallo,"], ["Welt."]]


def test_several_files_as_json(ft: Any, timed: Path, recordings: Path, tmp_path: Path) -> None:
    found = ft("transcribe", timed, recordings, "--json")
    assert found.code == 2
    assert [Path(row["audio"]).name for row in json.loads(found.out)] == ["a.wav", "b.flac"]
    out = tmp_path / "rows.jsonl"
    found = ft("transcribe", timed, recordings, "--out", out)
    assert (found.code, found.out) == (2, f"2 transcripts of 4 in {out}\n")
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == ["Hallo, Welt."] * 2
    # A list stays one, however many files could be used.
    found = ft("transcribe", timed, recordings / "a.wav", recordings / "empty.mp3", "--json")
    assert len(json.loads(found.out)) == 1


def test_a_folder_of_transcripts_is_gone_on_with(ft: Any, plain: Path, recordings: Path, tmp_path: Path) -> None:
    for bad in ("damaged.wav", "empty.mp3"):
        (recordings / bad).unlink()
    out = tmp_path / "out"
    (out / "more").mkdir(parents=True)
    (out / "more" / "b.txt").write_text("mine\n")
    found = ft("transcribe", plain, recordings, "--out", out)
    assert (found.code, found.out) == (0, f"2 transcripts in {out}\n")
    assert "1 of 2 files are there already (--overwrite writes them anew)" in found.err
    assert (out / "more" / "b.txt").read_text() == "mine\n"
    assert (out / "a.txt").read_text() == "Hallo, Welt.\n"
    assert ft("transcribe", plain, recordings, "--out", out, "--overwrite").code == 0
    assert (out / "more" / "b.txt").read_text() == "Hallo, Welt.\n"
    assert files(out) == ["a.txt", "more/b.txt"]


def test_a_file_is_never_overwritten_unasked(ft: Any, plain: Path, recordings: Path, tmp_path: Path) -> None:
    out = tmp_path / "said.txt"
    out.write_text("mine\n")
    found = ft("transcribe", plain, recordings / "a.wav", "--out", out)
    assert (found.code, found.err) == (
        2, f"ft transcribe: {out} is there already: give another --out, or --overwrite\n"
    )  # fmt: skip
    assert out.read_text() == "mine\n"
    assert ft("transcribe", plain, recordings / "a.wav", "--out", out, "--overwrite").code == 0
    assert out.read_text() == "Hallo, Welt.\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--overwrite"], "--overwrite is of --out, which is not given"),
        (["--json", "--format", "srt"], "--json is --format json, and --format is srt"),
        (["--out", "a.txt", "--format", "srt"], "--out a.txt ends in .txt, and --format is srt"),
        (["--format", "srt", "--timestamps", "none"], "srt is nothing without times (allowed: segment, word)"),
        (["--format", "vtt"], "4 files: a .vtt holds one, so give --out a folder"),
        (["--out", "nowhere/a.txt"], "no folder nowhere to write a.txt to"),
        (["--batch-size", "0"], "'0' is not allowed (allowed: a whole number from 1)"),
        (["--language", "Klingon"], "language: 'Klingon' is none of the 3 that"),
        (["--timestamps", "word"], "alignment_heads"),
        (["--max-new-tokens", "99"], "max_new_tokens: 99 (allowed: 1 to 60"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    ft: Any, plain: Path, recordings: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recordings)
    before = files(recordings)
    found = ft("transcribe", plain, ".", *words)
    assert found.code == 2
    assert said in found.err.splitlines()[-1]
    assert (found.out, files(recordings)) == ("", before)


def test_two_transcripts_of_one_name(ft: Any, plain: Path, recordings: Path, tmp_path: Path) -> None:
    shutil.copy(recordings / "a.wav", recordings / "a.flac")
    found = ft("transcribe", plain, recordings, "--out", tmp_path / "out")
    assert found.code == 2
    assert f"would both be written to {tmp_path}/out/a.txt: give them in two commands" in found.err
    assert not (tmp_path / "out").exists()


def test_nothing_to_hear(ft: Any, plain: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    found = ft("transcribe", plain, empty)
    assert found.code == 2
    assert found.err.startswith(f"ft transcribe: {empty}: holds no audio (files that end in .flac, .mp3")
    found = ft("transcribe", tmp_path / "model", empty)
    assert "no run or model folder" in found.err


@pytest.mark.parametrize("out", ["out", "out.jsonl", "out.txt"])
def test_an_interruption_leaves_whole_files(
    ft: Any, plain: Path, noise: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    from ft_speech.whisper.transcribing import WhisperRecogniser

    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(6):
        soundfile.write(folder / f"{number}.wav", noise(1.0), RATE)
    own, calls = WhisperRecogniser.transcribe, []

    def transcribe(self: Any, samples: Any, **options: Any) -> Any:
        calls.append(len(samples))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(self, samples, **options)

    monkeypatch.setattr(WhisperRecogniser, "transcribe", transcribe)
    found = ft("transcribe", plain, folder, "--out", tmp_path / out, "--batch-size", "1", "--timestamps", "none")
    assert found.code == 130
    assert calls == [4, 2]  # four windows at a time
    written = tmp_path / out
    if written.is_dir():
        assert files(written) == ["0.txt", "1.txt", "2.txt", "3.txt"]
        assert {path.read_text() for path in written.iterdir()} == {"Hallo, Welt.\n"}
        monkeypatch.setattr(WhisperRecogniser, "transcribe", own)
        found = ft("transcribe", plain, folder, "--out", written)
        assert (found.code, len(files(written))) == (0, 6)
    else:
        assert len(written.read_text().splitlines()) == 4
        assert f"4 transcripts of 6 in {written}" in found.out
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".partial")]


def test_a_full_disk_is_one_line_and_leaves_nothing_half(
    ft: Any, plain: Path, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "fsync", full)
    found = ft("transcribe", plain, recordings / "a.wav", "--out", tmp_path / "out")
    assert found.code == 2
    assert found.err.splitlines()[-1] == f"ft transcribe: cannot write {tmp_path}/out/a.txt: No space left on device"
    assert files(tmp_path / "out") == []


def test_a_text_that_is_cut_off_is_said(ft: Any, plain: Path, recordings: Path) -> None:
    found = ft("transcribe", plain, recordings / "a.wav", "--max-new-tokens", "6")
    assert (found.code, found.out) == (0, "Hallo\n")
    assert (
        f"{recordings}/a.wav: 1 of its windows have text that was cut off after 6 tokens (--max-new-tokens)"
        in found.err
    )


def test_the_readme_runs(
    ft: Any, timed: Path, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The section's commands and its example, with other models and recordings under the names that it uses."""
    monkeypatch.chdir(tmp_path)
    for bad in ("damaged.wav", "empty.mp3"):
        (recordings / bad).unlink()
    soundfile.write("talk.mp3", soundfile.read(recordings / "a.wav")[0], RATE)
    shutil.copytree(timed, "runs/names")
    section = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").partition("## Writing down")[2]
    (commands,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    for line in commands.splitlines():
        words = shlex.split(line.partition("#")[0])
        assert words[0] == "ft"
        found = ft(*(str(timed) if word == "openai/whisper-base" else word for word in words[1:]))
        assert found.code == 0, (line, found.err)
    assert files(tmp_path / "subtitles") == ["a.srt", "more/b.srt"]
    (example,) = re.findall(r"```py\n(.*?)```", section, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})  # noqa: S102
    assert "de Hallo, Welt." in capsys.readouterr().out
    assert set(re.findall(r"`(--[a-z-]+)`", section)) >= {
        option for option in re.findall(r"--[a-z-]+", ft("transcribe", "--help").out) if option != "--help"
    }


def test_what_was_written_down_can_be_trained_on(ft: Any, timed: Path, recordings: Path, tmp_path: Path) -> None:
    rows = pytest.importorskip("ft_speech.listening.rows")
    ft("transcribe", timed, recordings, "--out", tmp_path / "said.jsonl")
    from ft_core.data.formats import FORMATS

    for line in (tmp_path / "said.jsonl").read_text().splitlines():
        row = json.loads(line)
        normal = rows.normalise(rows.as_transcription(row), FORMATS["text"], tmp_path)
        assert {key: normal[key] for key in ("audio", "text", "language", "task")} == {
            key: row[key] for key in ("audio", "text", "language", "task")
        }
        assert [dict(one) for one in normal["segments"]] == row["segments"]


def trained(ft: Any, tiny: Path, recordings: Path, folder: Path, **changes: Any) -> Path:
    """A run of `ft train` that teaches the tiny model to write ``ja`` for a recording."""
    pytest.importorskip("ft_speech.whisper.family")
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"audio": str(recordings / "a.wav"), "text": "ja", "language": "de"}) + "\n")
    training = {"max_steps": 40, "batch_size": 1, "gradient_accumulation": 1, "learning_rate": 5e-3}
    config = {"model": str(tiny), "data": str(rows), "output": str(folder / "run"), "task": "stt", "verify": "off"}
    (folder / "config.yaml").write_text(json.dumps({**config, "training": training, **changes}))
    found = ft("train", folder / "config.yaml")
    assert found.code == 0, found.err
    return folder / "run"


def test_a_run_of_a_whole_model_writes_what_it_learnt(ft: Any, tiny: Path, recordings: Path, tmp_path: Path) -> None:
    run = trained(ft, tiny, recordings, tmp_path, lora=None)
    found = ft("transcribe", run, recordings / "a.wav", "--language", "de")
    assert (found.code, found.out) == (0, "ja\n")
    assert ft("transcribe", tiny, recordings / "a.wav", "--language", "de", "--max-new-tokens", 8).out != "ja\n"


def test_a_run_of_an_adapter_hears_with_it(ft: Any, tiny: Path, recordings: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel

    from ft_speech.listening.recogniser import open_recogniser

    few = {"max_steps": 5, "batch_size": 1, "gradient_accumulation": 1, "learning_rate": 1e-2}
    run = trained(ft, tiny, recordings, tmp_path, lora={"r": 8, "alpha": 64}, training=few)
    assert ft("transcribe", run, recordings / "a.wav", "--language", "de", "--max-new-tokens", 8).code == 0

    def scores(model: Any) -> Any:
        features = torch.randn(1, 80, 200, generator=torch.Generator().manual_seed(0), dtype=model.dtype)
        with torch.inference_mode():
            return model(input_features=features, decoder_input_ids=torch.tensor([[257, 259, 262]])).logits.float()

    hear = open_recogniser(str(run))
    base: Any = open_recogniser(str(tiny))
    before = scores(base._plain)
    merged = PeftModel.from_pretrained(base._plain, run / "adapter").merge_and_unload()
    # A CPU with bfloat16 computes in it: eight bits, through two layers.
    within = 1e-4 if merged.dtype == torch.float32 else 0.05
    assert (scores(hear._plain) - scores(merged)).abs().max() < within  # type: ignore[attr-defined]
    assert (before - scores(merged)).abs().max() > 4 * within
