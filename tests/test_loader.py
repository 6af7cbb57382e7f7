"""Order, position and batches: the same samples for any number of processes, any micro-batch, any cut."""

import json
import logging
import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data_sets import write_set
from toolkit.data.loader import (
    Data,
    EndlessBatches,
    SampleOrder,
    open_data,
    sample_order,
    sample_windows,
    training_loader,
    validation_loader,
)
from toolkit.data.manifest import read_manifest
from toolkit.data.order import PERIOD, permute, quotas
from toolkit.errors import UserError
from toolkit.redact import redact

MakeSet = Callable[..., Path]
SETTINGS: dict[str, Any] = {"sequence_length": 16, "seed": 3, "shuffle_group_shards": 2}


@pytest.fixture
def make_set(tmp_path: Path) -> MakeSet:
    return lambda name, *arguments, **settings: write_set(tmp_path / name, *arguments, **settings)


def take(
    data: Data, count: int, *, position: int = 0, micro_batch_size: int = 4, **changes: Any
) -> list[dict[str, Any]]:
    loader = training_loader(data, position=position, micro_batch_size=micro_batch_size, **{**SETTINGS, **changes})
    return [batch for batch, _ in zip(loader, range(count), strict=False)]


def digests(batches: list[dict[str, Any]]) -> list[int]:
    return [digest for batch in batches for digest in batch["digest"].tolist()]


# ------------------------------------------------------------------------------------------------- what a window holds


def test_a_batch_is_the_windows_that_the_order_names(make_set: MakeSet) -> None:
    data = open_data(str(make_set("data", [300, 200, 100])))
    starts = dict(zip(("train_000000.bin", "train_000001.bin", "train_000002.bin"), (0, 300, 500), strict=True))
    windows = sample_windows(data, 0, 36, **SETTINGS)
    batches = take(data, 9)
    for place, window in enumerate(windows):
        batch, row = batches[place // 4], place % 4
        first = starts[window.shard] + 16 * window.window  # an id is its place in the set
        ids = np.arange(first, first + 17)
        assert batch["input_ids"][row].tolist() == ids[:-1].tolist()
        assert batch["targets"][row].tolist() == ids[1:].tolist()
        expected = xxhash.xxh3_64_intdigest(ids.astype("<u4").tobytes())
        assert batch["digest"][row].item() % 2**64 == expected
        assert window.digest % 2**64 == expected
        assert (window.sample, window.set, window.epoch) == (place, "data", 0)
    for name in ("input_ids", "targets", "digest"):
        assert batches[0][name].dtype == torch.int64
    assert batches[0]["input_ids"].shape == batches[0]["targets"].shape == (4, 16)
    assert batches[0]["input_ids"].is_contiguous()
    assert batches[0]["targets"].is_contiguous()


def test_uint32_ids_give_the_same_windows(make_set: MakeSet) -> None:
    small = open_data(str(make_set("small", [300, 200])))
    large = open_data(str(make_set("large", [300, 200], vocab_size=100_000)))
    assert digests(take(small, 8)) == digests(take(large, 8))


def test_each_epoch_visits_every_window_once_in_another_order(make_set: MakeSet) -> None:
    data = open_data(str(make_set("data", [300, 20, 200, 17, 16, 100])))
    per_epoch = 18 + 1 + 12 + 1 + 0 + 6
    windows = sample_windows(data, 0, 3 * per_epoch, **SETTINGS)
    epochs = [[(window.shard, window.window) for window in windows if window.epoch == epoch] for epoch in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == per_epoch
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert sorted(epochs[0]) == sorted(epochs[1])
    other = sample_windows(data, 0, per_epoch, **{**SETTINGS, "seed": 4})
    assert [(window.shard, window.window) for window in other] != epochs[0]


def test_reading_streams_through_groups_of_shards(make_set: MakeSet) -> None:
    data = open_data(str(make_set("data", [161] * 9)))
    windows = sample_windows(data, 0, 90, **SETTINGS)
    groups = [{window.shard for window in windows[first : first + 20]} for first in range(0, 90, 20)]
    assert [len(group) for group in groups] == [2, 2, 2, 2, 1]
    assert len(set.union(*groups)) == 9
    first_group = [(window.shard, window.window) for window in windows[:20]]
    assert first_group != sorted(first_group)
    assert len({shard for shard, _ in first_group[:6]}) == 2  # the two shards are mixed


def test_the_order_never_changes_between_versions() -> None:
    """A run that is resumed with another version must go on in the same order: these numbers may never change."""
    order = SampleOrder([[5, 0, 7, 3], [4, 9]], seed=1337, group=2, weights=[0.7, 0.3])
    found = order.locate(np.arange(200_000, 200_012))
    assert found.set_index.tolist() == GOLDEN["set"]
    assert found.shard.tolist() == GOLDEN["shard"]
    assert found.window.tolist() == GOLDEN["window"]
    assert found.epoch.tolist() == GOLDEN["epoch"]


GOLDEN = {
    "set": [1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1],
    "shard": [0, 2, 3, 1, 3, 2, 2, 0, 1, 0, 0, 1],
    "window": [2, 5, 1, 4, 2, 0, 2, 0, 0, 2, 3, 2],
    "epoch": [4615, 9333, 9333, 4615, 9333, 9333, 9333, 9333, 4615, 9333, 9333, 4615],
}


# ------------------------------------------------------------------------------------------------------ position, cuts


@pytest.mark.parametrize("position", [0, 1, 35, 37, 1023, 1024, 123_456_789_012])
def test_the_position_is_the_whole_state(make_set: MakeSet, position: int) -> None:
    data = open_data(str(make_set("data", [300, 200, 100])))
    windows = sample_windows(data, position, 40, **SETTINGS)
    for size in (1, 2, 5, 8):
        assert digests(take(data, 40 // size, position=position, micro_batch_size=size)) == [w.digest for w in windows]


def test_starting_a_loader_leaves_torch_s_random_numbers_alone(make_set: MakeSet) -> None:
    data = open_data(str(make_set("data", [300])))
    before = torch.get_rng_state()
    take(data, 2)
    assert torch.equal(torch.get_rng_state(), before)


shard_windows = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any)


@settings(max_examples=80, deadline=None)
@given(
    sets=st.lists(st.tuples(shard_windows, st.integers(1, 9)), min_size=1, max_size=3),
    seed=st.integers(0, 2**63 - 1),
    group=st.integers(1, 4),
    processes=st.integers(1, 4),
    micro_batch=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    steps=st.integers(1, 4),
    cut=st.integers(0, 4),
    far=st.sampled_from([0, 0, 99_990, 10**12 + 7]),
)
def test_the_union_over_processes_is_the_one_process_sequence(
    sets: list[tuple[list[int], int]],
    seed: int,
    group: int,
    processes: int,
    micro_batch: int,
    accumulation: int,
    steps: int,
    cut: int,
    far: int,
) -> None:
    """For any layout, any cut, any shard sizes and any mixture; with Accelerate's own way of handing out batches."""
    counts, weights = [counts for counts, _ in sets], [float(weight) for _, weight in sets]
    order = SampleOrder(counts, seed=seed, group=group, weights=weights)
    per_step = processes * micro_batch * accumulation
    first = far // per_step * per_step

    # The processes' micro-batches of every step, with a stop and a new start after `cut` steps.
    seen: list[int] = []
    for begin, end in ((0, min(cut, steps)), (min(cut, steps), steps)):
        shares = [
            iter(
                BatchSamplerShard(
                    EndlessBatches(position=first + begin * per_step, batch_size=micro_batch),  # type: ignore[arg-type]
                    num_processes=processes,
                    process_index=rank,
                    even_batches=False,
                )
            )
            for rank in range(processes)
        ]
        for step in range(begin, end):
            batches = [[next(share) for _ in range(accumulation)] for share in shares]
            ids = sorted(sample for per_process in batches for batch in per_process for sample in batch)
            assert ids == list(range(first + step * per_step, first + (step + 1) * per_step))
            seen += ids
    assert seen == list(range(first, first + steps * per_step))  # no gap, no repeat

    # And what the samples hold: from any cut the same, and within an epoch of a set every window once.
    whole = order.locate(np.arange(first, first + 120))
    again = SampleOrder(counts, seed=seed, group=group, weights=weights)
    tail = again.locate(np.arange(first + 40, first + 120))
    for name in ("set_index", "shard", "window", "epoch", "group"):
        assert np.array_equal(getattr(whole, name)[40:], getattr(tail, name)), name
    rows = list(zip(whole.set_index, whole.epoch, whole.shard, whole.window, strict=True))
    assert len(set(rows)) == len(rows)
    assert all(0 <= window < counts[s][shard] for s, _, shard, window in rows)
    given_away = np.subtract(order.counts(first + 120), order.counts(first))
    assert np.bincount(whole.set_index, minlength=len(sets)).tolist() == given_away.tolist()
    for index, per_shard in enumerate(counts):
        epochs = Counter(epoch for s, epoch, _, _ in rows if s == index)
        assert all(epochs[epoch] == sum(per_shard) for epoch in list(epochs)[1:-1])
        if epochs:
            assert order.epoch_of(first)[index] == min(epochs)


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation_of_any_size(size: int, key: int) -> None:
    def full(value: int) -> Any:
        return np.full(size, value, dtype=np.uint64)

    result = permute(np.arange(size, dtype=np.uint64), full(size), full(key))
    assert np.array_equal(np.sort(result), np.arange(size))


def test_accelerate_hands_out_the_one_process_sequence(make_set: MakeSet, tmp_path: Path) -> None:
    folder = make_set("data", [300, 200, 100])
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import json
            from accelerate import Accelerator
            from accelerate.utils import DataLoaderConfiguration
            from toolkit.data.loader import open_data, training_loader

            accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
            loader = training_loader(open_data({str(folder)!r}), sequence_length=16, seed=3, shuffle_group_shards=2,
                                     micro_batch_size=2, position=32)
            batches = iter(accelerator.prepare(loader))
            digests = [next(batches)["digest"].tolist() for _ in range(20)]
            with open({str(tmp_path)!r} + f"/{{accelerator.process_index}}.json", "w") as file:
                json.dump([accelerator.num_processes, digests], file)
            """
        )
    )
    command = ["accelerate", "launch", "--quiet", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command[1:], str(script)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    shares = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [count for count, _ in shares] == [2, 2]
    union = [digest for pair in zip(shares[0][1], shares[1][1], strict=True) for batch in pair for digest in batch]
    assert union == [window.digest for window in sample_windows(open_data(str(folder)), 32, 80, **SETTINGS)]


# ------------------------------------------------------------------------------------------------------------ mixtures


def test_a_mixture_keeps_its_shares_at_every_cut(make_set: MakeSet) -> None:
    sets = [make_set("a", [300]), make_set("b", [200, 200], start=5000), make_set("c", [900], start=9000)]
    data = open_data([f"{folder}={weight}" for folder, weight in zip(sets, (7, 2, 1), strict=True)])
    assert [data_set.weight for data_set in data.sets] == pytest.approx([0.7, 0.2, 0.1])
    order = sample_order(data, **SETTINGS)
    for position in (10, 999, 10_000, 250_000):
        counts = order.counts(position)
        assert sum(counts) == position
        for count, weight in zip(counts, (0.7, 0.2, 0.1), strict=True):
            assert abs(count - weight * position) <= 3
    found = order.locate(np.arange(10_000))
    assert np.bincount(found.set_index).tolist() == list(order.counts(10_000))
    assert order.counts(PERIOD) == (70_000, 20_000, 10_000)
    assert order.epoch_of(10_000) == (7000 // 18, 2000 // 24, 1000 // 56)
    # not in a fixed rhythm: another seed mixes otherwise
    other = SampleOrder([[18], [12, 12], [56]], seed=4, group=2, weights=[7, 2, 1]).locate(np.arange(10_000))
    assert not np.array_equal(other.set_index, found.set_index)


def test_a_set_goes_through_its_own_epochs_within_a_mixture(make_set: MakeSet) -> None:
    one, two = make_set("one", [300, 100]), make_set("two", [500], start=5000)
    mixed = sample_windows(open_data([f"{one}=0.6", f"{two}=0.4"]), 0, 60, **SETTINGS)
    alone = sample_windows(open_data(str(one)), 0, 60, **SETTINGS)
    own = [window.digest for window in mixed if window.set == "one"]
    assert own == [window.digest for window in alone[: len(own)]]
    assert max(window.epoch for window in mixed if window.set == "one") == 1
    assert max(window.epoch for window in mixed if window.set == "two") == 0


def test_the_fingerprint_of_a_mixture_covers_sets_and_shares(make_set: MakeSet) -> None:
    one, two = make_set("one", [300]), make_set("two", [300], start=1000)
    assert open_data(str(one)).fingerprint == open_data([f"{one}=3"]).fingerprint == read_manifest(one).fingerprint
    prints = [
        open_data(path).fingerprint
        for path in (
            [f"{one}=0.7", f"{two}=0.3"],
            [f"{one}=0.5", f"{two}=0.5"],
            [f"{two}=0.7", f"{one}=0.3"],
            [str(one)],
        )
    ]
    assert len(set(prints)) == 4
    assert open_data([f"{one}=7", f"{two}=3"]).fingerprint == prints[0]
    assert open_data([str(one), str(two)]).fingerprint == prints[1]


def test_a_folder_whose_name_ends_like_a_weight_can_be_given_with_one(make_set: MakeSet) -> None:
    folder = make_set("lr=0.5", [300])
    assert open_data([f"{folder}=1"]).sets[0].path == str(folder)
    assert open_data([str(folder)]).sets[0].path == str(folder)
    assert open_data([str(folder), str(make_set("date=2024", [300]))]).sets[1].weight == 0.5
    assert open_data([str(make_set("a=b", [300]))]).sets[0].name == "a=b"


def test_sets_of_one_name_are_told_apart(make_set: MakeSet) -> None:
    paths = [str(make_set(name, [300])) for name in ("a/x", "b/x", "c/x-2")]
    assert [data_set.name for data_set in open_data(paths).sets] == ["x-1", "x-2", "x-2-3"]
    assert open_data(paths[2] + "/").sets[0].name == "x-2"


def test_mixtures_that_make_no_sense_are_refused(make_set: MakeSet) -> None:
    one, two = make_set("one", [300]), make_set("two", [300])
    with pytest.raises(UserError, match=r"data.path gives no weight above 0 to .*two; give one to every set"):
        open_data([f"{one}=0.5", str(two)])
    with pytest.raises(UserError, match=r"gives no weight above 0 to .*two=-1"):
        open_data([f"{one}=0.5", f"{two}=-1"])
    with pytest.raises(UserError, match=r"gives no weight above 0 to .*one=0;"):
        open_data([f"{one}=0"])
    with pytest.raises(UserError, match=r"weight 1e-09 of data set 2 is below 1/100000 of the sum 1"):
        open_data([f"{one}=1", f"{two}=1e-9"])
    other = make_set("other", [300], vocab_size=257, tokenizer="bytes")
    with pytest.raises(UserError, match=r"made with tokenizer gpt2 \(50257 ids.* and .*other with bytes \(257 ids"):
        open_data([f"{one}=0.5", f"{other}=0.5"])
    with pytest.raises(UserError, match=r"data\.path is empty"):
        open_data([])


def test_quotas_sum_to_the_period() -> None:
    assert quotas([1, 1, 1]) == (33_334, 33_333, 33_333)
    assert quotas([0.7, 0.3]) == (70_000, 30_000)


# ----------------------------------------------------------------------------------------------------- sizes and errors


def test_shards_shorter_than_a_window_are_counted(make_set: MakeSet, caplog: pytest.LogCaptureFixture) -> None:
    data = open_data(str(make_set("data", [300, 16, 5])))
    with caplog.at_level(logging.WARNING):
        take(data, 1)
    assert "data: 2 of 3 training shards (21 tokens) are shorter than one window of 16 + 1 tokens" in caplog.text
    data = open_data(str(make_set("short", [16, 5])))
    with pytest.raises(
        UserError, match=r"no train shard holds a window of sequence_length \+ 1 = 17 tokens \(the longest has 16\)"
    ):
        take(data, 1)


def test_an_id_outside_the_vocabulary_stops_the_batch_that_holds_it(make_set: MakeSet) -> None:
    folder = make_set("data", [17 * 40], vocab_size=60_000)
    with (folder / "train_000000.bin").open("r+b") as file:
        file.seek(1024 + 2 * 100)
        file.write((60_000).to_bytes(2, "little"))
    data = open_data(str(folder))
    with pytest.raises(UserError, match=r"train_000000.bin: id 60000 at token 100 is not below vocab_size=60000"):
        take(data, 11)


def test_validation_is_the_first_windows_in_file_order(make_set: MakeSet) -> None:
    data_set = open_data(str(make_set("data", [100], val=[100, 10, 60]))).sets[0]
    batches = validation_loader(data_set, sequence_length=16, max_tokens=10_000, micro_batch_size=4)
    assert len(batches) == 3
    assert [len(batch["digest"]) for batch in batches] == [4, 4, 1]
    first_ids = [int(row[0]) for batch in batches for row in batch["input_ids"]]
    assert first_ids == [*range(100, 196, 16), 210, 226, 242]
    assert torch.equal(batches[2]["targets"], batches[-1]["targets"])
    assert int(batches[1]["targets"][0, -1]) == first_ids[4] + 16
    # any process can take every N-th batch
    assert [int(batch["input_ids"][0, 0]) for batch in batches[1::2]] == [first_ids[4]]
    limited = validation_loader(data_set, sequence_length=16, max_tokens=16 * 5 + 15, micro_batch_size=2)
    assert sum(len(batch["digest"]) for batch in limited) == 5
    with pytest.raises(IndexError):
        batches[3]


def test_validation_without_windows_is_refused(make_set: MakeSet) -> None:
    data_set = open_data(str(make_set("data", [100], val=[10]))).sets[0]
    single = open_data(str(make_set("single", [100], val=[1]))).sets[0]
    with pytest.raises(
        UserError, match=r"no val shard holds a window of sequence_length \+ 1 = 17 tokens \(the longest has 1\)"
    ):
        validation_loader(single, sequence_length=16, max_tokens=1000, micro_batch_size=4)
    with pytest.raises(
        UserError, match=r"evaluation.max_tokens=8 is less than one window of sequence_length=9; use at least 9"
    ):
        validation_loader(data_set, sequence_length=9, max_tokens=8, micro_batch_size=4)
    empty = open_data(str(make_set("none", [100], val=[]))).sets[0]
    with pytest.raises(UserError, match=r"has no val shard; a run needs a train and a val split"):
        validation_loader(empty, sequence_length=16, max_tokens=1000, micro_batch_size=4)


def test_a_small_validation_split_is_evaluated_in_shorter_windows(
    make_set: MakeSet, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("toolkit"), "propagate", True)
    data_set = open_data(str(make_set("data", [100], val=[10, 4]))).sets[0]
    batches = validation_loader(data_set, sequence_length=16, max_tokens=1000, micro_batch_size=4)
    assert len(batches) == 1
    assert batches[0]["input_ids"].tolist() == [list(range(100, 109))]
    assert batches[0]["targets"].tolist() == [list(range(101, 110))]
    assert (
        "the longest validation shard has 10 tokens, less than a window of 16 + 1; evaluating windows of 9"
        in caplog.text
    )


def test_a_100_billion_token_set_opens_and_seeks_at_once(tmp_path: Path) -> None:
    """1,000 sparse shards of 100 million tokens: under 1 second and 200 MB beyond the imports, at any position."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import json, os, resource, sys, time
            from pathlib import Path
            from toolkit.data.loader import open_data, training_loader
            from toolkit.data.shards import (
                Manifest, ShardInfo, TokenizerInfo, shard_bytes, shard_file_name, shard_header, token_dtype, write_manifest
            )

            folder, tokens, dtype = Path({str(tmp_path / "huge")!r}), 100_000_000, token_dtype(50257)
            folder.mkdir()
            splits = {{"train": [], "val": []}}
            for index in range(1000):
                path = folder / shard_file_name("train", index)
                path.write_bytes(shard_header(tokens, dtype))
                os.truncate(path, shard_bytes(tokens, dtype))
                splits["train"].append(ShardInfo(file=path.name, tokens=tokens, documents=1, utf8_bytes=1,
                                                 sha256="0" * 64, largest_id=50256))
            write_manifest(folder, Manifest(schema_version=1, source={{}}, splits=splits,
                tokenizer=TokenizerInfo(name="gpt2", vocab_size=50257, eot_id=50256, sha256="0" * 64)))

            def peak():
                return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

            # processor time: it is the time taken on an idle machine, and other work on this one does not count
            before, start = peak(), time.process_time()
            data = open_data(str(folder))
            opened = time.process_time() - start
            seeks = []
            for position in (0, 50_000_000, 97_600_000, 10**12):
                start = time.process_time()
                loader = training_loader(data, sequence_length=1024, micro_batch_size=8, seed=1, position=position,
                                         shuffle_group_shards=8)
                assert next(iter(loader))["input_ids"].shape == (8, 1024)
                seeks.append(time.process_time() - start)
            print(json.dumps({{"open": opened, "seek": max(seeks), "mebibytes": peak() - before}}))
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True, timeout=120)
    measured = json.loads(done.stdout)
    assert measured["open"] + measured["seek"] < 1, measured
    assert measured["mebibytes"] < 200, measured


def test_a_url_whose_password_a_recipe_left_out_is_refused_with_the_reason() -> None:
    with pytest.raises(
        UserError, match=r"https://\[redacted\]@host/set comes from a recipe, which keeps no passwords; .*--data\.path"
    ):
        open_data([redact("https://user:hunter2@host/set=0.5"), "https://host/other=0.5"])
