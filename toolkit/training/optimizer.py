"""The optimizer, its learning rate, and its state by parameter name: (model, OptimizerConfig) -> torch.optim.Optimizer.

AdamW with weight decay on matrices and embeddings only, or Muon on the blocks' matrices with AdamW on the rest; either way one
optimizer object with one `step`. Its state leaves as tensors named after the parameters and plain JSON values, and
comes back only if every name, shape, data type and hyperparameter fits: `torch.optim.Optimizer.load_state_dict` matches
by position, without looking at shapes.

It measures what is to be clipped (`total_norm`), but does not clip, does not decide the rate (see `schedule`) and writes no
files (see `checkpoint`).
"""

from collections.abc import Iterable, Iterator, Mapping
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

# Numbers whose squares are added up in one sum in fp32, which is then right to a millionth. Of 2**21 MKL's sum is off by 1e-5
# on some CPUs (a Zen 4, one thread), of 2**18 by 4e-7, in 0.2 ms more for 12 million numbers.
_NORM_PIECE = 2**18

# What our algorithms keep for a parameter; all but AdamW's `step` (a scalar) have the parameter's shape.
STATE_KEYS = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}

# The settings that the state was made with; a checkpoint records them and `load_optimizer` compares them.
_HYPERPARAMETERS = {
    "adamw": ("betas", "eps", "weight_decay"),
    "muon": ("momentum", "ns_coefficients", "ns_steps", "eps", "weight_decay", "parts"),
}
# Of an optimizer that is not ours: everything but these, which say who, how fast and with which kernel.
_NOT_COMPARED = frozenset(
    {"params", "name", "lr", "initial_lr", "peak_learning_rate", "fused", "foreach", "capturable", "differentiable"}
)


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, device_type: str) -> torch.optim.Optimizer:
    """The optimizer for a model that lives on, or is about to be moved to, a device of this type.

    Every group has a "name", its "algorithm" ("adamw" or "muon") and its "peak_learning_rate".
    Why: biases and LayerNorm gains have no scale that decay could control, so only tensors with two axes decay.
    Raises: UserError if every parameter is frozen, or if Muon is asked for and the model has no matrices for it.
    Source: Brown et al. 2020, app. B (AdamW's settings); Jordan et al. 2024 (Muon).
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise UserError(f"every parameter of {type(model).__name__} is frozen; nothing would be trained")
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


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter that has no state yet the state, at zero, that the first step would make for it.

    Why: what lives as long as the run is to lie beside the weights, not where the first step's activations have left gaps,
    and whoever tries what fits into memory is to meet it there. An optimizer that is not ours keeps its own ways.
    """
    for group in optimizer.param_groups:
        keys = STATE_KEYS.get(group.get("algorithm", ""), ())
        for parameter in group["params"]:
            if optimizer.state.get(parameter):
                continue
            for key in keys:
                scalar = key == "step"
                dtype = torch.float32 if scalar else parameter.dtype
                optimizer.state[parameter][key] = _empty_state(parameter, group, key, scalar=scalar, dtype=dtype)


def set_learning_rate(optimizer: torch.optim.Optimizer, multiplier: float) -> float:
    """Sets every group's rate to `multiplier` times its own peak, and returns AdamW's rate for the log.

    The peak of a group that `build_optimizer` did not make is the rate that it has at the first call.
    """
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("peak_learning_rate", group["lr"]) * multiplier
    groups = optimizer.param_groups
    return cast(float, next((g["lr"] for g in groups if g.get("algorithm") == "adamw"), groups[0]["lr"]))


@torch.no_grad()
def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all numbers of these tensors, as torch.nn.utils.get_total_norm has it -> ().

    Why dot products on a CPU: torch's norm takes twice their time there, and adds the squares of a large tensor up in fp32
    one after another (GPT-2 124M on 2 cores: 31 and 16 ms, 9e-4 and 1e-6 off; torch 2.13).
    """
    tensors = list(tensors)
    if not tensors or any(tensor.device.type != "cpu" or tensor.dtype != torch.float32 for tensor in tensors):
        return nn.utils.get_total_norm(tensors)
    pieces = [piece for tensor in tensors for piece in torch.split(tensor.reshape(-1), _NORM_PIECE)]
    return torch.stack([torch.dot(piece, piece) for piece in pieces]).sum().sqrt()


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The state as "<parameter name>|<key>" -> tensor, without the padding rows of wte; empty before the first update.

    The tensors are the live ones, or views of them, on their own devices: copy them before the next step. Any
    optimizer will do whose state is tensors of a parameter's shape and scalar tensors.
    Raises: UserError for state of another kind.
    """
    tensors = {}
    for name, parameter, _ in _named_parameters(optimizer, model):
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is None:  # SGD without momentum
                continue
            if not isinstance(value, Tensor) or value.shape not in (parameter.shape, ()):
                raise UserError(
                    f"{type(optimizer).__name__} keeps {key!r} for {name}, which is neither a tensor of the parameter's "
                    "shape nor a scalar tensor and cannot be saved; use an optimizer whose state is"
                )
            tensors[f"{name}|{key}"] = _canonical(name, value, model)
    return tensors


def optimizer_scalars(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Each group's settings by group name, as JSON values; `load_optimizer` wants all but the peak rate to be equal."""
    return {
        "groups": {
            name: _hyperparameters(group) | {"peak_learning_rate": group.get("peak_learning_rate", group["lr"])}
            for name, group in _named_groups(optimizer)
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
    parameters = {name: (parameter, group) for name, parameter, group in _named_parameters(optimizer, model)}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("|")
        parameter, group = parameters[name]
        value = _empty_state(parameter, group, key, scalar=tensor.ndim == 0, dtype=tensor.dtype)
        _canonical(name, value, model).copy_(tensor)
        optimizer.state[parameter][key] = value


def _named_groups(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, group in enumerate(optimizer.param_groups):
        yield group.get("name", f"group_{index}"), group


def _named_parameters(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """(name, parameter, its group) for everything that the optimizer updates, in the model's order."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    named = [(name, p) for name, p in model.named_parameters() if id(p) in groups]
    assert len(named) == len(groups), "the optimizer holds parameters that this model does not have"
    for name, parameter in named:
        yield name, parameter, groups[id(parameter)]


def _canonical(name: str, value: Tensor, model: nn.Module) -> Tensor:
    """The part of a parameter or of its state that belongs to the published GPT-2 shapes, as a view."""
    return cut(name, value, cast(Any, model).config) if value.ndim else value


def _empty_state(parameter: Tensor, group: Mapping[str, Any], key: str, *, scalar: bool, dtype: torch.dtype) -> Tensor:
    """A zero state tensor exactly as torch's optimizers make it at their first step."""
    if not scalar:
        return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
    # Fused kernels count on the device; the others on the host, where a launch for one scalar would cost more.
    on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
    return torch.zeros((), dtype=dtype, device="cpu" if on_host else parameter.device)


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """What the group's state depends on, as JSON values."""
    ours = _HYPERPARAMETERS.get(group.get("algorithm", ""))
    keys = ["algorithm", *ours] if ours else sorted(set(group) - _NOT_COMPARED)
    values = {key: list(value) if isinstance(value := group[key], tuple) else value for key in keys}
    return {key: value for key, value in values.items() if isinstance(value, (bool, int, float, str, list, type(None)))}


def _scalar_problems(optimizer: torch.optim.Optimizer, scalars: Mapping[str, Any]) -> list[str]:
    saved = scalars.get("groups")
    ours = {name: _hyperparameters(group) for name, group in _named_groups(optimizer)}
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
    parameters = {name: (parameter, group) for name, parameter, group in _named_parameters(optimizer, model)}
    saved_keys: dict[str, list[str]] = {name: [] for name in parameters}
    problems = []
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("|")
        parameter, group = parameters.get(name, (None, {}))
        keys = STATE_KEYS.get(group.get("algorithm", ""), (key,))
        if parameter is None or key not in keys:
            problems.append(f"{full_name} is not expected")
            continue
        saved_keys[name].append(key)
        whole = tuple(_canonical(name, parameter, model).shape)
        known = "algorithm" in group
        shapes = [() if key == "step" else whole] if known else [whole, ()]
        if tuple(tensor.shape) not in shapes or (known and tensor.dtype != torch.float32):
            wanted = " or ".join(map(str, shapes))
            problems.append(f"{full_name} is {tensor.dtype} {tuple(tensor.shape)}, expected torch.float32 {wanted}")
        elif key == "step" and not (tensor >= 0 and tensor == tensor.floor() and tensor.isfinite()):
            problems.append(f"{full_name}={tensor.item()} is not a number of updates")
    for name, keys_found in saved_keys.items():
        group = parameters[name][1]
        if not keys_found and "algorithm" not in group:  # another's optimizer, which saw no gradient of this one
            continue
        first = next((keys for keys in saved_keys.values() if keys), [])
        expected = STATE_KEYS.get(group.get("algorithm", ""), first)
        problems += [f"{name}|{key} is missing" for key in expected if key not in keys_found]
    return problems
