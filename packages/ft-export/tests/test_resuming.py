"""Exports whose process was killed or interrupted, and what the next one makes of what they left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')

from ft_export import ExportError, export_gguf
from ft_export.gguf import convert
from ft_export.gguf import export as gguf_export
from ft_export.gguf.growing import Growing
from ft_export.gguf.streaming import Stream
from ft_export.vllm.export import export as export_vllm

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks on folders")

AT = 9
"""The tensor after which a process is killed."""
KILLED = f"""
import json, os, signal, sys
from importlib import import_module
export = import_module(sys.argv[1]).export
def show(done, total, what):
    if what == "tensors written" and done == {AT}:
        if sys.argv[5] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt
export(sys.argv[2], sys.argv[3], type=sys.argv[4], options=json.loads(sys.argv[6]), progress=show)
"""


@pytest.fixture
def killed(forks: Any) -> Callable[..., None]:
    """`killed(exporter, model, out, type)`: an export that ends after :data:`AT` tensors."""

    def run(
        exporter: str, model: Path, out: Path, type: str, how: str = "kill", options: dict[str, str] | None = None
    ) -> None:
        done = forks.run(KILLED, f"ft_export.{exporter}.export", model, out, type, how, json.dumps(options or {}))
        assert done.returncode == -(signal.SIGKILL if how == "kill" else signal.SIGINT), done.stderr

    return run


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors whose bytes are made, as they are."""
    names: list[str] = []
    right = Growing.add

    def add(self: Growing, name: str, stream: Stream) -> str:
        names.append(name)
        return right(self, name, stream)

    monkeypatch.setattr(Growing, "add", add)
    return names


@pytest.mark.parametrize(("type", "how"), [("f16", "kill"), ("q4_k_m", "kill"), ("q8_0", "interrupt")])
def test_a_gguf_file_goes_on_after_its_last_whole_tensor(
    killed: Any, type: str, how: str, base: Path, tmp_path: Path, made: list[str], contents: Any
) -> None:
    convert(base, tmp_path / "whole.gguf", type=type, name="llama")
    order, made[:] = list(made), []
    out = tmp_path / "out"
    killed("gguf", base, out, type, how)
    (left,) = out.glob(f".llama-{type}.gguf.*.partial")
    assert len((left / "journal").read_text().splitlines()) == 1 + AT
    result = export_gguf(base, out, type=type)
    assert made == order[AT:]
    assert result.lines[0] == f"went on with an interrupted conversion: {AT} of {len(order)} tensors were there"
    assert result.file.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert contents(out) == [f"llama-{type}.gguf", "proof.json"]
    proof = json.loads(result.proof.read_text())["files"][result.file.name]
    assert list(proof["tensors"]) == order


def _damage_a_tensor(left: Path, model: Path) -> int:
    """One bit of the fourth tensor: three are gone on with."""
    file = next(left.glob("*.gguf"))
    import gguf

    tensors = sorted(gguf.GGUFReader(_whole(file, model)).tensors, key=lambda tensor: tensor.data_offset)
    with file.open("r+b") as stream:
        stream.seek(tensors[3].data_offset + 5)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))
    return 3


def _whole(file: Path, model: Path) -> Path:
    """The whole file, which says where its tensors are."""
    path = file.parents[2] / "there.gguf"
    convert(model, path, name="llama")
    return path


def _cut_the_journal(left: Path, model: Path) -> int:
    journal = left / "journal"
    journal.write_bytes(journal.read_bytes()[:-20])
    return AT - 1


def _cut_the_file(left: Path, model: Path) -> int:
    """As after a power cut: the journal says more than the disk has."""
    file = next(left.glob("*.gguf"))
    os.truncate(file, file.stat().st_size - 100)
    return AT - 1


def _damage_the_beginning(left: Path, model: Path) -> int:
    file = next(left.glob("*.gguf"))
    with file.open("r+b") as stream:
        stream.seek(100)
        stream.write(b"?")
    return 0


def _no_journal(left: Path, model: Path) -> int:
    (left / "journal").write_text("[1]\nno JSON\n")
    return 0


def _touch_the_weights(left: Path, model: Path) -> int:
    os.utime(model / "model.safetensors")
    return 0


def _change_the_template(left: Path, model: Path) -> int:
    path = model / "chat_template.jinja"
    path.write_text("{# another #}" + path.read_text())
    return 0


@pytest.mark.parametrize(
    "change",
    [
        _damage_a_tensor, _cut_the_journal, _cut_the_file, _damage_the_beginning, _no_journal, _touch_the_weights,
        _change_the_template,
    ],
)  # fmt: skip
def test_only_what_is_whole_and_of_the_same_model_is_gone_on_with(
    change: Callable[[Path, Path], int], make_model: Any, tmp_path: Path, made: list[str], contents: Any
) -> None:
    model, out = make_model(tmp_path / "llama"), tmp_path / "out"

    def interrupt(done: int, total: int, what: str) -> None:
        if what == "tensors written" and done == AT:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(model, out, progress=interrupt)
    (left,) = out.glob(".llama-f16.gguf.*.partial")
    kept = change(left, model)
    made.clear()
    result = export_gguf(model, out)
    assert len(made) == len(json.loads(result.proof.read_text())["files"][result.file.name]["tensors"]) - kept
    convert(model, tmp_path / "whole.gguf", name="llama")
    assert result.file.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert contents(out) == ["llama-f16.gguf", "proof.json"]


def test_a_check_that_fails_leaves_nothing_to_go_on_with(
    base: Path, tmp_path: Path, made: list[str], contents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while it was checked, all tensors are there; where the check fails then, the next one starts anew."""
    out = tmp_path / "out"

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_export, "check_in_llama_cpp", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(base, out)
    count = len(made)
    assert len(contents(out)) == 1

    def failing(*_: Any) -> None:
        raise ExportError("llama.cpp is not the model")

    monkeypatch.setattr(gguf_export, "check_in_llama_cpp", failing)
    with pytest.raises(ExportError, match="is not the model"):
        export_gguf(base, out)
    assert len(made) == count
    assert contents(out) == []
    monkeypatch.undo()
    result = export_gguf(base, out)
    assert not any("interrupted" in line for line in result.lines)


def test_whole_but_not_checked(base: Path, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tensor's padding, too."""
    convert(base, tmp_path / "whole.gguf", name="llama")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_export, "load_tokenizer", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export_gguf(base, tmp_path / "out")
    made.clear()
    result = export_gguf(base, tmp_path / "out")
    assert made == []
    assert result.file.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize(
    ("exporter", "options"),
    [("ollama", {"num_ctx": "256"}), ("open_webui", {}), ("hub", {"repo": "me/model", "dry": "yes"})],
)
def test_a_folder_with_a_gguf_file_goes_on_with_that(
    killed: Any, exporter: str, options: dict[str, str], base: Path, tmp_path: Path, made: list[str], contents: Any
) -> None:
    """What lies beside it is made anew."""
    out = tmp_path / "out"
    killed(exporter, base, out, "q8_0", options=options)
    (left,) = tmp_path.glob(".out.*.partial")
    (left / "Modelfile").write_text("half")
    result = import_module(f"ft_export.{exporter}.export").export(base, out, type="q8_0", options=options)
    assert any(line.startswith(f"went on with an interrupted conversion: {AT} of") for line in result.lines)
    convert(base, tmp_path / "whole.gguf", type="q8_0", name="llama")
    assert (out / "llama-q8_0.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not [name for name in contents(out) if name.startswith(".")]
    assert ("Modelfile" in contents(out)) == (exporter == "ollama")
    assert contents(tmp_path) == ["out", "whole.gguf"]


def test_a_folder_does_not_take_another_type_s_file_along(
    killed: Any, base: Path, tmp_path: Path, contents: Any
) -> None:
    killed("ollama", base, tmp_path / "out", "q8_0")
    folder = import_module("ft_export.ollama.export").export(base, tmp_path / "out").file
    assert contents(folder) == ["Modelfile", "llama-f16.gguf", "proof.json"]
    assert contents(tmp_path) == ["out"]


def _ended_before_renaming(count: int, model: Path, out: Path) -> bool:
    """Export, and interrupt when so many files have been renamed and one more is to be; whether there was none more."""
    rename, coming = os.replace, [True] * count

    def stop(one: Any, place: Any) -> None:
        if not coming:
            raise KeyboardInterrupt
        coming.pop()
        rename(one, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", stop)
        try:
            export_gguf(model, out, overwrite=True, skip_proof=True)
        except KeyboardInterrupt:
            return False
    return True


@pytest.mark.parametrize("earlier", [False, True])
def test_no_proof_is_of_another_file_than_is_there(
    earlier: bool, make_model: Any, tmp_path: Path, contents: Any
) -> None:
    """Stopped before each renaming of one export: what ``proof.json`` tells of is there, and is what it tells of."""

    def entries(out: Path) -> dict[str, Any]:
        proof = out / "proof.json"
        return dict(json.loads(proof.read_text())["files"]) if proof.is_file() else {}

    def state(out: Path) -> tuple[bytes, Any]:
        return (out / "m-f16.gguf").read_bytes(), entries(out)["m-f16.gguf"]

    new, out, was = make_model(tmp_path / "new" / "m"), tmp_path / "out", tmp_path / "was"
    was.mkdir()
    whole = [state(export_gguf(new, tmp_path / "whole", skip_proof=True).file.parent)]
    other: dict[str, Any] = {}
    if earlier:
        old = make_model(tmp_path / "old" / "m", seed=1)
        whole.append(state(export_gguf(old, was, skip_proof=True).file.parent))
        export_gguf(old, was, type="q8_0", skip_proof=True)
        other = {"m-q8_0.gguf": entries(was)["m-q8_0.gguf"]}
    assert len({file for file, _ in whole}) == len(whole)
    stopped = 0
    for stopped in range(9):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(was, out)
        ended = _ended_before_renaming(stopped, new, out)
        told = entries(out)
        assert {name: told.pop(name, None) for name in other} == other
        assert not told or state(out) in whole
        if ended:
            break
    assert stopped == 2 + earlier  # the file, its proof, and before them a proof that is of an earlier file no longer
    assert state(out) == whole[0]
    assert contents(out) == sorted({"m-f16.gguf", "proof.json", *other})


# --- the 8-bit folders


@pytest.fixture
def in_shards(make_model: Any, tmp_path: Path) -> Path:
    """A model in several files."""
    from transformers import AutoModelForCausalLM

    model: Path = make_model(tmp_path / "llama")
    whole = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    whole.save_pretrained(model, max_shard_size="60KB")
    assert len(list(model.glob("*.safetensors"))) > 3
    return model


@pytest.mark.parametrize(("type", "how"), [("w8a8", "kill"), ("fp8", "interrupt"), ("f16", "kill")])
def test_a_folder_for_servers_goes_on_with_its_whole_files(
    killed: Any, type: str, how: str, in_shards: Path, tmp_path: Path, contents: Any
) -> None:
    export_vllm(in_shards, tmp_path / "whole", type=type)
    killed("vllm", in_shards, tmp_path / "out", type, how)
    (left,) = tmp_path.glob(".out.*.partial")
    there = {path.name: path.stat().st_mtime_ns for path in left.glob("*.safetensors")}
    assert 0 < len(there) < len(list(in_shards.glob("*.safetensors")))
    result = export_vllm(in_shards, tmp_path / "out", type=type)
    assert f"went on with an export that was interrupted, of which {len(there)} files were whole" in result.lines
    assert {name: (result.file / name).stat().st_mtime_ns for name in there} == there
    assert contents(result.file) == contents(tmp_path / "whole")
    for file in (tmp_path / "whole").iterdir():
        if file.name != "proof.json":
            assert (result.file / file.name).read_bytes() == file.read_bytes(), file.name
    assert contents(tmp_path) == ["llama", "out", "whole"]


def test_a_file_of_a_folder_for_servers_that_is_not_what_it_was(
    killed: Any, in_shards: Path, tmp_path: Path, contents: Any
) -> None:
    """The check sees it, and the next export starts anew."""
    killed("vllm", in_shards, tmp_path / "out", "w8a8")
    (left,) = tmp_path.glob(".out.*.partial")
    path = sorted(left.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-2] + b"\x77\x77")
    with pytest.raises(ExportError, match="nothing was written"):
        export_vllm(in_shards, tmp_path / "out", type="w8a8")
    assert contents(tmp_path) == ["llama"]
    export_vllm(in_shards, tmp_path / "out", type="w8a8")


def test_what_was_left_of_another_type_or_model_is_thrown_away(
    killed: Any, in_shards: Path, tmp_path: Path, contents: Any
) -> None:
    killed("vllm", in_shards, tmp_path / "out", "w8a8")
    (left,) = tmp_path.glob(".out.*.partial")
    result = export_vllm(in_shards, tmp_path / "out", type="fp8")
    assert not any("interrupted" in line for line in result.lines)
    assert not left.exists()
    assert contents(tmp_path) == ["llama", "out"]
