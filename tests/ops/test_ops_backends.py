"""The choice of the backend, repairs of an unusable module, instruction sets, threads, forked children."""

import functools
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from backends import INSTRUCTION_SETS, listed_instruction_sets, module_of, operators, usable_instruction_sets
from torch._subclasses.fake_tensor import FakeTensorMode

from nanochat_native import ops
from nanochat_native.ops import backends, reference

# Tensors of fewer elements than the 32,768 from which torch uses its own threads: after a fork those would hang.
CALLS = """
    import os, sys, torch
    from nanochat_native import ops
    torch.manual_seed(0)

    def call_all():
        q, k, v = (torch.randn(2, 100, heads, 32, generator=torch.Generator().manual_seed(1)) for heads in (4, 2, 2))
        q.requires_grad_()
        out = ops.attention(q, k, v)
        params, grads, ms, vs = ([torch.full((20_000,), x)] for x in (1.0, 0.5, 0.2, 0.3))
        ops.adamw_(params, grads, ms, vs, step=1, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
        update = ops.muon_momentum_(grads, ms, momentum=0.9)
        ops.muon_update_(params, update, lr=0.1)
        x = out.detach().reshape(200, 128)
        loss = ops.linear_cross_entropy(x, x[:99], torch.arange(200) % 99)
        rows = ops.embedding_rms_norm(torch.arange(400) % 99, x[:99], x.dtype)[200:]  # enough rows for three threads
        return [out.detach(), *torch.autograd.grad(out.sum(), q), ops.newton_schulz(x), params[0], loss, rows]
"""


def run(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CALLS) + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


def test_use_backend_as_a_call_and_as_a_context():
    assert ops.use_backend("native") is not None
    with ops.use_backend("torch"):
        assert ops.backend() == "torch"
        with ops.use_backend("native"):
            assert ops.backend() == "native"
        assert ops.backend() == "torch"
    assert ops.backend() == "native"
    ops.use_backend("torch")
    assert ops.backend() == "torch"
    with pytest.raises(ValueError, match="name must be 'native' or 'torch', got 'cuda'"):
        ops.use_backend("cuda")


def test_the_switch_chooses(monkeypatch):
    called = []
    for name, prefix in (("native", "native"), ("torch", "reference")):
        call = functools.partial(lambda kind, *_, **__: called.append(kind), name)
        monkeypatch.setattr(module_of("newton_schulz"), f"{prefix}_newton_schulz", call)
    for name in ("native", "torch"):
        with ops.use_backend(name):
            ops.newton_schulz(torch.ones(2, 2))
    assert called == ["native", "torch"]


@pytest.mark.parametrize("name", ["native", "torch"])
def test_environment_sets_the_initial_backend(name):
    assert run("print(ops.backend())", NANOCHAT_NATIVE_BACKEND=name).stdout.strip() == name


def test_environment_with_an_unknown_backend():
    for call in ("ops.backend()", "ops.newton_schulz(torch.ones(2, 2))"):
        result = run(call, NANOCHAT_NATIVE_BACKEND="triton")
        assert "ValueError: NANOCHAT_NATIVE_BACKEND must be native or torch, got 'triton'" in result.stderr


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("NANOCHAT_NATIVE_BACKEND", "NANOCHAT_NATIVE_BACKEND must be native or torch, got 'wrong'"),
        ("NANOCHAT_CPU_ISA", f"NANOCHAT_CPU_ISA must be {listed_instruction_sets()}, got wrong"),
        ("NANOCHAT_LINEAR", "NANOCHAT_LINEAR must be auto, native or torch, got 'wrong'"),
    ],
)
@pytest.mark.parametrize("command", ["train", pytest.param("memory", marks=pytest.mark.slow)])
def test_a_wrong_choice_in_the_environment_is_one_line(command, variable, message, tmp_path):
    flags = ["--depth", "1", "--device", "cpu"] + ["--out-dir", str(tmp_path)] * (command == "train")
    command = [sys.executable, "-m", f"nanochat_native.{command}", *flags]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {variable: "wrong"})
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {message}\n")
    assert not list(tmp_path.iterdir())


UNUSABLE = {
    "is not built": "import sys; sys.modules['nanochat_native._C'] = None",
    "was built for torch": "import torch; torch.__version__ = '2.99.0'",
    "does not load with torch": """
        import importlib.abc, sys
        class Broken(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == 'nanochat_native._C':
                    raise ImportError('undefined symbol: c10')
        sys.meta_path.insert(0, Broken())
    """,
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_an_unusable_module_raises_an_error_with_the_repair(what):
    script = f"""
{textwrap.dedent(UNUSABLE[what])}
import torch
from nanochat_native import ops
calls = [ops.build_info, lambda: ops.use_backend("native"), lambda: ops.newton_schulz(torch.ones(2, 2))]
for call in calls:
    try:
        call()
        print("no error")
    except RuntimeError as error:
        print(error)
with ops.use_backend("torch"):
    print(ops.newton_schulz(torch.eye(2)).shape)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    *errors, shape = result.stdout.splitlines()
    assert len(errors) == 3, result.stderr
    for error in errors:
        assert what in error
        assert "pip install --no-build-isolation ." in error
    assert shape == "torch.Size([2, 2])"


def test_a_device_without_a_kernel_runs_the_reference_with_one_warning(monkeypatch):
    monkeypatch.setitem(backends.DEVICES, "attention", ())
    monkeypatch.setattr(backends, "warned", set())
    monkeypatch.setattr(module_of("attention"), "native_attention", None)
    q = torch.randn(1, 5, 2, 4)
    with pytest.warns(UserWarning, match="attention on cpu is served by plain torch: no native kernel for cpu yet"):
        out = ops.attention(q, q, q)
    assert torch.equal(out, reference.attention(q, q, q))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.attention(q, q, q)


@pytest.mark.parametrize(
    ("dtype", "D", "words"),
    [
        (torch.bfloat16, 64, ""),
        (torch.float16, 8, ""),
        (torch.float32, 64, "its kernels take bfloat16 and float16, not float32"),
        (torch.bfloat16, 20, "its kernels take D a multiple of 8 up to 128, not 20"),
        (torch.bfloat16, 136, "its kernels take D a multiple of 8 up to 128, not 136"),
    ],
)
def test_what_attention_on_cuda_takes(monkeypatch, dtype, D, words):
    """The choice alone is tested: fake tensors have a device but no data."""
    monkeypatch.setitem(backends.DEVICES, "attention", ("cuda",))
    monkeypatch.setattr(backends, "warned", set())
    monkeypatch.setattr(module_of("attention"), "native_attention", lambda *_: "native")
    monkeypatch.setattr(module_of("attention"), "block_attention", lambda *_, **__: "blocks")
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        q = torch.empty(1, 5, 2, D, dtype=dtype, device="cuda")
        assert [ops.attention(q, q, q) for _ in range(2)] == [("blocks" if words else "native")] * 2
    messages = [str(warning.message) for warning in caught if "nanochat_native" in str(warning.message)]
    assert messages == ([f"nanochat_native: attention on cuda is served by plain torch: {words}"] if words else [])


def test_that_warning_survives_compilation(monkeypatch):
    monkeypatch.setitem(backends.DEVICES, "attention", ())
    monkeypatch.setattr(backends, "warned", set())
    q = torch.randn(1, 5, 2, 4)
    with pytest.warns(UserWarning, match="attention on cpu is served by plain torch"):
        out = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")(q, q, q)
    torch.testing.assert_close(out, reference.attention(q, q, q))


def test_serves(monkeypatch):
    built = ops.build_info()["cuda"]
    for op in ops.OPERATORS:
        expected = "torch" if op in backends.LINEAR_OPERATORS else "native"
        monkeypatch.setattr(backends, "_linear_product", "torch")
        assert ops.serves(op, "cpu")[0] == expected
        monkeypatch.setattr(backends, "_linear_product", "native")
        assert ops.serves(op, "cpu") == ("native", "kernel built")
        assert ops.serves(op, "cuda")[0] == ("native" if built and op in backends.CUDA_OPERATORS else "torch")
    for op in ("linear", "linear_backward", "cached_forward_"):
        assert ops.serves(op, "cuda") == ("torch", "composed of torch's products on cuda")
    with ops.use_backend("torch"):
        assert ops.serves("adamw_", "cpu")[0] == "torch"
    with pytest.raises(ValueError, match=r"op must be one of attention, .*, got 'softmax'"):
        ops.serves("softmax", "cpu")


def test_operators_are_all_public_operators_and_have_a_reference():
    assert set(ops.OPERATORS) == operators() == operators() & set(reference.__all__)


def test_instruction_sets_agree():
    """Every set of this processor gives the same values, up to rounding."""
    names = usable_instruction_sets()
    basic = INSTRUCTION_SETS[0]
    assert basic in names
    script = "print([round(tensor.double().abs().sum().item(), 2) for tensor in call_all()])"
    results = {isa: run(script, NANOCHAT_CPU_ISA=isa).stdout for isa in names}
    assert results[basic].startswith("[")
    assert len(set(results.values())) == 1, results


def test_unknown_instruction_set_is_refused():
    result = run("ops.newton_schulz(torch.ones(2, 2))", NANOCHAT_CPU_ISA="mmx")
    assert f"ValueError: NANOCHAT_CPU_ISA must be {listed_instruction_sets()}, got mmx" in result.stderr


def test_a_forked_child_neither_hangs_nor_differs():
    script = """
        torch.set_num_threads(2)
        torch.randn(500, 500) @ torch.randn(500, 500)
        expected = call_all()
        import signal
        child = os.fork()
        if child == 0:
            signal.alarm(60)   # ends a hang, which would outlive the test
            same = all(map(torch.equal, call_all(), expected))
            os._exit(0 if same else 7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert all(map(torch.equal, call_all(), expected))
        print("done")
    """
    assert run(script).stdout.strip() == "done"


def test_kernels_share_torchs_threads():
    script = """
        from pathlib import Path
        torch.set_num_threads(3)
        torch.ones(3_000_000).sin_()
        before = len(os.listdir("/proc/self/task"))
        call_all()
        assert len(os.listdir("/proc/self/task")) == before, "more threads than torch's own"
        assert len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}) == 1
        print("done")
    """
    result = run(script)
    assert result.stdout.strip() == "done", result.stderr


def test_importing_the_package_does_nothing_else():
    script = """
        print(sorted(set(sys.modules) & {"matplotlib", "pyarrow", "tensorboard", "nanochat_native.train"}))
    """
    result = run(script)
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""


def test_settings_have_each_choice_that_changes_bits(monkeypatch):
    with ops.use_backend("torch"):
        assert backends.settings("cpu") == {"backend": "torch", "torch": torch.backends.cpu.get_cpu_capability()}
    with ops.use_backend("native"):
        before = backends.settings("cpu")
        assert before["instruction_set"] == ops.instruction_set()
        for module, name in (
            (backends, "instruction_set"),
            (backends, "uses_native_linear"),
            (torch.backends.cpu, "get_cpu_capability"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, lambda: "another")
                assert backends.settings("cpu") != before
        monkeypatch.setattr(backends, "build_info", lambda: {"cuda": "12.8"})
        monkeypatch.setattr(backends, "cuda_instruction_set", lambda: "sm_90a")
        monkeypatch.setattr(backends, "gpu_problem", lambda index: "")
        monkeypatch.setenv("NANOCHAT_LOGIT_BYTES", "1000")
        assert backends.settings("cpu") == before
        assert backends.settings("cuda") == before | {"cuda_instruction_set": "sm_90a", "logit_bytes": 1000}
        monkeypatch.setattr(backends, "gpu_problem", lambda index: "too old")
        assert backends.settings("cuda") == before
