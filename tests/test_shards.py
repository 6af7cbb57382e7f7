"""Shards and manifest: exact bytes, refusal of everything that is not as it should be, verify, adopt."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data_sets import write_set
from toolkit import failpoint
from toolkit.data.loader import open_data
from toolkit.data.manifest import Manifest, ShardInfo, TokenizerInfo, read_manifest, write_manifest
from toolkit.data.prepare import prepare
from toolkit.data.shards import ShardWriter, adopt, open_shards, shard_file_name, verify_data
from toolkit.data.tokenizer import load_tokenizer, train_tokenizer
from toolkit.disk import replace_file
from toolkit.errors import UserError

MakeSet = Callable[..., Path]


@pytest.fixture
def make_set(tmp_path: Path) -> MakeSet:
    return lambda name, *arguments, **settings: write_set(tmp_path / name, *arguments, **settings)


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, sort_keys=True, indent=1) + "\n")


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize(
    ("dtype", "magic", "version"), [("uint16", 20240520, 1), ("uint32", 20240801, 7)], ids=["uint16", "uint32"]
)
def test_a_shard_is_llm_c_s_file(tmp_path: Path, dtype: str, magic: int, version: int) -> None:
    ids = np.arange(1000)
    writer = ShardWriter(tmp_path / "train_000000.bin", dtype=dtype)
    writer.append(ids[:300], documents=2, utf8_bytes=700)
    writer.append(ids[300:], documents=1, utf8_bytes=800)
    assert list(tmp_path.glob("*.bin")) == []  # not under its name before it is complete
    info = writer.close()
    data = (tmp_path / "train_000000.bin").read_bytes()
    header = np.frombuffer(data[:1024], dtype="<i4")
    assert header[:3].tolist() == [magic, version, 1000]
    assert not header[3:].any()
    assert np.array_equal(np.frombuffer(data[1024:], dtype=np.dtype(dtype).newbyteorder("<")), ids)
    assert info == ShardInfo(
        file="train_000000.bin",
        tokens=1000,
        documents=3,
        utf8_bytes=1500,
        sha256=hashlib.sha256(data).hexdigest(),
        largest_id=999,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["train_000000.bin"]


@pytest.mark.parametrize("expected", [0, 99, 100, 101])
def test_the_hash_is_right_whatever_count_was_expected(tmp_path: Path, expected: int) -> None:
    with ShardWriter(tmp_path / "x.bin", dtype="uint16", expected_tokens=expected) as writer:
        writer.append(np.arange(100), documents=1, utf8_bytes=1)
    assert writer.info is not None
    assert writer.info.sha256 == hashlib.sha256((tmp_path / "x.bin").read_bytes()).hexdigest()


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with ShardWriter(tmp_path / "x.bin", dtype="uint16") as writer:
            writer.append(np.arange(100), documents=1, utf8_bytes=1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [65536, -1])
def test_an_id_that_does_not_fit_is_never_wrapped(tmp_path: Path, bad: int) -> None:
    with pytest.raises(AssertionError, match=str(abs(bad))), ShardWriter(tmp_path / "x.bin", dtype="uint16") as writer:
        writer.append(np.array([5, bad]), documents=1, utf8_bytes=1)


def test_a_failed_rename_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_FAILPOINTS", "shards.before-shard-rename=fail")
    writer = ShardWriter(tmp_path / "x.bin", dtype="uint16")
    writer.append(np.arange(10), documents=1, utf8_bytes=1)
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert not (tmp_path / "x.bin").exists()


# ----------------------------------------------------------------------------------------------------------- manifest


def test_the_fingerprint_is_the_sha256_of_the_file_and_of_the_content_alone(make_set: MakeSet) -> None:
    folder = make_set("data", [300, 200])
    manifest = read_manifest(folder)
    assert manifest.fingerprint == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    reordered = Manifest(
        splits={"val": manifest.splits["val"], "train": manifest.splits["train"]},
        source=dict(reversed(list(manifest.source.items()))),
        tokenizer=manifest.tokenizer,
        schema_version=1,
    )
    assert reordered.fingerprint == manifest.fingerprint
    # other white space in the file is not another data set
    (folder / "manifest.json").write_text(json.dumps(json.loads((folder / "manifest.json").read_text())))
    assert read_manifest(folder) == manifest
    assert manifest.totals("train") == {"tokens": 500, "documents": 0, "utf8_bytes": 1500}


def first_shard(values: dict[str, Any]) -> dict[str, Any]:
    shard: dict[str, Any] = values["splits"]["train"]["shards"][0]
    return shard


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(schema_version=2), r"schema_version=2 is not the 1 that this version"),
        (lambda v: v.update(schema_version=True), r"schema_version=True is not the 1"),
        (lambda v: v.update(extra=1), r"unknown keys \['extra'\]"),
        (lambda v: v.pop("source"), r"missing keys \['source'\]"),
        (lambda v: v["tokenizer"].update(vocab_size="50257"), r"tokenizer.vocab_size='50257' is not of type int"),
        (lambda v: v["tokenizer"].update(eot_id=50257), r"eot_id=50257 must be below vocab_size=50257"),
        (lambda v: v["splits"].pop("val"), r"splits: unknown keys \[\], missing keys \['val'\]"),
        (lambda v: v["splits"]["train"].update(tokens=1), r"splits.train.tokens=1 is not the sum over its shards, 500"),
        (lambda v: first_shard(v).update(tokens=True), r"tokens='True' is not of type int"),
        (lambda v: first_shard(v).update(tokens=2**31), r"tokens=2147483648 must be from 1 to 2147483647"),
        (lambda v: first_shard(v).update(tokens=0), r"tokens=0 must be from 1"),
        (lambda v: first_shard(v).update(documents=501), r"documents=501 must be from 0 to tokens=300"),
        (lambda v: first_shard(v).update(utf8_bytes=-1), r"utf8_bytes=-1 must be"),
        (lambda v: first_shard(v).update(sha256="F" * 64), r"is not 64 hexadecimal digits"),
        (
            lambda v: first_shard(v).update(largest_id=50257),
            r"largest_id=50257 must be below the tokenizer's vocab_size",
        ),
        (lambda v: first_shard(v).update(file="../x.bin"), r"shard '../x.bin': a shard name may hold only letters"),
        (lambda v: first_shard(v).update(file="/etc/x.bin"), r"shard '/etc/x.bin': a shard name"),
        (lambda v: first_shard(v).update(file="a\\b.bin"), r"a shard name may hold only"),
        (lambda v: first_shard(v).update(file=".x.bin"), r"shard '.x.bin': a shard name"),
        (lambda v: first_shard(v).update(file="passwd"), r"ends in .bin"),
        (lambda v: first_shard(v).update(file="a\nb.bin"), r"a shard name may hold only"),
        (lambda v: first_shard(v).update(file="val_000000.bin"), r"shard 'val_000000.bin' is listed more than once"),
    ],
)
def test_a_manifest_is_read_strictly(
    make_set: MakeSet, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = make_set("data", [300, 200])
    change_manifest(folder, change)
    with pytest.raises(UserError, match=message) as caught:
        read_manifest(folder)
    assert str(caught.value).startswith(f"{folder / 'manifest.json'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[" * 100_000, "nested too deeply|is not valid JSON"),
        (b"3", "does not hold a JSON object"),
        (b'{"a": 1, "a": 2}', "holds a key twice"),
        (b'{"schema_version": NaN}', "holds NaN"),
        (b'{"schema_version": 1e999}', "holds 1e999, which is no finite number"),
        (b" " * (16 * 2**20 + 1), "larger than 16777216 bytes"),
        (b'{"schema_version": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    ],
    ids=["cut", "not-utf8", "deep", "number", "twice", "nan", "infinite", "huge", "long-number"],
)
def test_a_file_that_is_no_manifest_is_refused(make_set: MakeSet, data: bytes, message: str) -> None:
    folder = make_set("data", [300])
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_manifest(folder)


def test_a_missing_set_names_the_command_that_makes_it(tmp_path: Path, make_set: MakeSet) -> None:
    with pytest.raises(
        UserError, match=r"nothing does not exist; make it with `toolkit prepare PATH... --out .*nothing`"
    ):
        read_manifest(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"fineweb-edu-10b does not exist; make it with `make prepare-data`"):
        read_manifest(tmp_path / "fineweb-edu-10b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is empty; make it with `toolkit prepare PATH... --out .*empty`"):
        read_manifest(tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a folder"):
        read_manifest(tmp_path / "file")
    folder = make_set("data", [300])
    (folder / "manifest.json").unlink()
    with pytest.raises(
        UserError, match=r"holds shards but no manifest.json; run the same .* or, for llm.c shards, `toolkit adopt"
    ):
        read_manifest(folder)
    (folder / "manifest.json").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="is a symbolic link"):
        read_manifest(folder)


# ------------------------------------------------------------------------------------------------------------ reading


def test_shards_are_read_by_position(make_set: MakeSet) -> None:
    train = open_shards(make_set("data", [300, 200]), "train")
    assert [shard.info.tokens for shard in train] == [300, 200]
    assert train[1].read(10, 5).tolist() == [310, 311, 312, 313, 314]
    assert train[0].read(0, 300).tolist() == list(range(300))


def damage_truncated(path: Path) -> None:
    os.truncate(path, 1500)


def damage_longer(path: Path) -> None:
    overwrite(path, path.stat().st_size, b"ab")


def damage_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def damage_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncated, r"train_000000.bin has 1500 bytes, but 300 tokens in manifest.json make 1624"),
        (damage_longer, r"has 1626 bytes, but 300 tokens"),
        (Path.unlink, r"train_000000.bin is in manifest.json but not in the folder"),
        (damage_link, r"train_000000.bin is a symbolic link"),
        (damage_folder, r"train_000000.bin is not a regular file"),
        (
            lambda p: overwrite(p, 0, b"\0\0\0\0"),
            r"header says magic 0, version 1, 300 tokens; expected magic 20240520",
        ),
        (lambda p: overwrite(p, 8, b"\1\0\0\0"), r"header says magic 20240520, version 1, 1 tokens"),
        (lambda p: overwrite(p, 12, b"\1"), r"the header holds something after its three numbers"),
    ],
)
def test_a_shard_that_does_not_fit_is_refused_at_the_start(
    make_set: MakeSet, damage: Callable[[Path], object], message: str
) -> None:
    folder = make_set("data", [300])
    damage(folder / "train_000000.bin")
    with pytest.raises(UserError, match=message + r".*; see `toolkit verify"):
        open_shards(folder, "train")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=st.integers(0, 1023), flip=st.integers(1, 255))
def test_any_changed_byte_in_a_header_is_refused(tmp_path: Path, offset: int, flip: int) -> None:
    folder = tmp_path / f"{offset}-{flip}"
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder / "train_000000.bin", dtype="uint16") as writer:
        writer.append(np.arange(10), documents=1, utf8_bytes=1)
    assert writer.info is not None
    info = TokenizerInfo(name="gpt2", vocab_size=50257, eot_id=50256, sha256="0" * 64)
    write_manifest(
        folder, Manifest(schema_version=1, source={}, tokenizer=info, splits={"train": (writer.info,), "val": ()})
    )
    original = (folder / "train_000000.bin").read_bytes()[offset]
    overwrite(folder / "train_000000.bin", offset, bytes([original ^ flip]))
    with pytest.raises(UserError, match="header"):
        open_shards(folder, "train")


def test_a_shard_truncated_while_open_is_an_error_not_a_crash(make_set: MakeSet) -> None:
    folder = make_set("data", [300])
    shard = open_shards(folder, "train")[0]
    os.truncate(folder / "train_000000.bin", 1024 + 2 * 150)
    assert shard.read(0, 150)[-1] == 149
    with pytest.raises(
        UserError, match=r"train_000000.bin: got 100 of 200 bytes at token 100; the file became shorter"
    ):
        shard.read(100, 100)


def test_a_failing_disk_names_the_shard(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = open_shards(make_set("data", [300]), "train")[0]
    shard.read(0, 10)

    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(UserError, match=r"train_000000.bin: Input/output error when reading token 5; check the disk"):
        shard.read(5, 10)


def test_without_positioned_reads_the_ids_are_the_same(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = open_shards(make_set("data", [300]), "train")[0]
    monkeypatch.delattr(os, "preadv")  # as on Windows
    assert shard.read(7, 3).tolist() == [7, 8, 9]
    assert shard.read(290, 10).tolist() == list(range(290, 300))


def test_an_id_outside_the_vocabulary_names_shard_and_offset(make_set: MakeSet) -> None:
    folder = make_set("data", [300], vocab_size=1000)
    overwrite(folder / "train_000000.bin", 1024 + 2 * 123, (1000).to_bytes(2, "little"))
    shard = open_shards(folder, "train")[0]
    assert shard.read(0, 123)[-1] == 122
    with pytest.raises(UserError, match=r"train_000000.bin: id 1000 at token 123 is not below vocab_size=1000"):
        shard.read(100, 100)


def test_many_shards_need_few_open_files(make_set: MakeSet) -> None:
    folder = make_set("data", [20] * 150)
    before = len(list(Path("/dev/fd").iterdir()))
    shards = open_shards(folder, "train")
    assert [int(shard.read(7, 1)[0]) for shard in shards] == [20 * index + 7 for index in range(150)]
    assert len(list(Path("/dev/fd").iterdir())) - before <= 64
    assert [int(shard.read(7, 1)[0]) for shard in shards[:5]] == [7, 27, 47, 67, 87]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, b"before")
    monkeypatch.setenv(failpoint.VARIABLE, "files.before-replace=fail")
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"after")
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("file", b"before")]


# ------------------------------------------------------------------------------------------------------------- verify


def test_verify_is_content_with_a_good_set(make_set: MakeSet) -> None:
    folder = make_set("data", [300, 200])
    lines = list(verify_data(folder))
    assert lines[0] == "train: 2 shards, 500 tokens, 0 documents"
    assert lines[1] == "train_000000.bin: 300 tokens, ok"
    assert lines[-1] == f"fingerprint {read_manifest(folder).fingerprint}"


def test_verify_names_every_problem(make_set: MakeSet) -> None:
    folder = make_set("data", [300, 300, 300, 300, 300], vocab_size=257, tokenizer="bytes")
    overwrite(folder / "train_000000.bin", 1024 + 100, b"\0\0")  # an edited id
    overwrite(folder / "train_000001.bin", 1024 + 100, b"\xff\xff")  # an id outside the vocabulary
    os.truncate(folder / "train_000002.bin", 1100)
    overwrite(folder / "train_000004.bin", 1024 + 100, (256).to_bytes(2, "little"))  # a document more, a larger id
    (folder / "train_000009.bin").write_bytes(b"")
    change_manifest(folder, lambda v: first_shard(v).update(file="train_000007.bin"))
    (folder / "train_000000.bin").rename(folder / "train_000007.bin")
    with pytest.raises(UserError) as caught:
        list(verify_data(folder))
    message = str(caught.value)
    for part in (
        f"{folder} has 8 problems: ",
        "train_000001.bin follows train_000007.bin: train_000008.bin is missing",
        "train_000009.bin is not in manifest.json",
        "train_000007.bin was changed: its sha256 is ",
        "train_000001.bin: id 65535 at token 50 is not below vocab_size=257",
        "train_000002.bin has 1100 bytes, but 300 tokens",
        "train_000004.bin was changed",
        "train_000004.bin holds ids up to 256, not 255",
        "train_000004.bin holds 1 document starts, not 0",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda v: v["tokenizer"].update(sha256="1" * 64),
            r"tokenizer 'gpt2' is not .* its sha256 is 'f5f0.*not '1{64}'",
        ),
        (lambda v: v["tokenizer"].update(eot_id=40_000), r"its eot_id is 50256, not 40000"),
        (lambda v: v["tokenizer"].update(vocab_size=50258), r"its vocab_size is 50257, not 50258"),
        (
            lambda v: v["tokenizer"].update(name="bytes"),
            r"tokenizer 'bytes' is not .* its vocab_size is 257, not 50257",
        ),
        (lambda v: v["tokenizer"].update(name="bpe"), r"tokenizer.json is missing: .* 'bpe' of sha256 f5f0"),
        (lambda v: v["source"]["counts"].update(documents=3), r"source.counts.documents=3 is not the sum .*, 0"),
        (lambda v: v["source"]["counts"].update(utf8_bytes=9), r"source.counts.utf8_bytes=9 is not the sum .*, 3000"),
    ],
)
def test_verify_checks_what_the_manifest_says_beside_the_shards(
    make_set: MakeSet, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    folder = make_set("data", [300, 200])
    change_manifest(folder, change)
    with pytest.raises(UserError, match=f"{folder} has 1 problem: .*{problem}") as caught:
        list(verify_data(folder))
    assert "\n" not in str(caught.value)


def test_verify_wants_the_canonical_text_whose_sha256_is_the_fingerprint(make_set: MakeSet) -> None:
    path = make_set("data", [300]) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    with pytest.raises(UserError, match=r"1 problem: .*manifest.json was changed: its text is not the canonical one"):
        list(verify_data(path.parent))


def test_a_set_without_the_file_of_its_own_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three two one two\n" * 20)
    own = train_tokenizer([str(tmp_path / "text.txt")], vocab_size=260, out=tmp_path / "own.json")
    folder = tmp_path / "set"
    prepare([str(tmp_path / "text.txt")], out=folder, tokenizer=str(own.path), workers=1, progress=False)
    file = folder / "tokenizer.json"
    assert list(verify_data(folder))[-1].startswith("fingerprint ")
    file.unlink()
    with pytest.raises(
        UserError, match=r"1 problem: .*tokenizer.json is missing: the set was made with a tokenizer of"
    ):
        list(verify_data(folder))
    with pytest.raises(UserError, match=r"tokenizer.json is missing: .* put its file back or prepare the data again"):
        open_data(str(folder))
    os.mkfifo(file)  # which nobody writes to
    with pytest.raises(UserError, match=r"1 problem: tokenizer .*tokenizer.json is not a regular file"):
        list(verify_data(folder))
    file.unlink()
    file.write_text((tmp_path / "own.json").read_text().replace("Ġt", "Ġu"))
    with pytest.raises(UserError, match=r"1 problem: .*tokenizer\.json"):
        list(verify_data(folder))


# -------------------------------------------------------------------------------------------------------------- adopt

TEXTS = ("Hello world, this is a document.", "Ünïcode ☃ text\n" * 3, "a")


def write_llm_c(path: Path, ids: np.ndarray[Any, Any], *, magic: int = 20240520, version: int = 1) -> None:
    """As llm.c's dev/data/data_common.py lays it out."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = (magic, version, len(ids))
    path.write_bytes(header.tobytes() + ids.tobytes())


@pytest.fixture
def llm_c(tmp_path: Path) -> Path:
    folder = tmp_path / "fineweb10B"
    folder.mkdir()
    tokenizer = load_tokenizer("gpt2")
    for name, texts in (("val_000000", TEXTS[:1]), ("train_000001", TEXTS), ("train_000002", TEXTS[::-1])):
        ids = np.concatenate([[tokenizer.eot_id, *tokenizer.encode(text)] for text in texts]).astype(np.uint16)
        write_llm_c(folder / f"fineweb_{name}.bin", ids)
    return folder


def test_llm_c_shards_are_adopted(llm_c: Path) -> None:
    manifest = adopt(llm_c, load_tokenizer("gpt2"))
    assert read_manifest(llm_c) == manifest
    assert [shard.file for shard in manifest.splits["train"]] == [
        "fineweb_train_000001.bin",
        "fineweb_train_000002.bin",
    ]
    assert [shard.file for shard in manifest.splits["val"]] == ["fineweb_val_000000.bin"]
    assert manifest.splits["train"][0].documents == 3
    assert manifest.splits["train"][0].utf8_bytes == sum(len(text.encode()) for text in TEXTS)
    assert manifest.tokenizer.eot_id == 50256
    assert list(verify_data(llm_c))[-1].startswith("fingerprint ")
    assert adopt(llm_c, load_tokenizer("gpt2")) == manifest  # once more changes nothing
    change_manifest(llm_c, lambda v: v["tokenizer"].update(sha256="1" * 64))
    with pytest.raises(UserError, match=r"manifest.json is there already and says something else"):
        adopt(llm_c, load_tokenizer("gpt2"))


def test_adopting_names_every_problem(llm_c: Path) -> None:
    ids = np.arange(100, dtype=np.uint16)
    write_llm_c(llm_c / "fineweb_train_000004.bin", ids)
    write_llm_c(llm_c / "fineweb_train_000005.bin", ids.astype(np.uint32), magic=20240801, version=7)
    write_llm_c(llm_c / "fineweb_train_000006.bin", ids)
    os.truncate(llm_c / "fineweb_train_000006.bin", 1100)
    write_llm_c(llm_c / "fineweb_train_000007.bin", np.array([3, 50257], dtype=np.uint16))
    write_llm_c(llm_c / "fineweb_train_000008.bin", ids[:0])
    (llm_c / "fineweb_train_000009.bin").write_bytes((llm_c / "fineweb_train_000004.bin").read_bytes()[:100])
    write_llm_c(llm_c / "other.bin", ids)
    write_llm_c(llm_c / "my train.bin", ids)
    with pytest.raises(UserError) as caught:
        adopt(llm_c, load_tokenizer("gpt2"))
    for part in (
        "other.bin: the name must hold either 'train' or 'val'",
        "fineweb_train_000004.bin follows fineweb_train_000002.bin: fineweb_train_000003.bin is missing",
        "fineweb_train_000005.bin: header says magic 20240801, version 7, 100 tokens; expected magic 20240520, version 1 (uint16",
        "fineweb_train_000006.bin has 1100 bytes, but the 100 tokens in its header make 1224",
        "fineweb_train_000007.bin: id 50257 at token 1 is not below vocab_size=50257",
        "fineweb_train_000008.bin: the header counts 0 tokens",
        "fineweb_train_000009.bin has 100 bytes, less than the 1024 of a shard's header",
        "my train.bin: a shard name may hold only letters, digits, '.', '_' and '-', and ends in .bin; rename it",
    ):
        assert part in str(caught.value)
    assert not (llm_c / "manifest.json").exists()


def test_numbers_without_leading_zeros_are_adopted_in_their_order(tmp_path: Path) -> None:
    for number in range(12):
        write_llm_c(tmp_path / f"train_{number}.bin", np.arange(100 + number, dtype=np.uint16))
    manifest = adopt(tmp_path, load_tokenizer("gpt2"))
    assert [shard.tokens for shard in manifest.splits["train"]] == list(range(100, 112))
    assert list(verify_data(tmp_path))
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "train_10.bin").unlink()
    (tmp_path / "train_5.bin").unlink()
    with pytest.raises(UserError) as caught:
        adopt(tmp_path, load_tokenizer("gpt2"))
    assert "train_6.bin follows train_4.bin: train_5.bin is missing" in str(caught.value)
    assert "train_11.bin follows train_9.bin: train_10.bin is missing" in str(caught.value)


def test_an_unfinished_set_is_not_adopted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.txt").write_text("text of a few words " * 50)
    out = tmp_path / "out"
    monkeypatch.setenv(failpoint.VARIABLE, "prepare.before-manifest=fail")
    with pytest.raises(UserError, match="No space left on device"):
        prepare([str(tmp_path / "x.txt")], out=out, workers=1, progress=False)
    monkeypatch.delenv(failpoint.VARIABLE)
    assert len(list(out.glob("*.bin"))) == 2
    message = (
        f"{out} holds an unfinished data set of `toolkit prepare`; run the same prepare command again to finish it"
    )
    with pytest.raises(UserError, match=message):
        adopt(out, load_tokenizer("gpt2"))
    manifest = prepare([str(tmp_path / "x.txt")], out=out, workers=1, progress=False).manifest
    assert read_manifest(out) == manifest


def test_adopting_keeps_a_tokenizer_file_of_the_users(llm_c: Path) -> None:
    path = llm_c / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(
        UserError, match=r"tokenizer\.json is there already and is not the tokenizer 'gpt2' of this set"
    ):
        adopt(llm_c, load_tokenizer("gpt2"))
    assert path.read_text() == "{}"
    assert not (llm_c / "manifest.json").exists()


def test_a_missing_split_is_said(llm_c: Path, caplog: pytest.LogCaptureFixture) -> None:
    (llm_c / "fineweb_val_000000.bin").unlink()
    manifest = adopt(llm_c, load_tokenizer("gpt2"))
    assert manifest.totals("val")["tokens"] == 0
    assert f"{llm_c} has no val shard, and a run needs one; rename a shard" in caplog.text


def test_a_folder_without_shards_cannot_be_adopted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no .bin shards; `toolkit prepare"):
        adopt(tmp_path, load_tokenizer("gpt2"))
    with pytest.raises(UserError, match="is not a folder"):
        adopt(tmp_path / "nothing", load_tokenizer("gpt2"))


def test_names() -> None:
    assert shard_file_name("train", 0) == "train_000000.bin"
    assert shard_file_name("val", 12) == "val_000012.bin"
