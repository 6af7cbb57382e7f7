"""Causal attention in the data type that autocast asks for: torch's fused kernels, and matrix products where they are faster.

Sizes as in `gpt2`, L positions of keys and values. In tiles: n tiles of S positions, T = n * S, and N = B * H.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from toolkit.model.product import cpu_units, in_fp32, product_dtype

# Of the backward pass in tiles. With more rows, what lies between the products leaves the caches: less is gained, and it takes
# hundreds of megabytes.
SHORTEST_TILE = 32  # positions
MOST_TILED_ROWS = 2**15  # B * H * T
# Columns that a product in tiles has for what is subtracted within it. 2 are needed; AMX units take 32 numbers at a time.
TERM_COLUMNS = 2
TERM_COLUMNS_ON_AMX = 32
# Of the forward pass in rows of tiles: with longer windows torch's kernel, which then leaves out tiles above the diagonal,
# takes no longer.
LONGEST_IN_ROWS = 512  # positions


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, is_causal: bool
) -> Tensor:
    """softmax(query @ key.T / sqrt(D)) @ value for each head, in the data type that autocast asks for, with gradients.

    Shapes: query (B, H, T, D), key and value (B, H, L, D), mask (T, L) bool -> (B, H, T, D).
    """
    dtype = product_dtype(query)
    if in_fp32(dtype, query):
        operands = query.to(dtype), key.to(dtype), value.to(dtype)
        # The backward pass computes it again from the 16-bit operands, so that nothing in fp32 is kept until then.
        arguments = (*operands, mask, dropout, is_causal)
        out: Tensor = checkpoint(_attention_in_fp32, *arguments, use_reentrant=False, preserve_rng_state=dropout > 0)
        return out
    plain = mask is None and dropout == 0 and is_causal
    num_tiles = _num_tiles(query) if plain and torch.compiler.is_compiling() else None
    if num_tiles is None:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal)
    of_tiles: Tensor = _AttentionInTiles.apply(query, key, value, num_tiles)  # type: ignore[no-untyped-call]
    return of_tiles


def _attention_in_fp32(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, is_causal: bool
) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):
        wide = query.float(), key.float(), value.float()
        return F.scaled_dot_product_attention(*wide, mask, dropout, is_causal).to(query.dtype)


def _num_tiles(query: Tensor) -> int | None:
    """Tiles of a window in which the backward pass is computed, or None where that is left to torch's own kernel."""
    batch, heads, length, _ = query.shape
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or batch * heads * length > MOST_TILED_ROWS:
        return None
    # Four tiles of 128 take less time than two of 256, and four of 256 less than eight of 128 (2 AMX cores).
    fewest = math.ceil(length / (128 if length <= 512 else 256))
    most = max(fewest, length // SHORTEST_TILE)
    return next((tiles for tiles in range(fewest, most + 1) if length % tiles == 0), None)


class _AttentionInTiles(torch.autograd.Function):
    """torch's fused kernel for a CPU, or `attention_in_rows`, with `attention_gradients` for its backward pass.

    What is kept for that is what torch's kernel keeps.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, num_tiles: int) -> Tensor:
        out: Tensor
        if query.size(2) <= LONGEST_IN_ROWS and cpu_units() == "avx512_bf16":
            out, log_sums = attention_in_rows(query, key, value, num_tiles=num_tiles)
        else:
            out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, is_causal=True
            )
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.num_tiles = num_tiles
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *attention_gradients(grad_outputs[0], *ctx.saved_tensors, num_tiles=ctx.num_tiles), None


def attention_in_rows(query: Tensor, key: Tensor, value: Tensor, *, num_tiles: int) -> tuple[Tensor, Tensor]:
    """Causal attention and the logarithms of its sums, from one product of scores for each row of tiles below the diagonal.

    Why: torch's kernel on a CPU without AMX reaches a quarter of the rate of bf16 products, and up to T = 512 also computes
    what lies above the diagonal. 12 heads of 64, 2 cores with AVX-512's bf16 instructions, generated code between the
    products: 2 windows of 512 positions 16 ms became 11.5, 8 of 256 with 6 heads 13 became 10.5. Scores are rounded to 16
    bits, as all products' results; what was lost then is made by a second product, in whose sum, which has 32 bits, the
    rounded scores are subtracted. So the error is 1.3 to 1.4 times that of torch's kernel, however large scores are.
    Shapes: (B, H, T, D) each -> (B, H, T, D), (B, H, T) float32.
    """
    batch, heads, length, head_size = query.shape
    size, scale = length // num_tiles, 1 / math.sqrt(head_size)
    query, key, value = (part.reshape(batch * heads, length, head_size) for part in (query, key, value))
    position = torch.arange(length, device=query.device)
    outs, log_sums = [], []
    for start in range(0, length, size):
        end = start + size
        queries, keys = query[:, start:end], key[:, :end].mT
        rounded = torch.bmm(queries, keys)  # (N, S, end)
        rest = torch.baddbmm(rounded, queries, keys, beta=-1)
        scores = (rounded.float() + rest.float()) * scale
        scores = torch.where(position[start:end, None] >= position[:end], scores, -torch.inf)
        largest = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - largest)
        sums = weights.sum(-1, keepdim=True)
        outs.append((torch.bmm(weights.to(query.dtype), value[:, :end]).float() / sums).to(query.dtype))
        log_sums.append((largest + sums.log()).squeeze(-1))
    out, log_sum = torch.cat(outs, 1), torch.cat(log_sums, 1)
    return out.view(batch, heads, length, head_size), log_sum.view(batch, heads, length)


def attention_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, *, num_tiles: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of causal attention with regard to query, key and value, from products of square tiles below the diagonal.

    Why: torch's kernel for it on a CPU makes many small products, one after another, and up to T = 512 also those above the
    diagonal, where all is zero. Here all tiles at one distance from the diagonal are one batched product, and generated code
    does what lies between. bf16, 2 AMX cores, 12 heads of 64: 15 ms became 9 with 2 windows of 512
    positions, 12 became 5 with 4 of 256, 40 became 34 with 2 of 1,024. Uncompiled it would take twice torch's time.
    Each product is rounded to 16 bits, which torch does not do with scores. So what is subtracted from scores and from the
    weights' gradients is subtracted within the product, as two more columns, and what is rounded is small where weights are
    not: scores less the logarithm of their sum, but for half the logarithm of the number of keys, which lies between the
    weight of a key that is one of many and of one that is alone. The gradients' error is about that of torch's kernel (in the
    median 1.0 to 1.1 times, at most twice; three to four times where queries and keys are 10 to 30 times the usual); with
    scores rounded as they are it would be ten times that where few keys have all the weight.
    Shapes: log_sums (B, H, T), the others (B, H, T, D) -> three times (B, H, T, D).
    Source: Dao et al. 2022 (FlashAttention), app. B.2, for the formulas.
    """
    batch, heads, length, head_size = query.shape
    size, scale, dtype = length // num_tiles, 1 / math.sqrt(head_size), query.dtype
    term_columns = TERM_COLUMNS_ON_AMX if cpu_units() == "amx_bf16" else TERM_COLUMNS

    def tiles(tensor: Tensor) -> Tensor:
        """(B, H, T, D) -> (n, N, S, D)."""
        tiled = tensor.reshape(batch, heads, num_tiles, size, -1).permute(2, 0, 1, 3, 4)  # (n, B, H, S, D)
        return tiled.reshape(num_tiles, batch * heads, size, -1)

    def minus(tensor: Tensor, term: Tensor) -> Tensor:
        """Tiles whose product with those of `with_ones` is that of the tiles `tensor` less `term`, (B, H, T)."""
        columns = tiles(-term.unsqueeze(-1))
        rounded = columns.to(dtype)
        with_term = torch.cat([tensor, rounded, (columns - rounded.float()).to(dtype)], -1)
        return F.pad(with_term, (0, term_columns - 2))  # (n, N, S, D + term_columns)

    def with_ones(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, term_columns), value=1.0)  # (n, N, S, D + term_columns)

    def whole(of_distance: list[Tensor], *, of_keys: bool) -> Tensor:
        """The sum over distances. Shapes: each (n - distance, N, S, D) -> (B, H, T, D)."""
        total = of_distance[0].float()
        for distance, part in enumerate(of_distance[1:], 1):
            rest = (0, distance) if of_keys else (distance, 0)
            total = total + F.pad(part.float(), (0, 0, 0, 0, 0, 0, *rest))
        tiled = total.to(dtype).view(num_tiles, batch, heads, size, head_size)
        return tiled.permute(1, 2, 0, 3, 4).reshape(query.shape)

    # Copied together with the gradient, all of this needs it: else torch.compile would make copies in the forward pass already,
    # and keep them and the scores until the backward pass.
    query, key, value, grad = torch.stack([query, key, value, grad]).unbind()
    queries, keys, values, grads = tiles(query), tiles(key), tiles(value), tiles(grad)
    half_log_keys = torch.arange(1, length + 1, device=query.device).log() / 2  # (T,)
    mean_weight_grads = (grad.float() * out.float()).sum(-1)  # (B, H, T), over the keys with their weights
    # One product makes both the scores and the weights' gradients of a tile.
    left = torch.stack([minus(queries, (log_sums - half_log_keys) / scale), minus(grads, mean_weight_grads)], 1)
    right = torch.stack([with_ones(keys), with_ones(values)], 1)  # (n, 2, N, S, D + term_columns)
    log_factor = half_log_keys.view(num_tiles, 1, size, 1)
    of_queries, of_keys, of_values = [], [], []
    for distance in range(num_tiles):
        near, far = (
            slice(num_tiles - distance),
            slice(distance, None),
        )  # tiles of keys, and those of queries that see them
        # (n - distance, N, S queries, S keys) each:
        scores, weight_grads = _batched_product(left[far], right[near].mT).unbind(1)
        weights = torch.exp(scores.float() * scale - log_factor[far])
        if distance == 0:
            position = torch.arange(size, device=query.device)
            weights = torch.where(position[:, None] >= position, weights, 0.0)
        score_grads = (weights * (weight_grads.float() * scale)).to(dtype)
        of_queries.append(_batched_product(score_grads, keys[near]))
        of_keys.append(_batched_product(score_grads.mT, queries[far]))
        of_values.append(_batched_product(weights.to(dtype).mT, grads[far]))
    return whole(of_queries, of_keys=False), whole(of_keys, of_keys=True), whole(of_values, of_keys=True)


def _batched_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right. Shapes: (..., S, K), (..., K, O) -> (..., S, O)."""
    product = torch.bmm(left.flatten(0, -3), right.flatten(0, -3))
    return product.view(*left.shape[:-1], right.size(-1))
