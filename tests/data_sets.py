"""Small data sets for tests: every id tells where it stands."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from toolkit.data.manifest import Manifest, ShardInfo, Split, TokenizerInfo, token_dtype, write_manifest
from toolkit.data.shards import ShardWriter, shard_file_name
from toolkit.data.tokenizer import load_tokenizer


def write_set(
    folder: Path,
    train: Sequence[int],
    val: Sequence[int] = (500,),
    *,
    vocab_size: int = 50257,
    start: int = 0,
    tokenizer: str = "gpt2",
) -> Path:
    """A data set whose shards have the token counts asked for.

    Token number n, counted through train and then val, is id (start + n) modulo vocab_size - 1, the end-of-text id.
    With another vocab_size than the tokenizer's the set can be read, and `verify` says that they do not fit.
    """
    folder.mkdir(parents=True)
    splits: dict[Split, tuple[ShardInfo, ...]] = {}
    sizes: dict[Split, Sequence[int]] = {"train": train, "val": val}
    for split in sizes:
        infos = []
        for index, tokens in enumerate(sizes[split]):
            writer = ShardWriter(folder / shard_file_name(split, index), dtype=token_dtype(vocab_size))
            writer.append(np.arange(start, start + tokens) % (vocab_size - 1), documents=0, utf8_bytes=3 * tokens)
            infos.append(writer.close())
            start += tokens
        splits[split] = tuple(infos)
    info = TokenizerInfo(
        name=tokenizer, vocab_size=vocab_size, eot_id=vocab_size - 1, sha256=load_tokenizer(tokenizer).sha256
    )
    source = {"kind": "test", "counts": {"documents": 0}}
    write_manifest(folder, Manifest(schema_version=1, source=source, tokenizer=info, splits=splits))
    return folder
