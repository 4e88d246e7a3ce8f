"""Plugins are listed without being imported, and one that is broken is named and harms nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ft_core.errors import PluginError
from ft_core.installing import how_to_install
from ft_core.plugins import (
    API_VERSION,
    GROUPS,
    ArchitectureSpec,
    CodecSpec,
    CommandSpec,
    ExporterSpec,
    MethodSpec,
    ModalitySpec,
    Registry,
    RewardSpec,
    RolloutSpec,
    registry,
    resolve,
)

Install = Callable[..., str]
numbers = itertools.count()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install(package, {group: name}, code)`: a package with one module, as pip leaves it. Returns the module's name.

    `code` is the module's text, in which the entry points' names are `plugin`.
    """
    modules = []

    def inner(package: str, points: dict[str, str], code: str, *, attribute: str = "plugin", metadata: str = "") -> str:
        module = f"toy_{next(numbers)}"
        modules.append(module)
        site = tmp_path / module
        info = site / f"{package.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(f"from ft_core.plugins import *\n{code}\n", encoding="utf-8")
        lines = (f"[{group}]\n{name} = {module}:{attribute}\n" for group, name in points.items())
        (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
        if metadata != "none":
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n", encoding="utf-8")
        monkeypatch.syspath_prepend(site)
        registry.cache_clear()
        return module

    yield inner
    registry.cache_clear()
    for module in modules:
        sys.modules.pop(module, None)


def reason(group: str, name: str) -> str:
    with pytest.raises(PluginError) as caught:
        Registry().load(group, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def command(name: str, module: str = "nowhere", **more: Any) -> str:
    values = "".join(f", {key}={value!r}" for key, value in more.items())
    return f"plugin = CommandSpec(name={name!r}, summary='a toy', module={module!r}{values})"


def test_listing_imports_nothing(install: Install) -> None:
    module = install("toy", {"ft.commands": "toy", "ft.methods": "toy-method"}, "raise RuntimeError('imported')")
    found = Registry()
    assert "toy" in found.names("ft.commands")
    assert "toy-method" in found.names("ft.methods")
    entry = next(e for e in found.entries("ft.commands") if e.name == "toy")
    assert (entry.source, entry.own, entry.value) == ("toy 1.2", False, f"{module}:plugin")
    assert module not in sys.modules


@pytest.mark.parametrize(
    ("group", "spec"),
    [
        ("ft.methods", "MethodSpec(name='toy', summary='', settings='a:b', trainer='a:b', formats=(), evaluate='a:b')"),
        ("ft.modalities", "ModalitySpec(name='toy', summary='')"),
        ("ft.architectures", "ArchitectureSpec(name='toy', summary='', model_types=('llama',), describe='a:b')"),
        ("ft.rewards", "RewardSpec(name='toy', summary='', reward='a:b')"),
        ("ft.rollouts", "RolloutSpec(name='toy', summary='', engine='a:b')"),
        ("ft.codecs", "CodecSpec(name='toy', summary='', codec='a:b')"),
        ("ft.exporters", "ExporterSpec(name='toy', summary='', export='a:b', types=('f16',))"),
        ("ft.commands", "CommandSpec(name='toy', summary='', module='a')"),
    ],
)
def test_every_group_takes_third_parties(install: Install, group: str, spec: str) -> None:
    install("toy", {group: "toy"}, f"plugin = {spec}")
    found = Registry()
    loaded = found.load(group, "toy")
    assert type(loaded) is GROUPS[group]
    assert loaded == found.get(GROUPS[group], "toy")
    assert not [p for p in found.check() if p.entry.name == "toy"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.name = "other"  # type: ignore[misc]


def test_the_groups() -> None:
    assert {
        "ft.methods": MethodSpec,
        "ft.modalities": ModalitySpec,
        "ft.architectures": ArchitectureSpec,
        "ft.rewards": RewardSpec,
        "ft.rollouts": RolloutSpec,
        "ft.codecs": CodecSpec,
        "ft.exporters": ExporterSpec,
        "ft.commands": CommandSpec,
    } == GROUPS


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise RuntimeError('two\\nlines')", "fails to import: RuntimeError: two lines"),
        ("import no_such_module_anywhere", "fails to import: ModuleNotFoundError: No module named 'no_such_module_"),
        ("import sys; sys.exit('bye')", "fails to import: SystemExit: bye"),
        ("other = 1", "fails to import: AttributeError: module "),
        ("def f(:", "fails to import: SyntaxError: "),
        ("plugin = {'name': 'toy'}", "is no CommandSpec: MODULE:plugin is of type dict"),
        ("plugin = CommandSpec", "is no CommandSpec: MODULE:plugin is of type type"),
        ("plugin = ModalitySpec(name='toy', summary='')", "is no CommandSpec: MODULE:plugin is of type ModalitySpec"),
        (
            command("toy", api_version=API_VERSION + 1),
            f"is for plugin api {API_VERSION + 1}, this ft-core has {API_VERSION}: upgrade ft-core",
        ),
        (
            command("toy", api_version=0),
            f"is for plugin api 0, this ft-core has {API_VERSION}: ask for a toy-maker that is written for it",
        ),
        (command("tyo"), "calls itself 'tyo': the entry point's name and the spec's must agree"),
    ],
)
def test_a_broken_plugin_is_named(install: Install, code: str, said: str) -> None:
    module = install("Toy_Maker", {"ft.commands": "toy"}, code)
    message = reason("ft.commands", "toy")
    assert message.startswith(f"plugin 'toy' (ft.commands) of toy-maker 1.2 {said.replace('MODULE', module)}")
    found = Registry()
    [problem] = [p for p in found.check() if not p.entry.own]
    assert problem.reason.startswith(said.replace("MODULE", module))
    assert found.load("ft.commands", "train").summary  # nothing else is harmed


def test_two_third_parties_of_one_name(install: Install) -> None:
    for package in ("one", "two"):
        install(package, {"ft.exporters": "toy"}, "plugin = ExporterSpec(name='toy', summary='', export='a:b')")
    message = reason("ft.exporters", "toy")
    assert message.startswith("ft.exporters 'toy' is declared more than once, by ")
    assert message.endswith(": uninstall all but one")
    assert "one 1.2" in message
    assert "two 1.2" in message
    assert sorted(p.entry.source for p in Registry().check() if not p.entry.own) == ["one 1.2", "two 1.2"]
    assert Registry().names("ft.exporters").count("toy") == 1


def test_a_name_of_ours_stays_ours(install: Install) -> None:
    module = install("usurper", {"ft.methods": "sft"}, "raise RuntimeError('imported')")
    found = Registry()
    assert found.get(MethodSpec, "sft").trainer == "ft_core.training.sft:build"
    [problem] = [p for p in found.check() if not p.entry.own]
    assert problem.entry.source == "usurper 1.2"
    assert problem.reason.startswith("its name is taken by ft-core ")
    assert module not in sys.modules


def test_a_package_whose_metadata_is_gone(install: Install, ft: Any) -> None:
    install("remains", {"ft.commands": "toy"}, command("toy"), metadata="none")
    assert Registry().load("ft.commands", "toy").name == "toy"
    assert ft("--help").code == 0


def test_a_name_that_is_known_but_not_installed() -> None:
    empty = Registry([])
    for group, name, extra in (
        ("ft.methods", "reward", "rl"),
        ("ft.modalities", "vision", "vision"),
        ("ft.modalities", "stt", "speech"),
        ("ft.exporters", "gguf", "export"),
        ("ft.commands", "merge", "export"),
    ):
        with pytest.raises(PluginError) as caught:
            empty.load(group, name)
        kind = {"ft.modalities": "modality"}.get(group, group[3:-1])
        assert str(caught.value) == f"{kind} {name!r} is not installed: {how_to_install(extra)}"


def test_a_name_that_nobody_knows() -> None:
    assert reason("ft.methods", "sfd").startswith("no method 'sfd'; did you mean 'sft'? (allowed: ")
    with pytest.raises(PluginError, match=r"^no command 'x' \(allowed: ") as caught:
        Registry([]).load("ft.commands", "x")
    assert "transcribe" in str(caught.value)


def test_a_reference_is_resolved_when_it_is_used() -> None:
    assert resolve("os.path:join") is __import__("os").path.join
    for wrong in ("os.path", ":join", "os.path:", ""):
        with pytest.raises(ValueError, match=r"a reference is 'package.module:attribute'"):
            resolve(wrong)
    with pytest.raises(ImportError):
        resolve("no_such_module_anywhere:x")
    with pytest.raises(AttributeError):
        resolve("os:nothing")


# -- through the command line


def test_listings_with_a_broken_plugin(install: Install, ft: Any) -> None:
    module = install("toy-maker", {"ft.commands": "toy"}, "raise RuntimeError('no good')")
    overview = ft("--help")
    assert (overview.code, overview.err) == (0, "")
    assert "from other packages:\n  toy        of toy-maker 1.2" in overview.out
    assert module not in sys.modules
    listed = ft("plugins")
    assert (listed.code, listed.err) == (0, "")
    assert "  toy           toy-maker 1.2      cannot be used, see below\n" in listed.out
    assert "\n  toy (ft.commands) of toy-maker 1.2: fails to import: RuntimeError: no good\n" in listed.out
    rows = json.loads(ft("plugins", "--json").out)
    assert {
        "group": "ft.commands",
        "name": "toy",
        "package": "toy-maker",
        "version": "1.2",
        "problem": "fails to import: RuntimeError: no good",
    } in rows
    assert [row["problem"] for row in rows if row["name"] == "sft"] == [None]
    called = ft("toy")
    assert called == (
        2,
        "",
        "ft toy: plugin 'toy' (ft.commands) of toy-maker 1.2 fails to import: RuntimeError: no good\n",
    )


def test_a_run_goes_on_beside_a_broken_plugin(install: Install, ft: Any, configure: Any, tmp_path: Path) -> None:
    install("toy-maker", {"ft.methods": "toy", "ft.modalities": "toy"}, "raise RuntimeError('no good')")
    done = ft("train", configure(training={"max_steps": 1}))
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_command_of_a_third_party(install: Install, ft: Any) -> None:
    code = """
def add_arguments(parser):
    parser.add_argument("word")
def run(args):
    print(args.word)
    return 3
plugin = CommandSpec(name="toy", summary="a toy", module=__name__)
"""
    install("toy-maker", {"ft.commands": "toy"}, code)
    assert ft("toy", "hello") == (3, "hello\n", "")
    missing = ft("toy")
    assert missing == (2, "", "ft toy: the following arguments are required: word (see ft toy --help)\n")
    assert ft("toy", "--help").code == 0


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ValueError('no good')", "ValueError: no good"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("", "AttributeError: module "),
    ],
)
def test_a_command_whose_module_is_broken(install: Install, ft: Any, code: str, said: str) -> None:
    module = install("body", {}, code)
    install("toy-maker", {"ft.commands": "toy"}, command("toy", module))
    called = ft("toy")
    assert (called.code, called.out) == (2, "")
    assert called.err.startswith(f"ft toy: the command 'toy' cannot be loaded: {said}")
    assert called.err.count("\n") == 1
