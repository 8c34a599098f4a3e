"""The sandbox: programs of a model that misbehave do no harm and do not pass, with and without namespaces."""

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

from nanochat_native.evaluation import sandbox

WITH_NAMESPACES = sandbox.check() == ()
needs_namespaces = pytest.mark.skipif(not WITH_NAMESPACES, reason="the system allows no namespaces")


@pytest.fixture(
    params=[
        pytest.param("as it is"),
        pytest.param("user namespace", marks=needs_namespaces),
        pytest.param("no namespaces"),
    ]
)
def isolation(request, monkeypatch, tmp_path):
    """Run the test with the worker as it is, as for a user who is not root, and as where no namespaces are allowed."""
    removed = {
        "as it is": "(?!)",
        "user namespace": r'call\("unshare", kinds\)  # as root\n        return True',
        "no namespaces": r"make_namespaces\(\)\n",
    }[request.param]
    instead = {"user namespace": "pass", "no namespaces": "False\n"}.get(request.param, "")
    source, count = re.subn(removed, instead, sandbox.WORKER.read_text())
    assert count == (request.param != "as it is")
    worker = tmp_path / "worker.py"
    worker.write_text(source)
    monkeypatch.setattr(sandbox, "WORKER", worker)
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


def test_a_program_passes_if_it_runs_to_its_end(isolation):
    assert sandbox.run("import math\nassert math.sqrt(9) == 3").passed
    missing = sandbox.run("x = 1").missing
    if isolation == "no namespaces":
        assert missing == ("network", "processes", "files")
    elif WITH_NAMESPACES:
        assert missing == ()


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 3",
        "def f(:",
        "x = '\\0'\n\0",
        "raise SystemExit",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "while True: pass",
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(100)",
        "memory = []\nwhile True: memory.append(bytearray(1 << 20))",
        "with open('large', 'wb') as file:\n    while True: file.write(bytes(1 << 20))",
        "while True: print('0123456789' * 10)",
        "import sys\nwhile True: sys.stderr.write('0123456789' * 10)",
        "import os\nwhile True: os.fork()",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(100,)).start()",
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(-1, signal.SIGKILL)",
        "import os, signal\nos.killpg(0, signal.SIGKILL)",
        "import os\nassert [key for key in os.environ if key != 'LC_CTYPE']",
        "import ctypes\nctypes.string_at(0)",
    ],
)
def test_a_program_that_misbehaves_does_not_pass(program):
    begun = time.monotonic()
    outcome = sandbox.run(program, seconds=1)
    assert not outcome.passed
    assert time.monotonic() - begun < 60


def test_nothing_is_left_of_a_program(isolation, tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(folder))
    escapes = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n    os._exit(0)"
    for program in (escapes, escapes + "\ntime.sleep(1000)", "import os\nwhile True: os.fork()"):
        sandbox.run(program, seconds=0.5)
        assert left_behind(str(folder)) == []
        assert list(folder.iterdir()) == []


def test_a_program_cannot_end_what_started_it(isolation):
    program = "import os, signal\nfor pid in {os.getppid(), 1}:\n    try: os.kill(pid, signal.SIGKILL)\n    except OSError: pass"
    if isolation != "no namespaces" or os.getuid() == 0:
        found = sandbox.run(program + "\nimport time; time.sleep(1000)", seconds=0.5)
        assert not found.passed
    assert sandbox.run("x = 1").passed


@needs_namespaces
def test_a_program_has_no_network(isolation):
    if isolation == "no namespaces":
        pytest.skip("it has the network then")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"
        assert not sandbox.run(program).passed
        with pytest.raises(TimeoutError):
            server.accept()


@needs_namespaces
def test_a_program_sees_no_other_files(isolation, tmp_path):
    if isolation == "no namespaces":
        pytest.skip("it sees the files of all users then")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    os.chmod(secret, 0o644)
    home = Path.home()
    assert not sandbox.run(f"open({str(secret)!r}).read()").passed
    assert not sandbox.run("import os\nassert os.listdir('/home') or os.listdir('/etc/ssh')").passed
    beside = [path.name for path in home.iterdir()]
    program = f"import os\nassert not set({beside!r}) & set(os.listdir({str(home)!r})) - {{'.local', '.pyenv'}}"
    assert sandbox.run(f"import os\nif os.path.exists({str(home)!r}):\n    " + program.replace("\n", "\n    ")).passed
    for place in (os.__file__, "/usr/new", sys.base_prefix + "/new"):
        assert not sandbox.run(f"open({place!r}, 'a')").passed
    assert sandbox.run("open('own', 'w').write('x')\nassert open('own').read() == 'x'").passed


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become nobody")
def test_a_program_of_root_runs_as_nobody():
    assert sandbox.run("import os\nassert os.getuid() == os.geteuid() == os.getgid() == 65534\nassert not os.getgroups()").passed


def test_a_killed_worker_is_a_failed_program(monkeypatch, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr(sandbox, "WORKER", worker)
    assert sandbox.run("x = 1") == (False, ())
    with pytest.raises(OSError, match="the sandbox cannot run Python on this machine"):
        sandbox.check()


def test_a_worker_that_stalls_is_killed(monkeypatch, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.setattr(sandbox, "WORKER", worker)
    monkeypatch.setattr(sandbox, "CLEANUP_SECONDS", 0.1)
    assert sandbox.run("x = 1", seconds=0.1) == (False, ())
    wait_until(lambda: not left_behind(str(worker)))


def test_processes_end_with_the_one_that_started_them(tmp_path):
    """If the evaluation is killed, its programs end too."""
    mark = f"{tmp_path.name}-mark"
    code = (
        "import sys, tempfile; from nanochat_native.evaluation import sandbox\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "sandbox.run('import time; time.sleep(1000)', seconds=1000)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, mark], start_new_session=True)
    try:
        wait_until(lambda: len(left_behind(str(tmp_path))) >= 1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: not left_behind(str(tmp_path)), 30)
    finally:
        process.kill()
