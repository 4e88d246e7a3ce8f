"""GGUF of models that see: the language model, and beside it the tower and projector, proven in llama.cpp."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL", reason="models that see are proven on images: pip install pillow")
pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')

import gguf
from vision_models import add_adapter, make_seeing, write_run

from ft_export import ExportError, export_gguf
from ft_export.gguf import convert, towers
from ft_export.gguf.mmproj import convert_projector
from ft_export.runs import read_json

FAMILIES = ("qwen3_vl", "gemma3")
NEEDED = {"qwen3_vl": {"pre": "gpt-2"}, "gemma3": {}}


@pytest.fixture(scope="module")
def model(make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`model(family)`: a tiny model's folder; not to be changed."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            kind = "gemma" if family == "gemma3" else None
            made[family] = make_seeing(tmp_path_factory.mktemp("models") / family, family, make_tokenizer(kind))
        return made[family]

    return make


def _figures(made: Any) -> dict[str, Any]:
    return dict(json.loads(made.proof.read_text())["files"][made.file.name])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_says_in_llama_cpp_what_it_says_in_transformers(family: str, model: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", model(family), tmp_path / "a.png")
    add_adapter(run / "adapter", model(family))
    made = export_gguf(run, type="f16")
    said = _figures(made)
    beside = made.file.with_name(f"mmproj-{made.file.name}")
    assert sorted(path.name for path in made.file.parent.iterdir()) == [beside.name, "proof.json", made.file.name]
    assert said["prompts_with_images"] == 4
    assert said["continuations"]["error"]["largest"] <= said["continuations"]["bound_largest"]
    assert said["continuations"]["equal"] >= 0.9 * said["continuations"]["tokens"]
    assert said["mmproj"]["file"] == beside.name
    assert "NOT PROVEN" not in " ".join(made.lines)
    if family == "qwen3_vl":  # of sections of 4, 2 and 2 the eighth frequency is nobody's in llama.cpp
        assert (said["unturned"]["frequencies"], said["unturned"]["of"]) == (1, 8)
        assert said["unturned"]["nats"] > 1e-3
    else:
        assert said["unturned"] is None
    assert f"--mmproj {beside}" in made.next_command
    reader = gguf.GGUFReader(beside)
    assert {tensor.name for tensor in reader.tensors} == set(said["mmproj"]["tensors"])
    assert reader.get_field("general.type").contents() == "mmproj"


@pytest.mark.slow
@pytest.mark.parametrize("type", ["f32", "bf16", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_types(family: str, type: str, model: Any, tmp_path: Path) -> None:
    made = export_gguf(model(family), tmp_path / "out", type=type)
    said = _figures(made)
    assert said["mmproj"]["type"] == (type if type in ("f32", "bf16") else "f16")
    assert {tensor["type"] for tensor in said["mmproj"]["tensors"].values()} <= {"F32", "F16", "BF16"}
    assert said["continuations"]["error"]["largest"] <= said["continuations"]["bound_largest"]


def _swapped(name: str, one: str, other: str) -> str:
    return name.replace(one, "\0").replace(other, one).replace("\0", other)


@pytest.mark.parametrize(
    ("family", "one", "other"),
    [("qwen3_vl", ".ln1.", ".ln2."), ("gemma3", "attn_q", "attn_k"), ("qwen3_vl", "v.deepstack.0", "v.deepstack.1")],
)
def test_swapped_tensors_are_found(
    family: str, one: str, other: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file loads, and has every tensor that it should have; only two of a kind are in each other's place."""
    name = model(family)
    kind = read_json(name / "config.json")["architectures"][0]
    row = towers.TOWERS[kind]

    def targets(source: str, config: Any) -> Any:
        found = row.targets(source, config)
        return found and tuple((_swapped(target, one, other), make) for target, make in found)

    monkeypatch.setitem(towers.TOWERS, kind, replace(row, targets=targets))
    with pytest.raises(ExportError, match=r"llama\.cpp is not the model"):
        export_gguf(name, tmp_path / "out", type="f32")
    assert not (tmp_path / "out").exists()


def test_wrong_pixels_are_found(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean and a deviation that are another processor's."""
    from ft_export.gguf import mmproj

    told = mmproj.image_settings
    monkeypatch.setattr(mmproj, "image_settings", lambda folder: {**told(folder), "image_mean": [0.1, 0.2, 0.3]})
    with pytest.raises(ExportError, match=r"llama\.cpp is not the model"):
        export_gguf(model("gemma3"), tmp_path / "out", type="f32")


def test_a_file_alone_is_not_left(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ft_export.gguf import export as module

    def fail(*_: Any, **__: Any) -> None:
        raise ExportError("no")

    monkeypatch.setattr(module, "check_in_llama_cpp", fail)
    with pytest.raises(ExportError, match="no"):
        export_gguf(model("gemma3"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_other_families_are_refused_in_a_line(family: str, make_tokenizer: Any, tmp_path: Path) -> None:
    base = make_seeing(tmp_path / "base", family, make_tokenizer())
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text("raise SystemExit('must not be run')")
    for options in ({}, {"converter": str(tmp_path / "llama.cpp")}):
        with pytest.raises(ExportError, match=r"is a model that sees, of which GGUF is written, tower and all, for"):
            export_gguf(base, tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_what_llama_cpp_has_not_is_refused(model: Any, tmp_path: Path) -> None:
    def refused(family: str, match: str, part: str = "vision_config", **changes: Any) -> None:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(model(family), folder)
        said = read_json(folder / "config.json")
        (said[part] if part else said).update(changes)
        (folder / "config.json").write_text(json.dumps(said))
        with pytest.raises(ExportError, match=match):
            export_gguf(folder, tmp_path / "out")

    refused("qwen3_vl", "hidden_act gelu_pytorch_tanh, this model's tower gelu", hidden_act="gelu")
    refused("qwen3_vl", "adds no image to its last layer", deepstack_visual_indexes=[0, 1, 2])
    refused("gemma3", "sees an image in one window", part="text_config", sliding_window=3)
    refused("gemma3", "pools squares", part="", mm_tokens_per_image=3)


def test_an_adapter_alone_is_refused(model: Any, tmp_path: Path) -> None:
    adapter = add_adapter(tmp_path / "adapter", model("gemma3"))
    with pytest.raises(ExportError, match=r"whose tower an adapter in llama\.cpp cannot change"):
        export_gguf(adapter, tmp_path / "out", options={"adapter": "yes"})


@pytest.mark.slow
@pytest.mark.parametrize("type", ["f16", "f32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_upstream_s(
    family: str, type: str, model: Any, upstream: Path, save_pieces_model: Any, tmp_path: Path
) -> None:
    """Every tensor bit for bit, and every key of the tower's file but its name and the number of its weights."""
    folder = tmp_path / "Model"
    shutil.copytree(model(family), folder)
    if family == "gemma3":
        save_pieces_model(folder, "gemma")
    convert(folder, tmp_path / "ours.gguf", type=type, name="Model", **NEEDED[family])
    convert_projector(folder, tmp_path / "mmproj-ours.gguf", type=type, name="Model")
    environment = {**os.environ, "PYTHONPATH": str(upstream / "site")}
    script = Path(__file__).with_name("convert_by_llama_cpp.py")
    for prefix, more in (("", []), ("mmproj-", ["--mmproj"])):
        words = [script, upstream, folder, tmp_path / f"{prefix}theirs.gguf", type, "gpt-2", *more]
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        ours, theirs = (gguf.GGUFReader(tmp_path / f"{prefix}{side}.gguf") for side in ("ours", "theirs"))
        mine, expected = (
            {one.name: (one.tensor_type, one.shape.tolist(), one.data.tobytes()) for one in reader.tensors}
            for reader in (ours, theirs)
        )
        assert set(mine) == set(expected)
        assert [name for name in expected if mine[name] != expected[name]] == []
        said, stated = (
            {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
            for reader in (ours, theirs)
        )
        different = {key for key in said.keys() | stated.keys() if said.get(key) != stated.get(key)}
        different -= {key for key in different if key.startswith("tokenizer.")}  # tests/test_gguf_upstream.py
        allowed = {"general.size_label"}  # the number of weights in words; nothing reads it
        if family == "gemma3" and not prefix:
            allowed.add("gemma3.attention.sliding_window_pattern")  # theirs takes every sixth layer for a whole one
        assert different == allowed
