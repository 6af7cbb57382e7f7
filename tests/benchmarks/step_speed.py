"""How fast a training step of GPT-2 is here, beside the same model in `transformers`, and what share of the machine's
own matrix-product rate that is.

Each contender runs in a process of its own, in alternating rounds; the medians of the rounds are printed as tokens/s,
with each one's peak memory (beyond what the imported libraries take) and its share of the ceiling, and then the ratios
that this toolkit sets itself as targets.
Contenders, all on the same number of random tokens a step, in one micro-batch:
- toolkit, toolkit-compiled: `Trainer.train_step` of this toolkit, with everything that a run does in a step;
- toolkit-bare, toolkit-bare-compiled: a bare loop around this toolkit's own model: what Trainer and Accelerate cost is
  the difference, which on a CPU is measured once more with both in one process, step by step in turns;
- transformers, transformers-compiled: GPT2LMHeadModel in a bare PyTorch loop, SDPA on, the loss inside the model;
- transformers-trainer: the same model in `transformers.Trainer` with its defaults but for the precision, nothing saved or
  reported; transformers-trainer-fp32, in a table of bf16: with all its defaults, which compute in fp32.
The ceiling is the rate of plain matrix products of the model's own shapes, forward and backward. In bf16 on a CPU without
instructions for it, these products are fp32's, and `transformers` runs only if it is named: a step of 124M takes minutes there.

On a GPU, memory is what CUDA's allocator held at most, and fp32 is what each contender makes of it: TF32 in this toolkit.
There the micro-batch should be the one that a run would use: an H100 finishes 8,192 tokens of a compiled step before Python
has started its kernels (21 of 25 to 30 ms), and the table shows the speed of Python.

    python -m tests.benchmarks.step_speed [--size 124M|355M|...|small|tiny] [--sequence-length 512 1024] [--tokens 1024]
                                          [--precision fp32 bf16] [--device cpu|cuda] [--rounds 5] [--steps 3]
                                          [--contenders toolkit ceiling ...] [--out bench-results]
    python -m tests.benchmarks.step_speed --sequence-length 512 --precision fp32   # the first of four tables: half an hour
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python -m tests.benchmarks.step_speed --precision bf16   # oneDNN's products without AMX
    python -m tests.benchmarks.step_speed --device cuda --precision bf16 --tokens 32768 --sequence-length 1024 --steps 10
    python -m tests.benchmarks.step_speed --size tiny --tokens 128 --sequence-length 64 --rounds 1 --steps 1   # a look
    python -m tests.benchmarks.step_speed --tokens 8192 --sequence-length 1024   # the memory of micro-batch 8
"""

import argparse
import contextlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolkit.config import (
    GPT2_SIZES,
    DataConfig,
    GPT2Config,
    Precision,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    TrainingConfig,
    WandbConfig,
    gpt2_config,
)
from toolkit.data.manifest import Manifest, TokenizerInfo, write_manifest
from toolkit.data.shards import ShardWriter, shard_file_name
from toolkit.data.tokenizer import load_tokenizer
from toolkit.model.gpt2 import GPT2, flops_per_token, padded_vocab_size
from toolkit.model.product import cpu_units
from toolkit.training.environment import (
    configure_torch,
    device_name,
    keep_freed_memory,
    peak_memory_gib,
    slow_precision,
)
from toolkit.training.optimizer import build_optimizer
from toolkit.training.trainer import Trainer

CONTENDERS = (
    "toolkit",
    "toolkit-compiled",
    "toolkit-bare",
    "toolkit-bare-compiled",
    "transformers",
    "transformers-compiled",
    "transformers-trainer",
    "transformers-trainer-fp32",
    "ceiling",
)
# What Trainer and Accelerate cost: these two differ by less than a machine does from one minute to the next.
BARE_LOOP_OF = {"toolkit": "toolkit-bare", "toolkit-compiled": "toolkit-bare-compiled"}
# (faster, slower, at least): tokens/s of the one over the other's, at 124M, bf16, T = 512 and 1,024 tokens on 2 cores.
# On a GPU, where the step is compiled unless told otherwise, it is the compiled one that is compared with the bare loop.
SPEED_TARGETS = (
    ("toolkit-compiled", "transformers-compiled", 1.3),
    # The target is against Trainer with its defaults, which compute in fp32; told bf16, it is held against the same number.
    ("toolkit-compiled", "transformers-trainer-fp32", 2.5),
    ("toolkit-compiled", "transformers-trainer", 2.5),
    ("toolkit", "toolkit-bare", 0.98),
    ("toolkit-compiled", "toolkit-bare-compiled", 0.98),
    ("toolkit-compiled", "ceiling", 0.60),
)
# (smaller, larger, at most): peak memory of the one over the other's, at 124M, micro-batch 8 and T = 1024.
MEMORY_TARGETS = (("toolkit", "transformers", 0.55), ("toolkit-compiled", "transformers-compiled", 0.55))
WARMUP_STEPS = 4  # after two of them, memory that a step freed is still being found anew
Measurement = Callable[[argparse.Namespace, str], dict[str, float]]  # of a contender
SIZES = {
    "small": {"n_layer": 2, "n_head": 4, "n_embd": 256},
    "tiny": {"n_layer": 1, "n_head": 1, "n_embd": 32},
}


def model_config(arguments: argparse.Namespace) -> GPT2Config:
    """The model that is measured: a GPT-2 of a published shape, or a smaller one for a quick look."""
    published = arguments.size if arguments.size in GPT2_SIZES else "124M"
    return gpt2_config(published, context_length=1024, **SIZES.get(arguments.size, {}))


def write_random_set(folder: Path, *, tokens: int) -> None:
    """A data set of random GPT-2 ids."""
    tokenizer = load_tokenizer("gpt2")
    splits = {}
    for split in ("train", "val"):
        with ShardWriter(folder / shard_file_name(split, 0), dtype=np.uint16) as writer:
            writer.append(np.random.default_rng(0).integers(0, 50256, tokens), documents=0, utf8_bytes=4 * tokens)
        splits[split] = (writer.info,)
    info = TokenizerInfo(
        name=tokenizer.name, vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id, sha256=tokenizer.sha256
    )
    write_manifest(folder, Manifest(schema_version=1, source={"kind": "benchmark"}, tokenizer=info, splits=splits))


def time_steps(step: Callable[[], Any], *, steps: int, device: torch.device) -> float:
    """Mean seconds of a step after the warm-up; a GPU may run behind Python from one step to the next, but not past the last."""
    for _ in range(WARMUP_STEPS):
        step()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - started) / steps


def synchronize(device: torch.device) -> None:
    """Waits for all that the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def toolkit_step(arguments: argparse.Namespace, *, compiled: bool) -> Iterator[Callable[[], Any]]:
    """`Trainer.train_step` of a run that has just begun."""
    with tempfile.TemporaryDirectory() as temporary:
        write_random_set(Path(temporary), tokens=64 * arguments.tokens)
        config = TrainConfig(
            run=RunConfig(dir=f"{temporary}/run"),
            model=model_config(arguments),
            data=DataConfig(path=(temporary,), sequence_length=arguments.sequence_length),
            training=TrainingConfig(
                tokens_per_step=arguments.tokens,
                micro_batch_size=arguments.tokens // arguments.sequence_length,
                precision=arguments.precision,
                compile="on" if compiled else "off",
            ),
            schedule=ScheduleConfig(warmup_steps=10),
            wandb=WandbConfig(mode="disabled"),
        )
        with Trainer(config) as trainer:
            trainer.resume()
            yield trainer.train_step


def their_model(config: GPT2Config) -> Any:
    """The same model as `transformers` has it, without dropout, with SDPA."""
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            n_positions=config.context_length,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )


def bare_step(arguments: argparse.Namespace, contender: str) -> Callable[[], Any]:
    """A step of a bare PyTorch loop: forward, backward, clipping, fused AdamW."""
    config, device = model_config(arguments), torch.device(arguments.device)
    own = contender.startswith("toolkit-bare")
    if own:
        configure_torch(device, deterministic=False)  # before the first tensor
    batch = arguments.tokens // arguments.sequence_length
    ids = torch.randint(0, config.vocab_size, (batch, arguments.sequence_length + 1), device=device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    model: Any
    if own:
        model = GPT2(config, seed=1).to(device)
        optimizer = build_optimizer(model, TrainConfig().optimizer, device_type=device.type)
    else:
        model = their_model(config).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    if contender.endswith("compiled"):
        model.compile()
    bf16 = arguments.precision == "bf16"
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    numbers = itertools.count()

    def step() -> None:
        if own and next(numbers) == 1:  # as the Trainer does after its first step
            keep_freed_memory(device)
        with autocast:
            # theirs shifts the labels itself, and computes the loss where torch.compile sees it
            loss = model(inputs, targets) if own else model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def time_in_turns(first: Callable[[], Any], second: Callable[[], Any], *, pairs: int) -> tuple[float, float]:
    """Median seconds of a step of each, taken in turns: what slows the machine for a while slows both."""
    times: dict[Callable[[], Any], list[float]] = {first: [], second: []}
    for number in range(WARMUP_STEPS + pairs):
        for step in (first, second) if number % 2 == 0 else (second, first):
            started = time.perf_counter()
            step()  # on a CPU it has ended when it returns
            if number >= WARMUP_STEPS:
                times[step].append(time.perf_counter() - started)
    return statistics.median(times[first]), statistics.median(times[second])


def their_trainer_steps(arguments: argparse.Namespace, *, bf16: bool) -> float:
    """Seconds from one step's end to the next in `transformers.Trainer`, its batches included, after the warm-up."""
    import transformers

    config = model_config(arguments)
    windows = torch.randint(0, config.vocab_size, (64, arguments.sequence_length))
    batch, device = arguments.tokens // arguments.sequence_length, torch.device(arguments.device)
    times: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step in (WARMUP_STEPS, WARMUP_STEPS + arguments.steps):
                synchronize(device)
                times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as temporary:
        settings = transformers.TrainingArguments(
            output_dir=temporary,
            max_steps=WARMUP_STEPS + arguments.steps,
            per_device_train_batch_size=batch,
            bf16=bf16,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
        )
        transformers.Trainer(
            model=their_model(config),
            args=settings,
            train_dataset=[{"input_ids": row, "labels": row} for row in windows],
            callbacks=[Clock()],
        ).train()
    return (times[1] - times[0]) / arguments.steps


def ceiling_seconds(arguments: argparse.Namespace) -> float:
    """Seconds that the step's matrix products alone take: every weight's, forward and twice backward."""
    config = model_config(arguments)
    width, tokens = config.n_embd, arguments.tokens
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * config.n_layer
    shapes.append((width, padded_vocab_size(config)))
    device = torch.device(arguments.device)
    slow = slow_precision(arguments.precision, device)
    dtype = torch.bfloat16 if arguments.precision == "bf16" and not slow else torch.float32
    configure_torch(device, deterministic=False)
    keep_freed_memory(device)
    tensors = {
        shape: (
            torch.randn(tokens, shape[0], dtype=dtype, device=device),
            torch.randn(shape, dtype=dtype, device=device),
        )
        for shape in shapes
    }

    def products() -> None:
        for shape in shapes:
            rows, weight = tensors[shape]
            out = rows @ weight
            out @ weight.t()
            rows.t() @ out

    return time_steps(products, steps=arguments.steps, device=device)


def measure(arguments: argparse.Namespace, contender: str) -> dict[str, float]:
    """One contender's seconds per step and peak memory, a CPU's beyond the imported libraries', in this process."""
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    libraries = peak_memory_gib(device) if device.type == "cpu" else 0.0
    if contender == "ceiling":
        seconds = ceiling_seconds(arguments)
    elif contender.startswith("transformers-trainer"):
        told_bf16 = arguments.precision == "bf16" and not contender.endswith("fp32")
        seconds = their_trainer_steps(arguments, bf16=told_bf16)
    elif contender in ("toolkit", "toolkit-compiled"):
        with toolkit_step(arguments, compiled=contender.endswith("compiled")) as step:
            seconds = time_steps(step, steps=arguments.steps, device=device)
    else:
        seconds = time_steps(bare_step(arguments, contender), steps=arguments.steps, device=device)
    return {"seconds": seconds, "peak_gib": peak_memory_gib(device) - libraries, "libraries_gib": libraries}


def measure_in_turns(arguments: argparse.Namespace, contender: str) -> dict[str, float]:
    """Seconds per step of a toolkit contender and of the bare loop around the same model, both in this process."""
    torch.set_num_threads(arguments.threads)
    with toolkit_step(arguments, compiled=contender.endswith("compiled")) as step:
        bare = bare_step(arguments, BARE_LOOP_OF[contender])
        seconds, bare_seconds = time_in_turns(step, bare, pairs=arguments.rounds * arguments.steps)
    return {"seconds": seconds, "bare_seconds": bare_seconds}


def measure_apart(arguments: argparse.Namespace, contender: str, function: Measurement = measure) -> dict[str, float]:
    """A measurement in a process of its own: on a CPU one with all libraries imported already, on a GPU a fresh one.

    Why: memory of a CPU is counted from there on, and CUDA does not work in a process that was forked.
    """
    context = multiprocessing.get_context("fork" if arguments.device == "cpu" else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(theirs, function, arguments, contender))  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    try:
        result: dict[str, float] = ours.recv()
    except EOFError:
        raise SystemExit(f"{contender} failed; what it printed is above") from None
    process.join()
    return result


def send(answer: Connection, function: Measurement, arguments: argparse.Namespace, contender: str) -> None:
    """What the other process does."""
    answer.send(function(arguments, contender))


def run_rounds(arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """All contenders in alternating rounds, each told as it ends: a run that is cut short has shown something."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.contenders}
    for number in range(arguments.rounds):
        for name in arguments.contenders if number % 2 == 0 else arguments.contenders[::-1]:
            result = measure_apart(arguments, name)
            results[name].append(result)
            speed = f"{arguments.tokens / result['seconds']:,.1f} tokens/s"
            print(f"round {number + 1} of {arguments.rounds}: {name} {speed}", file=sys.stderr, flush=True)
    return results


def run_in_turns(arguments: argparse.Namespace) -> dict[tuple[str, str], list[float]]:
    """(contender, its bare loop) -> tokens/s of both, their steps in turns: a difference of 2 % is less than rounds differ.

    Not on a GPU, where the end of one's step runs while the host begins the other's.
    """
    speeds = {}
    for name, bare in BARE_LOOP_OF.items() if arguments.device == "cpu" else ():
        if {name, bare} <= set(arguments.contenders):
            result = measure_apart(arguments, name, measure_in_turns)
            speeds[name, bare] = [arguments.tokens / result[key] for key in ("seconds", "bare_seconds")]
    return speeds


def table(results: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per contender: medians over the rounds."""
    medians = {name: statistics.median(r["seconds"] for r in rounds) for name, rounds in results.items()}
    ceiling = medians.get("ceiling")
    return [
        {
            "contender": name,
            "tokens_per_second": arguments.tokens / medians[name],
            "peak_gib": max(r["peak_gib"] for r in rounds),
            "share_of_ceiling": ceiling / medians[name] if ceiling else None,
            "rounds": [round(arguments.tokens / r["seconds"], 1) for r in rounds],
        }
        for name, rounds in results.items()
    ]


def ratios(rows: list[dict[str, Any]], in_turns: dict[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
    """The ratios that have a target, of those whose contenders were measured."""
    by_name = {row["contender"]: row for row in rows}
    found = []
    for measured, targets in (("tokens_per_second", SPEED_TARGETS), ("peak_gib", MEMORY_TARGETS)):
        for name, other, target in targets:
            if name in by_name and other in by_name:
                pair = in_turns.get((name, other)) or [by_name[name][measured], by_name[other][measured]]
                ratio = {"what": measured, "contender": name, "over": other, "both": pair, "target": target}
                found.append(ratio | {"in_turns": (name, other) in in_turns, "ratio": pair[0] / pair[1]})
    return found


def ratio_line(ratio: dict[str, Any]) -> str:
    """A ratio with both of its sides and its target."""
    speed = ratio["what"] == "tokens_per_second"
    first, second = ratio["both"]
    sides = f"{first:,.1f} / {second:,.1f} tokens/s" if speed else f"{first:.2f} / {second:.2f} GiB"
    name = f"{ratio['contender']} / {ratio['over']}"
    sides += ", step by step in turns" if ratio["in_turns"] else ""
    return f"{name:<44}{ratio['ratio']:>6.3f}   {'at least' if speed else 'at most'} {ratio['target']:<5} {sides}"


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Two bars per contender: its tokens/s, with its rounds as dots and its share of the ceiling as a number, and its peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(
        ncols=2, sharey=True, width_ratios=(3, 2), figsize=(10, 0.6 * len(rows) + 1.5), layout="constrained"
    )
    rows = rows[::-1]  # bars are drawn from below
    names = [row["contender"] for row in rows]
    speed.barh(names, [row["tokens_per_second"] for row in rows], color="#88aacc")
    for height, row in enumerate(rows):
        speed.plot(row["rounds"], [height] * len(row["rounds"]), "k.", markersize=4)
        if row["share_of_ceiling"]:
            end = (max(row["tokens_per_second"], *row["rounds"]), height)
            speed.annotate(f"{row['share_of_ceiling']:.2f}", end, (5, 0), textcoords="offset points", va="center")
    speed.margins(x=0.12)
    numbers = "; number: share of the ceiling" if any(row["share_of_ceiling"] for row in rows) else ""
    speed.set_xlabel(f"tokens/s (bar: median; dots: rounds{numbers})")
    memory.bar_label(memory.barh(names, [row["peak_gib"] for row in rows], color="#ccaa88"), fmt="%.2f", padding=3)
    memory.margins(x=0.2)
    memory.set_xlabel("peak memory [GiB]")
    lines = math.ceil(len(title) / 90)
    figure.suptitle(textwrap.fill(title, math.ceil(len(title) / lines) + 8), fontsize=10)  # of much the same length
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def units() -> str:
    """What this CPU multiplies with, which decides every rate; and what a user has forbidden oneDNN to use of it."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16", "": torch.backends.cpu.get_cpu_capability()}
    name = names[cpu_units()]
    return name + (f" with ONEDNN_MAX_CPU_ISA={limit}" if limit else "")


def run_shape(arguments: argparse.Namespace) -> None:
    """Measures one sequence length, prints its table and ratios, and writes them with a picture."""
    results = run_rounds(arguments)
    rows = table(results, arguments)
    flops = flops_per_token(model_config(arguments), arguments.sequence_length)
    where = (
        f"{arguments.threads} CPU threads, {units()}"
        if arguments.device == "cpu"
        else device_name(torch.device("cuda"))
    )
    title = (
        f"GPT-2 {arguments.size}, {arguments.precision}, {arguments.tokens} tokens a step, T = {arguments.sequence_length}, "
        f"{where}, {flops / 1e9:.2f} GFLOP per token"
    )
    print(title)
    print(f"{'contender':<24}{'tokens/s':>11}{'peak GiB':>10}{'of ceiling':>12}   rounds")
    for row in rows:
        share = f"{row['share_of_ceiling']:.2f}" if row["share_of_ceiling"] else "-"
        print(
            f"{row['contender']:<24}{row['tokens_per_second']:>11.1f}{row['peak_gib']:>10.2f}{share:>12}   {row['rounds']}"
        )
    targets = ratios(rows, run_in_turns(arguments))
    print("ratios; targets of speed are for 124M, bf16, T = 512; of memory for 124M, 8 windows of T = 1024")
    for ratio in targets:
        print(ratio_line(ratio))
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"step-{arguments.size}-{arguments.precision}-{arguments.sequence_length}-{arguments.tokens}"
    written = {"title": title, "rows": rows, "ratios": targets}
    (arguments.out / f"{name}.json").write_text(json.dumps(written, indent=2) + "\n")
    draw(rows, arguments.out / f"{name}.png", title)
    print(f"written: {arguments.out / name}.json and .png", flush=True)


def default_contenders(precision: Precision, device: str) -> list[str]:
    """All that finish their steps in seconds, each once."""
    if precision == "fp32":
        return [name for name in CONTENDERS if name != "transformers-trainer-fp32"]
    if not slow_precision(precision, torch.device(device)):
        return list(CONTENDERS)
    print(
        "this CPU has no bf16 instructions: without transformers, whose steps would take 50 times as long", flush=True
    )
    return [name for name in CONTENDERS if name == "transformers-trainer-fp32" or not name.startswith("transformers")]


def main() -> None:
    """Measures, prints tables, and writes them with pictures into the folder of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="124M", choices=(*GPT2_SIZES, *SIZES))
    parser.add_argument("--sequence-length", type=int, nargs="+", default=[512, 1024], help="a table for each")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a step, one micro-batch")
    parser.add_argument(
        "--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"), help="a table for each"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, help="all, but for transformers' bf16 on some CPUs"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    arguments = parser.parse_args()
    for length in arguments.sequence_length:
        if arguments.tokens % length:
            parser.error(f"--tokens {arguments.tokens} is not a multiple of --sequence-length {length}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available here")
    # Imported once, before the processes part: their times and peaks begin with the same libraries in memory.
    importlib.import_module("transformers.models.gpt2.modeling_gpt2")
    importlib.import_module("transformers.trainer")
    for precision, length in itertools.product(arguments.precision, arguments.sequence_length):
        contenders = arguments.contenders or default_contenders(precision, arguments.device)
        shape = {"precision": precision, "sequence_length": length, "contenders": contenders}
        run_shape(argparse.Namespace(**{**vars(arguments), **shape}))


if __name__ == "__main__":
    main()
