"""Peak rates of GPUs, for the share of them that a training step uses."""

from __future__ import annotations

# Name as the driver gives it (searched in this order, ignoring case) -> dense bf16 tensor-core TFLOP/s by
# the makers' data sheets (without sparsity). A GPU that is not here gets no MFU rather than a guess.
PEAK_BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB300", 2500.0),
    ("B300", 2250.0),
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.0),
    ("RTX A6000", 154.8),
    ("MI325X", 1307.0),
    ("MI300X", 1307.0),
    ("MI250X", 383.0),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one GPU by its name; None where the table does not have it."""
    lowered = device_name.lower()
    for name, tera in PEAK_BF16_TFLOPS:
        if name.lower() in lowered:
            return tera * 1e12
    return None
