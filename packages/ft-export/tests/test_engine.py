"""``engine=``: an export that is proven in a server, here in a small one that can do wrong."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ft_export import ExportError
from ft_export.serving.engine import engine_of
from ft_export.sglang.export import export as export_sglang
from ft_export.vllm.export import export

SERVER = Path(__file__).parent / "small_server.py"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``bin/vllm``, as an environment's."""
    folder = tmp_path_factory.mktemp("vllm's own")
    (folder / "bin").mkdir()
    program = folder / "bin/vllm"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(SERVER))} "$@"\n')
    program.chmod(0o755)
    return folder


@pytest.fixture
def run(base: Path, make_run: Any, make_adapter: Any) -> Path:
    path: Path = make_run()
    make_adapter(path / "adapter", base, tokenizer=True)
    return path


def _is_gone(pid: int) -> bool:
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("kind", ["16bit", "f16"])
def test_proven_in_a_server(kind: str, run: Path, environment: Path, tmp_path: Path) -> None:
    options = {"engine": str(environment), "engine_args": f"--pid '{tmp_path / 'pid'}'"}
    made = export(run, type=kind, options=options)
    served = json.loads(made.proof.read_text())["served"]
    assert served["engine"] == "vllm"
    assert served["args"] == ["--pid", str(tmp_path / "pid")]
    assert served["prompts"] == served["chats"] == 8
    assert served["equal"] > 0.9 * served["tokens"] > 90
    assert 0 < served["mean"] <= served["bound_mean"]
    assert 0 < served["largest"] <= served["bound_largest"]
    assert served["largest_gap"] <= 2 * served["largest"]
    assert any(
        line.startswith("vllm was started by launch.sh and answered 8 prompts and 8 chats") for line in made.lines
    )
    assert _is_gone(int((tmp_path / "pid").read_text()))


def test_without_a_server_the_proof_says_so(run: Path) -> None:
    for target, function in {"vllm": export, "sglang": export_sglang}.items():
        made = function(run)
        said = json.loads(made.proof.read_text())
        assert said["served"] == f"not run in {target}: engine=PROGRAM would start it on these files"
        assert said["served"] in made.lines


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            "dies",
            r"vllm ended with code 3 before it answered, saying last: ValueError: no such device; what .* is in /",
        ),
        ("never up", r"vllm did not come up within 3 seconds .engine_wait= says how many"),
        ("silent", r"vllm does not answer /v1/completions within 3 seconds .engine_wait="),
        ("no JSON", r"vllm answers /v1/completions with something that is no JSON"),
        ("wrong tokens", r"vllm takes a token that is [\d.]+ nats less likely than the likeliest"),
        ("wrong model", r"vllm does not say what the model says: log-probabilities are off by up to"),
        (
            "template",
            r"vllm makes other tokens of a conversation than the chat template: \[\d+\] in place of \[\], from",
        ),
        ("stops", r"vllm ends an answer at \d+, which is no stop token"),
        ("writes", r"vllm changed cache.bin in the folder that it served"),
    ],
)
def test_a_server_that_does_wrong(fault: str, said: str, run: Path, environment: Path, contents: Any) -> None:
    """The export fails in one line, and nothing is left: neither a folder nor the server."""
    pid = run / "pid"
    wait = "3" if fault in ("never up", "silent") else "60"
    options = {"engine": str(environment), "engine_args": f"--fault '{fault}' --pid '{pid}'", "engine_wait": wait}
    with pytest.raises(ExportError, match=said) as error:
        export(run, options=options)
    assert "\n" not in str(error.value)
    assert not (run / "export").exists() or contents(run / "export") == []
    assert _is_gone(int(pid.read_text()))


def test_an_earlier_export_outlives_a_server_that_does_wrong(run: Path, environment: Path) -> None:
    made = export(run)
    before = made.proof.read_bytes()
    with pytest.raises(ExportError, match="ended with code 3"):
        export(run, overwrite=True, options={"engine": str(environment), "engine_args": "--fault dies"})
    assert made.proof.read_bytes() == before


def test_an_export_that_is_told_to_end_ends_its_server(run: Path, environment: Path, contents: Any) -> None:
    export(run)  # so that there is a merge
    options = {"engine": str(environment), "engine_args": f"--fault silent --pid '{run / 'pid'}'"}
    code = f"from ft_export.vllm.export import export; export({str(run)!r}, {str(run / 'out')!r}, options={options!r})"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        for _ in range(600):
            if (run / "pid").is_file() and (run / "pid").read_text():
                break
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert _is_gone(int((run / "pid").read_text()))
    assert not [name for name in contents(run) if name == "out" or name.startswith(".")]


def test_an_engine_that_is_none(run: Path, environment: Path, tmp_path: Path) -> None:
    (tmp_path / "vllm").write_text("")  # not to be run
    other = tmp_path / "nginx"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    for wrong in ("/nowhere/vllm", str(tmp_path), str(tmp_path / "vllm"), "no-such-program", str(other)):
        with pytest.raises(ExportError, match=rf"engine={wrong} is not a vllm program or a Python"):
            export(run, options={"engine": wrong})
        with pytest.raises(ExportError, match=rf"engine={wrong} is not a Python"):
            export_sglang(run, options={"engine": wrong})
    assert not (run / "merged").exists()  # refused before any work
    for options, said in (
        ({"engine_args": "--x"}, "engine_args= is for the server that engine= names"),
        ({"engine_wait": "9"}, "engine_wait= is for the server that engine= names"),
        ({"engine": str(environment), "engine_args": "it's"}, "engine_args=it's cannot be split into words"),
        ({"engine": str(environment), "engine_wait": "soon"}, "engine_wait=soon is no whole number above 0"),
    ):
        with pytest.raises(ExportError, match=said):
            export(run, options=options)


def test_what_starts_the_server(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of({"engine": str(environment)}, "vllm")
    assert engine is not None
    assert engine.script() == ("vllm", f'#!/bin/sh\nexec {shlex.quote(str(environment / "bin/vllm"))} "$@"\n')
    monkeypatch.setenv("PATH", f"{environment}/bin")
    assert engine_of({"engine": "vllm"}, "vllm") == engine
    python = engine_of({"engine": sys.executable}, "vllm")
    assert python is not None
    assert python.script()[0] == "vllm"
    assert f"{sys.executable} -m vllm.entrypoints.cli.main" in python.script()[1]
    python = engine_of({"engine": sys.executable}, "sglang")
    assert python is not None
    assert python.script() == ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    assert engine_of({}, "vllm") is None
