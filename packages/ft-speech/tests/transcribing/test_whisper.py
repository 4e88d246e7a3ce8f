"""Whisper as a recogniser, by a tiny one whose text is known (`Parrot`); the real one is in `test_real_whisper.py`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ft_core.errors import DataError, ModelError, RunError
from ft_speech.listening.recogniser import open_recogniser, recognise, transcribe
from ft_speech.listening.windows import at_pauses

RATE = 16_000
Noise = Callable[..., np.ndarray]


def test_every_window_is_heard_and_silence_is_not(parrot: Any, noise: Noise) -> None:
    hear = parrot.says(" Hallo Welt.")
    heard: list[float] = []
    samples = [
        noise(1.0),
        np.zeros(RATE, np.float32),
        noise(7.0),
        np.concatenate([np.zeros(4 * RATE, np.float32), noise(1)]),
    ]
    found = hear.transcribe(samples, progress=heard.append, batch_size=3)
    long = len(at_pauses(samples[2], RATE, 2.0))  # four windows, or one more
    # Of the last one's three windows the noise is in one alone.
    assert [one.text for one in found] == ["Hallo Welt.", "", " ".join(["Hallo Welt."] * long), "Hallo Welt."]
    assert [one.language for one in found] == ["de", None, "de", "de"]
    assert all(one.segments == () and one.cut == 0 for one in found)
    assert sum(heard) == pytest.approx(sum(map(len, samples)) / RATE)
    assert hear.transcribe([]) == []
    assert hear.transcribe([np.zeros(0, np.float32)])[0].text == ""


def test_segments_have_the_times_of_the_recording(parrot: Any, noise: Noise) -> None:
    hear = parrot.says("<|0.10|> Eins,<|0.50|><|0.50|> zwei.<|0.90|>", timed=True)
    (found,) = hear.transcribe([noise(3.0)], timestamps="segment")
    assert found.text == "Eins, zwei. Eins, zwei."
    first, second, third, _ = found.segments
    assert (first.text, first.start, first.end) == ("Eins,", pytest.approx(0.1), pytest.approx(0.5))
    assert (second.text, second.end) == ("zwei.", pytest.approx(0.9))
    # The windows share the recording evenly, give or take the quarter by which a pause is looked for.
    assert 1.5 * 0.75 <= third.start - 0.1 <= 1.5 * 1.25
    assert all(one.words == () for one in found.segments)


def test_what_is_written_of_the_padding_is_left_out(parrot: Any, noise: Noise) -> None:
    hear = parrot.says("<|0.00|> Eins.<|0.80|><|0.80|> Zwei.<|1.60|>", timed=True)
    (found,) = hear.transcribe([noise(0.7)], timestamps="segment")
    assert [(one.text, one.start, one.end) for one in found.segments] == [("Eins.", 0.0, pytest.approx(0.7))]
    assert found.text == "Eins."


def test_in_one_pass_the_last_timestamp_says_where_the_next_window_begins(parrot: Any, noise: Noise) -> None:
    hear = parrot.says("<|0.00|> Ja.<|1.20|><|1.20|>", timed=True)
    heard: list[float] = []
    found = hear.transcribe(
        [noise(5.0), noise(1.0)], timestamps="segment", long_form="sequential", progress=heard.append
    )
    starts = [one.start for one in found[0].segments]
    assert starts == pytest.approx([0.0, 1.2, 2.4, 3.6, 4.8])
    assert found[0].segments[-1].end <= 5.0
    assert sum(heard) == pytest.approx(6.0)
    silent = np.zeros(5 * RATE, np.float32)
    assert hear.transcribe([silent], long_form="sequential")[0].text == ""
    # Times are written for it, and left out where nobody asked.
    (plain,) = hear.transcribe([noise(5.0)], long_form="sequential")
    assert (plain.text, plain.segments) == ("Ja. Ja. Ja. Ja. Ja.", ())


@pytest.mark.parametrize("long_form", ["pauses", "sequential"])
def test_words_lie_in_order_in_their_segments(parrot: Any, noise: Noise, long_form: str) -> None:
    parrot.recogniser._plain.generation_config.alignment_heads = [[0, 0], [1, 1]]
    from ft_speech.whisper.vocabulary import vocabulary_of

    hear = parrot.recogniser
    hear.vocabulary = vocabulary_of(hear._plain, hear.tokenizer, hear.name)
    parrot.says("<|0.00|> Ja so,<|0.60|><|0.60|> gut.<|1.20|><|1.20|>", timed=True)
    found = hear.transcribe([noise(5.0), noise(1.5)], timestamps="word", long_form=long_form, batch_size=2)
    for one, seconds in zip(found, (5.0, 1.5), strict=True):
        words = [word for segment in one.segments for word in segment.words]
        assert " ".join(word.text for word in words) == one.text
        edges = [edge for word in words for edge in (word.start, word.end)]
        assert edges == sorted(edges)
        assert edges[-1] <= seconds
        for segment in one.segments:
            assert segment.words
            assert (segment.start, segment.end) == (segment.words[0].start, segment.words[-1].end)


@pytest.mark.parametrize("task", ["transcribe", "translate"])
def test_a_translation_is_written_with_spaces_whatever_is_spoken(parrot: Any, noise: Noise, task: str) -> None:
    """Windows, segments and words of Chinese have none between them; English ones of Chinese have."""
    from ft_speech.whisper.vocabulary import vocabulary_of

    hear = parrot.recogniser
    hear._plain.generation_config.alignment_heads = [[0, 0], [1, 1]]
    hear.vocabulary = vocabulary_of(hear._plain, hear.tokenizer, hear.name)
    parrot.says("<|0.10|> so<|0.50|><|0.50|> it<|0.90|>", timed=True, language="zh")
    (found,) = hear.transcribe([noise(3.0)], timestamps="word", task=task, batch_size=2)
    windows = len(at_pauses(noise(3.0), RATE, 2.0))
    assert windows > 1
    words = [word.text for segment in found.segments for word in segment.words]
    assert found.language == "zh"
    if task == "translate":
        assert (found.text, words) == (" ".join(["so it"] * windows), ["so", "it"] * windows)
    else:
        assert found.text == "soit" * windows
        assert "so" not in words


def test_a_text_that_is_cut_off_is_told(parrot: Any, noise: Noise) -> None:
    hear = parrot.says(" Hallo Welt.")
    found = hear.transcribe([noise(1.0), noise(3.0)], max_new_tokens=6)
    assert [one.text for one in found] == ["Hallo", "Hallo Hallo"]
    assert [one.cut for one in found] == [1, 2]
    exact = len(parrot.ids(" Hallo Welt."))
    assert hear.transcribe([noise(1.0)], max_new_tokens=exact + 1)[0].cut == 0  # and the end


def test_a_prompt_goes_before_and_is_no_part_of_the_text(parrot: Any, noise: Noise) -> None:
    from transformers import WhisperForConditionalGeneration

    hear = parrot.says(" Hallo.")
    given: list[list[int]] = []
    own = WhisperForConditionalGeneration.forward

    def forward(self: Any, *args: Any, decoder_input_ids: Any = None, **options: Any) -> Any:
        given.append(decoder_input_ids[0].tolist())
        return own(self, *args, decoder_input_ids=decoder_input_ids, **options)

    hear._plain.forward = forward.__get__(hear._plain)
    known = hear.vocabulary
    (found,) = hear.transcribe([noise(1.0)], language="de", prompt="Emil", max_new_tokens=5)
    begun = next(ids for ids in given if len(ids) > 2)
    assert begun == [known.previous, *parrot.ids(" Emil"), *known.prefix("de", "transcribe")]
    assert "Emil" not in found.text


def test_what_the_model_cannot_do_is_refused(parrot: Any) -> None:
    check = parrot.recogniser.check
    plain: dict[str, Any] = {"language": None, "task": "transcribe", "timestamps": "none"}
    for change, said in (
        ({"language": "Germain"}, "'Germain' is none of the 3 that"),
        ({"language": "german"}, None),
        ({"language": "zh-CN"}, None),
        ({"language": "fr"}, "'fr' is none of the 3"),
        ({"task": "sing"}, "task: 'sing' is not allowed (allowed: transcribe, translate)"),
        ({"timestamps": "letter"}, "(allowed: none, segment, word)"),
        ({"long_form": "random"}, "(allowed: pauses, sequential)"),
        ({"timestamps": "word"}, "alignment_heads"),
        ({"max_new_tokens": 61}, "(allowed: 1 to 60, the positions of"),
        ({"max_new_tokens": 60}, None),
        ({"prompt": "long " * 20}, "shorten it"),
        ({"prompt": "Emil <|translate|>"}, "prompt: <|translate|> is a token by which"),
        ({"prompt": "Emil <|1.00|>"}, "prompt: <|1.00|> is a token"),
    ):
        if said is None:
            check(**{**plain, **change})
            continue
        with pytest.raises(DataError) as error:
            check(**{**plain, **change})
        assert said in str(error.value)
    with pytest.raises(DataError, match=r"did you mean de \(german\)\?"):
        check(**{**plain, "language": "germann"})


def test_a_model_of_english_alone(parrot: Any, noise: Noise, tmp_path: Path) -> None:
    parrot.recogniser._plain.generation_config.is_multilingual = False
    folder = parrot.save(tmp_path / "english")
    hear = open_recogniser(str(folder))
    parrot.script(hear._plain, " Hello.", 1)
    (found,) = hear.transcribe([noise(1.0)])
    assert (found.text, found.language) == ("Hello.", "en")
    hear.check(language="English", task="transcribe", timestamps="none")
    with pytest.raises(DataError, match="knows English alone"):
        hear.check(language="de", task="transcribe", timestamps="none")
    with pytest.raises(DataError, match="knows English alone"):
        hear.check(language=None, task="translate", timestamps="none")


def test_a_folder_without_what_is_the_same_for_all(parrot: Any, noise: Noise, tmp_path: Path) -> None:
    """Neither a feature extractor nor a generation configuration."""
    parrot.says(" Hallo.")
    folder = parrot.save(tmp_path / "bare")
    (folder / "preprocessor_config.json").unlink()
    (folder / "generation_config.json").unlink()
    hear = open_recogniser(str(folder))
    assert hear.sampling_rate == RATE
    assert recognise(hear, [noise(1.0)], RATE) == ["Hallo."]


def test_files_of_two_models(tiny: Path, tmp_path: Path) -> None:
    from transformers import WhisperFeatureExtractor

    folder = tmp_path / "mixed"
    shutil.copytree(tiny, folder)
    WhisperFeatureExtractor(feature_size=128).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"makes 128 mel bands, the model .* hears 80"):
        open_recogniser(str(folder))
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"the feature extractor in .* cannot be loaded"):
        open_recogniser(str(folder))


def test_what_is_no_recogniser(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ModelError, match=r"recognises no speech: its model is a llama \(what does .*whisper\)"):
        open_recogniser(str(folder))
    with pytest.raises(RunError, match="no run or model folder"):
        open_recogniser(str(tmp_path / "nothing"))


def test_the_callers_chances_and_the_model_stay_as_they_were(parrot: Any, noise: Noise) -> None:
    """A random model is heard again at every temperature; so numbers are drawn."""
    hear = parrot.recogniser
    before = hear._plain.generation_config.to_dict()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = hear.transcribe([noise(3.0)], timestamps="segment", max_new_tokens=20)
    assert torch.equal(torch.rand(3), expected)
    assert hear.transcribe([noise(3.0)], timestamps="segment", max_new_tokens=20) == first
    assert hear._plain.generation_config.to_dict() == before


def test_recognise_resamples_and_files_are_read(parrot: Any, noise: Noise, recordings: Path) -> None:
    import ft_speech

    hear = parrot.says(" Hallo.")
    assert recognise(hear, [noise(1.0)[::2], np.zeros(8000, np.float64)], 8000, language="de") == ["Hallo.", ""]
    parrot.says("<|0.00|> Ja.<|0.60|>", timed=True)
    found = ft_speech.transcribe(hear, [recordings / "a.wav", str(recordings / "more/b.flac")])
    # 5 s of samples at 44.1 kHz that were made for 16 kHz: 1.8 s.
    assert [len(one.segments) for one in found] == [1, 1]
    assert transcribe(hear, recordings / "a.wav")[0] == found[0]
    with pytest.raises(ft_speech.AudioError, match="is empty"):
        ft_speech.transcribe(hear, [recordings / "a.wav", recordings / "empty.mp3"])
