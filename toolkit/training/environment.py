"""What surrounds the process: variables set by launchers, the precision that follows, devices, versions, compilers."""

import ctypes
import importlib.util
import os
import platform
import resource
import shutil
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch._functorch import config as partitioner
from torch._inductor import config as inductor

from toolkit.config import Precision
from toolkit.data.workers import usable_cores
from toolkit.errors import UserError
from toolkit.model.product import cpu_has_bf16

_VERSIONS_OF = ("torch", "accelerate", "numpy", "safetensors", "tiktoken", "gpt2-toolkit")
_FALSE = ("", "no", "false", "0")
_TRUE = ("y", "yes", "t", "true", "on", "1")  # as Accelerate reads its variables

# Bytes from which a block of memory has, in a run's first step on a CPU, a mapping of its own.
_LARGE_BLOCK = 2**20

# A device without memory, as libraries say it that do not go through torch's allocator: for torch plain RuntimeErrors. The
# last is torch's own sentence, within an error of torch.compile.
# Source: the status codes of cuBLAS and cuDNN; cudaErrorMemoryAllocation's text; Triton's driver.c.
_SIGNS_OF_NO_MEMORY = (
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory"),
    *("Triton Error [CUDA]: out of memory", "CUDA out of memory"),
    "DefaultCPUAllocator: can't allocate memory",
)


def refuse_environment() -> None:
    """Refuses what a launcher or a user's Accelerate configuration sets behind the recipe's back.

    Raises: UserError naming the variable and what to do instead.
    """
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise UserError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={accumulation} would override the accumulation that follows from "
            "tokens_per_step and micro_batch_size; unset it and change --training.micro-batch-size instead"
        )
    for name, what in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism configuration"),
    ):
        if os.environ.get(name, "").lower() not in _FALSE:
            raise UserError(
                f"{name}={os.environ[name]} asks for {what}, which this toolkit does not use; launch with plain DDP"
            )
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() not in _FALSE:
        raise UserError(f"ACCELERATE_DYNAMO_BACKEND={dynamo} is ignored here; use --training.compile on instead")


def cpu_is_asked_for() -> bool:
    """True if the launcher, or a variable, has Accelerate train on the CPU whatever other device there is."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in _TRUE


def resolve_precision(asked: Literal["auto", "fp32", "bf16", "fp16"]) -> Precision:
    """The precision of the products: from the recipe, else from the launcher, else what the device does best.

    Raises: UserError if recipe and launcher contradict each other, or the device cannot do what is asked.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    launched: Precision | None = None
    if launcher in ("bf16", "fp16"):
        launched = "bf16" if launcher == "bf16" else "fp16"
    elif launcher not in _FALSE:
        raise UserError(f"--mixed_precision {launcher} of the launcher is not supported; use bf16, fp16 or no")
    if asked != "auto" and launched is not None and asked != launched:
        raise UserError(
            f"--training.precision {asked} contradicts --mixed_precision {launched} of accelerate launch; give one, or both the same"
        )
    cuda = torch.cuda.is_available() and not cpu_is_asked_for()
    if asked != "auto":
        precision: Precision = asked
    elif launched is not None:
        precision = launched
    elif cuda:
        precision = "bf16" if _native_bf16() else "fp16"
    else:
        precision = "fp32"
    if precision == "fp16" and not cuda:
        raise UserError(
            "precision fp16 needs a GradScaler, which acts on CUDA only: here gradients would underflow unseen; "
            "use --training.precision bf16 or fp32"
        )
    if precision == "bf16" and cuda and not _native_bf16():
        raise UserError(
            f"{torch.cuda.get_device_name()} does not compute bf16 natively; use --training.precision fp16 or fp32"
        )
    return precision


def _native_bf16() -> bool:
    """True on CUDA devices with bf16 tensor cores (compute capability 8.0 and later), not merely an emulation."""
    return torch.cuda.get_device_capability()[0] >= 8


def slow_precision(precision: Precision, device: torch.device) -> str | None:
    """A line to say where 16 bits bring no speed; None elsewhere."""
    if precision != "bf16" or device.type != "cpu" or cpu_has_bf16():
        return None
    return (
        "this CPU has no bf16 instructions: its products are computed in fp32 from numbers rounded to bf16, which takes no "
        "less time than --training.precision fp32"
    )


def idle_cores(device: torch.device) -> str | None:
    """A line to say where at least half of the cores have nothing to do, because a launcher gave each process one thread.

    Why: `accelerate launch` and torchrun do so unless told otherwise, and training takes as many times longer.
    """
    cores = min(usable_cores(), psutil.cpu_count(logical=False) or usable_cores())
    threads, processes = torch.get_num_threads(), _local_processes()
    if device.type != "cpu" or 2 * threads * processes > cores:
        return None
    return (
        f"{threads * processes} of this machine's {cores} cores will train: more threads are given with OMP_NUM_THREADS="
        f"{cores // processes}, or by `accelerate launch --num_cpu_threads_per_process {cores // processes}`"
    )


def device_name(device: torch.device) -> str:
    """The device's name as its maker gives it; for a CPU its architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def device_memory_bytes(device: torch.device) -> int:
    """Memory that one process may count on: the device's; of a CPU's, its part of what the machine has free now."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return int(psutil.virtual_memory().available) // _local_processes()


def _local_processes() -> int:
    """Processes of this run on this machine, as its launcher says; 1 without one."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not said.isdecimal() or int(said) < 1:
        raise UserError(f"LOCAL_WORLD_SIZE={said} is no number of processes; unset it, launchers set it by themselves")
    return int(said)


def library_versions() -> dict[str, str]:
    """Python's and the main libraries' versions, for the records of a run."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _VERSIONS_OF}


def compile_problem(device: torch.device) -> str | None:
    """Why `torch.compile` cannot work here, or None: it needs a C++ compiler and Python's headers, on CUDA also Triton."""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    if not any(name and shutil.which(name) for name in compilers):
        return "no C++ compiler found (looked for $CXX, g++, clang++, cl)"
    if not any((Path(folder) / "Python.h").exists() for folder in _header_folders()):
        return "Python's headers are not installed (python3-dev or python3-devel of the system's packages)"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def _header_folders() -> list[str]:
    """Where Python.h may lie: the second folder is that of a framework on macOS."""
    return [sysconfig.get_path("include"), f"{sysconfig.get_config_var('prefix')}/Headers"]


def should_compile(asked: Literal["auto", "on", "off"], device: torch.device) -> tuple[bool, str | None]:
    """(compile or not, a line to say about it or None).

    Raises: UserError if compilation was asked for explicitly and cannot work.
    """
    if asked == "off" or (asked == "auto" and device.type != "cuda"):
        return False, None
    problem = compile_problem(device)
    if problem is None:
        return True, None
    if asked == "on":
        raise UserError(f"--training.compile on cannot work here: {problem}; install it or use --training.compile off")
    return False, f"not compiling: {problem}"


def configure_torch(device: torch.device, *, deterministic: bool) -> None:
    """Settings of torch, and of the allocator below it, that hold for the whole process; before the model is made."""
    if device.type == "cpu":
        # Fixed, since glibc would raise it to 32 MiB as blocks are freed; until `keep_freed_memory`.
        _mallopt(-3, _LARGE_BLOCK)  # M_MMAP_THRESHOLD
        # Tensors of 2 MiB and more in huge pages, where the kernel gives them to those who ask: a third of the page faults of
        # the second step, an eager step in 3 % less time, and a peak of 4.8 GiB, not 5.2 (GPT-2 124M, bf16, 2 AMX cores;
        # the peak with 8 x 1024 tokens). torch reads it when it first allocates a tensor's memory.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if device.type == "cuda":
        # fp32 products on tensor cores, with 10 bits of mantissa: what "fp32" training means on Ampere and later.
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    # Under torch.compile: the outputs of GELU and LayerNorm are computed again from their inputs, which are kept anyway,
    # where the backward pass's products need them, and so are 16-bit weights. A third less is kept from the forward pass
    # (GPT-2 124M, bf16, 8 x 1024 tokens: 1.7 GiB, not 2.7) for about 1 % of a step's time (2 AVX2 cores, fp32).
    partitioner.ban_recompute_materialized_backward = False
    # So are sums of the residual stream, from what was added in 16 bits: again 0.2 GiB of 1.7, for at most 3 % of a step's
    # time (bf16 on 2 AMX cores). Not measured on CUDA.
    partitioner.ban_recompute_used_far_apart = device.type != "cpu"
    # tanh from an exponential, in generated code for CPUs: GELU and its derivative in half to two thirds of the time.
    inductor.cpp.use_decompose_tanh = True
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; deterministic needs it
        torch.use_deterministic_algorithms(True)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device had no memory left for what was asked, be it torch or a library under it that says so."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS_OF_NO_MEMORY)


def keep_freed_memory(device: torch.device) -> None:
    """Lets glibc keep large blocks that are freed instead of giving them back to the kernel and faulting them in anew.

    Call it after the first step. Until then large blocks have mappings of their own (`configure_torch`), so that the small
    ones which that step leaves behind for good, of oneDNN and of compiled code, lie together and not between the
    activations, whose room they would divide ever after.
    Why: activations of some megabytes come and go in every step. On 2 AVX2 cores, half of the time of an eager step that
    is not matrix products went into page faults; a whole fp32 step took 12 % less CPU time with this. It costs 5 to 13 %
    more resident memory; from the first step on it would be 27 to 42 % (GPT-2 124M, bf16, 8 x 1024 tokens).
    Source: mallopt(3), M_TRIM_THRESHOLD and M_MMAP_MAX.
    """
    if device.type == "cpu":
        _mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        _mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large allocation


def _mallopt(parameter: int, value: int) -> None:
    """A setting of glibc's allocator; other C libraries have none."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(parameter, value)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far [GiB of 2**30 bytes]: of tensors on CUDA, of the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts bytes, Linux KiB
