"""python -m nanochat_native.doctor: its output, and that it finds what is broken."""

import os
import re
import subprocess
import sys
from unittest import mock

import pytest
import torch
from backends import listed_instruction_sets, module_of, operators
from fork_server import python

from nanochat_native import doctor, ops
from nanochat_native.ops import backends, self_test

OPERATORS = list(self_test.CHECKS)


def run(before="", **environment):
    command = [python(), "-m", "nanochat_native.doctor"]
    if before:
        script = f"{before}\nimport runpy; runpy.run_module('nanochat_native.doctor', run_name='__main__')"
        command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


def test_a_healthy_machine():
    command = [sys.executable, "-m", "nanochat_native.doctor"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert torch.__version__ in lines["versions"]
    assert ops.build_info()["compiler"] in lines["built"]
    assert ops.instruction_set() in lines["machine"]
    assert "native" in lines["backend"]
    for op in OPERATORS:
        assert re.search(r"cpu: (native,|torch \(.*\), its kernel) differs from the reference by \d", lines[op])


def test_the_torch_backend_is_reported():
    result = run(NANOCHAT_NATIVE_BACKEND="torch")
    assert result.returncode == 0
    assert result.stdout.count("cpu: torch (chosen by") == len(OPERATORS)


def test_a_missing_module_is_broken():
    result = run("import sys; sys.modules['nanochat_native._C'] = None")
    assert result.returncode == 1
    assert "is not built for this Python: run `pip install --no-build-isolation .`" in result.stderr


def test_a_missing_torch_is_broken():
    result = run("import sys; sys.modules['torch'] = None")
    assert result.returncode == 1
    assert "torch cannot be imported" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_impossible_instruction_set_is_broken():
    result = run(NANOCHAT_CPU_ISA="mmx")
    assert result.returncode == 1
    assert f"broken: NANOCHAT_CPU_ISA must be {listed_instruction_sets()}, got mmx" in result.stderr


def test_every_operator_is_checked():
    assert set(self_test.CHECKS) == set(ops.OPERATORS) == operators()


def broken_by(monkeypatch, capsys, name, wrong):
    """Return the problems that doctor reports with the native call of operator `name` replaced by wrong(original)."""
    # The checks of products call the kernels, not the operators, which use torch's product on some processors.
    module = self_test if name in backends.LINEAR_OPERATORS else module_of(name)
    monkeypatch.setattr(module, f"native_{name}", wrong(getattr(module, f"native_{name}")))
    code = doctor.main()
    problems = [line for line in capsys.readouterr().err.splitlines() if line.startswith("broken: ")]
    assert code == (1 if problems else 0)
    return problems


@pytest.mark.parametrize("wrong", [0.0, torch.nan])
def test_a_wrong_kernel_is_broken(monkeypatch, capsys, wrong):
    (problem,) = broken_by(
        monkeypatch, capsys, "newton_schulz", lambda _: lambda g, *_, **__: torch.full_like(g, wrong)
    )
    assert problem.startswith(
        f"broken: newton_schulz on the CPU ({ops.instruction_set()}) differs from the reference by "
    )


def test_two_openmp_libraries_are_found_on_linux_and_on_macos(monkeypatch):
    assert len(self_test.openmp_libraries()) == 1
    maps = "7f00 r-xp /usr/lib/libgomp.so.1\n7f01 r--p /usr/lib/libgomp.so.1\n7f02 r-xp /x/libgomp-a34b3233.so.1\n"
    maps += "7f03 r-xp /usr/lib/libompitrace.so\n7f04 rw-p\n7f05 r-xp /opt/intel/libiomp5.so\n"
    monkeypatch.setattr(self_test.Path, "read_text", lambda path: maps)
    found = {"/usr/lib/libgomp.so.1", "/x/libgomp-a34b3233.so.1", "/opt/intel/libiomp5.so"}
    assert self_test.openmp_libraries() == found

    images = [b"/torch/lib/libomp.dylib", b"/usr/lib/libSystem.B.dylib", b"/opt/brew/libomp.dylib"]
    loader = mock.Mock()
    loader._dyld_image_count.return_value = len(images)
    loader._dyld_get_image_name.side_effect = images
    monkeypatch.setattr(self_test.sys, "platform", "darwin")
    monkeypatch.setattr(self_test.ctypes, "CDLL", lambda name: loader)
    assert self_test.openmp_libraries() == {"/torch/lib/libomp.dylib", "/opt/brew/libomp.dylib"}


VALUES = [
    "attention",
    "rms_norm",
    "add_rms_norm",
    "embedding_rms_norm",
    "mix_rms_norm",
    "add_value_embedding",
    "add_value_embedding_backward",
    "smear",
    "newton_schulz",
    "muon_momentum_",
    "linear_cross_entropy",
    "linear",
    "cached_forward_",
    "rotary_norm",
    "relu_squared",
    "linear_relu_squared",
    "linear_backward_relu_squared",
]


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("factor", [1.05, torch.nan])
def test_a_wrong_value_is_noticed(monkeypatch, capsys, name, factor):
    def wrong(function):
        def call(*args, **options):
            out = function(*args, **options)
            return tuple(factor * x for x in out) if isinstance(out, tuple) else factor * out

        return call

    problem, *_ = broken_by(monkeypatch, capsys, name, wrong)  # linear's gradients are scaled with it
    assert problem.startswith(f"broken: {name} on the CPU")


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *(("attention", i) for i in range(3)),
        *((name, i) for name in ("add_rms_norm", "linear_cross_entropy", "linear", "rotary_norm") for i in range(2)),
        *(("mix_rms_norm", i) for i in range(5)),
        ("rms_norm", 0),
        ("embedding_rms_norm", 1),
        *(("add_value_embedding", i) for i in range(4)),
        *(("smear", i) for i in range(3)),
        ("relu_squared", 0),
    ],
)
@pytest.mark.parametrize("factor", [0.0, 1.05])
def test_a_wrong_gradient_is_noticed(monkeypatch, capsys, name, argument, factor):
    """The value is right, and the gradient of one argument is `factor` times the right one."""

    def wrong(function):
        def call(*args):
            args = list(args)
            x = args[argument]
            if x.requires_grad:
                x = x.view_as(x)
                x.register_hook(lambda grad: factor * grad)
                args[argument] = x
            return function(*args)

        return call

    (problem,) = broken_by(monkeypatch, capsys, name, wrong)
    assert problem.startswith(f"broken: {'linear_backward' if name == 'linear' else name} on the CPU")


UPDATED = {
    "adamw_": lambda args, options: [args[0][0], args[2][0], args[3][0]],
    "muon_momentum_": lambda args, options: [args[1][0]],
    "muon_update_": lambda args, options: [args[0][0]],
    "normuon_update_": lambda args, options: [args[0][0], args[2][0]],
    "newton_schulz_update_": lambda args, options: [args[0][0]],
    "cached_forward_": lambda args, options: [options["cache"]],
    "relu_squared_": lambda args, options: [args[0]],
    "relu_squared_backward_": lambda args, options: [args[0]],
}
UPDATES = [
    (name, index) for name, count in zip(UPDATED, (3, 1, 1, 2, 1, 1, 1, 1), strict=True) for index in range(count)
]


@pytest.mark.parametrize(("name", "index"), UPDATES)
def test_a_wrong_update_is_noticed(monkeypatch, capsys, name, index):
    def wrong(function):
        def call(*args, **options):
            tensor = UPDATED[name](args, options)[index]
            before = tensor.clone()
            out = function(*args, **options)
            tensor.lerp_(before, 0.5)  # half of the update is missing
            return out

        return call

    (problem,) = broken_by(monkeypatch, capsys, name, wrong)
    assert problem.startswith(f"broken: {name} on the CPU")


def test_a_wrong_second_result_is_noticed(monkeypatch, capsys):
    """The norms of muon_momentum_ are wrong, the update is right."""

    def wrong(function):
        def call(*args, **options):
            update, norms = function(*args, **options)
            return update, 1.05 * norms

        return call

    assert len(broken_by(monkeypatch, capsys, "muon_momentum_", wrong)) == 1


def test_a_step_of_generation_is_checked(monkeypatch, capsys):
    def wrong(function):
        return lambda *args: function(*args) if args[-1] is None else 1.05 * function(*args)

    assert len(broken_by(monkeypatch, capsys, "attention", wrong)) == 1


@pytest.mark.parametrize("is_native", [True, False])
def test_the_kernel_of_linear_is_checked_on_every_processor(monkeypatch, capsys, is_native):
    monkeypatch.setattr(backends, "_linear_product", "native" if is_native else "torch")
    assert doctor.main() == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    start = "cpu: native, differs" if is_native else "cpu: torch (torch's product is chosen by NANOCHAT_LINEAR"
    assert start in lines["linear"]
    assert start in lines["linear_backward"]


def test_a_stale_module_is_broken(monkeypatch, capsys):
    monkeypatch.setattr("nanochat_native.__version__", "9.9.9")
    assert doctor.main() == 1
    assert "install again" in capsys.readouterr().err


def test_a_driver_that_torch_refuses_is_broken(monkeypatch, capsys):
    def refuse(index):
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", refuse)
    assert doctor.main() == 1
    printed = capsys.readouterr()
    message = "The NVIDIA driver on your system is too old (found version 11040)."
    assert f"torch cannot use the 1 GPU(s) of this machine: {message}\n" in printed.err
    assert f"no GPU: {message}\n" in printed.out


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        *(("8.0+PTX 9.0a 10.0 12.0", each, True) for each in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]),
        ("8.0 9.0a 10.0 12.0", (12, 1), True),
        ("8.0 9.0a 10.0 12.0", (11, 0), False),
        ("8.0+PTX 9.0a", (12, 0), True),
        ("8.0+PTX 9.0a", (7, 5), False),
        ("8.0 9.0a", (8, 9), True),
        ("8.0 9.0a", (10, 0), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), True),
        ("12.0+PTX 8.6", (10, 0), True),
        ("12.0+PTX 8.6", (8, 0), False),
        ("8.6", (8, 0), False),
        ("", (9, 0), False),
    ],
)
def test_architectures_cover_a_gpu(architectures, capability, expected):
    assert self_test.covers(architectures, capability) is expected


@pytest.mark.parametrize(
    ("driver", "runtime", "expected"),
    [
        ((13, 0), (13, 0), ""),
        ((12, 8), (12, 9), ""),
        ((13, 1), (12, 8), ""),
        (
            (12, 8),
            (13, 0),
            "the GPU driver is for CUDA 12.8, and the kernels were built with CUDA 13.0: install a driver",
        ),
        ((0, 0), (13, 0), "the GPU driver was not found, and the kernels were built with CUDA 13.0: install a driver"),
    ],
)
def test_a_driver_older_than_the_runtime_is_a_problem(driver, runtime, expected):
    problem = self_test.driver_problem(driver, runtime)
    assert problem.startswith(expected)
    assert bool(problem) == bool(expected)


def test_the_versions_of_cuda_are_known_without_a_gpu():
    info = ops.build_info()
    if not info["cuda"]:
        with pytest.raises(RuntimeError, match="built without CUDA"):
            ops.cuda_versions()
        return
    driver, runtime = ops.cuda_versions()
    assert runtime == tuple(map(int, info["cuda"].split(".")[:2]))
    assert driver >= (0, 0)
