"""How many tokens `recipes/speedrun_124m.py` (Muon) needs to reach the final validation loss of `recipes/train_124m.py`
(AdamW), on a GPT-2 of 5 million parameters and the bytes of Python's standard library.

Both recipes are run as they are, with a smaller model, fewer and smaller steps (4,096 bytes), and their schedules scaled to
the length of the run. AdamW's learning rate is chosen among --adamw-rates and Muon's among --muon-rates, by the final validation loss
of seed 1; the best of each is then run with the other seeds. Every run is a process of its own with one thread, and a
finished run is not repeated. The table, the curves and a picture go to --out.

What was tuned besides: the rate of the AdamW part of Muon's recipe, once (2e-3 gave 2.3625 and 6e-3 2.4031 with Muon's rate
0.04, seed 1). Muon's best rate was the largest tried, so a larger one may do better still.

    toolkit prepare stdlib --out data/stdlib-bytes --tokenizer bytes
    python -m tests.benchmarks.tokens_to_loss [--steps 160] [--share 0.4] [--runs runs/tokens-to-loss]
                                              [--out tests/benchmarks/results]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes import speedrun_124m, train_124m
from tests.support import ROOT, change, environment, flags
from toolkit.config import TrainConfig

TOKENS_PER_STEP = 4096
SEQUENCE_LENGTH = 128
MODEL = {"n_layer": 4, "n_head": 5, "n_embd": 320, "vocab_size": 257, "context_length": SEQUENCE_LENGTH}  # 5.06 million
POINTS = 8  # validations on the way
SEEDS = (1, 2, 3)
ADAMW_RATES = (2.5e-4, 5e-4, 7e-4, 1e-3, 2e-3)
MUON_RATES = (0.02, 0.04, 0.06, 0.08)
RECIPES = {"adamw": train_124m, "muon": speedrun_124m}


@dataclass(frozen=True, slots=True)
class Run:
    """One training run of the comparison."""

    optimizer: str
    rate: float  # AdamW's peak learning rate, or Muon's
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"{self.optimizer}-{self.rate:g}-{self.steps}-seed{self.seed}"


def config_of(run: Run, *, data: str, folder: Path) -> TrainConfig:
    """The recipe with the small model, the run's rate and seed, and its schedule shrunk to the run's length."""
    recipe = RECIPES[run.optimizer].CONFIG
    warmup = max(1, round(recipe.schedule.warmup_steps * run.steps / recipe.training.max_steps))
    return change(
        recipe,
        run={"dir": str(folder / run.name)},
        model=MODEL,
        data={"path": (data,), "sequence_length": SEQUENCE_LENGTH},
        training={
            "seed": run.seed,
            "max_steps": run.steps,
            "tokens_per_step": TOKENS_PER_STEP,
            "micro_batch_size": TOKENS_PER_STEP // SEQUENCE_LENGTH,
            "precision": "fp32",
            "eval_every": max(1, run.steps // POINTS),
            "checkpoint_every": None,
            "sample_every": None,
        },
        optimizer={"learning_rate" if run.optimizer == "adamw" else "muon_learning_rate": run.rate},
        schedule={"warmup_steps": warmup, "decay_steps": run.steps - warmup},
        evaluation={"max_tokens": 32_768, "micro_batch_size": 32},
        wandb={"mode": "disabled"},
    )


def train(run: Run, *, data: str, folder: Path) -> list[dict[str, Any]]:
    """Trains (or finds the finished run) and returns its validations: step, tokens, loss/val."""
    recipe = RECIPES[run.optimizer]
    command = [sys.executable, f"recipes/{Path(recipe.__file__).name}"]
    command += flags(config_of(run, data=data, folder=folder), recipe.CONFIG)
    done = subprocess.run(command, capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"), cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{run.name} failed:\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (folder / run.name / "metrics.jsonl").read_text().splitlines()]
    curve = [{key: row[key] for key in ("step", "tokens", "loss/val")} for row in rows if "loss/val" in row]
    print(f"{run.name:<40} {curve[-1]['tokens']:>9,} tokens: validation loss {curve[-1]['loss/val']:.4f}", flush=True)
    return curve


def train_all(runs: Sequence[Run], arguments: argparse.Namespace) -> dict[Run, list[dict[str, Any]]]:
    """The curves of all runs, `--jobs` at a time."""
    with ThreadPoolExecutor(arguments.jobs) as pool:
        return dict(
            zip(runs, pool.map(lambda r: train(r, data=arguments.data, folder=arguments.runs), runs), strict=True)
        )


def final(curve: Sequence[dict[str, Any]]) -> float:
    """The last validation loss [nats per byte]."""
    return float(curve[-1]["loss/val"])


def compare(arguments: argparse.Namespace) -> dict[Run, list[dict[str, Any]]]:
    """Tunes both optimizers on the first seed, then runs the best of each on all seeds."""
    curves: dict[Run, list[dict[str, Any]]] = {}
    lengths = {"adamw": arguments.steps, "muon": int(arguments.steps * arguments.share)}
    rates = {"adamw": arguments.adamw_rates, "muon": arguments.muon_rates}
    for optimizer, steps in lengths.items():
        tuned = train_all([Run(optimizer, rate, SEEDS[0], steps) for rate in rates[optimizer]], arguments)
        best = min(tuned, key=lambda run: final(tuned[run]))
        curves |= tuned
        curves |= train_all([Run(optimizer, best.rate, seed, steps) for seed in SEEDS[1:]], arguments)
    return curves


def best_runs(curves: dict[Run, list[dict[str, Any]]], optimizer: str) -> list[Run]:
    """The runs of an optimizer's best rate, one per seed."""
    rate = next(run.rate for run in curves if run.optimizer == optimizer and run.seed == SEEDS[-1])
    return sorted((run for run in curves if run.optimizer == optimizer and run.rate == rate), key=lambda run: run.seed)


def write_report(curves: dict[Run, list[dict[str, Any]]], arguments: argparse.Namespace) -> str:
    """tokens-to-loss.md (the table), .jsonl (every curve) and .png; returns the table."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = [
        "| optimizer | peak rate | seed | tokens | final validation loss [nats per byte] |",
        "|---|---|---|---|---|",
    ]
    for run, curve in curves.items():
        lines.append(f"| {run.optimizer} | {run.rate:g} | {run.seed} | {curve[-1]['tokens']:,} | {final(curve):.4f} |")
    means = {name: statistics.mean(final(curves[run]) for run in best_runs(curves, name)) for name in RECIPES}
    tokens = {name: curves[best_runs(curves, name)[0]][-1]["tokens"] for name in RECIPES}
    lines += [
        "",
        f"Means over seeds {', '.join(map(str, SEEDS))} at the best rate of each: AdamW {means['adamw']:.4f} after "
        f"{tokens['adamw']:,} tokens, Muon {means['muon']:.4f} after {tokens['muon']:,} "
        f"({tokens['muon'] / tokens['adamw']:.3f} of them).",
    ]
    text = "\n".join(lines) + "\n"
    (arguments.out / "tokens-to-loss.md").write_text(
        "# Tokens to the same validation loss: Muon and AdamW\n\nMade by `python -m tests.benchmarks.tokens_to_loss`; what "
        f"is compared is said there. {TOKENS_PER_STEP:,} bytes a step.\n\n{text}"
    )
    with (arguments.out / "tokens-to-loss.jsonl").open("w") as file:
        for run, curve in curves.items():
            row = {"optimizer": run.optimizer, "rate": run.rate, "seed": run.seed, "steps": run.steps, "curve": curve}
            file.write(json.dumps(row) + "\n")
    draw(curves, arguments.out / "tokens-to-loss.png", target=means["adamw"])
    return text


def draw(curves: dict[Run, list[dict[str, Any]]], path: Path, *, target: float) -> None:
    """Validation loss over tokens: the best rate's seeds bold, the other rates pale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for optimizer, colour in (("adamw", "#4477aa"), ("muon", "#cc6677")):
        best = best_runs(curves, optimizer)
        for run, curve in curves.items():
            if run.optimizer == optimizer:
                bold = run in best
                label = f"{optimizer}, peak rate {run.rate:g}, 3 seeds" if run == best[0] else None
                style = {"alpha": 1.0 if bold else 0.25, "linewidth": 1.5 if bold else 1.0, "label": label}
                axes.plot([p["tokens"] for p in curve], [p["loss/val"] for p in curve], color=colour, **style)
    axes.axhline(target, color="black", linewidth=0.8, linestyle=":", label="AdamW's final loss, mean of 3 seeds")
    axes.set_xlabel("tokens (bytes) trained on")
    axes.set_ylabel("validation loss [nats per byte]")
    axes.set_ylim(target - 0.15, target + 1.6)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Runs the comparison and writes its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/stdlib-bytes", help="prepared with --tokenizer bytes")
    parser.add_argument("--steps", type=int, default=160, help="AdamW's")
    parser.add_argument("--share", type=float, default=0.4, help="of AdamW's steps that Muon gets")
    parser.add_argument("--adamw-rates", type=float, nargs="+", default=list(ADAMW_RATES))
    parser.add_argument("--muon-rates", type=float, nargs="+", default=list(MUON_RATES))
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time, one thread each"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/tokens-to-loss")
    parser.add_argument("--out", type=Path, default=ROOT / "tests/benchmarks/results")
    arguments = parser.parse_args()
    print(write_report(compare(arguments), arguments))


if __name__ == "__main__":
    main()
