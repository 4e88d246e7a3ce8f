"""``converter=PATH``: llama.cpp's own converter for what our table has not, run as a program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')

import gguf

from ft_export import ExportError, export_gguf
from ft_export.gguf import Converted, convert
from ft_export.gguf.foreign import check_rounded
from ft_export.gguf.upstream import convert_upstream, find_script

PLAIN = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 0.25, "logits_scaling": 1.0}
"""A Granite that is a Llama: attention's scores times the inverse root of 16, and no other multipliers."""
CONVERTS = """
# A converter: of a Granite that is a Llama, by ft-export's own table.
import argparse, json, shutil, sys
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
for word in ("outfile", "outtype", "model-name"):
    parser.add_argument(f"--{word}")
said = parser.parse_args()
shutil.copytree(said.model, "llama")
config = json.loads(Path("llama/config.json").read_text())
config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
Path("llama/config.json").write_text(json.dumps(config))
from ft_export.gguf import architectures, convert
"""
RIGHT = "convert('llama', said.outfile, type=said.outtype, name=said.model_name)\n"
WRONG = "architectures._interleave = lambda weight, heads: weight\n" + RIGHT


@pytest.fixture(scope="module")
def granite(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = make_model(tmp_path_factory.mktemp("model") / "granite", "Granite", **PLAIN)
    return folder


@pytest.fixture
def script(tmp_path: Path) -> Any:
    """``script(code)``: the option that names a converter of this code, in a folder as llama.cpp's is."""

    def make(code: str) -> dict[str, str]:
        (tmp_path / "llama.cpp").mkdir(exist_ok=True)
        (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text(code)
        return {"converter": str(tmp_path / "llama.cpp")}

    return make


@pytest.mark.parametrize("type", ["f16", "q8_0", "q4_0"])
def test_a_model_that_our_table_has_not(type: str, granite: Path, script: Any, tmp_path: Path, contents: Any) -> None:
    options = script(CONVERTS + RIGHT)
    made = export_gguf(granite, tmp_path / "out", type=type, options=options)
    path = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    assert made.lines[0] == f"converted by {path}, whose llama is not in ft-export's own table"
    assert any(line.startswith("greedy continuations:") for line in made.lines)
    assert contents(tmp_path / "out") == [f"granite-{type}.gguf", "proof.json"]
    said = json.loads(made.proof.read_text())["files"][made.file.name]
    assert said["converter"]["script"] == str(path)
    assert len(said["converter"]["sha256"]) == 64
    reader = gguf.GGUFReader(made.file)
    assert set(said["tensors"]) == {tensor.name for tensor in reader.tensors}
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if tensor.name.startswith("blk.0.ffn_down")}
    assert kinds == {type.upper()}
    # what the tokenizer does and what ends an answer is said as our own files say it
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.eos_token_id"] == 2


def test_rounding_is_that_of_our_own_files(make_model: Any, script: Any, tmp_path: Path) -> None:
    """A Llama by either way: the same tensors, bit for bit, also where a mix gives some more bits."""
    base = make_model(tmp_path / "llama", hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=3)
    (tmp_path / "work").mkdir()
    path = find_script(script(CONVERTS + RIGHT)["converter"])
    for type in ("bf16", "q3_k_m", "q4_k_m"):
        scratch = tmp_path / "work" / type
        scratch.mkdir()
        theirs = convert_upstream(path, base, tmp_path / "theirs.gguf", scratch, type=type, name="llama")
        ours = convert(base, tmp_path / "ours.gguf", type=type, name="llama")
        assert theirs.tensors == ours.tensors
        assert theirs.kinds == ours.kinds
    assert len({tensor["type"] for tensor in ours.tensors.values()}) == 3  # Q4_K, Q6_K and F32


def test_a_wrong_conversion_is_caught(granite: Path, script: Any, tmp_path: Path, contents: Any) -> None:
    with pytest.raises(ExportError, match=r"llama\.cpp is not the model"):
        export_gguf(granite, tmp_path / "out", options=script(CONVERTS + WRONG))
    assert contents(tmp_path) == ["llama.cpp"]


EMPTY = """
import sys, gguf
writer = gguf.GGUFWriter(sys.argv[3], "llama")
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
"""
CUT = CONVERTS + RIGHT + "import os\nos.truncate(said.outfile, os.path.getsize(said.outfile) - 1000)\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys\nprint('a', 'b\\r\\nModel Foo is not supported', sep='\\n', file=sys.stderr)\nsys.exit(3)",
         r"convert_hf_to_gguf\.py failed with 3: a b Model Foo is not supported$"),
        ("raise NotImplementedError('x' * 1000)", r"failed with 1: x{400}$"),
        ("import sys\nsys.exit(1)", "failed with 1: it said nothing"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL: it said nothing"),
        ("", "ended without an error and wrote no file"),
        ("import sys\nopen(sys.argv[3], 'w')", "ended without an error and wrote no file"),
        ("import sys\nopen(sys.argv[3], 'w').write('x' * 10000)", "has written what is no whole GGUF file"),
        (CUT, "has written what is no whole GGUF file"),
        (EMPTY, "has written a GGUF file without a model"),
        ("def", "failed with 1: .*SyntaxError"),
    ],
    ids=["fails", "long", "silent", "killed", "nothing", "empty", "garbage", "cut", "no model", "no Python"],
)  # fmt: skip
def test_a_script_that_fails_leaves_nothing(
    code: str, message: str, granite: Path, script: Any, tmp_path: Path, contents: Any
) -> None:
    with pytest.raises(ExportError, match=message):
        export_gguf(granite, tmp_path / "out", options=script(code))
    assert contents(tmp_path) == ["llama.cpp"]


def test_what_names_no_converter(granite: Path, script: Any, tmp_path: Path, contents: Any) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for path in ("", "nowhere", str(tmp_path), str(tmp_path / "notes.txt")):
        with pytest.raises(ExportError, match=r"is no converter: name the folder of a llama\.cpp source tree"):
            export_gguf(granite, tmp_path / "out", options={"converter": path})
    options = script("")
    with pytest.raises(ExportError, match=r"pre=gpt-2 is not for .*convert_hf_to_gguf\.py"):
        export_gguf(granite, tmp_path / "out", options={**options, "pre": "gpt-2"})
    with pytest.raises(ExportError, match="leave adapter=yes out"):
        export_gguf(granite, tmp_path / "out", options={**options, "adapter": "yes"})
    with pytest.raises(ExportError, match=r"GraniteForCausalLM cannot be converted .* with converter=PATH"):
        export_gguf(granite, tmp_path / "out")
    assert contents(tmp_path) == ["llama.cpp", "notes.txt"]


def test_what_our_table_has_is_not_given_to_the_script(base: Path, script: Any, tmp_path: Path) -> None:
    options = script("import sys\nsys.exit('it was run')")
    made = export_gguf(base, tmp_path / "out", options=options)
    assert made.lines[0] == "converter= was not needed: llama is in ft-export's own table"


def test_no_code_of_the_model_s_is_there_to_be_run(
    make_model: Any, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script asks transformers to run it; neither in the folder nor in the cache it finds any, nor pickles."""
    model = make_model(tmp_path / "model", "Granite", **PLAIN)
    for name in ("modeling_granite.py", "pytorch_model.bin", "consolidated.safetensors", "README.md"):
        (model / name).write_text("x")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = (
        "import os, sys\nsys.exit(' '.join(sorted(os.listdir(sys.argv[1]))) + ' ' + os.environ['HF_HUB_OFFLINE'] + ' '"
        " + str(os.path.exists(os.environ['HF_MODULES_CACHE'])))"
    )
    names = "chat_template.jinja config.json generation_config.json model.safetensors tokenizer.json"
    with pytest.raises(ExportError, match=rf": {names} tokenizer_config.json 1 False$"):
        export_gguf(model, tmp_path / "out", options=script(code))


WAITS = """
import sys
from ft_export import export_gguf
export_gguf(sys.argv[1], sys.argv[2], options={"converter": sys.argv[3]})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks on folders")
def test_what_a_killed_export_left_of_it_goes(granite: Path, script: Any, tmp_path: Path, contents: Any) -> None:
    started = tmp_path / "started"
    os.mkfifo(started)
    code = f"import time\nopen({str(started)!r}, 'w').write('x')\nopen('half', 'w').write('x')\ntime.sleep(30)"
    words = [sys.executable, "-c", WAITS, str(granite), str(tmp_path / "out"), script(code)["converter"]]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    assert started.read_text() == "x"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(contents(tmp_path / "out")) == 2
    export_gguf(granite, tmp_path / "out", options=script(CONVERTS + RIGHT))
    assert contents(tmp_path / "out") == ["granite-f16.gguf", "proof.json"]


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_exps.weight", "mamba.weight"])
def test_types_that_the_table_of_mixes_has_not(name: str, tmp_path: Path) -> None:
    made = Converted(tmp_path, "granitemoe", None, {"token_embd.weight": {}, name: {}}, {})  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"--type q4_k_m is not known for .* \(allowed: f16, f32, bf16, q8_0\)"):
        check_rounded(made, "q4_k_m")


def test_on_the_command_line(
    granite: Path, script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], contents: Any
) -> None:
    pytest.importorskip("ft_core", reason="pip install ft-core")
    from ft_core.cli import main

    path = script(CONVERTS + RIGHT)["converter"]
    words = ["export", str(granite), "--to", "gguf", "--out", str(tmp_path / "out"), "--converter", path]
    assert main([*words, f"converter={path}"]) == 2
    assert "converter= and --converter are the same setting" in capsys.readouterr().err
    assert main(words) == 0
    assert f"converted by {path}" in capsys.readouterr().out
    assert contents(tmp_path / "out") == ["granite-f16.gguf", "proof.json"]


# --- llama.cpp's own

RULES = """
# llama.cpp's converter, told the splitting rules of a tokenizer that was trained in a test (it knows them by a hash).
import sys
upstream = {upstream!r}
sys.path[:0] = [upstream, upstream + "/gguf-py"]
import conversion.base, convert_hf_to_gguf
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()
"""
GRANITE = {
    "embedding_multiplier": 1.5, "residual_multiplier": 0.7, "attention_multiplier": 0.3, "logits_scaling": 2.0,
    "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "initializer_range": 0.1,
}  # fmt: skip


@pytest.fixture
def imports(upstream: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What upstream's converter imports can be imported."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*sys.path, str(upstream / "site")]))


@pytest.mark.slow
@pytest.mark.parametrize("type", ["f16", "q8_0", "q4_k_m"])
def test_granite_by_llama_cpp(
    type: str, make_model: Any, save_pieces_model: Any, upstream: Path, imports: None, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "granite", "Granite", pieces="gemma", **GRANITE)
    save_pieces_model(model, "gemma")
    made = export_gguf(model, tmp_path / "out", type=type, options={"converter": str(upstream)})
    assert made.lines[0].endswith("whose granite is not in ft-export's own table")
    fields = gguf.GGUFReader(made.file).fields
    assert fields["granite.residual_scale"].contents() == pytest.approx(0.7)


@pytest.mark.slow
def test_olmo2_by_a_script_around_llama_cpp_s(
    make_model: Any, make_adapter: Any, upstream: Path, imports: None, tmp_path: Path
) -> None:
    """Of an adapter, which is merged first; by its tokenizer's class upstream knows that it is no SentencePiece."""
    from tokenizers import pre_tokenizers

    base = make_model(tmp_path / "olmo2", "Olmo2", pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False))
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "GPT2Tokenizer"}))
    script = tmp_path / "convert.py"
    script.write_text(RULES.format(upstream=str(upstream)))
    adapter = make_adapter(tmp_path / "adapter", base)
    made = export_gguf(adapter, tmp_path / "out", type="q8_0", options={"converter": str(script)})
    assert f"converted by {script}, whose olmo2 is not in ft-export's own table" in made.lines
    assert (adapter / "merged").is_dir()


@pytest.mark.slow
def test_an_architecture_that_llama_cpp_has_not(granite: Path, upstream: Path, imports: None, tmp_path: Path) -> None:
    """And a tokenizer that it does not know: what it says is told."""
    with pytest.raises(ExportError, match=r"failed with 1: .*BPE pre-tokenizer was not recognized"):
        export_gguf(granite, tmp_path / "out", options={"converter": str(upstream)})
    assert not (tmp_path / "out").exists()
