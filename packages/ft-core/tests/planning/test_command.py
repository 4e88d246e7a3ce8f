"""`ft plan` itself: tables, JSON, exit codes, one line for each mistake; and the line of `ft train`."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def written(folder: Any, tmp_path: Path, write_rows: Any) -> Any:
    """`written(shape={}, **keys)`: a configuration of a model that is a `config.json` alone, and data for it."""
    write_rows(tmp_path / "rows.jsonl", [{"text": "a text"}] * 640)

    def write(shape: dict[str, Any] | None = None, **keys: Any) -> Path:
        path = tmp_path / "plan.yaml"
        values = {"model": str(folder(**(shape or {}))), "data": str(tmp_path / "rows.jsonl"), **keys}
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


def test_a_table_from_a_configuration_alone(ft: Any, written: Any, tmp_path: Path) -> None:
    config = written(quantization="nf4", packing=False)
    before = set(tmp_path.rglob("*"))
    done = ft("plan", config, "--gpu", "RTX 4090")
    assert done.code == 0, done.err
    assert done.out.rstrip().endswith("fits")
    for word in ("weights", "peak", "32 of 32 kept", "tokens a second", "80 steps", "estimated"):
        assert word in done.out
    assert all(len(line) <= 140 for line in done.out.splitlines())
    assert set(tmp_path.rglob("*")) == before


def test_a_card_of_several_sizes_is_said(ft: Any, written: Any) -> None:
    """Beside the plan, so that JSON stays JSON."""
    done = ft("plan", written(quantization="nf4"), "--gpu", "A100", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["card"]["name"] == "A100 40GB"
    assert done.err == "--gpu 'A100' is taken as 'A100 40GB', the smallest of that name (also: A100 80GB)\n"
    mistaken = ft("plan", written(), "model=nowhere/at/all", "--gpu", "A100")
    assert (mistaken.code, mistaken.err.count("\n")) == (2, 1)
    told = ft("plan", written(quantization="nf4"), "--gpu", "A100", "--memory", "70GiB", "--json")
    assert (told.err, json.loads(told.out)["card"]["name"]) == ("", "A100 80GB")


def test_json_for_machines(ft: Any, written: Any) -> None:
    words = ("training.batch_size=4", "data=somebody/something")  # on the Hub, which is not asked
    done = ft("plan", written(quantization="nf4"), *words, "--gpu", "h100", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    memory = found["memory"]
    assert sum(memory["parts"].values()) == memory["peak"] <= memory["limit"]
    assert sum(found["layers"].values()) == 32
    assert found["micro_batch"]["configured"] == 4 <= found["micro_batch"]["largest"]
    assert found["time"]["tokens_per_second"] > 1000
    assert found["steps"] is None
    assert found["would_fit"] == []
    assert found["fits"] is True


def test_what_would_make_it_fit_is_true(ft: Any, written: Any) -> None:
    config = written()
    done = ft("plan", config, "--gpu", "RTX 3060", "--json")
    assert done.code == 1
    found = json.loads(done.out)
    assert found["fits"] is False
    assert any("quantization: nf4" in way for way in found["would_fit"])
    assert any(re.search(r"a GPU with \d+ GiB", way) for way in found["would_fit"])
    for way in found["would_fit"]:
        gib = re.search(r"a GPU with (\d+) GiB", way)
        if gib is not None:
            assert ft("plan", config, "--memory", f"{gib[1]}GiB").code == 0
            assert ft("plan", config, "--memory", f"{int(gib[1]) - 1}GiB").code == 1
            continue
        words = [part.split(", the longest")[0].replace(": ", "=") for part in re.split(r" and |, (?=training)", way)]
        assert ft("plan", config, *words, "--gpu", "RTX 3060").code == 0, way


def test_the_longest_that_fits(ft: Any, written: Any) -> None:
    config = written(quantization="nf4", training={"batch_size": 1}, max_length=131072)
    done = ft("plan", config, "--memory", "12GiB", "--json")
    assert done.code == 1
    said = next(way for way in json.loads(done.out)["would_fit"] if way.startswith("max_length"))
    length = int(re.findall(r"\d+", said)[0])
    assert ft("plan", config, f"max_length={length}", "--memory", "12GiB").code == 0
    assert ft("plan", config, f"max_length={length + 64}", "--memory", "12GiB").code == 1


def test_a_bound_that_is_too_low(ft: Any, written: Any) -> None:
    done = ft("plan", written(quantization="nf4", memory="5GiB"), "--gpu", "H100", "--json")
    assert done.code == 1
    said = next(way for way in json.loads(done.out)["would_fit"] if way.startswith("memory"))
    assert ft("plan", written(quantization="nf4"), said.replace(": ", "="), "--gpu", "H100").code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "RTX 409"], "did you mean 'RTX 4090'"),
        (["--gpu", "H100", "--memory", "12 lots"], "--memory '12 lots' is no amount"),
        (["--gpu", "H100", "--memory", "0GiB"], "units: GiB, MiB, GB, MB"),
        (
            ["--memory", "-3GiB"],
            "ft plan: --memory '-3GiB' is no amount (allowed: one above zero, such as 12GiB; units: ",
        ),
        (["--memory", "-3"], "ft plan: --memory '-3' is no amount (allowed: one above zero, such as 12GiB; units: "),
        (
            ["--memory", "-.5GiB", "lora.r=4"],
            "ft plan: --memory '-.5GiB' is no amount (allowed: one above zero, such as",
        ),
        (["--max-length", "9"], "--max-length 9; a setting is written without dashes, as key=value"),
        (["--gpu", "H100", "quantisation=nf4"], "did you mean 'quantization'"),
        (["--gpu", "H100", "model=nowhere/at/all"], "nowhere/at/all"),
        (["--gpu", "H100", "lora.targets=[nothing]"], "nothing"),
        (["--gpu", "H100", "max_length=9999999"], "positions of"),
        (["max_length=9999999"], "positions of"),  # before anything is asked of the card
        (["data=nowhere.jsonl", "--gpu", "H100"], "ft plan: nowhere.jsonl: no such file or folder"),
        (["data=nowhere.jsonl", "--memory", "80GiB", "model=a/b"], "ft plan: nowhere.jsonl: no such file or folder"),
        (["eval_data=nowhere.jsonl", "--gpu", "H100"], "ft plan: nowhere.jsonl: no such file or folder"),
    ],
)
def test_mistakes_are_one_line(ft: Any, written: Any, words: list[str], said: str) -> None:
    done = ft("plan", written(), *words)
    assert done.code == 2
    assert len(done.err.strip().splitlines()) == 1
    assert said in done.err


def test_a_hub_name_that_cannot_be_reached_is_one_line(
    ft: Any, written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    # A port that nobody listens on; and a cache that has the one model and not the other.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    done = ft("plan", written(), "model=nobody/nothing", "--gpu", "H100")
    assert done.code == 2
    assert len(done.err.strip().splitlines()) == 1
    assert "not in the Hub's cache" in done.message
    snapshot = tmp_path / "cache" / "models--somebody--something" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc", encoding="utf-8")
    path = written()
    model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    (snapshot / "config.json").write_bytes((Path(model) / "config.json").read_bytes())
    done = ft("plan", path, "model=somebody/something", "--gpu", "H100")
    assert done.code == 0, done.err
    assert done.out.startswith("somebody/something (8.03 B)")


def test_without_a_gpu_one_has_to_be_named(ft: Any, written: Any) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = ft("plan", written())
    assert done.code == 2
    assert "--gpu" in done.message


def test_a_gguf_model_is_planned_from_its_header(
    ft: Any, written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is wrong without it is said first: nothing is unpacked in either case."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'gguf>=0.17'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    shape = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    file = tmp_path / "small.gguf"
    _write_gguf(gguf, file, shape)
    path = written({**shape, "tie_word_embeddings": True})
    plain = json.loads(ft("plan", path, "max_length=256", "--gpu", "H100", "--json").out)
    done = ft("plan", path, f"model={file}", "max_length=256", "--gpu", "H100", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found.pop("model") == "small"
    assert found == {key: value for key, value in plain.items() if key != "model"}
    refused = ft("plan", path, f"model={file}", "max_length=1024", "--gpu", "H100")
    assert (refused.code, refused.out) == (2, "")
    assert "max_length 1024 is more than the 512 positions of" in refused.message
    file.write_bytes(b"GGUF, and then nothing that is one")
    for words, said in (
        (["--gpu", "H900"], "--gpu 'H900' is no card that is known"),
        (["--gpu", "H100"], f"the GGUF model {file} cannot be read: "),
    ):
        refused = ft("plan", path, f"model={file}", *words)
        assert (refused.code, refused.out) == (2, "")
        assert refused.message.startswith(f"ft plan: {said}")
    assert not (tmp_path / "cache").exists()


def _write_gguf(gguf: Any, path: Path, shape: dict[str, Any]) -> None:
    """The header of a llama of this shape; one tensor stands for its weights, which nobody reads."""
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(shape["vocab_size"])])
    writer.add_token_merges(["t 0"])
    writer.add_tensor("token_embd.weight", np.zeros((shape["vocab_size"], shape["hidden_size"]), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_family_that_is_not_known_says_that_it_is_rough(ft: Any, written: Any) -> None:
    shape = {"model_type": "cohere2", "architectures": ["Cohere2ForCausalLM"]}
    done = ft("plan", written(shape, quantization="nf4"), "--gpu", "H100")
    assert done.code == 0, done.err
    assert "rough: trained on transformers' own layers" in done.out


def test_full_fine_tuning(ft: Any, written: Any) -> None:
    config = written(lora=None)
    refused = ft("plan", config, "training.optimizer=adamw_torch", "--gpu", "H100")
    assert refused.code == 1
    assert "would fit: training.optimizer: adamw_8bit" in refused.out
    done = ft("plan", config, "--gpu", "H100")
    assert done.code == 0, done.err
    assert "optimizer      paged_adamw_8bit" in done.out
    done = ft("plan", config, "--gpu", "H200")
    assert done.code == 0, done.err
    assert "optimizer      adamw_8bit\n" in done.out
    assert "full fine-tuning" in done.out


def test_training_says_it_in_one_line(planned: Any) -> None:
    from ft_core.planning.show import line

    said = line(planned("RTX 4090", quantization="nf4"))
    assert re.fullmatch(r"plan: about 17\.\d of \d+\.\d GiB, \d+\.\dk tokens a second, 32 of 32 kept", said)
    assert "may run out of memory" in line(planned("RTX 4090", quantization="none", gib=12))
    assert line(planned("H100", 1, 65536, quantization="nf4", gib=14)).endswith("GiB of weights in the host's memory")
    tiled = planned("H100", 1, 65536, quantization="nf4", gib=14)
    tiled.planner.lends = False
    peak = tiled.planner.peak(tiled.config, tiled.card)
    assert line(dataclasses.replace(tiled, peak=peak)).endswith("tiles of 4096 tokens")


def test_training_goes_on_without_a_plan(
    folder: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ft_core import planning
    from ft_core.config.load import check_config
    from ft_core.models import Device, ModelSource
    from ft_core.planning import find_card
    from ft_core.training.speed import foresee

    path = folder()
    config = check_config({"model": str(path), "data": "rows.jsonl"})
    source = ModelSource(str(path), path, "m")
    said: list[str] = []
    assert foresee(config, source, Device("cpu", "a CPU", "float32", 2**34, 2**34), said.append) is None
    # A GPU that is none: whatever fails is left to the training itself, and logged for those who ask why.
    (path / "config.json").write_text("{", encoding="utf-8")
    monkeypatch.setattr(planning, "card_here", lambda: find_card("H100"))
    with caplog.at_level("DEBUG", logger="ft_core.training.speed"):
        assert foresee(config, source, Device("cuda", "a card", "bfloat16", 2**34, 2**34), said.append) is None
    assert said == []
    (record,) = caplog.records
    assert (record.levelname, record.exc_info is not None) == ("DEBUG", True)


def test_training_takes_the_tile_from_its_plan(
    planned: Any, folder: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the card itself is real: there is none here."""
    from transformers import AutoModelForCausalLM

    from ft_core import add_lora, fast, planning
    from ft_core.config.load import check_config
    from ft_core.models import Device, ModelSource
    from ft_core.training.speed import foresee, recomputes

    monkeypatch.setattr(planning, "card_here", lambda: planning.find_card("H100"))
    path = folder()
    values = {"model": str(path), "data": "rows.jsonl", "quantization": "nf4", "max_length": 65536}
    config = check_config({**values, "training": {"batch_size": 1}})
    said: list[str] = []
    free = 13 * 2**30  # others have the rest of the card
    device = Device("cuda", "H100", "bfloat16", 80 * 2**30, free)
    found = foresee(config, ModelSource(str(path), path, "m"), device, said.append)
    assert found is not None
    assert found.limit <= free
    assert len(said) == 1
    assert said[0].startswith("plan: about 1")
    model = add_lora(AutoModelForCausalLM.from_pretrained(tiny))
    fast.enable(model)
    for plan, tile in ((found, 4096), (planned("H100"), None)):
        assert not recomputes(model, config, device, said.append, plan)
        handle = fast.fast_path_of(model)
        assert handle is not None
        assert handle.tile == tile


def test_a_disk_folder_that_is_not_there(ft: Any, written: Any, tmp_path: Path) -> None:
    """It is for this machine; beside another card nothing of this machine counts."""
    config = written(quantization="nf4", disk=str(tmp_path / "nowhere"))
    refused = ft("plan", config)
    assert (refused.code, refused.out) == (2, "")
    assert refused.message.startswith(f"ft plan: disk: '{tmp_path / 'nowhere'}' is no folder (allowed: auto, off,")
    assert ft("plan", config, "--gpu", "H100").code == 0


@pytest.mark.gpu
def test_training_on_a_gpu_says_its_plan_before_it_loads(ft: Any, configure: Any) -> None:
    done = ft("train", configure(training={"max_steps": 1}))
    assert done.code == 0, done.err
    assert re.search(r"^plan: about \d+\.\d of \d+\.\d GiB", done.err, re.MULTILINE)


def test_the_end_of_the_search_is_called_so(ft: Any, written: Any) -> None:
    small = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1000}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    done = ft("plan", written({**small, **heads}, max_length=64), "--gpu", "H200")
    assert done.code == 0, done.err
    assert "the largest that fits: at least 4096" in done.out
    assert "at least" not in ft("plan", written(quantization="nf4"), "--gpu", "H100").out


def test_what_keeps_steps_from_being_recorded_is_said(ft: Any, written: Any) -> None:
    """Where the host's launches take longer than the GPU."""
    small = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = written(small, max_length=512)
    said = "steps are launched kernel by kernel, none is recorded: "
    assert said not in ft("plan", config, "--gpu", "H200").out
    assert said + "the memory is bounded" in ft("plan", config, "--gpu", "H200", "memory=40GiB").out
    assert said + "the card is older" in ft("plan", config, "--gpu", "V100 32GB").out
    assert said not in ft("plan", written(max_length=2048), "--gpu", "RTX 4090").out  # there the GPU is slower


def test_so_few_steps_that_little_is_learnt(ft: Any, written: Any, write_rows: Any, tmp_path: Path) -> None:
    path = written()
    write_rows(tmp_path / "rows.jsonl", [{"text": "a text"}] * 120)
    words = ("--gpu", "H100", "quantization=nf4")
    done = ft("plan", path, *words)
    assert done.code == 0, done.err
    assert "run            1 step (" in done.out
    assert (
        "note           only 1 step in all: that may be too few to learn from; raise training.epochs to 10" in done.out
    )
    assert "only" not in ft("plan", path, *words, "training.epochs=10").out
