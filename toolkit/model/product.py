"""Matrix products in the data type that autocast asks for, also where a CPU has no instructions for it.

Guarantees operands and results of that type. On a GPU, and in fp32, this is torch's own product; so it is on a CPU with bf16
instructions, but for products on AMX units of which torch leaves one of two threads nothing (`_leaves_a_thread_idle`). On
other CPUs torch computes bf16 products one number at a time (GPT-2 124M's shapes, 2 AVX2 cores: 1 to 35 GFLOP/s, and 140 in
fp32).
There the rounded operands are multiplied in fp32, which holds a product of two bf16 numbers exactly, and the result is
rounded: the same numbers but for the order of the sums.

Sizes: N positions, I and O the width that comes in and goes out.
"""

from typing import Any

import torch
from torch import Tensor


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def cpu_has_bf16() -> bool:
    """True if this CPU has instructions for bf16 products, or oneDNN makes up for them."""
    units: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return units and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cpu_widens(dtype: torch.dtype) -> bool:
    """True if this CPU multiplies numbers of this type in fp32."""
    return dtype == torch.bfloat16 and not cpu_has_bf16()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def cpu_units() -> str:
    """What this CPU multiplies bf16 matrices with: "amx_bf16", "avx512_bf16", or "" for anything else."""
    capabilities = torch.cpu.get_capabilities()
    return next((units for units in ("amx_bf16", "avx512_bf16") if capabilities.get(units)), "")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def num_threads() -> int:
    """Threads of one operation."""
    return torch.get_num_threads()


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The data type of a product of `tensor`: autocast's where it is on, else the tensor's own."""
    device_type = tensor.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else tensor.dtype


def affine(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows @ weight + bias, in the data type that autocast asks for, with gradients.

    Shapes: rows (..., I), weight (I, O), bias (O,) -> (..., O).
    """
    dtype = product_dtype(rows)
    flat = rows.reshape(-1, rows.size(-1))  # (N, I)
    if dtype == torch.bfloat16 and rows.device.type == "cpu":
        cast_bias = None if bias is None else bias.to(dtype)
        out: Tensor = _AffineOnCPU.apply(flat.to(dtype), weight.to(dtype), cast_bias)  # type: ignore[no-untyped-call]
    else:
        out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return out.view(*rows.shape[:-1], out.size(-1))


def operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` rounded to `dtype`, in the type in which this device multiplies such numbers: for `multiply`."""
    rounded = tensor.to(dtype)
    return rounded.float() if in_fp32(dtype, rounded) else rounded


def multiply(left: Tensor, right: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """left @ right + bias of two operands, rounded to `dtype`; without gradients. Shapes: (N, I), (I, O), (O,) -> (N, O)."""
    if left.dtype == dtype:
        halves = left.chunk(2) if _leaves_a_thread_idle(left, right) else (left,)
        products = [half @ right if bias is None else torch.addmm(bias, half, right) for half in halves]
        return products[0] if len(products) == 1 else torch.cat(products)
    with torch.autocast(left.device.type, enabled=False):  # it would have them back in 16 bits
        return (left @ right if bias is None else torch.addmm(bias.float(), left, right)).to(dtype)


def _leaves_a_thread_idle(left: Tensor, right: Tensor) -> bool:
    """True where one of two threads would do all the work, and two products of half the rows keep both busy.

    Why: oneDNN does not divide such products of bf16 on AMX units between two threads, how deep they may be; between four or
    eight it does, and a transposed `left` as well (torch 2.13). With GPT-2 124M's shapes, halves take 0.5 to 0.65 of the time
    on 2 cores. With AVX-512's instructions for bf16 there is no such gap, and halves take 3 to 8 % longer.
    """
    if left.dtype != torch.bfloat16 or left.device.type != "cpu" or left.stride(-1) != 1 or num_threads() != 2:
        return False
    return cpu_units() == "amx_bf16" and 640 <= left.size(0) <= 1280 and 512 <= right.size(1) <= 1024


def in_fp32(dtype: torch.dtype, tensor: Tensor) -> bool:
    """Whether products of `dtype` are computed in fp32 on the device of `tensor`."""
    return tensor.device.type == "cpu" and cpu_widens(dtype)


class _AffineOnCPU(torch.autograd.Function):
    """rows @ weight + bias of 16-bit operands, and its gradients; what is kept for the backward pass has 16 bits, too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.has_bias = bias is not None
        return multiply(operand(rows, rows.dtype), operand(weight, rows.dtype), rows.dtype, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        dtype = rows.dtype
        grad = operand(grad_outputs[0], dtype)  # (N, O)
        rows_grad = multiply(grad, operand(weight, dtype).t(), dtype)
        weight_grad = multiply(operand(rows, dtype).t(), grad, dtype)
        bias_grad = grad.sum(0).to(dtype) if ctx.has_bias else None
        return rows_grad, weight_grad, bias_grad
