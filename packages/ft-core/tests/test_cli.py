"""The command line answers at once, with the right codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ft_core

HEAVY = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "numpy", "pandas", "pyarrow")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import ft_core; ft_core.FtError; ft_core.__version__",
        "from ft_core.cli import main; main(['--help'])",
        "from ft_core.cli import main; main(['--version'])",
        "from ft_core.cli import main; main(['plugins'])",
        "from ft_core.cli import main; main(['train', '--help'])",
        "from ft_core.cli import main; main(['train', 'nowhere.yaml'])",
        "from ft_core.cli import main; main(['eval', 'nowhere'])",
        "from ft_core.cli import main; main(['generate', 'x', '--prompts', 'nowhere', '--out', 'x'])",
        "import ft_core.models, ft_core.training, ft_core.config, ft_core.plugins, ft_core.data, ft_core.runs",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    loaded = python(f"{code}\nimport sys\nprint('\\nLOADED', *(m for m in {HEAVY!r} if m in sys.modules))")
    assert loaded.splitlines()[-1] == "LOADED"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("data: nowhere.jsonl", "nowhere.jsonl: no such file or folder"),
        ("data: broken.jsonl", "broken.jsonl, line 1: broken JSON"),
        ("data: rows.jsonl\neval_data: broken.jsonl", "broken.jsonl, line 1: broken JSON"),
        ("data: rows.jsonl\noutput: rows.jsonl", "output rows.jsonl is a file: give a folder"),
        ("data: rows.jsonl\nmodel: ./nowhere", "no model folder ./nowhere"),
        ("data: rows.jsonl\nmodel: package:nope", "no installed package is called 'nope': package:NAME is the GGUF"),
        ("data: rows.jsonl\ndisk: nowhere", "disk: 'nowhere' is no folder (allowed: auto, off, or a folder that is"),
    ],
)
def test_a_training_that_cannot_be_is_refused_at_once(
    keys: str, message: str, tmp_path: Path, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the libraries are imported, which takes seconds."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"text": "a text"}])
    (tmp_path / "broken.jsonl").write_text("{", encoding="utf-8")
    model = "" if "model:" in keys else "model: somebody/something\n"
    (tmp_path / "config.yaml").write_text(f"{model}{keys}\n", encoding="utf-8")
    code = f"""
import contextlib, io, sys
from ft_core.cli import main
with contextlib.redirect_stderr(io.StringIO()) as said:
    code = main(['train', 'config.yaml'])
print(code, len(said.getvalue().splitlines()), *(m for m in {HEAVY!r} if m in sys.modules))
print(said.getvalue(), end='')
"""
    first, second = python(code).splitlines()
    assert first == "2 1"
    assert second.startswith(f"ft train: {message}")


def test_importing_has_no_side_effects() -> None:
    code = """
import os, sys, threading, warnings, logging
before = dict(os.environ), list(warnings.filters), sys.excepthook, threading.active_count(), os.getcwd()
import ft_core, ft_core.cli
after = dict(os.environ), list(warnings.filters), sys.excepthook, threading.active_count(), os.getcwd()
assert before == after
assert not logging.getLogger().handlers
"""
    assert python(code) == ""


def test_the_overview(ft: Any) -> None:
    shown = ft("--help")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith("usage: ft COMMAND …\n")
    for name in ("doctor", "train", "eval", "chat", "generate", "report", "export", "plugins"):
        assert f"\n  {name:<10} " in shown.out
    assert ft() == ft("-h") == ft("help") == shown


def test_the_version(ft: Any) -> None:
    assert ft("--version") == ft("-V") == (0, f"ft {ft_core.__version__}\n", "")


def test_unknown_commands(ft: Any) -> None:
    near = ft("tarin")
    assert (near.code, near.out) == (2, "")
    assert near.err.startswith("ft tarin: no command 'tarin'; did you mean 'train'? (allowed: ")
    assert near.err.count("\n") == 1
    assert ft("--nonsense") == (
        2,
        "",
        "ft --nonsense: --nonsense is no option of ft: give a command first (see ft --help)\n",
    )


@pytest.mark.parametrize("name", ["doctor", "train", "eval", "chat", "generate", "report", "export", "plugins"])
def test_every_command_explains_itself(ft: Any, name: str) -> None:
    shown = ft(name, "--help")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith(f"usage: ft {name} ")


def test_exporting_to_what_is_not_there(ft: Any, configure: Any, tmp_path: Any) -> None:
    done = ft("export", tmp_path / "run", "--to", "ggfu")
    assert done.code == 2
    assert done.err.startswith("ft export: no exporter 'ggfu'; did you mean 'gguf'? (allowed: ")


def test_the_doctor(ft: Any) -> None:
    import json

    told = ft("doctor")
    assert (told.code, told.err) == (0, "")
    for name in ("python", "system", "device", "disk", "libraries", "packages", "methods", "tasks", "exporters"):
        assert f"\n{name:<10} " in "\n" + told.out
    report = json.loads(ft("doctor", "--json").out)
    assert report["packages"]["ft-core"] == ft_core.__version__
    assert report["libraries"]["torch"]
    assert report["device"]["type"] in ("cpu", "cuda", "mps")
    assert "sft" in report["methods"]
    assert "text" in report["tasks"]


@pytest.mark.skipif(os.name == "nt", reason="pipes close otherwise there")
@pytest.mark.parametrize("words", [["--help"], ["plugins"], ["train", "--help"]])
def test_a_reader_that_has_gone(words: list[str]) -> None:
    """As in `ft --help | true`: no traceback, and no complaint when Python ends."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ft_core", *words], stdout=write, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_interrupted_before_the_training_begins(
    ft: Any, configure: Any, monkeypatch: Any, tree: Any, tmp_path: Any
) -> None:
    from ft_core.training import run

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    config = configure()
    before = tree(tmp_path)
    monkeypatch.setattr(run, "prepare_model", interrupt)
    done = ft("train", config)
    assert (done.code, done.message) == (130, "interrupted")
    assert tree(tmp_path) == before


def test_a_fault_of_ours_keeps_its_traceback(configure: Any, monkeypatch: Any) -> None:
    from ft_core.cli import main
    from ft_core.training import run

    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(run, "prepare_model", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train", str(configure())])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--memory", "-3GiB"],
            "ft train: --memory -3GiB is no option: what a training may take is a setting, ",
        ),
        (
            ["--memory=12GiB"],
            "ft train: --memory 12GiB is no option: what a training may take is a setting, ",
        ),
        (
            ["memory=-3GiB"],
            "ft train: memory: '-3GiB' is not allowed (allowed: auto, or an amount such as 12GiB ",
        ),
        (
            ["--max-steps", "3"],
            "--max-steps 3; a setting is written without dashes, as key=value (see ft train",
        ),
        (
            ["--training.max_steps=3"],
            "--training.max_steps=3; a setting is written without dashes, as key=value (see",
        ),
    ],
)
def test_a_setting_written_as_an_option(ft: Any, configure: Any, words: list[str], said: str) -> None:
    done = ft("train", configure(), *words)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert said in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "x", "--to", "gguf", "--typ", "q8_0"], "unrecognized arguments: --typ q8_0; did you mean --type?"),
        (["export", "x", "--to", "gguf", "--o=y"], "unrecognized arguments: --o=y; did you mean --out or --overwrite?"),
        (["train", "x", "--overwrit"], "unrecognized arguments: --overwrit; did you mean --overwrite?"),
        (["plan", "x", "--memroy", "3GiB"], "unrecognized arguments: --memroy 3GiB; did you mean --memory?"),
        (["chat", "x", "--zzz"], "unrecognized arguments: --zzz (see ft chat --help)"),
    ],
)
def test_an_option_is_written_in_full(ft: Any, words: list[str], said: str) -> None:
    """A later option might begin with the same letters: what a script says would change its meaning."""
    done = ft(*words)
    assert done.code == 2
    assert said in done.err
    assert len(done.err.splitlines()) == 1


def test_the_help_of_export_names_targets_types_and_settings(ft: Any) -> None:
    pytest.importorskip("ft_export")
    from ft_core.plugins import ExporterSpec, registry

    out = ft("export", "--help").out
    for name in registry().names("ft.exporters"):
        spec = registry().get(ExporterSpec, name)
        assert f"  {name}: {spec.summary}\n" in out
        part = out.partition(f"  {name}: ")[2].partition("\n\n")[0]
        for word in (*spec.types, *(f"{key}=" for key in spec.options)):
            assert word in part, (name, word)


def test_the_help_of_export_without_any(ft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from ft_core import plugins
    from ft_core.plugins import Registry

    monkeypatch.setattr(plugins, "registry", lambda: Registry([]))
    assert "none of ft's own is installed: pip install" in ft("export", "--help").out
    point = EntryPoint("mine", "mine_is_not_imported:SPEC", "ft.exporters")
    monkeypatch.setattr(plugins, "registry", lambda: Registry([point]))
    assert ft("export", "--help").out.endswith("  mine: of unknown ?\n")
