"""Merging models that see: every family, adapters on the tower and the projector, parts that were trained whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL", reason="models that see are proven on images: pip install pillow")

import torch
import transformers
from vision_models import FAMILIES, add_adapter, make_seeing, write_run

from ft_export import ExportError, merge
from ft_export.checkpoints import Checkpoint
from ft_export.seeing import draw, image_processor, seen

WHOLE = {
    "qwen3_vl": ["visual.merger", "visual.deepstack_merger_list.0", "visual.deepstack_merger_list.1"],
    "gemma3": ["multi_modal_projector"],
    "llava": ["multi_modal_projector", "vision_tower"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_says_what_its_adapter_says(
    family: str, make_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_seeing(tmp_path / "base", family, make_tokenizer())
    run = write_run(tmp_path / "run", base, tmp_path / "a.png")
    add_adapter(run / "adapter", base, WHOLE.get(family))
    made = merge(run)
    assert made.logprobs is not None
    assert made.weights.merged >= 14
    assert (made.weights.replaced > 0) == (family in WHOLE)
    assert "each of 4 texts was read with images: 4 of the rows' own, none drawn" in made.lines
    # the files have the names of the base's
    assert set(Checkpoint(made.folder)) == set(Checkpoint(base))
    report = json.loads((made.folder / "merge.json").read_text())
    assert report["samples"] == "held_out.jsonl"

    # in plain transformers, all of its weights are there, an image changes what it says, and it generates
    model, told = transformers.AutoModelForImageTextToText.from_pretrained(
        made.folder, dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.folder)
    pixels = image_processor(made.folder)
    texts = [seen("\ufdd0what?", [draw(84, 56, seed)], tokenizer, pixels, model) for seed in (1, 2)]
    said = [model(input_ids=torch.tensor([list(text)]), **text.inputs).logits[0, -1] for text in texts]
    assert (said[0] - said[1]).abs().max() > 1e-3
    answer = model.generate(
        input_ids=torch.tensor([list(texts[0])]), **texts[0].inputs, max_new_tokens=3, do_sample=False
    )
    assert answer.shape[1] > len(texts[0])


def test_several_adapters_are_combined(make_tokenizer: Any, tmp_path: Path) -> None:
    base = make_seeing(tmp_path / "base", "gemma3", make_tokenizer())
    one, two = (add_adapter(tmp_path / str(seed), base, seed=seed) for seed in (1, 2))
    made = merge(one, adapters=[(two, 0.5)])
    assert made.logprobs is not None
    whose = "0 of the rows' own, 4 drawn (4 for a row without images)"
    assert f"each of 4 texts was read with images: {whose}" in made.lines


def test_images_that_are_drawn_are_counted(make_tokenizer: Any, tmp_path: Path) -> None:
    base = make_seeing(tmp_path / "base", "qwen3_vl", make_tokenizer())
    run = write_run(tmp_path / "run", base, tmp_path / "a.png")
    add_adapter(run / "adapter", base)
    rows = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    one = rows[1]["messages"][0]["content"][0]
    rows[1]["images"] += ["https://example.invalid/a.png"]
    rows[1]["messages"][0]["content"].insert(0, one)
    rows[2]["images"] = [f"frame:0/2:{tmp_path}/a.mp4"]
    rows[3]["images"] = ["listed:http://example.invalid/b.png"]
    (run / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    what = "2 for a URL, which is not fetched; 1 for a frame of a video, which is not decoded"
    expected = f"each of 4 texts was read with images: 2 of the rows' own, 3 drawn ({what})"
    assert expected in merge(run).lines


def test_a_projector_that_is_not_the_trained_one_is_found(
    make_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """The tensors are right, but the written configuration looks at another layer of the tower."""
    from ft_export.merging import outline

    base = make_seeing(tmp_path / "base", "llava", make_tokenizer())
    run = write_run(tmp_path / "run", base, tmp_path / "a.png")
    add_adapter(run / "adapter", base)
    save = outline.Outline.save_config

    def other(self: Any, folder: Path, dtype: torch.dtype) -> None:
        self.config.vision_feature_layer = -2
        save(self, folder, dtype)

    monkeypatch.setattr(outline.Outline, "save_config", other)
    with pytest.raises(ExportError, match="does not say what the adapter on its base says"):
        merge(run)
    assert not (run / "merged").exists()


def test_the_processor_that_was_trained_with_goes_along(make_tokenizer: Any, tmp_path: Path) -> None:
    """As ft and transformers 5 save one, with the images' part inside; engines read that from a file of its own."""
    base = make_seeing(tmp_path / "base", "qwen3_vl", make_tokenizer())
    (base / "video_preprocessor_config.json").write_text('{"max_frames": 3}')
    adapter = add_adapter(tmp_path / "adapter", base)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    inner = {**json.loads((base / "preprocessor_config.json").read_text()), "rescale_factor": 0.5}
    (adapter / "processor_config.json").write_text(json.dumps({"image_processor": inner, "processor_class": "P"}))
    made = merge(adapter)
    assert json.loads((made.folder / "preprocessor_config.json").read_text()) == inner
    assert (made.folder / "processor_config.json").read_bytes() == (adapter / "processor_config.json").read_bytes()
    assert (made.folder / "video_preprocessor_config.json").read_text() == '{"max_frames": 3}'
    assert image_processor(made.folder).rescale_factor == 0.5


def test_a_base_without_an_image_processor_is_refused_before_the_merge(make_tokenizer: Any, tmp_path: Path) -> None:
    base = make_seeing(tmp_path / "base", "gemma3", make_tokenizer())
    add_adapter(tmp_path / "adapter", base)
    (base / "preprocessor_config.json").unlink()
    with pytest.raises(ExportError, match="has no image processor that transformers loads here"):
        merge(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "merged").exists()
    made = merge(tmp_path / "adapter", skip_proof=True)
    assert any(line.startswith("NOT PROVEN") for line in made.lines)


def test_a_run_on_a_quantized_base_is_merged_into_the_whole_one(make_tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = make_seeing(tmp_path / "base", "gemma3", make_tokenizer())
    run = write_run(tmp_path / "run", base, tmp_path / "a.png")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("none", "nf4"))
    add_adapter(run / "adapter", base)
    made = merge(run)
    assert any("log-probabilities against the nf4 run:" in line for line in made.lines)


def test_other_tasks_are_refused_in_a_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tmp_path, tmp_path / "a.png")
    (run / "config.yaml").write_text("model: x\ntask: music\n")
    with pytest.raises(
        ExportError, match=r"task: music, which is not exported here \(allowed: text, vision, stt, tts\)"
    ):
        merge(run)
