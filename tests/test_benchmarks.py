"""The benchmarks in a short form: they run, measure all that they should, and write what they say. No times are judged."""

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.tokens_to_loss import SETTINGS, Run, config_of, write_report
from tests.support import command, environment
from toolkit.model.gpt2 import num_parameters
from toolkit.model.product import cpu_has_bf16

CONTENDERS = {
    "toolkit",
    "toolkit-compiled",
    "toolkit-bare",
    "toolkit-bare-compiled",
    "transformers",
    "transformers-compiled",
    "transformers-trainer",
    "ceiling",
}
AS_IT_COMES = "transformers-trainer-fp32"  # a contender of its own in a table of bf16


def bench(*arguments: str) -> str:
    """What `make bench` runs, with options: its output."""
    # Compiling takes most of a minute and has tests of its own: here the compiled contenders run eagerly.
    env = environment(OMP_NUM_THREADS="1", TORCH_COMPILE_DISABLE="1")
    done = command("-m", "tests.benchmarks", *arguments, env=env, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_step_speed_measures_all_contenders_and_writes_a_table_and_a_picture(tmp_path: Path) -> None:
    options = ("--size", "tiny", "--tokens", "64", "--rounds", "1", "--steps", "1", "--threads", "1")
    printed = bench("step_speed", *options, "--sequence-length", "32", "--out", str(tmp_path))
    picture = (tmp_path / "step-tiny-fp32-32-64.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 5_000
    found = json.loads((tmp_path / "step-tiny-fp32-32-64.json").read_text())
    assert "T = 32" in found["title"]
    rows = {row["contender"]: row for row in found["rows"]}
    assert set(rows) == CONTENDERS
    for name, row in rows.items():
        numbers = [row["tokens_per_second"], row["peak_gib"], row["share_of_ceiling"], *row["rounds"]]
        assert all(math.isfinite(number) and number > 0 for number in numbers), name
        assert len(row["rounds"]) == 1
        assert f"\n{name} " in printed
    pairs = {(ratio["what"], ratio["contender"], ratio["over"]): ratio for ratio in found["ratios"]}
    assert {target["target"] for target in pairs.values()} == {1.3, 2.5, 0.98, 0.60, 0.55}
    ratio = pairs["tokens_per_second", "toolkit-compiled", "transformers-trainer"]
    both = rows["toolkit-compiled"]["tokens_per_second"], rows["transformers-trainer"]["tokens_per_second"]
    assert ratio["both"] == list(both)
    assert ratio["ratio"] == pytest.approx(both[0] / both[1])
    assert "toolkit-compiled / transformers-trainer" in printed
    # What Trainer costs is measured apart from the table, with both in one process.
    beside = {key[1]: ratio for key, ratio in pairs.items() if ratio["in_turns"]}
    assert set(beside) == {"toolkit", "toolkit-compiled"}
    for name, ratio in beside.items():
        assert ratio["over"] == name.replace("toolkit", "toolkit-bare")
        assert all(speed > 0 for speed in ratio["both"])
        assert ratio["both"][0] != rows[name]["tokens_per_second"]
        assert ratio["ratio"] == pytest.approx(ratio["both"][0] / ratio["both"][1])
    assert printed.count("step by step in turns") == 4  # two in each precision
    half = json.loads((tmp_path / "step-tiny-bf16-32-64.json").read_text())
    rows_of_half = {row["contender"] for row in half["rows"]}
    fast = {name for name in CONTENDERS if cpu_has_bf16() or not name.startswith("transformers")}
    assert rows_of_half == fast | {AS_IT_COMES}
    assert {ratio["target"] for ratio in half["ratios"] if ratio["over"] == AS_IT_COMES} == {2.5}


def test_loader_prepare_and_checkpoint_speed_in_short(tmp_path: Path) -> None:
    folder = ("--folder", str(tmp_path))
    loader = bench("loader_speed", *folder, "--rounds", "1", "--batches", "4", "--shard-tokens", "100000")
    assert "million tokens/s" in loader
    prepare = bench("prepare_speed", *folder, "--rounds", "1", "--megabytes", "1", "--workers", "1")
    assert "of tiktoken (target 0.85)" in prepare
    checkpoint = bench("checkpoint_speed", *folder, "--pairs", "1", "--scale", "0.001")
    assert "plain write and fsync" in checkpoint
    assert list(tmp_path.iterdir()) == []  # all that they wrote is gone


def test_an_unknown_benchmark_or_options_without_one_are_refused() -> None:
    for arguments in (("step_sped",), ("step_speed", "loader_speed", "--rounds", "1"), ("--rounds", "1")):
        done = command("-m", "tests.benchmarks", *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: name some of loader_speed, prepare_speed, checkpoint_speed, step_speed")


def test_tokens_to_loss_shrinks_the_recipes_and_compares_their_best_rates(tmp_path: Path) -> None:
    small = config_of(Run("muon", 0.04, 2, 64), SETTINGS["5M"], data="somewhere", folder=tmp_path)
    assert small.optimizer.name == "muon"
    assert (small.optimizer.muon_learning_rate, small.training.seed) == (0.04, 2)
    assert small.schedule.warmup_steps + small.schedule.decay_steps == small.training.max_steps == 64
    assert 5e6 < num_parameters(small.model) < 10e6
    large = config_of(Run("adamw", 1e-3, 1, 64), SETTINGS["124M"], data="somewhere", folder=tmp_path)
    assert num_parameters(large.model) == 124_439_808

    def curve(loss: float, tokens: int) -> list[dict[str, Any]]:
        return [{"step": n, "tokens": n * tokens // 2, "loss/val": loss + 2 - n} for n in (1, 2)]

    curves = {Run("adamw", 1e-3, seed, 10): curve(2.0 + seed / 10, 1000) for seed in (1, 2, 3)}
    curves |= {Run("adamw", 2e-3, 1, 10): curve(2.5, 1000)}
    curves |= {Run("muon", 0.04, seed, 4): curve(1.8, 400) for seed in (1, 2, 3)}
    text = write_report(curves, Namespace(out=tmp_path, setting="5M", note="Bytes of nothing."))
    assert "| adamw | 0.002 | 1 | 1,000 | 2.5000 |" in text
    assert "AdamW 2.2000 after 1,000 tokens, Muon 1.8000 after 400 (0.400 of them)" in text
    written = (tmp_path / "tokens-to-loss.md").read_text()
    assert text in written
    assert "768 tokens a step. Bytes of nothing.\n" in written
    rows = [json.loads(line) for line in (tmp_path / "tokens-to-loss.jsonl").read_text().splitlines()]
    assert [row["curve"] for row in rows] == list(curves.values())
    assert (tmp_path / "tokens-to-loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
