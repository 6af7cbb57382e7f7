"""The data set on disk: shard files of token ids and the `manifest.json` that describes them; write, open, check.

A shard is llm.c's `.bin` file: 256 little-endian int32 (magic, version, token count, zeros), then the ids. Ids below
65,536 are uint16 (magic 20240520, version 1), others uint32 (magic 20240801, version 7). Shards lie flat in one folder
beside `manifest.json`, whose text is canonical, so that its sha256 is the data set's fingerprint.

Guarantees: a shard appears under its name only when it is complete and on disk; nothing is opened before its name, kind
and size fit the manifest; every id that is read is below the vocabulary size. Does not: know text or tokenization
(`prepare`), order or batches (`loader`).

Source of the layout: karpathy/llm.c, dev/data/data_common.py.
"""

import contextlib
import functools
import hashlib
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from toolkit.data.manifest import (
    MANIFEST_FILE,
    MAX_SHARD_TOKENS,
    SCHEMA_VERSION,
    SPLITS,
    TOKENIZER_FILE,
    UNSAFE_NAME,
    Manifest,
    ShardInfo,
    Split,
    TokenizerInfo,
    decode_manifest,
    is_safe_shard_name,
    open_regular,
    own_tokenizer_file,
    read_manifest,
    read_manifest_file,
    token_dtype,
    write_manifest,
)
from toolkit.disk import replace_file, sync_folder
from toolkit.errors import UserError
from toolkit.failpoint import failpoint

if TYPE_CHECKING:
    from toolkit.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Ids = npt.NDArray[Any]  # uint16 or uint32 token ids

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAGIC_VERSION: dict[np.dtype[Any], tuple[int, int]] = {
    np.dtype("<u2"): (20240520, 1),
    np.dtype("<u4"): (20240801, 7),
}
MAX_OPEN_FILES = 64  # shards kept open per process, well below the usual limit of 1,024 files
SCAN_BYTES = 2**23  # of a shard held at one time when all of it is scanned [bytes]

_NUMBERED = re.compile(r"(.*?)(\d+)\.bin")


def shard_file_name(split: Split, index: int) -> str:
    """`train_000000.bin`, `val_000000.bin`, ..."""
    return f"{split}_{index:06d}.bin"


def shard_header(tokens: int, dtype: np.dtype[Any]) -> bytes:
    """The first 1,024 bytes of a shard of this many ids."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = (*MAGIC_VERSION[np.dtype(dtype)], tokens)
    return header.tobytes()


def shard_bytes(tokens: int, dtype: np.dtype[Any]) -> int:
    """Size of a shard file of this many ids."""
    return HEADER_BYTES + tokens * dtype.itemsize


class ShardWriter:
    """Writes one shard: ids in, a complete file and its `ShardInfo` out.

    The file has a temporary name in the same folder until `close`, which writes the header, fsyncs and renames. As a
    context manager it closes on success and removes the temporary file on an exception.

    Why `expected_tokens`: the header with the count comes first in the hash. If the count is known (every shard but a
    split's last is full) the file is hashed as it is written; if it turns out otherwise it is read once more.
    """

    def __init__(self, path: Path, *, dtype: npt.DTypeLike, expected_tokens: int = MAX_SHARD_TOKENS) -> None:
        self.path = Path(path)
        self.tokens = self.documents = self.utf8_bytes = 0
        self.info: ShardInfo | None = None
        self._dtype = np.dtype(dtype).newbyteorder("<")
        assert self._dtype in MAGIC_VERSION, f"a shard holds uint16 or uint32, not {dtype}"
        self._largest_id = 0
        self._expected_tokens = expected_tokens
        self._temporary = self.path.with_name(f".{self.path.name}.tmp")
        header = shard_header(expected_tokens, self._dtype)
        self._hash = hashlib.sha256(header)
        self._file = self._temporary.open("w+b", buffering=2**20)
        self._file.write(header)

    def append(self, ids: npt.NDArray[Any], *, documents: int, utf8_bytes: int) -> None:
        """Adds ids, and what they stand for to the counts.

        Raises: UserError if the shard would hold more ids than its header can count.
        """
        if len(ids):
            assert ids.dtype.kind in "iu", f"ids must be integers, not {ids.dtype}"
            smallest, largest = (0 if ids.dtype.kind == "u" else int(ids.min())), int(ids.max())
            # numpy would wrap an id that does not fit without a word
            assert smallest >= 0, f"id {smallest} is negative"
            assert largest <= np.iinfo(self._dtype).max, f"id {largest} does not fit {self._dtype}"
            if self.tokens + len(ids) > MAX_SHARD_TOKENS:
                raise UserError(f"{self.path}: a shard holds at most {MAX_SHARD_TOKENS} tokens; use smaller shards")
            data = np.ascontiguousarray(ids, dtype=self._dtype).data
            self._file.write(data)
            self._hash.update(data)
            self._largest_id = max(self._largest_id, largest)
            self.tokens += len(ids)
        self.documents += documents
        self.utf8_bytes += utf8_bytes

    def sync(self) -> None:
        """Brings what was appended so far to disk, still under the temporary name."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def sha256(self) -> str:
        """Of what was appended so far, after the header of `expected_tokens`."""
        return self._hash.hexdigest()

    def close(self) -> ShardInfo:
        """Completes the file under its own name and describes it."""
        header = shard_header(self.tokens, self._dtype)
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()
        if self.tokens != self._expected_tokens:
            with self._temporary.open("rb") as file:
                self._hash = hashlib.file_digest(file, "sha256")
        os.fsync(self._file.fileno())
        self._file.close()
        failpoint("shards.before-shard-rename")
        self._temporary.replace(self.path)
        sync_folder(self.path.parent)
        failpoint("shards.after-shard-rename")
        self.info = ShardInfo(
            file=self.path.name,
            tokens=self.tokens,
            documents=self.documents,
            utf8_bytes=self.utf8_bytes,
            sha256=self._hash.hexdigest(),
            largest_id=self._largest_id,
        )
        return self.info

    def abort(self) -> None:
        """Removes what was written so far."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif self.info is None:
            self.close()


class OpenFiles:
    """Reads at offsets of any number of files while at most `limit` are open; safe to use from several threads."""

    def __init__(self, *, limit: int = MAX_OPEN_FILES) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._files: OrderedDict[Path, Any] = OrderedDict()

    def read_into(self, path: Path, buffer: memoryview, offset: int) -> int:
        """Fills the buffer from the file at this offset; returns the bytes read, fewer than asked for at its end."""
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = open_regular(path)
                if len(self._files) > self._limit:
                    self._files.popitem(last=False)[1].close()
            self._files.move_to_end(path)
            return read_at(file, buffer, offset)

    def close(self) -> None:
        """Closes every file; a later read opens them again."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()


def read_at(file: Any, buffer: memoryview, offset: int) -> int:
    """Fills the buffer from an unbuffered file at this offset.

    Why not a memory map: a file that somebody truncates later would end the process with SIGBUS instead of an error.
    """
    if hasattr(os, "preadv"):
        count = os.preadv(file.fileno(), (buffer,), offset)
        while 0 < count < len(buffer):  # a signal or a network file system may return less than there is
            more = os.preadv(file.fileno(), (buffer[count:],), offset + count)
            if more == 0:
                break
            count += more
        return count
    file.seek(offset)
    return int(file.readinto(buffer))


ReadInto = Callable[[memoryview, int], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One shard, opened: ids by position, each checked against the vocabulary; where the bytes lie is `source`'s affair."""

    info: ShardInfo
    where: str  # for messages: the path or the URL
    dtype: np.dtype[Any]
    vocab_size: int
    source: ReadInto  # fills a buffer from a byte offset of the file

    def read(self, start: int, count: int) -> Ids:
        """`count` ids from the id number `start` on, in an array of its own.

        Raises: UserError if the file is shorter than the manifest says, or holds an id that the vocabulary does not.
        """
        ids = np.empty(count, dtype=self.dtype)
        self.read_into(ids, start)
        self.check(ids, start)
        return ids

    def read_into(self, ids: Ids, start: int) -> None:
        """Fills `ids` (contiguous, of this shard's type) from the id number `start` on; the caller checks their bounds."""
        assert 0 <= start <= self.info.tokens - len(ids), (start, len(ids), self.info)
        wanted = len(ids) * self.dtype.itemsize
        try:
            read = self.source(ids.view(np.uint8).data, HEADER_BYTES + start * self.dtype.itemsize)
        except OSError as error:  # a read by descriptor names no file
            raise UserError(f"{self.where}: {error.strerror} when reading token {start}; check the disk") from error
        if read != wanted:
            raise UserError(
                f"{self.where}: got {read} of {wanted} bytes at token {start}; the file became shorter since it was "
                "opened, put the whole shard back"
            )

    def check(self, ids: Ids, start: int) -> None:
        """Checks that these ids, which stand at `start`, are in the vocabulary.

        Raises: UserError naming the shard and the offset of the first one that is not.
        """
        check_ids(ids, start, vocab_size=self.vocab_size, where=self.where)


def check_ids(ids: Ids, start: int, *, vocab_size: int, where: str) -> None:
    """Checks that these ids, which stand at `start` of the shard `where`, are in the vocabulary.

    Raises: UserError naming the shard and the offset of the first one that is not.
    """
    if len(ids) and int(ids.max()) >= vocab_size:
        offset = int(np.argmax(ids >= vocab_size))
        raise UserError(
            f"{where}: id {int(ids[offset])} at token {start + offset} is not below vocab_size={vocab_size}; the shard is "
            "damaged or of another tokenizer: put the file back as it was made, or prepare the data again"
        )


def open_shards(folder: Path, split: Split, *, manifest: Manifest | None = None) -> list[Shard]:
    """The shards of a split in the manifest's order; kind, size and header of each file are checked, ids are not read.

    Raises: UserError for the first shard that does not fit the manifest.
    """
    folder = Path(folder)
    manifest = manifest or read_manifest(folder)
    files = OpenFiles()
    shards = []
    for info in manifest.splits[split]:
        path = folder / info.file
        problem = shard_problem(path, info, manifest.dtype)
        if problem:
            raise UserError(f"{problem}; see `toolkit verify {folder}`")
        shards.append(
            Shard(
                info=info,
                where=str(path),
                dtype=manifest.dtype,
                vocab_size=manifest.tokenizer.vocab_size,
                source=functools.partial(files.read_into, path),
            )
        )
    return shards


def shard_problem(path: Path, info: ShardInfo, dtype: np.dtype[Any]) -> str | None:
    """What is wrong with a shard's kind, size or header, or None; reads 1,024 bytes."""
    try:
        with open_regular(path) as file:
            size, expected = os.fstat(file.fileno()).st_size, shard_bytes(info.tokens, dtype)
            header = file.read(HEADER_BYTES)
    except FileNotFoundError:
        return f"{path} is in {MANIFEST_FILE} but not in the folder"
    except UserError as error:
        return str(error)
    if size != expected:
        return f"{path} has {size} bytes, but {info.tokens} tokens in {MANIFEST_FILE} make {expected}"
    return header_problem(header, info.tokens, dtype, where=str(path))


def header_problem(header: bytes, tokens: int, dtype: np.dtype[Any], *, where: str) -> str | None:
    """What is wrong with a shard's header for this many ids of this type, or None."""
    if header == shard_header(tokens, dtype):
        return None
    if len(header) < HEADER_BYTES:
        return f"{where} has {len(header)} bytes, less than the {HEADER_BYTES} of a shard's header"
    magic, version = MAGIC_VERSION[dtype]
    found = [int(value) for value in np.frombuffer(header[:12].ljust(12, b"\0"), dtype="<i4")]
    if found != [magic, version, tokens]:
        return (
            f"{where}: header says magic {found[0]}, version {found[1]}, {found[2]} tokens; expected magic {magic}, "
            f"version {version} ({dtype.name} ids), {tokens} tokens"
        )
    return f"{where}: the header holds something after its three numbers, where zeros belong"


def verify_data(folder: Path) -> Iterator[str]:
    """Reads every byte of a data set and compares it with the manifest; yields a line per shard and problem.

    Raises: UserError at the end, naming every problem: kind, size, header, sha256, ids outside the vocabulary, counts that
    differ, holes in the numbering, shards that the manifest does not know, a tokenizer that is not the one it names, and
    text of the manifest that is not canonical.
    """
    folder = Path(folder)
    data, path = read_manifest_file(folder), folder / MANIFEST_FILE
    manifest = decode_manifest(data, where=str(path))
    return verify_shards(
        manifest,
        where=str(folder),
        known_problems=[
            *manifest_problems(data, manifest, where=str(path)),
            *_folder_problems(folder, manifest),
        ],
        problems_of=lambda info: _shard_content_problems(folder / info.file, info, manifest),
    )


def verify_shards(
    manifest: Manifest, *, where: str, known_problems: Iterable[str], problems_of: Callable[[ShardInfo], Iterable[str]]
) -> Iterator[str]:
    """A line for each split and shard of a set, wherever it lies; `problems_of` reads a shard.

    Raises: UserError at the end, naming every problem.
    """
    problems = list(known_problems)
    for split in SPLITS:
        problems += numbering_problems([info.file for info in manifest.splits[split]])
        totals = manifest.totals(split)
        yield f"{split}: {len(manifest.splits[split])} shards, {totals['tokens']} tokens, {totals['documents']} documents"
        for info in manifest.splits[split]:
            found = list(problems_of(info))
            problems += found
            yield f"{info.file}: {info.tokens} tokens, {'; '.join(found) or 'ok'}"
    if problems:
        raise UserError(
            f"{where} has {len(problems)} problem{'s' * (len(problems) > 1)}: {'; '.join(problems)}; put these files back as "
            "they were made, or make the set again in another folder"
        )
    yield f"fingerprint {manifest.fingerprint}"


def _folder_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    known = {info.file for split in SPLITS for info in manifest.splits[split]}
    for path in sorted(folder.glob("*.bin")):
        if path.name not in known:
            yield f"{path} is not in {MANIFEST_FILE}; move it away or make the set again"
    try:
        tokenizer_file = own_tokenizer_file(folder, manifest)
    except UserError as error:
        yield str(error)
    else:
        yield from tokenizer_problems(manifest.tokenizer, tokenizer_file)


def manifest_problems(data: bytes, manifest: Manifest, *, where: str) -> Iterator[str]:
    """A line for each thing in the bytes of a manifest that its reader lets pass: text that is not canonical, and counts
    of the source that are not the sums over the shards."""
    if data != manifest.to_json().encode():
        yield (
            f"{where} was changed: its text is not the canonical one that the toolkit writes, so that its sha256 is not the "
            "fingerprint"
        )
    counts = manifest.source.get("counts")
    if not isinstance(counts, dict):  # shards that were adopted have no known source
        return
    for name in ("documents", "utf8_bytes"):
        total = sum(manifest.totals(split)[name] for split in SPLITS)
        if name in counts and counts[name] != total:
            yield f"{where}: source.counts.{name}={counts[name]!r} is not the sum over the shards, {total}"


def tokenizer_problems(info: TokenizerInfo, file: Path | None) -> Iterator[str]:
    """A line if the tokenizer in `file`, or (None) the one that comes with the toolkit, is not the one that is described."""
    from toolkit.data.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(info.name if file is None else str(file))
    except UserError as error:
        yield str(error)
        return
    differing = [
        f"{field} is {getattr(tokenizer, field)!r}, not {getattr(info, field)!r}"
        for field in TokenizerInfo.__annotations__
        if getattr(tokenizer, field) != getattr(info, field)
    ]
    if differing:
        what = f"the toolkit's tokenizer {info.name!r}" if file is None else str(file)
        yield f"{what} is not the one that {MANIFEST_FILE} describes: its {', its '.join(differing)}"


def refuse_foreign_tokenizer_file(folder: Path, tokenizer: "Tokenizer") -> None:
    """Raises UserError if the folder holds a tokenizer file that a set of this tokenizer would replace or contradict."""
    path = folder / TOKENIZER_FILE
    if not path.exists():
        return
    from toolkit.data.tokenizer import load_tokenizer

    with contextlib.suppress(UserError):  # a file that is no tokenizer at all is foreign as well
        if load_tokenizer(str(path)).sha256 == tokenizer.sha256:
            return
    raise UserError(
        f"{path} is there already and is not the tokenizer {tokenizer.name!r} of this set; move it away or use another folder"
    )


def write_tokenizer_file(folder: Path, tokenizer: "Tokenizer") -> None:
    """Puts a tokenizer of one's own beside the shards; the file that may be there already is the same tokenizer.

    Raises: UserError if its file has changed since it was loaded.
    """
    path = folder / TOKENIZER_FILE
    if tokenizer.path is None or path.exists():
        return
    from toolkit.data.tokenizer import load_tokenizer

    replace_file(path, tokenizer.path.read_bytes())
    if load_tokenizer(str(path)).sha256 != tokenizer.sha256:
        path.unlink()
        raise UserError(
            f"{tokenizer.path} was changed while it was in use; put back what it was and run the same command again"
        )


def numbering_problems(names: Iterable[str]) -> Iterator[str]:
    """A line for each hole or jump in the numbers of the names that share a prefix, in the order given."""
    last: dict[str, re.Match[str]] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if not match:
            continue
        prefix, digits = match.groups()
        before = last.get(prefix)
        if before is not None and int(digits) != int(before[2]) + 1:
            expected = f"{prefix}{int(before[2]) + 1:0{len(before[2])}d}.bin"
            yield f"{name} follows {before[0]}: {expected} is missing"
        last[prefix] = match


def _by_number(name: str) -> tuple[str, str]:
    """Sorts names by their numbers, however many digits these have."""
    match = _NUMBERED.fullmatch(name)
    return (f"{match[1]}{match[2]:0>20}.bin" if match else name), name


def _shard_content_problems(path: Path, info: ShardInfo, manifest: Manifest) -> Iterator[str]:
    problem = shard_problem(path, info, manifest.dtype)
    if problem:
        yield problem
        return
    try:
        found = _scan(path, tokenizer=manifest.tokenizer)
    except UserError as error:
        yield str(error)
        return
    yield from content_problems(found, info, where=str(path))


def content_problems(found: ShardInfo, info: ShardInfo, *, where: str) -> Iterator[str]:
    """A line for each thing that differs between a shard's content and what the manifest says of it."""
    if found.sha256 != info.sha256:
        yield f"{where} was changed: its sha256 is {found.sha256}, not {info.sha256}"
    if found.largest_id != info.largest_id:
        yield f"{where} holds ids up to {found.largest_id}, not {info.largest_id}"
    if found.documents != info.documents:
        yield f"{where} holds {found.documents} document starts, not {info.documents}"


def _scan(path: Path, *, tokenizer: TokenizerInfo, token_bytes: npt.NDArray[np.int64] | None = None) -> ShardInfo:
    """What a shard file really holds; UTF-8 bytes only with `token_bytes` (V,), else 0.

    Raises: UserError if it is no shard for this vocabulary size, holds an id outside it, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            pieces = iter(lambda: file.read(SCAN_BYTES), b"")
            return scan_shard(
                pieces, file=path.name, where=str(path), size=size, tokenizer=tokenizer, token_bytes=token_bytes
            )
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error} when it was read; check the disk") from error


def scan_shard(
    pieces: Iterable[bytes],
    *,
    file: str,
    where: str,
    size: int,
    tokenizer: TokenizerInfo,
    token_bytes: npt.NDArray[np.int64] | None = None,
) -> ShardInfo:
    """What the bytes of a shard hold, which come in pieces of any length and should be `size` in all.

    Raises: UserError if they are no shard for this vocabulary size, or hold an id outside it.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    digest = hashlib.sha256()
    header, rest = b"", b""
    tokens = largest = documents = utf8_bytes = done = 0
    for piece in pieces:
        digest.update(piece)
        rest += piece
        if not header:
            if len(rest) < HEADER_BYTES:
                continue
            header, rest = rest[:HEADER_BYTES], rest[HEADER_BYTES:]
            tokens = _tokens_in_header(header, dtype, size=size, where=where)
        ids = np.frombuffer(rest, dtype, len(rest) // dtype.itemsize)
        rest = rest[ids.nbytes :]
        if not len(ids):
            continue
        check_ids(ids, done, vocab_size=tokenizer.vocab_size, where=where)
        largest = max(largest, int(ids.max()))
        documents += int(np.count_nonzero(ids == tokenizer.eot_id))
        if token_bytes is not None:
            utf8_bytes += int(np.bincount(ids, minlength=tokenizer.vocab_size) @ token_bytes)
        done += len(ids)
    if not header:
        raise UserError(f"{where} has {len(rest)} bytes, less than the {HEADER_BYTES} of a shard's header")
    if done != tokens or rest:
        found = HEADER_BYTES + done * dtype.itemsize + len(rest)
        raise UserError(
            f"{where} has {found} bytes, but the {tokens} tokens in its header make {shard_bytes(tokens, dtype)}"
        )
    return ShardInfo(
        file=file,
        tokens=tokens,
        documents=documents,
        utf8_bytes=utf8_bytes,
        sha256=digest.hexdigest(),
        largest_id=largest,
    )


def _tokens_in_header(header: bytes, dtype: np.dtype[Any], *, size: int, where: str) -> int:
    """The count in a header of a shard of these ids and this size of the file.

    Raises: UserError if they do not fit together.
    """
    tokens = int(np.frombuffer(header[8:12], dtype="<i4")[0])
    problem = header_problem(header, tokens, dtype, where=where)
    if problem is None and not 1 <= tokens <= MAX_SHARD_TOKENS:
        problem = f"{where}: the header counts {tokens} tokens, which must be from 1 to {MAX_SHARD_TOKENS}"
    if problem is None and size != shard_bytes(tokens, dtype):
        problem = f"{where} has {size} bytes, but the {tokens} tokens in its header make {shard_bytes(tokens, dtype)}"
    if problem:
        raise UserError(problem)
    return tokens


def adopt(folder: Path, tokenizer: "Tokenizer") -> Manifest:
    """Writes the manifest for a folder of llm.c shards that others made, and returns it.

    Every shard is read once: header, size and id bounds are checked; documents are counted by end-of-text ids and UTF-8
    bytes through the tokenizer. A name with "train" in it is of the training split, one with "val" of the validation split;
    the shards keep their names. A folder that already has the same manifest is left as it is.

    Raises: UserError naming every shard that is damaged, of another vocabulary, missing in the numbering or of no split; for
    a folder that `prepare` has not finished, or that holds another tokenizer's file.
    """
    from toolkit.data.journal import JOURNAL_FILE, STATE_FOLDER  # it imports all that reads text

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds the .bin shards")
    names = sorted((path.name for path in folder.glob("*.bin")), key=_by_number)
    if not names:
        raise UserError(f"{folder} holds no .bin shards; `toolkit prepare PATH... --out {folder}` makes them from text")
    if (folder / STATE_FOLDER / JOURNAL_FILE).exists() and not (folder / MANIFEST_FILE).exists():
        raise UserError(
            f"{folder} holds an unfinished data set of `toolkit prepare`; run the same prepare command again to finish it"
        )
    refuse_foreign_tokenizer_file(folder, tokenizer)
    splits = {split: [name for name in names if _split_of(name) == split] for split in SPLITS}
    problems = [
        f"{name}: the name must hold either 'train' or 'val' to say which split it is"
        for name in names
        if not _split_of(name)
    ]
    problems += [f"{name}: {UNSAFE_NAME}; rename it" for name in names if not is_safe_shard_name(name)]
    for split in SPLITS:
        problems += numbering_problems(splits[split])
    info = TokenizerInfo(
        name=tokenizer.name, vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id, sha256=tokenizer.sha256
    )
    token_bytes = tokenizer.token_bytes()
    shards: dict[Split, list[ShardInfo]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for name in splits[split]:
            try:
                found = _scan(folder / name, tokenizer=info, token_bytes=token_bytes)
            except UserError as error:
                problems.append(str(error))
                continue
            shards[split].append(found)
            logger.info("%s: %d tokens, %d documents", name, found.tokens, found.documents)
    if problems:
        raise UserError(f"{folder} cannot be adopted: {'; '.join(problems)}")
    for split in SPLITS:
        if not splits[split]:
            logger.warning(
                "%s has no %s shard, and a run needs one; rename a shard that the other split can spare", folder, split
            )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        source={"kind": "adopted", "format": "llm.c"},
        tokenizer=info,
        splits={split: tuple(shards[split]) for split in SPLITS},
    )
    if (folder / MANIFEST_FILE).exists():
        if read_manifest(folder) != manifest:
            raise UserError(
                f"{folder / MANIFEST_FILE} is there already and says something else of these shards; see `toolkit verify "
                f"{folder}`, or remove it to adopt them as they are"
            )
        return manifest
    write_tokenizer_file(folder, tokenizer)
    write_manifest(folder, manifest)
    return manifest


def _split_of(name: str) -> Split | None:
    found = [split for split in SPLITS if split in name.lower()]
    return found[0] if len(found) == 1 else None
