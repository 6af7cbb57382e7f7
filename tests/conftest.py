"""Fixtures that several test files share."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from toolkit.data.manifest import Manifest, ShardInfo, Split, TokenizerInfo, token_dtype, write_manifest
from toolkit.data.shards import ShardWriter, shard_file_name

MakeSet = Callable[..., Path]


@pytest.fixture
def make_set(tmp_path: Path) -> MakeSet:
    """Makes a data set whose shards have the token counts asked for; every id tells where it stands.

    Token number n of the set, counted through train and then val, is id (start + n) modulo eot_id = vocab_size - 1.
    """

    def make(
        name: str,
        train: Sequence[int],
        val: Sequence[int] = (500,),
        *,
        vocab_size: int = 50257,
        start: int = 0,
        tokenizer: str = "gpt2",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        splits: dict[Split, tuple[ShardInfo, ...]] = {}
        for split, sizes in (("train", train), ("val", val)):
            infos = []
            for index, tokens in enumerate(sizes):
                with ShardWriter(folder / shard_file_name(split, index), dtype=token_dtype(vocab_size)) as writer:
                    writer.append(
                        np.arange(start, start + tokens) % (vocab_size - 1), documents=0, utf8_bytes=3 * tokens
                    )
                start += tokens
                infos.append(writer.info)
            splits[split] = tuple(infos)
        info = TokenizerInfo(name=tokenizer, vocab_size=vocab_size, eot_id=vocab_size - 1, sha256="0" * 64)
        source = {"kind": "test", "counts": {"documents": 0}}
        write_manifest(folder, Manifest(schema_version=1, source=source, tokenizer=info, splits=splits))
        return folder

    return make
