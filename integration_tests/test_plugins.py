"""Third-party plugins through the command line: built into wheels, installed in an environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKAGES = HERE.parent / "packages"
OWN = ("ft-kernels", "ft-core", "ft-rl", "ft-vision", "ft-speech", "ft-export")


class Environment:
    """A virtual environment with ft's wheels and some plugins'; the big libraries are those of the running Python."""

    def __init__(self, folder: Path, wheels: list[Path]) -> None:
        venv.create(folder, with_pip=False)
        scheme = {"base": str(folder), "platbase": str(folder)}
        self.scripts = Path(sysconfig.get_path("scripts", "venv", scheme))
        site = Path(sysconfig.get_path("purelib", "venv", scheme))
        self.python = self.scripts / ("python.exe" if os.name == "nt" else "python")
        # A plain line puts the folder behind this environment's own and leaves the .pth files in it alone, so the
        # checkout's editable packages are not reached.
        (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self._install(wheels)

    def _install(self, wheels: list[Path]) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(self.python)]
        options = ["install", "-q", "--no-index", "--no-deps", "--ignore-installed", "--no-compile"]
        subprocess.run([*pip, *options, *map(str, wheels)], check=True)

    def ft(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [self.scripts / "ft", *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
        )


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("wheels")
    projects = [*(PACKAGES / name for name in OWN), HERE / "toy_plugin", HERE / "broken_plugin"]
    for project in projects:
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(project)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {wheel.name.partition("-")[0].replace("_", "-"): wheel for wheel in out.glob("*.whl")}


@pytest.fixture(scope="session")
def with_toy(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    names = [*OWN, "ft-toy"]
    return Environment(tmp_path_factory.mktemp("a toy") / "environment", [wheels[name] for name in names])


@pytest.fixture(scope="session")
def with_broken(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    names = [*OWN, "ft-toy", "ft-broken"]
    return Environment(tmp_path_factory.mktemp("broken") / "environment", [wheels[name] for name in names])


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The least that is a run (docs/run-folder.md): an exporter decides itself what else it needs."""
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "environment.json").write_text(json.dumps({"run_format": 1, "base_model": {"path": "nowhere"}}))
    (folder / "config.yaml").write_text("model: nowhere\nmethod: sft\nquantization: none\n")
    return folder


def test_the_plugins_are_installed_not_found_in_the_checkout(with_toy: Environment) -> None:
    code = "import ft_core, ft_toy; print(ft_core.__file__); print(ft_toy.__file__)"
    found = subprocess.run([with_toy.python, "-c", code], capture_output=True, text=True, check=True).stdout
    for line in found.splitlines():
        assert Path(line).is_relative_to(with_toy.scripts.parent)


def test_a_third_partys_command(with_toy: Environment) -> None:
    done = with_toy.ft("hello", "Ada")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello, Ada\n", "")
    assert with_toy.ft("hello", "--fail").returncode == 3
    assert "greet somebody" in with_toy.ft("hello", "--help").stdout


def test_a_third_partys_exporter(with_toy: Environment, run_folder: Path) -> None:
    done = with_toy.ft("export", run_folder, "--to", "toy")
    target = run_folder / "export" / "toy" / "files.txt"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["2 files", f"wrote {target}", f"next: cat {target}"]
    assert target.read_text() == "config.yaml\nenvironment.json"


def test_an_exporters_types_options_and_errors(with_toy: Environment, run_folder: Path, tmp_path: Path) -> None:
    export = ("export", run_folder, "--to", "toy", "--out", tmp_path / "out")
    assert with_toy.ft(*export, "--type", "loud", "separator=+").returncode == 0
    assert (tmp_path / "out" / "files.txt").read_text() == "CONFIG.YAML+ENVIRONMENT.JSON"
    again = with_toy.ft(*export)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "--overwrite" in again.stderr
    wrong = with_toy.ft(*export, "--type", "quiet")
    assert wrong.returncode == 2
    assert "plain, loud" in wrong.stderr


def test_third_parties_are_listed(with_toy: Environment) -> None:
    done = with_toy.ft("plugins")
    assert done.returncode == 0
    assert "cannot be used" not in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["hello", "ft-toy", "1.2.3"] in [line[:3] for line in lines]
    assert ["toy", "ft-toy", "1.2.3"] in [line[:3] for line in lines]
    assert "hello" in with_toy.ft("--help").stdout


# name, group, what the reason must say
FAULTS = [
    ("crash", "ft.commands", "RuntimeError: no luck today"),
    ("future", "ft.commands", "api 2"),
    ("train", "ft.commands", "ft-core"),
    ("toy", "ft.exporters", "ft-toy 1.2.3"),
    ("nothing", "ft.exporters", "ExporterSpec"),
]


@pytest.mark.parametrize(("name", "group", "reason"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_each_fault_is_reported_by_name(with_broken: Environment, name: str, group: str, reason: str) -> None:
    done = with_broken.ft("plugins")
    assert done.returncode == 0
    reported = done.stdout.split("cannot be used:\n")[1].splitlines()
    (line,) = (line for line in reported if line.startswith(f"  {name} ({group}) of ft-broken 0.0.9: "))
    assert reason in line


def test_json_has_the_same_faults(with_broken: Environment) -> None:
    rows = json.loads(with_broken.ft("plugins", "--json").stdout)
    broken = {(row["package"], row["name"]) for row in rows if row["problem"]}
    # Two third parties with one name: neither can be preferred, so both are reported.
    assert broken == {("ft-broken", fault[0]) for fault in FAULTS} | {("ft-toy", "toy")}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--help"], 0, "sound"),
        (["sound"], 0, "sound"),
        (["hello"], 0, "hello, world"),
        (["doctor"], 0, "ft-broken"),
        (["train", "--help"], 0, "CONFIG"),
        (["crash"], 2, "'crash' (ft.commands) of ft-broken 0.0.9 fails to import: RuntimeError: no luck today"),
        (["future"], 2, "upgrade ft-core"),
        (["export", "RUN", "--to", "toy"], 2, "ft-toy 1.2.3 and ft-broken 0.0.9"),
        (["export", "RUN", "--to", "nothing"], 2, "is no ExporterSpec"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_faults_harm_nothing_else(
    with_broken: Environment, run_folder: Path, words: list[str], code: int, says: str
) -> None:
    done = with_broken.ft(*(run_folder if word == "RUN" else word for word in words))
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if code == 2:
        assert done.stderr.count("\n") == 1
