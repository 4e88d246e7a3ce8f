"""Runs Python that nobody has read so that it harms nothing: without network, without the machine's files, bounded.

Linux only, by its namespaces; :mod:`ft_rl.rewards.sandbox_child` is what happens inside. Where they can't be had,
nothing is run at all: :func:`check_isolation` tries it once a process before the first use.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ft_core.errors import FtError

__all__ = ["Limits", "NoIsolation", "Outcome", "check_isolation", "run_python"]

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache", "/nix/store")
"""What of the machine's files Python needs, beside itself."""

CHILD = Path(__file__).with_name("sandbox_child.py")


class NoIsolation(FtError):
    """This machine cannot isolate a process as :func:`run_python` does."""


@dataclass(frozen=True)
class Limits:
    """What one run may take.

    Attributes:
        seconds: by the clock, the whole of it.
        cpu_seconds: of processor time, each process.
        memory: bytes of address space, each process.
        processes: processes and threads at a time.
        disk: bytes of all files that it writes; they lie in memory.
        output: bytes of standard output and error together; one more ends the run.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory: int = 512 * 2**20
    processes: int = 4
    disk: int = 16 * 2**20
    output: int = 2**16


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: ``exit`` (it ended by itself), ``signal`` (it crashed, or passed a limit of the kernel's), ``time`` or
            ``output`` (it was killed for that).
        code: the exit code, or the signal's number; None where it was killed.
        output: what it wrote to standard output and error, as far as ``Limits.output``.
        result: what it wrote to the descriptor ``RESULT`` of its environment.
    """

    status: Literal["exit", "signal", "time", "output"]
    code: int | None
    output: bytes
    result: bytes = field(default=b"", repr=False)


def run_python(
    program: str,
    limits: Limits | None = None,
    *,
    stdin: str = "",
    files: Mapping[str, str] | None = None,
    packages: bool = False,
) -> Outcome:
    """Run a program in a process of its own that has no network and none of the machine's files but Python.

    The working folder is empty but for ``files``, the environment but for what Python needs; the code is nobody. When
    it ends, is killed, or the calling process dies, all that it has started is killed too.

    Args:
        program: Python, run as ``__main__``.
        limits: unset, :class:`Limits` as it stands.
        stdin: its standard input.
        files: further files of the working folder, by name.
        packages: whether packages that are installed here can be imported (a virtual environment's code can be read
            then), or the standard library only.

    Raises:
        NoIsolation: the machine doesn't allow one of the namespaces, or a file of Python's is not there; names it.
    """
    limits = limits or Limits()
    if not sys.platform.startswith("linux"):
        raise NoIsolation(f"code is run in Linux's namespaces, which {sys.platform} doesn't have: use a Linux machine")
    deadline = time.monotonic() + limits.seconds
    with tempfile.TemporaryDirectory(prefix="ft-sandbox-") as root, contextlib.ExitStack() as stack:
        status_in, status_out = _pipe(stack)
        result_in, result_out = _pipe(stack)
        job = json.dumps(_job(program, limits, stdin, files or {}, packages, root, result_out))
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(CHILD), str(status_out), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(status_out, result_out),
                env={},
                cwd="/",
                start_new_session=True,
            )
        finally:  # as long as this process holds them too, their ends are never seen
            os.close(status_out)
            os.close(result_out)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(job.encode())
                process.stdin.close()
            bounds = {process.stdout.fileno(): limits.output, status_in: 2**16, result_in: 2**20}
            read, stopped = _read(bounds, deadline)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whoever is in the namespace dies with its first process
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
    output, told, result = read.values()
    said: dict[str, Any] = json.loads(told.splitlines()[0]) if told.strip() else {}
    if said.get("missing"):  # nothing that the kernel forbids
        raise NoIsolation(f"code cannot be run in its sandbox: {said['refused']}")
    if "refused" in said:
        raise NoIsolation(
            f"this machine doesn't allow the isolation that code is run in ({said['refused']}): it takes user "
            "namespaces, which the sysctl user.max_user_namespaces or a container's profile may forbid"
        )
    if stopped is None and not said:
        raise NoIsolation(f"the sandbox ended before the code began: {output[-200:].decode(errors='replace')}")
    if stopped is not None:
        return Outcome(stopped, None, output, result)
    kind: Literal["exit", "signal"] = "exit" if "exit" in said else "signal"
    return Outcome(kind, said[kind], output, result)


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe, of which the reading end is closed in the end; the writing end is the caller's to close."""
    reading, writing = os.pipe()
    stack.callback(os.close, reading)
    return reading, writing


def _job(
    program: str, limits: Limits, stdin: str, files: Mapping[str, str], packages: bool, root: str, keep: int
) -> dict[str, Any]:
    prefixes = [sys.base_prefix]
    if packages:  # a file *.pth may have added those of another environment
        prefixes += [sys.prefix, *(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))]
    # The longest of them need not be bound where a shorter one holds it.
    paths = [path for path in (*SYSTEM, *map(os.path.realpath, prefixes)) if os.path.lexists(path)]
    paths = [p for p in dict.fromkeys(paths) if not any(p != q and p.startswith(f"{q}/") for q in paths)]
    executable = sys.executable if packages else os.path.realpath(sys.executable)
    return {
        "root": root,
        "paths": paths,
        "size": limits.disk + sum(len(text.encode()) for text in (program, stdin, *files.values())) + 2**20,
        "files": {**files, "program.py": program, "stdin": stdin},
        "stdin": "stdin",
        "keep": keep,
        "command": [executable, "-I", *([] if packages else ["-S"]), "-B", "/ft-work/program.py"],
        "environment": {
            "PATH": "/usr/bin:/bin",
            "HOME": "/ft-work",
            "TMPDIR": "/ft-work",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "RESULT": str(keep),
        },
        "limits": {
            "RLIMIT_CPU": limits.cpu_seconds,
            "RLIMIT_AS": limits.memory,
            # As root's the processes around the code's are another user's than nobody, and don't count.
            "RLIMIT_NPROC": limits.processes + (0 if os.getuid() == 0 else 2),
            "RLIMIT_FSIZE": limits.disk,
            "RLIMIT_NOFILE": 64,
        },
    }


def _read(bounds: dict[int, int], deadline: float) -> tuple[dict[int, bytes], Literal["time", "output"] | None]:
    """What comes out of some descriptors until all are closed; whether the time or the first one's bound came first."""
    read = dict.fromkeys(bounds, b"")
    first = next(iter(bounds))
    with selectors.DefaultSelector() as selector:
        for descriptor in bounds:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return read, "time"
            for key, _ in selector.select(left):
                got = os.read(key.fd, 2**16)
                if not got:
                    selector.unregister(key.fd)
                read[key.fd] = (read[key.fd] + got)[: bounds[key.fd]]
                if key.fd == first and len(read[first]) >= bounds[first]:
                    return read, "output"
    return read, None


PROBE = """
import os, socket, sys
def fails(what, *arguments):
    try:
        what(*arguments)
    except OSError:
        return True
    return False
def namespaces_fail():
    import ctypes
    libc, user = ctypes.CDLL(None), 0x10000000
    if libc.unshare(user) == 0:
        return False
    number = {"x86_64": 56, "aarch64": 220}.get(os.uname().machine)
    made = libc.syscall(number, user | 17, 0, 0, 0, 0) if number else -1  # clone
    if made == 0:
        os._exit(0)
    return made == -1
port, path = int(sys.stdin.readline()), sys.stdin.readline().rstrip("\\n")
checks = {
    "a connection to this machine": fails(socket.create_connection, ("127.0.0.1", port), 2),
    "a name to be looked up": fails(socket.getaddrinfo, "example.org", 80),
    "a file of the user's to be read": fails(open, path),
    "a system file to be written": fails(open, os.path.realpath(os.__file__), "a"),
    "to be root": os.getuid() != 0,
    "a user namespace of its own": namespaces_fail(),
}
os.write(int(os.environ["RESULT"]), repr([name for name, held in checks.items() if not held]).encode())
"""


@functools.cache
def check_isolation() -> None:
    """Try, once a process, whether code is kept from the network and from the machine's files.

    A socket is opened to a port on which this process really listens, and a file to be read that is really there.

    Raises:
        NoIsolation: the namespaces can't be had, or something got through.
    """
    with socket.socket() as listener, tempfile.NamedTemporaryFile("w", suffix=".txt") as secret:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        outcome = run_python(PROBE, Limits(seconds=30), stdin=f"{listener.getsockname()[1]}\n{secret.name}\n")
    if (outcome.status, outcome.code, outcome.result) != ("exit", 0, b"[]"):
        found = outcome.result.decode() or outcome.output[-200:].decode(errors="replace")
        raise NoIsolation(f"the isolation that code is run in doesn't hold on this machine: it allowed {found}")
