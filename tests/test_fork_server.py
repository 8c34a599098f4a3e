"""A program that the fork server starts is what a real interpreter would make of it."""

import os
import re
import signal
import subprocess
import sys

import pytest
from fork_server import python
from tiny_run import wait_until

PROGRAMS = {
    "ends": "print('words')",
    "a status": "import sys; sys.exit(3)",
    "a large status": "raise SystemExit(258)",
    "a message": "import sys; sys.exit('what is wrong')",
    "an error": "def f():\n    raise ValueError('what is wrong')\nf()",
    "Ctrl-C": "raise KeyboardInterrupt",
    "a signal": "import os; os.kill(os.getpid(), 9)",
    "no clean end": "import os; print('lost'); os._exit(4)",
    "functions at the end": "import atexit; atexit.register(print, 'last'); print('first')",
    "a thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
    "arguments": "import sys; print(sys.argv, sys.path[0], __name__)",
    "input": "import sys; print(input(), sys.stdin.read())",
    "streams": "import sys; s = sys.stdout; print(s.encoding, s.errors, s.line_buffering, s.isatty(), s.name, s.mode)",
    "errors": "import sys; s = sys.stderr; print(s.encoding, s.errors, s.line_buffering, s.isatty(), s.name, s.mode)",
    "a folder": "import os; print(os.getcwd(), os.environ['ADDED'], os.environ.get('HOME'))",
    "signals": "import signal; print([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)])",
    "signals that wait": "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))",
    "files": "import os; print(sorted(os.listdir('/proc/self/fd'))[:3], len(os.listdir('/proc/self/fd')))",
    "the modules": "import sys; print(sys.modules['__main__'].__dict__['__name__'], type(sys.modules['__main__']))",
}
FORKED = "import os, sys; print('torch' in sys.modules)"


def both(*args, **options):
    options = {"capture_output": True, "text": True, "input": "a line\nmore", "timeout": 120} | options
    return [subprocess.run([program, *args], **options) for program in (python(), sys.executable)]


@pytest.mark.parametrize("what", PROGRAMS)
def test_a_text(what, tmp_path):
    environment = os.environ | {"ADDED": "é"}
    forked, real = both("-c", PROGRAMS[what], "one", "-two", cwd=tmp_path, env=environment)
    assert (forked.returncode, forked.stdout, forked.stderr) == (real.returncode, real.stdout, real.stderr)


@pytest.mark.parametrize("as_module", [False, True])
def test_a_file_and_a_module(as_module, tmp_path):
    (tmp_path / "beside.py").write_text("")
    path = tmp_path / "program.py"
    path.write_text("import sys, beside; print(sys.argv, sys.path[0], __name__, __spec__ and __spec__.name); 1 / 0")
    forked, real = both(*(["-m", "program"] if as_module else [str(path)]), "an argument", cwd=tmp_path)
    assert (forked.returncode, forked.stdout) == (real.returncode, real.stdout)
    assert forked.stderr.splitlines()[-4:] == real.stderr.splitlines()[-4:]


def test_a_command_of_the_package():
    forked, real = both("-m", "nanochat_native.train", "--depht", "4")
    assert (forked.returncode, forked.stdout, forked.stderr) == (real.returncode, real.stdout, real.stderr)
    assert forked.returncode == 2


def is_forked(*flags, **environment):
    result = subprocess.run(
        [python(), *flags, "-c", FORKED], capture_output=True, text=True, env=os.environ | environment
    )
    return result.stdout == "True\n"


def test_what_a_child_cannot_have_runs_in_a_real_interpreter():
    assert is_forked()
    assert is_forked("-u", PYTHON_EXEC="python", OMP_NUM_THREADS="1", NANOCHAT_NATIVE_BACKEND="torch", HOME="/")
    assert not is_forked("-E")
    assert not is_forked(PYTHONHASHSEED="5")
    assert not is_forked(NANOCHAT_CPU_ISA="baseline")
    assert not is_forked(NANOCHAT_NATIVE_BACKEND="no such thing")
    closed = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", python(), "-c", FORKED], capture_output=True, text=True)
    assert closed.stdout == "False\n"


def test_choices_of_the_environment_are_taken():
    text = "import torch; from nanochat_native import ops; print(torch.get_num_threads(), ops.backend())"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NANOCHAT_NATIVE_BACKEND": "torch"}
    assert [run.stdout for run in both("-c", text, env=environment)] == ["1 torch\n"] * 2


WAITS = "import os, signal, sys; print(os.getpid(), flush=True); signal.pause()"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on(number):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("nohup ignores this signal, and children inherit that")
    with subprocess.Popen([python(), "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        assert re.search(r"State:\s+[SR]", open(f"/proc/{child}/status").read())  # noqa: SIM115

        def ended():  # Python forgets a signal that comes just before it waits
            process.send_signal(number)
            return process.poll() is not None

        wait_until(ended)
        assert process.returncode == -number


def test_a_child_ends_with_its_program():
    with subprocess.Popen([python(), "-c", WAITS], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.kill()
        assert process.stdout.read() == b""  # which ends when the child does
