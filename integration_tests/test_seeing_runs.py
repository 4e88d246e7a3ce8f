"""`ft train` with `task: vision` and DPO, GRPO or GSPO, from a configuration to a whole run folder."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import seen
import torch
import yaml

family, ft = seen.family, seen.ft

EVEN = """
def even(prompts, completions, answer, images, **columns):
    assert all(picture.mode == "RGB" and picture.size == (56, 56) for pictures in images for picture in pictures)
    assert len(images) == len(answer) == len(completions)
    assert all(prompt[0]["content"][0]["image"].endswith(".png") for prompt, own in zip(prompts, images) if own)
    return [float(sum(map(ord, said[0]["content"])) % 2 == 0) for said in completions]
"""


@pytest.fixture
def even(tmp_path: Path) -> str:
    """A reward of the user's that half of all completions get; the row's columns and images are there."""
    (tmp_path / "even.py").write_text(EVEN)
    return f"{tmp_path / 'even.py'}:even"


def summary(run: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((run / "summary.json").read_text())["data"]
    return made


@pytest.mark.parametrize("name", seen.FAMILIES)
def test_rollouts_say_what_the_model_says(name: str, family: Any, tmp_path: Path) -> None:
    """Greedy completions of prompts of several lengths, images and sizes, read together and the cache repeated, are
    those that transformers generates of each prompt alone."""
    from transformers import AutoModelForImageTextToText

    from ft_core.config.load import check_config
    from ft_core.models import load_tokenizer
    from ft_core.models.source import find_model
    from ft_rl.inputs import beside_of
    from ft_rl.rollouts.own_model import OwnModel
    from ft_rl.rollouts.protocol import EngineJob, Sampling
    from ft_vision.beside import VisionInputs
    from ft_vision.loading import load_processor

    where = family(name)
    values = {"model": str(where), "task": "vision", "method": "grpo", "data": "rows.jsonl", "output": str(tmp_path)}
    config = check_config(values)
    source = find_model(str(where))
    tokenizer = load_tokenizer(source)
    model = AutoModelForImageTextToText.from_pretrained(where, dtype=torch.float32).eval()
    processor = load_processor(source, config, tokenizer)
    inputs = VisionInputs(config, model, processor)
    wide, small = (str(seen.draw_digit(tmp_path, i, size=size)) for i, size in ((3, (112, 56)), (5, (56, 56))))
    image, text = {"type": "image"}, {"type": "text", "text": "which digit?"}
    contents = [([image, text], [wide]), ([text, image, image], [small, wide]), ([text, image], [small]), ([text], [])]
    rows = [{"prompt": [{"role": "user", "content": parts}], "images": given} for parts, given in contents]
    assert inputs.usable(rows) == ([0, 1, 2, 3], [])
    prompts = [inputs.ids(row["prompt"], row["images"], prompting=True) for row in rows]
    engine = OwnModel(EngineJob(model, tokenizer, {}, None, print))
    given = [row["images"] for row in rows]
    stops = frozenset({tokenizer.eos_token_id})
    sampling = Sampling(6, 0.0, stops=stops, never=inputs.never)
    made = engine.generate(prompts, 2, sampling, step=0, beside=beside_of(inputs, given))
    for row, ids, (one, other) in zip(rows, prompts, made, strict=True):
        assert one.ids == other.ids
        asked = processor(
            text=processor.apply_chat_template(row["prompt"], add_generation_prompt=True),
            images=inputs.opened(row["images"]) or None,
            return_tensors="pt",
            add_special_tokens=False,
        )
        assert asked["input_ids"][0].tolist() == ids
        expected = model.generate(
            **asked, do_sample=False, max_new_tokens=6, eos_token_id=sorted(stops), pad_token_id=2,
            suppress_tokens=sorted(inputs.never),
        )  # fmt: skip
        assert one.ids == expected[0, len(ids) :].tolist()
    # the images count
    swapped = engine.generate(prompts[:1], 1, sampling, step=0, beside=beside_of(inputs, [[str(seen.draw_digit(
        tmp_path, 8, size=(112, 56)))]]))  # fmt: skip
    assert swapped[0][0].logprobs != made[0][0].logprobs


def test_pairs_are_told_apart_by_what_is_seen(family: Any, ft: Any, tmp_path: Path) -> None:
    """The same question and the same two answers, either of them chosen: a model that does not look gets half."""
    rows = seen.pairs(tmp_path, 4, digits=2, sizes=((56, 56),))
    for row in rows:
        row["prompt"] = seen.asked(Path(row["prompt"][0]["content"][0]["image"]))
        row["rejected"] = seen.said(row["rejected"][0]["content"][:1])
    path = seen.write(
        tmp_path,
        family("qwen3_vl"),
        rows,
        vision={"tower": "lora", "projector": "lora"},
        training={"max_steps": 30, "batch_size": 4, "learning_rate": 1.0e-2, "scheduler": "constant"},
    )
    made = ft("train", path)
    assert made.code == 0, made.err
    steps = seen.metrics(tmp_path / "run")
    assert steps[0]["rewards/accuracies"] == 0.0  # of equal policies
    assert steps[-1]["rewards/accuracies"] == 1.0
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    measured = ft("eval", tmp_path / "run", "--data", tmp_path / "rows.jsonl", "--json")
    assert measured.code == 0, measured.err
    found = json.loads(measured.out[measured.out.index("{") :])["metrics"]
    assert found["likelier"]["before"] <= 0.5
    assert found["accuracy"]["after"] == 1.0
    assert found["likelier"]["after"] > found["likelier"]["before"]


@pytest.fixture
def guesser(family: Any, ft: Any, tmp_path: Path) -> Path:
    """A model that says 0 or 1 whatever it sees: trained with either answer to each image."""
    rows = [
        {"messages": [*row["prompt"], *seen.said(answer)]} for row in seen.colours(tmp_path) for answer in ("0", "1")
    ]
    path = seen.write(
        tmp_path,
        family("qwen3_vl"),
        rows,
        method="sft",
        lora=None,
        output=str(tmp_path / "guesser"),
        training={"max_steps": 60, "batch_size": 8, "learning_rate": 3.0e-3},
    )
    made = ft("train", path)
    assert made.code == 0, made.err
    return tmp_path / "guesser" / "model"


@pytest.mark.slow
def test_what_is_seen_is_learnt_by_rewards(guesser: Path, ft: Any, tmp_path: Path) -> None:
    """From guessing, half of which is right, to the colour that is shown: nothing but a reward says which that is."""
    path = seen.write(
        tmp_path,
        guesser,
        seen.colours(tmp_path),
        method="grpo",
        rewards=["exact-match"],
        lora=None,
        vision={"tower": "full", "projector": "full"},
        grpo={"num_generations": 8, "max_completion_length": 2},
        training={"max_steps": 50, "batch_size": 32, "learning_rate": 2.0e-3, "scheduler": "constant"},
    )
    made = ft("train", path)
    assert made.code == 0, made.err
    rewards = [row["reward"] for row in seen.metrics(tmp_path / "run")]
    # Who does not look is right in half of 160 completions at best, give or take 6: 0.75 is out of reach.
    assert sum(rewards[:5]) / 5 < 0.55
    assert sum(rewards[-5:]) / 5 > 0.75


@pytest.mark.parametrize("method", ["grpo", "gspo"])
def test_a_run_on_images_is_whole(method: str, family: Any, ft: Any, even: str, tmp_path: Path) -> None:
    """Completions used twice, against a reference, with parts of the tower trained; bad images left out and counted."""
    rows = seen.prompts(tmp_path, 13)
    Path(rows[2]["prompt"][0]["content"][0]["image"]).write_bytes(b"no image")
    path = seen.write(
        tmp_path,
        family("llava"),
        rows,
        method=method,
        eval_split=4,
        rewards=[even, {"name": "length", "weight": 0.1, "max": 3}],
        vision={"tower": "lora", "projector": "full", "on_bad_image": "skip"},
        training={"batch_size": 4, "gradient_accumulation": 2, "max_steps": 4},
        **{method: {"max_completion_length": 3, "num_generations": 4, "num_iterations": 2, "beta": 0.05}},
    )
    made = ft("train", path)
    assert made.code == 0, made.err
    run = tmp_path / "run"
    steps = seen.metrics(run)
    assert len(steps) == 4
    # What is left of the gap is the token of images, a 320th, which is never drawn, and bfloat16.
    assert all(step["sampling/gap"] < 0.05 for step in steps)
    counts = summary(run)
    whole = counts["images"] + counts["bad_image_rows"]
    assert whole == 9
    assert ("left out: train row" in made.err) == (counts["bad_image_rows"] == 1)
    assert len({step["loss"] for step in steps}) == 4
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples
    assert all(row["prompt"].startswith(f"[{tmp_path / 'images'}/digit-") for row in samples)
    assert "digit-" in (run / "report.html").read_text()
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert {"reward", "even", "length"} <= set(evaluation["metrics"])
    assert ft("eval", run).code == 0

    # what is saved loads in plain transformers and PEFT
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    plain = AutoModelForImageTextToText.from_pretrained(family("llava"))
    adapted = PeftModel.from_pretrained(plain, run / "adapter").state_dict()
    assert any("vision_tower" in name and "lora_B" in name for name in adapted)
    assert any("projector" in name and "modules_to_save" in name for name in adapted)


def test_the_reference_of_a_whole_model_sees_too(family: Any, ft: Any, even: str, tmp_path: Path) -> None:
    path = seen.write(
        tmp_path,
        family("qwen2_5_vl"),
        seen.prompts(tmp_path, 4),
        method="grpo",
        lora=None,
        rewards=[even],
        grpo={"num_generations": 4, "max_completion_length": 3, "beta": 0.5},
        training={"batch_size": 8},
    )
    made = ft("train", path)
    assert made.code == 0, made.err
    divergence = [row["kl"] for row in seen.metrics(tmp_path / "run")]
    assert divergence[0] == 0  # it began as its reference
    assert all(value > 0 for value in divergence[1:])


def test_the_readmes_examples(family: Any, ft: Any, tmp_path: Path) -> None:
    """The configurations and rows of ft-vision's README, with a tiny model."""
    text = (Path(__file__).parents[1] / "packages/ft-vision/README.md").read_text(encoding="utf-8")
    section = text.partition("## Preference and rewards")[2].partition("\n## ")[0]
    lines = re.findall(r"```json\n(.*?)```", section, re.DOTALL)[0].splitlines()
    configurations = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    assert (len(lines), len(configurations)) == (2, 2)
    (tmp_path / "images").mkdir()
    seen.draw_digit(tmp_path / "images", 7).rename(tmp_path / "images" / "7.png")
    for name, line, example in zip(("pairs", "questions"), lines, configurations, strict=True):
        same = [line.replace('"7"}', f'"{n}"}}').replace("Which digit?", f"Which {n} digit?") for n in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(same))
        values = yaml.safe_load(example) | {"model": str(family("llava")), "output": str(tmp_path / name)}
        values["data"] = str(tmp_path / values["data"])
        values["training"] |= {"max_steps": 1}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        short = ["grpo.max_completion_length=2"] if name == "questions" else []
        made = ft("train", tmp_path / "config.yaml", "max_length=512", *short)
        assert made.code == 0, made.err


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_a_bad_image_stops_with_its_row(method: str, family: Any, ft: Any, tmp_path: Path) -> None:
    rows = seen.pairs(tmp_path, 3) if method == "dpo" else seen.prompts(tmp_path, 3)
    path = rows[1]["prompt"][0]["content"][0]["image"]
    Path(path).write_bytes(b"no image")
    more: dict[str, Any] = {} if method == "dpo" else {"rewards": ["exact-match"], "grpo": {"max_completion_length": 2}}
    made = ft("train", seen.write(tmp_path, family("llava"), rows, method=method, **more))
    assert made.code == 2
    assert f"row 2: {path}: holds no image format" in made.message
    assert "vision.on_bad_image: skip" in made.message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lora", [{"r": 4}, None], ids=["adapter", "whole"])
def test_images_of_pairs_may_be_skipped(lora: Any, family: Any, ft: Any, tmp_path: Path) -> None:
    """And without an adapter the reference is worked out before, on the same images."""
    rows = seen.pairs(tmp_path, 8)
    Path(rows[2]["prompt"][0]["content"][0]["image"]).write_bytes(b"no image")
    vision = {"on_bad_image": "skip", "max_pixels": 56 * 56}
    made = ft("train", seen.write(tmp_path, family("qwen2_5_vl"), rows, lora=lora, vision=vision))
    assert made.code == 0, made.err
    run = tmp_path / "run"
    counts = summary(run)
    assert (counts["bad_image_rows"], counts["images"]) == (1, 7)
    assert seen.metrics(run)[0]["loss"] == pytest.approx(0.6931, abs=1e-2)  # of a policy that is its reference
    size = json.loads((run / ("model" if lora is None else "adapter") / "processor_config.json").read_text())
    assert size["image_processor"]["size"]["longest_edge"] == 56 * 56


@pytest.mark.parametrize(("method", "name"), [("dpo", "qwen3_vl"), ("dpo", "gemma3"), ("grpo", "qwen2_5_vl")])
def test_the_fast_layers_train_alike(
    method: str, name: str, family: Any, ft: Any, even: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with the kernels' references in their places: checked on a row with its image, and the same losses.
    Some rows are of text alone, and so are whole batches."""
    from ft_core.models import device, loading
    from ft_core.training import run, speed

    pick = device.pick_device
    for module in (run, loading):
        monkeypatch.setattr(module, "pick_device", lambda: dataclasses.replace(pick(), dtype="float32"))
    rows = seen.pairs(tmp_path, 6) if method == "dpo" else seen.prompts(tmp_path, 6)
    words = [{**row, "prompt": "which?"} for row in rows[:4]]
    more: dict[str, Any] = {}
    if method == "grpo":
        more = {"rewards": [even], "grpo": {"max_completion_length": 3, "num_generations": 2, "beta": 0.5}}
    losses = []
    for kernels in (False, True):
        monkeypatch.setattr(speed, "runs_kernels", lambda device, kernels=kernels: kernels)
        output = tmp_path / f"run-{kernels}"
        training = {"max_steps": 5, "batch_size": 2, "learning_rate": 1.0e-2}
        path = seen.write(
            tmp_path, family(name), rows + words, method=method, output=str(output), training=training, **more
        )
        made = ft("train", path)
        assert made.code == 0, made.err
        assert ("fast layers: checked against transformers' own" in made.out + made.err) == kernels
        losses.append([row[kind] for row in seen.metrics(output) for kind in ("loss", "grad_norm")])
    assert len(set(losses[0])) > 5
    # Rounding in float32, which AdamW's first steps, by the signs of gradients, carry on.
    assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-5)


def test_workers_change_nothing(family: Any, ft: Any, tmp_path: Path) -> None:
    rows, losses = seen.pairs(tmp_path, 8), []
    for workers in (0, 1):
        output = str(tmp_path / f"run-{workers}")
        made = ft("train", seen.write(tmp_path, family("llava"), rows, vision={"workers": workers}, output=output))
        assert made.code == 0, made.err
        losses.append([row["loss"] for row in seen.metrics(Path(output))])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "kto"}, "'kto' does not train the task 'vision' yet (allowed: sft, dpo, grpo, gspo)"),
        ({"method": "ppo", "rewards": ["length"]}, "'ppo' does not train the task 'vision' yet"),
        ({"grpo": {"rollouts": "vllm"}}, "grpo.rollouts: the engine 'vllm' writes from text alone"),
        ({"grpo": {"environment": "a.py:A"}}, "grpo.environment: is of text alone"),
        ({"rewards": [{"name": "reward-model", "model": "m"}]}, "rewards.0: reward-model reads text alone"),
        ({"rewards": [{"name": "http", "url": "http://127.0.0.1:1"}]}, "rewards.0.columns: images cannot be sent"),
        ({"method": "dpo", "lora": {"bias": "all"}}, "lora.bias: all is not allowed with dpo"),
        ({"method": "dpo", "vision": {"tower": "lora"}, "lora": None}, "vision.tower: lora needs lora"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    changes: dict[str, Any], message: str, family: Any, ft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model is loaded")

    from transformers import PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", load)
    method = changes.get("method", "grpo")
    made_rows = seen.pairs(tmp_path, 2) if method in ("dpo", "kto") else seen.prompts(tmp_path, 2)
    values = {"method": method, **({"rewards": ["exact-match"]} if method == "grpo" else {}), **changes}
    made = ft("train", seen.write(tmp_path, family("llava"), made_rows, **values))
    assert made.code == 2
    assert message in made.message
    assert "Traceback" not in made.err


@pytest.fixture
def without_rl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if ft-rl were not installed."""
    from ft_core.plugins import registry as known

    module = sys.modules[known.__module__]
    everything = importlib.metadata.entry_points

    def others(**asked: Any) -> Any:
        return [point for point in everything(**asked) if not point.value.startswith("ft_rl")]

    monkeypatch.setattr(module, "entry_points", others)
    known.cache_clear()
    yield
    monkeypatch.undo()
    known.cache_clear()


def test_without_ft_rl_it_says_what_to_install(without_rl: None, family: Any, ft: Any, tmp_path: Path) -> None:
    made = ft("train", seen.write(tmp_path, family("llava"), seen.pairs(tmp_path, 2)))
    assert made.code == 2
    assert "method: " in made.message
    assert "pip install" in made.message
    assert "ft-rl" in made.message or "ft-core[rl]" in made.message
    made = ft("train", seen.write(tmp_path, family("llava"), seen.pairs(tmp_path, 2), method="kto"))
    assert "'kto' does not train the task 'vision' yet (allowed: sft, dpo, grpo, gspo)" in made.message
    # and what needs no ft-rl still trains
    rows = [{"messages": [*row["prompt"], *row["chosen"]]} for row in seen.pairs(tmp_path, 2)]
    made = ft("train", seen.write(tmp_path, family("llava"), rows, method="sft", training={"max_steps": 1}))
    assert made.code == 0, made.err
