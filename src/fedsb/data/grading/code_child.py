"""Runs one program that a model wrote, and its tests, in isolation. A separate script: it imports nothing of fedsb.

    python -I code_child.py      reads {"program", "tests", "folder", "seconds", "memory_bytes", "files_bytes",
                                 "namespaces"} on stdin, writes {"passed", "why", "ended", "isolation"} on stdout

This process is the supervisor. It sets up the isolation, forks a child, waits no longer than `seconds`, and reports the
result. Only the child runs the program. It passes by reaching the end of the tests and reporting so, with a random word
of this run, through a pipe. An exit code proves nothing, so neither exit() nor os._exit(0) passes.

Isolation, if the system supports it ("namespaces", Linux): a separate network without any interface; separate process
ids, so that everything ends with the first process; every file system read-only except for a small one in memory.
Otherwise ("hooks") Python refuses to write files outside the folder, which native code could bypass.
Always: Python refuses sockets, processes and calls into C libraries; the system limits memory, processor time, file
sizes, open files and processes (no process or thread can be started); there is no environment, input or output. A
superuser becomes nobody first.

Not prevented: reading what everyone may read, and a program that is written to deceive the tests that run with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import secrets
import select
import signal
import sys
import time

NOBODY = 65534
NEW_MOUNTS, NEW_IPC, NEW_USERS, NEW_PIDS, NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
PRIVATE, RECURSIVE, BIND, NO_SETUID, NO_DEVICES = 1 << 18, 1 << 14, 1 << 12, 2, 4
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1
DEATH_SIGNAL, NO_NEW_PRIVILEGES, CAPSET_V3 = 1, 38, 0x20080522
CAPSET = {"x86_64": 126, "aarch64": 91}
OPEN_FILES = 64


def isolate(folder: str, files_bytes: int) -> str:
    """Isolates the next fork. Returns "namespaces" if the system allows them, else "hooks"."""
    if not sys.platform.startswith("linux") or os.uname().machine not in CAPSET:
        return "hooks"
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    spaces = NEW_MOUNTS | NEW_IPC | NEW_PIDS | NEW_NETWORK | (NEW_USERS if user else 0)
    if libc.unshare(spaces) != 0:
        return "hooks"
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123
                file.write(text)
    _check(libc.mount(None, b"/", None, RECURSIVE | PRIVATE, None), "making mounts private")
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY, 0, 0, 0)
    _check(
        libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.sizeof(attributes)),
        "making file systems read-only",
    )
    options = f"size={files_bytes},mode=777".encode()
    _check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", NO_SETUID | NO_DEVICES, options), "mounting a tmpfs")
    if user == 0:
        show_python(libc, folder)
    return "namespaces"


def show_python(libc: ctypes.CDLL, folder: str) -> None:
    """Mounts Python's library in the folder and imports from there: nobody may be unable to read a superuser's own."""
    moved = {}
    for number, path in enumerate(filter(os.path.isdir, sys.path)):
        moved[path] = f"{folder}/.python/{number}"
        os.makedirs(moved[path])  # noqa: PTH103
        _check(libc.mount(os.fsencode(path), os.fsencode(moved[path]), None, BIND, None), "showing Python's library")

    def place(path: str) -> str:
        roots = [root for root in moved if path == root or path.startswith(root + os.sep)]
        root = max(roots, key=len, default=None)
        return path if root is None else moved[root] + path[len(root) :]

    sys.path[:] = map(place, sys.path)
    for module in list(sys.modules.values()):
        if isinstance(getattr(module, "__path__", None), list):
            module.__path__ = [place(path) for path in module.__path__]
    sys.path_importer_cache.clear()


def drop_privileges() -> None:
    """Drops the superuser and all capabilities for good."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None, use_errno=True)
        _check(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no_new_privs")
        _check(libc.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "the parent's death signal")
        if os.uname().machine in CAPSET:
            header, none = (ctypes.c_uint32 * 2)(CAPSET_V3, 0), (ctypes.c_uint32 * 6)()
            _check(libc.syscall(CAPSET[os.uname().machine], header, none), "giving up capabilities")


def set_limits(seconds: float, memory_bytes: int, files_bytes: int) -> None:
    """Sets the resource limits of this process."""
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: int(seconds) + 2,  # the supervisor's clock comes first
        resource.RLIMIT_FSIZE: files_bytes,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for what, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS does not support all of them
            resource.setrlimit(what, (value, value))


def install_hooks(folder: str, isolation: str) -> None:
    """Makes Python refuse processes, sockets and native calls, and without namespaces also files outside the folder.

    A separate network does not prevent sockets in the file system. A hook cannot be removed.
    """
    never = ("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "subprocess.", "pty.",
             "socket.", "ctypes.dlsym", "ctypes.call_function", "ctypes.cdata")  # fmt: skip
    files = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown",
             "os.truncate", "os.utime", "shutil.")  # fmt: skip
    refused = never if isolation == "namespaces" else (*never, *files)
    written = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(refused):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open" and isolation != "namespaces" and int(str(arguments[2])) & written:
            path = os.path.realpath(os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes)) else "/")
            if not path.startswith(os.path.realpath(folder) + os.sep):
                raise PermissionError(f"writing {path} is not allowed here")

    sys.addaudithook(hook)


def run_program(request: dict[str, object], isolation: str, pipe: int, word: str) -> None:
    """Runs program and tests in the child, and reports the result. Never returns."""
    folder, why = str(request["folder"]), None
    try:
        os.chdir(folder)
        drop_privileges()
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        set_limits(float(str(request["seconds"])), int(str(request["memory_bytes"])), int(str(request["files_bytes"])))
        install_hooks(folder, isolation)
        names: dict[str, object] = {"__name__": "solution"}
        exec(compile(str(request["program"]), "solution", "exec"), names)
        exec(compile(str(request["tests"]), "tests", "exec"), names)
    except BaseException as error:
        why = f"{type(error).__name__}: {str(error)[:200]}" if str(error) else type(error).__name__
    os.write(pipe, json.dumps([word, why]).encode()[:4000])
    os._exit(0)


def watch(child: int, pipe: int, word: str, seconds: float) -> dict[str, object]:
    """Returns the result of the child after at most `seconds`, and ends it with everything that it started."""
    until, received = time.monotonic() + seconds, b""
    while (left := until - time.monotonic()) > 0 and len(received) < 8000:
        if not select.select([pipe], [], [], left)[0]:
            break
        more = os.read(pipe, 4096)
        if not more:
            break
        received += more
    late = time.monotonic() >= until
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    try:
        said, why = json.loads(received)
    except (ValueError, TypeError):
        said, why = "", None
    if said == word:
        return {"passed": why is None, "why": why, "ended": True}
    if late:
        return {"passed": False, "why": f"took more than {seconds:g} s", "ended": False}
    how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit code {os.WEXITSTATUS(status)}"
    return {"passed": False, "why": f"ended before its tests had ({how})", "ended": False}


def _check(code: int, what: str) -> None:
    """Raises OSError if a system call failed."""
    if code != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    request, word = json.loads(sys.stdin.buffer.read()), secrets.token_hex(16)
    isolation = isolate(request["folder"], request["files_bytes"]) if request["namespaces"] else "hooks"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        run_program(request, isolation, write, word)
    os.close(write)
    found = watch(child, read, word, float(request["seconds"]))
    sys.stdout.write(json.dumps({**found, "isolation": isolation}))


if __name__ == "__main__":
    main()
