"""FineWeb-Edu's 10-billion-token sample -> shards of GPT-2 tokens, the data of `train_124m.py`.

Source: HuggingFaceFW/fineweb-edu on the Hub, config sample-10BT: Parquet files of which only the text is read. The
result takes 20 GB of disk (10 billion tokens of 2 bytes) and nothing beside it; killed at any moment, the same command
goes on from there. With no network it says so; then `toolkit prepare` makes a data set from text that you have.
"""

from pathlib import Path

import tyro

from toolkit.errors import one_line_errors

DATASET = "HuggingFaceFW/fineweb-edu:sample-10BT"  # Penedo et al. 2024, arXiv 2406.17557; licence ODC-By


def main(
    *,
    out: Path = Path("data/fineweb-edu-10b"),
    dataset: str = DATASET,
    tokenizer: str = "gpt2",
    workers: int | None = None,
    shard_tokens: int = 100_000_000,
    val_fraction: float = 0.005,
) -> None:
    """FineWeb-Edu sample-10BT -> shards of GPT-2 tokens.

    Args:
        out: folder for the shards and their manifest.json.
        dataset: DATASET[:CONFIG] on the Hub.
        tokenizer: gpt2, bytes, or a tokenizer file made by `toolkit tokenizer train`.
        workers: worker processes; None: one per core.
        shard_tokens: tokens in one shard [tokens].
        val_fraction: share of the documents that become the validation split; 0.005 of 10 billion tokens is 50 million.
    """
    from toolkit.data.prepare import prepare

    result = prepare(
        [f"hub:{dataset}"],
        out=out,
        tokenizer=tokenizer,
        workers=workers,
        shard_tokens=shard_tokens,
        val_fraction=val_fraction,
    )
    print(*result.lines, sep="\n")


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main)
