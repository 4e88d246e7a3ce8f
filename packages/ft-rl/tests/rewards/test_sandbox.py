"""What code can and cannot do in the sandbox, tried for real; and that nothing is run where it cannot be had."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from ft_rl.rewards import sandbox
from ft_rl.rewards.sandbox import Limits, NoIsolation, check_isolation, run_python

SANDBOX = Path(check_isolation.__wrapped__.__code__.co_filename)


pytestmark = pytest.mark.usefixtures("isolation")

SHORT = Limits(seconds=20, cpu_seconds=20)


def said(program: str, limits: Limits = SHORT, **more: object) -> str:
    outcome = run_python(program, limits, **more)  # type: ignore[arg-type]
    assert (outcome.status, outcome.code) == ("exit", 0), outcome
    return outcome.output.decode().strip()


def processes_with(word: str) -> list[int]:
    """Living processes in a sandbox whose program has a word."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "root/ft-work/program.py").read_text()
        except OSError:
            continue
        if word in text:
            found.append(int(folder.name))
    return found


def soon_nobody_has(word: str) -> bool:
    """Whether all such processes end within some seconds; those that are killed need a moment to be gone."""
    deadline = time.monotonic() + 10
    while processes_with(word):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_the_isolation_holds() -> None:
    check_isolation()


def test_it_runs() -> None:
    outcome = run_python(
        "import sys; print(input(), flush=True); print('so', file=sys.stderr); sys.exit(3)", stdin="hello\n"
    )
    assert (outcome.status, outcome.code, outcome.output) == ("exit", 3, b"hello\nso\n")
    assert said("print(open('other.txt').read())", files={"other.txt": "käse"}) == "käse"
    assert said("import os; os.write(int(os.environ['RESULT']), b'x'); print(1)") == "1"
    assert run_python("import os; os.write(int(os.environ['RESULT']), b'x')").result == b"x"


def test_a_socket_leads_nowhere() -> None:
    program = """
import socket, sys
inet, unix = socket.AF_INET, socket.AF_UNIX
for family, address in ((inet, ("127.0.0.1", PORT)), (inet, ("192.0.2.1", 80)), (unix, NAME)):
    with socket.socket(family) as s:
        s.settimeout(2)
        try:
            s.connect(address)
            print("connected", address)
        except OSError as error:
            print(type(error).__name__, file=sys.stderr)
try:
    socket.getaddrinfo("localhost.example.org", 80)
    print("resolved")
except OSError:
    pass
"""
    with socket.socket() as listener, socket.socket(socket.AF_UNIX) as abstract:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        name = f"\0ft-test-{os.getpid()}"  # of the network namespace, not of the file system
        abstract.bind(name)
        abstract.listen()
        port = listener.getsockname()[1]
        filled = program.replace("PORT", str(port)).replace("NAME", repr(name))
        outside = subprocess.run([sys.executable, "-c", filled], capture_output=True, text=True, check=True)
        assert outside.stdout.count("connected") >= 2  # the program is right: from here it does connect
        output = said(filled)
        assert "connected" not in output
        assert "resolved" not in output
        listener.settimeout(0.2)
        listener.accept()  # the one from outside
        with pytest.raises(TimeoutError):
            listener.accept()


def test_the_machines_files_are_not_there(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    program = f"""
import os
paths = [{str(secret)!r}, {str(Path.home() / ".bashrc")!r}, {os.getcwd()!r}, "/etc/passwd", "/var", "/sys"]
print([path for path in paths if os.path.exists(path)])
print(sorted(os.environ))
print(os.getuid(), os.getgid(), os.getgroups() in ([], [65534]), os.listdir())
"""
    there, environment, who = said(program).splitlines()
    assert there == "[]"
    assert "PATH" in environment
    assert not [name for name in ("PYTHONPATH", "USER", "HF_HUB_OFFLINE", "PYTEST_CURRENT_TEST") if name in environment]
    assert who.startswith("65534 65534")
    assert who.endswith("['program.py']")


def test_nothing_outside_can_be_written() -> None:
    program = """
import os, sys
for path in (os.__file__, "/usr/new", "/lib/new", "/proc/sys/kernel/hostname", "/dev/new"):
    try:
        open(path, "a").close()
        print(path)
    except OSError:
        pass
for call in (lambda: os.chmod(os.__file__, 0o777), lambda: os.setuid(0)):
    try:
        call()
    except OSError:
        continue
    print("allowed")
"""
    assert said(program) == ""


def test_it_has_no_rights_and_gets_none() -> None:
    program = """
import ctypes
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("Cap")])
libc = ctypes.CDLL(None, use_errno=True)
print([libc.unshare(flag) for flag in (0x10000000, 0x40000000, 0x00020000)])
print(libc.mount(b"none", b"/ft-work", b"tmpfs", 0, None))
"""
    if "/proc" not in said(
        "print(open('/proc/mounts').read() if __import__('os').path.exists('/proc/mounts') else '')"
    ):
        pytest.skip("this machine lets no /proc be mounted in the sandbox")
    rights, spaces, mounted = said(program).splitlines()
    assert rights == str(["0" * 16] * 5)
    assert spaces == "[-1, -1, -1]"
    assert mounted == "-1"


def test_what_is_around_it_is_out_of_reach_and_so_is_memory_that_no_limit_counts() -> None:
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
allowed = []
for name in ("/proc/1/mem", "/proc/1/environ", *(f"/proc/1/fd/{n}" for n in range(10))):
    try:
        open(name, "r+b", buffering=0).close()
        allowed.append(name)
    except OSError:
        pass
calls = {
    "shmget": lambda: libc.shmget(0, 2**20, 0o1600),
    "msgget": lambda: libc.msgget(0, 0o1600),
    "semget": lambda: libc.semget(0, 1, 0o1600),
    "memfd_create": lambda: libc.memfd_create(b"x", 0),
    "ptrace": lambda: libc.ptrace(16, 1, 0, 0),
    "unshare": lambda: libc.unshare(0x10000000),
}
for name, call in calls.items():
    ctypes.set_errno(0)
    if call() >= 0 or ctypes.get_errno() != 1:  # EPERM
        allowed.append(name)
try:
    os.kill(1, 9)  # which has no effect where it is not refused
except PermissionError:
    pass
print(allowed)
"""
    assert said(program) == "[]"


def test_an_endless_loop_is_ended_by_the_clock_and_by_the_processor() -> None:
    start = time.monotonic()
    outcome = run_python("print('begun', flush=True)\nwhile True: pass", Limits(seconds=3))
    assert (outcome.status, outcome.output) == ("time", b"begun\n")
    assert time.monotonic() - start < 15
    assert run_python("import time; time.sleep(60)", Limits(seconds=0.5)).status == "time"
    outcome = run_python("while True: pass", Limits(seconds=30, cpu_seconds=1))
    assert (outcome.status, outcome.code) in (("signal", signal.SIGXCPU), ("signal", signal.SIGKILL))


def test_a_memory_hog() -> None:
    outcome = run_python("x = bytearray(2 * 2**30)", SHORT)
    assert outcome.code == 1
    assert b"MemoryError" in outcome.output
    outcome = run_python("x = []\nwhile True: x.append(bytearray(2**20))", SHORT)
    assert outcome.code == 1
    assert said("x = bytearray(2**30); print(len(x))", Limits(seconds=20, memory=2 * 2**30)) == str(2**30)


def test_a_fork_bomb_is_bounded_and_leaves_nobody_behind() -> None:
    program = """
import os, time
started = 0
try:
    while started < 1000:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        started += 1
except OSError:
    pass
print(started)
"""
    start = time.monotonic()
    assert int(said(program, Limits(seconds=30, processes=4))) == 3
    bomb = "word = 'ft-bomb'\nimport os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    assert run_python(bomb, Limits(seconds=1, processes=4)).status == "time"
    assert time.monotonic() - start < 40
    assert soon_nobody_has("ft-bomb")


def test_threads_count_as_processes() -> None:
    program = """
import threading, time
try:
    for _ in range(100):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
except RuntimeError as error:
    print(error)
"""
    assert "can't start new thread" in said(program)


def test_who_hides_in_a_session_of_his_own_is_ended_too() -> None:
    program = """
import os, time
word = "ft-hidden"
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for d in range(3): os.close(d)
        time.sleep(60)
    os._exit(0)
"""
    said(program)
    assert soon_nobody_has("ft-hidden")


def test_a_huge_output_and_a_huge_file() -> None:
    start = time.monotonic()
    outcome = run_python("while True: print('x' * 1000)", Limits(seconds=20, output=10_000))
    assert (outcome.status, outcome.output) == ("output", (b"x" * 1000 + b"\n") * 9 + b"x" * 991)
    assert time.monotonic() - start < 10
    program = """
import os
written = 0
try:
    for number in range(100):
        with open(f"file{number}", "wb", buffering=0) as file:
            for _ in range(4):
                written += file.write(bytes(2**20))
except OSError as error:
    print(type(error).__name__, written <= 10 * 2**20, written >= 7 * 2**20)
"""
    assert said(program, Limits(seconds=20, disk=8 * 2**20)) == "OSError True True"
    assert run_python("open('f', 'wb').write(bytes(2**25))", SHORT).code == 1


def test_when_its_parent_is_killed_it_ends(tmp_path: Path) -> None:
    """SIGKILL, so that nothing can be tidied up: what runs must notice by itself."""
    word = f"ft-orphan-{os.getpid()}"
    source = f"""
import sys
sys.path[:0] = {sys.path!r}
from ft_rl.rewards.sandbox import Limits, run_python
run_python("import time\\nword = {word!r}\\nprint(1)\\ntime.sleep(120)", Limits(seconds=120))
"""
    parent = subprocess.Popen([sys.executable, "-c", source], start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not processes_with(word):
            assert time.monotonic() < deadline, "it never began"
            assert parent.poll() is None
            time.sleep(0.05)
        parent.kill()
        parent.wait()
        while processes_with(word):
            assert time.monotonic() < deadline, "it lives on"
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()


def test_a_crash_is_a_signal() -> None:
    outcome = run_python("import ctypes; ctypes.string_at(0)", SHORT)
    assert (outcome.status, outcome.code) == ("signal", signal.SIGSEGV)


def test_packages_only_where_they_are_asked_for() -> None:
    program = "import numpy; print(numpy.arange(3).sum())"
    assert b"ModuleNotFoundError" in run_python(program, SHORT).output
    assert said(program, Limits(seconds=60, memory=2 * 2**30), packages=True) == "3"


def test_nothing_is_left_in_the_temporary_folder() -> None:
    before = set(os.listdir(tempfile.gettempdir()))
    run_python("open('x', 'w').write('x')")
    run_python("while True: pass", Limits(seconds=0.3))
    left = {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("ft-sandbox-")} - before
    assert left == set()


def as_somebody(
    program: str, tmp_path: Path, *before: str, child: str | None = None
) -> subprocess.CompletedProcess[str]:
    """A program that has the sandbox in a module beside it, run by the system's Python with words before it.

    `child` takes the place of the sandbox's inside.
    """
    folder = tmp_path / "alone"
    folder.mkdir(exist_ok=True)
    for file in (SANDBOX, SANDBOX.with_name("sandbox_child.py")):
        shutil.copy(file, folder)
    if child is not None:
        (folder / "sandbox_child.py").write_text(child)
    (folder / "ft_core").mkdir(exist_ok=True)
    (folder / "ft_core" / "__init__.py").touch()
    (folder / "ft_core" / "errors.py").write_text("class FtError(Exception):\n    pass\n")
    (folder / "program.py").write_text(program)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    python = "/usr/bin/python3"
    new = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    if not Path(python).exists() or subprocess.run(new, check=False).returncode != 0:
        pytest.skip("no /usr/bin/python3 of 3.11 or newer")
    words = [*before, "env", "-i", "PATH=/usr/bin:/bin", python, str(folder / "program.py")]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


REFUSED = """
from sandbox import NoIsolation, run_python
try:
    print("ran", run_python("print(1)"))
except NoIsolation as error:
    print("refused:", error)
"""


def test_where_no_namespace_can_be_had_it_refuses(tmp_path: Path) -> None:
    """In a user namespace in which no further one may be made, as where an administrator has forbidden them."""
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    result = as_somebody(REFUSED, tmp_path, "unshare", "-r", "sh", "-c", forbid, "sh")
    assert result.stdout.startswith("refused: this machine doesn't allow the isolation that code is run in (unshare: ")
    assert result.stdout.count("\n") == 1


CLONES = """
import os
from sandbox import NoIsolation, check_isolation, run_python
program = '''
import ctypes, errno, os, subprocess, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
clone, clone3 = {"x86_64": (56, 435), "aarch64": (220, 435)}[os.uname().machine]
for flag in (0x10000000, 0x00020000, 0x40000000):  # of a user's, mounts, network
    made = libc.syscall(clone, flag | 17, 0, 0, 0, 0)
    if made == 0:
        os._exit(0)
    print(made, errno.errorcode[ctypes.get_errno()])
arguments = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)
made = libc.syscall(clone3, ctypes.byref(arguments), ctypes.sizeof(arguments))
if made == 0:
    os._exit(0)
print(made, errno.errorcode[ctypes.get_errno()])
thread = threading.Thread(target=lambda: print("a thread", flush=True))
thread.start()
thread.join()
print(subprocess.run([sys.executable, "-S", "-c", "print('a process')"], capture_output=True, text=True).stdout, end="")
'''
try:
    check_isolation()
    print("read-only", os.statvfs("/proc/sys/user").f_flag & os.ST_RDONLY)
except NoIsolation as error:
    print("refused:", error)
print(run_python(program).output.decode(), end="")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make /proc/sys read-only")
@pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="calls have other numbers here")
def test_no_namespace_is_made_in_it_where_no_limit_can_be_written(tmp_path: Path) -> None:
    """As in a container whose /proc/sys is read-only, where no other /proc can be mounted either."""
    cover = 'mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec "$@"'
    result = as_somebody(CLONES, tmp_path, "unshare", "-m", "sh", "-c", cover, "sh")
    if "mount:" in result.stderr:
        pytest.skip(f"/proc/sys cannot be made read-only here: {result.stderr.strip()}")
    assert result.stdout.splitlines() == [
        "read-only 1",
        *["-1 EPERM"] * 3,
        "-1 ENOSYS",
        "a thread",
        "a process",
    ], result.stderr


def test_a_machine_that_can_forbid_them_in_no_way_is_refused(tmp_path: Path) -> None:
    """A kind of machine whose calls are not known, and a limit that cannot be written."""
    child = SANDBOX.with_name("sandbox_child.py").read_text(encoding="utf-8")
    for text, other in (
        ('"x86_64": (0,', '"x86": (0,'),
        ('"aarch64": (1,', '"aarch": (1,'),
        ("sys/user/max", "sys/none/max"),
    ):
        assert text in child
        child = child.replace(text, other)
    result = as_somebody(REFUSED, tmp_path, child=child)
    assert result.stdout.startswith(
        "refused: this machine doesn't allow the isolation that code is run in (further user"
    )
    assert "/proc/sys/none/max_user_namespaces cannot be written" in result.stdout
    assert result.stdout.count("\n") == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_somebody_without_rights_gets_the_same_isolation() -> None:
    program = """
from sandbox import Limits, check_isolation, run_python
check_isolation()
print(run_python("import os; print(os.getuid(), os.path.exists('/tmp'))").output)
bomb = '''
import os, time
n = 0
try:
    while n < 99:
        if os.fork() == 0:
            time.sleep(9)
            os._exit(0)
        n += 1
except OSError:
    print(n)
'''
print(run_python(bomb, Limits(seconds=30)).output)
"""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        words = ("setpriv", "--reuid=1234", "--regid=1234", "--clear-groups")
        result = as_somebody(program, Path(folder), *words)
    assert result.stdout.splitlines() == ["b'65534 False\\n'", "b'3\\n'"], result.stderr


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda job: job["command"].__setitem__(0, "/nowhere/python"), "No such file or directory: /nowhere/python"),
        (
            lambda job: job["paths"].append("/nowhere/lib"),
            "mount: No such file or directory: /nowhere/lib -> {root}/nowhere/lib",
        ),
    ],
)
def test_what_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, change: Any, named: str) -> None:
    """The kernel was blamed, and no path said."""
    jobs: list[dict[str, Any]] = []
    made = sandbox._job

    def job(*given: Any) -> dict[str, Any]:
        jobs.append(made(*given))
        change(jobs[-1])
        return jobs[-1]

    monkeypatch.setattr(sandbox, "_job", job)
    with pytest.raises(NoIsolation) as error:
        run_python("print(1)", SHORT)
    assert str(error.value) == f"code cannot be run in its sandbox: {named.format(root=jobs[0]['root'])}"
    monkeypatch.undo()
    assert said("print(1)") == "1"


def test_what_cannot_be_mounted_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a right that is missing too: where, beside the advice on namespaces."""
    made = sandbox._job
    monkeypatch.setattr(sandbox, "_job", lambda *given: made(*given) | {"root": "/dev/null"})
    with pytest.raises(NoIsolation, match=r"^this machine doesn't allow .*\(mount: [^:]+: /dev/null\): it takes user "):
        run_python("print(1)", SHORT)
