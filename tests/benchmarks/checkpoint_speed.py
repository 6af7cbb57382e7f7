"""What a checkpoint of GPT-2 124M with AdamW's moments costs: the stall of training, and the rate of writing.

Prints both sides of two comparisons, each as the median of alternating pairs:
- stall: what training waits for (snapshot, then a thread writes) against a save that training waits for to its end;
- rate: a whole save (hash, write, fsync, rename) against a plain sequential write plus fsync of as many bytes in one
  file. Removing older checkpoints is measured beside it: it is no part of writing.

    python tests/benchmarks/checkpoint_speed.py [--folder DIR] [--pairs 7] [--scale 1.0]
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from toolkit.config import CheckpointConfig
from toolkit.training.checkpoint import CheckpointWriter

PARAMETERS = 124_439_808  # GPT-2 124M
MATRICES = 48  # as many larger tensors as the model has, so that the per-tensor cost is there too
STALL_TARGET = 0.25  # of a synchronous save's time, at most
RATE_TARGET = 0.7  # of a plain write's rate, at least
CHUNK = 16 << 20


def timed(action: Callable[[], None]) -> float:
    """The seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def plain_write(path: Path, data: memoryview) -> None:
    """One file, written in order and fsynced."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    for position in range(0, len(data), CHUNK):
        os.write(descriptor, data[position : position + CHUNK])
    os.fsync(descriptor)
    os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write; default: the system's temporary folder"
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="share of 124M's size")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-speed-", dir=arguments.folder))
    try:
        measure(folder, pairs=arguments.pairs, scale=arguments.scale)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, *, pairs: int, scale: float) -> None:
    """Runs both comparisons in a folder and prints them."""
    size = int(PARAMETERS * scale) // MATRICES
    model = {f"h.{i}.weight": torch.randn(size) for i in range(MATRICES)}
    optimizer = {f"{name}|{key}": torch.randn(size) for name in model for key in ("exp_avg", "exp_avg_sq")}
    data = torch.randn(3 * size * MATRICES).view(torch.uint8).numpy().data
    writer = CheckpointWriter(folder / "checkpoints", CheckpointConfig(keep_last=10**6))
    step = 0

    def snapshot() -> None:
        nonlocal step
        step += 1
        facts = {"tokens": step, "data_fingerprint": "", "layout": {}}
        writer.snapshot(step, model=model, optimizer=optimizer, state={}, config_json={}, manifest=facts)

    def background_save() -> None:
        snapshot()
        writer.write(blocking=False)

    def settle() -> None:
        removals.append(timed(lambda: shutil.rmtree(folder / "checkpoints")))
        os.sync()  # nobody's writes, removals included, run into the next measurement
        time.sleep(0.5)

    print(f"{len(data) / 2**30:.2f} GiB of weights and moments, {torch.get_num_threads()} threads, {folder}")
    print(f"first snapshot (makes the buffers): {timed(snapshot):.2f} s")
    writer.write(blocking=True)
    removals: list[float] = []
    stalls, saves, plains, writes = [], [], [], []
    for _ in range(pairs):
        settle()
        snapshot_seconds = timed(snapshot)
        write_seconds = timed(lambda: writer.write(blocking=True))
        saves.append(snapshot_seconds + write_seconds)
        writes.append(write_seconds)
        settle()
        stalls.append(timed(background_save))
        writer.wait()
        writer.raise_error()
        settle()
        (folder / "checkpoints").mkdir()
        plains.append(timed(lambda: plain_write(folder / "checkpoints" / "plain", data)))
    stall, save = statistics.median(stalls), statistics.median(saves)
    ratio = statistics.median(plain / write for plain, write in zip(plains, writes, strict=True))
    print(
        f"stall: {stall:.3f} s in the background, {save:.3f} s synchronous: {stall / save:.1%} (target {STALL_TARGET:.0%})"
    )
    rates = [len(data) / 1e6 / statistics.median(seconds) for seconds in (writes, plains)]
    print(f"rate: {rates[0]:.0f} MB/s, plain write and fsync {rates[1]:.0f} MB/s: {ratio:.2f} (target {RATE_TARGET})")
    print(f"removing a checkpoint: {statistics.median(removals):.2f} s, in the background")


if __name__ == "__main__":
    main()
