"""Python programs that start at once: a server that has imported torch and the package forks a child for each.

`python()` is the path of a program that stands for sys.executable: `[python(), "-m", "nanochat_native.train", ...]`
runs in a child of the server, with the caller's arguments, environment, folder and standard streams. The program
itself waits for the child, passes signals on to it, and ends as the child ends; if the program is killed, so is the
child. What a child cannot have runs in a real interpreter, which then takes the program's place: other flags of Python,
a closed standard stream, further open files, and other variables of the environment that are read while a library is
loaded.

A child differs from a real process in these ways: it is not the process that the caller started (its number, its group,
its limits, SIGSTOP), the package's kernels use one thread (as in every forked child), the hashes of strings have one
seed in all children, modules are imported already, and they are not freed at the end. A test that depends on one of
them uses sys.executable.
"""

import contextlib
import marshal
import os
import select
import signal
import socket
import sys

# Prefixes of variables that are read before a program's first line, or when torch or the package is imported.
READ_AT_START = (
    *("PYTHON", "LC_", "LANG", "LD_", "MALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ATEN_", "ONEDNN_"),
    *("DNNL_", "TORCH", "PYTORCH", "CUDA", "NANOCHAT_CPU_ISA", "NANOCHAT_CUDA_ISA", "NANOCHAT_LINEAR"),
)
BACKEND = "NANOCHAT_NATIVE_BACKEND"
# The server must have one thread, and OpenBLAS would start more at its import.
OF_THE_SERVER = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1"}
# Not compared: what the server has for its own reasons, what a child sets itself, and what torchrun reads or sets.
NOT_COMPARED = (
    "OMP_WAIT_POLICY",
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTHON_EXEC",
    "TORCHELASTIC_",
    "TORCH_NCCL_",
)
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
REFUSED = 0  # instead of a child's number

_started = {}  # (program, server) by process and variables: a child that a test forks has neither


def python(**variables):
    """Return the path of the program, and start the server unless it runs.

    Args:
        variables: of the server's environment. Who starts the program must give it those of READ_AT_START too.
    """
    key = os.getpid(), *sorted(variables.items())
    if key not in _started:
        _started[key] = _start(variables)
    program, server = _started[key]
    assert server.poll() is None, "the fork server has ended"
    return program


def _start(variables):
    import subprocess
    import tempfile

    folder = tempfile.mkdtemp(prefix="f")
    program, address = os.path.join(folder, "python"), os.path.join(folder, "s")
    with open(program, "w") as file:
        file.write(f"#!/bin/sh\nexec '{sys.executable}' -IS '{__file__}' call '{address}' \"$@\"\n")
    os.chmod(program, 0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        # The server ends when its input does, which this process alone holds open.
        server = subprocess.Popen(
            [sys.executable, __file__, "serve", str(listener.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            env=os.environ | OF_THE_SERVER | variables,
            start_new_session=True,
        )
    return program, server


def _read_at_start(environment):
    """Return the variables that decide what a process is before its first line."""
    found = {
        name: value
        for name, value in environment.items()
        if value and name.startswith(READ_AT_START) and not name.startswith(NOT_COMPARED)
    }
    if environment.get(BACKEND, "native") not in ("native", "torch"):  # a child sets one of these itself
        found[BACKEND] = environment[BACKEND]
    return found


def _send_number(connection, number):
    connection.sendall(number.to_bytes(4, "little", signed=True))


def _receive(connection, length):
    parts = []
    while length:
        parts.append(connection.recv(length))
        length -= len(parts[-1])
        if not parts[-1]:
            raise OSError("the other side is gone")
    return b"".join(parts)


def _receive_number(connection):
    return int.from_bytes(_receive(connection, 4), "little", signed=True)


# --- the program ---


def _call(address, args):
    """Run Python with `args` in a child of the server, or in a real interpreter in place of this process."""
    unbuffered = args[:1] == ["-u"]
    command = args[unbuffered:]
    plain = bool(command) and (command[0] in ("-m", "-c") or not command[0].startswith("-"))
    only_standard_streams = set(os.listdir("/proc/self/fd")) == {"0", "1", "2", "3"}  # 3 is the listing itself
    child = REFUSED
    if plain and only_standard_streams:
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        server = socket.socket(socket.AF_UNIX)
        request = {"command": command, "unbuffered": unbuffered, "folder": os.getcwd(), "environment": dict(os.environ)}
        message = marshal.dumps(request)
        try:
            server.connect(address)
            socket.send_fds(server, [len(message).to_bytes(4, "little")], [0, 1, 2])
            server.sendall(message)
            child = _receive_number(server)
        except OSError:
            child = REFUSED
    if child == REFUSED:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        os.execv(sys.executable, [sys.executable, *args])

    arrived, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)  # a handler alone would not wake a process that is about to wait
    for number in PASSED_ON:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    while server not in select.select([server, arrived], [], [])[0]:
        for number in os.read(arrived, 64):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
    status = _receive_number(server)
    if status < 0:
        if -status in PASSED_ON:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


# --- the server ---


def _serve(listener, environment):
    """Fork for each caller until the input ends. Return in each child, with the request."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that wait for children
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _fork(connection, environment)
        connection.close()


def _fork(connection, environment):
    """Fork a child, in which this returns; wait for it, and tell the caller its number and then its status."""
    header, streams, _, _ = socket.recv_fds(connection, 4, 3)
    request = marshal.loads(_receive(connection, int.from_bytes(header, "little")))
    if _read_at_start(request["environment"]) != environment:
        _send_number(connection, REFUSED)
        os._exit(0)
    child = os.fork()
    if not child:
        connection.close()
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
            os.close(stream)
        return request
    for stream in streams:
        os.close(stream)
    _send_number(connection, child)
    end = os.pidfd_open(child)
    ready, _, _ = select.select([end, connection], [], [])
    if end not in ready:  # the caller was killed
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):
        _send_number(connection, os.waitstatus_to_exitcode(status))
    os._exit(0)


def _import_all():
    """Import torch and every module of the package that a child could import."""
    import gc
    import importlib
    import pkgutil

    import nanochat_native

    for name in ("torch.distributed.checkpoint", "torch.distributed.run"):
        importlib.import_module(name)
    for module in pkgutil.walk_packages(nanochat_native.__path__, "nanochat_native."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # of an optional package
                importlib.import_module(module.name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot fork"
    gc.collect()
    gc.freeze()  # or the first collection of every child would copy all pages


def _become(request):
    """Make this process what a new interpreter is before its first line."""
    import io
    import tempfile

    import numpy
    import torch

    from nanochat_native import ops
    from nanochat_native.runtime.hardware import usable_cores

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    numpy.random.seed()  # noqa: NPY002
    if (backend := os.environ.get(BACKEND) or "native") != ops.backend():
        ops.use_backend(backend)
    cores = usable_cores()
    torch.set_num_threads(min(int(os.environ.get("OMP_NUM_THREADS") or cores), cores))
    all_at_once = request["unbuffered"] or bool(os.environ.get("PYTHONUNBUFFERED"))
    for number, (name, mode) in enumerate((("stdin", "rb"), ("stdout", "wb"), ("stderr", "wb"))):
        old, unbuffered = getattr(sys, name), all_at_once and number > 0
        binary = open(number, mode, buffering=0 if unbuffered else -1, closefd=False)  # noqa: SIM115
        lines = not all_at_once and (number == 2 or os.isatty(number))
        text = io.TextIOWrapper(binary, old.encoding, old.errors, "\n", line_buffering=lines, write_through=unbuffered)
        getattr(binary, "raw", binary).name, text.mode = f"<{name}>", mode[0]
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)


def _run(kind, *args):
    """Run a module ("-m", name, ...), a text ("-c", text, ...) or a file (name, ...) as Python does."""
    import runpy
    import types

    if kind == "-m":
        name, *rest = args
        sys.argv, sys.path[0] = [name, *rest], os.getcwd()
        if not hasattr(sys.modules.get(name), "__path__"):
            sys.modules.pop(name, None)
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        text, *rest = args
        sys.argv, sys.path[0] = ["-c", *rest], ""
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(text, "<string>", "exec"), module.__dict__)
    else:
        sys.argv, sys.path[0] = [kind, *args], os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


def _end(function, *args):
    """Call a function and end this process as an interpreter ends after it, without the time to free its modules."""
    import atexit
    import threading

    try:
        function(*args)
        status = 0
    except SystemExit as stop:
        status = 0 if stop.code is None else stop.code
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException as error:
        shown = error.__traceback__
        while shown.tb_next and shown.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>"):
            shown = shown.tb_next
        sys.excepthook(type(error), error.with_traceback(shown), shown)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    role, place, *arguments = sys.argv[1:]
    if role == "call":
        _call(place, arguments)
    read_at_start = _read_at_start(os.environ)  # modules may add to it
    _import_all()
    request = _serve(socket.socket(fileno=int(place)), read_at_start)
    _become(request)
    _end(_run, *request["command"])
