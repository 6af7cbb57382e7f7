"""The data set on disk: shard files of token ids and the `manifest.json` that describes them; write, open, check.

A shard is llm.c's `.bin` file: 256 little-endian int32 (magic, version, token count, zeros), then the ids. Ids below
65,536 are uint16 (magic 20240520, version 1), others uint32 (magic 20240801, version 7). Shards lie flat in one folder
beside `manifest.json`, whose text is canonical, so that its sha256 is the data set's fingerprint.

Guarantees: a shard appears under its name only when it is complete and on disk; nothing is opened before its name, kind
and size fit the manifest; every id that is read is below the vocabulary size. Does not: know text or tokenization
(`prepare`), order or batches (`loader`).

Source of the layout: karpathy/llm.c, dev/data/data_common.py.
"""

import errno
import functools
import hashlib
import json
import os
import re
import stat
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from toolkit.errors import UserError
from toolkit.failpoint import failpoint

Split = Literal["train", "val"]
Ids = npt.NDArray[Any]  # uint16 or uint32 token ids

SPLITS: tuple[Split, ...] = ("train", "val")
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"  # vocabulary of a tokenizer of one's own, beside the shards
SCHEMA_VERSION = 1

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAGIC_VERSION: dict[np.dtype[Any], tuple[int, int]] = {
    np.dtype("<u2"): (20240520, 1),
    np.dtype("<u4"): (20240801, 7),
}
MAX_SHARD_TOKENS = 2**31 - 1  # the header counts in int32
MAX_MANIFEST_BYTES = 16 * 2**20  # about 50,000 shards; a larger file is not a manifest
MAX_OPEN_FILES = 64  # shards kept open per process, well below the usual limit of 1,024 files
CHUNK_TOKENS = 2**22  # ids held at one time when a whole shard is scanned

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NUMBERED = re.compile(r"(?P<prefix>.*?)(?P<number>\d+)\.bin")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id fits, else uint32, both little-endian."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerInfo:
    """Which tokenizer made the ids; two sets may be mixed only if these are equal."""

    name: str
    vocab_size: int
    eot_id: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """What the manifest says of one shard; a document counts where it starts, `sha256` is that of the whole file."""

    file: str
    tokens: int
    documents: int
    utf8_bytes: int
    sha256: str
    largest_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A data set as one small immutable record, the same on every machine.

    `source` says where the text came from as plain JSON values; `prepare` keeps there `counts` (documents and bytes
    read, skipped, empty, ...) and `split_rule`. Times, absolute paths and worker counts have no place in it.

    Raises: UserError if a value breaks a rule; the message names all that do.
    """

    schema_version: int
    source: Mapping[str, Any]
    tokenizer: TokenizerInfo
    splits: Mapping[Split, tuple[ShardInfo, ...]]

    def __post_init__(self) -> None:
        problems = _manifest_problems(self)
        if problems:
            raise UserError("; ".join(problems))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the ids in every shard of the set."""
        return token_dtype(self.tokenizer.vocab_size)

    @property
    def fingerprint(self) -> str:
        """sha256 of the canonical text, which is also that of the file `manifest.json`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def totals(self, split: Split) -> dict[str, int]:
        """Tokens, documents and UTF-8 bytes of a split."""
        shards = self.splits[split]
        return {
            "tokens": sum(shard.tokens for shard in shards),
            "documents": sum(shard.documents for shard in shards),
            "utf8_bytes": sum(shard.utf8_bytes for shard in shards),
        }

    def to_json(self) -> str:
        """The canonical text: sorted keys, one space of indent, ASCII, a newline at the end."""
        values = {
            "schema_version": self.schema_version,
            "source": self.source,
            "tokenizer": asdict(self.tokenizer),
            "splits": {
                split: self.totals(split) | {"shards": [asdict(shard) for shard in self.splits[split]]}
                for split in SPLITS
            },
        }
        return json.dumps(values, sort_keys=True, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str) -> "Manifest":
        """The manifest that this text describes.

        Raises: UserError if it is not one of ours to the letter: another schema, unknown or missing keys, values out of
        bounds, unsafe file names, totals that do not fit.
        """
        try:
            return _parse_manifest(text)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def _manifest_problems(manifest: Manifest) -> list[str]:
    tokenizer, shards = manifest.tokenizer, [shard for split in manifest.splits.values() for shard in split]
    problems = []
    if manifest.schema_version != SCHEMA_VERSION:
        problems.append(
            f"schema_version={manifest.schema_version} is not the {SCHEMA_VERSION} that this version of the toolkit reads"
        )
    if not 1 <= tokenizer.vocab_size <= 2**31 - 1:
        problems.append(f"tokenizer vocab_size={tokenizer.vocab_size} must be from 1 to {2**31 - 1}")
    if not 0 <= tokenizer.eot_id < tokenizer.vocab_size:
        problems.append(f"tokenizer eot_id={tokenizer.eot_id} must be below vocab_size={tokenizer.vocab_size}")
    if not _SAFE_NAME.fullmatch(tokenizer.name):
        problems.append(f"tokenizer name {tokenizer.name!r} may hold only letters, digits, '.', '_' and '-'")
    if not _SHA256.fullmatch(tokenizer.sha256):
        problems.append(f"tokenizer sha256 {tokenizer.sha256!r} is not 64 hexadecimal digits")
    if set(manifest.splits) != set(SPLITS):
        problems.append(f"splits {sorted(manifest.splits)} must be {sorted(SPLITS)}")
    names = Counter(shard.file for shard in shards)
    problems += [f"shard {name!r} is listed more than once" for name, count in names.items() if count > 1]
    for shard in shards:
        problems += [f"shard {shard.file!r}: {problem}" for problem in _shard_info_problems(shard, tokenizer)]
    return problems


def _shard_info_problems(shard: ShardInfo, tokenizer: TokenizerInfo) -> list[str]:
    problems = []
    if not _SAFE_NAME.fullmatch(shard.file) or not shard.file.endswith(".bin"):
        problems.append("a shard name may hold only letters, digits, '.', '_' and '-', and ends in .bin")
    if not 1 <= shard.tokens <= MAX_SHARD_TOKENS:
        problems.append(f"tokens={shard.tokens} must be from 1 to {MAX_SHARD_TOKENS}")
    if not 0 <= shard.documents <= shard.tokens:
        problems.append(f"documents={shard.documents} must be from 0 to tokens={shard.tokens}")
    if not 0 <= shard.utf8_bytes < 2**63:
        problems.append(f"utf8_bytes={shard.utf8_bytes} must be from 0 to {2**63 - 1}")
    if not _SHA256.fullmatch(shard.sha256):
        problems.append(f"sha256 {shard.sha256!r} is not 64 hexadecimal digits")
    if not 0 <= shard.largest_id < tokenizer.vocab_size:
        problems.append(
            f"largest_id={shard.largest_id} must be below the tokenizer's vocab_size={tokenizer.vocab_size}"
        )
    return problems


def _parse_manifest(text: str) -> Manifest:
    try:
        values = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UserError:
        raise
    except RecursionError:
        raise UserError("is nested too deeply for a manifest") from None
    except ValueError as error:
        raise UserError(f"is not valid JSON ({error})") from None
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise UserError(
            f"schema_version={version!r} is not the {SCHEMA_VERSION} that this version of the toolkit reads"
        )
    fields = _fields(values, "manifest", {"schema_version": int, "source": dict, "tokenizer": dict, "splits": dict})
    splits = _fields(fields["splits"], "splits", dict.fromkeys(SPLITS, dict))
    shards: dict[Split, tuple[ShardInfo, ...]] = {}
    for split in SPLITS:
        totals = {"tokens": int, "documents": int, "utf8_bytes": int}
        entries = _fields(splits[split], f"splits.{split}", totals | {"shards": list})["shards"]
        shards[split] = tuple(
            ShardInfo(**_fields(entry, f"splits.{split}.shards[{index}]", ShardInfo.__annotations__))
            for index, entry in enumerate(entries)
        )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        source=fields["source"],
        tokenizer=TokenizerInfo(**_fields(fields["tokenizer"], "tokenizer", TokenizerInfo.__annotations__)),
        splits=shards,
    )
    for split in SPLITS:
        for name, total in manifest.totals(split).items():
            if splits[split][name] != total:
                raise UserError(f"splits.{split}.{name}={splits[split][name]} is not the sum over its shards, {total}")
    return manifest


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise UserError("holds a key twice in one object")
    return values


def _no_constant(name: str) -> Any:
    raise UserError(f"holds {name}, which is not JSON")


def _fields(values: Any, where: str, types: Mapping[str, type]) -> dict[str, Any]:
    """`values` if it is an object with exactly these keys and types."""
    if not isinstance(values, dict):
        raise UserError(f"{where} is not an object")
    unknown, missing = sorted(set(values) - set(types)), sorted(set(types) - set(values))
    if unknown or missing:
        raise UserError(f"{where}: unknown keys {unknown}, missing keys {missing}; was it made by another version?")
    for name, kind in types.items():
        if type(values[name]) is not kind:  # `True` is no count
            raise UserError(f"{where}.{name}={str(values[name])[:80]!r} is not of type {kind.__name__}")
    return values


def write_durably(path: Path, data: bytes) -> None:
    """Replaces a file by these bytes, completely or not at all, on disk when this returns."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    failpoint("shards.before-rename")
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable (nothing to do where folders cannot be opened, as on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json`, the mark that the data set is complete."""
    write_durably(Path(folder) / MANIFEST_FILE, manifest.to_json().encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data folder, checked strictly; the shards themselves are not touched.

    Raises: UserError if the folder or the manifest is missing (naming the command that makes it) or not as it should be.
    """
    folder = Path(folder)
    path = folder / MANIFEST_FILE
    if not folder.exists():
        raise UserError(f"{folder} does not exist; {_how_to_make(folder)}")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds {MANIFEST_FILE}")
    try:
        with open_regular(path) as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise UserError(_no_manifest(folder)) from None
    return decode_manifest(data, where=str(path))


def decode_manifest(data: bytes, *, where: str) -> Manifest:
    """The manifest in the bytes of a file, bounded in size."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise UserError(f"{where} is larger than {MAX_MANIFEST_BYTES} bytes, more than any manifest of ours")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 ({error.reason} at byte {error.start})") from None
    return Manifest.from_json(text, where=where)


def _how_to_make(folder: Path) -> str:
    if folder.name == "fineweb-edu-10b":
        return f"make it with `make prepare-data`, or another set with `toolkit prepare PATH... --out {folder}`"
    return f"make it with `toolkit prepare PATH... --out {folder}`"


def _no_manifest(folder: Path) -> str:
    if any(folder.glob("*.bin")):
        return (
            f"{folder} holds shards but no {MANIFEST_FILE}; run the same `toolkit prepare ... --out {folder}` again to "
            f"finish it, or, for llm.c shards, `toolkit adopt {folder}`"
        )
    what = "is empty" if not any(folder.iterdir()) else f"has no {MANIFEST_FILE}"
    return f"{folder} {what}; {_how_to_make(folder)}, or, for llm.c shards, `toolkit adopt {folder}`"


def open_regular(path: Path) -> Any:
    """A regular file opened for reading in binary; never through a symbolic link.

    Raises: UserError for a link, a folder or a device; FileNotFoundError if there is nothing.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, which could lead anywhere; put the file itself there")
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise UserError(f"{path} is not a regular file") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


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
        read = self.source(ids.view(np.uint8).data, HEADER_BYTES + start * self.dtype.itemsize)
        if read != wanted:
            raise UserError(
                f"{self.where}: got {read} of {wanted} bytes at token {start}; the file became shorter since it was "
                "opened, put the whole shard back"
            )

    def check(self, ids: Ids, start: int) -> None:
        """Checks that these ids, which stand at `start`, are in the vocabulary.

        Raises: UserError naming the shard and the offset of the first one that is not.
        """
        if len(ids) and int(ids.max()) >= self.vocab_size:
            offset = int(np.argmax(ids >= self.vocab_size))
            raise UserError(
                f"{self.where}: id {int(ids[offset])} at token {start + offset} is not below vocab_size={self.vocab_size}; "
                "the shard is damaged or of another tokenizer, see `toolkit verify`"
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
    magic, version = MAGIC_VERSION[dtype]
    found = [int(value) for value in np.frombuffer(header[:12].ljust(12, b"\0"), dtype="<i4")]
    if found != [magic, version, tokens]:
        return (
            f"{where}: header says magic {found[0]}, version {found[1]}, {found[2]} tokens; expected magic {magic}, "
            f"version {version} ({dtype.name} ids), {tokens} tokens"
        )
    return f"{where}: the header holds something after its three numbers, where zeros belong"
