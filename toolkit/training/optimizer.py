"""The optimizer, its learning rate, and its state by parameter name: (model, OptimizerConfig) -> torch.optim.Optimizer.

AdamW with weight decay on matrices and embeddings only, or Muon on the blocks' matrices with AdamW on the rest; either way one
optimizer object with one `step`. Its state leaves as tensors named after the parameters and plain JSON values, and
comes back only if every name, shape, data type and hyperparameter fits: `torch.optim.Optimizer.load_state_dict` matches
by position, without looking at shapes.

It does not clip, does not decide the rate (see `schedule`) and writes no files (see `checkpoint`).
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from toolkit.config import OptimizerConfig
from toolkit.errors import UserError
from toolkit.model.gpt2 import cut
from toolkit.training.muon import MuonWithAdamW, muon_groups

# Devices whose AdamW updates all tensors of a group in one kernel. On a CPU too: 47M parameters take a third of the time
# that the loop over tensors takes (57 and 180 ms, one thread, torch 2.13, November 2026). The fused AdamW also skips by
# itself, without asking the host, when a GradScaler has found an infinity.
FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})

# What each algorithm keeps for a parameter; all but AdamW's `step` (a scalar) have the parameter's shape.
STATE_KEYS = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}

# The group's settings that state is only valid with; a checkpoint records them and `load_optimizer` compares them.
_HYPERPARAMETERS = {
    "adamw": ("betas", "eps", "weight_decay"),
    "muon": ("momentum", "nesterov", "ns_coefficients", "ns_steps", "eps", "weight_decay", "adjust_lr_fn", "parts"),
}


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, device_type: str) -> torch.optim.Optimizer:
    """The optimizer for a model that lives on, or is about to be moved to, a device of this type.

    Every group has a "name", its "algorithm" ("adamw" or "muon") and its "peak_learning_rate".
    Why: biases and LayerNorm gains have no scale that decay could control, so only tensors with two axes decay.
    Raises: UserError if Muon is asked for and the model has no matrices for it.
    Source: Brown et al. 2020, app. B (AdamW's settings); Jordan et al. 2024 (Muon).
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    hidden = muon_groups(named, config) if config.name == "muon" else []
    in_muon = {id(parameter) for group in hidden for parameter in group["params"]}
    rest = [parameter for _, parameter in named if id(parameter) not in in_muon]
    adamw = {"algorithm": "adamw", "lr": config.learning_rate, "peak_learning_rate": config.learning_rate}
    groups = [
        adamw | {"name": "decay", "params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        adamw | {"name": "no_decay", "params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device_type in FUSED_DEVICES,
    )
    return MuonWithAdamW(hidden, adam) if hidden else adam


def set_learning_rate(optimizer: torch.optim.Optimizer, multiplier: float) -> float:
    """Sets every group's rate to `multiplier` times its own peak, and returns AdamW's rate for the log."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_learning_rate"] * multiplier
    return cast(float, next(group["lr"] for group in optimizer.param_groups if group["algorithm"] == "adamw"))


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The state as "<parameter name>|<key>" -> tensor, without the padding rows of wte; empty before the first update.

    The tensors are the live ones, or views of them, on their own devices: copy them before the next step.
    """
    named = list(_named_parameters(optimizer, model))
    stateful = [name for name, parameter, _ in named if optimizer.state.get(parameter)]
    assert not stateful or len(stateful) == len(named), "some parameters were never updated"
    return {
        f"{name}|{key}": _canonical(name, key, optimizer.state[parameter][key], model)
        for name, parameter, algorithm in named
        for key in STATE_KEYS[algorithm]
        if stateful
    }


def optimizer_scalars(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Each group's settings by group name, as JSON values; `load_optimizer` wants all but the peak rate to be equal."""
    return {
        "groups": {
            group["name"]: _hyperparameters(group) | {"peak_learning_rate": group["peak_learning_rate"]}
            for group in optimizer.param_groups
        }
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> None:
    """Gives an optimizer, fresh or in use, the state that `optimizer_tensors` and `optimizer_scalars` described.

    Everything is checked before anything changes. The next step is the one that the saved optimizer would have
    made, to the bit; the device may be another.
    Raises: UserError if a name, shape, data type, step count or hyperparameter does not fit this optimizer.
    """
    problems = _scalar_problems(optimizer, scalars)
    if tensors:  # empty: saved before the first update
        problems += _tensor_problems(optimizer, model, tensors)
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"the saved optimizer state does not fit this model and recipe: {'; '.join(problems[:4])}{more}"
        )
    optimizer.state.clear()
    if not tensors:
        return
    for name, parameter, algorithm in _named_parameters(optimizer, model):
        for key in STATE_KEYS[algorithm]:
            value = _empty_state(optimizer, parameter, key)
            _canonical(name, key, value, model).copy_(tensors[f"{name}|{key}"])
            optimizer.state[parameter][key] = value


def _named_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """(name, parameter, algorithm) for everything that the optimizer updates, in the model's order."""
    algorithms = {id(p): group["algorithm"] for group in optimizer.param_groups for p in group["params"]}
    named = [(name, p) for name, p in model.named_parameters() if id(p) in algorithms]
    assert len(named) == len(algorithms), "the optimizer holds parameters that this model does not have"
    for name, parameter in named:
        yield name, parameter, algorithms[id(parameter)]


def _canonical(name: str, key: str, value: Tensor, model: nn.Module) -> Tensor:
    """The part of a state tensor that belongs to the published GPT-2 shapes, as a view."""
    return value if key == "step" else cut(name, value, cast(Any, model).config)


def _empty_state(optimizer: torch.optim.Optimizer, parameter: Tensor, key: str) -> Tensor:
    """A zero state tensor exactly as the algorithm itself would make it at its first step."""
    if key != "step":
        return torch.zeros_like(parameter, memory_format=torch.preserve_format)
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    # The fused kernels count on the device; the others on the host, where a launch for one scalar would cost more.
    device = parameter.device if group["fused"] or group["capturable"] else torch.device("cpu")
    return torch.zeros((), dtype=torch.float32, device=device)


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: group[key] for key in ("algorithm", *_HYPERPARAMETERS[group["algorithm"]])}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _scalar_problems(optimizer: torch.optim.Optimizer, scalars: Mapping[str, Any]) -> list[str]:
    saved = scalars.get("groups")
    ours = {group["name"]: _hyperparameters(group) for group in optimizer.param_groups}
    if not isinstance(saved, Mapping) or set(saved) != set(ours):
        found = sorted(saved) if isinstance(saved, Mapping) else saved
        return [f"parameter groups {found}, expected {sorted(ours)} (another --optimizer.name?)"]
    problems = []
    for name, wanted in ours.items():
        values = saved[name] if isinstance(saved[name], Mapping) else {}
        problems += [
            f"group {name} was trained with {key}={values.get(key)}, not {value}"
            for key, value in wanted.items()
            if values.get(key) != value
        ]
    return problems


def _tensor_problems(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    shapes = {
        f"{name}|{key}": () if key == "step" else tuple(_canonical(name, key, parameter, model).shape)
        for name, parameter, algorithm in _named_parameters(optimizer, model)
        for key in STATE_KEYS[algorithm]
    }
    problems = [f"{name} is missing" for name in shapes if name not in tensors]
    problems += [f"{name} is not expected" for name in tensors if name not in shapes]
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            problems.append(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected torch.float32 {shape}")
        elif name.endswith("|step") and not (tensor >= 0 and tensor == tensor.floor() and tensor.isfinite()):
            problems.append(f"{name}={tensor.item()} is not a number of updates")
    return problems
