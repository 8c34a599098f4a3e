"""Builds files of kernels for the host (plain, or with a sanitizer), as PTX, or for a GPU, and calls their entries."""

import contextlib
import ctypes
import functools
import os
import re
import select
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import toolchain
import torch
from compiled import compiled, version

ROOT = Path(__file__).resolve().parents[2]
CORE = ("scheduler", "memory", "tensor_cores")
SHARED_LIMIT = 227 * 1024  # bytes of shared memory that a GPU of compute capability 9.0 gives to a block
EXECUTOR = ("runtime", "module", "decode", "lanes", "memory", "tensor_cores", "scheduler", "costs")  # of PTX

CXX = os.environ.get("CXX", "g++").split()
# The core tells the sanitizers what the kernels do and is not watched itself. Loops must not become calls of memcpy,
# which ThreadSanitizer intercepts.
CORE_FLAGS = ["-std=c++20", "-O2", "-g", "-fPIC", "-fno-strict-aliasing", "-fno-tree-loop-distribute-patterns"]
KERNEL_FLAGS = [
    *("-std=c++20", "-fPIC", "-fno-strict-aliasing", "-fvisibility=hidden"),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"),
]
SANITIZERS = {
    "plain": ["-O1"],
    "thread": ["-O1", "-g", "-fsanitize=thread", "-ftrivial-auto-var-init=pattern"],
    # Unrolled loops full of checks take an optimiser longer to compile than they then take to run.
    "address": [
        *("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ftrivial-auto-var-init=pattern"),
    ],
}
HANGS = 300  # seconds after which a call is ended
SANITIZER_OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66 report_signal_unsafe=0 atexit_sleep_ms=0",
    "ASAN_OPTIONS": "detect_leaks=0 exitcode=66 detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "halt_on_error=1 exitcode=66 print_stacktrace=1",
}

# For ptx/: the registers of a warp are vectors.
EXECUTOR_FLAGS = [
    *("-std=c++20", "-O3", "-g", "-fPIC", "-march=x86-64-v3", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
]

Value = torch.Tensor | Sequence[torch.Tensor] | int | float


def span_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes from the first to the last element, with what lies between where it is not contiguous."""
    places = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in places)
    return tensor.element_size() * (1 + last) if tensor.numel() else 0


class KernelError(Exception):
    """The message of a launch that failed, from the emulation or the sanitizer."""


def message(kernels, entry, *values, **options):
    """Return the message of a launch, which must fail."""
    try:
        kernels.call(entry, *values, **options)
    except KernelError as error:
        return str(error)
    raise AssertionError(f"{entry} did not fail")


def write_kernels(folder, name, text):
    """Write a source beside what it includes, as in tests/emulation/kernels, and return its path."""
    source = folder / "tests/emulation/kernels" / name
    source.parent.mkdir(parents=True)
    (folder / "csrc").symlink_to(ROOT / "csrc")
    (folder / "tests/emulation/entry.h").symlink_to(ROOT / "tests/emulation/entry.h")
    source.write_text(text)
    return source


class Argument(ctypes.Union):
    _fields_ = (("integer", ctypes.c_int64), ("number", ctypes.c_double), ("pointer", ctypes.c_void_p))


def run(command: Sequence[str | Path], **options):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result


def build_core() -> list[Path]:
    """Return the objects of the emulation and of the runner; every build of kernels links them."""
    sources = {f"{name}.o": ROOT / f"csrc/emulation/{name}.cpp" for name in CORE}
    sources["runner.o"] = ROOT / "tests/emulation/runner.cpp"
    command = [*CXX, *CORE_FLAGS, "-Wall", "-Wextra", "-Werror", "-c"]

    def make(folder: Path) -> None:
        compile_objects(command, sources, folder)

    folder = compiled("core", command, sources.values(), make, ROOT / "csrc")
    return [folder / name for name in sources]


def compile_objects(command: Sequence[str], sources: dict[str, Path], folder: Path) -> None:
    """Compile each source to the object of its name, all at once."""
    compilers = [subprocess.Popen([*command, path, "-o", folder / name]) for name, path in sources.items()]
    failed = [compiler.wait() for compiler in compilers]
    if any(failed):
        raise RuntimeError(f"{', '.join(sources)}: does not compile")


def build_executor() -> Path:
    """Return the library that stands for the CUDA runtime and executes PTX."""
    sources = {f"{name}.o": ROOT / f"tests/emulation/ptx/{name}.cpp" for name in EXECUTOR}
    includes = [f"-isystem{folder}" for folder in toolchain.cuda_includes()]
    flags = [*CXX, *EXECUTOR_FLAGS]

    def make(folder: Path) -> None:
        compile_objects([*flags, *includes, "-c"], sources, folder)
        run(
            [*CXX, "-shared", *(folder / name for name in sources), "-Wl,-soname,libptx.so", "-o", folder / "libptx.so"]
        )

    headers = version(toolchain.nvcc())
    return compiled("executor", [*flags, *includes, headers], sources.values(), make, ROOT / "csrc") / "libptx.so"


def build(
    source: Path,
    core: list[Path],
    sanitizer: str = "plain",
    options: Sequence[str] = (),
    as_program: bool | None = None,
) -> Path:
    """Return a shared library or a program of one file of kernels. as_program None: a program if it has a sanitizer."""
    is_program = sanitizer != "plain" if as_program is None else as_program
    csrc = source.parents[2 if source.parent.name == "emulation" else 3] / "csrc"
    header = csrc / "emulation/emulation.h"
    flags = [*CXX, *KERNEL_FLAGS, *SANITIZERS[sanitizer], *options]

    def make(folder: Path) -> None:
        kernels = [*flags, "-include", header, "-x", "c++", source, "-x", "none"]
        if is_program:
            run([*kernels, "-rdynamic", *core, "-o", folder / "kernels", "-ldl"])
        else:
            objects = (path for path in core if path.name != "runner.o")
            run([*kernels, "-shared", *objects, "-o", folder / "kernels"])

    kind = "program" if is_program else "library"
    return compiled(source.name, [*flags, kind, core[0].parent.name], [source, header], make, csrc) / "kernels"


def build_for_ptx(source: Path, executor: Path, architecture: str) -> Path:
    """Return a shared library of one file of kernels with its PTX for 80 or 90a, which `executor` runs."""
    csrc = source.parents[2 if source.parent.name == "emulation" else 3] / "csrc"
    generate = ["-gencode", f"arch=compute_{architecture},code=compute_{architecture}", "-no-compress", "-lineinfo"]
    host = ["-shared", "-cudart", "none", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    command = [toolchain.nvcc(), "-std=c++20", "-O3", *generate, *host]

    def make(folder: Path) -> None:  # needs libptx.so by its name, so any build of the executor fits
        run([*command, f"-I{csrc}", "-Xlinker", executor, "-x", "cu", source, "-o", folder / "kernels"])

    return compiled(source.name, command, [source], make, csrc) / "kernels"


def build_for_gpu(source: Path, target: Path) -> Path:
    """A shared library of one file of kernels for the GPU of this machine."""
    major, minor = torch.cuda.get_device_capability()
    architecture = f"sm_{major}{minor}{'a' if major >= 9 else ''}"
    run(
        [
            "nvcc",
            "-std=c++20",
            "-O3",
            f"-arch={architecture}",
            "-shared",
            "-Xcompiler=-fPIC",
            "-x",
            "cu",
            source,
            "-o",
            target,
        ]
    )
    return target


class Library:
    """Entries of a shared library, called in this process: of the host (plain), or of a GPU."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.device = device
        self._library = ctypes.CDLL(str(path))

    def call(
        self, entry: str, *values: Value, seed: int = 0, misalignment: int = 16, shared_limit: int = SHARED_LIMIT
    ) -> None:
        """Call an entry on tensors of `device`, which it may change. Raises KernelError."""
        if self.device == "cpu":
            self._call("set_schedule", seed, misalignment, shared_limit)
        self._call(entry, *values)
        if self.device != "cpu":
            torch.cuda.synchronize()

    def _call(self, entry: str, *values: Value) -> None:
        arguments = (Argument * len(values))()
        lists = []
        for argument, value in zip(arguments, values, strict=True):
            if isinstance(value, torch.Tensor):
                argument.pointer = value.data_ptr()
            elif isinstance(value, Sequence):
                lists.append((ctypes.c_int64 * len(value))(*(tensor.data_ptr() for tensor in value)))
                argument.pointer = ctypes.addressof(lists[-1])
            elif isinstance(value, float):
                argument.number = value
            else:
                argument.integer = value
        function = getattr(self._library, entry)
        function.restype = ctypes.c_char_p
        message = function(arguments)
        if message:
            raise KernelError(message.decode())


class PtxLibrary(Library):
    """Entries of a library with PTX, executed in this process. Its launches may touch only the tensors of the call."""

    def __init__(self, path: Path, executor: Path) -> None:
        self._executor = ctypes.CDLL(str(executor))
        self._executor.ptx_prepare.argtypes = (ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int, ctypes.c_int)
        self._executor.ptx_limits_set.restype = ctypes.c_int64
        self._executor.ptx_allow.argtypes = (ctypes.c_uint64, ctypes.c_uint64)
        self.device, self.gpu = "cpu", 0  # where the tensors lie, and the number of the GPU that the kernels see
        # RTLD_DEEPBIND: the runtime of the executor is used, not one that torch has loaded.
        self._library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_DEEPBIND)

    def call(
        self, entry: str, *values: Value, seed: int = 0, misalignment: int = 16, shared_limit: int = SHARED_LIMIT
    ) -> None:
        """Call an entry as Library.call does."""
        self._executor.ptx_prepare(seed + 1, misalignment, self.gpu, shared_limit)
        for value in values:
            for tensor in [value] if isinstance(value, torch.Tensor) else value if isinstance(value, Sequence) else ():
                self._executor.ptx_allow(tensor.data_ptr(), span_bytes(tensor))
        self._call(entry, *values)

    @property
    def limits_set(self) -> int:
        """The number of times that kernels had their limit of shared memory set, in this process."""
        return int(self._executor.ptx_limits_set())

    def write_costs(self, path: Path | None) -> None:
        """Append the costs of the next launches to a file, a line of JSON each. None: of none."""
        self._executor.ptx_write_costs(str(path or "").encode())


@functools.cache
def without_randomisation() -> list[str]:
    """Return a command that starts a program without randomised addresses, which ThreadSanitizer's shadow may not fit.

    It is empty where that is not allowed, as in some containers.
    """
    command = ["setarch", "-R"]
    allowed = shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else []


class Program:
    """Entries of a program, called in a process of their own: a crash or a sanitizer's report is a KernelError.

    The process stays for the next calls: ThreadSanitizer takes a second to prepare the threads of a block. Only the
    program of the last call has one, because it takes up to 2 GB.
    """

    device = "cpu"
    _running: ClassVar["subprocess.Popen[str] | None"] = None
    _owner: ClassVar["Program | None"] = None

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder  # calls and results are written into the folder

    def call(
        self, entry: str, *values: Value, seed: int = 0, misalignment: int = 16, shared_limit: int = SHARED_LIMIT
    ) -> None:
        """Call an entry as Library.call does; KernelError also carries a sanitizer's report or the exit status."""
        tensors: list[torch.Tensor] = []
        name = entry.encode()
        numbers = struct.pack("=qqqi", seed, misalignment, shared_limit, len(values))
        parts = [struct.pack("=ii", 1, len(name)), name, numbers]
        for value in values:
            if isinstance(value, torch.Tensor):
                parts += [b"b", self._buffer(value)]
                tensors.append(value)
            elif isinstance(value, Sequence):
                parts += [struct.pack("=ci", b"l", len(value)), *map(self._buffer, value)]
                tensors.extend(value)
            elif isinstance(value, float):
                parts.append(struct.pack("=cd", b"d", value))
            else:
                parts.append(struct.pack("=cq", b"i", value))
        calls, results, report = (
            self.folder / f"{self.path.parent.name}.{kind}" for kind in ("calls", "results", "report")
        )
        calls.write_bytes(b"".join(parts))
        process = self._process(report)
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: its output ends too
            process.stdin.write(f"{calls}\n{results}\n")
            process.stdin.flush()
        if not select.select([process.stdout], [], [], HANGS)[0]:
            self.stop()
            raise TimeoutError(f"{entry} takes longer than {HANGS} s")
        if process.stdout.readline() != "done\n":
            code, text = self.stop(), report.read_text()
            raise KernelError(summary(text) or f"exit status {code}: {text[-2000:]}")
        self._take_results(results.read_bytes(), tensors)

    def _process(self, report: Path) -> "subprocess.Popen[str]":
        """Return the process of this program. A new one writes the sanitizer's report into the file."""
        running = Program._running
        if running is None or Program._owner is not self:
            self.stop()
            with report.open("w") as file:
                running = subprocess.Popen(
                    [*without_randomisation(), str(self.path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    text=True,
                    env=os.environ | SANITIZER_OPTIONS,
                )
            Program._running, Program._owner = running, self
        return running

    @staticmethod
    def stop() -> int | None:
        """End the process of the last call, if there is one. Return its exit status."""
        running, Program._running, Program._owner = Program._running, None, None
        if running is None:
            return None
        with running:  # closes its input, at which it ends
            try:
                running.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                running.kill()
        return running.returncode

    @staticmethod
    def _buffer(tensor: torch.Tensor) -> bytes:
        contents = ctypes.string_at(tensor.data_ptr(), span_bytes(tensor))
        return struct.pack("=qq", len(contents), tensor.data_ptr() % 256) + contents

    @staticmethod
    def _take_results(data: bytes, tensors: list[torch.Tensor]) -> None:
        (length,) = struct.unpack_from("=i", data)
        message, at = data[4 : 4 + length].decode(), 4 + length
        for tensor in tensors:
            size = span_bytes(tensor)
            ctypes.memmove(tensor.data_ptr(), data[at : at + size], size)
            at += size
        if message:
            raise KernelError(message)


def summary(report: str) -> str:
    """The lines of a sanitizer's report that say what it is."""
    found = re.findall(
        r"^(?:WARNING: ThreadSanitizer|==\d+==ERROR: AddressSanitizer|SUMMARY|.*runtime error).*$", report, re.M
    )
    return "\n".join(found)
