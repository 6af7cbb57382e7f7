"""The token embedding and the head that is tied to it: one weight, used twice, with one gradient.

Guarantees the gradients of `torch.nn.functional.embedding` and of whatever the head computes, added up. Autograd by itself
would make a dense gradient for the embedding, zero but for the batch's rows, and add it to the head's: three passes over the
largest matrix of the model, and a second copy of it (GPT-2 124M: 147 MiB), for some rows.

Sizes: B batch, T sequence, C n_embd, P rows of the weight.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def embed_tied(input_ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(rows of the weight, the weight for the head).

    The head's gradient is written to: use it at most once, in an operation that makes its gradient anew.
    Shapes: input_ids (B, T) int64, weight (P, C) -> (B, T, C), (P, C).
    """
    embedded, head = _EmbedTied.apply(input_ids, weight)  # type: ignore[no-untyped-call]
    return embedded, head


class _EmbedTied(torch.autograd.Function):
    """A lookup and a view of its table, whose gradients arrive together: the rows' are added to the head's."""

    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(input_ids)
        return F.embedding(input_ids, weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        (input_ids,) = ctx.saved_tensors
        embedded_grad, head_grad = grad_outputs
        _add_rows(head_grad, input_ids.flatten(), embedded_grad.flatten(0, 1))  # nobody else has the head's gradient
        return None, head_grad


@torch.library.custom_op("toolkit::add_rows", mutates_args=("total",))
def _add_rows(total: Tensor, indices: Tensor, rows: Tensor) -> None:
    """Adds each of the rows to the row of `total` that its index names.

    Why an operation of its own: torch.compile's for a CPU adds with all threads at once, in an order that differs from run
    to run where an index occurs often, and so do the sums' last bits; on a CPU torch's own adds in the order of the rows.
    """
    total.index_add_(0, indices, rows)


@_add_rows.register_fake
def _(total: Tensor, indices: Tensor, rows: Tensor) -> None:
    """Nothing new is held."""
