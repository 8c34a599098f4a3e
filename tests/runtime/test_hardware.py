import os
import subprocess
import types

import pytest
import torch

from nanochat_native.runtime import hardware


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 503.8),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_found_by_name(name, teraflops):
    peak = hardware.gpu_peak(name, torch.bfloat16)
    assert peak.flops == (None if teraflops is None else pytest.approx(teraflops * 1e12))
    assert name in peak.source
    assert hardware.gpu_peak(name, torch.float32).flops is None


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("H200", 4800),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA A100 80GB PCIe", 1935),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 1597),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 1792),
        ("NVIDIA GeForce RTX 4090", 1008),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_bandwidths_are_found_by_name(name, gigabytes):
    found = hardware.gpu_bandwidth(name)
    assert found == (None if gigabytes is None else pytest.approx(gigabytes * 1e9))


def test_a_cpu_is_measured():
    peak = hardware.cpu_peak()
    assert "sgemm, measured" in peak.source
    assert 1e9 < peak.flops < 1e14


def test_memory_and_description_of_a_cpu():
    used, there = hardware.memory(torch.device("cpu"))
    assert 50e6 < used < there
    assert f"{torch.get_num_threads()} threads" in hardware.describe(torch.device("cpu"))


@pytest.mark.parametrize(
    ("dtype", "enabled"), [(None, False), ("float32", False), ("bfloat16", True)], ids=["default", "wide", "small"]
)
def test_models_run_in_float32_on_a_cpu_unless_told_otherwise(dtype, enabled):
    with hardware.autocast(torch.device("cpu"), dtype):
        assert torch.is_autocast_enabled("cpu") == enabled
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16


def test_bfloat16_on_a_gpu_without_it_is_refused(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(hardware, "gpu_dtype", lambda device: torch.float16)
    with pytest.raises(ValueError, match="--dtype must be float32 on a GPU without products in bfloat16, got bfloat16"):
        hardware.autocast(gpu, "bfloat16")


# --- macOS, which the tests do not run on ---


def on_macos(monkeypatch, answer=b""):
    """Let hardware.py take this for a Mac on which every program prints `answer`. Return the list of the commands."""
    commands = []

    def run(command, text=False, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, answer.decode() if text else answer)

    monkeypatch.setattr(hardware.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(hardware.subprocess, "run", run)
    return commands


def test_peak_memory_is_in_kilobytes_on_linux_and_in_bytes_on_macos(monkeypatch):
    monkeypatch.setattr(hardware.resource, "getrusage", lambda who: types.SimpleNamespace(ru_maxrss=3 << 20))
    assert hardware.peak_resident_bytes() == 3 << 30
    on_macos(monkeypatch)
    assert hardware.peak_resident_bytes() == 3 << 20


def test_resident_memory_is_that_of_ps_on_macos(monkeypatch):
    assert 50e6 < hardware.resident_bytes() <= hardware.peak_resident_bytes() + (1 << 20)
    commands = on_macos(monkeypatch, b"  2048\n")
    assert hardware.resident_bytes(7) == 2 << 20
    assert commands == [["/bin/ps", "-o", "rss=", "-p", "7"]]


def test_the_name_of_the_processor_is_that_of_sysctl_on_macos(monkeypatch):
    commands = on_macos(monkeypatch, b"Apple M2 Pro\n")
    assert hardware.describe(torch.device("mps")) == "MPS on Apple M2 Pro"
    assert hardware.describe(torch.device("cpu")).startswith("Apple M2 Pro, ")
    assert commands[0] == ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]


def test_usable_cores_are_those_of_the_process_or_all_on_macos(monkeypatch):
    assert hardware.usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert hardware.usable_cores() == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert hardware.usable_cores() == 1


@pytest.mark.parametrize(
    ("cuda", "mps", "default", "refused", "words"),
    [
        (False, False, "cpu", "mps", "--device must be cpu, because torch sees no MPS device, got mps"),
        (False, False, "cpu", "cuda", "--device must be cpu, because torch sees no GPU, got cuda"),
        (False, True, "cpu", "cuda:1", "--device must be cpu or mps, because torch sees no GPU, got cuda:1"),
        (True, False, "cuda", "mps", "--device must be cpu or cuda, because torch sees no MPS device, got mps"),
    ],
)
def test_a_device_is_one_that_torch_sees_and_mps_is_never_the_default(monkeypatch, cuda, mps, default, refused, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert hardware.pick_device(None) == torch.device(default)
    with pytest.raises(ValueError, match=f"^{words}$"):
        hardware.pick_device(refused)
    if mps:
        assert hardware.pick_device("mps") == torch.device("mps")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="--device must be cpu on several ranks"):
            hardware.pick_device("mps")
