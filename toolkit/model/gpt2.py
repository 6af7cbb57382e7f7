"""GPT-2 from scratch: token ids -> mean cross-entropy, per-token losses, or logits.

The architecture, parameter names and shapes are those of the published GPT-2 weights, so that a checkpoint is what
`transformers` loads: learned positions, LayerNorm before each part of a block, GELU (tanh), a head tied to the token
embedding, matrices stored as (in, out). The token embedding is padded with zero rows to a multiple of 64 for speed;
the padding never takes part in a softmax, stays zero, and is cut by `canonical_tensors` and added by `load_canonical`.

Sizes: B batch, T sequence, C n_embd, H n_head, D head size = C / H, V vocabulary.
Source: Radford et al. 2019, sec. 2.3; names and initialisation as in OpenAI's and Hugging Face's GPT-2.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from toolkit.config import GPT2Config
from toolkit.errors import UserError
from toolkit.model.attention import attention
from toolkit.model.embedding import embed_tied
from toolkit.model.loss import cross_entropy, mean_cross_entropy
from toolkit.model.product import affine, product_dtype

VOCABULARY_MULTIPLE = 64  # rows of wte.weight in memory: whole tiles for the matrix units
LAYER_NORM_EPSILON = 1e-5
INIT_STD = 0.02
TOKEN_EMBEDDING = "wte.weight"  # noqa: S105 - a parameter's name

# Positions of a micro-batch from which, compiled on a CPU, every second block computes GELU's input again.
RECOMPUTED_FROM = 8192


class Projection(nn.Module):
    """x @ weight + bias, with the weight stored as (in, out), the way GPT-2's files have it."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_in, num_out))
        self.bias = nn.Parameter(torch.zeros(num_out))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, T, in) -> (B, T, out)."""
        return affine(x, self.weight, self.bias)


class KVCache:
    """Keys and values of the positions that a model has seen, so that generating a token costs one position."""

    def __init__(self, model: "GPT2", *, batch_size: int, length: int | None = None) -> None:
        config = model.config
        shape = (batch_size, config.n_head, length or config.context_length, config.n_embd // config.n_head)
        weight = model.wte.weight
        dtype = product_dtype(weight)
        self.keys = [
            torch.empty(shape, dtype=dtype, device=weight.device) for _ in range(config.n_layer)
        ]  # (B, H, L, D)
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self.length = 0  # positions held
        self.capacity = shape[2]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's new keys and values (B, H, T, D) behind those held; returns all of that layer's."""
        end = self.length + keys.size(2)
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Attention(nn.Module):
    """Causal self-attention over all heads."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.n_head, self.layer, self.dropout = config.n_head, layer, config.dropout
        self.c_attn = Projection(config.n_embd, 3 * config.n_embd)
        self.c_proj = Projection(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Shapes: (B, T, C) -> (B, T, C); with a cache, the T positions follow those that it holds."""
        batch, length, width = x.shape
        query, key, value = (
            part.view(batch, length, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(x).split(width, dim=2)
        )
        mask, is_causal = None, True
        if cache is not None:
            key, value = cache.extend(self.layer, key.to(cache.keys[0].dtype), value.to(cache.keys[0].dtype))
            query = query.to(key.dtype)
            is_causal = cache.length == 0
            if not is_causal and length > 1:  # a single new position sees everything and needs no mask
                mask = torch.ones(length, key.size(2), dtype=torch.bool, device=x.device).tril(cache.length)
        dropout = self.dropout if self.training else 0.0
        mixed = attention(query, key, value, mask, dropout, is_causal)  # (B, H, T, D)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        return F.dropout(self.c_proj(mixed), self.dropout, self.training)


class MLP(nn.Module):
    """Two projections with a GELU (its tanh approximation) between them, four times as wide inside."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = Projection(config.n_embd, 4 * config.n_embd)
        self.c_proj = Projection(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor, *, recompute: bool = False) -> Tensor:
        """With `recompute`, GELU's input is not kept for the backward pass. Shapes: (B, T, C) -> (B, T, C)."""
        inside = checkpoint(self.c_fc, x, use_reentrant=False, preserve_rng_state=False) if recompute else self.c_fc(x)
        return F.dropout(self.c_proj(F.gelu(inside, approximate="tanh")), self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None, *, recompute: bool = False) -> Tensor:
        """`recompute` as in `MLP`. Shapes: (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), cache)
        out: Tensor = x + self.mlp(self.ln_2(x), recompute=recompute)
        return out


def _check_shapes(input_ids: Tensor, targets: Tensor) -> None:
    if input_ids.shape != targets.shape:
        raise UserError(
            f"input_ids of shape {tuple(input_ids.shape)} and targets of shape {tuple(targets.shape)}; give one target for each input"
        )


class GPT2(nn.Module):
    """GPT-2; called with input_ids and targets it returns the loss, so that training never holds all logits.

    `activation_checkpointing="block"` keeps only each block's input and recomputes the rest in the backward pass.
    `seed=None` leaves the weights at zero, to be loaded.
    """

    def __init__(
        self,
        config: GPT2Config,
        *,
        activation_checkpointing: Literal["none", "block"] = "none",
        loss_chunk_tokens: int = 1024,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.loss_chunk_tokens = loss_chunk_tokens
        rows, width = padded_vocab_size(config), config.n_embd
        self.wte = nn.Embedding(rows, width, _weight=torch.zeros(rows, width))
        self.wpe = nn.Embedding(config.context_length, width, _weight=torch.zeros(config.context_length, width))
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
        if seed is not None:
            init_weights(self, seed=seed)

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy over all targets that are not -100.

        Shapes: input_ids, targets (B, T) int64 -> loss () float32, nats per target.
        Raises: UserError if T > context_length, or if there is not one target for each input.
        """
        _check_shapes(input_ids, targets)
        embedded, head = embed_tied(input_ids, self.wte.weight)
        return mean_cross_entropy(
            self._hidden(embedded).flatten(0, 1),
            head,
            targets.flatten(),
            vocab_size=self.config.vocab_size,
            chunk_tokens=self.loss_chunk_tokens,
        )

    @torch.no_grad()
    def token_losses(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy of every target, 0 where it is -100; without gradients and without whole logits.

        Shapes: input_ids, targets (B, T) int64 -> (B, T) float32, nats.
        """
        _check_shapes(input_ids, targets)
        losses = cross_entropy(
            self._hidden(self.wte(input_ids)).flatten(0, 1),
            self.wte.weight,
            targets.flatten(),
            vocab_size=self.config.vocab_size,
            chunk_tokens=self.loss_chunk_tokens,
        )
        return losses.view_as(targets)

    def logits(self, input_ids: Tensor) -> Tensor:
        """Scores of every next token. Shapes: (B, T) int64 -> (B, T, V)."""
        return affine(self._hidden(self.wte(input_ids)), self.wte.weight.t())[..., : self.config.vocab_size]

    @torch.no_grad()
    def next_logits(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """Scores of the token after the last one; input_ids follow what the cache holds and are added to it.

        Shapes: (B, T) int64 -> (B, V).
        """
        hidden = self._hidden(self.wte(input_ids), cache)[:, -1]  # (B, C)
        return affine(hidden, self.wte.weight.t())[:, : self.config.vocab_size]

    def _hidden(self, embedded: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final hidden states of embedded tokens. Shapes: (B, T, C) -> (B, T, C)."""
        start = cache.length if cache is not None else 0
        end = start + embedded.size(1)
        if end > self.config.context_length:
            raise UserError(
                f"{end} tokens are more than the model's context_length={self.config.context_length}; "
                f"give at most {self.config.context_length}"
            )
        x = embedded + self.wpe.weight[start:end]  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        recompute = _saves_memory(x)
        for layer, block in enumerate(self.h):
            if self.activation_checkpointing == "block" and torch.is_grad_enabled():
                # The generator's state is kept only where the recomputation draws the same dropout masks from it.
                keep_state = self.training and self.config.dropout > 0
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=keep_state)
            else:
                x = block(x, cache, recompute=recompute and layer % 2 == 0)
        if cache is not None:
            cache.length = end
        hidden: Tensor = self.ln_f(x)
        return hidden


def _saves_memory(x: Tensor) -> bool:
    """Whether every second block should compute GELU's input again in the backward pass; x (B, T, C) goes into the first.

    Why: GELU's inputs are the largest part of what a compiled step keeps, and of its products those that make them cost
    least for a byte kept. Half of them are 0.28 of 1.5 GiB (GPT-2 124M, bf16, 8 x 1024 tokens), for 3 % of a step's time
    (4 x 1024 tokens, 2 cores with AVX-512's bf16 instructions), which small micro-batches have no use for. All at once are
    what activation_checkpointing is for; on CUDA it was not measured.
    """
    large = x.device.type == "cpu" and x.size(0) * x.size(1) >= RECOMPUTED_FROM
    return large and torch.compiler.is_compiling() and torch.is_grad_enabled()


def padded_vocab_size(config: GPT2Config) -> int:
    """Rows of wte.weight in memory: vocab_size rounded up to a multiple of 64."""
    return math.ceil(config.vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def canonical_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint of this model, in the order of the model's parameters."""
    width = config.n_embd
    block = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (width, 4 * width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (4 * width, width),
        "mlp.c_proj.bias": (width,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        TOKEN_EMBEDDING: (config.vocab_size, width),
        "wpe.weight": (config.context_length, width),
    }
    for layer in range(config.n_layer):
        shapes |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def num_parameters(config: GPT2Config) -> int:
    """Parameters without padding, the tied head counted once: 124,439,808 for GPT-2 124M."""
    return sum(math.prod(shape) for shape in canonical_shapes(config).values())


def flops_per_token(config: GPT2Config, sequence_length: int) -> int:
    """Floating-point operations of one token, forward and backward: 6 N + 12 L H D T, N without the position embedding.

    Why: two operations a parameter forward and four backward, and the two attention products of every layer; neither
    what activation checkpointing repeats nor the causal half is counted, so that MFU compares with others'.
    Source: Chowdhery et al. 2022 (PaLM), app. B; nanoGPT's estimate_mfu.
    """
    num_weights = num_parameters(config) - config.context_length * config.n_embd
    return 6 * num_weights + 12 * config.n_layer * config.n_embd * sequence_length


@torch.no_grad()
def init_weights(model: GPT2, *, seed: int) -> None:
    """Draws all weights: normal(0, 0.02), residual projections scaled by 1/sqrt(2 n_layer), biases 0, LayerNorm gains 1.

    A pure function of (config, seed): drawn on the CPU in the order of the parameters, without the padding.
    Source: Radford et al. 2019, sec. 2.3 (0.02 and the scaling), also for the position embedding as in Hugging Face's.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    residual_std = 0.0 if config.zero_init_residual else INIT_STD / math.sqrt(2 * config.n_layer)
    for name, parameter in _canonical_views(model):
        if name.endswith(".bias"):
            parameter.zero_()
        elif parameter.dim() == 1:  # a LayerNorm's gain
            parameter.fill_(1.0)
        else:
            values = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, 1.0, generator=generator)
            parameter.copy_(values.mul_(residual_std if name.endswith("c_proj.weight") else INIT_STD))
    model.wte.weight[config.vocab_size :] = 0.0


def _canonical_views(model: GPT2) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, cut(name, parameter.detach(), model.config)


def canonical_tensors(model: GPT2) -> dict[str, Tensor]:
    """The weights under GPT-2's names, wte.weight cut to vocab_size rows: views of the parameters, not copies."""
    return dict(_canonical_views(model))


@torch.no_grad()
def load_canonical(model: GPT2, tensors: Mapping[str, Tensor]) -> None:
    """Copies weights as `canonical_tensors` names them into the model; padding is set to zero.

    Raises: UserError, before anything has changed, unless names, shapes and dtypes are exactly the model's.
    """
    views = canonical_tensors(model)
    check_canonical(tensors, model.config)
    for name, view in views.items():
        view.copy_(tensors[name])
    model.wte.weight[model.config.vocab_size :] = 0.0


def canonical_differences(tensors: Mapping[str, Tensor], config: GPT2Config) -> tuple[list[str], list[str], list[str]]:
    """Names that tensors of a model of this configuration should have and lack, that are unknown, and of another shape."""
    shapes = canonical_shapes(config)
    missing = [name for name in shapes if name not in tensors]
    unknown = [name for name in tensors if name not in shapes]
    misshapen = [name for name in shapes if name in tensors and tuple(tensors[name].shape) != shapes[name]]
    return missing, unknown, misshapen


def check_canonical(tensors: Mapping[str, Tensor], config: GPT2Config) -> None:
    """Raises UserError unless names, shapes and dtype (float32) are exactly those of a model of this configuration."""
    shapes = canonical_shapes(config)
    missing, unknown, misshapen = canonical_differences(tensors, config)
    if missing or unknown:
        raise UserError(
            f"the weights do not fit the model: missing {_few(sorted(missing))}, unknown {_few(sorted(unknown))}; "
            "use weights of a GPT-2 with the same n_layer"
        )
    wrong = [
        f"{name} is {tensors[name].dtype} {tuple(tensors[name].shape)} instead of torch.float32 {shape}"
        for name, shape in shapes.items()
        if name in misshapen or tensors[name].dtype != torch.float32
    ]
    if wrong:
        raise UserError(f"the weights do not fit the model: {_few(wrong)}; use a configuration of the same shape")


def _few(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) + rest) or "none"


def cut(name: str, tensor: Tensor, config: GPT2Config) -> Tensor:
    """A tensor of a parameter's shape (the parameter, its gradient, a moment) without the padding: a view."""
    return tensor[: config.vocab_size] if name == TOKEN_EMBEDDING else tensor


def pad(name: str, tensor: Tensor, config: GPT2Config) -> Tensor:
    """The opposite of `cut`: the tensor with zero rows for the padding; a copy only where there is any."""
    rows = padded_vocab_size(config) - config.vocab_size
    return F.pad(tensor, (0, 0, 0, rows)) if name == TOKEN_EMBEDDING and rows else tensor
