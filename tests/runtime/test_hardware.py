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
        ("Tesla T4", None),
    ],
)
def test_bandwidths_are_found_by_name(name, gigabytes):
    found = hardware.gpu_bandwidth(name)
    assert found == (None if gigabytes is None else pytest.approx(gigabytes * 1e9))


def test_a_cpu_is_measured():
    peak = hardware.cpu_peak(0.05)
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
