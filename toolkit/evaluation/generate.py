"""A model and a prompt -> tokens, one at a time, so that text can be shown while it is generated.

The same seed gives the same tokens, whatever the number of samples: each sample has a random stream of its own, drawn
on the CPU. Turning ids into text is the caller's business.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.model.gpt2 import GPT2, KVCache


def generate(
    model: GPT2,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    num_samples: int = 1,
    eot_id: int | None = None,
    num_ids: int | None = None,
) -> Iterator[tuple[int, int]]:
    """Yields (sample, token id): all new tokens of sample 0, then of sample 1, ...

    A sample ends after `max_new_tokens` or at end-of-text, which is not yielded. An empty prompt is the start of a
    document. Of a longer text than the model's context, it sees the end: as in nanoGPT a prompt is cut at its front, and
    where the context is full the last half of it is encoded anew. Only the first `num_ids` ids are drawn: the rest of a
    model's may be padding.
    Raises: UserError, at once, for a setting or a prompt id that makes no sense.
    """
    _check_settings(max_new_tokens, temperature, top_k, top_p, num_samples, seed)
    vocab_size = min(model.config.vocab_size, num_ids or model.config.vocab_size)
    unknown = [token for token in prompt_ids if not 0 <= token < vocab_size]
    if unknown:
        raise UserError(
            f"prompt id {unknown[0]} is not below the model's vocab_size={vocab_size}; use the tokenizer it was trained with"
        )
    start = list(prompt_ids) or ([eot_id] if eot_id is not None and eot_id < vocab_size else [])
    if not start:
        raise UserError("the prompt is empty and the model has no end-of-text token to start from; give a prompt")
    pick = partial(draw, temperature=temperature, top_k=top_k, top_p=top_p)

    def samples() -> Iterator[tuple[int, int]]:
        for sample in range(num_samples):
            stream = torch.Generator().manual_seed(_stream_seed(seed, sample))
            tokens = _continuation(model, start, partial(pick, generator=stream), vocab_size=vocab_size)
            for token in islice(tokens, max_new_tokens):
                if token == eot_id:
                    break
                yield sample, token

    return samples()


def _check_settings(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, num_samples: int, seed: int
) -> None:
    problems = []
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens={max_new_tokens} must be at least 1")
    if num_samples < 1:
        problems.append(f"num_samples={num_samples} must be at least 1")
    if not 0 <= temperature < math.inf:
        problems.append(f"temperature={temperature} must be at least 0 (0 takes the likeliest token)")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        problems.append(f"top_p={top_p} must be above 0 and at most 1")
    if seed < 0:
        problems.append(f"seed={seed} must be at least 0")
    if problems:
        raise UserError("; ".join(problems))


def _continuation(
    model: GPT2, start: Sequence[int], pick: Callable[[Tensor], int], *, vocab_size: int
) -> Iterator[int]:
    """Token after token, without end, each picked from the logits of those before."""
    ids = list(start)
    cache, new_ids = None, ids[-model.config.context_length :]
    while True:
        if cache is None or cache.length + len(new_ids) > cache.capacity:
            cache = KVCache(model, batch_size=1)
            new_ids = new_ids if len(ids) == len(start) else ids[-max(1, cache.capacity // 2) :]
        token = pick(_next_logits(model, new_ids, cache)[:vocab_size])
        yield token
        ids.append(token)
        new_ids = [token]


def _stream_seed(seed: int, sample: int) -> int:
    """A seed of 63 bits for each (seed, sample), unrelated to its neighbours'."""
    return int(np.random.SeedSequence([seed, sample]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _next_logits(model: GPT2, new_ids: list[int], cache: KVCache) -> Tensor:
    """(V,) float32 on the CPU. Dropout is off meanwhile only: between tokens the caller may train the same model."""
    was_training = model.training
    model.eval()
    try:
        device = model.wte.weight.device
        return model.next_logits(torch.tensor([new_ids], device=device), cache)[0].float().cpu()
    finally:
        model.train(was_training)


def draw(
    logits: Tensor, *, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """One token id drawn from softmax(logits / temperature), restricted first to the top k, then to the top p.

    Top p keeps the likeliest tokens until their probabilities reach p, the one that reaches it included; ties are broken
    by the lower id, so that the result does not depend on a sorting algorithm.
    Shapes: logits (V,) float32.
    Raises: UserError if the logits are not finite: the weights are broken.
    """
    if not torch.isfinite(logits).all():
        raise UserError("the model's output is not finite; its weights are broken: use an earlier checkpoint")
    if temperature == 0:
        return int(logits.argmax())
    candidates = torch.arange(len(logits))
    if top_k is not None and top_k < len(logits):  # sorting a few instead of all; with ties they may be more than k
        candidates = (logits >= logits.topk(top_k).values[-1]).nonzero().squeeze(1)
    order = torch.sort(logits[candidates], descending=True, stable=True).indices[:top_k]
    candidates = candidates[order]  # from the likeliest on
    probabilities = torch.softmax(logits[candidates].double() / temperature, dim=0)
    if top_p is not None:
        before = probabilities.cumsum(0) - probabilities  # probability of all likelier tokens
        probabilities = torch.where(before < top_p, probabilities, 0.0)
    return int(candidates[torch.multinomial(probabilities, 1, generator=generator)])
