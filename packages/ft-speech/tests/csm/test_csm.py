"""A CSM from its configuration to speech: what it is trained on, how, and what is saved of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from ft_core.errors import DataError
from ft_speech.csm.collating import CsmCollator, codes_in, inputs_of, keep_some, packs
from ft_speech.csm.documents import CODES, END, KINDS, SPOKEN, TEXT, Document, turn
from ft_speech.csm.settings import CsmSettings
from ft_speech.csm.speaking import frames
from ft_speech.csm.turns import number_speakers, speaker_of, text_ids


def losses(run: Path, name: str = "loss") -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def loaded(csm: Path) -> Any:
    from transformers import AutoProcessor, CsmForConditionalGeneration

    return CsmForConditionalGeneration.from_pretrained(csm).eval(), AutoProcessor.from_pretrained(csm)


def feature(document: Document) -> dict[str, Any]:
    return {"input_ids": document.ids, KINDS: document.kinds, CODES: document.codes.reshape(-1).tolist()}


def a_document(loaded: Any, text: str, samples: np.ndarray) -> Document:
    model, processor = loaded
    codes = model.codec_model.encode(torch.from_numpy(samples)[None, None]).audio_codes[0].T.numpy().astype(np.int16)
    return turn(text_ids(text, 0, processor.tokenizer, (2, 3)), codes, model.config, trained=True)


def test_the_losses_are_transformers_own(loaded: Any) -> None:
    """Of codes made before and documents packed in a row, against transformers' way from text and waveform."""
    model, processor = loaded
    tone = (0.3 * np.sin(np.arange(24_000) / 20)).astype(np.float32)
    text = "<|begin_of_text|>[0]one<|end_of_text|><|AUDIO|><|audio_eos|>"
    theirs = model(**processor(text=[text], audio=[tone], output_labels=True))
    one = feature(a_document(loaded, "one", tone))
    assert packs(model)
    for free in (True, False):
        batch = CsmCollator(0, 4, padding_free=free)([one, one])
        made = model(**inputs_of(model, batch))
        # Sums of some 50 terms in another order.
        assert made.backbone_loss.item() == pytest.approx(theirs.backbone_loss.item(), rel=1e-5)
        assert made.depth_decoder_loss.item() == pytest.approx(theirs.depth_decoder_loss.item(), rel=1e-5)


def test_the_depth_decoder_sees_a_share_of_frames(loaded: Any) -> None:
    kinds = torch.tensor([[TEXT] * 5 + [SPOKEN] * 33 + [END]])
    kept = keep_some(kinds, 1 / 16)
    assert kept[0, -1]
    assert int(kept[kinds == SPOKEN].sum()) == 3  # 33/16, rounded up
    assert not kept[kinds == TEXT].any()
    assert codes_in(kinds, 1 / 16, 4) == (34, 4 * 3)
    torch.manual_seed(1)
    assert not torch.equal(keep_some(kinds, 0.2), keep_some(kinds, 0.2))


def test_speakers() -> None:
    settings = CsmSettings()
    assert number_speakers(["bob", "anna", "1", "bob"], settings, {}) == {"anna": 0, "bob": 2}
    assert number_speakers(["bob"], settings, {"anna": 0}) == {"anna": 0, "bob": 1}
    assert number_speakers(["bob"], CsmSettings(speakers={"bob": 7}), {}) == {"bob": 7}
    with pytest.raises(DataError, match=r"'anna' is none of tts.csm.speakers \(bob\)"):
        number_speakers(["anna"], CsmSettings(speakers={"bob": 7}), {})
    assert [speaker_of(voice, {"bob": 7}) for voice in ("bob", "3", None)] == [7, 3, 0]
    with pytest.raises(DataError, match=r"'eve' is not known \(allowed: the names bob, or a speaker's number"):
        speaker_of("eve", {"bob": 7})


def test_an_adapter_is_trained_and_transformers_speaks_with_it(
    configure: Any, ft: Any, tmp_path: Path, csm: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoProcessor, CsmForConditionalGeneration

    code, _, err = ft("train", configure(eval_split=2))
    assert code == 0, err
    run = tmp_path / "run"
    found = losses(run)
    assert sum(found[-2:]) < 0.95 * sum(found[:2])
    parts = [losses(run, name) for name in ("backbone_loss", "depth_decoder_loss")]
    assert np.allclose(np.sum(parts, axis=0), found, rtol=1e-5)
    measured = json.loads((run / "evaluation.json").read_text())["metrics"]
    for name in ("loss", "backbone_loss", "depth_decoder_loss"):
        assert measured[name]["after"] < measured[name]["before"]
    assert "mcd" in measured

    processor = AutoProcessor.from_pretrained(run / "adapter")
    assert processor.tokenizer.init_kwargs["speakers"] == {"anna": 0, "bob": 1}
    adapted = PeftModel.from_pretrained(CsmForConditionalGeneration.from_pretrained(csm), run / "adapter").eval()
    assert not [name for name, _ in adapted.named_parameters() if "codec" in name and "lora" in name]
    unknown = list(range(32, 35))
    # The depth decoder's settings are of a model that was loaded, so that they are given to it itself.
    adapted.base_model.model.depth_decoder.generation_config.suppress_tokens = unknown
    asked = processor(text=["<|begin_of_text|>[1]one<|end_of_text|>"])
    audio = adapted.generate(
        **asked, max_new_tokens=5, do_sample=False, suppress_tokens=[0, *unknown], output_audio=True
    )
    assert len(audio[0]) % 1920 == 0
    assert len(audio[0])

    code, _, err = ft("speak", "one", "--model", run, "--voice", "bob", "--out", tmp_path / "a.wav", "--max-seconds", 1)
    assert code == 0, err
    spoken, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 24_000
    assert 0 < len(spoken) <= 24_000
    code, _, err = ft("speak", "one", "--model", run, "--voice", "eve", "--out", tmp_path / "b.wav")
    assert code == 2
    assert "the voice 'eve' is not known (allowed: the names anna, bob" in err


def test_greedy_frames_are_those_of_transformers(loaded: Any) -> None:
    model, processor = loaded
    unknown = list(range(32, 35))
    model.depth_decoder.generation_config.suppress_tokens = unknown
    asked = processor(text=["<|begin_of_text|>[0]two<|end_of_text|>"])
    theirs = model.generate(**asked, max_new_tokens=6, do_sample=False, suppress_tokens=unknown)[0].numpy()
    prompt = turn(text_ids("two", 0, processor.tokenizer, (2, 3)), None, model.config, trained=False)
    ours = [f for f in frames(model, prompt, most=6, temperature=0, top_p=1.0, seed=0) if f is not None]
    assert np.array_equal(ours, theirs[: len(ours)])
    assert len(ours) == 6 or not theirs[len(ours)].any()


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_the_depth_decoder_is_trained_whole(lora: Any, configure: Any, ft: Any, tmp_path: Path, csm: Path) -> None:
    from safetensors.torch import load_file

    section = {"csm": {"depth_decoder": "full", "depth_frames": 1.0}}
    code, _, err = ft("train", configure(lora=lora, tts=section, training={"max_steps": 3}))
    assert code == 0, err
    if lora is None:
        before, after = (load_file(folder / "model.safetensors") for folder in (csm, tmp_path / "run" / "model"))
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
        assert not [name for name in changed if name.startswith("codec_model.")]
        assert "depth_decoder.codebooks_head.weight" in changed
        assert "lm_head.weight" in changed
    else:
        saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
        assert any("depth_decoder.codebooks_head.weight" in name for name in saved)
        assert not [name for name in saved if "embed_tokens" in name or "codec_model" in name]
        assert not [name for name in saved if "depth_decoder" in name and "lora_" in name]


def test_a_run_goes_on_as_if_it_had_not_stopped(configure: Any, ft: Any, tmp_path: Path) -> None:
    """The frames that are drawn, too, are those of a run in one go."""
    steps = {"training": {"max_steps": 6, "save_every": 3, "scheduler": "constant"}}
    assert ft("train", configure(**steps, output=str(tmp_path / "whole")))[0] == 0
    steps["training"]["max_steps"] = 3
    assert ft("train", configure(**steps))[0] == 0
    steps["training"]["max_steps"] = 6
    code, _, err = ft("train", configure(**steps), "--resume")
    assert code == 0, err
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_turns_before_are_heard_and_not_trained(configure: Any, ft: Any, tmp_path: Path, rows: Any) -> None:
    with_context = [{**rows[4], "context": [rows[0]]}, rows[5]]
    code, _, err = ft("train", configure(data=with_context, training={"max_steps": 2}))
    assert code == 0, err
    counts = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]
    # 15,200 and 16,000 samples are 8 and 9 frames of 1920.
    assert counts["trained_frames"] == 8 + 9


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"audio": "none.wav"}, "none.wav: cannot be read: No such file or directory (tts.on_bad_audio: skip"),
        ({"text": "so <|AUDIO|> it is"}, "row 1: text holds '<|AUDIO|>', which stands for audio"),
        ({"text": "so<|end_of_text|>it is"}, "row 1: text holds '<|end_of_text|>', which ends or begins a turn"),
        ({"context": [{"text": "one"}]}, "context[0] has no recording"),
    ],
)
def test_wrong_rows_are_one_line(row: Any, words: str, configure: Any, ft: Any, rows: Any) -> None:
    code, _, err = ft("train", configure(data=[{**rows[0], **row}]))
    assert code == 2
    assert words in err.rstrip("\n").rpartition("\n")[2]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"quantization": "nf4"}, "quantization: nf4 would quantize the codec of a csm too"),
        ({"lora": None, "tts": {"csm": {"depth_decoder": "lora"}}}, "tts.csm.depth_decoder: lora needs lora"),
        ({"tts": {"csm": {"speakers": {"anna": -1}}}}, "no whole number from 0"),
    ],
)
def test_wrong_settings_are_one_line(more: Any, words: str, configure: Any, ft: Any) -> None:
    code, _, err = ft("train", configure(**more))
    assert code == 2
    assert words in err


def test_the_backbone_computes_on_the_fast_layers(loaded: Any) -> None:
    from ft_core import fast
    from ft_core.plugins import registry
    from ft_speech.csm import layout

    if "csm" not in registry().names("ft.architectures"):
        pytest.skip("the installed metadata of ft-speech is older than its entry point for CSM")
    model, _ = loaded
    tone = (0.3 * np.sin(np.arange(24_000) / 20)).astype(np.float32)
    one = feature(a_document(loaded, "one", tone))
    batch = inputs_of(model, CsmCollator(0, 4)([one, one]))
    batch["inputs_embeds"] = batch["inputs_embeds"].detach()
    path = layout.fast(model)
    try:
        compared = fast.compare(path, model, batch)
    finally:
        fast.disable(model)
    assert compared.mismatch is None, compared


def test_silence_is_trimmed_and_clipped_recordings_counted(configure: Any, ft: Any, tmp_path: Path, rows: Any) -> None:
    """A second of a tone, cut off at half its peak, in three: 1.1 s of it are trained on."""
    audio = np.zeros(3 * 24_000)
    audio[24_000:48_000] = np.clip(np.sin(2 * np.pi * 300 * np.arange(24_000) / 24_000), -0.5, 0.5)
    soundfile.write(tmp_path / "0.wav", audio, 24_000)
    row = {**rows[0], "audio": "0.wav"}
    frames = {}
    for decibels in (None, 40):
        output = tmp_path / f"run-{decibels}"
        path = configure(data=[row], tts={"trim_silence": decibels}, training={"max_steps": 1}, output=str(output))
        code, out, err = ft("train", path)
        assert code == 0, err
        assert "clipped: 1 train recording cut off at the peaks" in out + err
        counts = json.loads((output / "summary.json").read_text())["data"]
        assert counts["clipped_recordings"] == 1
        frames[decibels] = counts["trained_frames"]
    frame = 0.08  # seconds: Mimi's 12.5 frames a second
    assert frames[None] - frames[40] == math.ceil(3 / frame) - math.ceil(1.1 / frame)


def test_a_base_is_measured_with_the_voices_of_its_run(configure: Any, ft: Any, tmp_path: Path, rows: Any) -> None:
    """Held out is anna alone, who answers bob: the base, which knows no names, is asked for both all the same; and what
    was left out is said once."""
    asked = [{**rows[1], "context": [rows[0]]}, {**rows[3], "audio": "gone.wav"}]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    path = configure(lora=None, tts={"on_bad_audio": "skip"}, training={"max_steps": 2})
    assert ft("train", path)[0] == 0
    code, out, err = ft("eval", tmp_path / "run", "--data", tmp_path / "held.jsonl", "--answers", "1")
    assert code == 0, err
    assert (out + err).count("left out: held-out row 2: ") == 1
    metrics = json.loads(next(tmp_path.glob("run/evaluation*.json")).read_text())["metrics"]
    assert metrics["loss"]["after"] != metrics["loss"]["before"]


def test_the_parts_of_a_short_step_are_its_own(
    configure: Any, ft: Any, tmp_path: Path, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One micro-batch where a step has two, computed twice, as after a lack of memory: what is logged is of the second
    alone, so that the parts of the loss are the loss."""
    from ft_core.training.trainer import RunTrainerMixin

    once = RunTrainerMixin.training_step

    def twice(self: Any, *args: Any, **keywords: Any) -> Any:
        once(self, *args, **keywords)
        return once(self, *args, **keywords)

    monkeypatch.setattr(RunTrainerMixin, "training_step", twice)
    training = {"max_steps": 1, "batch_size": 1, "gradient_accumulation": 2}
    code, _, err = ft("train", configure(data=rows[:1], training=training))
    assert code == 0, err
    loss, backbone, depth = (
        losses(tmp_path / "run", name)[0] for name in ("loss", "backbone_loss", "depth_decoder_loss")
    )
    assert backbone + depth == pytest.approx(loss, rel=1e-4)  # the trainer rounds it to four places
