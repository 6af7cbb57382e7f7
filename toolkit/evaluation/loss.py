"""A model and batches -> loss, perplexity and bits per byte, the same to the bit for any number of processes.

Every process evaluates batches r, r + N, ...; a batch's sums land in its own column of a vector that is zero elsewhere,
so that adding the processes' vectors is exact, and the columns are then added in one fixed order. What is evaluated,
and how it is cut into batches, is the caller's choice.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.model.gpt2 import GPT2
from toolkit.model.loss import IGNORED_TARGET

BATCHES_BETWEEN_QUESTIONS = 16  # batches of a process between two looks at whether to go on


class Batches(Protocol):
    """Batches by number, each with "input_ids" and "targets" (B, T) int64; B may differ from batch to batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """What a model makes of the evaluated targets."""

    loss: float  # mean over targets [nats per token]
    perplexity: float  # exp(loss)
    bits_per_byte: float  # nats over all targets / (ln 2 * utf8_bytes): comparable between tokenizers
    tokens: int  # targets
    utf8_bytes: int  # of those targets, end-of-text counting 0


def evaluate(
    model: GPT2,
    batches: Batches,
    token_bytes: np.ndarray,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    reduce: Callable[[Tensor], Tensor] | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    should_stop: Callable[[], bool] | None = None,
) -> EvaluationResult | None:
    """The model's losses over all batches, on every process alike; the model's training mode is left as it was.

    `token_bytes` (V,) is the number of UTF-8 bytes of each id; `reduce` adds a float64 tensor over all processes;
    `autocast` makes the context of each forward pass. `should_stop` is asked by all processes together every
    BATCHES_BETWEEN_QUESTIONS batches and may be a collective; where it says yes, the result is None.
    Raises: UserError if there is nothing to evaluate.
    """
    if len(batches) == 0:
        raise UserError("there are no windows to evaluate; the validation split must hold at least one of T + 1 tokens")
    assert num_processes == 1 or reduce is not None, "several processes need a way to add their sums"
    device = model.wte.weight.device
    sums_device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    bytes_of = torch.from_numpy(np.array(token_bytes, dtype=np.int64)).to(sums_device)
    sums = torch.zeros(3, len(batches), dtype=torch.float64, device=sums_device)  # nats, targets, bytes
    was_training = model.training
    model.eval()
    try:
        for turn in range(0, len(batches), num_processes):
            if should_stop is not None and turn // num_processes % BATCHES_BETWEEN_QUESTIONS == 0 and should_stop():
                return None
            index = turn + process_index
            if index >= len(batches):  # the last turn may have fewer batches than there are processes
                continue
            batch = batches[index]
            input_ids = batch["input_ids"].to(device, non_blocking=True)
            targets = batch["targets"].to(device, non_blocking=True)
            with autocast():
                losses = model.token_losses(input_ids, targets).to(sums_device)
            targets = targets.to(sums_device)
            counted = targets != IGNORED_TARGET
            sums[0, index] = losses.double().sum()
            sums[1, index] = counted.sum()
            sums[2, index] = (bytes_of[targets.clamp(min=0)] * counted).sum()
    finally:
        model.train(was_training)
    if reduce is not None:
        sums = reduce(sums)
    nats, tokens, utf8_bytes = sums.cpu().numpy().cumsum(axis=1)[:, -1].tolist()  # cumsum: strictly left to right
    loss = nats / tokens if tokens else math.nan
    return EvaluationResult(
        loss=loss,
        perplexity=_exp(loss),
        bits_per_byte=nats / (math.log(2) * utf8_bytes) if utf8_bytes else math.nan,
        tokens=int(tokens),
        utf8_bytes=int(utf8_bytes),
    )


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
