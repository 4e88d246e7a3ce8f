"""What a reviewer found: data that could be lost, and checks that did not see."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ft_export import ExportError, merge
from ft_export.bases import copy_tokenizer
from ft_export.exporting import check_target, whole_model
from ft_export.merging.weights_check import half_ulp
from ft_export.runs import open_source


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_half_a_unit_at_zero_is_that_of_the_smallest_numbers(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    zero, smallest = half_ulp(torch.tensor([0.0, info.tiny], dtype=torch.float64), dtype).tolist()
    assert zero == smallest == info.tiny * info.eps / 2


@pytest.mark.parametrize("marker", ["Modelfile", "model.json", "launch.sh", "proof.json"])
def test_no_target_replaces_what_is_to_be_exported(
    marker: str, make_model: Any, make_run: Any, make_adapter: Any, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "home" / "model")
    (base / marker).write_text("FROM .")
    source = open_source(base)
    with pytest.raises(ExportError, match="holds what is to be exported"):
        check_target(base, source, marker, True)
    run = make_run(base=base)
    make_adapter(run / "adapter", base, tokenizer=True)
    for folder in (run, run / "adapter", base, base.parent):
        with pytest.raises(ExportError, match="holds what is to be exported"):
            check_target(folder, open_source(run), marker, True)
    check_target(run / "export" / "x", open_source(run), marker, False)


def test_a_folder_with_a_file_of_the_same_name_is_not_an_earlier_export(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "project"
    other.mkdir()
    (other / "launch.sh").touch()
    with pytest.raises(ExportError, match=r"holds something else \(it has no proof\.json\)"):
        check_target(other, open_source(base), "launch.sh", True)


def test_what_lies_in_an_outdated_merge_is_not_lost(base: Path, make_run: Any, make_adapter: Any) -> None:
    run = make_run(base=base)
    make_adapter(run / "adapter", base, tokenizer=True)
    merge(run, dtype="float16", skip_proof=True)
    mine = run / "merged" / "export" / "gguf" / "mine.gguf"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(ExportError, match="merged anew, and export in it would be lost: move that"):
        whole_model(open_source(run), [])
    assert mine.exists()
    shutil.rmtree(run / "merged" / "export")
    lines: list[str] = []
    whole_model(open_source(run), lines)
    assert lines[0].endswith("was not proven: merged anew")
    assert json.loads((run / "merged" / "merge.json").read_text())["dtype"] == "float16"  # as it was asked for


def test_a_value_that_is_too_large_for_float16_is_named(base: Path, make_adapter: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, tmp_path / "large")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 7e4
    save_file(tensors, tmp_path / "large" / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(tmp_path / "adapter", base)
    with pytest.raises(ExportError, match=r"model\.norm\.weight is out of the range of float16: pass --dtype bfloat16"):
        merge(adapter, tmp_path / "out", base=str(tmp_path / "large"), dtype="float16", skip_proof=True)


def test_a_trained_bias_of_a_layer_without_one(base: Path, make_adapter: Any, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(ExportError, match=r"trains a bias of model\.layers\.\d\.self_attn\.q_proj .*which the base"):
        merge(adapter, tmp_path / "out", skip_proof=True)


def test_links_out_of_a_model_are_not_followed(base: Path, tmp_path: Path) -> None:
    model, secret = tmp_path / "model", tmp_path / "secret"
    shutil.copytree(base, model)
    secret.write_text("a key")
    (model / "additional_chat_templates").mkdir()
    os.symlink(secret, model / "additional_chat_templates" / "a.jinja")
    with pytest.raises(ExportError, match=r"a\.jinja is a link to .*secret, outside of the model's folder"):
        copy_tokenizer(tmp_path, model, tmp_path)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"  # as the Hub's cache has it
    shutil.copytree(base, snapshot)
    blob = tmp_path / "models--a--b" / "blobs" / "2"
    blob.parent.mkdir()
    (snapshot / "tokenizer.json").rename(blob)
    os.symlink("../../blobs/2", snapshot / "tokenizer.json")
    (tmp_path / "to").mkdir()
    copy_tokenizer(tmp_path, snapshot, tmp_path / "to")
    assert (tmp_path / "to" / "tokenizer.json").read_bytes() == blob.read_bytes()
