"""How fast `prepare` is, end to end, beside tiktoken alone on the same documents with as many processes.

The corpus is the Python source of the standard library and of the installed packages, at least 200 MB of text, as one
Parquet file and as one JSONL file. Measured in turn, several rounds in one run:
- tiktoken: W processes that hold their share of the documents in memory encode them with `encode_to_numpy`; the time from
  a common start to the last one's end;
- prepare: from the files to finished, hashed shards with W workers, starting the processes included.

Beside the rates by the clock, which suffer from whatever else runs on the machine, the processor time of each.

    python tests/benchmarks/prepare_speed.py [--folder DIR] [--workers 2] [--megabytes 200] [--rounds 3]
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from toolkit.data.prepare import prepare
from toolkit.data.tokenizer import load_tokenizer
from toolkit.data.workers import usable_cores

TARGET = 0.85  # of tiktoken's rate


def python_sources() -> Iterator[str]:
    """The text of Python files on this machine, over and over if there are few."""
    while True:
        for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
            for path in sorted(Path(root).rglob("*.py")):
                try:
                    text = path.read_text(encoding="utf-8")
                except (UnicodeDecodeError, OSError):
                    continue
                if text:
                    yield text


def write_corpus(folder: Path, *, megabytes: int) -> list[str]:
    """Writes corpus.parquet and corpus.jsonl and returns their documents."""
    texts: list[str] = []
    size = 0
    for text in python_sources():
        texts.append(text)
        size += len(text.encode())
        if size >= megabytes * 10**6:
            break
    table = pa.table({"text": pa.array(texts, pa.large_string()), "id": list(range(len(texts)))})
    parquet.write_table(table, folder / "corpus.parquet", row_group_size=1000)  # as FineWeb-Edu's
    with (folder / "corpus.jsonl").open("w") as file:
        for number, text in enumerate(texts):
            file.write(json.dumps({"id": number, "text": text}) + "\n")
    return texts


def encode(texts: list[str], ready: Any, go: Any, results: Any) -> None:
    """One process of tiktoken alone."""
    encoding = load_tokenizer("gpt2").encoding
    encoding.encode_ordinary("warm up")
    ready.release()
    go.wait()
    before = time.process_time()
    tokens = sum(len(encoding.encode_to_numpy(text, disallowed_special=())) for text in texts)
    results.put((time.monotonic(), time.process_time() - before, tokens))


def tiktoken_alone(texts: list[str], workers: int) -> tuple[float, float, int]:
    """Seconds, processor seconds and tokens of W processes that only encode."""
    context = multiprocessing.get_context("fork")
    ready, go, results = context.Semaphore(0), context.Event(), context.Queue()
    shares = [texts[index::workers] for index in range(workers)]
    processes = [context.Process(target=encode, args=(share, ready, go, results)) for share in shares]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    start = time.monotonic()
    go.set()
    done = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return (
        max(when for when, _, _ in done) - start,
        sum(used for _, used, _ in done),
        sum(tokens for *_, tokens in done),
    )


def processor_seconds() -> float:
    """Of this process and of the children that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def prepared(path: Path, out: Path, workers: int) -> tuple[float, float, int]:
    """Seconds, processor seconds and tokens (without end-of-texts) of `prepare`."""
    start, used = time.monotonic(), processor_seconds()
    manifest = prepare([str(path)], out=out, workers=workers, progress=False).manifest
    seconds, used = time.monotonic() - start, processor_seconds() - used
    shutil.rmtree(out)
    totals = [manifest.totals(split) for split in ("train", "val")]
    return seconds, used, sum(total["tokens"] - total["documents"] for total in totals)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: the temporary folder")
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="prepare-speed-", dir=arguments.folder))
    try:
        texts = write_corpus(folder, megabytes=arguments.megabytes)
        size = sum(len(text.encode()) for text in texts)
        print(
            f"{len(texts):,} documents, {size / 1e6:.0f} MB of text, {arguments.workers} workers, {os.cpu_count()} cores"
        )
        rates: dict[str, list[float]] = {"tiktoken": [], "corpus.parquet": [], "corpus.jsonl": []}
        efforts: dict[str, list[float]] = {name: [] for name in rates}  # processor seconds for a million tokens
        for _ in range(arguments.rounds):
            seconds, used, tokens = tiktoken_alone(texts, arguments.workers)
            rates["tiktoken"].append(tokens / seconds)
            efforts["tiktoken"].append(used / tokens * 1e6)
            for name in ("corpus.parquet", "corpus.jsonl"):
                seconds, used, same = prepared(folder / name, folder / "out", arguments.workers)
                assert same == tokens, (same, tokens)
                rates[name].append(same / seconds)
                efforts[name].append(used / tokens * 1e6)
            print("  ".join(f"{name} {values[-1] / 1e6:.2f}" for name, values in rates.items()), "million tokens/s")
    finally:
        shutil.rmtree(folder)
    alone, alone_effort = statistics.median(rates["tiktoken"]), statistics.median(efforts["tiktoken"])
    for name, values in rates.items():
        rate, effort = statistics.median(values), statistics.median(efforts[name])
        verdict = f", {rate / alone:.2f} of tiktoken (target {TARGET}), by processor time {alone_effort / effort:.2f}"
        print(
            f"{name:<16} {rate / 1e6:6.2f} million tokens/s, {effort:.3f} processor seconds a million"
            + ("" if name == "tiktoken" else verdict)
        )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"largest child process {peak:.0f} MiB (tiktoken's processes hold the documents)")


if __name__ == "__main__":
    main()
