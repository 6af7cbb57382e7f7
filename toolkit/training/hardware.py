"""What devices can do at most: device name and precision -> peak FLOP/s, and the memory that `toolkit plan` reckons with.

Dense products accumulated in fp32, because that is what training runs. Advertised figures are often twice
(accumulated in fp16) or four times (with sparsity) as high, and MFU against them would be flattering nonsense the
other way round. A device that is not in the table has no peak, and no MFU is shown for it rather than a wrong one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.config import Precision

# Sources, all by NVIDIA. GeForce: the architecture whitepapers' tensor cores and boost clocks, multiplied out below.
_TURING = "Turing whitepaper (2018)"
_AMPERE = "GA102 whitepaper v2 (2021) and product pages"
_ADA = "Ada whitepaper v2 (2023) and product pages"
_BLACKWELL = "RTX Blackwell whitepaper (2025) and product pages"


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One accelerator model: as CUDA names it, and at its advertised boost clock."""

    key: str  # what `toolkit plan --device` calls it
    cuda_name: str  # regular expression for the whole CUDA device name, without the maker's prefixes
    memory_gib: float  # nominal; where CUDA reports much less (ECC, decimal gigabytes), what it reports [GiB]
    half_tflops: float  # fp16 products, dense, fp32 accumulate; bf16 too where there is bf16 [TFLOP/s]
    fp32_tflops: float  # fp32 weights with TF32 products where there is TF32, plain fp32 elsewhere [TFLOP/s]
    has_bf16: bool
    source: str

    def peak_tflops(self, precision: Precision) -> float | None:
        """The most TFLOP/s in this precision; None where the device has no hardware for it."""
        if precision == "fp32":
            return self.fp32_tflops
        return self.half_tflops if self.has_bf16 or precision == "fp16" else None


def _geforce(key: str, cuda_name: str, memory_gib: float, *, tensor_cores: int, boost_mhz: int, source: str) -> Device:
    """A GeForce since Ampere: 64 fused multiply-adds a clock and tensor core with fp32 accumulate, half of it for TF32.

    Source: GA102 whitepaper v2, table 2 (RTX 3090: 328 cores, 1,695 MHz, 71 TFLOP/s); llm.c's llmc/mfu.h (RTX 3060: 25.5).
    """
    tflops = tensor_cores * 64 * 2 * boost_mhz * 1e6 / 1e12
    return Device(
        key=key,
        cuda_name=cuda_name,
        memory_gib=memory_gib,
        half_tflops=tflops,
        fp32_tflops=tflops / 2,
        has_bf16=True,
        source=source,
    )


def _datacenter(
    key: str, cuda_name: str, memory_gib: float, tflops: float, *, source: str, fp32: float | None = None
) -> Device:
    """A workstation or server part. With TF32 at half the 16-bit rate, unless `fp32` says that it has no TF32 (nor bf16)."""
    return Device(
        key=key,
        cuda_name=cuda_name,
        memory_gib=memory_gib,
        half_tflops=tflops,
        fp32_tflops=tflops / 2 if fp32 is None else fp32,
        has_bf16=fp32 is None,
        source=source,
    )


DEVICES: Sequence[Device] = (
    _geforce("rtx3060", "RTX 3060", 12, tensor_cores=112, boost_mhz=1777, source=_AMPERE),
    _geforce("3060-ti", "RTX 3060 Ti", 8, tensor_cores=152, boost_mhz=1665, source=_AMPERE),
    _geforce("3070", "RTX 3070", 8, tensor_cores=184, boost_mhz=1725, source=_AMPERE),
    _geforce("3080", "RTX 3080", 10, tensor_cores=272, boost_mhz=1710, source=_AMPERE),
    _geforce("3090", "RTX 3090", 24, tensor_cores=328, boost_mhz=1695, source=_AMPERE),
    _geforce("3090-ti", "RTX 3090 Ti", 24, tensor_cores=336, boost_mhz=1860, source=_AMPERE),
    _geforce("4060", "RTX 4060", 8, tensor_cores=96, boost_mhz=2460, source=_ADA),
    _geforce("4060-ti", "RTX 4060 Ti", 8, tensor_cores=136, boost_mhz=2535, source=_ADA),
    _geforce("4060-ti-16gb", "RTX 4060 Ti", 16, tensor_cores=136, boost_mhz=2535, source=_ADA),
    _geforce("4070", "RTX 4070", 12, tensor_cores=184, boost_mhz=2475, source=_ADA),
    _geforce("4070-super", "RTX 4070 SUPER", 12, tensor_cores=224, boost_mhz=2475, source=_ADA),
    _geforce("4070-ti", "RTX 4070 Ti", 12, tensor_cores=240, boost_mhz=2610, source=_ADA),
    _geforce("4070-ti-super", "RTX 4070 Ti SUPER", 16, tensor_cores=264, boost_mhz=2610, source=_ADA),
    _geforce("4080", "RTX 4080", 16, tensor_cores=304, boost_mhz=2505, source=_ADA),
    _geforce("4080-super", "RTX 4080 SUPER", 16, tensor_cores=320, boost_mhz=2550, source=_ADA),
    _geforce("4090", "RTX 4090", 24, tensor_cores=512, boost_mhz=2520, source=_ADA),
    _geforce("5070", "RTX 5070", 12, tensor_cores=192, boost_mhz=2512, source=_BLACKWELL),
    _geforce("5070-ti", "RTX 5070 Ti", 16, tensor_cores=280, boost_mhz=2452, source=_BLACKWELL),
    _geforce("5080", "RTX 5080", 16, tensor_cores=336, boost_mhz=2617, source=_BLACKWELL),
    _geforce("5090", "RTX 5090", 32, tensor_cores=680, boost_mhz=2407, source=_BLACKWELL),
    _datacenter("2080-ti", "RTX 2080 Ti", 11, 53.8, fp32=13.4, source=_TURING),
    _datacenter("t4", "T4", 15, 65.0, fp32=8.1, source="T4 datasheet; 16 GB less ECC"),
    _datacenter("v100", "V100-SXM2-(16|32)GB", 16, 125.0, fp32=15.7, source="V100 datasheet, SXM2"),
    _datacenter("a10", "A10", 22.5, 125.0, source="A10 datasheet; 24 GB less ECC"),
    _datacenter("a40", "A40", 45, 149.7, source="A40 datasheet; 48 GB less ECC"),
    _datacenter("a6000", "RTX A6000", 48, 154.8, source="GA102 whitepaper v2, table of RTX A6000"),
    _datacenter("a100", "A100(-SXM4-80GB| 80GB PCIe)", 79, 312.0, source="A100 datasheet"),
    _datacenter("a100-40gb", "A100-(SXM4|PCIE)-40GB", 39.4, 312.0, source="A100 datasheet"),
    _datacenter("l4", "L4", 22.5, 121.0, source="L4 datasheet, without sparsity; 24 GB less ECC"),
    _datacenter("l40s", "L40S", 45, 362.0, source="L40S datasheet, without sparsity; 48 GB less ECC"),
    _datacenter("6000-ada", "RTX 6000 Ada Generation", 48, 364.2, source="RTX 6000 Ada datasheet, without sparsity"),
    _datacenter("h100", "H100 80GB HBM3", 79, 989.4, source="H100 datasheet, SXM5, without sparsity"),
    _datacenter("h100-pcie", "H100 PCIe", 79, 756.0, source="H100 datasheet, PCIe, without sparsity"),
    _datacenter("h200", "H200", 139.7, 989.4, source="H200 datasheet, SXM, without sparsity"),
    _datacenter("b200", "B200", 178, 2250.0, source="B200 datasheet, without sparsity"),
)

_PREFIXES = re.compile(r"^(NVIDIA |GeForce |Tesla |Quadro )+")


def find_device(key: str) -> Device | None:
    """The device that `toolkit plan --device` calls `key`: with or without "rtx", in any case; None if there is none."""
    wanted = key.lower().replace("_", "-").replace(" ", "-").removeprefix("rtx").lstrip("-")
    return next((device for device in DEVICES if device.key.removeprefix("rtx") == wanted), None)


def match_cuda_name(device_name: str) -> Device | None:
    """The device that CUDA calls `device_name`; None for an unknown one, a laptop's part or a slice of one (MIG).

    Why: the whole name has to fit. "RTX 3060 Laptop GPU" is another chip than the RTX 3060.
    """
    name = _PREFIXES.sub("", device_name)
    return next((device for device in DEVICES if re.fullmatch(device.cuda_name, name)), None)


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Peak FLOP/s of the device that CUDA calls `device_name`; None for a CPU or a device that is not in the table."""
    device = match_cuda_name(device_name)
    tflops = device.peak_tflops(precision) if device else None
    return None if tflops is None else tflops * 1e12
