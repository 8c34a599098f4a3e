"""The sandbox: programs of a model that misbehave do no harm and do not pass, with and without namespaces.

No program here starts more than three processes, if the sandbox lets it, and these end at once.
"""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import wait_until

from nanochat_native.evaluation import sandbox, sandbox_worker


def sees_files():
    """Whether programs see the files of the user here, or None if there is no sandbox."""
    try:
        return sandbox.check()
    except OSError:
        return None


SEES_FILES = sees_files()
pytestmark = pytest.mark.skipif(SEES_FILES is None, reason="the system allows no sandbox")
needs_namespaces = pytest.mark.skipif(bool(SEES_FILES), reason="the system allows no namespaces")


def edit_worker(monkeypatch, tmp_path, old, new):
    """Run programs with a worker in which `old` is `new`."""
    source = sandbox.WORKER.read_text()
    assert source.count(old) == 1
    worker = tmp_path / "worker.py"
    worker.write_text(source.replace(old, new))
    monkeypatch.setattr(sandbox, "WORKER", worker)


@pytest.fixture(
    params=[
        pytest.param("as it is"),
        pytest.param("user namespace", marks=needs_namespaces),
        pytest.param("no namespaces"),
    ]
)
def isolation(request, monkeypatch, tmp_path):
    """Run the test with the worker as it is, as for a user who is not root, and as where no namespaces are allowed."""
    if request.param == "user namespace":
        edit_worker(monkeypatch, tmp_path, 'call("unshare", kinds)  # as root\n        return True', "pass")
    elif request.param == "no namespaces":
        edit_worker(monkeypatch, tmp_path, "rooted = make_namespaces() and make_root(root)", "rooted = False")
    return request.param


def left_behind(mark):
    """Return the processes whose command line or folder has the mark, other than zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (path / "cmdline").read_text() or mark in os.readlink(path / "cwd"):
                found.append(path.name)
        except OSError:
            continue
    return found


def refused(*statements, kind="OSError"):
    """Return a program that passes if each of the statements raises an error."""
    lines = ["import os"]
    for statement in statements:
        lines += ["try:", f"    {statement}", f"except {kind}:", "    pass", "else:", "    raise SystemExit"]
    return "\n".join(lines)


# --- what passes ---


@pytest.mark.parametrize(
    "program",
    [
        "import math\nassert math.sqrt(9) == 3",
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\nassert A(1) == A(1)",
        "import threading\nl = []\nt = threading.Thread(target=l.append, args=(1,))\nt.start()\nt.join()\nassert l",
        "for _ in range(20): print('x' * (1 << 20))",
        "import sys\nassert sys.stdin.read() == ''\nsys.stdout.close()\nsys.stderr.close()",
        "import os\nos.write = os._exit = os.read = None",
        "import random, time, tempfile, os\ntime.sleep(0.01)\nrandom.random()\nassert os.urandom(4)",
        "try:\n    bytearray(1 << 40)\nexcept MemoryError:\n    pass",
        "assert __name__ == '__main__'",
    ],
)
def test_a_program_passes_if_it_runs_to_its_end(program, isolation):
    outcome = sandbox.run(program)
    assert outcome == (True, False, SEES_FILES or isolation == "no namespaces")


def test_the_trial_passes(isolation):
    assert sandbox.check() == (SEES_FILES or isolation == "no namespaces")


# --- what does not pass ---


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 3",
        "def f(:",
        "x = '\\0'\n\0",
        "'\ud800'.x",
        "import numpy",
        "memory = []\nwhile True: memory.append(bytearray(1 << 20))",
        "import ctypes\nctypes.string_at(0)",
        "def f(): f()\nf()",
        "with open('large', 'wb') as file:\n    while True: file.write(bytes(1 << 16))",
    ],
)
def test_a_program_that_fails_does_not_pass(program):
    assert sandbox.run(program, seconds=20)[:2] == (False, False)


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "import sys\nsys.exit(1)",
        "import os\nos._exit(0)",
        "import atexit, os\natexit.register(os._exit, 0)\nraise ValueError",
        "import threading, os, time\nthreading.Thread(target=os._exit, args=(0,)).start()\ntime.sleep(9)",
        # Every file gets what looks like a success, what the other files hold, or what the frames above hold.
        "import os\nfor file in range(64):\n    try: os.write(file, b'passed')\n    except OSError: pass\nos._exit(0)",
        "import os\nfor a in range(3, 64):\n    try: held = os.read(a, 99)\n    except OSError: continue\n"
        "    for b in range(3, 64):\n        try: os.write(b, held)\n        except OSError: pass\nos._exit(0)",
        "import os, sys\nabove = sys._getframe(1).f_locals\nfor value in above.values():\n"
        "    os.write(above['told'], str(value).encode())\nos._exit(0)",
        "import os, sys\nfor _ in range(99): os.write(sys._getframe(1).f_locals['told'], bytes(999))\nos._exit(0)",
        "import builtins, hashlib\nbuiltins.exec = builtins.compile = hashlib.sha256 = None\nraise ValueError",
    ],
)
def test_a_program_that_ends_early_or_claims_success_does_not_pass(program):
    assert sandbox.run(program, seconds=20)[:2] == (False, False)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import signal, time\nfor i in {*range(1, 32)} - {9, 19}: signal.signal(i, signal.SIG_IGN)\ntime.sleep(100)",
        "while True: print('0123456789' * 100)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(100,)).start()\ntime.sleep(100)",
    ],
)
def test_a_program_is_killed_in_time(program, isolation):
    begun = time.monotonic()
    assert sandbox.run(program, seconds=0.3)[:2] == (False, True)
    assert time.monotonic() - begun < 60


def test_the_threads_of_a_program_are_limited():
    program = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()"
    assert not sandbox.run(program, seconds=20).passed


# --- what a program cannot do ---


def test_a_program_starts_no_process(isolation):
    program = refused(
        "os.fork() or os._exit(0)", "os.posix_spawn('/bin/true', ['true'], {})", "os.execv('/bin/true', ['true'])"
    )
    assert sandbox.run(program).passed
    program = "import ctypes, os\nchild = ctypes.CDLL(None).fork()\nif child == 0: os._exit(0)\nassert child == -1"
    assert sandbox.run(program).passed
    program = refused("subprocess.run(['true'])").replace("import os", "import subprocess", 1)
    assert sandbox.run(program).passed


def test_a_program_sends_no_signal(isolation):
    signals = ("os.kill(os.getppid(), 0)", "os.kill(os.getpid(), 0)", "os.kill(-1, 0)", "os.killpg(0, 0)")
    assert sandbox.run(
        refused(*signals, "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())").replace("os", "os, fcntl", 1)
    ).passed


def test_a_program_has_no_network(isolation):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        tries = ("socket.socket()", "socket.socketpair()", "socket.socket(socket.AF_UNIX)")
        connection = f"socket.create_connection(('127.0.0.1', {port}), 1)"
        assert sandbox.run(refused(*tries, connection).replace("os", "os, socket", 1)).passed
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_program_has_no_environment(isolation, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    program = "import os\nassert not [key for key in os.environ if key != 'LC_CTYPE'], os.environ\n"
    program += "try: own = open('/proc/self/environ').read()\nexcept OSError: own = ''\nassert 'secret' not in own"
    assert sandbox.run(program).passed


def test_a_program_writes_nowhere_else(isolation, tmp_path):
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    for folder in (open_folder, *tmp_path.parents):
        if folder.owner() == open_folder.owner():
            os.chmod(folder, 0o777)
    old = open_folder / "old"
    old.write_text("old")
    os.chmod(old, 0o666)
    changes = [f"open({str(old)!r}, {mode!r})" for mode in ("w", "a", "r+")]
    changes += [f"os.{name}({str(old)!r})" for name in ("remove", "truncate")]
    changes += [f"os.mkdir({str(open_folder / 'new')!r})", f"os.rename({str(old)!r}, {str(open_folder / 'new')!r})"]
    changes += [f"open({place!r}, 'a')" for place in (os.__file__, "/usr/new", f"{sys.base_prefix}/new")]
    assert sandbox.run(refused(*changes, kind="(OSError, TypeError)")).passed
    assert [path.name for path in open_folder.iterdir()] == ["old"]
    assert old.read_text() == "old"


def test_a_program_sees_no_other_files(isolation, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    os.chmod(secret, 0o644)
    if SEES_FILES or isolation == "no namespaces":
        assert sandbox.run(refused("open('new', 'w')")).passed
        return
    places = (f"open({str(secret)!r})", "os.listdir('/proc')", "os.listdir('/tmp')", "os.listdir('/etc/ssh')")
    assert sandbox.run(refused(*places)).passed
    program = "import os\nopen('own', 'w').write('x')\nassert open('own').read() == 'x'\nassert os.listdir() == ['own']"
    assert sandbox.run(program).passed


@needs_namespaces
def test_the_files_of_a_program_have_limits():
    program = "import errno\ntry:\n    with open('large', 'wb') as file: file.write(bytes((1 << 20) + 1))\n"
    assert sandbox.run(
        program + "except OSError as error: assert error.errno == errno.EFBIG\nelse: raise SystemExit"
    ).passed
    program = "import errno\ntry:\n    for i in range(40): open(str(i), 'wb', 0).write(bytes(1 << 20))\n"
    assert sandbox.run(
        program + "except OSError as error: assert error.errno == errno.ENOSPC and i < 17\nelse: raise SystemExit"
    ).passed
    program = refused("[open('/usr/bin/env') for _ in range(100)]")
    assert sandbox.run(program).passed


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become nobody")
def test_a_program_of_root_runs_as_nobody():
    program = "import os\nassert os.getuid() == os.geteuid() == os.getgid() == 65534\nassert not os.getgroups()"
    assert sandbox.run(program).passed
    assert sandbox.run(refused("os.setuid(0)", "os.setgroups([0])", "os.chroot('/')", "os.nice(-1)")).passed


# --- what is left, and what is refused ---


def test_nothing_is_left_of_a_program(isolation, tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(folder))
    for program in ("x = 1", "open('own', 'w').write('x')", "import time\ntime.sleep(100)"):
        sandbox.run(program, seconds=0.3)
        assert left_behind(str(folder)) == []
        assert list(folder.iterdir()) == []


def test_a_killed_evaluation_ends_its_program(tmp_path):
    code = (
        f"import sys, tempfile; sys.path.insert(0, {str(sandbox.WORKER.parent)!r}); import sandbox\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "sandbox.run('import time; time.sleep(1000)', seconds=1000)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        wait_until(lambda: len(left_behind(f"{tmp_path}/nanochat-program-")) == 1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: not left_behind(f"{tmp_path}/nanochat-program-"))
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22", "A, B, C = 1, 9999", "."),
        ('sys.platform != "linux"', "True", "the sandbox needs Linux, got Linux"),
        ("machine = platform.machine()", "machine = 'riscv64'", "Linux on x86_64 or aarch64, got riscv64"),
        ("os.getppid() != parent", "True", "the process that waits has ended"),
    ],
)
def test_a_program_does_not_run_without_isolation(old, new, message, monkeypatch, tmp_path):
    new = new.replace("A, B, C", "PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER")
    edit_worker(monkeypatch, tmp_path, old, new)
    with pytest.raises(OSError, match=re.escape("cannot isolate a program on this system: ") + f".*{message}"):
        sandbox.run("import os\nos._exit(0)")
    with pytest.raises(OSError, match="cannot isolate"):
        sandbox.check()


def test_a_worker_that_does_not_start_is_an_error(monkeypatch, tmp_path):
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(sandbox, "WORKER", worker)
    worker.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(OSError, match="the process of the sandbox was killed"):
        sandbox.run("x = 1")
    worker.write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.setattr(sandbox, "START_SECONDS", 0.1)
    with pytest.raises(OSError, match="did not start in time"):
        sandbox.run("x = 1")
    assert left_behind(str(worker)) == []


def test_python_that_does_not_find_its_library_is_an_error(monkeypatch):
    monkeypatch.setattr(sandbox, "TRIAL", "import no_such_module")
    with pytest.raises(OSError, match="cannot run Python"):
        sandbox.check()


# --- the filter, as the kernel reads it ---


def decide(instructions, convention, number, arguments=(0,) * 6):
    """Return what a filter of classic BPF returns for a system call."""
    data = {sandbox_worker._NUMBER_AT: number, sandbox_worker._MACHINE_AT: convention}
    data |= {16 + 8 * i: argument & 0xFFFFFFFF for i, argument in enumerate(arguments)}
    at = held = 0
    while True:
        code, if_true, if_false, constant = instructions[at]
        at += 1
        if code == sandbox_worker.LOAD:
            held = data[constant]
        elif code == sandbox_worker.AND:
            held &= constant
        elif code == sandbox_worker.IF_EQUAL:
            at += if_true if held == constant else if_false
        else:
            assert code == sandbox_worker.RETURN
            return constant


ALLOWED = sandbox_worker.ALLOWED
NOT_THERE, DENIED = (sandbox_worker.REFUSED | code for code in (errno.ENOSYS, errno.EPERM))
THREAD_FLAGS = 0x3D0F00  # of glibc
O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_CLOEXEC = 0o1, 0o2, 0o100, 0o1000, 0o2000000


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("may_write", [True, False])
def test_the_filter_decides_by_call_and_arguments(machine, may_write):
    instructions = sandbox_worker.filter_of(machine, may_write)
    assert len(instructions) < 4096
    assert all(skip < 256 for one in instructions for skip in one[1:3])
    x86 = machine == "x86_64"
    convention = 0xC000003E if x86 else 0xC00000B7

    def of(numbers, *arguments):
        return decide(instructions, convention, numbers[0 if x86 else 1], (*arguments, 0, 0, 0, 0, 0, 0)[:6])

    for numbers in ((0, 63), (231, 94), (9, 222), (318, 278)):  # read, exit_group, mmap, getrandom
        assert of(numbers) == ALLOWED
    # clone3, socket, connect, execve, execveat, kill, tkill, tgkill, ptrace, mount, unshare, setns, chroot, prctl, bpf,
    # io_uring_setup, openat2, process_vm_readv, pidfd_open, setuid, setsid, keyctl, shmget
    forbidden = (
        *((435, 435), (41, 198), (42, 203), (59, 221), (322, 281), (62, 129), (200, 130), (234, 131), (101, 117)),
        *((165, 40), (272, 97), (308, 268), (161, 51), (157, 167), (321, 280), (425, 425), (437, 437), (310, 270)),
        *((434, 434), (105, 146), (112, 157), (250, 219), (29, 194)),
    )
    for numbers in forbidden:
        assert of(numbers) == NOT_THERE
    for number in range(470, 1024):
        assert of((number, number)) == NOT_THERE
        assert of((number | 0x40000000, number)) == NOT_THERE  # x32
    clone = (56, 220)
    assert of(clone, THREAD_FLAGS) == ALLOWED
    assert (
        of(clone, signal.SIGCHLD) == of(clone, 0x4100 | signal.SIGCHLD) == of(clone, THREAD_FLAGS - 0x10000) == DENIED
    )
    openat, mkdirat, unlinkat = (257, 56), (258, 34), (263, 35)
    assert of(openat, -100, 0, O_CLOEXEC) == ALLOWED
    for flags in (O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_RDWR | O_CREAT | O_CLOEXEC):
        assert of(openat, -100, 0, flags) == (ALLOWED if may_write else DENIED)
    for numbers in (mkdirat, unlinkat):
        assert of(numbers) == (ALLOWED if may_write else NOT_THERE)
    prlimit, ioctl, fcntl = (302, 261), (16, 29), (72, 25)
    assert (of(prlimit, 0), of(prlimit, 1)) == (ALLOWED, DENIED)
    assert (of(ioctl, 0, 0x5401), of(ioctl, 0, 0x5412)) == (ALLOWED, DENIED)  # TCGETS, TIOCSTI
    assert (of(fcntl, 0, 3), of(fcntl, 0, 8), of(fcntl, 0, 10)) == (
        ALLOWED,
        DENIED,
        DENIED,
    )  # F_GETFL, F_SETOWN, F_SETSIG
    if x86:
        assert of((57, 0)) == of((58, 0)) == of((85, 0)) == NOT_THERE  # fork, vfork, creat
        assert of((2, 0), 0, O_WRONLY) == (ALLOWED if may_write else DENIED)
    for other in (0x40000003, 0xC00000B7 if x86 else 0xC000003E):
        assert decide(instructions, other, 0) == sandbox_worker.KILLED


@pytest.mark.parametrize(
    ("column", "path", "pattern"),
    [
        (1, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", r"#define __NR_(\w+) (\d+)"),
        (2, "/usr/include/asm-generic/unistd.h", r"#define __NR(?:3264)?_(\w+)\s+(\d+)"),
    ],
)
def test_the_numbers_are_those_of_the_headers(column, path, pattern):
    if not Path(path).exists():
        pytest.skip(f"no {path}")
    numbers = dict(re.findall(pattern, Path(path).read_text()))
    numbers["newfstatat"] = numbers.get("newfstatat", numbers.get("fstatat"))
    conditions = ",".join(one.call for one in sandbox_worker.CONDITIONS + sandbox_worker.CONDITIONS_TO_READ)
    calls = f"{sandbox_worker.CALLS},{sandbox_worker.CALLS_TO_WRITE},{conditions}".split(",")
    assert len(calls) > 100
    for call in calls:
        assert call.split()[column] == numbers.get(call.split()[0], "-"), call
