"""The tied head and its cross-entropy, chunk by chunk: final hidden states -> loss, without ever holding all logits.

Guarantees the values and gradients of `cross_entropy(hidden @ weight.T)` to rounding, with at most `chunk_tokens`
positions' logits in memory at any moment, forward and backward. Rows of the weight at or beyond `vocab_size` are
padding: they take no part in the softmax and their gradient is exactly zero.

Sizes: N = B * T positions, C n_embd, V vocabulary, P rows of the weight (V and the padding), n positions of one chunk.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.model.product import multiply, operand, product_dtype

IGNORED_TARGET = -100  # as in torch.nn.functional.cross_entropy

# Logits that the softmax widens to fp32 at one time when nothing fuses its passes: 4 MiB, which the caches nearest to a CPU's
# cores nearly hold, or 64 MiB, since a GPU takes no less time for fewer. That is 20 or 333 rows of GPT-2's vocabulary.
CPU_TILE_ELEMENTS = 2**20
GPU_TILE_ELEMENTS = 2**24

# On a CPU, a 16-bit product that is added to an fp32 sum is made in so many parts, each of them still thousands of rows.
PRODUCT_PARTS = 16


def mean_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, chunk_tokens: int
) -> Tensor:
    """The mean cross-entropy over all targets that are not -100 (0 if there are none).

    Why: logits in fp32 would take 1.5 GiB at 8 x 1024 positions and GPT-2's vocabulary, and autograd would keep several
    copies. Gradients are computed beside the loss, while a chunk's logits exist: three matrix products instead of the four
    that recomputing the logits in the backward pass would take.
    Shapes: hidden (N, C), weight (P, C), targets (N,) int64 -> () float32, nats per target.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        dtype = product_dtype(hidden)
        loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets, vocab_size, chunk_tokens, dtype)  # type: ignore[no-untyped-call]
        return loss
    losses = cross_entropy(hidden, weight, targets, vocab_size=vocab_size, chunk_tokens=chunk_tokens)
    return losses.sum() / _count(targets)


@torch.no_grad()
def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, chunk_tokens: int) -> Tensor:
    """The cross-entropy of each target, 0 where it is -100; without gradients.

    Shapes: hidden (N, C), weight (P, C), targets (N,) int64 -> (N,) float32, nats.
    """
    dtype = product_dtype(hidden)
    weight = operand(weight, dtype)  # once, not once a chunk
    losses = []
    for hidden_chunk, target_chunk in _chunks(hidden, targets, chunk_tokens):
        logits = multiply(operand(hidden_chunk, dtype), weight.t(), dtype)  # (n, P)
        losses.append(_softmax_(logits, target_chunk, vocab_size, with_gradient=False))
    return torch.cat(losses)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The mean cross-entropy and, while each chunk's logits exist, its gradients; the backward pass only scales them.

    They are kept unscaled by 1 / targets, so that in fp16 (p - onehot) does not underflow before a GradScaler's factor,
    which arrives with the incoming gradient, can act.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        chunk_tokens: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.dtypes = hidden.dtype, weight.dtype
        compute: Callable[..., tuple[Tensor, Tensor, Tensor]] = _loss_and_gradients
        if torch.compiler.is_compiling() and hidden.device.type == "cpu":
            hidden, compute = hidden.to(dtype), _loss_op
        loss, hidden_grad, weight_grad = compute(hidden, weight, targets, vocab_size, chunk_tokens, dtype)
        count = _count(targets)
        ctx.save_for_backward(hidden_grad, weight_grad, count)
        return loss / count

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise UserError(
                "the model's loss has its gradient as mere numbers, which have none themselves; where you need it, compute "
                "the loss from model.logits(input_ids) by torch's cross_entropy"
            )
        hidden_grad, weight_grad, count = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        scale = grad_outputs[0].float() / count
        return (
            _scaled(hidden_grad, scale, hidden_dtype),
            _scaled(weight_grad, scale, weight_dtype),
            None,
            None,
            None,
            None,
        )


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of all cross-entropies, and its gradients with regard to hidden states and weight.

    Shapes: hidden (N, C), weight (P, C), targets (N,) int64 -> () float32, (N, C), (P, C).
    """
    weight_cast = operand(weight, dtype)  # once, not once a chunk
    losses, hidden_grads = [], []
    weight_grad = None
    for hidden_chunk, target_chunk in _chunks(hidden, targets, chunk_tokens):
        # Ignored targets take no part in either gradient: their rows are zero here, where a row is narrow.
        ignored = (target_chunk == IGNORED_TARGET)[:, None]  # (n, 1)
        hidden_cast = operand(hidden_chunk, dtype).masked_fill(ignored, 0.0)
        logits = multiply(hidden_cast, weight_cast.t(), dtype)  # (n, P)
        losses.append(_softmax_(logits, target_chunk, vocab_size, with_gradient=True).sum())
        logits = operand(logits, dtype)  # what was logits is their gradient now
        hidden_grads.append(multiply(logits, weight_cast, dtype).masked_fill_(ignored, 0.0))  # (n, C)
        if len(hidden) <= chunk_tokens:  # one chunk: stays in the products' dtype until the backward pass
            weight_grad = multiply(logits.t(), hidden_cast, dtype)  # (P, C)
        else:  # several: summed in fp32
            if weight_grad is None:
                weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            _add_product(weight_grad, logits.t(), hidden_cast)
        del logits  # before the next chunk's are made
    assert weight_grad is not None
    return torch.stack(losses).sum(), torch.cat(hidden_grads), weight_grad


@torch.library.custom_op("toolkit::loss_and_gradients", mutates_args=())
def _loss_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`_loss_and_gradients` as one operation of a compiled program on a CPU.

    Why: torch.compile would put the last chunk's products off to the backward pass, keep its logits until then, and scale
    the head's gradient into a second one: at its beginning that pass would hold 0.05 GiB more (GPT-2 124M, bf16, 8 x 1024
    tokens). And the softmax would not be torch's own, see `_softmax_op_`.
    """
    return _loss_and_gradients(hidden, weight, targets, vocab_size, chunk_tokens, dtype)


@_loss_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The results' shapes, for those who trace without computing."""
    one_chunk = len(hidden) <= chunk_tokens
    weight_grad = torch.empty_like(weight, dtype=dtype if one_chunk else torch.float32)
    return hidden.new_empty((), dtype=torch.float32), torch.empty_like(hidden, dtype=dtype), weight_grad


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor grad * scale, multiplied in fp32 and rounded to `dtype`."""
    wide = grad * scale if grad.dtype == torch.float32 else grad.float().mul_(scale)
    return wide.to(dtype)


@torch.library.custom_op("toolkit::add_product", mutates_args=("total",))
def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to `total` in place, where it stands in the program.

    Why an operation of its own: torch.compile would put the sums of all chunks off to the end, where one kernel can do
    them together, and hold every chunk's gradient of the head until then: 72 MiB a chunk for GPT-2 124M in bf16.
    On CUDA one kernel multiplies in 16 bits and adds to the sum in fp32, without a rounded product in between.
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    if total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        return
    for total_rows, left_rows in zip(total.chunk(PRODUCT_PARTS), left.chunk(PRODUCT_PARTS), strict=True):
        total_rows.add_(left_rows @ right)


@_add_product.register_fake
def _(total: Tensor, left: Tensor, right: Tensor) -> None:
    """What it holds at most, for those who count memory without computing."""
    if total.dtype != left.dtype and not total.is_cuda:
        left.chunk(PRODUCT_PARTS)[0] @ right


def _softmax_(logits: Tensor, targets: Tensor, vocab_size: int, *, with_gradient: bool) -> Tensor:
    """The cross-entropy of each target; with_gradient replaces the logits by its gradient, softmax - onehot.

    Computed in fp32 whatever the logits' dtype. Rows whose target is -100 get a loss of zero, and whoever uses their
    gradient has to leave it out; padded columns get a gradient of zero.
    Shapes: logits (n, P), targets (n,) int64 -> (n,) float32.
    """
    if not torch.compiler.is_compiling():
        return _softmax_in_tiles_(logits, targets, vocab_size, with_gradient=with_gradient)
    if logits.device.type == "cpu":  # of a pass without gradients: with them, `_loss_op` computes all of it
        of_op: Tensor = _softmax_op_(logits, targets, vocab_size)
        return of_op
    logits[:, vocab_size:] = -torch.inf
    columns = targets.masked_fill(targets == IGNORED_TARGET, 0)[:, None]  # (n, 1)
    log_probabilities = torch.log_softmax(logits, dim=1, dtype=torch.float32)  # (n, P)
    losses = -log_probabilities.gather(1, columns).squeeze(1)
    if with_gradient:
        onehot = torch.arange(logits.size(1), device=logits.device) == columns
        logits.copy_(log_probabilities.exp() - onehot.float())
    return losses.masked_fill(targets == IGNORED_TARGET, 0.0)


def _softmax_in_tiles_(logits: Tensor, targets: Tensor, vocab_size: int, *, with_gradient: bool) -> Tensor:
    """`_softmax_` some rows at a time, so that little is ever held in fp32."""
    logits[:, vocab_size:] = -torch.inf
    on_cpu = logits.device.type == "cpu"
    tile = max(1, (CPU_TILE_ELEMENTS if on_cpu else GPU_TILE_ELEMENTS) // logits.size(1))
    losses = []
    for rows, row_targets in _chunks(logits, targets, tile):
        columns = row_targets.masked_fill(row_targets == IGNORED_TARGET, 0)[:, None]  # (r, 1)
        if on_cpu:
            of_targets, probabilities = _with_one_exponential(rows, columns)
        else:
            log_probabilities = torch.log_softmax(rows, dim=1, dtype=torch.float32)  # (r, P)
            of_targets = log_probabilities.gather(1, columns)  # (r, 1)
        losses.append(-of_targets.squeeze(1).masked_fill(row_targets == IGNORED_TARGET, 0.0))
        if not with_gradient:
            continue
        # Every pass over all columns counts: one writes the softmax, and the targets are put right afterwards.
        if on_cpu:
            rows.copy_(probabilities)
        else:
            torch.exp(log_probabilities, out=rows)
        gradient_of_targets = of_targets.expm1().to(rows.dtype)
        if on_cpu and rows.dtype != torch.float32:  # where scatter_ in 16 bits would be two passes more
            rows[torch.arange(len(rows)), columns[:, 0]] = gradient_of_targets[:, 0]
        else:
            rows.scatter_(1, columns, gradient_of_targets)
    return torch.cat(losses)


def _with_one_exponential(logits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of each row's probability in its column, and all probabilities, both in fp32.

    Why: on a CPU exponentials decide, and a logarithm of the softmax takes two for each logit, one for its sum and one for
    the gradient. Here the sum is told by the largest probability, which is at least 1 / P and never lost to rounding. 1,024
    positions of GPT-2's vocabulary on 2 cores with AVX-512: bf16 36 of 65 ms, fp32 32 of 50 ms (torch 2.13, November 2026).
    Shapes: logits (r, P), columns (r, 1) int64 -> (r, 1), (r, P).
    """
    largest = logits.amax(1, keepdim=True).float()
    probabilities = torch.softmax(logits, dim=1, dtype=torch.float32)
    log_of_largest = probabilities.amax(1, keepdim=True).log()
    return logits.gather(1, columns).float() - largest + log_of_largest, probabilities


@torch.library.custom_op("toolkit::softmax_", mutates_args=("logits",))
def _softmax_op_(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """`_softmax_in_tiles_`, without gradient, as one operation of a compiled program on a CPU.

    Why: torch's own kernels for rows of a softmax take half the time of those that torch.compile generates there
    (1,024 positions of GPT-2's vocabulary on 2 cores: bf16 46 of 99 ms, fp32 36 of 112 ms; torch 2.13).
    """
    return _softmax_in_tiles_(logits, targets, vocab_size, with_gradient=False)


@_softmax_op_.register_fake
def _(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """The losses' shape, for those who trace without computing."""
    return logits.new_empty(targets.shape, dtype=torch.float32)


def _chunks(hidden: Tensor, targets: Tensor, chunk_tokens: int) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(torch.split(hidden, chunk_tokens), torch.split(targets, chunk_tokens), strict=True)


def _count(targets: Tensor) -> Tensor:
    return (targets != IGNORED_TARGET).sum().clamp(min=1)
