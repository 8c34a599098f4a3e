"""Runs one program of a model in isolation. `sandbox.run` starts this file as a process of its own.

    python -I -S sandbox_worker.py FOLDER SECONDS PARENT

FOLDER holds the file `program`, and PARENT is the number of the process that waits. This process isolates itself,
prints a line of JSON, {"sees_files": ...} or {"error": ...}, and executes the program. If the last statement of the
program was executed, it prints the SHA-256 of what the standard input holds, in hexadecimal digits. It has not read
these bytes before, so a program that writes to all open files does not pass by it.

The file depends on the standard library only, because it runs without site-packages.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import platform
import resource
import signal
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

MEMORY = 256 << 20  # bytes of address space, nanochat's limit
FILE_SIZE = 1 << 20  # bytes of each file
DISK = "size=16m,nr_inodes=1024,mode=755"  # of the file system that the program sees
OPEN_FILES, THREADS = 64, 256
NOBODY = 65534  # the user that the program runs as if this process is root's

# Numbers of Linux, from its headers.
NEWNS, NEWUSER, NEWNET = 0x20000, 0x10000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 0x1
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
CAPABILITY_VERSION_3 = 0x20080522

LIBC = ctypes.CDLL(None, use_errno=True)


# --- the filter of system calls ---

# Of each machine: the number of its calling convention in the kernel, and its column in CALLS.
MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}

# Name, number on x86-64, and number on aarch64, of the calls that a program may make.
CALLS = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, lseek 8 62, close 3 57, dup 32 23,
dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, stat 4 -,
lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48, faccessat2 439 439,
readlink 89 -, readlinkat 267 78, getcwd 79 17, chdir 80 49, fchdir 81 50, getdents64 217 61, statfs 137 43,
fstatfs 138 44, ftruncate 77 46, fsync 74 82, fdatasync 75 83, fadvise64 221 223, flock 73 32, umask 95 166,
mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233, brk 12 214, futex 202 98,
sched_yield 24 124, set_robust_list 273 99, rseq 334 293, sched_getaffinity 204 123, rt_sigaction 13 134,
rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133,
sigaltstack 131 132, restart_syscall 219 128, pause 34 -, alarm 37 -, setitimer 38 103, getitimer 36 102,
clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101, gettimeofday 96 169,
time 201 -, times 100 153, getrusage 98 165, getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174,
geteuid 107 175, getgid 104 176, getegid 108 177, getgroups 115 158, getresuid 118 148, getresgid 120 150,
getpgrp 111 -, getpgid 121 155, getsid 124 156, getrlimit 97 163, uname 63 160, sysinfo 99 179, getcpu 309 168,
getrandom 318 278, exit 60 93, exit_group 231 94
"""
# Further ones, if the program has a file system of its own.
CALLS_TO_WRITE = """
open 2 -, openat 257 56, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -,
renameat 264 38, renameat2 316 276
"""


class Condition(NamedTuple):
    """A call that is allowed if argument & mask is one of the values."""

    call: str
    argument: int
    mask: int
    values: tuple[int, ...]


ALL = 0xFFFFFFFF
THREAD = 0x10900  # CLONE_THREAD, CLONE_SIGHAND and CLONE_VM
CONDITIONS = (
    Condition("clone 56 220", 0, THREAD, (THREAD,)),  # a thread, no process
    Condition("prlimit64 302 261", 0, ALL, (0,)),  # limits of this process
    Condition("ioctl 16 29", 1, ALL, (0x5401, 0x5451)),  # TCGETS and FIOCLEX, which Python uses for files
    # Duplicates, flags and locks. F_SETOWN, which makes the kernel send signals to others, is not among them.
    Condition("fcntl 72 25", 1, ALL, (0, 1, 2, 3, 4, 5, 6, 7, 1030)),
)
# Instead of CALLS_TO_WRITE, if the program sees the files of the user: not to write, create or truncate.
TO_READ = 0o3 | 0o100 | 0o1000
CONDITIONS_TO_READ = (
    Condition("open 2 -", 1, TO_READ, (0,)),
    Condition("openat 257 56", 2, TO_READ, (0,)),
)

# Instructions of classic BPF, and what a filter returns.
LOAD, AND, IF_EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
ALLOWED, KILLED, REFUSED = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _MACHINE_AT, _ARGUMENTS_AT = 0, 4, 16  # in the data that a filter sees

Instruction = tuple[int, int, int, int]  # code, instructions to skip if true, if false, constant


def filter_of(machine: str, may_write: bool) -> list[Instruction]:
    """Return the filter of system calls for a machine. What it does not allow fails as if the kernel did not have it.

    clone3 and others fail in this way, so that the C library uses older calls, whose arguments a filter can see.

    Raises ValueError for an unknown machine.
    """
    if machine not in MACHINES:
        raise ValueError(f"the sandbox needs Linux on {' or '.join(MACHINES)}, got {machine}")
    convention, column = MACHINES[machine]

    def number(call: str) -> int | None:
        found = call.split()[column]
        return None if found == "-" else int(found)

    unknown = (RETURN, 0, 0, REFUSED | errno.ENOSYS)
    made = [(LOAD, 0, 0, _MACHINE_AT), (IF_EQUAL, 1, 0, convention), (RETURN, 0, 0, KILLED), (LOAD, 0, 0, _NUMBER_AT)]
    for call in (CALLS + "," + CALLS_TO_WRITE if may_write else CALLS).split(","):
        if (one := number(call)) is not None:
            made += [(IF_EQUAL, 0, 1, one), (RETURN, 0, 0, ALLOWED)]
    for condition in CONDITIONS if may_write else CONDITIONS + CONDITIONS_TO_READ:
        if (one := number(condition.call)) is not None:
            block = [(LOAD, 0, 0, _ARGUMENTS_AT + 8 * condition.argument), (AND, 0, 0, condition.mask)]
            for value in condition.values:
                block += [(IF_EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOWED)]
            block.append((RETURN, 0, 0, REFUSED | errno.EPERM))
            made += [(IF_EQUAL, 0, len(block), one), *block]
    return [*made, unknown]


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def install_filter(instructions: Sequence[Instruction]) -> None:
    """Filter the system calls of this process from now on. Raises OSError if the kernel does not allow it."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    made = _Filter(len(instructions), packed)
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(made))


# --- files, user and limits ---


def call(name: str, *args: object) -> None:
    """Call a function of libc. Raises OSError if it fails, and AttributeError if the system does not have it."""
    if getattr(LIBC, name)(*args) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def prctl(option: int, *values: int) -> None:
    """Set an attribute of this process. Raises as `call` does."""
    call("prctl", option, *map(ctypes.c_ulong, (*values, 0, 0, 0, 0)[:4]))


def make_namespaces() -> bool:
    """Separate the network and the mounts of this process from those of others; return whether it worked."""
    kinds = NEWNS | NEWNET
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


def visible_paths() -> Iterator[str]:
    """Yield the folders and files that Python needs, without those that are inside of another one."""
    found: list[str] = []
    system = ["/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache"]
    for path in [*system, sys.base_prefix, sys.base_exec_prefix, os.path.dirname(os.__file__)]:
        if os.path.exists(path) and not any(path == other or path.startswith(other + "/") for other in found):
            found.append(path)
            yield path


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
    """Return whether every user may go through the folders above a path."""
    while (above := os.path.dirname(path)) != path:
        if not os.stat(above).st_mode & stat.S_IXOTH:
            return False
        path = above
    return True


def drop_privileges(rooted: bool) -> None:
    """Give up all privileges: as root become the user nobody, if it can read Python; drop all capabilities.

    Raises OSError and AttributeError.
    """
    if os.getuid() == 0 and (rooted or readable_by_all(os.__file__)):
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EPERM):  # a user namespace may have no other user than root
                raise
    call("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())


def set_limits(seconds: float) -> None:
    """Limit CPU time, memory, files and threads of this process."""
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_STACK: MEMORY,
        resource.RLIMIT_FSIZE: FILE_SIZE,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: THREADS,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (allowed, allowed))


def isolate(folder: str, seconds: float, parent: int) -> bool:
    """Isolate this process; return whether it still sees the files of the user, and then can write none.

    Raises OSError and AttributeError if the kernel does not allow it, and ValueError for an unknown machine.
    """
    if sys.platform != "linux":
        raise ValueError(f"the sandbox needs Linux, got {platform.system()}")
    machine = platform.machine()
    filter_of(machine, True)
    root = f"{folder}/root"
    os.umask(0o022)
    os.mkdir(root)
    os.chmod(folder, 0o711)
    rooted = make_namespaces() and make_root(root)
    if rooted:
        os.chroot(root)
    os.chdir("/work" if rooted else "/")
    drop_privileges(rooted)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of the user, which clears it
    if os.getppid() != parent:
        raise OSError("the process that waits has ended")
    set_limits(seconds)
    install_filter(filter_of(machine, rooted))
    return not rooted


def main() -> None:
    """Isolate this process, run the program, and answer if it ran to its end."""
    folder, seconds, parent = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    # The program may replace what these names stand for.
    read, write, leave, sha256 = os.read, os.write, os._exit, hashlib.sha256
    with open(f"{folder}/program", "rb") as file:
        program = file.read().decode()
    asked, told = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    try:
        found: dict[str, object] = {"sees_files": isolate(folder, seconds, parent)}
    except (OSError, AttributeError, ValueError) as error:
        found = {"error": str(error)}
    write(told, json.dumps(found).encode() + b"\n")
    try:
        if "error" not in found:
            exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
            write(told, sha256(read(asked, 32)).hexdigest().encode())
    finally:
        leave(0)


if __name__ == "__main__":
    main()
