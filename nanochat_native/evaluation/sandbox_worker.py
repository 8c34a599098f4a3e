"""Runs one program of a model in isolation. `sandbox.run` starts this file as a process of its own.

    python -I -S sandbox_worker.py FOLDER SECONDS < program

FOLDER is an empty folder for the program's files. The last line of the output is JSON: {"passed": whether the program
ran to its end, "missing": what could not be isolated}. The program passes only if its last statement was executed: a
program that calls exit has not passed.

This process makes the namespaces, forks the first process in them, waits for it, and kills whatever is left. The first
process forks the program and ends with it; in a PID namespace all processes of the program end then too. The file
depends on the standard library only, because it runs without site-packages.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import stat
import sys
import time

MEMORY = 256 << 20  # bytes of address space of each process, nanochat's limit
FILE_SIZE = 1 << 20  # bytes of each file, that of the output included
DISK = "size=16m,nr_inodes=1024,mode=755"  # of the file system that the program sees
PROCESSES, OPEN_FILES = 16, 64
NOBODY = 65534  # the user that the program runs as if this process is root's
NETWORK, PROCESS, FILES = "network", "processes", "files"

# Numbers of Linux, from its headers.
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 0x1
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
CAPABILITY_VERSION_3 = 0x20080522

LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: object) -> None:
    """Call a function of libc. Raises OSError if it fails, and AttributeError if the system does not have it."""
    if getattr(LIBC, name)(*args) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process, where the system has it."""
    with contextlib.suppress(OSError, AttributeError):
        call("prctl", option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def make_namespaces() -> bool:
    """Separate network, processes, files and messages of this process from the others; return whether it worked."""
    kinds = NEWNS | NEWIPC | NEWPID | NEWNET
    user, group = os.getuid(), os.getgid()
    with contextlib.suppress(OSError, AttributeError):
        call("unshare", kinds)  # as root
        return True
    try:
        call("unshare", kinds | NEWUSER)
        for name, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(content)
    except (OSError, AttributeError):
        return False
    return True


def visible_paths() -> list[str]:
    """Return the folders and files that Python needs, without those that are inside of another one."""
    system = ["/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache"]
    found: list[str] = []
    for path in [*system, sys.base_prefix, sys.base_exec_prefix, os.path.dirname(os.__file__)]:
        if os.path.exists(path) and not any(path == other or path.startswith(other + "/") for other in found):
            found.append(path)
    return found


def make_root(root: str) -> bool:
    """Mount at `root` a file system that shows Python, read-only, and the empty folder /work. Return success."""
    try:
        call("mount", b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
        call("mount", b"tmpfs", root.encode(), b"tmpfs", ctypes.c_ulong(MS_NOSUID | MS_NODEV), DISK.encode())
        for path in visible_paths():
            inside = root + path
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            if os.path.islink(path):
                os.symlink(os.readlink(path), inside)
                continue
            if os.path.isdir(path):
                os.mkdir(inside)
            else:
                open(inside, "x").close()
            call("mount", path.encode(), inside.encode(), None, ctypes.c_ulong(MS_BIND | MS_REC), None)
            attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY)
            size = ctypes.c_size_t(ctypes.sizeof(attributes))
            arguments = (ctypes.c_int(AT_FDCWD), inside.encode(), ctypes.c_uint(AT_RECURSIVE))
            call("syscall", ctypes.c_long(SYS_MOUNT_SETATTR), *arguments, attributes, size)
        os.mkdir(f"{root}/work")
        os.chmod(f"{root}/work", 0o777)
    except (OSError, AttributeError):
        return False
    return True


def readable_by_all(path: str) -> bool:
    """Return whether every user may read a file, as far as the folders above it allow."""
    while (above := os.path.dirname(path)) != path:
        if not os.stat(above).st_mode & stat.S_IXOTH:
            return False
        path = above
    return True


def drop_privileges(root: str | None) -> None:
    """Give up all privileges: as root become the user nobody, where it can read Python; drop all capabilities."""
    if os.getuid() == 0 and (root is not None or readable_by_all(os.__file__)):
        with contextlib.suppress(OSError):  # in a user namespace this user may not exist
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    with contextlib.suppress(OSError, AttributeError):
        call("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def set_limits(seconds: float) -> None:
    """Limit CPU time, memory, files and processes of this process and of its children."""
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_DATA: MEMORY,
        resource.RLIMIT_FSIZE: FILE_SIZE,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: PROCESSES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        with contextlib.suppress(OSError, ValueError):  # a limit that the system lacks, or that is lower already
            resource.setrlimit(kind, (most, most))


def run_program(program: str, root: str | None, folder: str, seconds: float, passed: int) -> None:
    """Become the program, and end with the exit code `passed` if it runs to its end, or else with another one."""
    code = 1
    try:
        os.setsid()
        if root is not None:
            os.chroot(root)
            folder = "/work"
        os.chdir(folder)
        os.closerange(3, 4096)
        drop_privileges(root)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of the user clears it
        set_limits(seconds)
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        code = passed
    finally:
        os._exit(code)


def run_first(program: str, root: str | None, folder: str, seconds: float, passed: int) -> None:
    """Fork the program, wait for it, and end with its exit code. In a PID namespace this is process 1."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    child = os.fork()
    if child == 0:
        run_program(program, root, folder, seconds, passed)
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 1)


def wait(child: int, seconds: float) -> int | None:
    """Return the exit code of a child, or None if it does not end in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def children() -> list[int]:
    """Return the children of this process, among them orphans of its descendants."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            parent = int(file.read().rpartition(b")")[2].split()[1])
            if parent == os.getpid():
                found.append(int(name))
    return found


def kill_all(seconds: float = 5.0) -> None:
    """Kill and reap all descendants. Their orphans become children of this process, and are killed in turn."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            for child in children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except OSError:  # there is no child left
            return
        time.sleep(0.001)


def main() -> None:
    """Run the program of standard input and print the outcome."""
    folder, seconds = sys.argv[1], float(sys.argv[2])
    program = sys.stdin.buffer.read().decode()
    os.umask(0o022)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    work, root, missing = f"{folder}/work", f"{folder}/root", list[str]()
    os.mkdir(work)
    os.chmod(work, 0o777)
    os.chmod(folder, 0o711)
    os.mkdir(root)
    separate = make_namespaces()
    rooted = root if separate and make_root(root) else None
    if not separate:
        missing += [NETWORK, PROCESS]
    if rooted is None:
        missing.append(FILES)
    report = os.dup(1)
    for stream, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        opened = os.open(f"{folder}/output" if stream else os.devnull, flags | os.O_CREAT, 0o600)
        os.dup2(opened, stream)
        os.close(opened)
    passed = 20 + os.urandom(1)[0] % 200  # the program cannot know this exit code
    first = os.fork()
    if first == 0:
        run_first(program, rooted, work, seconds, passed)
    code = wait(first, seconds)
    kill_all()
    os.write(report, json.dumps({"passed": code == passed, "missing": missing}).encode())


if __name__ == "__main__":
    main()
