"""`ft generate` and `ft chat` about images."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FAMILIES = ("qwen3_vl", "qwen2_5_vl", "gemma3", "llava")


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that rounding cannot change: a CPU of another make would compute in bfloat16."""
    import dataclasses

    from ft_core.models import device, loading

    pick = device.pick_device
    monkeypatch.setattr(loading, "pick_device", lambda: dataclasses.replace(pick(), dtype="float32"))


def own_answer(model: Path, asked: str, images: list[Path], new: int) -> str:
    """transformers' own: its processor for the words and pixels, its `generate`."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from ft_core.config import TrainConfig
    from ft_core.models import find_model
    from ft_vision import read_image
    from ft_vision.loading import load_processor

    tokenizer = AutoTokenizer.from_pretrained(model)
    config = TrainConfig(model=str(model), task="vision", data="-", output="-")
    processor = load_processor(find_model(str(model)), config, tokenizer)
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": asked}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    seen = {"images": [[read_image(image) for image in images]]} if images else {}
    inputs = processor(**seen, text=[text], return_tensors="pt", add_special_tokens=False)
    plain = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    made = plain.generate(**inputs, do_sample=False, max_new_tokens=new)
    return str(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_is_transformers_own(
    name: str, ft: Any, family: Any, digits: Any, tmp_path: Path, in_float32: None
) -> None:
    """Printed for one prompt; and in a file of prompts of several lengths, one batch, each as for itself."""
    digits(4)
    digits(1, size=(84, 56))
    images = sorted((tmp_path / "images").iterdir())
    model = family(name)
    words = ("--max-new-tokens", 6)
    one = ft("generate", model, "which digit?", "--image", images[0], "--image", images[1], *words)
    assert one.code == 0, one.err
    assert one.out == own_answer(model, "which digit?", images[:2], 6) + "\n"

    rows: list[dict[str, Any]] = [
        {"prompt": "which digit?", "images": [f"images/{images[0].name}", str(images[1])]},
        {"prompt": "and with a few more words, which digit is it?", "image": f"images/{images[3].name}"},
        {"prompt": "no image at all"},
        *({"prompt": "which digit?", "image": str(image)} for image in images),
    ]
    out = tmp_path / "out.jsonl"
    made = ft("generate", model, "--prompts", write(tmp_path / "prompts.jsonl", rows), "--out", out, *words)
    assert made.code == 0, made.err
    answers = read(out)
    for row, found in zip(rows[:3], answers, strict=False):
        shown = row.get("images", [row["image"]] if "image" in row else [])
        assert found["answer"] == own_answer(model, row["prompt"], [tmp_path / image for image in shown], 6)
        assert found.get("images", []) == shown
    assert len({row["answer"] for row in answers[3:]}) > 1  # it does look


def test_rows_are_those_of_the_training_data(ft: Any, family: Any, digits: Any, tmp_path: Path) -> None:
    """In each way of giving a conversation and its images, the answer that is there being left out."""
    (row,) = digits(1)
    image = row["messages"][0]["content"][0]["image"]
    shared = [{"from": "human", "value": "<image>\nwhich digit?"}, {"from": "gpt", "value": "0"}]
    rows = [
        row,
        {"messages": row["messages"][:1]},
        {"messages": [{"role": "user", "content": "which digit?"}], "images": [image]},
        {"prompt": "<image>which digit?", "image": image},
        {"conversations": shared, "image": image},
    ]
    out = tmp_path / "out.jsonl"
    words = ("--prompts", write(tmp_path / "rows.jsonl", rows), "--out", out, "--max-new-tokens", 4)
    made = ft("generate", family("qwen3_vl"), *words)
    assert made.code == 0, made.err
    assert len({found["answer"] for found in read(out)}) == 1
    lines = out.read_text()
    out.write_text(lines[: len(lines) // 2])  # an interrupted call is gone on with
    assert ft("generate", family("qwen3_vl"), *words).code == 0
    assert out.read_text() == lines


def test_a_run_is_asked(configure: Any, ft: Any, digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it learnt is what it answers, for one prompt, for a file of them, and in a chat."""
    rows = digits(2, digits=2)
    training = {"max_steps": 25, "batch_size": 2, "learning_rate": 2.0e-2}
    images = [tmp_path / row["messages"][0]["content"][0]["image"] for row in rows]
    made = ft("train", configure(rows=rows, lora=None, packing=False, training=training))
    assert made.code == 0, made.err
    run, out = tmp_path / "run", tmp_path / "out.jsonl"
    done = ft("generate", run, "which digit?", "--image", images[1])
    assert (done.code, done.out) == (0, "1\n")
    assert ft("generate", run, "--prompts", tmp_path / "rows.jsonl", "--out", out).code == 0
    assert [found["answer"] for found in read(out)] == ["0", "1"]
    typed = f"which digit?\n/new\n/image {images[1]}\nwhich digit?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    talked = ft("chat", run, "--image", images[0])
    assert (talked.code, talked.out) == (0, "0\n1\n\n")
    assert "/image FILE shows an image with the next message" in talked.err


def test_the_chat_remembers_its_images(ft: Any, family: Any, digits: Any, tmp_path: Path, monkeypatch: Any) -> None:
    digits(2)
    first, second = (str(image) for image in sorted((tmp_path / "images").iterdir()))
    lines = f"which digit?\n/image {second}\nand here?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    model = family("qwen3_vl")
    words = ("--max-new-tokens", 5, "--system", "be brief")
    talked = ft("chat", model, "--image", first, *words)
    assert talked.code == 0, talked.err

    def shown(image: str, text: str) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}

    turns: list[dict[str, Any]] = [shown(first, "which digit?")]
    answers: list[str] = []
    for number in range(2):
        out = tmp_path / f"{number}.jsonl"
        prompts = write(tmp_path / "prompts.jsonl", [{"messages": turns}])
        assert ft("generate", model, "--prompts", prompts, "--out", out, *words).code == 0
        answers.append(read(out)[0]["answer"])
        turns = [*turns, {"role": "assistant", "content": answers[-1]}, shown(second, "and here?")]
    assert talked.out == "".join(f"{answer}\n" for answer in answers) + "\n"


BAD = {
    "missing.png": (None, "cannot be read: No such file or directory"),
    "empty.png": (b"", "is empty"),
    "notes.png": (b"not an image", "holds no image format that is known here"),
    "none.png": (b"\x89PNG\r\n\x1a\n" + bytes(40), "has no pixels (0 x 0)"),
    "cut.png": (b"half", "is a truncated or damaged png file"),  # which only its pixels show
}


@pytest.mark.parametrize("name", BAD)
def test_an_image_that_cannot_be_used(name: str, ft: Any, family: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """One line that names it, before a model is loaded; nothing is written."""
    content, message = BAD[name]
    if content == b"half":
        from PIL import Image

        buffer = io.BytesIO()
        Image.effect_noise((64, 64), 50).save(buffer, "PNG")
        content = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    from ft_core.models import opening

    monkeypatch.setattr(opening, "open_target", None)
    model, out = family("llava"), tmp_path / "out.jsonl"
    prompts = write(tmp_path / "prompts.jsonl", ["a text", {"prompt": "which digit?", "image": name}])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    for words in (
        ("generate", model, "which digit?", "--image", tmp_path / name),
        ("generate", model, "which digit?", "--image", tmp_path / name, "--out", out),
        ("generate", model, "--prompts", prompts, "--out", out),
        ("chat", model, "--image", tmp_path / name),
    ):
        done = ft(*words)
        assert (done.code, done.out) == (2, "")
        assert message in done.err
        assert str(tmp_path / name) in done.err
        assert ("prompts.jsonl, line 2: " in done.err) == (words[2] == "--prompts")
        assert done.err.count("\n") == 1
        assert not out.exists()


def test_an_image_of_a_shape_that_the_model_cannot_see(ft: Any, family: Any, tmp_path: Path) -> None:
    from PIL import Image

    image, out = tmp_path / "line.png", tmp_path / "out.jsonl"
    Image.new("RGB", (300, 1)).save(image)
    done = ft("generate", family("qwen3_vl"), "which digit?", "--image", image, "--out", out)
    assert (done.code, done.out, out.exists()) == (2, "", False)
    assert done.message.startswith(f"ft generate: {image}: has 300 x 1 pixels, which the model cannot see: ")


def test_a_bad_image_does_not_end_a_chat_on_a_terminal(
    ft: Any, family: Any, digits: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    digits(1)
    (image,) = (tmp_path / "images").iterdir()
    lines = f"/image {tmp_path / 'none.png'}\n/image '{image}'\nwhich digit?\n"
    monkeypatch.setattr(sys, "stdin", Terminal(lines))
    model = family("llava")
    talked = ft("chat", model, "--max-new-tokens", 4)
    assert talked.code == 0
    assert f"{tmp_path / 'none.png'}: cannot be read: No such file or directory\n" in talked.err
    answer = ft("generate", model, "which digit?", "--image", image, "--max-new-tokens", 4).out
    assert talked.out == f"> > > {answer}> \n"


def test_what_does_not_go_together(ft: Any, family: Any, digits: Any, tmp_path: Path, monkeypatch: Any) -> None:
    digits(1)
    (image,) = (tmp_path / "images").iterdir()
    model, prompts = family("qwen3_vl"), write(tmp_path / "prompts.jsonl", ["a"])
    for words, message in (
        ((), "give a PROMPT, or a file of them with --prompts"),
        (("a", "--prompts", prompts, "--out", "o.jsonl"), "give a PROMPT, or a file of them with --prompts, not both"),
        (("--prompts", prompts), "--prompts needs --out, a .jsonl file for the answers"),
        (
            ("--prompts", prompts, "--out", tmp_path / "o.jsonl", "--image", image),
            "--image goes with a PROMPT: in a file of prompts each row names its own images",
        ),
        ((" ",), "PROMPT is empty: say what is asked"),
        (("a", "--overwrite"), "--overwrite is of --out, which is not given: the answer is printed"),
        (("a <|image_pad|>",), "either it knows no images, or a text holds '<|image_pad|>' itself"),
    ):
        done = ft("generate", model, *words)
        assert (done.code, done.out) == (2, "")
        assert done.message.endswith(message)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/image\n"))
    assert ft("chat", model).message.endswith("/image: give the file of an image")
    long = ft("generate", model, "a " * 1200, "--image", image)
    assert "tokens and leaves none of the model's 1024 positions: shorten it" in long.message


def test_a_model_of_text_sees_none(ft: Any, family: Any, digits: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Whether it is a model or a run; in a file of prompts too, and in the midst of a chat."""
    import transformers as t

    digits(1)
    (image,) = (tmp_path / "images").iterdir()
    tokenizer = t.AutoTokenizer.from_pretrained(family("llava"))
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = t.LlamaConfig(**text, num_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model, out = tmp_path / "text", tmp_path / "out.jsonl"
    t.LlamaForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2
    config = {"model": str(model), "data": str(write(tmp_path / "r.jsonl", rows)), "output": str(tmp_path / "run")}
    import yaml

    training = {"max_steps": 1, "batch_size": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**config, "max_length": 32, "training": training}))
    assert ft("train", tmp_path / "c.yaml").code == 0
    for asked, what in (
        (model, "is no model that task: vision knows"),
        (tmp_path / "run", "was trained with task: text"),
    ):
        for words in (("generate", asked, "a", "--image", image), ("chat", asked, "--image", image)):
            done = ft(*words)
            assert (done.code, done.out) == (2, "")
            assert done.message == (
                f"ft {words[0]}: --image: {asked} {what}, so that it sees no images: leave it, or take one that does"
            )
        prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "a", "image": str(image)}])
        done = ft("generate", asked, "--prompts", prompts, "--out", out)
        assert done.message == f"ft generate: {prompts}, line 1: has images, and {asked} sees none"
        assert (done.code, out.exists()) == (2, False)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {image}\n"))
    assert ft("chat", model).message == "ft chat: /image: this model sees no images"
    # printed for one prompt, as for a model that sees
    assert ft("generate", model, "a", "--max-new-tokens", 2).code == 0


def test_without_ft_vision_it_says_what_to_install(
    configure: Any, ft: Any, family: Any, digits: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    from ft_core.plugins import registry

    assert ft("train", configure(rows=digits(2), training={"max_steps": 1})).code == 0
    (image, _) = (tmp_path / "images").iterdir()
    done = ft("generate", tmp_path / "run", "a", "--image", image, "--max-new-tokens", 2)
    assert done.code == 0, done.err
    known = registry()
    rest = {group: known.entries(group) for group in ("ft.modalities", "ft.architectures")}
    for group, entries in rest.items():
        monkeypatch.setitem(known._found, group, [entry for entry in entries if entry.distribution != "ft-vision"])
    for asked in (family("qwen3_vl"), tmp_path / "run"):
        for words in (("generate", asked, "a", "--image", image), ("chat", asked, "--image", image)):
            done = ft(*words)
            assert (done.code, done.out) == (2, "")
            assert "modality 'vision' is not installed: pip install" in done.message
            assert done.err.count("\n") == 1
    done = ft("generate", family("qwen3_vl"), "a")  # no image: it is a model of no kind that is known
    assert done.code == 2
    assert "cannot be loaded: it is no language model that goes on from a text; what `pip install" in done.message
    listed = ft("models")
    assert "not installed: gemma3, idefics3, llava" in listed.out
    assert ft("plan", tmp_path / "config.yaml", "--gpu", "H200").message.startswith(
        "ft plan: task: modality 'vision' is not installed: pip install"
    )


def test_what_is_listed_mentions_vision(ft: Any) -> None:
    listed = {row["name"]: row for row in json.loads(ft("models", "--json").out)}
    assert (listed["qwen3_vl"]["side"], listed["qwen3"]["side"]) == ("language", "whole")
    assert "what sees or hears is transformers' own" in ft("models").out
    told = json.loads(ft("doctor", "--json").out)
    assert "vision" in told["tasks"]
    assert told["images"].startswith("Pillow ")
    assert "\nimages     Pillow " in ft("doctor").out
    assert "vision        ft-vision" in ft("plugins").out
