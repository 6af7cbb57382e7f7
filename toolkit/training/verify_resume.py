"""A recipe -> proof, on the machine at hand, that stopping and starting again changes nothing, to the bit.

Three starts, each in a process of its own: N steps without a stop; k steps; and what continues from there to step N. The
third saves once more before its first step, so that a part of the state that did not survive the way to the disk and
back is named itself, and not only the loss that it spoils later. Everything runs with `deterministic`, in a folder that
is removed at the end.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from toolkit.config import TrainConfig, to_dict
from toolkit.errors import UserError
from toolkit.training import checkpoint
from toolkit.training.metrics import log_path, read_rows

# Rows of metrics.jsonl differ in these from one run to another.
_TIMINGS = ("time/", "throughput/", "memory/")
RESUMED = "resumed"  # where the state that came back from the disk is saved again


def verify_resume(config: TrainConfig, *, steps: int, cut: int, num_processes: int = 1) -> Iterator[str]:
    """Yields what it does, line by line.

    Raises: UserError if a start fails, or naming the first field or tensor in which the two runs differ.
    """
    if steps < 2 or num_processes < 1:
        raise UserError(f"steps={steps} must be at least 2 and num_processes={num_processes} at least 1")
    if not 0 < cut < steps:
        raise UserError(f"cut={cut} must lie between 0 and steps={steps}; use --cut {max(1, steps // 2)}")
    with tempfile.TemporaryDirectory(prefix="toolkit-verify-resume-") as temporary:
        whole, parts = Path(temporary) / "whole", Path(temporary) / "parts"
        yield f"{steps} steps without a stop"
        _start(config, whole, max_steps=steps, cut=cut, num_processes=num_processes)
        yield f"{cut} steps, then a stop"
        _start(config, parts, max_steps=cut, cut=cut, num_processes=num_processes)
        yield f"a new start, from step {cut} to step {steps}"
        _start(config, parts, max_steps=steps, cut=cut, num_processes=num_processes)
        at_cut = checkpoint.load(parts / "checkpoints" / checkpoint.step_name(cut))
        came_back = checkpoint.load(parts / RESUMED / checkpoint.step_name(cut))
        difference = compare_states(at_cut, came_back)
        if difference:
            raise UserError(f"what was saved at step {cut} did not come back: {difference}")
        difference = compare_runs(whole, parts, step=steps)
        if difference:
            raise UserError(f"the resumed run is not the uninterrupted one: {difference}")
    yield f"resumed run = uninterrupted run, bitwise: weights, moments, counters and {steps} losses"


def compare_runs(one: Path, other: Path, *, step: int) -> str | None:
    """The first difference between two run folders at a step, named, or None: samples, losses, state, weights, moments."""
    for name in ("ledger", "metrics"):
        rows, others = ([_training(row) for row in read_rows(log_path(run, name))] for run in (one, other))
        for row, its in zip([r for r in rows if r], [r for r in others if r], strict=False):
            different = _first_difference(row, its, f"step {row['step']}")
            if different:
                return f"{name}.jsonl, {different}"
        if len([r for r in rows if r]) != len([r for r in others if r]):
            return f"{name}.jsonl has {len(rows)} rows and {len(others)} rows"
    states = (checkpoint.load(run / "checkpoints" / checkpoint.step_name(step)) for run in (one, other))
    return compare_states(*states)


def compare_states(one: checkpoint.Loaded, other: checkpoint.Loaded) -> str | None:
    """The first field or tensor in which two checkpoints differ, named with both values, or None."""
    different = _first_difference(one.state, other.state, "state.json")
    if different:
        return different
    for file, tensors, others in (
        (checkpoint.MODEL, one.model, other.model),
        (checkpoint.OPTIMIZER, one.optimizer, other.optimizer),
    ):
        for name in sorted(set(tensors) | set(others)):
            if name not in tensors or name not in others:
                return f"{file}: {name} is missing in the {'first' if name not in tensors else 'second'}"
            if not _same_bits(tensors[name], others[name]):
                largest = (tensors[name].double() - others[name].double()).abs().max().item()
                return f"{file}: {name} differs by up to {largest:.3g}"
    return None


def _training(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a step without what differs between machines and minutes; an evaluation's row is empty.

    Why no evaluations: a run that stops at step k evaluates there, at its last step; the uninterrupted one need not.
    """
    if "loss/val" in row:
        return {}
    return {name: value for name, value in row.items() if not name.startswith(_TIMINGS)}


def _first_difference(one: Any, other: Any, where: str) -> str | None:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in [*one, *(key for key in other if key not in one)]:
            if name not in one or name not in other:
                return f"{where}: {name} is missing in the {'first' if name not in one else 'second'}"
            different = _first_difference(one[name], other[name], f"{where}: {name}")
            if different:
                return different
        return None
    # repr: NaN is equal to NaN here, and 0.0 is not -0.0
    return None if repr(one) == repr(other) else f"{where} is {str(one)[:80]} and {str(other)[:80]}"


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return (
        torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
        if one.dim()
        else (one.item() == other.item())
    )


def _start(config: TrainConfig, run: Path, *, max_steps: int, cut: int, num_processes: int) -> None:
    """One start of the recipe in processes of its own.

    Raises: UserError with the last line that it printed if it fails.
    """
    config = replace(
        config,
        run=replace(config.run, dir=str(run), resume_from=None),
        training=replace(
            config.training,
            max_steps=max_steps,
            deterministic=True,
            checkpoint_every=cut,
            eval_every=None,
            sample_every=None,
            max_hours=None,
        ),
        checkpoint=replace(config.checkpoint, keep_every=cut),
        wandb=replace(config.wandb, mode="disabled"),
    )
    recipe = run.with_suffix(".json")
    recipe.write_text(json.dumps(to_dict(config)))
    command = [sys.executable, "-m"]
    if num_processes > 1:
        command += ["accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes", str(num_processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        # A free port: two launchers that start at once would both take 29500.
        command += ["--main_process_port", "0", "-m"]
    done = subprocess.run([*command, "toolkit.training.resume_worker", str(recipe)], capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        raise UserError(f"a start failed: {(errors or lines or ['it printed nothing'])[-1].removeprefix('error: ')}")
