"""What a model and an optimizer of one's own must be, so that the step can be done and a checkpoint can hold the run."""

import torch
from torch import Tensor, nn

from toolkit.config import GPT2Config
from toolkit.errors import UserError
from toolkit.model.gpt2 import canonical_differences, canonical_shapes, cut


def refuse_unsavable(model: nn.Module, config: GPT2Config) -> None:
    """Raises UserError unless a checkpoint, which holds what the recipe's GPT-2 holds, can hold this model."""
    own = getattr(model, "config", None)
    tensors: dict[str, Tensor] = model.state_dict()
    problems = []
    if isinstance(own, GPT2Config):
        tensors = {name: cut(name, tensor, own) for name, tensor in tensors.items()}
    else:
        problems.append("has no GPT2Config as its config")
    missing, unknown, misshapen = canonical_differences(tensors, config)
    problems += [f"has {name}" for name in unknown] + [f"lacks {name}" for name in missing]
    shapes = canonical_shapes(config)
    problems += [f"has {name} of shape {tuple(tensors[name].shape)}, not {shapes[name]}" for name in misshapen]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{type(model).__name__} is not the GPT-2 of model.* that checkpoints hold: it {', '.join(problems[:3])}{more}; "
            "subclass GPT2 without other parameters, and register buffers with persistent=False"
        )
    if isinstance(own, GPT2Config) and own.n_head != config.n_head:  # which no shape shows
        raise UserError(
            f"{type(model).__name__} has n_head={own.n_head} and the recipe model.n_head={config.n_head}; make it from the "
            "recipe's model settings"
        )
    narrow = [f"{name} in {p.dtype}" for name, p in model.named_parameters() if p.dtype != torch.float32]
    if narrow:
        raise UserError(
            f"{type(model).__name__} has {narrow[0]}, but weights are trained in torch.float32, whatever the precision of "
            "the products; hand over model.float()"
        )


def refuse_unsteppable(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raises UserError for an optimizer whose step, or whose state on the disk, is not one of ours."""
    own = {id(parameter) for parameter in model.parameters()}
    updated = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(id(parameter) not in own for parameter in updated):
        raise UserError(
            f"{type(optimizer).__name__} has parameters that {type(model).__name__} does not have; make it from "
            "model.parameters() of the model that is handed to the trainer with it"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError("LBFGS evaluates the loss within its step; use an optimizer that steps from gradients")
    if any(isinstance(group["lr"], Tensor) for group in optimizer.param_groups):
        raise UserError(
            f"{type(optimizer).__name__} has a tensor as its learning rate; give a number: schedule.* changes it"
        )
