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

import dataclasses
import errno
import itertools
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from toolkit.data import journal as journals
from toolkit.data import reading
from toolkit.data.documents import Block, Counts
from toolkit.data.journal import Journal
from toolkit.data.manifest import (
    MANIFEST_FILE,
    MAX_SHARD_TOKENS,
    SCHEMA_VERSION,
    SPLITS,
    Manifest,
    ShardInfo,
    Split,
    TokenizerInfo,
    read_manifest,
    token_dtype,
    write_manifest,
)
from toolkit.data.shards import (
    refuse_foreign_tokenizer_file,
    shard_bytes,
    shard_file_name,
    write_tokenizer_file,
)
from toolkit.data.sources import HUB_PREFIX, Source, open_source
from toolkit.data.split_writer import SplitWriter, check_content, read_ids
from toolkit.data.tokenizer import Tokenizer, load_tokenizer
from toolkit.data.tokenizing import Job, Part, Result
from toolkit.data.workers import Pool, started, tokenize_blocks, usable_cores
from toolkit.disk import sync_folder
from toolkit.errors import UserError, describe_os_error
from toolkit.failpoint import failpoint

logger = logging.getLogger(__name__)

MADE_BY = "toolkit prepare"
DOCUMENT_HASH, LAST_TOKENS = "document hash", "last tokens"  # how the validation split was chosen
JOURNAL_EVERY_SECONDS = 5.0  # most work that a kill can undo, but for one block [seconds]
BYTES_PER_WORKER = 4_000_000  # of the source, below which one more worker costs more time than it saves [bytes]
WORKERS_PER_CORE = 16  # beyond which they only take memory
PARTS_MEASURED = 8  # of the first block, for the estimate of the disk needed [parts]
FAIR_SHARE = 0.1  # of the source's bytes, from which on what they gave is a fair sample of the rest [0..1]

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
    these lines go to stderr, or to the log if there is to be no progress bar.

    Raises: UserError for settings that break a rule, for other settings or sources than those of what is in `out`, for
    text that cannot be read and for a full disk; OSError where a file cannot be read or written.
    """
    _check_settings(shard_tokens=shard_tokens, val_fraction=val_fraction, workers=workers)
    report = report or _reporter(progress)
    out, names = Path(out), [str(path) for path in paths]
    settings: dict[str, Any] = {"shard_tokens": shard_tokens, "val_fraction": val_fraction}
    if (out / MANIFEST_FILE).exists():
        return _already_done(out, names, tokenizer=tokenizer, text_column=text_column, settings=settings)
    source = open_source(names, text_column=text_column, revision=_pinned_revision(names, Journal.load(out)))
    with started(workers or min(usable_cores(), 1 + source.size // BYTES_PER_WORKER)) as pool:
        vocabulary = load_tokenizer(tokenizer)
        refuse_foreign_tokenizer_file(out, vocabulary)
        job = Job(tokenizer=tokenizer, tokenizer_sha256=vocabulary.sha256, val_below=round(val_fraction * 2**64))
        if pool is not None:
            pool.begin(job)
        journals.make_folder(out)
        with journals.locked(out):
            if (out / MANIFEST_FILE).exists():  # finished by another process meanwhile
                return _already_done(out, names, tokenizer=tokenizer, text_column=text_column, settings=settings)
            settings |= {"tokenizer": asdict(_tokenizer_info(vocabulary)), "source": source.description()}
            try:
                journal = _continue_or_begin(out, settings, source, report)
                run = _Run(
                    out=out, source=source, tokenizer=vocabulary, job=job, journal=journal, shard_tokens=shard_tokens
                )
                run.read_all(pool=pool, progress=progress, report=report)
                manifest = run.finish(val_fraction=val_fraction)
            except OSError as error:
                raise _storage_error(error, out) from None
    return PrepareResult(manifest=manifest, lines=_summary(out, manifest, source), already_done=False)


def _continue_or_begin(out: Path, settings: dict[str, Any], source: Source, report: Report) -> Journal:
    unfinished = Journal.load(out)
    nothing_to_lose = unfinished is not None and not unfinished.tokens and not any(out.glob("*.bin"))
    if unfinished is None or nothing_to_lose:
        return journals.begin(out, settings, source)
    journals.refuse_changed_files(out, source, finished=False)
    journals.refuse_other_settings(out, unfinished.settings, settings, state="an unfinished")
    share = unfinished.source_bytes / max(1, source.size)
    report(f"continuing in {out}: {unfinished.tokens:,} tokens are done, {share:.0%} of the source")
    return unfinished


def _pinned_revision(names: Sequence[str], unfinished: Journal | None) -> str | None:
    """The commit that unfinished work on the same dataset began with, so that going on reads the same files."""
    recorded = unfinished.settings["source"] if unfinished is not None else {}
    return recorded.get("revision") if names == [f"{HUB_PREFIX}{recorded.get('hub')}"] else None


def _check_settings(*, shard_tokens: int, val_fraction: float, workers: int | None) -> None:
    problems = []
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        problems.append(f"shard_tokens={shard_tokens} must be from 1 to {MAX_SHARD_TOKENS}")
    if not 0 < val_fraction < 1:
        problems.append(f"val_fraction={val_fraction} must be above 0 and below 1, for example 0.005")
    if workers is not None and workers < 1:
        problems.append(f"workers={workers} must be at least 1; leave it out for one per core")
    most = WORKERS_PER_CORE * usable_cores()
    if workers is not None and workers > most:
        problems.append(
            f"workers={workers} is more than {most}, {WORKERS_PER_CORE} for each core; leave it out for one per core"
        )
    if problems:
        raise UserError("; ".join(problems))


def _reporter(progress: bool) -> Report:
    def write(line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    return write if progress else logger.info


def _tokenizer_info(tokenizer: Tokenizer) -> TokenizerInfo:
    return TokenizerInfo(
        name=tokenizer.name, vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id, sha256=tokenizer.sha256
    )


def _already_done(
    out: Path, names: Sequence[str], *, tokenizer: str, text_column: str, settings: dict[str, Any]
) -> PrepareResult:
    """The finished set in `out`, if it is what these settings would make; a commit on the Hub is not asked for again."""
    manifest = read_manifest(out)
    recorded = _recorded_settings(out, manifest)
    if names == [f"{HUB_PREFIX}{recorded['source'].get('hub')}"]:
        description = recorded["source"] | {"text_column": text_column}
    else:
        source = open_source(names, text_column=text_column)
        description = source.description()
        journals.refuse_changed_files(out, source, finished=True)
    settings = settings | {"tokenizer": asdict(_tokenizer_info(load_tokenizer(tokenizer))), "source": description}
    journals.refuse_other_settings(out, recorded, settings, state="a finished")
    lines = [f"{out} is finished already and its source is unchanged: nothing to do", *_summary(out, manifest)]
    return PrepareResult(manifest=manifest, lines=lines, already_done=True)


def _recorded_settings(out: Path, manifest: Manifest) -> dict[str, Any]:
    recorded = dict(manifest.source)
    if recorded.pop("made_by", None) != MADE_BY:
        raise UserError(f"{out} holds a data set that `toolkit prepare` did not make; use another --out")
    del recorded["split_rule"], recorded["counts"]
    return {
        "shard_tokens": recorded.pop("shard_tokens"),
        "val_fraction": recorded.pop("val_fraction"),
        "tokenizer": asdict(manifest.tokenizer),
        "source": recorded,
    }


# --- the work --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class _Run:
    """One run of `prepare` on one folder."""

    out: Path
    source: Source
    tokenizer: Tokenizer
    job: Job
    journal: Journal
    shard_tokens: int

    def read_all(self, *, pool: Pool | None, progress: bool, report: Report) -> None:
        """Tokenizes what is left of the source into shards."""
        journal = self.journal
        if journal.read_all:
            return
        blocks = self.source.blocks(journal.position, find_cut=self.tokenizer.exact_cut, notice=report)
        writers = {split: self._writer(split) for split in SPLITS}
        done_before, started = journal.tokens, time.monotonic()
        saved_at = started
        with tqdm(
            total=self.source.size,
            initial=journal.source_bytes,
            unit="B",
            unit_scale=True,
            desc="prepare",
            disable=None if progress else True,
        ) as bar:
            results = tokenize_blocks(blocks, tokenizer=self.tokenizer, job=self.job, pool=pool)
            for number, (block, result) in enumerate(results):
                parts = self._check_disk(block, result, report) if number == 0 else result.parts
                shard_done = [writers[part.split].append(part) for part in parts]
                journal.counts.add(result.counts)
                journal.position = block.end
                bar.update(block.source_bytes - journal.source_bytes)
                journal.source_bytes = block.source_bytes
                failpoint("prepare.after-block")
                now = time.monotonic()
                if any(shard_done) or now - saved_at > JOURNAL_EVERY_SECONDS:
                    self._save(writers)
                    saved_at = now
                tokens = sum(writer.tokens for writer in writers.values()) - done_before
                bar.set_postfix_str(f"{tokens / max(now - started, 1e-9) / 1e6:.2f}M tokens/s", refresh=False)
        self._save(writers)
        failpoint("prepare.before-last-shards")
        for writer in writers.values():
            writer.close()
        journal.read_all = True
        self._save(writers)

    def _writer(self, split: Split) -> SplitWriter:
        return SplitWriter(
            out=self.out,
            split=split,
            tokenizer=self.tokenizer,
            shard_tokens=self.shard_tokens,
            finished=self.journal.shards[split],
            open_shard=self.journal.open_shards.get(split),
        )

    def _save(self, writers: dict[Split, SplitWriter]) -> None:
        """Brings everything to disk, then says so in the journal."""
        synced = {split: writer.sync() for split, writer in writers.items()}
        self.journal.open_shards = {split: shard for split, shard in synced.items() if shard is not None}
        self.journal.save(self.out)
        for writer in writers.values():
            writer.forget_previous()

    def _check_disk(self, first: Block, result: Result, report: Report) -> Iterator[Part]:
        """The parts of the first block, after an estimate of the disk that everything will take.

        The estimate is from what earlier starts did, or else from the first block. It refuses only if what it is from is a
        fair sample: a compressed file may hold any amount of text, and says nothing of the files after it.

        Raises: UserError if the disk has clearly less.
        """
        journal = self.journal
        parts = list(itertools.islice(result.parts, PARTS_MEASURED))
        tokens: float = journal.tokens or sum(len(part.ids) for part in parts)
        read: float = journal.source_bytes if journal.tokens else self._bytes_of(parts, first)
        as_they_are = not journal.tokens and not any(
            file.compression for file in self.source.files[journal.position.file : max(1, first.end.file)]
        )
        fair = read >= FAIR_SHARE * self.source.size or (as_they_are and read >= reading.BLOCK_BYTES // 4)
        tokens *= (self.source.size - journal.source_bytes) / max(1, read)
        needed = tokens * token_dtype(self.tokenizer.vocab_size).itemsize
        free = shutil.disk_usage(self.out).free
        report(f"about {_count(tokens)} tokens to go, {_size(needed)} on disk; {_size(free)} are free in {self.out}")
        if fair and needed * 0.8 > free:  # the estimate may be off by that much
            raise UserError(
                f"{self.out} needs about {_size(needed)} but its disk has {_size(free)} free; free some space or use an "
                "--out on a larger disk"
            )
        return itertools.chain(parts, result.parts)

    def _bytes_of(self, parts: Sequence[Part], block: Block) -> float:
        """Bytes of the source files that these first parts of a block stand for, about."""
        on_disk, measured = block.source_bytes - self.journal.source_bytes, sum(part.utf8_bytes for part in parts)
        if block.form == "stretch":  # all of it is text, and may be far more than what has been measured of it
            length: int = block.header["stop"] - block.header["start"]
            return on_disk * measured / length
        return measured if len(parts) == PARTS_MEASURED else on_disk

    def finish(self, *, val_fraction: float) -> Manifest:
        """Makes sure that both splits hold something, writes the manifest and drops the journal."""
        journal = self.journal
        rule = DOCUMENT_HASH
        if not journal.counts.documents:
            raise UserError(
                f"the source holds no text: {journal.counts.documents_read} documents read, all of them empty or skipped; "
                f"name another source, and delete {self.out}"
            )
        if journal.kept_tokens is not None or not all(journal.shards.values()):
            rule = LAST_TOKENS
            self._split_off_the_end(val_fraction)
        write_tokenizer_file(self.out, self.tokenizer)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            source={
                "made_by": MADE_BY,
                **journal.settings["source"],
                "shard_tokens": self.shard_tokens,
                "val_fraction": val_fraction,
                "split_rule": rule,
                "counts": journal.counts.to_dict(),
            },
            tokenizer=_tokenizer_info(self.tokenizer),
            splits={split: tuple(journal.shards[split]) for split in SPLITS},
        )
        for split, ending in itertools.product(SPLITS, ("tmp", "previous")):
            for stray in self.out.glob(f".{split}_{'[0-9]' * 6}.bin.{ending}"):
                stray.unlink()  # of a start that was killed
        failpoint("prepare.before-manifest")
        write_manifest(self.out, manifest)
        failpoint("prepare.after-manifest")
        (self.out / journals.STATE_FOLDER / journals.JOURNAL_FILE).unlink()
        return manifest

    def _split_off_the_end(self, val_fraction: float) -> None:
        """Makes the last tokens of the only split that holds any the validation split; safe to repeat after a kill."""
        journal = self.journal
        if not journal.shards["train"]:
            for index, info in enumerate(journal.shards["val"]):
                path = self.out / info.file
                if path.exists():
                    path.replace(self.out / shard_file_name("train", index))
                journal.shards["train"].append(dataclasses.replace(info, file=shard_file_name("train", index)))
            sync_folder(self.out)
            journal.shards["val"] = []
            journal.save(self.out)
        total = sum(info.tokens for info in journal.shards["train"])
        if journal.kept_tokens is None:
            if total < 2:
                raise UserError(f"the source gives only {total} tokens, too few for two splits; name more text")
            keep = total - min(total - 1, max(1, round(total * val_fraction)))
            journal.shards["val"] = self._copy(keep, total, "val")
            journal.kept_tokens = keep
            journal.save(self.out)
        failpoint("prepare.before-cutting-train")
        kept: list[ShardInfo] = []
        start = 0
        for info in journal.shards["train"]:
            if start >= journal.kept_tokens:
                (self.out / info.file).unlink(missing_ok=True)
            elif start + info.tokens > journal.kept_tokens:
                kept += self._copy(start, journal.kept_tokens, "train", first_index=len(kept))
            else:
                kept.append(info)
            start += info.tokens
        sync_folder(self.out)
        journal.shards["train"] = kept
        journal.save(self.out)

    def _copy(self, start: int, stop: int, split: Split, *, first_index: int = 0) -> list[ShardInfo]:
        """Shards of `split` with the train tokens from `start` to `stop`.

        Raises: UserError if a shard that holds them is not as it was when it was finished.
        """
        shards: list[ShardInfo] = []
        writer = SplitWriter(
            out=self.out,
            split=split,
            tokenizer=self.tokenizer,
            shard_tokens=self.shard_tokens,
            finished=shards,
            open_shard=None,
            first_index=first_index,
        )
        shard_start = 0
        for info in self.journal.shards["train"]:
            first, last = max(start - shard_start, 0), min(stop - shard_start, info.tokens)
            shard_start += info.tokens
            if first >= last:
                continue
            path = self.out / info.file
            # a kill may have come after what is kept of this shard took its name
            if split != "train" or path.stat().st_size != shard_bytes(last, writer.dtype):
                check_content(path, info)
            for ids in read_ids(path, writer.dtype, first, last):
                writer.append(writer.describe(ids))
        writer.close()
        return shards


def _storage_error(error: OSError, out: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            f"writing to {out} failed: {describe_os_error(error)}; nothing is damaged, the same command goes on from here"
        )
    return error


# --- what the user reads ---------------------------------------------------------------------------------------------


def _summary(out: Path, manifest: Manifest, source: Source | None = None) -> list[str]:
    """The totals: every document and byte read, and what became of it."""
    recorded = manifest.source
    counts = Counts(**recorded["counts"])
    lines = [
        f"read {recorded['files']:,} files, {recorded['file_bytes']:,} bytes, {counts.documents_read:,} documents"
        + (f"; ignored {source.ignored_files:,} files with other endings" if source and source.ignored_files else ""),
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
    if recorded["split_rule"] == LAST_TOKENS:
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
    if count >= 1e6:
        return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
    return f"{count:,.0f}"
