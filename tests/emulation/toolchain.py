"""The CUDA toolkit for the tests of CUDA sources: compiler, assemblers, headers, disassembler, and the report of ptxas.

`python tests/emulation/toolchain.py [file.cu ...]` prints what each kernel uses; without files, those of csrc/cuda.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from compiled import compiled

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc/cuda"
OLDEST_ASSEMBLER, NEWEST_ASSEMBLER = (12, 8), (13, 5)  # of the wheels in pyproject.toml and the Makefile
HGMMA = 0x1F0  # wgmma in machine code: the low 9 bits of the instruction, for every shape, type and source of A


class MissingError(Exception):
    """A part of the toolkit that is not installed."""


# --- tools and headers ---


def _setup():
    spec = importlib.util.spec_from_file_location("nanochat_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def nvcc():
    """Path of the nvcc that setup.py would build with."""
    path, reason = _setup().find_nvcc("auto")
    if not path:
        raise MissingError(reason)
    return path


def architectures(source=None):
    """Return what setup.py builds for on x86-64: sm_80, sm_90a, ...; a source of Hopper's only for sm_90a."""
    entries = _setup().DEFAULT_ARCHITECTURES["x86_64"].split(";")
    names = ["sm_" + entry.removesuffix("+PTX").replace(".", "") for entry in entries]
    return ["sm_90a"] if source and source.stem.endswith("_hopper") else names


def host_compiler():
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if shutil.which(shlex.split(name)[0]):
            return shlex.split(name)
    raise MissingError(f"no C++ compiler ({', '.join(names)})")


def _package_folders(name):
    """Return the folders of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []


def _nvcc_plan():
    """Return the commands that nvcc would run, with the folders that it would search."""
    command = [nvcc(), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    return subprocess.run(command, capture_output=True, text=True).stderr


def _toolkit_programs():
    """Return the folders with the programs that nvcc runs."""
    return [Path(top) / "bin" for top in re.findall(r"^#\$ TOP=(.*)$", _nvcc_plan(), re.MULTILINE)]


def cuda_includes():
    """Folders with CUDA's own headers: the toolkit's, or those of the wheels nvidia-cuda-runtime, -crt and -cccl."""
    try:
        words = shlex.split(" ".join(re.findall(r"^#\$ (?:SYSTEM_)?INCLUDES=(.*)$", _nvcc_plan(), re.MULTILINE)))
        folders = [Path(word.removeprefix("-I")) for word in words if word != "-isystem"]
    except MissingError:
        found = [folder for root in _package_folders("nvidia") for folder in sorted(root.glob("*/include"))]
        folders = found + [folder / "cccl" for folder in found]
    for header in ("vector_types.h", "crt/host_defines.h", "cuda/std/utility"):
        if not any((folder / header).is_file() for folder in folders):
            raise MissingError(f"no {header} of CUDA: neither a toolkit nor nvidia-cuda-runtime, -crt and -cccl")
    return [folder for folder in folders if folder.is_dir()]


def cute_include():
    """Folder with CuTe's headers, of the wheel nvidia-cutlass."""
    for folder in _package_folders("cutlass_library"):
        if (folder / "source/include/cute/tensor.hpp").is_file():
            return folder / "source/include"
    raise MissingError("no CuTe: pip install nvidia-cutlass")


def nvdisasm():
    """Path of the disassembler: that of the wheel nvidia-cuda-nvdisasm, which is new, or the toolkit's."""
    folders = [folder for root in _package_folders("nvidia") for folder in root.glob("*/bin")]
    with contextlib.suppress(MissingError):
        folders += _toolkit_programs()
    path = shutil.which("nvdisasm", path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", os.defpath)]))
    if not path:
        raise MissingError("no nvdisasm: neither a toolkit's nor nvidia-cuda-nvdisasm")
    return path


# --- ptxas ---


@dataclass
class Kernel:
    """The report of ptxas on one function, in bytes. A function that is not a kernel has no registers of its own."""

    symbol: str
    name: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int | None = None
    shared: int = 0


@dataclass
class Compiled:
    """One source for one architecture."""

    source: Path
    architecture: str
    cubin: Path
    ptx: Path
    error: str  # the compiler's, where it failed
    kernels: list[Kernel]
    remarks: list[str]  # ptxas's warnings and what it gives a number, "(C7508) ... 'setmaxnreg' ignored ..."

    def complaints(self, allowed=()):
        """Return stack frames, spills, and remarks that do not start with `allowed`, which no kernel may have."""
        found = [remark for remark in self.remarks if not remark.startswith(allowed)]
        for kernel in self.kernels:
            if kernel.stack:
                found.append(f"{kernel.name}: a stack frame of {kernel.stack} bytes")
            if kernel.spill_stores or kernel.spill_loads:
                found.append(
                    f"{kernel.name}: spills, {kernel.spill_stores} bytes of stores, {kernel.spill_loads} of loads"
                )
        return found


def readable(symbol):
    """The C++ name of a symbol with its template arguments, without namespaces of its own and parameters."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    pointer = library.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
    if not pointer:
        return symbol
    name = ctypes.string_at(pointer).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(pointer))
    name = re.sub(r"(\w+|\(anonymous namespace\))::", "", name)
    return re.sub(r"\(([^()]|\([^()]*\))*\)$", "", name).removeprefix("void ")


def parse_ptxas(text):
    """(kernels, remarks) of what `nvcc -Xptxas -v` prints."""
    kernels, remarks = {}, []
    symbol = None
    for line in text.splitlines():
        if match := re.match(r"ptxas (info|warning)\s*: (.*)", line):
            level, said = match.groups()
            if match := re.match(r"(?:Compiling entry function '|Function properties for )([\w$]+)", said):
                symbol = match[1]
            elif match := re.match(r"Used (\d+) registers", said):
                kernels[symbol].registers = int(match[1])
                shared = re.search(r"(\d+) bytes smem", said)
                kernels[symbol].shared = int(shared[1]) if shared else 0
            elif level == "warning" or re.match(r"\(C\d+\)", said):
                remarks.append(re.sub(r"'(_Z\w+)'", lambda match: readable(match[1]), said))
        elif match := re.match(r" +(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[symbol] = Kernel(symbol, readable(symbol), *map(int, match.groups()))
    return list(kernels.values()), remarks


def _record(folder, command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode < 0:  # killed, for example for memory: it says nothing about the source, and is not kept
        raise subprocess.CalledProcessError(result.returncode, command, result.stdout, result.stderr)
    (folder / "said").write_text(result.stdout + result.stderr)
    (folder / "status").write_text(str(result.returncode))
    return result


def _recorded(folder, source, architecture, ptx):
    text, failed = (folder / "said").read_text(), (folder / "status").read_text() != "0"
    return Compiled(source, architecture, folder / "cubin", ptx, text if failed else "", *parse_ptxas(text))


def compile_cuda(source, architecture, options=(), tree=ROOT):
    """Compiles to PTX and machine code, once for the same content. `tree` is the folder that csrc/ is in.

    As setup.py does, it makes PTX for sm_80 and sm_90a, and machine code for newer GPUs of that for sm_80. (That for
    sm_90 is the same as for sm_90a, but in the kernels for Hopper.)
    """
    source = Path(source)
    if architecture not in ("sm_80", "sm_90a"):
        one = compile_cuda(source, "sm_80", options, tree)
        return one if one.error else assemble(one, _own_assembler(), architecture)
    flags = [nvcc(), "-std=c++20", "-O3", f"-arch={architecture}", "-cubin", "--keep", "-Xptxas", "-v", *options]

    def make(folder):
        with tempfile.TemporaryDirectory() as kept:
            _record(folder, [*flags, "--keep-dir", kept, f"-I{tree / 'csrc'}", str(source), "-o", folder / "cubin"])
            for ptx in Path(kept).glob("*.ptx"):
                shutil.move(ptx, folder / "ptx")

    folder = compiled(source.name, flags, [source], make, tree / "csrc")
    return _recorded(folder, source, architecture, folder / "ptx")


@functools.cache
def _own_assembler():
    """Path of the ptxas that nvcc runs."""
    path = shutil.which("ptxas", path=os.pathsep.join(map(str, _toolkit_programs())))
    if not path:
        raise MissingError("nvcc has no ptxas")
    return path


@functools.cache
def wheel_assemblers():
    """Return {version: path} of the ptxas in wheels: the oldest of nvidia-cuda-nvcc-cu12, the newest of -nvcc."""
    found = {}
    for path in (path for root in _package_folders("nvidia") for path in root.glob("*/bin/ptxas")):
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
        found[tuple(map(int, re.search(r"release (\d+)\.(\d+)", text).groups()))] = path
    return dict(sorted(found.items()))


def assemble(one, ptxas, architecture=None):
    """Return the machine code that a ptxas makes of the PTX of a `Compiled`, for the same architecture or another."""
    architecture = architecture or one.architecture
    flags = [str(ptxas), f"-arch={architecture}", "-O3", "-v"]

    def make(folder):
        text = one.ptx.read_text()
        for _ in range(2):
            (folder / "ptx").write_text(text)
            said = _record(folder, [*flags, folder / "ptx", "-o", folder / "cubin"]).stderr
            # A ptxas older than nvcc refuses the version of the PTX, but knows all instructions in it.
            known = re.search(r"Unsupported \.version \S+; current version is '([\d.]+)'", said)
            if not known:
                return
            text = re.sub(r"^\.version .*$", f".version {known[1]}", text, count=1, flags=re.MULTILINE)

    folder = compiled(one.source.name, flags, [one.ptx], make, ROOT / "csrc")
    return _recorded(folder, one.source, architecture, one.ptx)


def compile_all(sources, jobs=2):
    """Every source for every architecture."""
    pairs = [(source, architecture) for source in sources for architecture in architectures(source)]
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda pair: compile_cuda(*pair), pairs))


def table(results):
    """Return the resources of every kernel, a line each."""
    rows = [("kernel", "arch", "registers", "shared", "stack", "spills")]
    for one in results:
        for kernel in sorted(one.kernels, key=lambda kernel: kernel.name):
            registers = "-" if kernel.registers is None else kernel.registers
            numbers = (registers, kernel.shared, kernel.stack, kernel.spill_stores + kernel.spill_loads)
            rows.append((kernel.name, one.architecture, *map(str, numbers)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(" | ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# --- machine code ---


def code_sections(cubin):
    """{symbol: its instructions, of 16 bytes each} of an ELF file with code for a GPU."""
    data = Path(cubin).read_bytes()
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, start + i * size) for i in range(count)]
    strings = data[headers[names][4] :]
    found = {}
    for name, _, _, _, offset, length in headers:
        title = strings[name : strings.index(b"\0", name)].decode()
        if title.startswith(".text."):
            found[title.removeprefix(".text.")] = [data[i : i + 16] for i in range(offset, offset + length, 16)]
    return found


def count_hgmma(cubin):
    """{symbol: number of its wgmma instructions}."""
    return {
        symbol: sum(int.from_bytes(instruction[:2], "little") & 0x1FF == HGMMA for instruction in instructions)
        for symbol, instructions in code_sections(cubin).items()
    }


def main():
    sources = [Path(name) for name in sys.argv[1:]] or sorted(CUDA.glob("*.cu"))
    results = compile_all(sources)
    print(table(results))
    for one in results:
        for line in [one.error] if one.error else one.complaints():
            print(f"{one.source.name} {one.architecture}: {line}")


if __name__ == "__main__":
    main()
