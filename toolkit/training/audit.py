"""The ledger and the shards -> a proof of what a run was trained on.

ledger.jsonl has one row per step: the range of global samples and the sum (modulo 2**64) of a 64-bit hash of each
window's ids, taken where the window was read in training. The audit reads every window again from the shards and
compares; it maps every sample to its window and checks that none came twice within an epoch; and it names the steps
that were done again after a crash, from the record of starts in run.json. It changes nothing.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.config import TrainConfig, load_recipe
from toolkit.data.loader import Data, open_data, sample_order, training_loader, window_counts
from toolkit.errors import UserError
from toolkit.training.checkpoint import steps_in
from toolkit.training.metrics import damaged_lines, log_path, read_rows
from toolkit.training.run_folder import CHECKPOINTS

STEPS_BETWEEN_LINES = 1000
_MOST_PROBLEMS = 20  # named one by one; the rest is counted


def audit(run: Path, *, data_path: Sequence[str] = ()) -> Iterator[str]:
    """Yields what it finds, line by line; `data_path` is where the data lies now, if the recipe's path has moved.

    Raises: UserError at the end, naming every step that the shards and the ledger do not agree on.
    """
    if (run / "state.json").exists():
        raise UserError(f"{run} is a checkpoint, which has no ledger; name the folder of its run")
    config = load_recipe(run / "recipe.json")
    data = open_data(data_path or config.data.path, cache_dir=config.data.cache_dir, cache_gib=config.data.cache_gib)
    steps, skipped, problems = _read_ledger(run, config)
    problems += _lost_rows(run, config, steps)
    yield from _redone_steps(run)
    windows = _Windows(data, config)
    for first, end in skipped:
        yield f"samples {first} to {end - 1} were skipped on purpose after a loss spike"
    for number, row in enumerate(steps, 1):
        problems += _check_step(row, windows)
        if number % STEPS_BETWEEN_LINES == 0:
            yield f"{number} of {len(steps)} steps read again"
    yield from windows.lines()
    if problems:
        more = f"; and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
        raise UserError(f"{run}: {'; '.join(problems[:_MOST_PROBLEMS])}{more}")
    if steps:
        yield (
            f"{run}: steps {steps[0]['step']} to {steps[-1]['step']}, samples {steps[0]['first_sample']} to {steps[-1]['end_sample'] - 1}: "
            "every window that was trained on is in the shards, in the order of the recipe, once per epoch"
        )
    else:
        yield f"{run}: no step was trained yet"


def _read_ledger(run: Path, config: TrainConfig) -> tuple[list[dict[str, Any]], list[tuple[int, int]], list[str]]:
    """(rows of steps, ranges skipped on purpose, problems): the steps without gaps, the ranges adjoining."""
    steps: list[dict[str, Any]] = []
    skipped: list[tuple[int, int]] = []
    problems: list[str] = []
    per_step = config.training.tokens_per_step // config.data.sequence_length
    position: int | None = None
    for row in read_rows(log_path(run, "ledger")):
        if "skipped_first_sample" in row:
            skipped.append((row["skipped_first_sample"], row["skipped_end_sample"]))
            position = row["skipped_end_sample"]
            continue
        first, end, step = row.get("first_sample"), row.get("end_sample"), row["step"]
        if type(first) is not int or type(end) is not int or end - first != per_step or not 0 <= first < 2**53:
            problems.append(f"step {step} of ledger.jsonl does not name {per_step} samples")
            continue
        if steps and step != steps[-1]["step"] + 1:
            problems.append(f"ledger.jsonl goes from step {steps[-1]['step']} to step {step}")
        if position is not None and first != position:
            problems.append(f"step {step} starts at sample {first} instead of {position}")
        position = end
        steps.append(row)
    return steps, skipped, problems


def _lost_rows(run: Path, config: TrainConfig, steps: list[dict[str, Any]]) -> list[str]:
    """What is missing at either end of the ledger, where no gap shows, and lines that are damaged."""
    problems = []
    damaged = damaged_lines(log_path(run, "ledger"))
    if damaged:
        problems.append(f"ledger.jsonl has {len(damaged)} damaged lines (the first is line {damaged[0]})")
    first, last = (steps[0]["step"], steps[-1]["step"]) if steps else (1, 0)
    if first > 1 and config.run.resume_from is None:
        problems.append(f"ledger.jsonl begins with step {first} instead of 1")
    saved = max(steps_in(run / CHECKPOINTS), default=0)
    if saved > last and (steps or config.run.resume_from is None):
        problems.append(f"ledger.jsonl ends with step {last}, but there is a checkpoint of step {saved}")
    return problems


def _redone_steps(run: Path) -> Iterator[str]:
    """The steps that more than one start has done, from run.json: only the last time counts for the weights."""
    try:
        starts = json.loads((run / "run.json").read_text())["starts"]
        redone = [
            (start.get("time"), start.get("resumed_from") or 0, start.get("last_logged_step") or 0) for start in starts
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        yield f"{run}/run.json cannot be read: steps that were done again after a crash cannot be named"
        return
    for number, (time, resumed, reached) in enumerate(redone, 1):
        if reached > resumed:
            yield f"start {number} ({time}) did steps {resumed + 1} to {reached} again after a crash"


def _check_step(row: dict[str, Any], windows: "_Windows") -> list[str]:
    digest = windows.read(row["first_sample"], row["end_sample"])
    problems = [f"step {row['step']}: {text}" for text in windows.new_repeats()]
    if row.get("digest") != f"{digest:016x}":
        problems.append(
            f"step {row['step']} was trained on other ids (digest {row.get('digest')}) than the shards hold ({digest:016x})"
        )
    return problems


class _Windows:
    """Reads ranges of samples again and marks which windows of which epoch they were."""

    def __init__(self, data: Data, config: TrainConfig) -> None:
        self._data, self._config = data, config
        length = config.data.sequence_length
        self._order = sample_order(
            data,
            sequence_length=length,
            seed=config.training.seed,
            shuffle_group_shards=config.data.shuffle_group_shards,
        )
        counts = [window_counts(data_set, "train", sequence_length=length) for data_set in data.sets]
        self._starts = [np.concatenate(([0], np.cumsum(count))) for count in counts]
        self._seen: dict[tuple[int, int], np.ndarray] = {}  # (set, epoch) -> one truth value per window
        self._repeats: list[str] = []
        self._batches: Iterator[Any] = iter(())
        self._position: int | None = None
        self._size = 0

    def read(self, first: int, end: int) -> int:
        """The sum of the digests of samples [first, end), modulo 2**64."""
        if self._position != first or self._size != end - first:
            loader = training_loader(
                self._data,
                sequence_length=self._config.data.sequence_length,
                micro_batch_size=end - first,
                seed=self._config.training.seed,
                position=first,
                shuffle_group_shards=self._config.data.shuffle_group_shards,
            )
            self._batches, self._size = iter(loader), end - first
        self._position = end
        self._mark(np.arange(first, end))
        return int(next(self._batches)["digest"].sum().item()) % 2**64

    def new_repeats(self) -> list[str]:
        """What has come twice within an epoch since the last call."""
        repeats, self._repeats = self._repeats, []
        return repeats

    def lines(self) -> Iterator[str]:
        """How much of each set was seen in each epoch."""
        for (index, epoch), seen in sorted(self._seen.items()):
            count = int(seen.sum())
            yield f"{self._data.sets[index].path}, epoch {epoch + 1}: {count:,} of {seen.size:,} windows, none twice"

    def _mark(self, samples: np.ndarray) -> None:
        found = self._order.locate(samples)
        for index, epoch in sorted(set(zip(found.set_index.tolist(), found.epoch.tolist(), strict=True))):
            here = (found.set_index == index) & (found.epoch == epoch)
            places = self._starts[index][found.shard[here]] + found.window[here]
            seen = self._seen.setdefault((index, epoch), np.zeros(int(self._starts[index][-1]), dtype=bool))
            twice = int(seen[places].sum()) + len(places) - len(np.unique(places))
            if twice:
                self._repeats.append(f"{twice} windows of {self._data.sets[index].path} twice in epoch {epoch + 1}")
            seen[places] = True
