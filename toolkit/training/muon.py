"""Muon on the blocks' matrices and AdamW on everything else, as one torch.optim.Optimizer with one `step`.

Why one object: two prepared optimizers under one GradScaler have the second's gradients unscaled twice, and one object has
one state, one learning rate call and one place in a checkpoint.

Layout. GPT-2 stores weights as (in, out), Muon's rate factor sqrt(max(1, out / in)) assumes (out, in). So `torch.optim.Muon`
is handed transposed views, and the original factor applies as published: 2 for mlp.c_fc, 1 for the others. The
fused attn.c_attn is three matrices side by side, (C, 3C); query, key and value are orthogonalised each on its own, as
three square matrices: one orthogonal (3C, C) matrix would tie the scales of the three together.

Several processes: DDP has already averaged the gradients, so every process computes the same update from the same
numbers. The work is repeated rather than shared out: 24 ms for GPT-2 124M on an H100, 2 % of a step of 2**19 tokens there, most
of it the time to start many small kernels.

Arithmetic. torch iterates in bf16. A CPU without instructions for it computes such products one number at a time; there
the operands are widened, multiplied in fp32 and the product rounded to bf16 again, which is what bf16 units do.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.config import OptimizerConfig
from toolkit.errors import UserError
from toolkit.training.environment import cpu_has_bf16

BLOCK_PREFIX = (
    "h."  # GPT-2's name for its blocks; embeddings are lookup tables, to which Muon's argument does not apply
)
FUSED_QKV_SUFFIX = "attn.c_attn.weight"

# Newton-Schulz as published: five steps of the quintic iteration whose coefficients are steepest at zero.
_NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NS_STEPS = 5
_NS_EPS = 1e-7  # added to the norm that the gradient is divided by


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
        "nesterov": True,
        "ns_coefficients": _NS_COEFFICIENTS,
        "ns_steps": _NS_STEPS,
        "eps": _NS_EPS,
        "adjust_lr_fn": "original",
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
        self._muon = torch.optim.Muon([torch.zeros(1, 1)])  # its parameters are the views made at each step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_muon([group for group in self.param_groups if group["algorithm"] == "muon"])
        # Set anew each time: load_state_dict replaces the groups, and the state with them.
        self._adamw.param_groups = [group for group in self.param_groups if group["algorithm"] == "adamw"]
        self._adamw.state = self.state
        self._adamw.step()
        return loss

    def _step_muon(self, groups: Sequence[dict[str, Any]]) -> None:
        self._muon.param_groups = []
        self._muon.state.clear()
        for group in groups:
            views = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                whole = (parameter.detach(), parameter.grad, state["momentum_buffer"])
                for weight, gradient, momentum in zip(
                    *(tensor.chunk(group["parts"], dim=1) for tensor in whole), strict=True
                ):
                    view = weight.T  # (in, out) -> (out, in)
                    view.grad = gradient.T
                    self._muon.state[view] = {"momentum_buffer": momentum.T}
                    views.append(view)
            self._muon.param_groups.append(group | {"params": views})
        with _fast_products(groups):
            self._muon.step()  # type: ignore[no-untyped-call]
        self._muon.param_groups = []  # no view of a gradient outlives the step
        self._muon.state.clear()


def _fast_products(groups: Sequence[Mapping[str, Any]]) -> AbstractContextManager[Any]:
    """Where the weights are on a CPU that has no fast bf16 products: the same products by way of fp32."""
    on_cpu = any(parameter.device.type == "cpu" for group in groups for parameter in group["params"])
    return _WideProducts() if on_cpu and not cpu_has_bf16() else nullcontext()  # type: ignore[no-untyped-call]


class _WideProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Matrix products of bf16 tensors on a CPU, summed in fp32 and rounded to bf16 once at the end.

    Why: Muon's update of 5 million parameters took 10.4 s on two AVX2 cores, and takes 0.34 s so (torch 2.13, November 2026).
    """

    _PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default})

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function not in self._PRODUCTS or args[0].dtype != torch.bfloat16 or args[0].device.type != "cpu":
            return function(*args, **(kwargs or {}))
        return function(*(tensor.float() for tensor in args), **(kwargs or {})).bfloat16()
