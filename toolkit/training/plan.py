"""What a run will cost, computed in the open and without the device: (recipe, device) -> bytes, micro-batch, days, disk.

Memory is counted, not guessed: weights, gradients and moments from the shapes, the tensors that autograd keeps from
what the model's operations save (a test compares them with what it really saves), the largest moment of the loss and of
the backward pass. `torch.compile` usually keeps less, so these are upper bounds for it. Time is the model's floating-point
operations over a range of utilisations, since the utilisation itself can only be measured.
"""

import itertools
import math
import time
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from toolkit.config import Precision, TrainConfig, divisors, grad_accum_steps
from toolkit.errors import UserError
from toolkit.model.gpt2 import canonical_shapes, flops_per_token, num_parameters, padded_vocab_size
from toolkit.model.loss import GPU_TILE_ELEMENTS, PRODUCT_PARTS
from toolkit.model.product import cpu_widens, multiply, operand
from toolkit.training.environment import cpu_is_asked_for, device_memory_bytes, device_name, resolve_precision
from toolkit.training.hardware import DEVICES, find_device, peak_flops
from toolkit.training.muon import BLOCK_PREFIX

GIB = 2**30
RESERVED_BYTES = GIB // 2  # the driver's context, kernels and the matrix libraries' workspaces
MARGIN = 0.08  # share of the memory left free: fragmentation, and what a desktop shows
SMALLEST, LARGEST = 0.001, 1_000_000  # GiB, TFLOP/s and processes outside these are slips of the finger
UTILISATIONS = (0.3, 0.4, 0.5, 0.6)  # MFU; 0.3 eager on a small card to 0.6 compiled and well fed


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes on one device in the second and later micro-batches, when gradients and moments exist.

    `peak` is weights + gradients + moments + saved activations + the larger of `logits_chunk` and `backward_pass`. With autocast
    and no activation checkpointing the 16-bit weight copies are among the saved activations; with it they come on top.
    """

    weights: int
    gradients: int
    moments: int
    saved_activations: (
        int  # all that autograd keeps from forward to backward, each storage once, without the parameters
    )
    autocast_weight_copies: int  # 16-bit copies of the blocks' matrices that autocast makes once per micro-batch
    logits_chunk: int  # working memory of the chunked head and loss, beyond what it saves
    backward_pass: int  # working memory of the backward pass, a recomputed block included
    peak: int

    @property
    def fixed(self) -> int:
        """Weights, gradients and moments: what no smaller micro-batch makes smaller."""
        return self.weights + self.gradients + self.moments


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """How long the run takes at one utilisation of the device's peak."""

    mfu: float  # share of the peak [0..1]
    tokens_per_second: float  # over all processes
    days: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A recipe on a device, in numbers; `lines` is for people, `to_dict` for programs."""

    device: str
    memory_bytes: int  # of one device
    usable_bytes: int  # less the reserve and the margin
    tflops: float | None  # of one device in this precision; None: not known, so no times either [TFLOP/s]
    precision: Precision
    num_processes: int
    num_parameters: int
    flops_per_token: int
    sequence_length: int
    tokens_per_step: int
    max_steps: int
    activation_checkpointing: str
    stated_micro_batch_size: int | str  # what the recipe says [windows]
    micro_batch_size: int  # the largest that fits [windows]
    grad_accum_steps: int
    memory: MemoryEstimate  # with that micro-batch
    speeds: tuple[Speed, ...]
    host_copy_bytes: int  # main memory that a checkpoint is copied to before it is written
    data_bytes: int  # shards, if no token is seen twice
    checkpoint_bytes: int  # one checkpoint
    num_checkpoints: int  # most that lie on the disk at one time

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values; sizes in bytes."""
        return asdict(self) | {"speeds": [asdict(speed) for speed in self.speeds]}

    def lines(self) -> list[str]:
        """The plan as a text for people."""
        return [
            *self._model_lines(),
            *self._memory_lines(),
            *self._step_lines(),
            *self._time_lines(),
            *self._disk_lines(),
        ]

    def _model_lines(self) -> list[str]:
        rate = "peak not known" if self.tflops is None else f"{self.tflops:.3g} TFLOP/s in {self.precision}"
        return [
            f"model    {self.num_parameters:,} parameters, {self.flops_per_token / 1e9:.3f} GFLOP per token forward and "
            f"backward at {self.sequence_length} tokens of context",
            f"device   {self.num_processes} x {self.device}: {self.memory_bytes / GIB:.1f} GiB, {rate}",
        ]

    def _memory_lines(self) -> list[str]:
        memory = self.memory
        rows = [
            ("weights (fp32)", memory.weights),
            ("gradients", memory.gradients),
            ("optimizer moments", memory.moments),
            ("saved for the backward pass", memory.saved_activations),
        ]
        if memory.autocast_weight_copies:
            within = "  of these " if self.activation_checkpointing == "none" else ""
            rows.append((f"{within}{self.precision} copies of the weights", memory.autocast_weight_copies))
        if memory.logits_chunk >= memory.backward_pass:
            rows.append(("logits of one chunk and the loss's work", memory.logits_chunk))
        else:
            rows.append(("work of the backward pass", memory.backward_pass))
        rows.append(("peak", memory.peak))
        return [
            f"memory   {self.micro_batch_size} windows of {self.sequence_length} tokens in a micro-batch, {self.precision} [GiB]",
            *(f"           {name:<42}{size / GIB:8.2f}" for name, size in rows),
            f"           usable of {self.memory_bytes / GIB:.1f} GiB: {self.usable_bytes / GIB:.2f} "
            f"({RESERVED_BYTES / GIB:.1f} GiB for the driver and libraries, {MARGIN:.0%} margin)",
        ]

    def _step_lines(self) -> list[str]:
        lines = [
            f"step     {self.tokens_per_step:,} tokens = {self.micro_batch_size} windows x {self.sequence_length} tokens x "
            f"{self.grad_accum_steps} accumulation steps x {self.num_processes} {'process' if self.num_processes == 1 else 'processes'}"
        ]
        stated = self.stated_micro_batch_size
        windows = self.tokens_per_step // self.sequence_length
        if isinstance(stated, int) and windows % (stated * self.num_processes):
            lines.append(
                f"           the recipe's micro_batch_size {stated} makes no whole step of {windows} windows; use "
                f"{self.micro_batch_size}"
            )
        elif isinstance(stated, int) and stated > self.micro_batch_size:
            lines.append(f"           the recipe's micro_batch_size {stated} does not fit; use {self.micro_batch_size}")
        elif isinstance(stated, int) and stated < self.micro_batch_size:
            lines.append(f"           the recipe's micro_batch_size {stated} fits too")
        return lines

    def _time_lines(self) -> list[str]:
        tokens = self.max_steps * self.tokens_per_step
        lines = [f"time     {tokens / 1e9:.3g} billion tokens in {self.max_steps:,} steps"]
        if not self.speeds:
            return [*lines, "           the device's peak is not known; give --tflops to see times"]
        lines += [
            f"           {speed.mfu:.0%} of the peak: {speed.tokens_per_second:>11,.0f} tokens/s, {speed.days:8.2f} days"
            for speed in self.speeds
        ]
        return lines

    def _disk_lines(self) -> list[str]:
        kept = self.num_checkpoints * self.checkpoint_bytes
        return [
            f"disk     {self.data_bytes / GIB:.1f} GiB of shards if no token is seen twice; {self.checkpoint_bytes / GIB:.2f} GiB a "
            f"checkpoint, {kept / GIB:.1f} GiB for at most {self.num_checkpoints}",
            f"host     {self.host_copy_bytes / GIB:.2f} GiB of main memory for the copy that a checkpoint is written from",
        ]


def plan(
    config: TrainConfig,
    device: str = "this",
    *,
    memory_gib: float | None = None,
    tflops: float | None = None,
    num_processes: int = 1,
) -> Plan:
    """What this recipe needs on `num_processes` devices of a kind, and the largest micro-batch that fits.

    `device` is a key of `hardware.DEVICES` or "this" for the machine at hand; `memory_gib` and `tflops` beside it win,
    and both of them without a key describe a device of their own.
    Raises: UserError for an unknown device, impossible numbers, or a model that fits with no micro-batch.
    """
    for name, value in (("memory_gib", memory_gib), ("tflops", tflops), ("num_processes", num_processes)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name}={value} must be above 0")
        if value is not None and not SMALLEST <= value <= LARGEST:
            raise UserError(f"{name}={value} is that of no device; use a number from {SMALLEST} to {LARGEST:,}")
    label, memory_bytes, peak_tflops, precision, on_cpu = _describe(
        config, device, memory_gib=memory_gib, tflops=tflops, num_processes=num_processes
    )
    micro_batch_size = largest_micro_batch(
        config, precision, memory_bytes=memory_bytes, num_processes=num_processes, device=label, on_cpu=on_cpu
    )
    model, training = config.model, config.training
    tokens = training.max_steps * training.tokens_per_step
    flops = flops_per_token(model, config.data.sequence_length)
    speeds = []
    for mfu in UTILISATIONS if peak_tflops is not None else ():
        tokens_per_second = mfu * cast(float, peak_tflops) * 1e12 * num_processes / flops
        speeds.append(Speed(mfu=mfu, tokens_per_second=tokens_per_second, days=tokens / tokens_per_second / 86_400))
    checkpoint_bytes = 4 * num_parameters(model) + _moment_bytes(config, num_parameters(model))
    return Plan(
        device=label,
        memory_bytes=memory_bytes,
        usable_bytes=usable_bytes(memory_bytes),
        tflops=peak_tflops,
        precision=precision,
        num_processes=num_processes,
        num_parameters=num_parameters(model),
        flops_per_token=flops,
        sequence_length=config.data.sequence_length,
        tokens_per_step=training.tokens_per_step,
        max_steps=training.max_steps,
        activation_checkpointing=training.activation_checkpointing,
        stated_micro_batch_size=training.micro_batch_size,
        micro_batch_size=micro_batch_size,
        grad_accum_steps=grad_accum_steps(config, micro_batch_size=micro_batch_size, num_processes=num_processes),
        memory=memory_estimate(config, precision, micro_batch_size=micro_batch_size, on_cpu=on_cpu),
        speeds=tuple(speeds),
        host_copy_bytes=checkpoint_bytes,
        data_bytes=tokens * (2 if model.vocab_size <= 2**16 else 4),  # ids are uint16 where they fit
        checkpoint_bytes=checkpoint_bytes,
        num_checkpoints=_num_checkpoints(config),
    )


def largest_micro_batch(
    config: TrainConfig,
    precision: Precision,
    *,
    memory_bytes: int,
    num_processes: int = 1,
    device: str = "the device",
    on_cpu: bool = False,
) -> int:
    """The largest micro-batch [windows] that divides the step and fits into a device's memory with the margin.

    Raises: UserError if not even one window fits, or the step's windows cannot be shared out among the processes.
    """
    grad_accum_steps(config, micro_batch_size=1, num_processes=num_processes)  # refuses what no micro-batch can divide
    windows = config.training.tokens_per_step // config.data.sequence_length // num_processes
    usable = usable_bytes(memory_bytes)
    fitting = itertools.takewhile(
        lambda size: memory_estimate(config, precision, micro_batch_size=size, on_cpu=on_cpu).peak <= usable,
        divisors(windows),
    )
    largest = max(fitting, default=None)
    if largest is None:
        smallest = memory_estimate(config, precision, micro_batch_size=1, on_cpu=on_cpu)
        raise UserError(_nothing_fits(config, smallest, usable=usable, memory_bytes=memory_bytes, device=device))
    return largest


def usable_bytes(memory_bytes: int) -> int:
    """What a run may plan with: the memory less the driver's reserve and a margin."""
    return max(0, int(memory_bytes * (1 - MARGIN)) - RESERVED_BYTES)


def memory_estimate(
    config: TrainConfig, precision: Precision, *, micro_batch_size: int, on_cpu: bool = False
) -> MemoryEstimate:
    """Bytes on one device, a GPU unless `on_cpu`, while it trains with this micro-batch."""
    model, training = config.model, config.training
    tokens, width = micro_batch_size * config.data.sequence_length, model.n_embd
    padding = (padded_vocab_size(model) - model.vocab_size) * width
    parameters = num_parameters(model) + padding
    saved = saved_activation_bytes(config, precision, micro_batch_size=micro_batch_size, on_cpu=on_cpu)
    copies = _weight_copy_bytes(config, precision)
    checkpointing = training.activation_checkpointing == "block"
    logits = _logits_chunk_bytes(config, precision, tokens=tokens)
    # The loss's gradients times the incoming one in fp32; later the largest operation of a block and what it reads.
    loss_gradients = 4 * (padded_vocab_size(model) + tokens) * width
    block = (10 if precision != "fp32" else 14) * tokens * width
    if on_cpu and model.dropout:  # the gradients of the probabilities, before and after dropout
        block += 8 * model.n_head * tokens * config.data.sequence_length
    if checkpointing:
        block += _block_bytes(config, precision, micro_batch_size=micro_batch_size, on_cpu=on_cpu)
    backward = max(loss_gradients, block)
    fixed = 4 * parameters + 4 * parameters + _moment_bytes(config, parameters)
    return MemoryEstimate(
        weights=4 * parameters,
        gradients=4 * parameters,
        moments=_moment_bytes(config, parameters),
        saved_activations=saved,
        autocast_weight_copies=copies,
        logits_chunk=logits,
        backward_pass=backward,
        peak=fixed + saved + (copies if checkpointing else 0) + max(logits, backward),
    )


def saved_activation_bytes(
    config: TrainConfig, precision: Precision, *, micro_batch_size: int, on_cpu: bool = False
) -> int:
    """Bytes that autograd keeps from the forward to the backward pass of one micro-batch, without the parameters.

    Counted operation by operation, as `torch.autograd.graph.saved_tensors_hooks` would see them; each storage once.
    """
    model, training = config.model, config.training
    product = _product_bytes(precision)
    tokens, width = micro_batch_size * config.data.sequence_length, model.n_embd
    rows = padded_vocab_size(model)
    if training.activation_checkpointing == "block":
        blocks = model.n_layer * tokens * width * 4  # each block's input, in the residual stream's fp32
    else:
        block = _block_bytes(config, precision, micro_batch_size=micro_batch_size, on_cpu=on_cpu)
        blocks = model.n_layer * block + _weight_copy_bytes(config, precision)
    mask = (4 if on_cpu else 1) if model.dropout else 0  # a GPU's kernel keeps one byte, a CPU factors in fp32
    embedding = tokens * (8 + mask * width)  # and the ids
    final_norm = tokens * (4 * width + 8)  # its input, mean and deviation
    several_chunks = tokens > training.loss_chunk_tokens  # then the head's gradient is summed in fp32
    loss = tokens * width * product + rows * width * (4 if several_chunks else product) + 8  # and the number of targets
    return blocks + embedding + final_norm + loss


def _block_bytes(config: TrainConfig, precision: Precision, *, micro_batch_size: int, on_cpu: bool) -> int:
    """What one block saves, without 16-bit weight copies.

    A CPU has no fused attention with dropout: all probabilities are kept there, before and after it, and the factors between
    them, in fp32 like the queries, keys and values that they are made of; unless `attention.attention` computes them again.
    """
    model, product = config.model, _product_bytes(precision)
    norms = 2 * (4 * model.n_embd + 8)  # input in fp32, mean and deviation
    # Inputs of c_attn, c_proj, c_fc and (four times as wide) the other c_proj; query, key, value; the GELU's input. The
    # attention's result and c_proj's input are one tensor.
    products = (1 + 1 + 1 + 4 + 3 + 4) * model.n_embd * product
    attention = 4 * model.n_head  # its normalisers
    masks = 2 * model.n_embd if model.dropout else 0  # one byte each; fused attention keeps none
    if model.dropout and on_cpu:
        again = precision == "bf16" and cpu_widens(torch.bfloat16)
        widened = 3 * model.n_embd * (4 - product) + 3 * model.n_head * config.data.sequence_length * 4
        attention = 0 if again else widened
        if precision == "fp32" and 1 in (micro_batch_size, model.n_head):
            # The values are then in the order of a product already, a part of c_attn's output, all of which stays with
            # them: beside it, queries and keys are kept scaled.
            attention += 2 * model.n_embd * 4
        masks = 2 * model.n_embd * product
    tokens = micro_batch_size * config.data.sequence_length
    return tokens * (norms + products + attention + masks)


def _weight_copy_bytes(config: TrainConfig, precision: Precision) -> int:
    """The blocks' matrices in 16 bits, which autocast makes at their first use in a micro-batch and keeps."""
    return 0 if precision == "fp32" else 2 * config.model.n_layer * 12 * config.model.n_embd**2


def _logits_chunk_bytes(config: TrainConfig, precision: Precision, *, tokens: int) -> int:
    """The loss's working memory at its largest, beyond the gradients that it saves for the backward pass."""
    model, half = config.model, precision != "fp32"
    rows, chunk = padded_vocab_size(model), min(tokens, config.training.loss_chunk_tokens)
    logits, head = chunk * rows, rows * model.n_embd
    product = _product_bytes(precision)
    # The logits, which become their own gradient in place; beside them some rows in fp32, later a part of the chunk's
    # gradient of the head, before it is added to the sum that is saved.
    softmax = (2 if half else 1) * 4 * min(logits, GPU_TILE_ELEMENTS)
    part = product * head // PRODUCT_PARTS if half and tokens > chunk else 0
    work = product * logits + max(softmax, part)
    weight_copy = 2 * head if half else 0
    return work + weight_copy + 4 * tokens * model.n_embd  # and the final hidden states in fp32


def _moment_bytes(config: TrainConfig, parameters: int) -> int:
    """AdamW keeps two fp32 moments for each parameter, Muon one for each element of a hidden matrix."""
    if config.optimizer.name == "adamw":
        return 8 * parameters
    shapes = canonical_shapes(config.model)
    hidden = sum(
        math.prod(shape) for name, shape in shapes.items() if name.startswith(BLOCK_PREFIX) and len(shape) == 2
    )
    return 8 * (parameters - hidden) + 4 * hidden


def _product_bytes(precision: Precision) -> int:
    return 4 if precision == "fp32" else 2


def _num_checkpoints(config: TrainConfig) -> int:
    """Most checkpoints on the disk at one time: the newest, those kept for good, the best, and the one being written."""
    kept, training = config.checkpoint, config.training
    written = math.ceil(training.max_steps / training.checkpoint_every) if training.checkpoint_every else 1
    for_good = training.max_steps // kept.keep_every if kept.keep_every else 0
    return min(written, kept.keep_last + for_good + kept.keep_best + 1)


def _nothing_fits(config: TrainConfig, smallest: MemoryEstimate, *, usable: int, memory_bytes: int, device: str) -> str:
    message = (
        f"a model of {num_parameters(config.model):,} parameters needs {smallest.peak / GIB:.2f} GiB for one window of "
        f"{config.data.sequence_length} tokens, and {device} has {usable / GIB:.2f} GiB usable of {memory_bytes / GIB:.1f}"
    )
    if smallest.fixed > usable:
        return f"{message}; weights, gradients and moments alone take {smallest.fixed / GIB:.2f} GiB: use a smaller model (--model.n-layer, --model.n-embd)"
    advice = "a shorter --data.sequence-length or a smaller model"
    if config.training.activation_checkpointing == "none":
        advice = f"--training.activation-checkpointing block, {advice}"
    return f"{message}; use {advice}"


def _describe(
    config: TrainConfig, device: str, *, memory_gib: float | None, tflops: float | None, num_processes: int
) -> tuple[str, int, float | None, Precision, bool]:
    """(label, memory [bytes], peak [TFLOP/s] or None, precision, whether it is a CPU) of the device that was asked for."""
    asked = config.training.precision
    precision: Precision
    if device == "this" and memory_gib is not None and tflops is not None:
        precision = "bf16" if asked == "auto" else asked
        return "a device as described", int(memory_gib * GIB), tflops, precision, False
    if device == "this":
        precision = resolve_precision(asked)
        own = torch.device("cuda" if torch.cuda.is_available() and not cpu_is_asked_for() else "cpu")
        memory_bytes = device_memory_bytes(own) if memory_gib is None else int(memory_gib * GIB)
        if own.type == "cpu" and memory_gib is None:
            memory_bytes //= num_processes  # they share one machine's memory
        if tflops is None:
            tflops = _own_tflops(own, precision)
        return f"this machine, {device_name(own)}", memory_bytes, tflops, precision, own.type == "cpu"
    known = find_device(device)
    if known is None:
        raise UserError(
            f"device {device!r} is not known; use this, {', '.join(entry.key for entry in DEVICES)}, or leave "
            "--device out and give --memory-gib and --tflops"
        )
    precision = asked if asked != "auto" else ("bf16" if known.has_bf16 else "fp16")
    peak = known.peak_tflops(precision)
    if peak is None:
        raise UserError(f"{known.key} does not compute {precision} natively; use --training.precision fp16 or fp32")
    label = known.cuda_name if "(" not in known.cuda_name else known.key.upper()
    return label, int((memory_gib or known.memory_gib) * GIB), tflops or peak, precision, False


def _own_tflops(device: torch.device, precision: Precision) -> float | None:
    """The peak of the device at hand: from the table on CUDA, measured on a CPU; None where neither is possible."""
    if device.type == "cuda":
        flops = peak_flops(torch.cuda.get_device_name(device), precision)
        return None if flops is None else flops / 1e12
    rows, inner, columns = 1024, 768, 3072  # GPT-2 124M's c_fc
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    left, right = operand(torch.ones(rows, inner), dtype), operand(torch.ones(inner, columns), dtype)
    fastest = math.inf
    for _ in range(8):
        start = time.perf_counter()
        multiply(left, right, dtype)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * rows * inner * columns / fastest / 1e12
