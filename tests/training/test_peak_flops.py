"""The denominator of MFU: data sheets by the device's whole name, a matrix product for everything else."""

import pytest
import torch

from minimind.training import peak_flops as module
from minimind.training.peak_flops import measure_peak, peak_flops


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA GH200 480GB", 989e12, 67e12),
        ("NVIDIA H20", 148e12, 44e12),
        ("NVIDIA GB200", 2500e12, 80e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 19.5e12),
        ("NVIDIA A10G", 70e12, 35e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("Tesla V100-SXM2-32GB", 112e12, 14e12),
        ("Tesla T4", 65e12, 8.1e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
    ],
)
def test_data_sheets(monkeypatch, name, half, single):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = torch.device("cuda", 0)
    assert peak_flops(device, torch.bfloat16)[0] == peak_flops(device, torch.float16)[0] == half
    assert peak_flops(device, torch.float32)[0] == single
    assert "data sheet" in peak_flops(device, torch.float32)[1]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A4000",
        "NVIDIA RTX A1000 Laptop GPU",
        "NVIDIA T400 4GB",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "Some Other Device",
    ],
)
def test_a_device_that_only_sounds_alike_is_measured(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(module, "measure_peak", lambda device, dtype: 5.0)
    assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == (5.0, "measured by a matmul")


def test_the_measurement_takes_the_best_rate_and_stops_where_it_takes_long(monkeypatch):
    sizes = []

    def slow_from_512(device, dtype, size):
        sizes.append(size)
        return {128: 1e-4, 256: 4e-4, 512: 0.1}[size]

    monkeypatch.setattr(module, "_time_matmul", slow_from_512)
    assert measure_peak.__wrapped__(torch.device("cpu"), torch.float32) == 2 * 256**3 / 4e-4
    assert sizes == [128, 256, 512]


def test_this_cpu_is_measured_once():
    first = peak_flops(torch.device("cpu"), torch.float32)
    assert first[0] > 1e8 and first == peak_flops(torch.device("cpu"), torch.float32)
