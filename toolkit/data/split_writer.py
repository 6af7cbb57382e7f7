"""Token ids of one split -> its shards, one after the other, going on with an unfinished one after a kill.

Guarantees: which id lies in which shard depends on the ids alone, not on how they came or how often the work was
interrupted; ids that were changed on disk in between are an error.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit.data.journal import OpenShard
from toolkit.data.manifest import ShardInfo, Split, token_dtype
from toolkit.data.shards import HEADER_BYTES, ShardWriter, shard_bytes, shard_file_name, shard_header
from toolkit.data.tokenizer import Tokenizer
from toolkit.data.tokenizing import Part
from toolkit.errors import UserError

Ids = npt.NDArray[Any]

COPY_TOKENS = 2**22  # ids held at one time when part of a shard is copied


class SplitWriter:
    """Appends ids to one split: fills a shard, finishes it, begins the next; can go on with an unfinished one."""

    def __init__(
        self,
        *,
        out: Path,
        split: Split,
        tokenizer: Tokenizer,
        shard_tokens: int,
        finished: list[ShardInfo],
        open_shard: OpenShard | None,
        first_index: int = 0,
    ) -> None:
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._out = out
        self._split = split
        self._eot_id = tokenizer.eot_id
        self._token_bytes = tokenizer.token_bytes()
        self._shard_tokens = shard_tokens
        self._finished = finished
        self._first_index = first_index
        self._writer: ShardWriter | None = None
        self._previous: Path | None = None
        for info in finished:
            _check_finished(out / info.file, info, self.dtype)
        if open_shard is not None:
            self._reopen(open_shard)

    @property
    def tokens(self) -> int:
        """Tokens of the split so far."""
        return sum(info.tokens for info in self._finished) + (self._writer.tokens if self._writer else 0)

    def _next_path(self) -> Path:
        return self._out / shard_file_name(self._split, self._first_index + len(self._finished))

    def _open(self) -> ShardWriter:
        return ShardWriter(self._next_path(), dtype=self.dtype, expected_tokens=self._shard_tokens)

    def _reopen(self, open_shard: OpenShard) -> None:
        """Begins the shard anew with the ids that the journal vouches for.

        They lie in the temporary file, or in one put aside here by an earlier start, or in the finished shard if the
        kill came after it was finished and before the journal said so.
        """
        path = self._next_path()
        temporary = path.with_name(f".{path.name}.tmp")
        aside = path.with_name(f".{path.name}.previous")
        needed = shard_bytes(open_shard.tokens, self.dtype)
        found = [file for file in (aside, temporary, path) if file.exists() and file.stat().st_size >= needed]
        if not found:
            raise UserError(f"{temporary} is gone or shorter than the journal says; delete {self._out} and run again")
        if open_shard.sha256:
            changed = found[0]
            found = [file for file in found if self._sha256(file, open_shard.tokens) == open_shard.sha256]
            if not found:
                raise UserError(
                    f"{changed} was changed since the journal vouched for its {open_shard.tokens} tokens: its sha256 "
                    f"differs; put it back as it was, or delete {self._out} and run again"
                )
        if found[0] == temporary:
            temporary.replace(aside)
            found[0] = aside
        self._writer = self._open()
        for ids in read_ids(found[0], self.dtype, 0, open_shard.tokens):
            self._writer.append(ids, documents=0, utf8_bytes=0)
        self._writer.append(np.empty(0, self.dtype), documents=open_shard.documents, utf8_bytes=open_shard.utf8_bytes)
        self._previous = aside

    def _sha256(self, path: Path, tokens: int) -> str:
        """What `ShardWriter.sha256` was when the shard held these first ids of a file."""
        digest = hashlib.sha256(shard_header(self._shard_tokens, self.dtype))
        for ids in read_ids(path, self.dtype, 0, tokens):
            digest.update(ids.data)
        return digest.hexdigest()

    def describe(self, ids: Ids) -> Part:
        """Ids with the documents that start in them and the UTF-8 bytes that they stand for."""
        chunks = [ids[start : start + COPY_TOKENS] for start in range(0, len(ids), COPY_TOKENS)]
        return Part(
            split=self._split,
            ids=ids,
            documents=sum(int(np.count_nonzero(chunk == self._eot_id)) for chunk in chunks),
            utf8_bytes=sum(int(self._token_bytes[chunk].sum()) for chunk in chunks),
        )

    def append(self, part: Part) -> bool:
        """Adds ids; True if a shard was finished on the way."""
        finished = False
        while len(part.ids):
            self._writer = self._writer or self._open()
            room = self._shard_tokens - self._writer.tokens
            if len(part.ids) <= room:
                head, part = part, self.describe(part.ids[:0])
            else:
                head = self.describe(part.ids[:room])
                part = Part(
                    split=self._split,
                    ids=part.ids[room:],
                    documents=part.documents - head.documents,
                    utf8_bytes=part.utf8_bytes - head.utf8_bytes,
                )
            self._writer.append(head.ids, documents=head.documents, utf8_bytes=head.utf8_bytes)
            if self._writer.tokens == self._shard_tokens:
                self.close()
                finished = True
        return finished

    def close(self) -> None:
        """Finishes the open shard, if there is one."""
        if self._writer is not None:
            self._finished.append(self._writer.close())
            self._writer = None

    def sync(self) -> OpenShard | None:
        """Brings the open shard to disk and says what it holds."""
        if self._writer is None:
            return None
        self._writer.sync()
        return OpenShard(
            tokens=self._writer.tokens,
            documents=self._writer.documents,
            utf8_bytes=self._writer.utf8_bytes,
            sha256=self._writer.sha256(),
        )

    def forget_previous(self) -> None:
        """Removes the file that an earlier start left, once the journal no longer needs it."""
        if self._previous is not None:
            self._previous.unlink(missing_ok=True)
            self._previous = None


def read_ids(path: Path, dtype: np.dtype[Any], start: int, stop: int) -> Iterator[Ids]:
    """The ids from `start` to `stop` of a shard file, a few million at a time."""
    if start >= stop:
        return
    with path.open("rb") as file:
        file.seek(HEADER_BYTES + start * dtype.itemsize)
        while start < stop:
            data = file.read(min(stop - start, COPY_TOKENS) * dtype.itemsize)
            ids = np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)
            if not len(ids):
                raise UserError(f"{path} is shorter than the journal says; delete {path.parent} and run again")
            start += len(ids)
            yield ids


def _check_finished(path: Path, info: ShardInfo, dtype: np.dtype[Any]) -> None:
    expected = shard_bytes(info.tokens, dtype)
    if not path.exists() or path.stat().st_size != expected:
        raise UserError(
            f"{path}, finished by an earlier start, is gone or no longer has {expected} bytes; delete {path.parent} and "
            "run again"
        )


def check_content(path: Path, info: ShardInfo) -> None:
    """Raises UserError if a finished shard is not, byte for byte, what it was when it was finished."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != info.sha256:
        raise UserError(
            f"{path} was changed since it was finished: its sha256 is {found}, not {info.sha256}; put it back as it was, or "
            f"delete {path.parent} and run again"
        )
