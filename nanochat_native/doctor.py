"""python -m nanochat_native.doctor: check the installation, the build, the machine and every operator.

Compares the values and gradients of each native kernel with those of its reference in plain PyTorch. If something is
broken, prints how to fix it and exits with 1.

The guide explains it: docs/guide/12-speed.md.
"""

import platform
import sys
from collections.abc import Sequence

try:
    import torch
except ImportError as error:
    sys.exit(f"broken: torch cannot be imported ({error}); install torch >= 2.11")

import nanochat_native
from nanochat_native import ops
from nanochat_native.bench import results_io
from nanochat_native.ops.backends import LEAST_CAPABILITY, gpu_problem
from nanochat_native.ops.self_test import CHECKS, TOLERANCE, covers, difference, driver_problem, openmp_libraries
from nanochat_native.runtime import hardware


def main(args: Sequence[str] = ()) -> int:
    """Check everything and print the results. Return the exit code: 1 if something is broken."""
    results_io.Parser(prog="python -m nanochat_native.doctor", description=__doc__).parse_args(args)
    torch.manual_seed(0)
    broken: list[str] = []
    print(
        f"versions   nanochat-native {nanochat_native.__version__}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {platform.system()} {platform.machine()}"
    )

    try:
        ops.check_environment()
    except ValueError as error:
        print(f"broken: {error}", file=sys.stderr)
        return 1
    architectures = ""
    instruction_set = "not used"
    try:
        info = ops.build_info()
    except RuntimeError as error:
        broken.append(str(error))
        print("built      no usable native module")
    else:
        architectures = info["cuda_architectures"]
        cuda = f"CUDA {info['cuda']} for {architectures}" if info["cuda"] else f"no CUDA ({info['cuda_off']})"
        print(
            f"built      {info['version']} by {info['compiler']} for torch {info['torch']}: "
            f"CPU for {info['instruction_sets']}; {cuda}"
        )
        if info["version"] != nanochat_native.__version__:
            broken.append(f"the native module has version {info['version']}: install again")
        instruction_set = ops.instruction_set()
        if len(openmp_libraries()) > 1:
            broken.append(f"two OpenMP libraries are loaded; import torch first: {sorted(openmp_libraries())}")

    name = hardware.cpu_name() or platform.processor() or "unknown processor"
    print(f"machine    {name}, instruction set {instruction_set}, {torch.get_num_threads()} threads")
    gpus, no_gpu = torch.cuda.device_count(), "none is visible"
    if not torch.version.cuda:
        no_gpu = "this torch was built without CUDA"
    uncovered = []
    try:
        if gpus:
            torch.cuda.get_device_capability(0)  # fails with a driver that is too old, which still counts the GPUs
    except RuntimeError as error:
        no_gpu = str(error).splitlines()[0]
        broken.append(f"torch cannot use the {gpus} GPU(s) of this machine: {no_gpu}")
        gpus = 0
    for index in range(gpus):
        capability = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)}, compute capability {capability[0]}.{capability[1]}"
        print(f"           GPU {index}: {name}")
        place = torch.device("cuda", index)
        dtype = str(hardware.gpu_dtype(place)).removeprefix("torch.")
        float8 = "tensorwise or rowwise" if hardware.has_float8(place) else "off"
        print(f"           GPU {index}: --dtype {dtype}, --fp8 {float8}")
        if problem := gpu_problem(index):
            print(f"           GPU {index}: plain torch serves every operator: {problem}")
        elif architectures and not covers(architectures, capability):
            uncovered.append(f"GPU {index} ({name})")
    if uncovered:
        found = {torch.cuda.get_device_capability(index) for index in range(gpus)}
        wanted = ";".join(f"{major}.{minor}" for major, minor in sorted(found) if (major, minor) >= LEAST_CAPABILITY)
        broken.append(
            f"the architectures built ({architectures}) do not cover {', '.join(uncovered)}: "
            f"install again with TORCH_CUDA_ARCH_LIST='{wanted}'"
        )
    if gpus and architectures:
        driver, runtime = ops.cuda_versions()
        print("           CUDA: driver for {}.{}, kernels built with {}.{}".format(*driver, *runtime))
        if problem := driver_problem(driver, runtime):
            broken.append(problem)
        try:
            if not gpu_problem():
                print(f"           GPU kernels of attention: {ops.cuda_instruction_set()}")
        except (RuntimeError, ValueError) as error:
            broken.append(str(error).splitlines()[0])
    if torch.backends.mps.is_available():
        _, why = ops.serves("attention", "mps")
        print(f"           MPS: --device mps runs in plain torch, which serves every operator there: {why}")
    elif gpus == 0:
        print(f"           no GPU: {no_gpu}")

    print(f"backend    {ops.backend()}")
    devices = ["cpu", "cuda"] if gpus else ["cpu"]
    width = max(map(len, CHECKS)) + 1
    for op, check in CHECKS.items():
        states = []
        for device in devices:
            backend, why = ops.serves(op, device)
            state = f"{device}: {backend} ({why})"
            has_kernel = backend == "native" or (device == "cpu" and ops.backend() == "native")
            if has_kernel and instruction_set != "not used":
                where = f"the CPU ({instruction_set})" if device == "cpu" else "the GPU"
                try:
                    with torch.device(device):
                        off = difference(*check())
                except RuntimeError as error:  # from the CUDA runtime: no code for this GPU, a driver that is too old
                    state = f"{device}: native, fails"
                    broken.append(f"{op} on {where}: {str(error).splitlines()[0]}")
                else:
                    kernel = f"{device}: native," if backend == "native" else f"{state}, its kernel"
                    state = f"{kernel} differs from the reference by {off:.0e}"
                    if not off < TOLERANCE:
                        broken.append(f"{op} on {where} differs from the reference by {off:.1e}")
            states.append(state)
        print(f"{op:<{width}}{'; '.join(states)}")

    for sentence in broken:
        print(f"broken: {sentence}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
