"""Muon on the blocks' matrices and AdamW on everything else, as one torch.optim.Optimizer with one `step`.

Why one object: two prepared optimizers under one GradScaler have the second's gradients unscaled twice, and one object has
one state, one learning rate call and one place in a checkpoint.

Why not `torch.optim.Muon` itself: it takes one matrix after the other, always in bf16. Here matrices of one shape go through
every product together: the update is torch's (a test compares them) with a number of kernels that does not grow with the
layers. On two AVX2 cores a step takes 25 ms instead of 48 for 4 layers of width 128, 84 instead of 117 for width 208; for
GPT-2 124M, where the products alone decide, 12 s either way (torch 2.13, November 2026; torch's products widened to fp32).

Layout. GPT-2 stores weights as (in, out), Muon's rate factor sqrt(max(1, out / in)) assumes (out, in) and is computed so,
as published: 2 for mlp.c_fc, 1 for the others. The nearest orthogonal matrix of a transpose is the transpose of it, so
nothing else asks for the layout. The fused attn.c_attn is three matrices side by side, (C, 3C); query, key and value are
orthogonalised each on its own, as three square matrices: one orthogonal (3C, C) matrix would tie their scales together.

Several processes: DDP has already averaged the gradients, so every process computes the same update from the same
numbers. The work is repeated rather than shared out: of a step of 2**19 tokens of GPT-2 124M on an H100 it was 2 % even with
torch's loop.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.config import OptimizerConfig
from toolkit.errors import UserError

BLOCK_PREFIX = (
    "h."  # GPT-2's name for its blocks; embeddings are lookup tables, to which Muon's argument does not apply
)
FUSED_QKV_SUFFIX = "attn.c_attn.weight"

# Newton-Schulz as published: five steps of the quintic iteration whose coefficients are steepest at zero.
_NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NS_STEPS = 5
_NS_EPS = 1e-7  # the least norm that a gradient is divided by

# Elements that are orthogonalised together: enough to keep a large GPU busy, and at most some 400 MB beside the weights.
_BATCH_ELEMENTS = 2**24


def muon_groups(named_parameters: Sequence[tuple[str, Tensor]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """The parameter groups that Muon updates: the blocks' matrices, the fused query-key-value ones in a group of their own.

    Raises: UserError if there are none.
    """
    matrices = [(name, p) for name, p in named_parameters if name.startswith(BLOCK_PREFIX) and p.ndim == 2]
    if not matrices:
        raise UserError(
            f"optimizer.name=muon needs matrices in blocks named {BLOCK_PREFIX}*, and this model has none among its "
            f"{len(named_parameters)} parameters; use --optimizer.name adamw"
        )
    settings = {
        "algorithm": "muon",
        "lr": config.muon_learning_rate,
        "peak_learning_rate": config.muon_learning_rate,
        "weight_decay": config.muon_weight_decay,
        "momentum": config.muon_momentum,
        "ns_coefficients": _NS_COEFFICIENTS,
        "ns_steps": _NS_STEPS,
        "eps": _NS_EPS,
    }
    fused = [p for name, p in matrices if name.endswith(FUSED_QKV_SUFFIX)]
    single = [p for name, p in matrices if not name.endswith(FUSED_QKV_SUFFIX)]
    groups = [
        settings | {"name": "muon", "params": single, "parts": 1},
        settings | {"name": "muon_qkv", "params": fused, "parts": 3},
    ]
    return [group for group in groups if group["params"]]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon's groups and AdamW's groups in one optimizer; `param_groups`, `state` and `state_dict` hold both.

    Why no `_step_supports_amp_scaling`: with it a GradScaler would leave skipping to us, and Muon has no kernel that
    looks at the flag on the device. Without it the scaler reads the flag and skips the whole step, at the price of one host
    synchronisation in fp16; bf16 and fp32 have no scaler and do not pay it.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], adamw: torch.optim.AdamW) -> None:
        super().__init__([*groups, *adamw.param_groups], {})
        self._adamw = adamw

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                for parameters in _batches(group["params"]):
                    self._step_muon(parameters, group)
        # Set anew each time: load_state_dict replaces the groups, and the state with them.
        self._adamw.param_groups = [group for group in self.param_groups if group["algorithm"] == "adamw"]
        self._adamw.state = self.state
        self._adamw.step()
        return loss

    def _step_muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One update of matrices of one shape (in, out): Nesterov's momentum, orthogonalised; decay apart from it."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        momenta = [self._momentum(parameter) for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))
        matrices = torch.cat(directions.chunk(group["parts"], dim=2))  # (parts * N, in, out / parts)
        orthogonal = orthogonalize(
            matrices, coefficients=group["ns_coefficients"], steps=group["ns_steps"], eps=group["eps"]
        )
        updates = torch.cat(orthogonal.to(directions.dtype).chunk(group["parts"]), dim=2)
        rate, (rows, columns) = group["lr"], matrices.shape[1:]
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        torch._foreach_add_(parameters, updates.unbind(), alpha=-rate * math.sqrt(max(1, columns / rows)))

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        momentum: Tensor = state["momentum_buffer"]
        return momentum


def _batches(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters that have a gradient, in lists of one shape and at most _BATCH_ELEMENTS (or of one parameter)."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_shape.setdefault(parameter.shape, []).append(parameter)
    for shape, alike in by_shape.items():
        size = max(1, _BATCH_ELEMENTS // shape.numel())
        for first in range(0, len(alike), size):
            yield alike[first : first + size]


def orthogonalize(matrices: Tensor, *, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """About the nearest semi-orthogonal matrix to each of (N, rows, columns), by Newton and Schulz's iteration.

    X <- (a + b X X^T + c (X X^T)^2) X, `steps` times, from X of Frobenius norm 1: each singular value grows towards 1, with
    the published coefficients to between 0.5 and 1.5. Accelerators iterate in bf16, in which they are fastest, CPUs in
    fp32, since many are slow in bf16.

    What the iteration lets grow, the smallest singular values up to 3.4445**5 = 485 times, is also the rounding of the
    gradient, which is another for other micro-batches and numbers of processes. In fp32 their losses stay within 1e-5 of
    each other for 50 to 200 steps, and then differ by 1e-4 to 1e-2 after 300 (models of one and two layers); with AdamW by 5e-7.
    Iterating in fp64 changes nothing in this: the gradients' own rounding is what grows.
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x.to(torch.float32 if x.device.type == "cpu" else torch.bfloat16)
    x = x / x.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
