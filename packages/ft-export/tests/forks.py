"""Programs in processes of their own that start at once: forked from one that has imported what all of them need.

Importing torch and transformers takes seconds. Run as a program, this imports the modules that its arguments name and
forks a process for each line on its input; :class:`Forks` is the other side of it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["Forks"]


class Forks:
    """Runs Python code as ``python -c CODE WORDS`` would, but for the imports that are already there.

    Args:
        modules: what is imported once.
        environment: of every process; the libraries that read it when they are imported have read it once.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.parent = subprocess.Popen(
            [sys.executable, __file__, *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=None if environment is None else dict(environment),
        )  # fmt: skip

    def run(self, code: str, *words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)``."""
        with tempfile.TemporaryDirectory() as folder:
            program, out, err = (Path(folder) / name for name in ("program.py", "out", "err"))
            program.write_text(code)
            asked: dict[str, Any] = {"program": str(program), "words": list(map(str, words)), "wait": timeout}
            asked |= {"out": str(out), "err": str(err)}
            assert self.parent.stdin is not None
            assert self.parent.stdout is not None
            self.parent.stdin.write(json.dumps(asked) + "\n")
            self.parent.stdin.flush()
            status = int(self.parent.stdout.readline())
            return subprocess.CompletedProcess(words, status, out.read_text(), err.read_text())

    def close(self) -> None:
        assert self.parent.stdin is not None
        self.parent.stdin.close()
        self.parent.wait()


def _fork(asked: dict[str, Any], answers: int) -> None:
    """Run what is asked in a new process, wait for it, and tell its exit code as subprocess does."""
    if child := os.fork():
        signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
        signal.alarm(int(asked["wait"]))
        _, status = os.waitpid(child, 0)
        signal.alarm(0)
        os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())
        return
    for number, path in ((1, asked["out"]), (2, asked["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.close(answers)
    sys.argv = [asked["program"], *asked["words"]]
    _run(asked["program"])


def _run(program: str) -> NoReturn:
    """Run to the end of the process, as Python does: torch's own end would wait for threads that a fork has not."""
    status = 0
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        traceback.print_exc()
        status = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _serve(modules: Sequence[str]) -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever an import prints is no answer
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # no process looks for garbage among the libraries
    for line in iter(sys.stdin.readline, ""):
        _fork(json.loads(line), answers)
    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1:])
