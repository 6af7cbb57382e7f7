"""Documents -> shards and their manifest: in parallel, continued after a kill, the same bytes for any number of workers.

The source is cut into blocks; workers turn them into ids; this process appends the ids to one open shard per split, in
the order of the documents. Every few seconds, and after every finished shard, it syncs the open shards and writes down
in `.prepare/journal.json` how far it got, so that the same command goes on from there after a kill at any moment. The
manifest comes last and marks the set as complete.

A document belongs to the validation split if xxh3_64 of its UTF-8 text lies in the lowest `val_fraction` of all hashes:
it stays there when documents are added. If that leaves a split empty, the last `val_fraction` of the tokens is the
validation split.

Guarantees: shards and manifest depend on the documents, the tokenizer, `shard_tokens`, `val_fraction` and
`text_column` alone; a full disk, a kill or a broken connection loses nothing; no copy of the data set lies on disk.
Does not: change text beyond what `documents` states, shuffle, remove duplicates.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from toolkit.data.documents import Counts, Position
from toolkit.data.shards import (
    HEADER_BYTES,
    MANIFEST_FILE,
    MAX_SHARD_TOKENS,
    SCHEMA_VERSION,
    SPLITS,
    TOKENIZER_FILE,
    Ids,
    Manifest,
    ShardInfo,
    ShardWriter,
    Split,
    TokenizerInfo,
    read_manifest,
    shard_file_name,
    sync_folder,
    token_dtype,
    write_durably,
    write_manifest,
)
from toolkit.data.sources import Source, open_source
from toolkit.data.tokenizer import Tokenizer, load_tokenizer
from toolkit.data.workers import Job, Part, default_workers, tokenize_block, tokenize_blocks
from toolkit.errors import UserError, describe_os_error
from toolkit.failpoint import failpoint

logger = logging.getLogger(__name__)

STATE_FOLDER = ".prepare"  # beside the shards: what continuing needs, nothing that readers of the set need
JOURNAL_EVERY_SECONDS = 5.0  # most work that a kill can undo, but for one block [seconds]
COPY_TOKENS = 2**22  # ids held at one time when part of a shard is copied

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareResult:
    """The finished set, and what a user should read; `already_done`: nothing had to be done."""

    manifest: Manifest
    lines: list[str]
    already_done: bool


def prepare(
    paths: Sequence[str],
    *,
    out: str | Path,
    tokenizer: str = "gpt2",
    text_column: str = "text",
    workers: int | None = None,
    shard_tokens: int = 100_000_000,
    val_fraction: float = 0.005,
    progress: bool = True,
    report: Report | None = None,
) -> PrepareResult:
    """Makes, continues or finds finished the data set of these sources in the folder `out`.

    `report` hears at once what would be too late at the end: the disk needed, retries, very large documents. Without it
    these lines go to the progress bar's stderr, or to the log where there is no progress bar.

    Raises: UserError for settings that break a rule, for other settings or sources than those of what is in `out`, and
    for text that cannot be read; OSError with the folder's name if it cannot be written.
    """
    _check_settings(shard_tokens=shard_tokens, val_fraction=val_fraction, workers=workers)
    report = report or _reporter(progress)
    out = Path(out)
    vocabulary = load_tokenizer(tokenizer)
    with _locked(_made(out)):
        previous = _State.load(out)
        source = open_source(
            [str(path) for path in paths], text_column=text_column, revision=previous.revision if previous else None
        )
        settings = _settings(source, vocabulary, shard_tokens=shard_tokens, val_fraction=val_fraction)
        if (out / MANIFEST_FILE).exists():
            return _already_done(out, settings, vocabulary, source)
        state = _continue_or_start(out, previous, settings, source, report)
        job = Job(tokenizer=tokenizer, tokenizer_sha256=vocabulary.sha256, val_below=round(val_fraction * 2**64))
        run = _Run(out=out, source=source, tokenizer=vocabulary, job=job, state=state, shard_tokens=shard_tokens)
        try:
            run.read_all(workers=workers or default_workers(), progress=progress, report=report)
            manifest = run.finish(val_fraction=val_fraction)
        except OSError as error:
            raise _storage_error(error, out) from None
    return PrepareResult(manifest=manifest, lines=_summary(out, manifest, source), already_done=False)


def _check_settings(*, shard_tokens: int, val_fraction: float, workers: int | None) -> None:
    problems = []
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        problems.append(f"shard_tokens={shard_tokens} must be from 1 to {MAX_SHARD_TOKENS}")
    if not 0 < val_fraction < 1:
        problems.append(f"val_fraction={val_fraction} must be above 0 and below 1, for example 0.005")
    if workers is not None and workers < 1:
        problems.append(f"workers={workers} must be at least 1; leave it out for one per core")
    if problems:
        raise UserError("; ".join(problems))


def _reporter(progress: bool) -> Report:
    def write(line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    return write if progress else logger.info


def _made(out: Path) -> Path:
    """The folder for working notes in `out`, both made where they are missing."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder for the shards with --out")
    folder = out / STATE_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(out))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {describe_os_error(error)}") from None
    return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder against a second `prepare`; the lock goes with the process."""
    with (folder / "lock").open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # not on Windows
            pass
        except OSError:
            raise UserError(
                f"another `toolkit prepare` is at work in {folder.parent}; wait for it or use another --out"
            ) from None
        yield


def _settings(source: Source, tokenizer: Tokenizer, *, shard_tokens: int, val_fraction: float) -> dict[str, Any]:
    """Everything that decides the bytes, as it stands in the journal and, but for the tokenizer, in the manifest."""
    return {
        "source": source.description(),
        "tokenizer": asdict(_tokenizer_info(tokenizer)),
        "shard_tokens": shard_tokens,
        "val_fraction": val_fraction,
    }


def _tokenizer_info(tokenizer: Tokenizer) -> TokenizerInfo:
    return TokenizerInfo(
        name=tokenizer.name, vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id, sha256=tokenizer.sha256
    )


# --- what is on disk already -----------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class _OpenShard:
    """The unfinished shard of a split: what of it is safely on disk."""

    index: int
    tokens: int
    documents: int
    utf8_bytes: int


@dataclass(kw_only=True, slots=True)
class _State:
    """How far the work got: the journal's content."""

    settings: dict[str, Any]
    position: Position = field(default_factory=Position)
    source_bytes: int = 0
    counts: Counts = field(default_factory=Counts)
    shards: dict[Split, list[ShardInfo]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    open_shards: dict[Split, _OpenShard] = field(default_factory=dict)
    read_all: bool = False
    keep_tokens: int | None = None  # of the train split, when its end becomes the validation split
    files: list[list[Any]] | None = None  # name, size and stamp of each file of the source

    @property
    def revision(self) -> str | None:
        """The commit of a dataset on the Hub, so that going on reads the same files."""
        value = self.settings["source"].get("revision")
        return str(value) if value else None

    @classmethod
    def load(cls, out: Path) -> "_State | None":
        """The state of interrupted work in `out`, or None."""
        path = out / STATE_FOLDER / "journal.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            files = json.loads((out / STATE_FOLDER / "files.json").read_text(encoding="utf-8"))
            return cls(
                settings=values["settings"],
                position=Position(**values["position"]),
                source_bytes=values["source_bytes"],
                counts=Counts(**values["counts"]),
                shards={split: [ShardInfo(**entry) for entry in values["shards"][split]] for split in SPLITS},
                open_shards={split: _OpenShard(**entry) for split, entry in values["open_shards"].items()},
                read_all=values["read_all"],
                keep_tokens=values["keep_tokens"],
                files=files,
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete {out} and run again") from None

    def save(self, out: Path) -> None:
        """Replaces the journal."""
        values = {
            "settings": self.settings,
            "position": asdict(self.position),
            "source_bytes": self.source_bytes,
            "counts": self.counts.to_dict(),
            "shards": {split: [asdict(info) for info in self.shards[split]] for split in SPLITS},
            "open_shards": {split: asdict(shard) for split, shard in self.open_shards.items()},
            "read_all": self.read_all,
            "keep_tokens": self.keep_tokens,
        }
        write_durably(out / STATE_FOLDER / "journal.json", json.dumps(values).encode())
        failpoint("prepare.after-journal")


def _file_stamps(source: Source) -> list[list[Any]]:
    return [[file.name, file.size, file.stamp] for file in source.files]


def _continue_or_start(
    out: Path, previous: _State | None, settings: dict[str, Any], source: Source, report: Report
) -> _State:
    stamps = _file_stamps(source)
    if previous is not None:
        _refuse_changed_files(out, previous, stamps)
        _refuse_other_settings(out, previous.settings, settings, "unfinished")
        tokens = sum(info.tokens for split in SPLITS for info in previous.shards[split])
        tokens += sum(shard.tokens for shard in previous.open_shards.values())
        report(
            f"continuing in {out}: {tokens:,} tokens are done ({previous.source_bytes / source.size:.0%} of the source)"
        )
        return previous
    foreign = sorted(path.name for path in out.glob("*.bin"))
    if foreign:
        raise UserError(
            f"{out} holds {foreign[0]} but neither a manifest nor work of `toolkit prepare` to continue; use an empty --out"
        )
    write_durably(out / STATE_FOLDER / "files.json", json.dumps(stamps).encode())
    state = _State(settings=settings, files=stamps)
    state.save(out)
    return state


def _refuse_changed_files(out: Path, previous: _State, stamps: list[list[Any]]) -> None:
    before = {name: rest for name, *rest in previous.files or []}
    now = {name: rest for name, *rest in stamps}
    if before == now:
        return
    changed = [name for name in before if name in now and now[name] != before[name]]
    gone, new = [name for name in before if name not in now], [name for name in now if name not in before]
    what = f"{changed[0]} changed" if changed else f"{gone[0]} is gone" if gone else f"{new[0]} is new"
    raise UserError(
        f"the source is not the one that {out} was begun with: {what}; put it back as it was, or delete {out} (or use "
        "another --out) to start over"
    )


def _refuse_other_settings(out: Path, old: dict[str, Any], new: dict[str, Any], what: str) -> None:
    differences = _differences(old, new)
    if differences:
        raise UserError(
            f"{out} holds an {what} data set with other settings: {'; '.join(differences[:5])}; use another --out, or "
            f"delete {out}"
        )


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            found += _differences(before, now, f"{prefix}{name}.")
        elif before != now:
            found.append(f"{prefix}{name} is {before!r}, now {now!r}")
    return found


def _already_done(out: Path, settings: dict[str, Any], tokenizer: Tokenizer, source: Source) -> PrepareResult:
    manifest = read_manifest(out)
    recorded = dict(manifest.source)
    if recorded.get("made_by") != "toolkit prepare":
        raise UserError(f"{out} holds a data set that `toolkit prepare` did not make; use another --out")
    old = {
        "source": {name: recorded.get(name) for name in recorded if name not in _NOT_SETTINGS},
        "tokenizer": asdict(manifest.tokenizer),
        "shard_tokens": recorded["shard_tokens"],
        "val_fraction": recorded["val_fraction"],
    }
    with contextlib.suppress(FileNotFoundError):
        files = json.loads((out / STATE_FOLDER / "files.json").read_text(encoding="utf-8"))
        _refuse_changed_files(out, _State(settings=settings, files=files), _file_stamps(source))
    _refuse_other_settings(out, old, settings, "finished")
    lines = [f"{out} is finished already, and its source is unchanged: nothing to do", *_summary(out, manifest, source)]
    return PrepareResult(manifest=manifest, lines=lines, already_done=True)


_NOT_SETTINGS = {"made_by", "shard_tokens", "val_fraction", "split_rule", "counts"}


# --- the work --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class _Run:
    """One run of `prepare` on one folder."""

    out: Path
    source: Source
    tokenizer: Tokenizer
    job: Job
    state: _State
    shard_tokens: int

    def read_all(self, *, workers: int, progress: bool, report: Report) -> None:
        """Tokenizes what is left of the source into shards."""
        if self.state.read_all:
            return
        self._check_disk(report)
        writers = {
            split: _SplitWriter(
                out=self.out,
                split=split,
                tokenizer=self.tokenizer,
                shard_tokens=self.shard_tokens,
                finished=self.state.shards[split],
                open_shard=self.state.open_shards.get(split),
            )
            for split in SPLITS
        }
        blocks = self.source.blocks(self.state.position, find_cut=self.tokenizer.exact_cut, notice=report)
        saved_at = time.monotonic()
        started_with = sum(writer.tokens for writer in writers.values())
        with tqdm(
            total=self.source.size,
            initial=self.state.source_bytes,
            unit="B",
            unit_scale=True,
            desc="prepare",
            disable=None if progress else True,
        ) as bar:
            started = time.monotonic()
            for block, result in tokenize_blocks(blocks, tokenizer=self.tokenizer, job=self.job, workers=workers):
                shard_done = False
                for split, part in result.parts.items():
                    shard_done |= writers[split].append(part)
                self.state.counts.add(result.counts)
                self.state.position = block.end
                bar.update(block.source_bytes - self.state.source_bytes)
                self.state.source_bytes = block.source_bytes
                failpoint("prepare.after-block")
                now = time.monotonic()
                if shard_done or now - saved_at > JOURNAL_EVERY_SECONDS:
                    self._save(writers)
                    saved_at = now
                tokens = sum(writer.tokens for writer in writers.values()) - started_with
                bar.set_postfix_str(f"{tokens / max(now - started, 1e-9) / 1e6:.2f}M tokens/s", refresh=False)
        self._save(writers)
        failpoint("prepare.before-last-shards")
        for writer in writers.values():
            writer.close()
        self.state.read_all = True
        self._save(writers)

    def _save(self, writers: dict[Split, "_SplitWriter"]) -> None:
        for split, writer in writers.items():
            self.state.open_shards.pop(split, None)
            open_shard = writer.sync()
            if open_shard is not None:
                self.state.open_shards[split] = open_shard
        failpoint("prepare.before-journal")
        self.state.save(self.out)
        for writer in writers.values():
            writer.forget_previous()

    def _check_disk(self, report: Report) -> None:
        """Estimates the disk that the rest will take from the first block, before anything is written.

        Raises: UserError if the folder's disk has clearly less.
        """
        blocks = self.source.blocks(self.state.position, find_cut=self.tokenizer.exact_cut)
        block = next(blocks, None)
        if block is None or block.source_bytes <= self.state.source_bytes:
            return
        result = tokenize_block(block, self.tokenizer, self.job.val_below)
        tokens = sum(len(part.ids) for part in result.parts.values())
        left = (self.source.size - self.state.source_bytes) / (block.source_bytes - self.state.source_bytes)
        needed = tokens * left * token_dtype(self.tokenizer.vocab_size).itemsize
        free = shutil.disk_usage(self.out).free
        report(
            f"about {_count(tokens * left)} tokens to go: {_size(needed)} of disk in {self.out}, where {_size(free)} are free"
        )
        if needed * 0.8 > free:
            raise UserError(
                f"{self.out} needs about {_size(needed)} but its disk has {_size(free)} free; free some space or use an "
                "--out on a larger disk"
            )

    def finish(self, *, val_fraction: float) -> Manifest:
        """Makes sure that both splits hold something, writes the manifest and drops the journal."""
        state = self.state
        rule = "document hash"
        if not state.counts.documents:
            raise UserError(
                f"the source holds no text: {state.counts.documents_read} documents read, all of them empty or skipped; "
                f"name another source, and delete {self.out}"
            )
        if state.keep_tokens is not None or not all(state.shards.values()):
            rule = "last tokens"
            self._split_off_the_end(val_fraction)
        if self.tokenizer.path is not None:
            write_durably(self.out / TOKENIZER_FILE, self.tokenizer.path.read_bytes())
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            source={
                "made_by": "toolkit prepare",
                **state.settings["source"],
                "shard_tokens": self.shard_tokens,
                "val_fraction": val_fraction,
                "split_rule": rule,
                "counts": state.counts.to_dict(),
            },
            tokenizer=_tokenizer_info(self.tokenizer),
            splits={split: tuple(state.shards[split]) for split in SPLITS},
        )
        failpoint("prepare.before-manifest")
        write_manifest(self.out, manifest)
        failpoint("prepare.after-manifest")
        (self.out / STATE_FOLDER / "journal.json").unlink()
        return manifest

    def _split_off_the_end(self, val_fraction: float) -> None:
        """Makes the last tokens of the only split that holds any the validation split; safe to repeat after a kill."""
        state = self.state
        if not state.shards["train"]:
            for index, info in enumerate(state.shards["val"]):
                path = self.out / info.file
                if path.exists():
                    path.replace(self.out / shard_file_name("train", index))
                state.shards["train"].append(_renamed(info, shard_file_name("train", index)))
            sync_folder(self.out)
            state.shards["val"] = []
            state.save(self.out)
        total = sum(info.tokens for info in state.shards["train"])
        if state.keep_tokens is None:
            if total < 2:
                raise UserError(f"the source gives only {total} tokens, too few for two splits; name more text")
            keep = total - min(total - 1, max(1, round(total * val_fraction)))
            state.shards["val"] = self._copy(keep, total, "val")
            state.keep_tokens = keep
            state.save(self.out)
        failpoint("prepare.before-cutting-train")
        kept: list[ShardInfo] = []
        start = 0
        for info in state.shards["train"]:
            if start >= state.keep_tokens:
                (self.out / info.file).unlink(missing_ok=True)
            elif start + info.tokens > state.keep_tokens:
                kept += self._copy(start, state.keep_tokens, "train", first_index=len(kept))
            else:
                kept.append(info)
            start += info.tokens
        sync_folder(self.out)
        state.shards["train"] = kept
        state.save(self.out)

    def _copy(self, start: int, stop: int, split: Split, *, first_index: int = 0) -> list[ShardInfo]:
        """Shards of `split` with the train tokens from `start` to `stop`."""
        shards: list[ShardInfo] = []
        writer = _SplitWriter(
            out=self.out,
            split=split,
            tokenizer=self.tokenizer,
            shard_tokens=self.shard_tokens,
            finished=shards,
            open_shard=None,
            first_index=first_index,
        )
        shard_start = 0
        for info in self.state.shards["train"]:
            first, last = max(start - shard_start, 0), min(stop - shard_start, info.tokens)
            for ids in _read_ids(self.out / info.file, writer.dtype, first, last):
                writer.append(writer.describe(ids))
            shard_start += info.tokens
        writer.close()
        return shards


def _renamed(info: ShardInfo, name: str) -> ShardInfo:
    return ShardInfo(**(asdict(info) | {"file": name}))


def _read_ids(path: Path, dtype: np.dtype[Any], start: int, stop: int) -> Iterator[Ids]:
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


class _SplitWriter:
    """Appends ids to one split: fills a shard, finishes it, begins the next; can go on with an unfinished one."""

    def __init__(
        self,
        *,
        out: Path,
        split: Split,
        tokenizer: Tokenizer,
        shard_tokens: int,
        finished: list[ShardInfo],
        open_shard: _OpenShard | None,
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

    def _reopen(self, open_shard: _OpenShard) -> None:
        """Begins the shard anew with the ids that the journal vouches for.

        They lie in the temporary file, or in one put aside here by an earlier start, or in the finished shard if the
        kill came after it was finished and before the journal said so.
        """
        path = self._next_path()
        temporary = path.with_name(f".{path.name}.tmp")
        aside = path.with_name(f".{path.name}.previous")
        needed = HEADER_BYTES + open_shard.tokens * self.dtype.itemsize
        found = [file for file in (aside, temporary, path) if file.exists() and file.stat().st_size >= needed]
        if not found:
            raise UserError(f"{temporary} is gone or shorter than the journal says; delete {self._out} and run again")
        if found[0] == temporary:
            temporary.replace(aside)
            found[0] = aside
        self._writer = self._open()
        for ids in _read_ids(found[0], self.dtype, 0, open_shard.tokens):
            self._writer.append(ids, documents=0, utf8_bytes=0)
        self._writer.append(np.empty(0, self.dtype), documents=open_shard.documents, utf8_bytes=open_shard.utf8_bytes)
        self._previous = aside

    def describe(self, ids: Ids) -> Part:
        """Ids with the documents that start in them and the UTF-8 bytes that they stand for."""
        return Part(
            ids=ids,
            documents=int(np.count_nonzero(ids == self._eot_id)),
            utf8_bytes=int(self._token_bytes[ids].sum()),
        )

    def append(self, part: Part) -> bool:
        """Adds ids; True if a shard was finished on the way."""
        finished = False
        while len(part.ids):
            self._writer = self._writer or self._open()
            room = self._shard_tokens - self._writer.tokens
            if len(part.ids) <= room:
                head, part = part, Part(ids=part.ids[:0])
            else:
                head = self.describe(part.ids[:room])
                part = Part(
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

    def sync(self) -> _OpenShard | None:
        """Brings the open shard to disk and says what it holds."""
        if self._writer is None:
            return None
        file: IO[bytes] = self._writer._file
        file.flush()
        os.fsync(file.fileno())
        return _OpenShard(
            index=self._first_index + len(self._finished),
            tokens=self._writer.tokens,
            documents=self._writer.documents,
            utf8_bytes=self._writer.utf8_bytes,
        )

    def forget_previous(self) -> None:
        """Removes the file that an earlier start left, once the journal no longer needs it."""
        if self._previous is not None:
            self._previous.unlink(missing_ok=True)
            self._previous = None


def _check_finished(path: Path, info: ShardInfo, dtype: np.dtype[Any]) -> None:
    expected = HEADER_BYTES + info.tokens * dtype.itemsize
    if not path.exists() or path.stat().st_size != expected:
        raise UserError(
            f"{path}, finished by an earlier start, is gone or no longer has {expected} bytes; delete {path.parent} and "
            "run again"
        )


def _storage_error(error: OSError, out: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            f"writing to {out} failed: {describe_os_error(error)}; nothing is damaged, the same command goes on from here"
        )
    return error


# --- what the user reads ---------------------------------------------------------------------------------------------


def _summary(out: Path, manifest: Manifest, source: Source) -> list[str]:
    """The totals: every document and byte read, and what became of it."""
    counts = Counts(**manifest.source["counts"])
    lines = [
        f"read {source.kind}: {len(source.files):,} files, {_size(source.size)}, {counts.documents_read:,} documents"
        + (f"; {source.ignored_files:,} files with other endings ignored" if source.ignored_files else ""),
        f"kept {counts.documents:,} documents, {counts.utf8_bytes:,} UTF-8 bytes",
    ]
    skipped = {
        "empty": counts.skipped_empty,
        "null": counts.skipped_null,
        "not decodable by their coding line": counts.skipped_undecodable,
    }
    if any(skipped.values()):
        lines.append("skipped documents: " + ", ".join(f"{count:,} {why}" for why, count in skipped.items() if count))
    others = {
        "blank lines skipped": counts.skipped_blank_lines,
        "documents of white space alone kept": counts.white_space_only,
        "byte order marks removed": counts.byte_order_marks_removed,
        "lone surrogates replaced by U+FFFD": counts.surrogates_replaced,
    }
    lines += [f"{count:,} {what}" for what, count in others.items() if count]
    for split in SPLITS:
        total, shards = manifest.totals(split), manifest.splits[split]
        lines.append(
            f"{split}: {len(shards):,} shards, {total['tokens']:,} tokens, {total['documents']:,} documents, "
            f"{total['utf8_bytes']:,} bytes of text"
        )
    if manifest.source["split_rule"] == "last tokens":
        lines.append(
            "the hash of the documents would leave a split empty, so the last "
            f"{manifest.totals('val')['tokens']:,} tokens are the validation split"
        )
    return [*lines, f"data set {manifest.fingerprint[:12]} is complete in {out}"]


def _size(count: float) -> str:
    for unit, bytes_in_it in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= bytes_in_it:
            return f"{count / bytes_in_it:.1f} {unit}"
    return f"{count:.0f} bytes"


def _count(count: float) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
