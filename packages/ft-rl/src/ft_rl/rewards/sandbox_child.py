"""The inside of the sandbox: a program of its own, run by :mod:`ft_rl.rewards.sandbox` as ``python -I -S``.

It reads a JSON object from standard input, goes into namespaces of its own, and runs Python there:

- user: the code is nobody, and has no capability; no further user namespace can be made in it, by a limit where one can
  be written, and by the calls of the system that are refused;
- network: there is no interface that is up, not even the loopback one;
- mount: the root is an empty file system in memory, bounded, with Python and the system's libraries read-only and a
  few devices; nothing else of the machine is there;
- processes: all that the code started ends with it;
- and those of System V's shared memory and of the host's name.

Calls of the system that Python does well without are refused (seccomp): those that make memory which no limit counts,
or that have let code out of such a place before.

What goes wrong before the code runs is written to the descriptor ``status`` as ``{"refused": "…", "missing": …}``
(whether a file is not there), how the code ended as ``{"exit": n}`` or ``{"signal": n}``. Only the standard library is
used: nothing else is there to be imported.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import signal
import struct
import sys
from typing import Any

__all__ = ["main"]

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC, MS_PRIVATE, MS_RELATIME = 1024, 2048, 4096, 16384, 1 << 18, 1 << 21
KEPT_FLAGS = {2: MS_NOSUID, 4: MS_NODEV, 8: MS_NOEXEC, 1024: MS_NOATIME, 2048: MS_NODIRATIME, 4096: MS_RELATIME}
"""What statvfs says of a mount (its ST_ flags), and the flag with which mounting it again must say the same."""
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
NOBODY = 65534
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Kinds of machines: the column below, and what seccomp calls it (AUDIT_ARCH_)."""
REFUSED = {
    "semget": (64, 190),
    "msgget": (68, 186),
    "shmget": (29, 194),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "open_by_handle_at": (304, 265),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}
"""Calls and their numbers."""
CLONE, CLONE3 = (56, 220), (435, 435)
"""Calls that make a process or a thread, and namespaces with it. Of the second's flags, which lie in memory, a filter
sees nothing; where there is no second, the C library takes the first."""
NAMESPACES = 0x7E020000
"""The flags of all namespaces that a process can be made with (CLONE_NEW)."""
NO_MORE_NAMESPACES = "sys/user/max_user_namespaces"
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
WORK = "/ft-work"
"""Not `/work`, where somebody's Python may lie."""

libc = ctypes.CDLL(None, use_errno=True)


def called(name: str, *arguments: object, paths: tuple[str, ...] = ()) -> None:
    """A function of the C library's that says 0 for success; ``paths``, one or two, are what an error is about."""
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        first, second = (*paths, None, None)[:2]
        raise OSError(number, f"{name}: {os.strerror(number)}", first, None, second)


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [word.encode() if word is not None else None for word in (source, target, kind, options)]
    paths = (source, target) if source.startswith("/") else (target,)
    called("mount", words[0], words[1], words[2], ctypes.c_ulong(flags), words[3], paths=paths)


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the one that made it ends."""
    called("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:  # it ended before that was said
        os._exit(1)


def enter_namespaces() -> None:
    """New namespaces for this process and, of processes, for those that it makes.

    As root, nobody is mapped too, so that the code need not be root outside: root has no bound on its processes. The
    maps are written by a process that has stayed outside, since only there one may map more than oneself.
    """
    uid, gid = os.getuid(), os.getgid()
    inside, outside = os.pipe()
    writer = os.fork()
    if writer == 0:
        os.close(outside)
        os.read(inside, 1)
        status = 1
        with contextlib.suppress(OSError):
            me = f"/proc/{os.getppid()}"
            if uid == 0:
                maps = {"uid_map": f"0 0 1\n{NOBODY} {NOBODY} 1", "gid_map": f"0 0 1\n{NOBODY} {NOBODY} 1"}
            else:
                maps = {"setgroups": "deny", "uid_map": f"{NOBODY} {uid} 1", "gid_map": f"{NOBODY} {gid} 1"}
            for name, text in maps.items():
                descriptor = os.open(f"{me}/{name}", os.O_WRONLY)
                os.write(descriptor, text.encode())
                os.close(descriptor)
            status = 0
        os._exit(status)
    os.close(inside)
    try:
        flags = CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
        called("unshare", flags)
    finally:
        os.write(outside, b".")
        os.close(outside)
        _, status = os.waitpid(writer, 0)
    if status != 0:
        raise OSError(0, "the user and group maps cannot be written")


def forbid_namespaces(proc: str) -> bool:
    """Whether it could be written that no user namespace may be made in this one; a container may have it read-only."""
    try:
        with open(f"{proc}/{NO_MORE_NAMESPACES}", "w") as file:
            file.write("0")
    except OSError:
        return False
    return True


def make_root(root: str, paths: list[str], size: int) -> bool:
    """A new root with these paths of the old one, read-only; whether no further user namespace may be made."""
    limited = forbid_namespaces("/proc")
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},nr_inodes=10000,mode=755")
    for path in paths:
        if os.path.islink(path):
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.symlink(os.readlink(path), root + path)
        else:
            bind(path, root + path, MS_RDONLY | MS_NOSUID | MS_NODEV)
    for path in DEVICES:
        bind(path, root + path, MS_NOSUID)
    os.mkdir(root + WORK, 0o777)
    os.chmod(root + WORK, 0o777)
    for name in ("/proc", "/old"):
        os.mkdir(root + name)
    with contextlib.suppress(OSError):  # a container may not allow it, and little needs it
        mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        limited = limited or forbid_namespaces(root + "/proc")  # this one is ours
    called("pivot_root", root.encode(), (root + "/old").encode())
    os.chdir("/")
    called("umount2", b"/old", MNT_DETACH)
    os.rmdir("/old")
    return limited


def bind(source: str, target: str, flags: int) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(source, target, None, MS_BIND | MS_REC)
    there = os.statvfs(target).f_flag
    kept = sum(flag for bit, flag in KEPT_FLAGS.items() if there & bit)
    mount("none", target, None, MS_BIND | MS_REMOUNT | flags | kept)


def give_up_rights() -> None:
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # those that this kernel doesn't have are refused
    if os.getuid() == 0:
        os.setresuid(NOBODY, NOBODY, NOBODY)
    called("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def refuse_calls() -> bool:
    """Have the kernel answer some calls with EPERM; whether their numbers are known for this kind of machine.

    Processes and threads can be made, in the namespaces that are there.
    """
    kind = os.uname().machine
    if kind not in MACHINES:
        return False
    column, machine = MACHINES[kind]
    numbers = [each[column] for each in REFUSED.values()]
    # classic BPF: an instruction, and how far to jump if (not)
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, unknown, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000
    program = [
        (load, 0, 0, 4),  # the kind of machine; 32-bit programs have other numbers
        (equal, 1, 0, machine),
        (answer, 0, 0, kill),
        (load, 0, 0, 0),  # the call's number
        (at_least, len(numbers) + 5, 0, 0x40000000),  # x86's x32, the same calls by other numbers
        *((equal, len(numbers) + 4 - i, 0, number) for i, number in enumerate(numbers)),
        (equal, 5, 0, CLONE3[column]),
        (equal, 0, 2, CLONE[column]),
        (load, 0, 0, 16),  # its flags: the lower half of the first argument
        (any_bit, 1, 0, NAMESPACES),
        (answer, 0, 0, allow),
        (answer, 0, 0, deny),
        (answer, 0, 0, unknown),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    whole = struct.pack("@HP", len(program), ctypes.addressof(code))
    called("prctl", PR_SET_SECCOMP, 2, ctypes.c_char_p(whole), 0, 0)
    return True


def limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    for name in ("RLIMIT_CORE", "RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE"):
        resource.setrlimit(getattr(resource, name), (0, 0))


def run_code(job: dict[str, Any], limited: bool) -> None:
    """Become the code's process; of the descriptors but the usual three, ``job["keep"]`` alone stays open.

    Args:
        limited: whether no further user namespace may be made.

    Raises:
        OSError: nothing keeps the code from one, in which it would have capabilities.
    """
    for name, text in job["files"].items():
        with open(f"{WORK}/{name}", "w", encoding="utf-8") as file:
            file.write(text)
    os.dup2(os.open(f"{WORK}/{job['stdin']}", os.O_RDONLY), 0)
    os.unlink(f"{WORK}/{job['stdin']}")
    os.chdir(WORK)
    give_up_rights()
    limit(job["limits"])
    if not refuse_calls() and not limited:
        raise OSError(
            0,
            f"further user namespaces cannot be forbidden: /proc/{NO_MORE_NAMESPACES} cannot be written, and which "
            f"calls of the system to refuse is not known for {os.uname().machine}",
        )
    os.execve(job["command"][0], job["command"], job["environment"])


def reason(error: BaseException) -> str:
    """What was wrong, in words, and with which file."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error) or type(error).__name__
    files = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return f"{error.strerror}: {' -> '.join(files)}" if files else error.strerror


def refusal(error: BaseException) -> dict[str, Any]:
    """What is told of an error before the code runs; whether it is a file that is not there, and no right."""
    return {"refused": reason(error), "missing": isinstance(error, FileNotFoundError)}


def tell(status: int, what: dict[str, Any]) -> None:
    os.write(status, json.dumps(what).encode() + b"\n")


def main() -> None:
    status, parent = int(sys.argv[1]), int(sys.argv[2])
    try:
        die_with_parent(parent)
        os.set_inheritable(status, False)
        job = json.loads(sys.stdin.buffer.read())
        enter_namespaces()
        alive, held = os.pipe()
        first = os.fork()
        if first != 0:
            os.waitpid(first, 0)
            return
        os.close(held)
        die_with_parent()
        if select.select([alive], [], [], 0)[0]:  # closed: the parent ended before that was said
            os._exit(1)
        limited = make_root(job["root"], job["paths"], job["size"])
        code = os.fork()
        if code == 0:
            try:
                run_code(job, limited)
            except BaseException as error:
                tell(status, refusal(error))
            os._exit(1)
        # The first process of a namespace takes all orphans; when it ends, the kernel kills whoever is left.
        while True:
            ended, how = os.wait()
            if ended == code:
                break
        tell(status, {"signal": os.WTERMSIG(how)} if os.WIFSIGNALED(how) else {"exit": os.WEXITSTATUS(how)})
        os._exit(0)
    except BaseException as error:
        tell(status, refusal(error))
        os._exit(1)


if __name__ == "__main__":
    main()
