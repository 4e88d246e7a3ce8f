"""Whether a merge that is there is taken by an export, merged anew, or left alone; and where products are computed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ft_export import ExportError, merge
from ft_export.checkpoints import Checkpoint
from ft_export.exporting import whole_model
from ft_export.folders import made_for, new_file, new_folder, scratch_folder
from ft_export.merging import is_current
from ft_export.merging.record import MARKER
from ft_export.runs import open_source


@pytest.fixture
def run(base: Path, make_run: Any, make_adapter: Any, tmp_path: Path) -> Path:
    """A run whose base is its own copy, so that it may be changed."""
    own = tmp_path / "base"
    shutil.copytree(base, own)
    made: Path = make_run(base=own)
    make_adapter(made / "adapter", own, tokenizer=True)
    return made


@pytest.fixture
def other(run: Path, make_adapter: Any, tmp_path: Path) -> Path:
    folder: Path = make_adapter(tmp_path / "other", tmp_path / "base", seed=2)
    return folder


def _export(run: Path, **options: Any) -> list[str]:
    lines: list[str] = []
    whole_model(open_source(run), lines, **options)
    return lines


def _touched(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_base_that_was_changed_since(file: str, run: Path, tmp_path: Path) -> None:
    merge(run)
    assert is_current(run / "merged", run / "adapter")
    _touched(tmp_path / "base" / file)
    assert not is_current(run / "merged", run / "adapter")
    lines = _export(run)
    assert lines[0] == f"the merge in {run / 'merged'} was on its base before that was changed: merged anew"
    assert _export(run) == [f"used the merge in {run / 'merged'}, made from this adapter"]


def test_new_weights_of_the_base_are_in_the_next_export(run: Path, make_model: Any, tmp_path: Path) -> None:
    merge(run)
    make_model(tmp_path / "base", seed=9)
    _export(run)
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(Checkpoint(run / "merged").tensor(name), Checkpoint(tmp_path / "base").tensor(name))


def test_a_merge_on_another_base_is_neither_taken_nor_replaced(run: Path, make_model: Any, tmp_path: Path) -> None:
    named = make_model(tmp_path / "named", seed=9)
    merge(run, base=str(named))
    before = (run / "merged" / MARKER).read_bytes()
    assert not is_current(run / "merged", run / "adapter")
    with pytest.raises(ExportError, match=r"was on .*named and not on the adapter's own base .*base, and an export"):
        _export(run)
    assert (run / "merged" / MARKER).read_bytes() == before
    source, lines = open_source(run / "merged"), []
    assert whole_model(source, lines) == run / "merged"  # named itself it is exported as it is


def test_a_base_that_has_moved_and_was_named(run: Path, tmp_path: Path) -> None:
    """There is no other way to merge then; and a copy with its times is the same base."""
    shutil.copytree(tmp_path / "base", tmp_path / "copy")  # copy2 keeps the times
    merge(run, base=str(tmp_path / "copy"))
    assert _export(run) == [f"used the merge in {run / 'merged'}, made from this adapter"]
    shutil.rmtree(tmp_path / "base")
    (line,) = _export(run)
    assert line.endswith("made from this adapter (its base is not here to be compared)")


def test_several_adapters_are_exported_as_they_were_merged(run: Path, other: Path) -> None:
    merge(run, adapters=[(other, 0.5)])
    (line,) = _export(run)
    assert line == (
        f"used the merge in {run / 'merged'}, made from this adapter (weight 1) and {other} (weight 0.5) by cat"
    )
    shutil.move(other, other.with_name("moved"))
    (line,) = _export(run)
    assert line.endswith(f"({other} is not here to be compared)")


@pytest.mark.parametrize("which", ["the first", "the other"])
def test_several_adapters_of_which_one_was_trained_again(
    which: str, run: Path, other: Path, make_adapter: Any, tmp_path: Path
) -> None:
    merge(run, adapters=[(other, 0.5)])
    changed = run / "adapter" if which == "the first" else other
    make_adapter(changed, tmp_path / "base", seed=8)
    before = (run / "merged" / MARKER).read_bytes()
    assert not is_current(run / "merged", run / "adapter")
    why = "of an earlier adapter" if which == "the first" else f"made with an earlier {other}"
    with pytest.raises(ExportError) as caught:
        _export(run)
    assert f"was {why}, and an export would put a plain merge" in str(caught.value)
    assert (run / "merged" / MARKER).read_bytes() == before


def test_one_with_a_weight_is_not_replaced_either(run: Path, make_adapter: Any, tmp_path: Path) -> None:
    merge(run, weight=0.5)
    assert _export(run)[0].endswith("made from this adapter (weight 0.5) by cat")
    make_adapter(run / "adapter", tmp_path / "base", seed=8)
    with pytest.raises(ExportError, match="make it again with ft merge --overwrite"):
        _export(run)


def test_what_was_not_proven_is_merged_again_as_it_was(run: Path, other: Path) -> None:
    settings: dict[str, Any] = {"weight": 0.5, "combination": "dare_ties", "density": 0.5, "seed": 3}
    merge(run, adapters=[(other, -2.0)], majority_sign="frequency", skip_proof=True, dtype="float16", **settings)
    said = json.loads((run / "merged" / MARKER).read_text())
    lines = _export(run)
    assert lines[0] == f"the merge in {run / 'merged'} was not proven: merged anew"
    again = json.loads((run / "merged" / MARKER).read_text())
    assert again["logprobs"] is not None
    for key in ("combination", "adapters", "dtype", "files_sha256"):
        assert again[key] == said[key]


# --- where it is computed


def test_a_device_that_is_not_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ExportError, match=r"--device cuda: torch finds no CUDA device here; leave it out, or pass"):
        merge(run, device="cuda")
    with pytest.raises(ExportError, match=r"--device 'tpu' is not known \(allowed: cpu, cuda, auto\)"):
        merge(run, device="tpu")
    assert not (run / "merged").exists()
    merge(run, device="auto")
    assert json.loads((run / "merged" / MARKER).read_text())["device"] == "cpu"


PRECISION = """
import torch
{asked}
from ft_export.merging.arithmetic import exact_products
def state():
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None
    return older, torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision
before = state()
with exact_products():
    assert not torch.backends.cuda.matmul.allow_tf32  # which raises where torch would refuse to multiply
    if torch.cuda.is_available():
        torch.manual_seed(0)
        a, b = torch.randn(256, 256).cuda(), torch.randn(256, 256).cuda()
        assert (a @ b - a.double() @ b.double()).abs().max() < 1e-4
assert state() == before, (state(), before)
"""


@pytest.mark.parametrize(
    "asked",
    ["", "torch.set_float32_matmul_precision('high')", "torch.backends.cuda.matmul.allow_tf32 = True",
     "torch.backends.cuda.matmul.fp32_precision = 'tf32'", "torch.backends.fp32_precision = 'tf32'"],
)  # fmt: skip
def test_products_are_exact_whatever_the_process_asked_for(asked: str, forks: Any) -> None:
    """In a process of its own, since torch's settings are the process's."""
    done = forks.run(PRECISION.format(asked=asked))
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["lora", "dora", "embeddings"])
def test_on_a_gpu(kind: str, base: Path, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks; the checks that hold on the processor hold, with TF32 asked for by the process."""
    from ft_export import checkpoints

    monkeypatch.setattr(checkpoints, "BLOCK", 500)
    settings: dict[str, Any] = {
        "lora": {"r": 16},
        "dora": {"use_dora": True},
        "embeddings": {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True},
    }[kind]
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    on_cpu = merge(adapter, tmp_path / "cpu")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    torch.set_float32_matmul_precision("high")
    try:
        on_gpu = merge(adapter, tmp_path / "gpu", device="cuda")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.cuda.max_memory_allocated() > before  # it was used
    assert on_gpu.weights.largest_error <= 1
    assert on_gpu.weights.merged == on_cpu.weights.merged
    one, other = Checkpoint(on_gpu.folder), Checkpoint(on_cpu.folder)
    for name in one:  # where fp32's last bit decides a rounding, a value may go to its neighbour
        differing = (one.tensor(name) != other.tensor(name)).sum().item()
        assert differing <= max(1, one.tensor(name).numel() // 1000), name
    assert json.loads((on_gpu.folder / MARKER).read_text())["device"] == "cuda"


# --- what a failure leaves


@pytest.mark.parametrize("kind", [new_folder, new_file, scratch_folder])
def test_folders_made_for_what_failed_go(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "a" / "b" / "out", tmp_path / "there" / "out"):
        with pytest.raises(ZeroDivisionError), kind(out):
            raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_folders_that_hold_something_stay(tmp_path: Path) -> None:
    def fail() -> None:
        with made_for(tmp_path / "a" / "b" / "out"):
            (tmp_path / "a" / "mine").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


@pytest.mark.parametrize("target", ["vllm", "sglang", "hub", "ollama", "open_webui", "gguf"])
def test_a_failed_export_leaves_no_empty_folder(target: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    options: dict[str, dict[str, str]] = {"hub": {"repo": "me/dates", "dry": "yes"}}
    merge(run)
    name = "model.safetensors"
    (run / "merged" / name).write_bytes((run / "merged" / name).read_bytes()[:-1] + b"x")
    export = importlib.import_module(f"ft_export.{target}.export").export
    if target in ("gguf", "ollama", "open_webui"):
        pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
        pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')
    with pytest.raises(ExportError, match="is not what the merge left there"):
        export(run, options=options.get(target))
    assert not (run / "export").exists()
