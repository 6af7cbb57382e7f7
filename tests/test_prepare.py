"""prepare: the tokens of plain tiktoken in the order of the documents, the same bytes always, whatever happens on the way."""

import contextlib
import errno
import fcntl
import gzip
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tests.support import ROOT, TOOLKIT, environment
from toolkit import failpoint
from toolkit.data import journal, reading, sources
from toolkit.data import prepare as module
from toolkit.data.manifest import Manifest, Split, read_manifest
from toolkit.data.prepare import PrepareResult
from toolkit.data.shards import verify_data
from toolkit.data.tokenizer import _byte_characters, load_tokenizer, train_tokenizer
from toolkit.errors import UserError

SPLITS: tuple[Split, Split] = ("train", "val")


def prepare(paths: Any, out: Path, **options: Any) -> PrepareResult:
    paths = [str(paths)] if isinstance(paths, Path) else paths
    defaults = {"tokenizer": "gpt2", "workers": 1, "shard_tokens": 1000, "val_fraction": 0.2, "progress": False}
    return module.prepare(paths, out=out, **(defaults | options))


def ids_of(out: Path, split: Split) -> list[int]:
    """The tokens of a split, read as anyone who knows llm.c's format would."""
    ids: list[int] = []
    for path in sorted(out.glob(f"{split}_*.bin")):
        header = np.fromfile(path, "<i4", 256)
        assert header[:2].tolist() == [20240520, 1]
        body = np.fromfile(path, "<u2", offset=1024)
        assert len(body) == header[2]
        ids += body.tolist()
    return ids


def expected(texts: list[str], *, val_fraction: float = 0.2, tokenizer: str = "gpt2") -> dict[Split, list[int]]:
    """What plain tiktoken makes of these documents, split by the documented rule."""
    encoding = load_tokenizer(tokenizer).encoding
    ids: dict[Split, list[int]] = {"train": [], "val": []}
    for text in texts:
        split: Split = "val" if xxhash.xxh3_64_intdigest(text.encode()) < val_fraction * 2**64 else "train"
        ids[split] += [encoding.eot_token, *encoding.encode_ordinary(text)]
    return ids


def set_bytes(out: Path) -> dict[str, bytes]:
    """Everything that belongs to the data set."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


def words(rng: random.Random, count: int) -> str:
    return "".join(rng.choice(["the ", "don't", " 字。", "\n", " naïve", "12", "  ", "=== "]) for _ in range(count))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(1)
    return [words(rng, rng.choice([3, 30, 200])) for _ in range(60)] + [words(rng, 2500)]


@pytest.fixture(scope="module")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents in files of every format, among them one that is read in stretches."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:20]))
    parquet.write_table(pa.table({"text": texts[20:40]}), folder / "b.parquet", row_group_size=7)
    for number, text in enumerate(texts[40:]):
        (folder / f"c{number:02d}.txt").write_text(text, newline="")
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small enough that every source has many blocks, and a journal after each."""
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1500)
    monkeypatch.setattr(reading, "LONG_TEXT_BYTES", 4000)
    monkeypatch.setattr(module, "JOURNAL_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: None
    )  # a killed process loses nothing without it; disks are slow


def test_workers_start_where_signals_cannot_be_blocked(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(signal, "pthread_sigmask")  # as on Windows
    assert prepare(corpus, tmp_path / "out", workers=2).manifest.fingerprint


@pytest.mark.usefixtures("small_blocks")
def test_a_long_text_of_white_space_alone_is_counted_as_one(tmp_path: Path) -> None:
    text = " \n\u2003" * 2000  # 10,000 bytes in blocks of 1,500, which end within characters
    (tmp_path / "space.txt").write_text(text)
    (tmp_path / "words.txt").write_text(text + "word")
    (tmp_path / "some.txt").write_text("some words\n" * 100)
    counts = prepare(tmp_path, tmp_path / "out").manifest.source["counts"]
    assert (counts["documents"], counts["white_space_only"]) == (3, 1)


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set of an undisturbed run."""
    out = tmp_path_factory.mktemp("reference") / "out"
    prepare(corpus, out)
    return out


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_shards_hold_the_tokens_of_plain_tiktoken(texts: list[str], corpus: Path, reference: Path) -> None:
    manifest = read_manifest(reference)
    want = expected(texts)
    for split in SPLITS:
        assert ids_of(reference, split) == want[split]
        shards, totals = manifest.splits[split], manifest.totals(split)
        assert [shard.tokens for shard in shards[:-1]] == [1000] * (len(shards) - 1)
        assert 0 < shards[-1].tokens <= 1000
        assert totals["documents"] == want[split].count(50256)
        assert totals["utf8_bytes"] == len(load_tokenizer("gpt2").decode_bytes(i for i in want[split] if i != 50256))
    assert len(manifest.splits["train"]) > 5
    assert list(verify_data(reference))
    assert manifest.source["counts"]["documents"] == len(texts)
    assert str(corpus.parent) not in (reference / "manifest.json").read_text()


@given(
    documents=st.lists(st.text(min_size=1, max_size=200), min_size=1, max_size=25),
    shard_tokens=st.integers(1, 400),
    val_fraction=st.sampled_from([0.005, 0.3, 0.9]),
    form=st.sampled_from(["jsonl", "parquet"]),
)
@settings(max_examples=30, deadline=None)
def test_any_documents_any_shard_size(
    documents: list[str],
    shard_tokens: int,
    val_fraction: float,
    form: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    if form == "jsonl":
        (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    else:
        parquet.write_table(pa.table({"text": documents}), folder / "x.parquet")
    manifest = prepare(
        folder / f"x.{form}", folder / "out", shard_tokens=shard_tokens, val_fraction=val_fraction
    ).manifest
    want = expected(documents, val_fraction=val_fraction)
    if not (want["train"] and want["val"]):
        everything = want["train"] + want["val"]
        last = min(len(everything) - 1, max(1, round(len(everything) * val_fraction)))
        want = {"train": everything[:-last], "val": everything[-last:]}
        assert manifest.source["split_rule"] == "last tokens"
    for split in SPLITS:
        assert ids_of(folder / "out", split) == want[split]
        assert manifest.totals(split)["documents"] == want[split].count(50256)
        assert {shard.tokens for shard in manifest.splits[split][:-1]} <= {shard_tokens}
    assert list(verify_data(folder / "out"))
    assert not [path for path in (folder / "out").iterdir() if path.name.endswith((".tmp", ".previous"))]


def test_documents_stay_in_their_split_when_others_are_added(tmp_path: Path) -> None:
    for n in range(40):
        (tmp_path / f"{n:02d}.txt").write_text(f"document {n}")
    decode = load_tokenizer("gpt2").decode
    before = set(decode(ids_of(prepare_to(tmp_path, "one"), "val")).split("<|endoftext|>"))
    for n in range(40, 80):
        (tmp_path / f"{n - 40:02d}-new.txt").write_text(f"document {n}")
    after = set(decode(ids_of(prepare_to(tmp_path, "two"), "val")).split("<|endoftext|>"))
    assert len(before) > 3
    assert before < after


def prepare_to(folder: Path, name: str) -> Path:
    out = folder / f".{name}"
    prepare(folder, out)
    return out


def test_one_file_is_split_at_its_end_and_prepare_says_so(tmp_path: Path) -> None:
    text = words(random.Random(2), 4000)
    (tmp_path / "book.txt").write_text(text, newline="")
    result = prepare(tmp_path / "book.txt", tmp_path / "out", val_fraction=0.1)
    ids = expected([text])["train"] or expected([text])["val"]
    assert ids_of(tmp_path / "out", "train") + ids_of(tmp_path / "out", "val") == ids
    assert len(ids_of(tmp_path / "out", "val")) == round(len(ids) * 0.1)
    assert any(
        f"so the last {round(len(ids) * 0.1):,} tokens are the validation split" in line for line in result.lines
    )


def test_a_tokenizer_of_ones_own_goes_with_the_set(corpus: Path, texts: list[str], tmp_path: Path) -> None:
    own = train_tokenizer([str(corpus)], vocab_size=320, out=tmp_path / "own.json")
    prepare(corpus, tmp_path / "out", tokenizer=str(own.path))
    want = [[own.eot_id, *own.encoding.encode_ordinary(text)] for text in texts]
    ids = ids_of(tmp_path / "out", "train") + ids_of(tmp_path / "out", "val")
    assert sorted(ids) == sorted(token for document in want for token in document)
    info = read_manifest(tmp_path / "out").tokenizer
    assert (info.name, info.vocab_size, info.sha256) == ("bpe", 320, own.sha256)
    assert load_tokenizer(str(tmp_path / "out" / "tokenizer.json")).sha256 == own.sha256


def test_a_tokenizer_file_that_changes_meanwhile_is_not_put_beside_the_shards(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = train_tokenizer([str(corpus)], vocab_size=320, out=tmp_path / "own.json").path
    assert own is not None
    right = own.read_bytes()
    train_tokenizer([str(corpus)], vocab_size=330, out=tmp_path / "other.json")
    write = module.write_tokenizer_file

    def change_and_write(*arguments: Any) -> None:
        shutil.copy(tmp_path / "other.json", own)
        write(*arguments)

    monkeypatch.setattr(module, "write_tokenizer_file", change_and_write)
    with pytest.raises(
        UserError, match=r"own\.json was changed while it was in use; put back what it was and run the same"
    ):
        prepare(corpus, tmp_path / "out", tokenizer=str(own))
    monkeypatch.setattr(module, "write_tokenizer_file", write)
    own.write_bytes(right)
    prepare(corpus, tmp_path / "out", tokenizer=str(own))
    assert load_tokenizer(str(tmp_path / "out" / "tokenizer.json")).sha256 == load_tokenizer(str(own)).sha256


def test_a_file_system_that_cannot_sync_folders_is_used(
    corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    prepare(corpus, tmp_path / "out")
    assert set_bytes(tmp_path / "out") == set_bytes(reference)


def test_files_of_the_users_are_kept(corpus: Path, tmp_path: Path) -> None:
    own = train_tokenizer([str(corpus)], vocab_size=320, out=tmp_path / "own.json")
    assert own.path is not None
    other = train_tokenizer([str(corpus)], vocab_size=330, out=tmp_path / "other.json")
    assert other.path is not None
    out = tmp_path / "out"
    out.mkdir()
    for content in (other.path.read_bytes(), b"{}"):
        (out / "tokenizer.json").write_bytes(content)
        for tokenizer in ("gpt2", str(own.path)):
            with pytest.raises(
                UserError, match=r"tokenizer\.json is there already and is not the tokenizer '\w+' of this"
            ):
                prepare(corpus, out, tokenizer=tokenizer)
            assert [path.read_bytes() for path in out.iterdir()] == [content]
    (out / "tokenizer.json").write_text(json.dumps(json.loads(own.path.read_text())))  # the same one, written otherwise
    for name in (".notes.bin.tmp", ".train_old.bin.previous"):
        (out / name).write_bytes(b"mine")
    before = {path: path.read_bytes() for path in out.iterdir()}
    prepare(corpus, out, tokenizer=str(own.path))
    assert {path: path.read_bytes() for path in before} == before
    assert list(verify_data(out))


def test_ids_beyond_16_bits(tmp_path: Path) -> None:
    byte_of = {value: character for character, value in _byte_characters().items()}
    pairs = [(byte_of[first], byte_of[second]) for first in range(256) for second in range(256)]
    values = {
        "added_tokens": [{"id": 2**16 + 256, "content": "<|endoftext|>", "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "model": {
            "vocab": {token: n for n, token in enumerate([*byte_of.values(), *("".join(pair) for pair in pairs)])},
            "merges": pairs,
        },
    }
    (tmp_path / "pairs.json").write_text(json.dumps(values))
    (tmp_path / "x.txt").write_text("pairs of \u00ff\u00fe \U0001f600 bytes, many of them \uffff")
    prepare(tmp_path / "x.txt", tmp_path / "out", tokenizer=str(tmp_path / "pairs.json"), val_fraction=0.4)
    tokenizer = load_tokenizer(str(tmp_path / "pairs.json"))
    ids = []
    for split in SPLITS:
        (path,) = (tmp_path / "out").glob(f"{split}_*.bin")
        assert np.fromfile(path, "<i4", 2).tolist() == [20240801, 7]
        ids += np.fromfile(path, "<u4", offset=1024).tolist()
    assert ids == [tokenizer.eot_id, *tokenizer.encode((tmp_path / "x.txt").read_text())]
    assert ids[0] == 2**16 + 256
    assert list(verify_data(tmp_path / "out"))


# --- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_worker_processes_gives_the_same_bytes(
    workers: int, corpus: Path, reference: Path, tmp_path: Path
) -> None:
    prepare(corpus, tmp_path / "out", workers=workers)
    assert set_bytes(tmp_path / "out") == set_bytes(reference)


def test_another_place_gives_the_same_bytes(corpus: Path, reference: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "elsewhere" / "text")  # with times of its own
    prepare(tmp_path / "elsewhere" / "text", tmp_path / "out")
    assert set_bytes(tmp_path / "out") == set_bytes(reference)


def test_workers_start_from_a_script_without_a_main_guard(corpus: Path, reference: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from toolkit.data.prepare import prepare\n"
        f"prepare([{str(corpus)!r}], out=sys.argv[1], workers=2, shard_tokens=1000, val_fraction=0.2)\n"
    )
    (tmp_path / "xxhash.py").write_text("raise ImportError('a file here must not get into the workers')")
    command = [sys.executable, "-P", "-", str(tmp_path / "out")]
    done = subprocess.run(command, input=script, text=True, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert set_bytes(tmp_path / "out") == set_bytes(reference)


@contextlib.contextmanager
def child(act: Callable[[], Any], *, failpoints: str = "", largest_file: int | None = None) -> Iterator[list[Any]]:
    """Runs `act` in a forked process; yields [its wait status, what UserError or OSError it raised]."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        status = 9
        try:
            failpoint._passages.clear()  # those of the parent
            os.environ[failpoint.VARIABLE] = failpoints
            if largest_file is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            act()
            status = 0
        except (UserError, OSError) as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
            status = 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    _, wait_status = os.waitpid(process, 0)
    with os.fdopen(reading) as pipe:
        yield [os.waitstatus_to_exitcode(wait_status), pipe.read()]


KILLED = -9
POINTS = [
    "prepare.after-block=kill@1",
    "prepare.after-block=kill@2",
    "prepare.after-block=kill@17",
    "prepare.before-journal=kill@1",
    "prepare.before-journal=kill@6",
    "prepare.after-journal=kill@1",
    "prepare.after-journal=kill@9",
    "prepare.before-last-shards=kill",
    "prepare.before-manifest=kill",
    "prepare.after-manifest=kill",
    "files.before-replace=kill@3",
    "shards.before-shard-rename=kill@1",
    "shards.after-shard-rename=kill@1",
    "shards.before-shard-rename=kill@4",
    "shards.after-shard-rename=kill@5",
]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("every", [0.0, 3600.0])
def test_killed_anywhere_and_run_again(
    point: str, every: float, corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "JOURNAL_EVERY_SECONDS", every)  # 3600: a journal after finished shards only
    out = tmp_path / "out"
    with child(lambda: prepare(corpus, out), failpoints=point) as (status, _):
        assert status in (KILLED, 0)  # 0: not passed that often
    for again in ("prepare.after-block=kill@1", "prepare.before-journal=kill@1"):
        with child(lambda: prepare(corpus, out), failpoints=again) as (status, _):
            assert status in (KILLED, 0)
    prepare(corpus, out)
    assert set_bytes(out) == set_bytes(reference)


@pytest.mark.parametrize("every", [0.0, 3600.0])
def test_finished_work_is_not_done_again(
    every: float, corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "JOURNAL_EVERY_SECONDS", every)  # 3600: a journal after finished shards only
    out = tmp_path / "out"
    heard: list[str] = []
    with child(lambda: prepare(corpus, out), failpoints="prepare.after-block=kill@20") as (status, _):
        assert status == KILLED
    finished = {path.name: path.stat() for path in out.glob("*.bin")}
    assert len(finished) > 2
    blocks = json.loads((out / ".prepare" / "journal.json").read_text())["position"]
    started_at: list[Any] = []
    original = sources.Source.blocks

    def spy(self: Any, start: Any, **options: Any) -> Any:
        started_at.append(start)
        return original(self, start, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources.Source, "blocks", spy)
        prepare(corpus, out, report=heard.append)
    assert heard[0].startswith(f"continuing in {out}: ")
    assert [(position.file, position.offset, position.row) for position in started_at] == [tuple(blocks.values())]
    assert started_at[0].offset > 0 or started_at[0].file > 0
    for name, before in finished.items():
        after = (out / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), name
    assert set_bytes(out) == set_bytes(reference)


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(seed: int, corpus: Path, reference: Path, tmp_path: Path) -> None:
    rng, out, kills = random.Random(seed), tmp_path / "out", 0
    while True:
        point = rng.choice(["prepare.after-block", "prepare.before-journal", "files.before-replace"])
        passage = rng.randint(2, 12)
        with child(lambda: prepare(corpus, out), failpoints=f"{point}=kill@{passage}") as (status, _):
            if status == 0:
                break
        kills += 1
        assert kills < 200
    assert kills > 2
    assert set_bytes(out) == set_bytes(reference)


@pytest.mark.parametrize("val_fraction", [0.003, 0.999])  # all in train, all in val
@pytest.mark.parametrize(
    "point", ["prepare.before-cutting-train", "shards.after-shard-rename", "prepare.before-journal"]
)
def test_killed_while_splitting_the_end_off(
    point: str, val_fraction: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "book.txt").write_text(words(random.Random(3), 3000), newline="")
    (tmp_path / "note.txt").write_text(words(random.Random(4), 900), newline="")
    options = {"val_fraction": val_fraction, "shard_tokens": 2500}
    monkeypatch.setattr(module, "JOURNAL_EVERY_SECONDS", 3600.0)  # fewer moments before the one that is meant
    prepare([str(tmp_path)], tmp_path / "out", **options)
    assert read_manifest(tmp_path / "out").source["split_rule"] == "last tokens"
    for passage in range(1, 30):
        out = tmp_path / f"out{passage}"
        with child(lambda: prepare([str(tmp_path)], out, **options), failpoints=f"{point}=kill@{passage}") as (  # noqa: B023
            status,
            _,
        ):
            pass
        if status == 0:
            break
        prepare([str(tmp_path)], out, **options)
        assert set_bytes(out) == set_bytes(tmp_path / "out")
        shutil.rmtree(out)
    assert passage > 1


def flip_a_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_an_open_shard_that_was_changed_is_refused_and_kept(corpus: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with child(lambda: prepare(corpus, out), failpoints="prepare.after-block=kill@9") as (status, _):
        assert status == KILLED
    unfinished = journal.Journal.load(out)
    assert unfinished is not None
    path = out / f".train_{len(unfinished.shards['train']):06d}.bin.tmp"
    flip_a_bit(path, 1024 + 2 * (unfinished.open_shards["train"].tokens - 1))
    before = set_bytes(out)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{path} was changed since .* its sha256 differs; put it back") as caught:
            prepare(corpus, out)
        assert "\n" not in str(caught.value)
    assert set_bytes(out) == before
    flip_a_bit(path, 1024 + 2 * (unfinished.open_shards["train"].tokens - 1))
    path.with_name(f".{path.name[1:-4]}.previous").write_bytes(bytes(5000))  # of a start before, and damaged
    prepare(corpus, out)
    assert set_bytes(out) == set_bytes(reference)


def test_a_journal_of_an_older_version_is_continued(corpus: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with child(lambda: prepare(corpus, out), failpoints="prepare.after-block=kill@9") as (status, _):
        assert status == KILLED
    path = out / ".prepare" / "journal.json"
    values = json.loads(path.read_text())
    assert [shard.pop("sha256") for shard in values["open_shards"].values()]
    path.write_text(json.dumps(values))
    prepare(corpus, out)
    assert set_bytes(out) == set_bytes(reference)


@pytest.mark.parametrize("point", ["prepare.before-last-shards", "prepare.before-cutting-train"])
def test_a_finished_shard_that_was_changed_is_not_copied(point: str, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(words(random.Random(3), 3000), newline="")
    out = tmp_path / "out"
    options = {"val_fraction": 0.6, "shard_tokens": 1500}  # cut within the second shard
    with child(lambda: prepare(tmp_path / "book.txt", out, **options), failpoints=f"{point}=kill") as (status, _):
        assert status == KILLED
    flip_a_bit(out / "train_000001.bin", 1100)
    with pytest.raises(
        UserError, match=r"train_000001\.bin was changed since it was finished: its sha256 is .*; put it"
    ):
        prepare(tmp_path / "book.txt", out, **options)
    flip_a_bit(out / "train_000001.bin", 1100)
    prepare(tmp_path / "book.txt", out, **options)
    prepare(tmp_path / "book.txt", tmp_path / "other", **options)
    assert set_bytes(out) == set_bytes(tmp_path / "other")


def test_a_worker_that_dies_is_one_line_and_the_next_run_continues(
    corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failpoint.VARIABLE, "workers.block=kill@6")
    with pytest.raises(UserError, match=r"a worker process ended \(signal SIGKILL, perhaps for lack of memory\)"):
        prepare(corpus, tmp_path / "out", workers=2)
    monkeypatch.delenv(failpoint.VARIABLE)
    prepare(corpus, tmp_path / "out", workers=2)
    assert set_bytes(tmp_path / "out") == set_bytes(reference)


# --- disks -----------------------------------------------------------------------------------------------------------


def test_an_interrupt_while_workers_start_is_one_word(corpus: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches every process of the terminal, here the worker in its first import."""
    started = tmp_path / "started"
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
            import pathlib, sys, time
            if "serve()" in sys.orig_argv[-1]:
                pathlib.Path({str(started)!r}).touch()
                time.sleep(1)
        """)
    )
    # The tests themselves may run in the background, where Ctrl-C is ignored.
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {TOOLKIT}"
    arguments = [str(corpus), "--out", str(tmp_path / "out"), "--tokenizer", "bytes", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "prepare", *arguments],
        env=environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)])),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed.splitlines()[-1] == "interrupted"
    assert "Traceback" not in printed


def test_a_file_that_may_not_grow_stops_with_a_line_and_nothing_lost(
    corpus: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with child(lambda: prepare(corpus, out, shard_tokens=10**6), largest_file=9000) as (status, message):
        assert (status, message.count("\n")) == (1, 0)
        assert f"writing to {out} failed: File too large" in message
        assert "the same command goes on from here" in message
    prepare(corpus, out, shard_tokens=10**6)
    prepare(corpus, tmp_path / "other", shard_tokens=10**6)
    assert set_bytes(out) == set_bytes(tmp_path / "other")


@pytest.mark.parametrize("point", ["shards.before-shard-rename=fail@3", "prepare.before-journal=fail@8"])
def test_a_full_disk_stops_with_a_line_and_nothing_lost(
    point: str, corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with child(lambda: prepare(corpus, out), failpoints=point) as (status, message):
        assert status == 1
        assert f"UserError: writing to {out} failed: No space left on device" in message
    prepare(corpus, out)
    assert set_bytes(out) == set_bytes(reference)


def test_the_disk_is_estimated_before_anything_is_written(
    corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    prepare(corpus, tmp_path / "out", report=heard.append)
    tokens = sum(read_manifest(reference).totals(split)["tokens"] for split in SPLITS)
    assert 0.5 < estimated(heard) / tokens < 2
    leave_free(monkeypatch, 1000)
    with pytest.raises(UserError, match=r"needs about [\d.]+ KB but its disk has 1.0 KB free"):
        prepare(corpus, tmp_path / "small")
    assert not list((tmp_path / "small").glob("*"))[1:]  # nothing but .prepare
    assert not list((tmp_path / "small").glob("*.bin"))


def estimated(heard: list[str]) -> float:
    """The tokens to go, of the line that says how many."""
    (line,) = [line for line in heard if line.startswith("about ")]
    count, unit = line.split()[1:3]
    return float(count.replace(",", "")) * {"million": 1e6, "billion": 1e9}.get(unit, 1)


def leave_free(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    """The disk says that it has so many bytes free."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(free)))


@pytest.mark.parametrize("ending", ["jsonl.gz", "txt.gz", "jsonl.zst"])
def test_the_estimate_goes_on_from_what_was_done(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, compress = random.Random(6), {"gz": gzip.compress, "zst": zstandard.compress}[ending.split(".")[1]]
    for name in "ab":
        documents = [words(rng, 60) for _ in range(1200)]
        whole = "".join(documents) if "txt" in ending else "".join(json.dumps({"text": d}) + "\n" for d in documents)
        (tmp_path / f"{name}.{ending}").write_bytes(compress(whole.encode()))
    out, heard = tmp_path / "out", []
    with child(lambda: prepare(tmp_path, out, shard_tokens=9000), failpoints="prepare.after-block=kill@180") as (
        end,
        _,
    ):
        assert end == KILLED
    done = journal.Journal.load(out)
    assert done is not None
    assert done.position.file == 0
    leave_free(monkeypatch, 3_000_000)
    manifest = prepare(tmp_path, out, shard_tokens=9000, report=heard.append).manifest
    to_go = sum(manifest.totals(split)["tokens"] for split in SPLITS) - done.tokens
    assert 0.4 < estimated(heard) / to_go < 2


def test_a_compressed_file_is_no_fair_sample_of_the_files_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((json.dumps({"text": "a b " * 100}) + "\n").encode() * 200))
    (tmp_path / "b.txt").write_text(words(random.Random(5), 40_000), newline="")
    heard: list[str] = []
    leave_free(monkeypatch, 300_000)
    with child(lambda: prepare(tmp_path, tmp_path / ".out"), failpoints="prepare.after-block=kill@62") as (status, _):
        assert status == KILLED
    tokens = sum(prepare(tmp_path, tmp_path / ".out", report=heard.append).manifest.totals(s)["tokens"] for s in SPLITS)
    assert 1.6 * estimated(heard) > 300_000 > 2 * tokens  # it was said, and nothing was refused


def test_folders_that_cannot_be_written(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is a file; name a folder"):
        prepare(corpus, tmp_path / "file")
    for out in (tmp_path / "file" / "below", Path("/proc/set")):
        with pytest.raises(UserError, match=f"cannot write to {out}: ") as caught:
            prepare(corpus, out)
        assert "\n" not in str(caught.value)
    (tmp_path / "llmc").mkdir()
    (tmp_path / "llmc" / "train_000000.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"llmc holds train_000000\.bin but neither a manifest nor work"):
        prepare(corpus, tmp_path / "llmc")


def test_more_workers_than_cores_can_feed_are_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"workers=100000 is more than \d+, 16 for each core"):
        prepare(corpus, tmp_path / "out", workers=100_000)


def test_two_at_a_time_are_refused(corpus: Path, tmp_path: Path) -> None:
    journal.make_folder(tmp_path / "out")
    with journal.locked(tmp_path / "out"), pytest.raises(UserError, match="another `toolkit prepare` is at work"):
        prepare(corpus, tmp_path / "out")


def test_a_folder_that_cannot_be_locked_is_said_and_used(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    prepare(corpus, tmp_path / "out")
    assert "out cannot be locked (Function not implemented): make sure yourself" in caplog.text
    assert (tmp_path / "out" / "manifest.json").exists()


# --- again, and with something changed -------------------------------------------------------------------------------


def test_a_finished_set_is_left_alone(corpus: Path, reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "out")
    before = set_bytes(tmp_path / "out")
    result = prepare(corpus, tmp_path / "out", workers=3)
    assert result.already_done
    assert result.lines[0] == f"{tmp_path / 'out'} is finished already and its source is unchanged: nothing to do"
    shutil.rmtree(tmp_path / "out" / ".prepare")  # a copy without the working notes
    assert prepare(corpus, tmp_path / "out").already_done
    assert set_bytes(tmp_path / "out") == before


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"shard_tokens": 4000}, "shard_tokens was 1000, is now 4000"),
    ({"val_fraction": 0.1}, "val_fraction was 0.2, is now 0.1"),
    ({"tokenizer": "bytes"}, "tokenizer.eot_id was 50256, is now 256; tokenizer.name was 'gpt2', is now 'bytes'"),
    ({"text_column": "body"}, "source.text_column was 'text', is now 'body'"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
@pytest.mark.parametrize("state", ["a finished", "an unfinished"])
def test_other_settings_are_refused(
    change: dict[str, Any], message: str, state: str, corpus: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if state == "a finished":
        shutil.copytree(reference, out)
    else:
        with child(lambda: prepare(corpus, out), failpoints="prepare.after-block=kill@9") as (status, _):
            assert status == KILLED
    before = set_bytes(out)
    with pytest.raises(UserError) as caught:
        prepare(corpus, out, **change)
    assert f"holds {state} data set with other settings: {message}" in str(caught.value)
    assert set_bytes(out) == before


def edit(folder: Path) -> None:
    data = (folder / "a.jsonl").read_bytes()
    (folder / "a.jsonl").write_bytes(data.replace(b"the", b"hte"))  # of the same size


SOURCE_CHANGES: list[tuple[Callable[[Path], Any], str]] = [
    (edit, r"a\.jsonl changed"),
    (lambda folder: (folder / "c03.txt").unlink(), r"c03\.txt is gone"),
    (lambda folder: (folder / "new.txt").write_text("x"), r"new\.txt is new"),
]


@pytest.mark.parametrize(("change", "message"), SOURCE_CHANGES)
@pytest.mark.parametrize("finished", [False, True])
def test_a_source_that_changed_is_refused(
    change: Callable[[Path], Any], message: str, finished: bool, corpus: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "text", tmp_path / "out"
    shutil.copytree(corpus, folder)
    with child(lambda: prepare(folder, out), failpoints="" if finished else "prepare.after-block=kill@9"):
        pass
    change(folder)
    with pytest.raises(UserError, match=f"the source is not the one that {out} was begun with: {message}") as caught:
        prepare(folder, out)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("finished", [False, True])
def test_a_change_of_either_of_two_files_of_one_name_is_noticed(finished: bool, tmp_path: Path) -> None:
    rng, out = random.Random(7), tmp_path / "out"
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        (folder / "x.txt").write_text(f"{rng.random():.9f} " * 800)
    point = "" if finished else "prepare.after-block=kill@9"
    with child(lambda: prepare(list(map(str, folders)), out), failpoints=point):
        pass
    (folders[0] / "x.txt").write_text(f"{rng.random():.9f} " * 800)
    with pytest.raises(UserError, match=rf"not the one that {out} was begun with: x\.txt changed; put it back"):
        prepare(list(map(str, folders)), out)


@pytest.mark.parametrize("finished", [False, True])
def test_files_json_of_older_versions(finished: bool, corpus: Path, reference: Path, tmp_path: Path) -> None:
    folder, out, files = tmp_path / "text", tmp_path / "out", tmp_path / "out" / ".prepare" / "files.json"
    shutil.copytree(corpus, folder)
    with child(lambda: prepare(folder, out), failpoints="" if finished else "prepare.after-block=kill@9"):
        pass
    by_name = {name: stamps[-1] for name, stamps in json.loads(files.read_text()).items()}
    files.write_text(json.dumps(by_name))
    assert prepare(folder, out).already_done == finished
    assert set_bytes(out) == set_bytes(reference)
    edit(folder)
    with pytest.raises(UserError, match=r"a\.jsonl changed"):
        prepare(folder, out)


@pytest.mark.parametrize("finished", [False, True])
def test_files_json_that_is_damaged_or_gone(finished: bool, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with child(lambda: prepare(corpus, out), failpoints="" if finished else "prepare.after-block=kill@9"):
        pass
    files = out / ".prepare" / "files.json"
    fix = "delete it if the source is as it was" if finished else f"delete {out} and run again"
    for damaged in ("", "[3]", "\0"):
        files.write_text(damaged)
        with pytest.raises(
            UserError, match=rf"files\.json is damaged \(.*\), so that a changed source .*; {fix}"
        ) as caught:
            prepare(corpus, out)
        assert "\n" not in str(caught.value)
    files.unlink()
    if finished:
        assert prepare(corpus, out).already_done
    else:
        with pytest.raises(UserError, match=rf"files\.json is gone, so that a changed source .*; {fix}"):
            prepare(corpus, out)


def test_settings_may_change_while_there_is_nothing_to_lose(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": "some text of some words"}\n')
    with pytest.raises(UserError, match=r"has no column 'text', only 'body'"):
        prepare(tmp_path / "x.jsonl", tmp_path / "out")
    assert prepare(tmp_path / "x.jsonl", tmp_path / "out", text_column="body").manifest
    (tmp_path / "y.jsonl").write_text('{"text": "some text"}\n{"text": 12345678}\n')
    with pytest.raises(UserError, match=r"y\.jsonl line 2: the field 'text' is int"):
        prepare(tmp_path / "y.jsonl", tmp_path / "other")
    (tmp_path / "y.jsonl").write_text('{"text": "some text"}\n{"text": "123456"}\n')  # put right, of the same size
    assert prepare(tmp_path / "y.jsonl", tmp_path / "other").manifest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_tokens": 0}, "shard_tokens=0 must be from 1"),
        ({"shard_tokens": 2**31}, "must be from 1 to 2147483647"),
        ({"val_fraction": 0.0}, "val_fraction=0.0 must be above 0 and below 1"),
        ({"val_fraction": 1.5}, "val_fraction=1.5 must be"),
        ({"workers": 0}, "workers=0 must be at least 1"),
        ({"tokenizer": "gpt3"}, "tokenizer gpt3 does not exist; use gpt2, bytes"),
    ],
)
def test_settings_that_break_a_rule(options: dict[str, Any], message: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        prepare(corpus, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_source_without_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    with pytest.raises(UserError, match="holds no text: 2 documents read, all of them empty or skipped"):
        prepare(tmp_path / "x.jsonl", tmp_path / "out")


def test_the_totals_account_for_every_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one"}\n\n{"text": ""}\n{"text": null}\n{"text": " "}\n{"text": "\\ud800 <|endoftext|>"}\n'
    )
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo" + b" two" * 500)
    (tmp_path / "c.md").write_text("ignored")
    result = prepare(tmp_path, tmp_path / ".out")
    text = "\n".join(result.lines)
    size = sum((tmp_path / name).stat().st_size for name in ("a.jsonl", "b.txt"))
    for part in (
        f"read 2 files, {size:,} bytes, 6 documents; ignored 1 files with other endings",
        "kept 4 documents, 2,024 UTF-8 bytes",
        "skipped documents: 1 empty, 1 null",
        "1 blank lines skipped",
        "1 documents of white space alone kept",
        "1 byte order marks removed",
        "1 lone surrogates replaced by U+FFFD",
        "data set",
    ):
        assert part in text
    assert isinstance(result.manifest, Manifest)
    assert sum(result.manifest.totals(split)["documents"] for split in SPLITS) == 4
    ids = ids_of(tmp_path / ".out", "train") + ids_of(tmp_path / ".out", "val")
    assert ids.count(50256) == 4  # the literal <|endoftext|> is no end of text
