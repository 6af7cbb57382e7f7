"""How fast a training step of GPT-2 is here, beside the same model in `transformers`, and what share of the machine's
own matrix-product rate that is.

Each contender runs in a process of its own, in alternating rounds; the medians of the rounds are printed as tokens/s,
with each one's peak memory and its share of the ceiling. Contenders:
- toolkit: `Trainer.train_step` of this toolkit, with everything that a run does in a step;
- toolkit-bare: a bare loop around this toolkit's own model: what Trainer and Accelerate cost is the difference;
- transformers: GPT2LMHeadModel in a bare PyTorch loop (SDPA), eager; transformers-compiled: the same, compiled.
The ceiling is the rate of plain matrix products of the model's own shapes, forward and backward.

    python -m tests.benchmarks.step_speed [--size 124M|small] [--sequence-length 512] [--tokens 1024] [--precision fp32]
                                          [--rounds 5] [--steps 3] [--out bench-results]
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolkit.config import (
    DataConfig,
    GPT2Config,
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
from toolkit.training.environment import configure_torch
from toolkit.training.optimizer import build_optimizer
from toolkit.training.trainer import Trainer

CONTENDERS = ("toolkit", "toolkit-compiled", "toolkit-bare", "transformers", "transformers-compiled", "ceiling")
WARMUP_STEPS = 2


def model_config(arguments: argparse.Namespace) -> GPT2Config:
    """The model that is measured: GPT-2 124M at its real shape, or a small one for a quick look."""
    if arguments.size == "small":
        return gpt2_config("124M", n_layer=2, n_head=4, n_embd=256, context_length=1024)
    return gpt2_config(arguments.size, context_length=1024)


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


def time_steps(step: Callable[[], Any], *, steps: int) -> float:
    """Median seconds of a step after the warm-up."""
    for _ in range(WARMUP_STEPS):
        step()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def toolkit_steps(arguments: argparse.Namespace, *, compiled: bool) -> float:
    """Seconds of `Trainer.train_step`."""
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
            return time_steps(trainer.train_step, steps=arguments.steps)


def bare_steps(arguments: argparse.Namespace, contender: str) -> float:
    """Seconds of a step of a bare PyTorch loop: forward, backward, clipping, fused AdamW."""
    config = model_config(arguments)
    batch = arguments.tokens // arguments.sequence_length
    ids = torch.randint(0, config.vocab_size, (batch, arguments.sequence_length + 1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    model: Any
    if contender == "toolkit-bare":
        configure_torch(torch.device("cpu"), deterministic=False)
        model = GPT2(config, seed=1)
        optimizer = build_optimizer(model, TrainConfig().optimizer, device_type="cpu")
    else:
        import transformers

        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_layer=config.n_layer,
                n_head=config.n_head,
                n_embd=config.n_embd,
                n_positions=1024,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        if contender == "transformers-compiled":
            model.compile()
    autocast = torch.autocast("cpu", torch.bfloat16) if arguments.precision == "bf16" else contextlib.nullcontext()

    def step() -> None:
        with autocast:
            if contender == "toolkit-bare":
                loss = model(inputs, targets)
            else:
                logits = model(input_ids=inputs).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return time_steps(step, steps=arguments.steps)


def ceiling_seconds(arguments: argparse.Namespace) -> float:
    """Seconds that the step's matrix products alone take: every weight's, forward and twice backward."""
    config = model_config(arguments)
    width, tokens = config.n_embd, arguments.tokens
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * config.n_layer
    shapes.append((width, padded_vocab_size(config)))
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    tensors = {shape: (torch.randn(tokens, shape[0], dtype=dtype), torch.randn(shape, dtype=dtype)) for shape in shapes}

    def products() -> None:
        for shape in shapes:
            rows, weight = tensors[shape]
            out = rows @ weight
            out @ weight.t()
            rows.t() @ out

    return time_steps(products, steps=arguments.steps)


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """One contender's seconds per step and peak memory, in this process."""
    torch.set_num_threads(arguments.threads)
    contender = arguments.contender
    if contender == "ceiling":
        seconds = ceiling_seconds(arguments)
    elif contender in ("toolkit", "toolkit-compiled"):
        seconds = toolkit_steps(arguments, compiled=contender.endswith("compiled"))
    else:
        seconds = bare_steps(arguments, contender)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "peak_gib": peak}


def run_rounds(arguments: argparse.Namespace, contenders: list[str]) -> dict[str, list[dict[str, float]]]:
    """All contenders in alternating rounds, each in a process of its own."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    own = [
        "--size",
        arguments.size,
        "--sequence-length",
        str(arguments.sequence_length),
        "--tokens",
        str(arguments.tokens),
    ]
    own += ["--precision", arguments.precision, "--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    for number in range(arguments.rounds):
        for name in contenders if number % 2 == 0 else contenders[::-1]:
            done = subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.step_speed", "--contender", name, *own],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": str(arguments.threads)},
            )
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    return results


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


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """A bar per contender with its rounds as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(rows) + 1.5), layout="constrained")
    names = [row["contender"] for row in rows][::-1]
    axes.barh(names, [row["tokens_per_second"] for row in rows][::-1], color="#88aacc")
    for height, row in enumerate(rows[::-1]):
        axes.plot(row["rounds"], [height] * len(row["rounds"]), "k.", markersize=4)
    axes.set_xlabel("tokens/s (bar: median; dots: rounds)")
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Measures, prints a table, and writes it with a picture into the folder of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="124M", choices=("124M", "small"))
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a step, one micro-batch")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    arguments = parser.parse_args()
    if arguments.contender:
        print(json.dumps(measure(arguments)))
        return
    config = model_config(arguments)
    results = run_rounds(arguments, arguments.contenders)
    rows = table(results, arguments)
    title = (
        f"GPT-2 {arguments.size}, {arguments.precision}, {arguments.tokens} tokens a step, T = {arguments.sequence_length}, "
        f"{arguments.threads} CPU threads, {flops_per_token(config, arguments.sequence_length) / 1e9:.2f} GFLOP per token"
    )
    print(title)
    print(f"{'contender':<24}{'tokens/s':>10}{'peak GiB':>10}{'of ceiling':>12}   rounds")
    for row in rows:
        share = f"{row['share_of_ceiling']:.2f}" if row["share_of_ceiling"] else "-"
        print(
            f"{row['contender']:<24}{row['tokens_per_second']:>10.1f}{row['peak_gib']:>10.2f}{share:>12}   {row['rounds']}"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"step-{arguments.size}-{arguments.precision}-{arguments.sequence_length}"
    (arguments.out / f"{name}.json").write_text(json.dumps({"title": title, "rows": rows}, indent=2) + "\n")
    draw(rows, arguments.out / f"{name}.png", title)
    print(f"written: {arguments.out / name}.json and .png")


if __name__ == "__main__":
    main()
