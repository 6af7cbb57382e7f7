"""Preparing from the Hub: the real `datasets` and `huggingface_hub` clients against a stand-in that misbehaves."""

import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.hub_server import REVISION, Hub
from tests.test_prepare import KILLED, child, set_bytes
from toolkit.data import hub as hub_module
from toolkit.data import prepare as module
from toolkit.data import reading
from toolkit.data.documents import Position
from toolkit.data.manifest import read_manifest
from toolkit.data.prepare import PrepareResult, prepare
from toolkit.data.sources import open_source
from toolkit.data.tokenizer import load_tokenizer
from toolkit.errors import UserError

NAME = "hub:someone/fineweb-edu:sample-10BT"
README = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
- config_name: only-test
  data_files:
  - split: test
    path: sample/10BT/*
- config_name: lines
  data_files:
  - split: train
    path: lines/*
- config_name: long
  data_files:
  - split: train
    path: long/*
---
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset laid out like FineWeb-Edu: two files of six row groups with columns beside the text."""
    folder = tmp_path_factory.mktemp("hub")
    for name in ("data/CC-MAIN-2024-10", "sample/10BT", "lines", "long"):
        (folder / name).mkdir(parents=True)
    (folder / "README.md").write_text(README)
    parquet.write_table(pa.table({"text": ["other"]}), folder / "data/CC-MAIN-2024-10/train-00000-of-00001.parquet")
    for number in range(2):
        texts = [f"Document {number} {n}. " + "Some educational words. " * (n % 40) for n in range(300)]
        table = pa.table(
            {"text": texts, "id": [f"<urn:uuid:{n * 7919:032x}>" for n in range(300)], "score": [3.1] * 300}
        )
        parquet.write_table(table, folder / f"sample/10BT/{number:03d}_00000.parquet", row_group_size=50)
    (folder / "long" / "a.txt").write_text("words and " * 500 + "\u5b57" * 9000 + " more words" * 500)
    (folder / "lines" / "a.jsonl").write_text("".join(f'{{"text": "line {n}"}}\n' for n in range(500)))
    return folder


class Impatient(threading.Event):
    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(0)


@pytest.fixture
def hub(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, which the clients of this process take for the Hub; waiting takes no time."""
    import datasets
    from huggingface_hub import HfFileSystem, constants

    with Hub(root) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        address = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
        for name, value in (("HF_ENDPOINT", server.endpoint), ("HF_HUB_OFFLINE", False)):
            monkeypatch.setattr(datasets.config, name, value)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        monkeypatch.setattr(hub_module, "Event", Impatient)
        HfFileSystem.clear_instance_cache()
        yield server
        HfFileSystem.clear_instance_cache()


def run(out: Path, name: str = NAME, **options: Any) -> PrepareResult:
    defaults = {"workers": 1, "shard_tokens": 2000, "val_fraction": 0.1, "progress": False}
    return prepare([name], out=out, **(defaults | options))


@pytest.fixture(scope="module")
def reference(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same files prepared from the disk."""
    out = tmp_path_factory.mktemp("reference") / "out"
    prepare([str(root / "sample")], out=out, workers=1, shard_tokens=2000, val_fraction=0.1, progress=False)
    return out


def shards(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in set_bytes(out).items() if name.endswith(".bin")}


def test_a_set_from_the_hub_and_its_revision(hub: Hub, reference: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "out", workers=2)
    assert shards(tmp_path / "out") == shards(reference)
    source = result.manifest.source
    assert (source["hub"], source["config"], source["revision"]) == (NAME[4:], "sample-10BT", REVISION)
    assert source["first_file"] == "sample/10BT/000_00000.parquet"
    asked = hub.data_ranges()
    assert len(asked) == 2 * (1 + 6)  # for each file its end, then the text of each row group, and nothing twice
    assert len(set(asked)) == len(asked)
    assert all(spec for _, spec in asked)
    before = len(hub.requests)
    assert run(tmp_path / "out").already_done
    assert len(hub.requests) == before  # a commit never changes: nothing to ask


@pytest.mark.parametrize("largest_fetch", [hub_module.MAX_FETCH_BYTES, 1000])  # 1000: row groups read bit by bit
def test_faults_are_retried_and_change_nothing(
    largest_fetch: int,
    hub: Hub,
    reference: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_module, "MAX_FETCH_BYTES", largest_fetch)
    hub.faults = [
        429,
        "drop",
        503,
        "cut",
        "short",
        500,
        "short",
        502,
        "drop",
        "cut",
        "short",
        504,
        429,
        "empty",
        "drop",
    ]
    with caplog.at_level(logging.INFO, logger="toolkit"):
        run(tmp_path / "out")
    assert not hub.faults
    assert shards(tmp_path / "out") == shards(reference)
    assert any("trying again in 1 s (1 of 8)" in record.message for record in caplog.records)


def test_a_hub_that_stays_broken_is_one_line_and_the_next_run_continues(
    hub: Hub, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "JOURNAL_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(hub_module, "MAX_RETRIES", 1)
    monkeypatch.setattr(hub_module, "FETCHES_AT_A_TIME", 1)
    hub.faults = [None] * 5 + [503] * 100
    with pytest.raises(UserError, match=r"000_00000\.parquet: the connection failed 2 times in a row \(HTTP 503\)"):
        run(tmp_path / "out")
    hub.faults.clear()
    asked_before = len(hub.data_ranges())
    run(tmp_path / "out")
    assert shards(tmp_path / "out") == shards(reference)
    again = hub.data_ranges()[asked_before:]
    assert len(again) < 2 * 7  # row groups that were done are not read again


def test_killed_and_run_again_reads_only_the_rest(
    hub: Hub, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "JOURNAL_EVERY_SECONDS", 0.0)
    out = tmp_path / "out"
    huggingface_hub.close_session()  # no connection is shared with the child
    with child(lambda: run(out), failpoints="prepare.after-block=kill@9") as (status, _):
        assert status == KILLED
    finished = {range_ for range_ in hub.data_ranges() if range_[0].startswith("sample/10BT/000")}
    asked_before = len(hub.data_ranges())
    hub.revision = "f" * 40  # the dataset moves on; going on reads the commit that was begun with
    hub.old_revisions = [REVISION]
    run(out)
    assert shards(out) == shards(reference)
    assert read_manifest(out).source["revision"] == REVISION
    again = hub.data_ranges()[asked_before:]
    assert len(finished) == 7
    assert not [range_ for range_ in again if range_[0].startswith("sample/10BT/000")]
    assert 2 <= len(again) <= 1 + 4  # the end of the file, and the row groups after the third


def test_a_long_row_of_letters_on_the_hub_is_read_by_the_worker(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(reading, "LONG_TEXT_BYTES", 5000)
    monkeypatch.setattr(reading, "KEPT_STRETCH_BYTES", 9000)
    source = open_source(["hub:someone/fineweb-edu:long"])
    blocks = list(source.blocks(Position(), find_cut=load_tokenizer("gpt2").exact_cut))
    assert {block.header["in_payload"] for block in blocks} == {True, False}
    text = "".join("".join(reading.read_stretch(block.header, block.payload)) for block in blocks)
    assert text == (hub.root / "long" / "a.txt").read_text()


def test_lines_on_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1000)
    hub.faults = ["empty", "short", "drop"]  # an empty answer is not the end of the file
    run(tmp_path / "out", "hub:someone/fineweb-edu:lines")
    prepare([str(hub.root / "lines")], out=tmp_path / "local", workers=1, shard_tokens=2000, val_fraction=0.1)
    assert shards(tmp_path / "out") == shards(tmp_path / "local")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hub:someone/fineweb-edu:nope", r"BuilderConfig 'nope' not found. Available: \['default', 'sample-10BT'"),
        ("hub:someone/fineweb-edu:only-test", "has no train split, only test"),
        ("hub:someone/else", "hub:someone/else is not on the Hub .or private"),
    ],
)
def test_what_is_not_there(name: str, message: str, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path / "out", name)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_access_that_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.always = 401
    with pytest.raises(UserError, match=r"access is refused \(HTTP 401\); accept the dataset's conditions .*HF_TOKEN"):
        run(tmp_path / "out")


def test_no_network_is_one_line_at_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        UserError, match=r"cannot be reached at http://127\.0\.0\.1:1 .*toolkit prepare FOLDER"
    ) as caught:
        run(tmp_path / "out")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; unset it, or check"):
        run(tmp_path / "out")


@pytest.mark.parametrize("largest_fetch", [hub_module.MAX_FETCH_BYTES, 1000])  # 1000: row groups read bit by bit
def test_a_damaged_file_is_refused_at_once(
    largest_fetch: int, root: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "MAX_FETCH_BYTES", largest_fetch)
    shutil.copytree(root, tmp_path / "root")
    damaged = tmp_path / "root" / "sample/10BT/001_00000.parquet"
    data = bytearray(damaged.read_bytes())
    start = parquet.read_metadata(damaged).row_group(2).column(0).dictionary_page_offset
    data[start + 30 : start + 90] = b"\xff" * 60
    damaged.write_bytes(data)
    hub.root = tmp_path / "root"
    heard: list[str] = []
    with pytest.raises(UserError, match=r"001_00000\.parquet is damaged, cut short or not Parquet"):
        run(tmp_path / "out", report=heard.append)
    assert not [line for line in heard if "trying again" in line]


def test_a_folder_of_the_same_name_is_not_taken_for_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "fineweb-edu").mkdir(parents=True)
    with pytest.raises(UserError, match="would read the folder someone/fineweb-edu here instead"):
        run(tmp_path / "out")
    shutil.rmtree(tmp_path / "someone")
