"""Shards -> batches: opens data sets, mixes them, and serves the windows of any sample in the order of `SampleOrder`.

With T = sequence length, window k of a shard is ids [kT, kT + T]: T inputs, and the targets shifted by one. Step s of a run
uses global samples [sG, (s+1)G); micro-batches and processes only partition that range, so the loader's whole state is
one integer, the position. The loader is a plain torch DataLoader over a map-style dataset with an endless batch sampler
that starts at the position; `accelerator.prepare` then hands process r every N-th micro-batch.

Guarantees: what sample i holds is a pure function of (seed, i) and the data; every id is below the vocabulary size. Does
not: move anything to a device, or know processes (`training.trainer`).
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, Dataset, Sampler

from toolkit.data.manifest import Manifest, Split, TokenizerInfo, is_url, own_tokenizer_file, read_manifest, safe_url
from toolkit.data.order import Int64, SampleOrder, quotas
from toolkit.data.shards import Ids, Shard, open_shards
from toolkit.errors import UserError
from toolkit.redact import REDACTED

if TYPE_CHECKING:
    from toolkit.data.remote import Fetcher, RemoteSet

__all__ = ["Data", "DataSet", "SampleOrder", "open_data", "sample_windows", "training_loader", "validation_loader"]

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]

BLOCK_SAMPLES = 1024  # consecutive samples located at one time; amortises numpy's fixed costs


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """One prepared set, opened."""

    name: str  # the last part of its path, unique within a mixture
    path: str  # as given, without its weight
    weight: float  # share of the samples, over all sets 1
    manifest: Manifest
    shards: Mapping[Split, Sequence[Shard]]
    tokenizer_file: Path | None  # vocabulary of a tokenizer of one's own
    remote: "RemoteSet | None" = None  # what fetches the shards of a set behind a URL

    @property
    def fingerprint(self) -> str:
        """sha256 of the canonical manifest."""
        return self.manifest.fingerprint


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What a run reads: one set or a mixture, all of one tokenizer."""

    sets: tuple[DataSet, ...]

    @property
    def fingerprint(self) -> str:
        """That of a single set; of a mixture, the sha256 of the sets' fingerprints and realised shares in order."""
        if len(self.sets) == 1:
            return self.sets[0].fingerprint
        shares = quotas([data_set.weight for data_set in self.sets])
        parts = [[data_set.fingerprint, share] for data_set, share in zip(self.sets, shares, strict=True)]
        return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()

    @property
    def tokenizer_info(self) -> TokenizerInfo:
        """The tokenizer that made the ids of every set."""
        return self.sets[0].manifest.tokenizer

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return self.tokenizer_info.vocab_size

    @property
    def eot_id(self) -> int:
        """The id that starts a document."""
        return self.tokenizer_info.eot_id


def parse_weight(path: str) -> tuple[str, float | None]:
    """("DIR", 0.7) for "DIR=0.7"; (path, None) where no number above 0 stands behind the last "=".

    Nor is it a weight where it belongs to the name: in that of a folder that exists, or as the value of a URL's query.
    """
    folder, separator, number = path.rpartition("=")
    if is_url(path):
        _, has_query, query = folder.partition("?")
        if has_query and "=" not in query.rpartition("&")[2]:
            return path, None
    elif Path(path).is_dir():
        return path, None
    try:
        weight = float(number)
    except ValueError:
        return path, None
    if not separator or not folder or not 0 < weight < math.inf:
        return path, None
    return folder, weight


def _names_a_number(path: str) -> bool:
    """True for "DIR=0", which is no weight and hardly a name."""
    with contextlib.suppress(ValueError):
        float(path.rpartition("=")[2])
        return "=" in path and not is_url(path) and not Path(path).exists()
    return False


def open_data(path: Sequence[str] | str, *, cache_dir: str | None = None, cache_gib: float = 4.0) -> Data:
    """The data sets at these paths, opened and checked: folders made by `toolkit prepare`, or fsspec URLs of such folders.

    Several are mixed by weight, "DIR=0.7"; without weights, in equal parts. Checks manifests, sizes and headers; reads no ids.

    Raises: UserError for a missing or damaged set, for weights on some sets only, for sets of different tokenizers.
    """
    parsed = [parse_weight(item) for item in ([path] if isinstance(path, str) else path)]
    unweighted = [folder for folder, weight in parsed if weight is None]
    if not parsed:
        raise UserError("data.path is empty; name a folder made by `toolkit prepare`")
    if censored := [folder for folder, _ in parsed if is_url(folder) and REDACTED in folder]:
        raise UserError(
            f"{', '.join(censored)} comes from a recipe, which keeps no passwords; give the URL itself: --data.path URL"
        )
    if any(_names_a_number(folder) for folder in unweighted) or 0 < len(unweighted) < len(parsed):
        raise UserError(
            f"data.path gives no weight above 0 to {', '.join(unweighted)}; give one to every set (DIR=0.7) or none"
        )
    total = math.fsum(weight or 1.0 for _, weight in parsed)
    names = _unique_names([folder for folder, _ in parsed])
    fetcher = None
    if any(is_url(folder) for folder, _ in parsed):
        from toolkit.data.remote import new_fetcher  # a local run needs none of it

        fetcher = new_fetcher(cache_dir=cache_dir, cache_gib=cache_gib)
    data = Data(
        sets=tuple(
            _open_set(folder, name=name, weight=(weight or 1.0) / total, fetcher=fetcher)
            for name, (folder, weight) in zip(names, parsed, strict=True)
        )
    )
    for data_set in data.sets[1:]:
        if data_set.manifest.tokenizer != data.tokenizer_info:
            raise UserError(
                f"{data.sets[0].path} was made with tokenizer {_describe(data.tokenizer_info)} and {data_set.path} with "
                f"{_describe(data_set.manifest.tokenizer)}; sets that are mixed need the same, prepare one of them again"
            )
    if len(data.sets) > 1:
        quotas([data_set.weight for data_set in data.sets])
    return data


def _describe(tokenizer: TokenizerInfo) -> str:
    return f"{tokenizer.name} ({tokenizer.vocab_size} ids, sha256 {tokenizer.sha256[:12]})"


def _unique_names(paths: Sequence[str]) -> list[str]:
    names = [(safe_url(path) if is_url(path) else path).rstrip("/").rpartition("/")[2] or path for path in paths]
    if len(set(names)) < len(names):
        return [f"{name}-{number}" for number, name in enumerate(names, start=1)]
    return names


def _open_set(path: str, *, name: str, weight: float, fetcher: "Fetcher | None") -> DataSet:
    if is_url(path):
        from toolkit.data.remote import open_remote

        assert fetcher is not None
        remote = open_remote(path, name=name, fetcher=fetcher)
        return DataSet(
            name=name,
            path=remote.where,
            weight=weight,
            manifest=remote.manifest,
            shards=remote.shards,
            tokenizer_file=remote.tokenizer_file,
            remote=remote,
        )
    folder = Path(path)
    manifest = read_manifest(folder)
    return DataSet(
        name=name,
        path=path,
        weight=weight,
        manifest=manifest,
        shards={split: open_shards(folder, split, manifest=manifest) for split in manifest.splits},
        tokenizer_file=own_tokenizer_file(folder, manifest),
    )


def window_counts(data_set: DataSet, split: Split, *, sequence_length: int) -> Int64:
    """Windows in each shard of a split.

    Raises: UserError if there are none at all.
    """
    tokens = np.asarray([shard.info.tokens for shard in data_set.shards[split]], dtype=np.int64)
    counts: Int64 = (tokens - 1) // sequence_length
    if not counts.any():
        if not len(tokens):
            raise UserError(
                f"{data_set.path} has no {split} shard; a run needs a train and a val split, add a shard to it"
            )
        longest = f"the longest has {tokens.max()}"
        raise UserError(
            f"{data_set.path}: no {split} shard holds a window of sequence_length + 1 = {sequence_length + 1} tokens "
            f"({longest}); lower --data.sequence-length or prepare more text"
        )
    return counts


def sample_order(data: Data, *, sequence_length: int, seed: int, shuffle_group_shards: int) -> SampleOrder:
    """The order of the training windows of these data sets."""
    return SampleOrder(
        [window_counts(data_set, "train", sequence_length=sequence_length) for data_set in data.sets],
        seed=seed,
        group=shuffle_group_shards,
        weights=[data_set.weight for data_set in data.sets],
    )


class WindowReader:
    """Reads windows into batches, each id checked against the vocabulary."""

    def __init__(self, manifest: Manifest, *, sequence_length: int) -> None:
        self._dtype = manifest.dtype
        self._vocab_size = manifest.tokenizer.vocab_size
        self._length = sequence_length

    def read(self, windows: Sequence[tuple[Shard, int]]) -> Batch:
        """The batch of these (shard, window index) pairs.

        Shapes: input_ids, targets (B, T) int64; digest (B,) int64, xxh3_64 of the window's T + 1 ids as little-endian
        uint32, as a signed number.
        Raises: UserError if a shard is shorter than it was, or holds an id outside the vocabulary.
        """
        length = self._length
        ids: Ids = np.empty((len(windows), length + 1), dtype=self._dtype)  # (B, T + 1)
        for row, (shard, window) in zip(ids, windows, strict=True):
            shard.read_into(row, window * length)
        if int(ids.max()) >= self._vocab_size:
            for row, (shard, window) in zip(ids, windows, strict=True):
                shard.check(row, window * length)
        wide = ids.astype("<u4", copy=False)
        digests = np.array([xxhash.xxh3_64_intdigest(row.data) for row in wide], dtype=np.uint64)
        return {
            "input_ids": torch.from_numpy(ids[:, :-1].astype(np.int64)),  # (B, T)
            "targets": torch.from_numpy(ids[:, 1:].astype(np.int64)),  # (B, T)
            "digest": torch.from_numpy(digests.view(np.int64)),  # (B,)
        }


def _locate_block(order: SampleOrder, block: int) -> list[list[int]]:
    """[set, shard, window, group] of each sample of a block."""
    found = order.locate(np.arange(block * BLOCK_SAMPLES, (block + 1) * BLOCK_SAMPLES))
    rows: list[list[int]] = np.stack([found.set_index, found.shard, found.window, found.group], axis=1).tolist()
    return rows


class TrainingWindows(Dataset[Batch]):
    """Global sample -> window: the map-style dataset behind the training loader."""

    def __init__(self, data: Data, order: SampleOrder, *, sequence_length: int) -> None:
        self._data = data
        self._order = order
        self._reader = WindowReader(data.sets[0].manifest, sequence_length=sequence_length)
        self._block = functools.lru_cache(2)(functools.partial(_locate_block, order))  # a batch may lie across two
        self._groups = [(-1, -1)] * len(data.sets)  # first and last group that was asked for, per set

    def __getitem__(self, sample: int) -> Batch:
        return self.__getitems__([sample])

    def __getitems__(self, samples: Sequence[int]) -> Batch:
        """The batch of these samples."""
        located = [self._block(sample // BLOCK_SAMPLES)[sample % BLOCK_SAMPLES] for sample in samples]
        self._fetch_ahead(located)
        return self._reader.read(
            [(self._data.sets[index].shards["train"][shard], window) for index, shard, window, _ in located]
        )

    def _fetch_ahead(self, located: Sequence[Sequence[int]]) -> None:
        """Tells remote sets which shards this batch needs and which come next, whenever a set enters another group."""
        for index, data_set in enumerate(self._data.sets):
            if data_set.remote is None:
                continue
            groups = [row[3] for row in located if row[0] == index]
            if not groups or (min(groups), max(groups)) == self._groups[index]:
                continue
            order, first, last = self._order.sets[index], min(groups), max(groups)
            self._groups[index] = (first, last)
            now = [shard for group in range(first, last + 1) for shard in order.group_shards(group)]
            data_set.remote.need("train", now, order.group_shards(last + 1))


class EndlessBatches(Sampler[list[int]]):
    """Micro-batches of consecutive samples from a position on, without end."""

    drop_last = True  # Accelerate then keeps no batch back for filling up a last one; there is none
    batch_size: int

    def __init__(self, *, position: int, batch_size: int) -> None:
        self._position = position
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        first = self._position
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.batch_size


def _as_it_is(batch: Any) -> Any:
    return batch


def training_loader(
    data: Data,
    *,
    sequence_length: int,
    micro_batch_size: int,
    seed: int,
    position: int,
    shuffle_group_shards: int,
    pin_memory: bool = False,
) -> "DataLoader[Batch]":
    """An endless loader of micro-batches, the first of which starts at global sample `position`.

    Shapes: input_ids, targets (B, T) int64; digest (B,) int64.
    Raises: UserError if a set holds no window.
    """
    order = sample_order(data, sequence_length=sequence_length, seed=seed, shuffle_group_shards=shuffle_group_shards)
    _report_unused(data, sequence_length=sequence_length)
    _check_room(
        data,
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        shuffle_group_shards=shuffle_group_shards,
    )
    return DataLoader(
        TrainingWindows(data, order, sequence_length=sequence_length),
        batch_sampler=EndlessBatches(position=position, batch_size=micro_batch_size),
        collate_fn=_as_it_is,
        num_workers=0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # torch draws a seed for each iteration; without this, from the global generator
    )


def _report_unused(data: Data, *, sequence_length: int) -> None:
    for data_set in data.sets:
        counts = window_counts(data_set, "train", sequence_length=sequence_length)
        short = [
            shard.info.tokens
            for shard, count in zip(data_set.shards["train"], counts.tolist(), strict=True)
            if not count
        ]
        if short:
            logger.warning(
                "%s: %d of %d training shards (%d tokens) are shorter than one window of %d + 1 tokens and are not used",
                data_set.path, len(short), len(counts), sum(short), sequence_length,
            )  # fmt: skip


def _check_room(data: Data, *, sequence_length: int, micro_batch_size: int, shuffle_group_shards: int) -> None:
    remote: list[tuple[RemoteSet, int]] = []
    for data_set in data.sets:
        if data_set.remote is not None:
            counts = window_counts(data_set, "train", sequence_length=sequence_length)
            remote.append((data_set.remote, _most_shards_inside(counts, micro_batch_size)))
    if not remote:
        return

    def needed(group: int) -> int:
        return sum(one.room_needed(shuffle_group_shards=group, shards_between=between) for one, between in remote)

    limit, room = remote[0][0].fetcher.limit_bytes, needed(shuffle_group_shards)
    if room > limit:
        fitting = [group for group in range(1, shuffle_group_shards) if needed(group) <= limit]
        between = sum(count for _, count in remote)
        raise UserError(
            f"data.cache_gib={limit / 2**30:g} is too small: this group of data.shuffle_group_shards={shuffle_group_shards} "
            "shards, the next one"
            + (
                f", {between} shards that a micro-batch of {micro_batch_size} windows may cover in between"
                * bool(between)
            )
            + f" and the validation shards take {room / 2**30:.3g} GiB; use --data.cache-gib "
            f"{math.ceil(room / 2**30 * 10) / 10:g}"
            + (f" or --data.shuffle-group-shards {fitting[-1]}" if fitting else "")
        )


def _most_shards_inside(counts: Int64, micro_batch_size: int) -> int:
    """How many whole shards a micro-batch may hold that begins before them and ends behind them."""
    return int(np.searchsorted(np.cumsum(np.sort(counts[counts > 0])), micro_batch_size - 2, side="right"))


class ValidationBatches(Sequence[Batch]):
    """The first windows of a set's validation split in file order, in batches; batch k is a pure function of k."""

    def __init__(self, data_set: DataSet, *, sequence_length: int, max_tokens: int, micro_batch_size: int) -> None:
        longest = max((shard.info.tokens for shard in data_set.shards["val"]), default=0)
        if 1 < longest <= sequence_length:  # a small text leaves few validation tokens: all of them are used
            logger.warning(
                "%s: the longest validation shard has %d tokens, less than a window of %d + 1; evaluating windows of %d",
                data_set.path, longest, sequence_length, longest - 1,
            )  # fmt: skip
            sequence_length = longest - 1
        counts = window_counts(data_set, "val", sequence_length=sequence_length)
        self._data_set = data_set
        self._starts = np.concatenate(([0], np.cumsum(counts)))
        self.windows = min(int(self._starts[-1]), max_tokens // sequence_length)
        if not self.windows:
            raise UserError(
                f"evaluation.max_tokens={max_tokens} is less than one window of sequence_length={sequence_length}; "
                f"use at least {sequence_length}"
            )
        self._size = micro_batch_size
        self._needed = [-1]
        self._fetch_ahead([])
        self._reader = WindowReader(data_set.manifest, sequence_length=sequence_length)

    def __len__(self) -> int:
        return -(-self.windows // self._size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        first = index % len(self) * self._size
        windows = np.arange(first, min(first + self._size, self.windows))
        numbers = np.searchsorted(self._starts, windows, side="right") - 1
        places = windows - self._starts[numbers]
        self._fetch_ahead(sorted(set(numbers.tolist())))
        shards = self._data_set.shards["val"]
        return self._reader.read([(shards[n], p) for n, p in zip(numbers.tolist(), places.tolist(), strict=True)])

    def _fetch_ahead(self, needed: list[int]) -> None:
        """Tells a remote set which shards a batch needs, and that the one behind them comes next."""
        remote, last = self._data_set.remote, int(np.searchsorted(self._starts, self.windows, side="left"))
        if remote is not None and needed != self._needed:
            self._needed = needed
            after = needed[-1] + 1 if needed else 0
            remote.need("val", needed, [after] if after < last else [])


def validation_loader(
    data_set: DataSet, *, sequence_length: int, max_tokens: int, micro_batch_size: int
) -> ValidationBatches:
    """The validation batches of a set, covering at most `max_tokens` targets; the last may be shorter.

    A split without a whole window is evaluated in shorter ones, as long as its longest shard allows, and that is said.
    Raises: UserError if there are no two tokens in any validation shard, or no room for one in `max_tokens`.
    """
    return ValidationBatches(
        data_set, sequence_length=sequence_length, max_tokens=max_tokens, micro_batch_size=micro_batch_size
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleWindow:
    """What a sample was: for the audit of a run."""

    sample: int
    set: str
    shard: str
    window: int
    epoch: int
    digest: int


def sample_windows(
    data: Data, first: int, count: int, *, sequence_length: int, seed: int, shuffle_group_shards: int
) -> list[SampleWindow]:
    """Samples [first, first + count) of a run with these settings, with the digest of the ids that each one holds."""
    order = sample_order(data, sequence_length=sequence_length, seed=seed, shuffle_group_shards=shuffle_group_shards)
    found = order.locate(np.arange(first, first + count))
    windows = TrainingWindows(data, order, sequence_length=sequence_length)
    result = []
    for place, sample in enumerate(range(first, first + count)):
        data_set = data.sets[int(found.set_index[place])]
        result.append(
            SampleWindow(
                sample=sample,
                set=data_set.name,
                shard=data_set.shards["train"][int(found.shard[place])].info.file,
                window=int(found.window[place]),
                epoch=int(found.epoch[place]),
                digest=int(windows[sample]["digest"][0]),
            )
        )
    return result
