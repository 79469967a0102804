"""A device's peak is that of its own data sheet, or none."""
from __future__ import annotations

import pytest

from dpo_dist.run.perf import sheet_tflops


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
    ("NVIDIA GH200 480GB", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312),
    ("A100-PCIE-40GB", 312), ("NVIDIA B300 SXM6 AC", 2250), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
    ("NVIDIA A10", 125), ("NVIDIA A40", 150), ("NVIDIA GeForce RTX 4090", 165), ("AMD Instinct MI300X", 1307)])
def test_a_device_has_the_peak_of_its_name(name: str, peak: int):
    assert sheet_tflops(name) == peak


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA A10G", "NVIDIA RTX A4000", "NVIDIA H800 PCIe",
                                  "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA",
                                  ""])
def test_a_device_that_only_resembles_a_known_one_has_no_known_peak(name: str):
    assert sheet_tflops(name) is None
