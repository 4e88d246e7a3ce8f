"""Training computes what it says, leaves the documented folder, and touches nothing of other people's."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ROWS = [{"prompt": "add 1 and 2 =", "completion": " 3"}, {"prompt": "seven", "completion": " is a number"}]


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's device, as if it had no fast 16-bit products: all is computed in float32."""
    from ft_core.models import device, loading
    from ft_core.training import run

    pick = device.pick_device
    for module in (run, loading):
        monkeypatch.setattr(module, "pick_device", lambda: dataclasses.replace(pick(), dtype="float32"))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- every kind of training


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"r": 8}},
    "nf4": {"lora": {"r": 8}, "quantization": "nf4"},
    "int8": {"lora": {"r": 8}, "quantization": "int8"},
    "dora and rslora": {"lora": {"r": 8, "dora": True, "rslora": True, "targets": ["q_proj", "down_proj"]}},
    "saved modules": {"lora": {"r": 8, "alpha": 4, "modules_to_save": ["lm_head", "embed_tokens"]}, "rate": 2e-3},
    "full": {"lora": None, "rate": 1e-3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_and_the_result_loads_in_plain_libraries(
    kind: str, ft: Any, configure: Any, tmp_path: Path, tiny: Path, metrics: Any, float32: None
) -> None:
    """Plain transformers and PEFT give the answers that ft gives."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    run = tmp_path / "run"
    changes = {"rate": 1e-2, **KINDS[kind]}
    training = {"max_steps": 12, "learning_rate": changes.pop("rate")}
    done = ft("train", configure(training=training, **changes))
    assert done.code == 0, done.err
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert sum(row["loss"] for row in rows[-4:]) < sum(row["loss"] for row in rows[:4])

    prompts = ["add 3 and 4", "add 30 and 14", "what?"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    out = tmp_path / "answers.jsonl"
    words = ("generate", run, "--prompts", tmp_path / "prompts.txt", "--out", out, "--max-new-tokens", "6")
    assert ft(*words).code == 0
    mine = [json.loads(line)["answer"] for line in out.read_text(encoding="utf-8").splitlines()]

    folder = run / ("model" if kind == "full" else "adapter")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    quantized = {
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }.get(kind)
    if kind == "full":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        base = read(folder / "adapter_config.json")["base_model_name_or_path"]
        assert base == str(tiny.resolve())
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=quantized)
        model = peft.PeftModel.from_pretrained(model, folder)
    model.eval()
    theirs = []
    for prompt in prompts:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
        with torch.no_grad():
            answer = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, attention_mask=ids * 0 + 1)
        theirs.append(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))
    assert mine == theirs
    assert any(mine)


def test_full_fine_tuning_keeps_float32_weights_and_saves_what_it_computes_in(
    ft: Any, configure: Any, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    run = tmp_path / "run"
    assert ft("train", configure(lora=None, training={"max_steps": 2, "save_every": 1})).code == 0
    checkpoint = run / "checkpoints" / "checkpoint-2"
    assert {t.dtype for t in load_file(checkpoint / "model.safetensors").values()} == {torch.float32}
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert {s["exp_avg"].dtype for s in state.values()} == {torch.float32}
    saved = load_file(run / "model" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {getattr(torch, read(run / "environment.json")["dtype"])}
    master = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(saved[name], master[name].to(saved[name].dtype)) for name in master)
    assert read(run / "model" / "config.json")["use_cache"] is True


# -- the numbers


def by_hand(tiny: Path, documents: list[dict[str, list[int]]]) -> tuple[float, float]:
    """Loss and the norm of its gradient in float64: each document alone, no packing, no padding, no trainer."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64, attn_implementation="eager")
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for document in documents:
        logits = model(torch.tensor([document["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(document["labels"])[1:]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    (total / count).backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    return float(total.detach()) / count, norm


@pytest.fixture(scope="module")
def expected(tiny: Path, sums: Any) -> tuple[float, float]:
    """By hand, for the step that has all of twelve rows of different lengths."""
    from transformers import AutoTokenizer

    from ft_core.data import tokenize_rows

    rows = uneven(sums)
    return by_hand(tiny, list(tokenize_rows(rows, AutoTokenizer.from_pretrained(tiny), max_length=64)))


def uneven(sums: Any) -> list[dict[str, Any]]:
    long = [{"role": "user", "content": "please do " * n} for n in range(3)]
    answers = {"role": "assistant", "content": "1 2 3 4 5 6 7 8 9"}
    return [*sums(8), *({"messages": [turn, answers]} for turn in long), sums(9)[8]]


@pytest.mark.parametrize(
    ("packing", "batch_size", "accumulation", "recompute"),
    [(False, 12, 1, False), (False, 6, 2, False), (False, 1, 12, False), (True, 12, 1, False), (True, 1, 12, True)],
)
def test_one_step_over_all_rows_has_the_loss_and_gradient_computed_by_hand(
    packing: bool,
    batch_size: int,
    accumulation: int,
    recompute: bool,
    ft: Any,
    configure: Any,
    tmp_path: Path,
    metrics: Any,
    sums: Any,
    write_rows: Any,
    expected: tuple[float, float],
    float32: None,
) -> None:
    """However the rows are packed, padded or spread over micro-steps: the mean over all trained tokens.

    float32 rounds with u = 6e-8. An inner product of up to 128 terms is off by at most 128 u of its size, and 14 of
    them lie one behind the other, forward and again backward: 128 x 14 x 2 u = 2e-4 at the very worst.
    """
    data = write_rows(tmp_path / "uneven.jsonl", uneven(sums))
    training = {"max_steps": 1, "batch_size": batch_size, "gradient_accumulation": accumulation}
    config = configure(
        data=str(data),
        lora=None,
        packing=packing,
        training=training,
        activations="recompute" if recompute else "keep",
    )
    done = ft("train", config)
    assert done.code == 0, done.err
    [row] = metrics(tmp_path / "run")
    loss, norm = expected
    assert row["loss"] == pytest.approx(loss, rel=2e-4)
    assert row["grad_norm"] == pytest.approx(norm, rel=2e-4)


@pytest.mark.parametrize("waste", [0.0, 100.0])
def test_padded_and_unpadded_batches_train_alike(
    waste: float, ft: Any, configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metrics: Any, sums: Any,
    write_rows: Any, expected: tuple[float, float], float32: None,
) -> None:  # fmt: skip
    """Which of the two a CPU takes depends on how much would be padding; both are right."""
    from ft_core.training import sft

    monkeypatch.setattr(sft, "WASTE", waste)
    data = write_rows(tmp_path / "uneven.jsonl", uneven(sums))
    training = {"max_steps": 1, "batch_size": 12}
    assert ft("train", configure(data=str(data), lora=None, training=training)).code == 0
    [row] = metrics(tmp_path / "run")
    assert row["loss"] == pytest.approx(expected[0], rel=2e-4)
    assert row["grad_norm"] == pytest.approx(expected[1], rel=2e-4)


def test_equal_seeds_equal_runs(ft: Any, configure: Any, tmp_path: Path, losses: Any) -> None:
    config = configure(lora={"r": 4, "dropout": 0.1})
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert ft("train", config, f"output={tmp_path / name}", f"training.seed={seed}").code == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])  # bitsandbytes repacks 4-bit weights on a CPU
def test_measuring_does_not_change_the_training(
    quantization: str, ft: Any, configure: Any, tmp_path: Path, metrics: Any, rounding: float
) -> None:
    held_out = tmp_path / "held.jsonl"
    held_out.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    config = configure(lora={"r": 4, "dropout": 0.1}, quantization=quantization)
    assert ft("train", config, f"output={tmp_path / 'a'}").code == 0
    words = (f"eval_data={held_out}", "training.eval_every=1")
    assert ft("train", config, f"output={tmp_path / 'b'}", *words).code == 0
    one, two = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("a", "b"))
    assert one == pytest.approx(two, rel=rounding, abs=0)


# -- data


def test_held_out_rows_are_not_trained_on(ft: Any, configure: Any, tmp_path: Path, sums: Any, write_rows: Any) -> None:
    rows = sums(30)
    data = write_rows(tmp_path / "twice.jsonl", [*rows, *rows])  # a copy of a held-out row would be a leak
    assert ft("train", configure(data=str(data)), "eval_split=6", "training.max_steps=1").code == 0
    run = tmp_path / "run"
    held_out = [json.loads(line) for line in (run / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(held_out) == 6
    assert all(row in rows for row in held_out)
    digest = hashlib.sha256()
    for row in (row for row in [*rows, *rows] if row not in held_out):
        digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode())
    assert read(run / "environment.json")["data_sha256"] == digest.hexdigest()
    assert read(run / "summary.json")["data"]["train_rows"] == 48


@pytest.mark.parametrize(
    ("rows", "trained"),
    [
        # The answer's tokens and the token that ends it.
        (ROWS, ["3<|im_end|>", "is a number<|im_end|>"]),
        ([{"text": "all of it"}] * 2, ["all of it<|im_end|>"] * 2),
        ([{"instruction": "say", "input": "", "output": "yes"}], ["yes<|im_end|>"]),
        (
            [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}],
            ["ho<|im_end|>"],
        ),
    ],
)
def test_only_answers_are_trained_on(
    rows: list[Any], trained: list[str], ft: Any, configure: Any, tmp_path: Path, tiny: Path, write_rows: Any
) -> None:
    from transformers import AutoTokenizer

    data = write_rows(tmp_path / "data.jsonl", rows)
    assert ft("train", configure(data=str(data)), "training.max_steps=1").code == 0
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    counts = read(tmp_path / "run" / "summary.json")["data"]
    # "all of it" has no token before its first one, which therefore cannot be predicted.
    first = sum("text" in row for row in rows)
    if "prompt" in rows[0]:
        trained = [" " + answer for answer in trained]
    assert counts["trained_tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in trained) - first
    more = ft("train", configure(data=str(data), sft={"train_on": "all"}), "training.max_steps=1", "--overwrite")
    assert more.code == 0
    counts = read(tmp_path / "run" / "summary.json")["data"]
    assert counts["trained_tokens"] == counts["train_tokens"] - len(rows)


# -- the folder


def test_the_run_folder_is_the_documented_one(
    ft: Any, configure: Any, tmp_path: Path, tiny: Path, metrics: Any
) -> None:
    from importlib.metadata import version

    import ft_core

    run = tmp_path / "run"
    config = configure(training={"max_steps": 3, "save_every": 1, "keep_checkpoints": 2, "eval_every": 2})
    assert ft("train", config, "eval_split=5").code == 0
    assert names(run) == {
        "config.yaml", "environment.json", "held_out.jsonl", "metrics.jsonl", "summary.json", "checkpoints", "adapter",
        "evaluation.json", "report.html",
    }  # fmt: skip
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names(run / "adapter") == {"adapter_config.json", "adapter_model.safetensors", *tokenizer}
    assert names(run / "checkpoints") == {"checkpoint-2", "checkpoint-3"}
    assert "training_args.bin" not in names(run / "checkpoints" / "checkpoint-3")

    environment = read(run / "environment.json")
    assert environment["run_format"] == 1
    assert environment["ft_core"] == ft_core.__version__
    assert environment["libraries"]["peft"] == version("peft")
    assert environment["base_model"] == {"reference": str(tiny), "path": str(tiny.resolve()), "name": "tiny"}
    resolved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert resolved["eval_split"] == 5
    assert resolved["lora"]["targets"] == "all-linear"

    keys = {
        "kind", "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "memory",
        "seconds",
    }  # fmt: skip
    for row in metrics(run):
        assert keys <= set(row)
        assert all(isinstance(value, int | float) for key, value in row.items() if key != "kind")
    rows = metrics(run)
    assert [row["tokens"] for row in rows] == sorted({row["tokens"] for row in rows})
    assert [row["step"] for row in metrics(run, "eval")] == [2, 3]

    summary = read(run / "summary.json")
    assert (summary["status"], summary["steps"], summary["tokens"]) == ("finished", 3, rows[-1]["tokens"])
    assert summary["parameters"] > summary["trainable_parameters"] > 0
    assert list(summary["memory"]) == ["load", "train", "save", "evaluate"]
    assert summary["data"]["train_rows"] == 55
    evaluation = read(run / "evaluation.json")
    assert evaluation["data"] == "held_out.jsonl"
    assert evaluation["rows"] == 5
    assert set(evaluation["metrics"]) == {"loss", "perplexity"}
    assert [set(sample) for sample in evaluation["samples"]] == [{"prompt", "expected", "before", "after"}] * 5
    assert (run / "report.html").read_text(encoding="utf-8").lower().startswith("<!doctype html>")


def test_from_python(configure: Any, tmp_path: Path, tiny: Path) -> None:
    import ft_core
    from ft_core.config import load_config

    said: list[str] = []
    result = ft_core.train(load_config(configure()), say=said.append)
    assert (result.run, result.status, result.steps, result.evaluation) == (tmp_path / "run", "finished", 4, None)
    assert result.train_loss is not None
    assert said[0].startswith("tiny, sft, on ")
    with pytest.raises(ft_core.FtError, match="already holds a run"):
        ft_core.train(load_config(configure()))

    import peft

    model, _ = ft_core.load(tiny)
    adapted = ft_core.add_lora(model, r=4, alpha=3, rslora=True)
    assert type(adapted) is peft.PeftModelForCausalLM
    settings = adapted.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.use_rslora) == (4, 3, True)


# -- nothing of other people's


def snapshot() -> dict[str, Any]:
    """Every function and class that transformers, PEFT, TRL and accelerate have, by where it is found."""
    found = {}
    for name, module in list(sys.modules.items()):
        if module is None or name.partition(".")[0] not in ("transformers", "peft", "trl", "accelerate"):
            continue
        for key, value in list(vars(module).items()):
            if callable(value):
                found[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}.{key}.{k}": v for k, v in list(vars(value).items()) if k != "__dict__"}
    return found


def test_nothing_is_patched(ft: Any, configure: Any) -> None:
    assert ft("train", configure(), "eval_split=5").code == 0  # imports what is imported late
    before = snapshot()
    assert len(before) > 5000
    assert ft("train", configure(), "eval_split=5", "--overwrite", "quantization=nf4").code == 0
    after = snapshot()
    caches = ("__abstractmethods__", "_abc_impl", "__annotations__", "__annotations_cache__")
    changed = [
        name
        for name, value in before.items()
        if (name not in after or after[name] is not value) and name.rpartition(".")[2] not in caches
    ]
    assert changed == []


@pytest.fixture
def trapped(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attempt to reach another machine; each fails."""
    from huggingface_hub import constants

    attempts: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        attempts.append(args)
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    # Were the libraries told to stay offline, nothing would be proven.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    return attempts


def test_nothing_is_sent(ft: Any, configure: Any, tmp_path: Path, trapped: list[Any]) -> None:
    from huggingface_hub.utils import send_telemetry

    run = tmp_path / "run"
    for words in (["train", configure(), "eval_split=5"], ["eval", run]):
        done = ft(*words)
        assert done.code == 0, done.err
    time.sleep(0.2)  # telemetry goes out in a thread
    assert trapped == []
    send_telemetry("ft-test", library_name="ft")  # and this is what would have been seen
    end = time.monotonic() + 10
    while not trapped and time.monotonic() < end:
        time.sleep(0.01)
    assert trapped


@pytest.mark.gpu
def test_from_data_to_answers_on_a_gpu(ft: Any, configure: Any, tmp_path: Path, metrics: Any) -> None:
    """Measured before, between and after on the fast layers, and answered with and without the adapter."""
    run, config = tmp_path / "run", configure(training={"max_steps": 6, "save_every": 3, "eval_every": 2}, packing=True)
    done = ft("train", config, "eval_split=5")
    assert done.code == 0, done.err
    assert "fast layers" in done.out + done.err
    assert [row["step"] for row in metrics(run)] == list(range(1, 7))
    assert [row["step"] for row in metrics(run, "eval")] == [2, 4, 6]
    assert ft("eval", run).code == 0
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1 + 2 ="}\n{"prompt": "3 + 4 ="}\n', encoding="utf-8")
    answers = []
    assert ft("merge", run, "--out", tmp_path / "merged").code == 0
    for model in (run, tmp_path / "merged"):
        out = tmp_path / f"{model.name}.jsonl"
        done = ft("generate", model, "--prompts", prompts, "--out", out, "--max-new-tokens", 8)
        assert done.code == 0, done.err
        answers.append(out.read_text(encoding="utf-8").count("\n"))
    assert answers == [2, 2]


def test_a_module_that_is_trained_whole_is_trained_in_float32(configure: Any, ft: Any, tmp_path: Path) -> None:
    """In bfloat16 a step of a thousandth of a weight is rounded away; what is saved is in 16 bits, as the model is."""
    import torch
    from safetensors.torch import load_file

    training = {"max_steps": 4, "learning_rate": 1.0e-5, "save_every": 4}
    done = ft("train", configure(lora={"r": 2, "modules_to_save": ["lm_head"]}, training=training))
    assert done.code == 0, done.err
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    kept, saved = (
        load_file(folder / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
        for folder in (checkpoint, tmp_path / "run" / "adapter")
    )
    assert (kept.dtype, saved.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(kept.to(torch.bfloat16), saved)
    begun = kept.to(torch.bfloat16).float()
    assert ((kept - begun).abs() > 0).float().mean() > 0.9  # no number of 16 bits any more
