"""How many tokens `recipes/speedrun_124m.py` (Muon) needs to reach the final validation loss of `recipes/train_124m.py`
(AdamW): on a GPT-2 of 5 million parameters and bytes, with many small steps in an hour on two CPU cores (5M) or with larger
ones (5M-long: minutes on a GPU, hours on a CPU), or at 124 million with a GPU.

Both recipes are run as they are, with fewer and smaller steps, the small setting's model in place of theirs, and a warm-up
that is a larger share of these short runs: scaled down like the rest, AdamW's would be a handful of steps, and it would look
far worse than it is. AdamW's learning rate is chosen among --adamw-rates and Muon's among --muon-rates, by the final
validation loss of the first seed; the best of each is then run with the other seeds. Every run is a process of its own with
one thread, and a finished run is not repeated. Both optimizers have steps of one size. The table, the curves and a picture
go to --out.

What was tuned besides, with seed 1: for 5M AdamW's warm-up (1.7715 with 10 %, 1.7747 with 20 %); for 5M-long, in bf16,
Muon's weight decay (at rate 0.06 it ends at 1.030 with 0.1 and at 1.092 with 0) and AdamW's warm-up (at their best rates of
seven, 1.082 with 20 % and 1.106 with 3.75 %). What 0.4 of the tokens needs is steps: where AdamW has 200 of 2,048 tokens
(windows of 128, warm-up 20 %, best of five rates, 3 seeds) and ends at 2.354, Muon ends at 2.248 with 110 steps, and at 2.489
with 80 (seed 1).

    toolkit prepare stdlib --out data/stdlib-bytes --tokenizer bytes
    python -m tests.benchmarks.tokens_to_loss [--setting 5M|5M-long|124M] [--steps 1200] [--share 0.4]
                                              [--runs runs/tokens-to-loss] [--out tests/benchmarks/results]
    python -m tests.benchmarks.tokens_to_loss --setting 124M --data data/fineweb-edu-10b     # on a GPU
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes import speedrun_124m, train_124m
from tests.support import ROOT, change, environment, flags
from toolkit.config import TrainConfig

RECIPES = {"adamw": train_124m, "muon": speedrun_124m}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is trained, on how much, and the rates that are tried."""

    report: str  # stem of the files with the results
    model: dict[str, int]  # in place of the recipes' own
    sequence_length: int
    tokens_per_step: int
    micro_batch_size: int
    precision: str
    compile: str
    steps: int  # AdamW's
    share: float  # of AdamW's steps that Muon gets
    points: int  # validations on the way
    validation_tokens: int
    adamw_rates: tuple[float, ...]
    muon_rates: tuple[float, ...]
    adamw_warmup: float = 0.2  # share of an optimizer's steps
    muon_warmup: float = 0.1
    beta2: float = 0.95  # of AdamW, and of the AdamW part of Muon's recipe


FIVE_MILLION = Setting(
    report="tokens-to-loss",
    model={"n_layer": 4, "n_head": 5, "n_embd": 320, "vocab_size": 257, "context_length": 64},
    sequence_length=64,
    tokens_per_step=768,
    micro_batch_size=12,
    precision="fp32",
    compile="off",  # would take longer than it saves
    steps=1200,
    share=0.4,
    points=4,
    validation_tokens=65_536,
    adamw_rates=(5e-4, 7.5e-4, 1e-3, 1.5e-3, 2e-3),
    muon_rates=(0.03, 0.04),
    adamw_warmup=0.1,
    muon_warmup=0.05,
    beta2=0.99,  # few tokens a step: a longer memory
)
SETTINGS = {
    "5M": FIVE_MILLION,
    "5M-long": replace(
        FIVE_MILLION,
        report="tokens-to-loss-long",
        model=FIVE_MILLION.model | {"context_length": 128},
        sequence_length=128,
        tokens_per_step=8192,
        micro_batch_size=64,
        steps=800,
        points=8,
        validation_tokens=32_768,
        adamw_rates=(1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3),
        muon_rates=(0.04, 0.06, 0.08),
        adamw_warmup=0.2,
        muon_warmup=0.1,
        beta2=0.95,
    ),
    "124M": Setting(
        report="tokens-to-loss-124m",
        model={},
        sequence_length=1024,
        tokens_per_step=65_536,
        micro_batch_size=16,
        precision="auto",
        compile="auto",
        steps=256,
        share=0.4,
        points=4,
        validation_tokens=262_144,
        adamw_rates=(3e-4, 6e-4, 1.2e-3, 1.8e-3, 2.4e-3),
        muon_rates=(0.01, 0.02, 0.04),
    ),
}


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


def config_of(run: Run, setting: Setting, *, data: str, folder: Path) -> TrainConfig:
    """The recipe with the setting's sizes, the run's rate and seed, and its schedule shrunk to the run's length."""
    recipe = RECIPES[run.optimizer].CONFIG
    warmup = round((setting.adamw_warmup if run.optimizer == "adamw" else setting.muon_warmup) * run.steps)
    rate = "learning_rate" if run.optimizer == "adamw" else "muon_learning_rate"
    return change(
        recipe,
        run={"dir": str(folder / run.name)},
        model=setting.model,
        data={"path": (data,), "sequence_length": setting.sequence_length},
        training={
            "seed": run.seed,
            "max_steps": run.steps,
            "tokens_per_step": setting.tokens_per_step,
            "micro_batch_size": setting.micro_batch_size,
            "precision": setting.precision,
            "compile": setting.compile,
            "eval_every": max(1, run.steps // setting.points),
            "checkpoint_every": None,
            "sample_every": None,
        },
        optimizer={rate: run.rate, "beta2": setting.beta2},
        schedule={"warmup_steps": warmup, "decay_steps": run.steps - warmup},
        evaluation={"max_tokens": setting.validation_tokens, "micro_batch_size": setting.micro_batch_size},
        wandb={"mode": "disabled"},
    )


def train(run: Run, setting: Setting, *, data: str, folder: Path) -> list[dict[str, Any]]:
    """Trains (or finds the finished run) and returns its validations: step, tokens, loss/val."""
    recipe = RECIPES[run.optimizer]
    command = [sys.executable, f"recipes/{Path(recipe.__file__).name}"]
    command += flags(config_of(run, setting, data=data, folder=folder), recipe.CONFIG)
    done = subprocess.run(command, capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"), cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{run.name} failed:\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (folder / run.name / "metrics.jsonl").read_text().splitlines()]
    curve = [{key: row[key] for key in ("step", "tokens", "loss/val")} for row in rows if "loss/val" in row]
    print(f"{run.name:<40} {curve[-1]['tokens']:>9,} tokens: validation loss {curve[-1]['loss/val']:.4f}", flush=True)
    return curve


def train_all(runs: Sequence[Run], arguments: argparse.Namespace) -> dict[Run, list[dict[str, Any]]]:
    """The curves of all runs, `--jobs` at a time."""
    setting = SETTINGS[arguments.setting]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        curves = pool.map(lambda run: train(run, setting, data=arguments.data, folder=arguments.runs), runs)
        return dict(zip(runs, curves, strict=True))


def final(curve: Sequence[dict[str, Any]]) -> float:
    """The last validation loss [nats per token]."""
    return float(curve[-1]["loss/val"])


def compare(arguments: argparse.Namespace) -> dict[Run, list[dict[str, Any]]]:
    """Tunes both optimizers on the first seed, then runs the best of each on all seeds."""
    lengths = {"adamw": arguments.steps, "muon": int(arguments.steps * arguments.share)}
    rates = {"adamw": arguments.adamw_rates, "muon": arguments.muon_rates}
    first, *others = arguments.seeds
    tuned = train_all([Run(name, rate, first, lengths[name]) for name in RECIPES for rate in rates[name]], arguments)
    best = [best_run(tuned, name) for name in RECIPES]
    more = train_all([Run(run.optimizer, run.rate, seed, run.steps) for run in best for seed in others], arguments)
    curves = tuned | more
    return {run: curve for name in RECIPES for run, curve in curves.items() if run.optimizer == name}


def best_run(curves: dict[Run, list[dict[str, Any]]], optimizer: str) -> Run:
    """The run of the first seed with the lowest final loss."""
    seed = next(iter(curves)).seed
    runs = [run for run in curves if run.optimizer == optimizer and run.seed == seed]
    return min(runs, key=lambda run: final(curves[run]))


def best_runs(curves: dict[Run, list[dict[str, Any]]], optimizer: str) -> list[Run]:
    """The runs of an optimizer's best rate, one per seed."""
    rate = best_run(curves, optimizer).rate
    return sorted((run for run in curves if run.optimizer == optimizer and run.rate == rate), key=lambda run: run.seed)


def write_report(curves: dict[Run, list[dict[str, Any]]], arguments: argparse.Namespace) -> str:
    """The table (.md), every curve (.jsonl) and a picture (.png); returns the table."""
    setting = SETTINGS[arguments.setting]
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = [
        "| optimizer | peak rate | seed | tokens | final validation loss [nats per token] |",
        "|---|---|---|---|---|",
    ]
    for run, curve in curves.items():
        lines.append(f"| {run.optimizer} | {run.rate:g} | {run.seed} | {curve[-1]['tokens']:,} | {final(curve):.4f} |")
    means = {name: statistics.mean(final(curves[run]) for run in best_runs(curves, name)) for name in RECIPES}
    tokens = {name: curves[best_runs(curves, name)[0]][-1]["tokens"] for name in RECIPES}
    seeds = sorted({run.seed for run in curves})
    over = f"Means over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"Seed {seeds[0]}"
    lines += [
        "",
        f"{over} at the best rate of each: AdamW {means['adamw']:.4f} after "
        f"{tokens['adamw']:,} tokens, Muon {means['muon']:.4f} after {tokens['muon']:,} "
        f"({tokens['muon'] / tokens['adamw']:.3f} of them).",
    ]
    text = "\n".join(lines) + "\n"
    (arguments.out / f"{setting.report}.md").write_text(
        f"# Tokens to the same validation loss: Muon and AdamW at {arguments.setting}\n\nMade by `python -m "
        f"tests.benchmarks.tokens_to_loss --setting {arguments.setting}`; what is compared is said there. "
        f"{setting.tokens_per_step:,} tokens a step. {arguments.note}".rstrip()
        + f"\n\n{text}"
    )
    with (arguments.out / f"{setting.report}.jsonl").open("w") as file:
        for run, curve in curves.items():
            row = {"optimizer": run.optimizer, "rate": run.rate, "seed": run.seed, "steps": run.steps, "curve": curve}
            file.write(json.dumps(row) + "\n")
    draw(curves, arguments.out / f"{setting.report}.png", target=means["adamw"])
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
                label = f"{optimizer}, peak rate {run.rate:g}" if run == best[0] else None
                style = {"alpha": 1.0 if bold else 0.25, "linewidth": 1.5 if bold else 1.0, "label": label}
                axes.plot([p["tokens"] for p in curve], [p["loss/val"] for p in curve], color=colour, **style)
    axes.axhline(target, color="black", linewidth=0.8, linestyle=":", label="AdamW's final loss")
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("validation loss [nats per token]")
    axes.set_ylim(min(final(curve) for curve in curves.values()) - 0.15, target + 1.6)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Runs the comparison and writes its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", default="5M", choices=tuple(SETTINGS))
    parser.add_argument("--data", default="data/stdlib-bytes", help="a prepared set; for 5M with --tokenizer bytes")
    parser.add_argument("--steps", type=int, help="AdamW's; unless given, the setting's")
    parser.add_argument("--share", type=float, help="of AdamW's steps that Muon gets; unless given, the setting's")
    parser.add_argument("--adamw-rates", type=float, nargs="+", help="unless given, the setting's")
    parser.add_argument("--muon-rates", type=float, nargs="+", help="unless given, the setting's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time, one thread each"
    )
    parser.add_argument("--note", default="", help="a sentence for the report: the corpus, the machine")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/tokens-to-loss")
    parser.add_argument("--out", type=Path, default=ROOT / "tests/benchmarks/results")
    arguments = parser.parse_args()
    arguments.runs /= arguments.setting
    for name in ("steps", "share", "adamw_rates", "muon_rates"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, getattr(SETTINGS[arguments.setting], name))
    print(write_report(compare(arguments), arguments))


if __name__ == "__main__":
    main()
