"""What the README says can be typed exists, and its pieces of Python run."""

import json
import re
import statistics
import subprocess
import textwrap
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from recipes.train_124m import CONFIG as RECIPE_124M
from tests.support import ROOT, change, rows
from toolkit.cli import _RECIPE_VERBS, _VERBS
from toolkit.config import TrainConfig
from toolkit.recipe import parse
from toolkit.training.plan import plan

README = (ROOT / "README.md").read_text()
WORDS = " ".join(README.split())
RESULTS = ROOT / "tests/benchmarks/results"


def test_it_is_short_enough_to_be_read() -> None:
    assert len(README.splitlines()) <= 125


def test_make_targets_exist() -> None:
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "install", "prepare-data", "train", "test", "check", "bench"} <= named
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    offered = set(re.findall(r"^  make ([a-z-]+)", listed, re.MULTILINE))
    assert named <= offered
    assert subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout == listed


def test_verbs_flags_and_files_exist() -> None:
    verbs = set(re.findall(r"^ +(?:\.venv/bin/)?toolkit ([a-z-]+)", README, re.MULTILINE))
    assert verbs - {"tokenizer"} <= set(_VERBS) | set(_RECIPE_VERBS)
    assert len(verbs) >= 8
    for flag in set(re.findall(r"--([a-z]+\.[a-z-]+)", README)):
        section, name = flag.replace("-", "_").split(".")
        assert hasattr(getattr(TrainConfig(), section), name), flag
    for path in set(re.findall(r"`((?:toolkit|recipes)/[\w/.]+\.(?:py|yaml))`", README)):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"recipes/accelerate/\w+\.yaml", README):
        assert (ROOT / name).exists(), name
    assert parse(RECIPE_124M, ["--training.micro-batch-size", "4"]).training.micro_batch_size == 4


def test_the_costs_are_those_that_plan_computes() -> None:
    planned = plan(RECIPE_124M, "rtx3060")
    assert f"{planned.memory.peak / 2**30:.1f} of 12 GiB at micro-batch {planned.micro_batch_size}" in README
    days = {speed.mfu: speed.days for speed in planned.speeds}
    assert f"{days[0.4]:.1f} days at 40 %" in README
    assert f"{days[0.5]:.1f} at 50 %" in README
    assert f"{planned.data_bytes / 2**30:.1f} GiB of shards" in README
    assert f"{planned.checkpoint_bytes / 2**30:.1f} GiB per checkpoint" in README


@pytest.mark.parametrize("report", ["tokens-to-loss", "tokens-to-loss-long"])
def test_what_it_says_of_muon_is_what_was_measured(report: str) -> None:
    lines = (RESULTS / f"{report}.jsonl").read_text().splitlines()
    finals: dict[tuple[str, float], list[tuple[float, int]]] = {}
    for row in map(json.loads, lines):
        last = row["curve"][-1]
        finals.setdefault((row["optimizer"], row["rate"]), []).append((last["loss/val"], last["tokens"]))
    means = {}
    for (optimizer, _), results in finals.items():
        if len(results) == 3:  # seeds
            means[optimizer] = (statistics.mean(loss for loss, _ in results), results[0][1])
    assert len([name for name, _ in finals if name == "adamw"]) >= 5  # rates
    assert means["muon"][0] <= means["adamw"][0]
    assert means["muon"][1] <= 0.4 * means["adamw"][1]
    for loss, tokens in means.values():
        assert f"at {loss:.2f} after {tokens:,}" in WORDS


def test_what_it_says_of_speed_is_what_was_measured() -> None:
    measured = json.loads((RESULTS / "step-124M-bf16-1024-32768-h100.json").read_text())["rows"]
    rows_of = {row["contender"]: row for row in measured}
    for name, text in (
        ("toolkit-compiled", "{speed:,} tokens/s in {memory} GiB"),
        ("transformers-compiled", "`transformers` compiled {speed:,} in {memory}"),
        ("transformers-trainer", "Trainer as it comes {speed:,} in {memory}"),
    ):
        row = rows_of[name]
        speed, memory = round(row["tokens_per_second"], -3), round(row["peak_gib"], 1)
        assert text.format(speed=int(speed), memory=memory) in WORDS, name


def test_what_it_says_of_memory_without_a_gpu_is_what_was_measured() -> None:
    measured = json.loads((RESULTS / "step-124M-bf16-1024-8192-cpu-avx512bf16.json").read_text())["rows"]
    peaks = {row["contender"]: f"{row['peak_gib']:.1f}" for row in measured}
    assert f"{peaks['toolkit']} GiB at micro-batch 8, {peaks['toolkit-compiled']} compiled" in WORDS
    assert f"`transformers` {peaks['transformers']} and {peaks['transformers-compiled']}" in WORDS


def test_what_it_says_of_speed_without_a_gpu_is_what_was_measured() -> None:
    speeds = {}
    for name in ("cpu", "cpu-amx", "cpu-avx512bf16"):
        measured = json.loads((RESULTS / f"step-124M-bf16-512-1024-{name}.json").read_text())["rows"]
        speeds[name] = {row["contender"]: row["tokens_per_second"] for row in measured}
    amx, avx512, plain = speeds["cpu-amx"], speeds["cpu-avx512bf16"], speeds["cpu"]
    assert f"with AMX {amx['toolkit']:.0f} tokens/s, {amx['toolkit-compiled']:,.0f} compiled" in WORDS
    assert f"AVX-512's bf16 instructions {avx512['toolkit']:.0f} and {avx512['toolkit-compiled']:.0f};" in WORDS
    assert f"bf16 {plain['toolkit']:.0f} and {plain['toolkit-compiled']:.0f}, computed in fp32" in WORDS
    theirs = "`transformers` with AMX {0:.0f}, compiled {1:.0f}, its Trainer {2:.0f}"
    contenders = ("transformers", "transformers-compiled", "transformers-trainer")
    assert theirs.format(*(amx[name] for name in contenders)) in WORDS
    numbers = ", ".join(f"{avx512[name]:.0f}" for name in contenders)
    as_it_comes = f"{avx512['transformers-trainer-fp32']:.0f} for its Trainer as it comes, in fp32"
    assert f"with AVX-512 {numbers}, and {as_it_comes}" in WORDS
    assert "with no instructions 3.1 each" in WORDS
    assert {round(plain[name], 1) for name in contenders[:2]} == {3.1}


def snippets() -> list[str]:
    """The indented pieces of Python under "Changing it"."""
    section = README.split("## Changing it")[1].split("\n## ")[0]
    blocks = re.findall(r"(?:^ {7}.*\n|^\n)+", section, re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks if "Trainer(" in block]


@pytest.mark.parametrize("number", [0, 1])
def test_the_pieces_of_python_run(number: int, tiny: TrainConfig) -> None:
    from toolkit.model.gpt2 import GPT2
    from toolkit.training.trainer import Trainer

    assert len(snippets()) == 2
    AcceleratorState._reset_state(True)
    config = change(tiny, training={"max_steps": 2, "checkpoint_every": None, "sample_every": None})
    exec(compile(snippets()[number], "README.md", "exec"), {"GPT2": GPT2, "Trainer": Trainer, "CONFIG": config})
    assert [row["step"] for row in rows(Path(config.run.dir)) if "loss/train" in row] == [1, 2]
    assert (Path(config.run.dir) / "checkpoints" / "step-00000002" / "manifest.json").exists()
