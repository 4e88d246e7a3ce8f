"""`ft train` with `task: vision`, from a configuration to a whole run folder."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FAMILIES = ("qwen3_vl", "gemma3", "llava_next", "smolvlm")
"""One each of those with grids, with masks of their own, with tiles to an image and with tiles to a row; the whole way
of all is in test_every_family.py."""


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_to_a_whole_run(name: str, configure: Any, ft: Any, tmp_path: Path, family: Any) -> None:
    made = ft("train", configure(name, eval_split=4, training={"max_steps": 8, "learning_rate": 2.0e-2}))
    assert made.code == 0, made.err
    run = tmp_path / "run"
    found = losses(run)
    assert len(found) == 8
    assert sum(found[-2:]) < 0.97 * sum(found[:2])
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["metrics"]["loss"]["after"] < evaluation["metrics"]["loss"]["before"]
    assert len(evaluation["samples"]) == 4
    assert evaluation["samples"][0]["prompt"].endswith("which digit?")
    assert "digit-" in evaluation["samples"][0]["prompt"]
    assert evaluation["samples"][0]["expected"] in set("0123")
    assert {"config.yaml", "environment.json", "summary.json", "report.html", "held_out.jsonl"} <= {
        path.name for path in run.iterdir()
    }
    summary = json.loads((run / "summary.json").read_text())
    assert summary["data"]["images"] == 12
    assert summary["data"]["bad_image_rows"] == 0

    # what is saved loads in plain transformers and PEFT, with the processor that it was trained with
    from peft import PeftModel
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    plain = AutoModelForImageTextToText.from_pretrained(family(name))
    adapted = PeftModel.from_pretrained(plain, run / "adapter")
    trained = [key for key in adapted.state_dict() if "lora_B" in key]
    assert trained
    assert all("language_model" in key or "text_model" in key for key in trained)
    assert all(adapted.state_dict()[key].any() for key in trained)
    AutoImageProcessor.from_pretrained(run / "adapter")


def test_it_learns_what_is_drawn_and_not_what_is_likely(configure: Any, ft: Any, digits: Any, tmp_path: Path) -> None:
    path = configure(
        "qwen3_vl",
        rows=digits(8, digits=2),
        lora=None,
        vision={"tower": "full", "projector": "full"},
        training={"max_steps": 150, "learning_rate": 3.0e-3, "scheduler": "constant", "save_every": 1000},
    )
    made = ft("train", path)
    assert made.code == 0, made.err
    # The answers are right, on rows that it was trained on; `ft eval` finds the images beside the file.
    measured = ft("eval", tmp_path / "run", "--data", tmp_path / "rows.jsonl", "--json")
    assert measured.code == 0, measured.err
    metrics = json.loads(measured.out[measured.out.index("{") :])["metrics"]
    assert metrics["exact_match"]["after"] == 1.0
    assert metrics["exact_match"]["before"] <= 0.5
    assert metrics["loss"]["after"] < metrics["loss"]["before"]
    # Two tokens are trained of each answer, the digit and the end: who doesn't look gets ln(2) / 2 at best.
    assert sum(losses(tmp_path / "run")[-5:]) / 5 < 0.5 * math.log(2) / 2


@pytest.mark.parametrize(("tower", "projector"), [("lora", "lora"), ("full", "full"), ("frozen", "full")])
@pytest.mark.parametrize("name", ["qwen3_vl", "llava", "smolvlm"])
def test_each_part_is_trained_as_the_configuration_says(
    name: str, tower: str, projector: str, configure: Any, ft: Any, tmp_path: Path, family: Any
) -> None:
    made = ft("train", configure(name, vision={"tower": tower, "projector": projector}, training={"max_steps": 2}))
    assert made.code == 0, made.err
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from ft_vision.families.parts import FAMILIES as KNOWN

    plain = AutoModelForImageTextToText.from_pretrained(family(name))
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    trained = PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter").merge_and_unload().state_dict()
    # A bias that nothing of the loss depends on (of keys, under a softmax) stays even where it is trained.
    for how, parts in ((tower, KNOWN[name].tower), (projector, KNOWN[name].projector)):
        for part in parts:
            keys = [key for key in before if f"model.{part}." in key]
            changed = [key for key in keys if not torch.equal(before[key], trained[key])]
            assert keys
            if how == "frozen":
                assert not changed
            elif how == "lora":
                assert all(before[key].dim() == 2 for key in changed)
            else:
                assert len(changed) > 0.5 * len(keys)
    if "lora" in (tower, projector):
        assert any("vision" in key or "visual" in key for key in before if not torch.equal(before[key], trained[key]))
    changed = [key for key in before if not torch.equal(before[key], trained[key])]
    assert any("language_model" in key or "text_model" in key for key in changed)


@pytest.mark.parametrize("projector", ["frozen", "full"])
def test_a_projectors_parameter_that_is_no_modules(
    projector: str, configure: Any, ft: Any, tmp_path: Path, family: Any
) -> None:
    made = ft("train", configure("llava_next", lora=None, vision={"projector": projector}, training={"max_steps": 2}))
    assert made.code == 0, made.err
    from transformers import AutoModelForImageTextToText

    before, after = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).model.image_newline
        for folder in (family("llava_next"), tmp_path / "run" / "model")
    )
    assert torch.equal(before, after) == (projector == "frozen")


@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm"])
def test_a_run_that_was_stopped_goes_on_the_same(name: str, configure: Any, ft: Any, tmp_path: Path) -> None:
    training = {"max_steps": 4, "save_every": 2}
    assert ft("train", configure(name, training=training, output=str(tmp_path / "whole"))).code == 0
    path = configure(name, training=training)
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


def test_a_run_goes_on_with_the_rows_that_it_began_with(configure: Any, digits: Any, ft: Any, tmp_path: Path) -> None:
    rows = digits(12)
    image = tmp_path / rows[4]["messages"][0]["content"][0]["image"]
    whole = image.read_bytes()
    image.write_bytes(whole[:40])
    path = configure(rows=rows, vision={"on_bad_image": "skip"}, training={"max_steps": 4, "save_every": 2})
    assert ft("train", path).code == 0
    run = tmp_path / "run"
    assert json.loads((run / "environment.json").read_text())["left_out_rows"] == [4]
    assert (run / "adapter" / "preprocessor_config.json").is_file()  # from which a processor for videos would be made
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    shutil.rmtree(run / "adapter")
    (run / "summary.json").unlink()
    image.write_bytes(whole)
    made = ft("train", path, "--resume")
    assert made.code == 2
    assert "row 5 of the training data was left out when it began and can be used now" in made.message
    image.write_bytes(whole[:40])
    assert ft("train", path, "--resume").code == 0


def test_batches_are_the_same_from_a_worker(configure: Any, ft: Any, tmp_path: Path) -> None:
    assert ft("train", configure(vision={"workers": 0})).code == 0
    made = ft("train", configure(vision={"workers": 1}, output=str(tmp_path / "ahead")))
    assert made.code == 0, made.err
    assert losses(tmp_path / "ahead") == losses(tmp_path / "run")


def test_packing_changes_no_loss(configure: Any, ft: Any, tmp_path: Path) -> None:
    """All rows in one step: packed into few rows, each a row of its own, and in full 32 bits of both."""
    common: dict[str, Any] = {"lora": None, "training": {"max_steps": 1, "batch_size": 16}}
    assert ft("train", configure(**common)).code == 0
    assert ft("train", configure(**common, packing=False, output=str(tmp_path / "apart"))).code == 0
    packed, apart = losses(tmp_path / "run")[0], losses(tmp_path / "apart")[0]
    # The forward pass is in bfloat16: 8 bits, and the mean over 32 tokens of a loss near 5.
    assert abs(packed - apart) < 2.0**-8 * packed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "kto"}, "'kto' does not train the task 'vision' yet (allowed: sft, dpo, grpo, gspo)"),
        ({"vision": {"towr": "lora"}}, "unknown key 'vision.towr'; did you mean 'vision.tower'?"),
        ({"vision": {"tower": "half"}}, "vision.tower: 'half' is not allowed (allowed: frozen, lora, full)"),
        ({"vision": {"tower": "lora"}, "lora": None}, "vision.tower: lora needs lora"),
        ({"vision": {"min_pixels": 9, "max_pixels": 4}}, "vision.min_pixels: 9 is more than vision.max_pixels 4"),
        (
            {"task": "text", "vision": {"tower": "lora"}},
            "these are settings of the task 'vision', but the task is 'text'",
        ),
        ({"quantization": "nf4", "vision": {"projector": "full"}}, "vision.projector: full needs quantization: none"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_in_one_line(
    changes: dict[str, Any], message: str, configure: Any, ft: Any
) -> None:
    made = ft("train", configure(**changes))
    assert made.code == 2
    assert message in made.message


def test_a_budget_for_images_of_one_size_is_refused(configure: Any, ft: Any) -> None:
    made = ft("train", configure("llava", vision={"max_pixels": 100}))
    assert made.code == 2
    assert "sees every image at the same size" in made.message


def test_a_model_of_text_is_refused(configure: Any, ft: Any, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    made = ft("train", configure(model=str(tmp_path / "text")))
    assert made.code == 2
    assert len(made.err.strip().splitlines()) <= 2


def test_bad_images_are_counted(configure: Any, ft: Any, digits: Any, tmp_path: Path) -> None:
    rows = digits(6)
    (tmp_path / "images" / "digit-1-1-56x56.png").write_bytes(b"no image")
    made = ft("train", configure(rows=rows))
    assert made.code == 2
    assert "row 2: " in made.message
    assert "digit-1-1-56x56.png: holds no image format" in made.message
    made = ft("train", configure(rows=rows, vision={"on_bad_image": "skip"}), "--overwrite")
    assert made.code == 0, made.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["data"]["bad_image_rows"], summary["data"]["images"]) == (1, 5)


def test_what_does_not_read_images_yet_says_so(configure: Any, ft: Any, tmp_path: Path) -> None:
    done = ft("train", configure(eval_split=2, training={"max_steps": 1}))
    assert done.code == 0
    assert done.out.rstrip().endswith(f"next: ft eval {tmp_path / 'run'}  |  ft chat {tmp_path / 'run'}")
    assert ft("eval", tmp_path / "run").code == 0
    pytest.importorskip("ft_export")
    made = ft("merge", tmp_path / "run", "--out", tmp_path / "merged")
    assert made.code == 0, made.err
    assert "each of 2 texts was read with images: 2 of the rows' own" in made.out


@pytest.fixture
def on_fast_layers(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """`on_fast_layers(kernels)`: in float32, by the fast layers or not, with the references in the kernels' places."""
    import dataclasses

    from ft_core.models import device, loading
    from ft_core.training import run, speed

    pick = device.pick_device
    for module in (run, loading):
        monkeypatch.setattr(module, "pick_device", lambda: dataclasses.replace(pick(), dtype="float32"))
    return lambda kernels: monkeypatch.setattr(speed, "runs_kernels", lambda device: kernels)


@pytest.mark.parametrize("packing", [False, True], ids=["a row a document", "packed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_fast_layers_train_alike(
    name: str, packing: bool, configure: Any, ft: Any, tmp_path: Path, on_fast_layers: Any
) -> None:
    """As on a GPU: the losses are those of transformers' own layers."""
    found = []
    for kernels in (False, True):
        on_fast_layers(kernels)
        output = str(tmp_path / f"run-{kernels}")
        steps = {"max_steps": 4, "batch_size": 2, "learning_rate": 1.0e-2}
        made = ft("train", configure(name, output=output, packing=packing, training=steps))
        assert made.code == 0, made.err
        assert ("fast layers: checked against transformers' own" in made.out + made.err) == kernels
        found.append(losses(Path(output)))
    # Rounding in float32, which AdamW's first steps, by the signs of gradients, carry on.
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_the_check_before_the_first_step_sees_images(
    configure: Any, ft: Any, monkeypatch: pytest.MonkeyPatch, on_fast_layers: Any
) -> None:
    """What is wrong with images alone ends the run before it trains anything: text alone would not show it."""
    import ft_kernels

    on_fast_layers(True)
    own = ft_kernels.packed_attention

    def causal(*args: Any, plan: Any = None, **given: Any) -> torch.Tensor:
        if plan is not None and plan.together is not None:
            plan = ft_kernels.plan_attention(lengths=plan.lengths)
        return own(*args, plan=plan, **given)

    monkeypatch.setattr(ft_kernels, "packed_attention", causal)
    made = ft("train", configure("gemma3"))
    assert made.code == 2
    assert "the fast layers do not compute what transformers' own do" in made.message


def test_where_a_row_with_images_does_not_fit_text_is_checked(
    configure: Any, ft: Any, monkeypatch: pytest.MonkeyPatch, on_fast_layers: Any
) -> None:
    from ft_core import fast

    on_fast_layers(True)
    own, checked = fast.compare, []

    def compare(path: Any, model: Any, batch: dict[str, Any], dtype: Any = None) -> Any:
        checked.append("pixel_values" in batch)
        if checked[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(path, model, batch, dtype)

    monkeypatch.setattr(fast, "compare", compare)
    made = ft("train", configure("llava"))
    assert made.code == 0, made.err
    assert checked == [True, False]
    assert "does not fit beside transformers' own; checked on text alone" in made.out + made.err
    assert "checked against transformers' own on a row, gradients within" in made.out + made.err


def test_held_out_rows_that_the_model_cannot_see_are_skipped_too(
    configure: Any, digits: Any, ft: Any, tmp_path: Path
) -> None:
    """An image whose shape the processor refuses: its row is neither measured nor asked about."""
    from PIL import Image

    Image.new("RGB", (2, 900)).save(tmp_path / "narrow.png")
    rows = digits(12)
    bad = json.loads(json.dumps(rows[0]))
    bad["messages"][0]["content"][0]["image"] = "narrow.png"
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:3], bad]))
    config = configure(rows=rows, eval_data=str(tmp_path / "held_out.jsonl"), vision={"on_bad_image": "skip"})
    done = ft("train", config)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["rows"] == 3
