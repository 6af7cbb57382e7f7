"""How fast the loader gives batches from a warm page cache, beside plain numpy copies of the same bytes.

Three ways to read the same windows in the same order, each the median of alternating rounds in one process:
- loader: `training_loader` as the trainer uses it (order, reading, bounds, digest, two int64 tensors a batch);
- numpy, as batches: memory-mapped windows to int64 inputs and targets as torch tensors, nothing checked;
- numpy, plain copy: memory-mapped windows copied as the uint16 that they are.

Beside them the time to open a data set of 1,000 shards and to seek in it.

    python tests/benchmarks/loader_speed.py [--folder DIR] [--rounds 7] [--batches 1500] [--micro-batch-size 8]
                                              [--shard-tokens 8000000]
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolkit.data.loader import Data, open_data, sample_order, training_loader
from toolkit.data.manifest import Manifest, ShardInfo, TokenizerInfo, token_dtype, write_manifest
from toolkit.data.shards import HEADER_BYTES, ShardWriter, shard_bytes, shard_file_name, shard_header

SEQUENCE_LENGTH = 1024
TARGET = 20e6  # tokens/s of one process
SHARDS = 8
SHARD_TOKENS = 8_000_000  # 8 of them are 128 MB: more than a processor's cache, and sure to stay in the page cache
VOCAB_SIZE = 50257
STEP_TOKENS_PER_SECOND = 300  # GPT-2 124M compiled in bf16 on 2 CPU cores: the slowest and so the easiest to feed
TOKENIZER = TokenizerInfo(name="gpt2", vocab_size=VOCAB_SIZE, eot_id=VOCAB_SIZE - 1, sha256="0" * 64)


def write_random_set(folder: Path, *, shard_tokens: int) -> None:
    """A set of random ids."""
    rng = np.random.default_rng(0)
    infos = []
    for index in range(SHARDS):
        writer = ShardWriter(
            folder / shard_file_name("train", index), dtype=token_dtype(VOCAB_SIZE), expected_tokens=shard_tokens
        )
        writer.append(rng.integers(0, VOCAB_SIZE, shard_tokens, dtype=np.uint16), documents=0, utf8_bytes=0)
        infos.append(writer.close())
    write_manifest(
        folder, Manifest(schema_version=1, source={}, tokenizer=TOKENIZER, splits={"train": tuple(infos), "val": ()})
    )


def write_sparse_set(folder: Path, *, shards: int = 1000, tokens: int = 100_000_000) -> None:
    """A set of 100 billion tokens that takes almost no disk: zeros that are not there."""
    dtype = token_dtype(VOCAB_SIZE)
    infos = []
    for index in range(shards):
        path = folder / shard_file_name("train", index)
        path.write_bytes(shard_header(tokens, dtype))
        os.truncate(path, shard_bytes(tokens, dtype))
        infos.append(ShardInfo(file=path.name, tokens=tokens, documents=0, utf8_bytes=0, sha256="0" * 64, largest_id=0))
    write_manifest(
        folder, Manifest(schema_version=1, source={}, tokenizer=TOKENIZER, splits={"train": tuple(infos), "val": ()})
    )


def loader_round(data: Data, batches: int, *, micro_batch_size: int, position: int) -> Callable[[], None]:
    """Reads this many batches as the trainer does."""
    loader = iter(
        training_loader(
            data,
            sequence_length=SEQUENCE_LENGTH,
            micro_batch_size=micro_batch_size,
            seed=1,
            position=position,
            shuffle_group_shards=8,
        )
    )

    def run() -> None:
        for _ in range(batches):
            next(loader)

    return run


def numpy_round(
    maps: list[Any], places: list[tuple[int, int]], take: Callable[[list[Any]], object], *, micro_batch_size: int
) -> Callable[[], None]:
    """Reads the same windows through memory maps."""

    def run() -> None:
        for first in range(0, len(places), micro_batch_size):
            take(
                [
                    maps[shard][window * SEQUENCE_LENGTH : window * SEQUENCE_LENGTH + SEQUENCE_LENGTH + 1]
                    for shard, window in places[first : first + micro_batch_size]
                ]
            )

    return run


def as_batch(windows: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """What nanoGPT-like loaders do with windows."""
    inputs = torch.stack([torch.from_numpy(window[:-1].astype(np.int64)) for window in windows])
    targets = torch.stack([torch.from_numpy(window[1:].astype(np.int64)) for window in windows])
    return inputs, targets


def as_copy(windows: list[Any]) -> list[Any]:
    """Nothing but a copy of the bytes."""
    return [window.copy() for window in windows]


def seconds(action: Callable[[], object]) -> float:
    """The time that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(folder: Path, *, rounds: int, batches: int, micro_batch_size: int, shard_tokens: int) -> dict[str, float]:
    """Tokens/s of the three ways (medians over the rounds), and seconds to open and to seek in a huge set."""
    (folder / "set").mkdir()
    (folder / "huge").mkdir()
    write_random_set(folder / "set", shard_tokens=shard_tokens)
    write_sparse_set(folder / "huge")
    data = open_data(str(folder / "set"))
    maps = [
        np.memmap(folder / "set" / shard_file_name("train", index), dtype="<u2", mode="r", offset=HEADER_BYTES)
        for index in range(SHARDS)
    ]
    for one in maps:
        one.sum()  # warms the page cache
    order = sample_order(data, sequence_length=SEQUENCE_LENGTH, seed=1, shuffle_group_shards=8)
    rates: dict[str, list[float]] = {"loader": [], "numpy, as batches": [], "numpy, plain copy": []}
    samples = batches * micro_batch_size
    for number in range(rounds):
        found = order.locate(np.arange(number * samples, (number + 1) * samples))
        places = list(zip(found.shard.tolist(), found.window.tolist(), strict=True))
        ways = {
            "loader": loader_round(data, batches, micro_batch_size=micro_batch_size, position=number * samples),
            "numpy, as batches": numpy_round(maps, places, as_batch, micro_batch_size=micro_batch_size),
            "numpy, plain copy": numpy_round(maps, places, as_copy, micro_batch_size=micro_batch_size),
        }
        for name, action in ways.items():
            rates[name].append(samples * SEQUENCE_LENGTH / seconds(action))
    result = {name: statistics.median(values) for name, values in rates.items()}
    huge: list[Data] = []
    result["open 100B tokens"] = seconds(lambda: huge.append(open_data(str(folder / "huge"))))
    result["seek in 100B tokens"] = seconds(
        loader_round(huge[0], 1, micro_batch_size=micro_batch_size, position=61_234_567)
    )
    return result


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: the temporary folder")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=1500, help="batches of a round")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, help="size of the set that is read")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="loader-speed-", dir=arguments.folder))
    torch.set_num_threads(1)
    try:
        result = measure(
            folder,
            rounds=arguments.rounds,
            batches=arguments.batches,
            micro_batch_size=arguments.micro_batch_size,
            shard_tokens=arguments.shard_tokens,
        )
    finally:
        shutil.rmtree(folder)
    print(f"T = {SEQUENCE_LENGTH}, micro-batch {arguments.micro_batch_size}, medians of {arguments.rounds} rounds")
    for name in ("loader", "numpy, as batches", "numpy, plain copy"):
        print(f"{name:<20} {result[name] / 1e6:8.1f} million tokens/s")
    print(f"{'target':<20} {TARGET / 1e6:8.1f} million tokens/s: {'met' if result['loader'] >= TARGET else 'missed'}")
    share = STEP_TOKENS_PER_SECOND / result["loader"]
    print(f"{'share of a step':<20} {share:8.4%} at {STEP_TOKENS_PER_SECOND} tokens/s (GPT-2 124M on 2 CPU cores)")
    for name in ("open 100B tokens", "seek in 100B tokens"):
        print(f"{name:<20} {result[name]:8.3f} s")


if __name__ == "__main__":
    main()
