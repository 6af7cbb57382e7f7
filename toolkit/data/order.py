"""Which window is global sample i: pure arithmetic on (seed, i) and the shards' window counts; no files, no torch.

Per data set, an epoch visits every window once: shards are permuted, consecutive shards (in that order) form groups, and
windows are permuted inside a group, so that reading moves through the set group by group. In a mixture a fixed pattern
says which set gives sample i, and the set's own sequence goes on from its earlier samples.

Guarantees: the answer for sample i depends on (seed, i, group size, window counts, weights) alone, and takes O(log shards)
time after O(shards) for each epoch touched; nothing of the size of the windows is ever held. Does not: read or open
anything (`loader`).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit.errors import UserError

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

PERIOD = 100_000  # samples after which a mixture's pattern repeats; weights are realised in units of 1 / PERIOD
FEISTEL_ROUNDS = 4  # each updates both halves; Luby and Rackoff 1988 need four half rounds, we spend twice that
SHARDS_KEY, WINDOWS_KEY, MIXTURE_KEY = 1, 2, 3  # what a key is for, so that no two uses share their random bits
EPOCHS_KEPT = 4  # permutations of the shards that are remembered


def mix64(value: UInt64) -> UInt64:
    """A bijection of 64-bit integers that turns counters into random-looking bits. Source: Steele et al. 2014, splitmix64."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _key(*parts: int | UInt64) -> UInt64:
    """A 64-bit key for a tuple of integers or arrays; an array of at least one element, so that overflow stays silent."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = mix64(key ^ mix64(np.atleast_1d(np.asarray(part, dtype=np.uint64))))
    return key


def permute(index: UInt64, size: UInt64, key: UInt64) -> UInt64:
    """The place of `index` in a permutation of range(size) that `key` chooses, element by element.

    Why: a permutation that is computed, not stored. A Feistel network on pairs (index mod a, index div a) with a about
    sqrt(size); a * b exceeds size by less than a, so that walking on from a place outside the range is rare.
    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", method 3 with cycle walking.
    """
    a = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    b = (size + a - np.uint64(1)) // a
    result = _feistel(index, a, b, key)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = _feistel(result[outside], a[outside], b[outside], key[outside])
        outside = outside[result[outside] >= size[outside]]
    return result


def _feistel(index: UInt64, a: UInt64, b: UInt64, key: UInt64) -> UInt64:
    left, right = index % a, index // a
    for round_number in range(FEISTEL_ROUNDS):
        round_key = mix64(key + np.uint64(round_number))
        left = (left + (mix64(round_key ^ right) >> np.uint64(32))) % a
        right = (right + (mix64(~round_key ^ left) >> np.uint64(32))) % b
    return right * a + left


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """Where samples lie, one array element per sample; `group` counts the groups of a set on and on over the epochs."""

    set_index: Int64
    shard: Int64
    window: Int64
    epoch: Int64
    group: Int64


@dataclass(frozen=True, kw_only=True, slots=True)
class _Epoch:
    shards: Int64  # shard numbers in this epoch's order
    starts: Int64  # windows before each of them, and their total
    group_starts: Int64  # windows before each group, and their total


class SetOrder:
    """The endless sequence of windows of one data set: epoch after epoch, each window once per epoch.

    Raises: UserError if no shard holds a window.
    """

    def __init__(self, window_counts: npt.ArrayLike, *, seed: int, set_index: int, group: int) -> None:
        counts = np.asarray(window_counts, dtype=np.int64)
        self._shards = np.flatnonzero(counts)
        self._counts = counts[self._shards]
        self.windows = int(self._counts.sum())
        if not self.windows:
            raise UserError("no shard holds a window; shorten the sequence or prepare more text")
        self._group = group
        self.num_groups = -(-len(self._shards) // group)
        self._seed_key = _key(seed, set_index)
        self._epoch = functools.lru_cache(EPOCHS_KEPT)(self._permuted_shards)

    def _permuted_shards(self, epoch: int) -> _Epoch:
        keys = _key(self._seed_key, SHARDS_KEY, epoch, self._shards.astype(np.uint64))
        order = np.argsort(keys, kind="stable")
        starts = np.concatenate(([0], np.cumsum(self._counts[order])))
        group_starts = np.append(starts[:-1][:: self._group], starts[-1])
        return _Epoch(shards=self._shards[order], starts=starts, group_starts=group_starts)

    def locate(self, ordinal: Int64) -> tuple[Int64, Int64, Int64, Int64]:
        """(shard, window, epoch, group) of the set's own samples number `ordinal`."""
        epochs, rest = np.divmod(ordinal, self.windows)
        shard, window, group = np.empty_like(ordinal), np.empty_like(ordinal), np.empty_like(ordinal)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            shard[here], window[here], group[here] = self._locate_in_epoch(epoch, rest[here])
        return shard, window, epochs, epochs * self.num_groups + group

    def _locate_in_epoch(self, epoch: int, place: Int64) -> tuple[Int64, Int64, Int64]:
        order = self._epoch(epoch)
        group = np.searchsorted(order.group_starts, place, side="right") - 1
        start = order.group_starts[group]
        size = order.group_starts[group + 1] - start
        key = _key(self._seed_key, WINDOWS_KEY, epoch, group.astype(np.uint64))
        place = start + permute((place - start).astype(np.uint64), size.astype(np.uint64), key).astype(np.int64)
        position = np.searchsorted(order.starts, place, side="right") - 1
        return order.shards[position], place - order.starts[position], group

    def group_shards(self, group: int) -> list[int]:
        """The shards of a group, counted as in `Located.group`."""
        epoch, number = divmod(group, self.num_groups)
        shards: list[int] = self._epoch(epoch).shards[number * self._group : (number + 1) * self._group].tolist()
        return shards


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pattern:
    """Which set gives each of PERIOD consecutive samples: every set spread evenly, jittered by the seed."""

    quotas: Int64  # samples of each set in a period
    set_of: Int64  # (PERIOD,) set of each sample
    rank_of: Int64  # (PERIOD,) earlier samples of the same set within the period


def quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each set in a period of a mixture: the weights, rounded by largest remainder to sum to PERIOD.

    Raises: UserError if a weight is too small to get a sample at all.
    """
    total = math.fsum(weights)
    exact = [weight / total * PERIOD for weight in weights]
    result = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (result[index] - exact[index], index))
    for index in by_remainder[: PERIOD - sum(result)]:
        result[index] += 1
    for index, count in enumerate(result):
        if count == 0:
            raise UserError(
                f"weight {weights[index]:g} of data set {index + 1} is below 1/{PERIOD} of the sum {total:g}; "
                "give it more or leave the set out"
            )
    return tuple(result)


def _pattern(weights: Sequence[float], *, seed: int) -> _Pattern:
    # The k-th sample of a set falls at a random moment of the k-th of `quota` equal parts of the period. So before any
    # moment each set's count is within 1 of its share, and its count before sample i within the number of sets.
    counts = quotas(weights)
    moments, owners, ranks = [], [], []
    for index, quota in enumerate(counts):
        k = np.arange(quota, dtype=np.int64)
        jitter = (_key(seed, MIXTURE_KEY, index, k.astype(np.uint64)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        moments.append((k + jitter) / quota)
        owners.append(np.full(quota, index, dtype=np.int64))
        ranks.append(k)
    order = np.argsort(np.concatenate(moments), kind="stable")
    return _Pattern(
        quotas=np.asarray(counts, dtype=np.int64),
        set_of=np.concatenate(owners)[order],
        rank_of=np.concatenate(ranks)[order],
    )


class SampleOrder:
    """The order of all samples of a run: `locate` for any of them, counts and epochs per set for any position.

    `window_counts` holds one sequence per data set, of the windows in each of its shards; `weights` the sets' shares of a
    mixture; `group` the shards whose windows are permuted together.
    """

    def __init__(
        self,
        window_counts: Sequence[npt.ArrayLike],
        *,
        seed: int,
        group: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        assert len(window_counts) == len(weights or window_counts), "one weight per data set"
        assert group >= 1, group
        self.sets = tuple(
            SetOrder(counts, seed=seed, set_index=index, group=group) for index, counts in enumerate(window_counts)
        )
        shares = weights or [1.0] * len(window_counts)
        self._pattern = _pattern(shares, seed=seed) if len(window_counts) > 1 else None

    def locate(self, samples: npt.ArrayLike) -> Located:
        """Where these global samples lie."""
        samples = np.asarray(samples, dtype=np.int64)
        set_index, ordinal = self._set_and_ordinal(samples)
        shard, window, epoch, group = (np.empty_like(samples) for _ in range(4))
        for index, order in enumerate(self.sets):
            here = np.flatnonzero(set_index == index)
            if len(here):
                shard[here], window[here], epoch[here], group[here] = order.locate(ordinal[here])
        return Located(set_index=set_index, shard=shard, window=window, epoch=epoch, group=group)

    def _set_and_ordinal(self, samples: Int64) -> tuple[Int64, Int64]:
        if self._pattern is None:
            return np.zeros_like(samples), samples
        periods, place = np.divmod(samples, PERIOD)
        set_index = self._pattern.set_of[place]
        return set_index, periods * self._pattern.quotas[set_index] + self._pattern.rank_of[place]

    def counts(self, position: int) -> tuple[int, ...]:
        """How many of the samples before `position` each set has given."""
        if self._pattern is None:
            return (position,)
        periods, place = divmod(position, PERIOD)
        begun: npt.NDArray[Any] = np.bincount(self._pattern.set_of[:place], minlength=len(self.sets))
        return tuple((periods * self._pattern.quotas + begun).tolist())

    def epoch_of(self, position: int) -> tuple[int, ...]:
        """The epoch (from 0) of each set's next sample at `position`; above 0 the set is being repeated."""
        return tuple(count // order.windows for count, order in zip(self.counts(position), self.sets, strict=True))
