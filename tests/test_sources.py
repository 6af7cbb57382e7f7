"""Sources: which documents there are and in what order, from any position on; what is refused, skipped and counted."""

import errno
import gzip
import json
import os
import sysconfig
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from toolkit.data import reading
from toolkit.data.documents import Block, Counts, Position, documents
from toolkit.data.reading import read_stretch
from toolkit.data.sources import Source, open_source
from toolkit.data.tokenizer import load_tokenizer
from toolkit.errors import UserError

FIND_CUT = load_tokenizer("gpt2").exact_cut


def read(source: Source, *, notice: Callable[[str], None] = print) -> tuple[list[str], Counts]:
    """Every document of a source, and the counts."""
    counts = Counts()
    return texts_of(source.blocks(Position(), find_cut=FIND_CUT, notice=notice), counts), counts


def texts_of(blocks: Iterable[Block], counts: Counts | None = None) -> list[str]:
    """The documents in these blocks; what is left of one whose start is not among them comes first."""
    texts: list[str] = []
    for block in blocks:
        if block.form == "stretch":
            text = "".join(read_stretch(block.header, block.payload))
            if block.header["first"] or not texts:
                texts.append("")
            texts[-1] += text
        else:
            texts += [text for text, _ in documents(block, Counts() if counts is None else counts)]
    return texts


def write_table(path: Path, texts: Any, **options: Any) -> Path:
    parquet.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, **options)
    return path


def write_lines(path: Path, texts: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)))
    return path


# --- which files, in which order -------------------------------------------------------------------------------------


def test_a_folder_in_path_order_with_every_format(tmp_path: Path) -> None:
    (tmp_path / "sub" / "deeper").mkdir(parents=True)
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a1") + gzip.compress(b" a2"))  # two members are one text
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "c.txt.zst").write_bytes(compress(b"c1") + compress(b" c2"))
    write_lines(tmp_path / "d.jsonl", ["d1", "d2"])
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "e1"}\n{"text": "e2"}'))
    (tmp_path / "f.JSONL.zst").write_bytes(compress(b'{"text": "f1"}\n'))
    write_table(tmp_path / "sub" / "g.parquet", ["g1", "g2"])
    (tmp_path / "sub" / "deeper" / "h.txt").write_text("h")
    (tmp_path / "sub" / "read.me").write_text("ignored")
    (tmp_path / ".hidden.txt").write_text("hidden")
    source = open_source([str(tmp_path)])
    assert read(source)[0] == ["a1 a2", "b", "c1 c2", "d1", "d2", "e1", "e2", "f1", "h", "g1", "g2"]
    assert source.ignored_files == 1
    assert [file.name for file in source.files][-2:] == ["sub/deeper/h.txt", "sub/g.parquet"]


def test_files_are_sorted_whatever_the_order_on_the_command_line(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    paths = [str(tmp_path / f"{name}.txt") for name in ("c", "a", "b")]
    assert read(open_source(paths))[0] == ["a", "b", "c"]


def test_linked_folders_are_entered_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real")
    assert read(open_source([str(tmp_path / "real")]))[0] == ["a"]


@pytest.mark.parametrize("backwards", [False, True])
def test_the_order_does_not_depend_on_that_of_the_directory(
    backwards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "x.txt").write_text("x")
    (tmp_path / "m.txt").write_text("m")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    walk = os.walk

    def in_one_order(*arguments: Any, **options: Any) -> Any:
        for parent, folders, names in walk(*arguments, **options):
            folders.sort(reverse=backwards)
            yield parent, folders, names

    monkeypatch.setattr(os, "walk", in_one_order)
    source = open_source([str(tmp_path)])
    assert [file.name for file in source.files] == ["a/x.txt", "m.txt"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["missing"], "missing does not exist"),
        (["x.pdf"], r"x\.pdf has an unknown ending; files must end in \.txt, \.jsonl"),
        (["x.parquet.gz"], r"x\.parquet\.gz has an unknown ending"),
        (["empty"], r"empty holds no file ending in .*\(1 others\)"),
        (["a.txt", "./a.txt"], r"a\.txt is named twice"),
        (["pipe.txt"], r"pipe\.txt is a pipe, a device or a socket, not a file"),
        (["a.txt", "none.jsonl.gz"], r"none\.jsonl\.gz has no bytes at all, so it is no \.gz file; get it again"),
        (["stdlib", "a.txt"], "stdlib cannot be combined"),
        ([], "no source is named"),
        (["hub:../x"], "not of the form hub:DATASET"),
    ],
)
def test_what_cannot_be_a_source(
    paths: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x.pdf", "x.parquet.gz", "a.txt"):
        (tmp_path / name).write_text("x")
    os.mkfifo("pipe.txt")
    (tmp_path / "none.jsonl.gz").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.csv").write_text("x")
    with pytest.raises(UserError, match=message):
        open_source(paths)


def test_a_folder_named_stdlib_is_meant_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stdlib").mkdir()
    (tmp_path / "stdlib" / "a.txt").write_text("mine")
    assert read(open_source(["./stdlib"]))[0] == ["mine"]
    assert open_source(["stdlib"]).kind == "stdlib"


def test_the_standard_library_by_its_coding_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("pkg", "site-packages", "dist-packages"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.py").write_text(f"# {folder}\n")
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\n# \xe9\r\n")
    (tmp_path / "broken.py").write_bytes(b"# \xe9\n")
    (tmp_path / "unknown.py").write_bytes(b"# coding: nonsense\n")
    (tmp_path / "bom.py").write_bytes(b"\xef\xbb\xbf# bom\n")
    (tmp_path / "empty.py").write_bytes(b"")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    texts, counts = read(open_source(["stdlib"]))
    assert texts == ["# bom\n", "# coding: latin-1\n# é\r\n", "# pkg\n"]
    assert (counts.skipped_undecodable, counts.skipped_empty, counts.documents_read) == (2, 1, 6)


def test_the_real_standard_library_is_there() -> None:
    source = open_source(["stdlib"])
    assert len(source.files) > 500
    assert not any("site-packages" in file.name for file in source.files)
    assert "os.py" in [file.name for file in source.files]


# --- unusual text ----------------------------------------------------------------------------------------------------


def test_policy_for_unusual_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfbom\r\n\0<|endoftext|>\xef\xbb\xbf")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "c.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "first"}\r\n\n  \n{"text": ""}\n{"text": null}\n{"text": " \\n"}\n'
        b'{"text": "\\ud800x\\udc00 \\ud83d\\ude00"}\n{"text": "\\u0000\\ufeff"}'
    )
    write_table(tmp_path / "d.parquet", ["x", None, "", "\ufeffkept"])
    texts, counts = read(open_source([str(tmp_path)]))
    assert texts == [
        "bom\r\n\0<|endoftext|>\ufeff",
        "first",
        " \n",
        "\ufffdx\ufffd 😀",
        "\0\ufeff",
        "x",
        "\ufeffkept",
    ]
    assert counts.to_dict() == {
        "documents": 7,
        "utf8_bytes": sum(len(text.encode()) for text in texts),
        "skipped_empty": 3,
        "skipped_null": 2,
        "skipped_undecodable": 0,
        "skipped_blank_lines": 2,
        "white_space_only": 1,
        "byte_order_marks_removed": 3,
        "surrogates_replaced": 2,
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json}", r"x\.jsonl line 3 is not JSON"),
        (b'{"text": "cut', r"x\.jsonl line 3 is not JSON"),
        (b'["text"]', r"x\.jsonl line 3 is list, not a JSON object"),
        (b'{"body": "x", "id": 1}', r"x\.jsonl line 3 has no column 'text', only 'body', 'id'; .*--text-column"),
        (b'{"text": 5}', r"x\.jsonl line 3: the field 'text' is int, not a string"),
        (b'{"text": "\xe9"}', r"x\.jsonl line 3 is not UTF-8: byte 0xe9 at offset 42 .*iconv"),
        (b"[" * 100_000, r"x\.jsonl line 3 is nested too deeply to be read; leave that line out"),
    ],
)
def test_lines_that_are_refused(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "two"}\n' + line + b'\n{"text": "four"}\n')
    with pytest.raises(UserError, match=message) as caught:
        read(open_source([str(path)]))
    assert "\n" not in str(caught.value)


def test_numbers_that_python_does_not_read_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "one", "n": ' + "9" * 5000 + ', "f": 1e999}\n')
    assert read(open_source([str(path)]))[0] == ["one"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf16_is_told_how_to_be_converted(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffhello".encode("utf-16-be") if encoding == "utf-16-be" else "hello".encode(encoding))
    with pytest.raises(UserError, match=r"`iconv -f utf-16 -t utf-8`"):
        read(open_source([str(path)]))


@pytest.mark.parametrize("long", [False, True])
def test_text_that_is_not_utf8_names_the_byte(long: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"fine words " * 1000 + "caf\xe9 au lait".encode("latin-1") + b" more" * 1000)
    if long:
        monkeypatch.setattr(reading, "LONG_TEXT_BYTES", 1000)
        monkeypatch.setattr(reading, "BLOCK_BYTES", 500)
    with pytest.raises(UserError, match=r"x\.txt is not UTF-8: byte 0xe9 at offset 11003 \(invalid"):
        read(open_source([str(path)]))
    path.write_bytes("x".encode("utf-16"))
    with pytest.raises(UserError, match=r"byte 0xff at offset 0 "):
        read(open_source([str(path)]))
    path.write_bytes(b"ends within a character \xe5\xad")
    with pytest.raises(UserError, match=r"byte 0xe5 at offset 24 \(unexpected end"):
        read(open_source([str(path)]))


# --- Parquet ---------------------------------------------------------------------------------------------------------


def test_parquet_columns_of_every_kind_of_string(tmp_path: Path) -> None:
    texts = ["one", None, "", "zwei 字", "one"] * 50
    kept = [text for text in texts if text]
    arrays = [pa.array(texts, kind) for kind in (pa.string(), pa.large_string(), pa.string_view())]
    arrays += [array.dictionary_encode() for array in arrays[:2]]
    for name, array in zip("abcde", arrays, strict=True):
        path = write_table(tmp_path / f"{name}.parquet", array, row_group_size=37)
        found, counts = read(open_source([str(path)]))
        assert found == kept, name
        assert (counts.skipped_null, counts.skipped_empty) == (50, 50)


def test_parquet_without_a_text_column(tmp_path: Path) -> None:
    path = write_table(tmp_path / "x.parquet", ["x"])
    with pytest.raises(UserError, match=r"x\.parquet has no column 'content', only 'id', 'text'; name one"):
        read(open_source([str(path)], text_column="content"))
    with pytest.raises(UserError, match=r"x\.parquet: the column 'id' is int64, not a string"):
        read(open_source([str(path)], text_column="id"))
    parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(UserError, match=r"x\.parquet has 2 columns 'text'; rename or drop all but one"):
        read(open_source([str(path)]))


def test_parquet_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    array = pa.array([b"fine", b"\xe9"]).cast(pa.string(), safe=False)
    path = write_table(tmp_path / "x.parquet", array)
    with pytest.raises(UserError, match=r"x\.parquet row 1 is not UTF-8: byte 0xe9"):
        read(open_source([str(path)]))


# --- damaged and changing files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.zst", "x.jsonl.gz", "x.parquet"])
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_damaged_files_are_refused(name: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / name
    lines = b"".join(b'{"text": "%d"}\n' % (n * 7919) for n in range(5000))
    if name.endswith(".parquet"):
        write_table(path, [str(n * 7919) for n in range(5000)])
    else:
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else zstandard.ZstdCompressor().compress(lines))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"PK" + data[2:-2] + b"PK")
    with pytest.raises(UserError, match=rf"{name.replace('.', '[.]')} is damaged, cut short|is damaged or cut short"):
        read(open_source([str(path)]))


@pytest.mark.parametrize("what", ["page", "page with a checksum", "name of a column"])
def test_damage_within_parquet_names_the_file(what: str, tmp_path: Path) -> None:
    options = {"use_dictionary": False, "compression": "snappy" if what == "page" else "none"}
    path = write_table(tmp_path / "x.parquet", ["some text"] * 999, write_page_checksum="checksum" in what, **options)
    data = bytearray(path.read_bytes())
    start = parquet.read_metadata(path).row_group(0).column(1).data_page_offset
    if what == "page":
        data[start + 30 : start + 90] = b"\xff" * 60
    elif what == "page with a checksum":
        data[data.index(b"some text", start + 500)] ^= 1
    else:
        data[data.rindex(b"\x04text") + 1] ^= 0x80  # of the column in the row group; the schema is still right
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=r"x\.parquet is damaged, cut short or not Parquet \(.*\); get it again"
    ) as caught:
        read(open_source([str(path)]))
    assert "\n" not in str(caught.value)


def test_a_parquet_file_that_the_disk_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source([str(write_table(tmp_path / "x.parquet", ["some text"] * 999))])
    error = OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(OSError, match="Input/output error") as caught:
        read(source)
    assert caught.value is error


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 100)
    path = write_lines(tmp_path / "x.jsonl", ["word"] * 100)
    blocks = open_source([str(path)]).blocks(Position(), find_cut=FIND_CUT)
    next(blocks)
    with path.open("a") as file:
        file.write('{"text": "later"}\n')
    with pytest.raises(UserError, match=r"x\.jsonl changed while it was read"):
        list(blocks)
    source = open_source([str(path)])
    path.unlink()
    with pytest.raises(UserError, match=r"x\.jsonl has gone since it was listed"):
        read(source)


# --- positions and blocks --------------------------------------------------------------------------------------------

texts_strategy = st.lists(
    st.one_of(
        st.text(max_size=60), st.integers(0, 900).map(lambda n: "word " * n), st.sampled_from(["", "\n", "字。" * 300])
    ),
    min_size=1,
    max_size=30,
)


@given(
    texts=texts_strategy,
    ending=st.sampled_from(["txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt.gz"]),
    group=st.integers(1, 20),
)
@settings(max_examples=40, deadline=None)
def test_reading_goes_on_from_the_end_of_any_block(
    texts: list[str], ending: str, group: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("source")
    clean = [text.encode("utf-8", "replace").decode() for text in texts]
    if ending.startswith("txt"):
        for n, text in enumerate(clean):
            data = text.encode()
            (folder / f"{n:03d}.{ending}").write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    elif ending == "parquet":
        write_table(folder / "x.parquet", clean, row_group_size=group)
    else:
        data = "".join(json.dumps({"text": text}) + "\n" for text in clean).encode()
        compress: Callable[[bytes], bytes] = {
            "jsonl": bytes,
            "jsonl.gz": gzip.compress,
            "jsonl.zst": zstandard.ZstdCompressor().compress,
        }[ending]
        (folder / f"x.{ending}").write_bytes(compress(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", 700)
        patch.setattr(reading, "LONG_TEXT_BYTES", 1000)
        patch.setattr(reading, "KEPT_STRETCH_BYTES", 900)
        source = open_source([str(folder)])
        found, _ = read(source)
        expected = [text.removeprefix("\ufeff") if ending.startswith("txt") else text for text in clean]
        assert found == [text for text in expected if text]
        blocks = list(source.blocks(Position(), find_cut=FIND_CUT))
        sizes = [block.source_bytes for block in blocks]
        assert sizes == sorted(sizes)
        for n, block in enumerate(blocks):
            rest = list(source.blocks(block.end, find_cut=FIND_CUT))
            assert texts_of(rest) == texts_of(blocks[n + 1 :])
            assert [b.end for b in rest[-1:]] == [b.end for b in blocks[n + 1 :][-1:]]


def test_a_long_text_is_cut_where_it_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(reading, "LONG_TEXT_BYTES", 5000)
    monkeypatch.setattr(reading, "KEPT_STRETCH_BYTES", 9000)
    tokenizer = load_tokenizer("gpt2")
    text = "\ufeffIt's 'a' test; " + "don't stop. " * 800 + "字" * 9000 + "end of it " * 900 + "  "
    (tmp_path / "x.txt").write_bytes(text.encode())
    blocks = list(open_source([str(tmp_path)]).blocks(Position(), find_cut=tokenizer.exact_cut))
    parts = ["".join(read_stretch(block.header, block.payload)) for block in blocks]
    assert "".join(parts) == text[1:]
    assert len(parts) > 8
    assert {block.header["in_payload"] for block in blocks} == {True, False}  # the row of 字 is read by the worker
    assert [token for part in parts for token in tokenizer.encode(part)] == tokenizer.encode(text[1:])
    assert [block.header["first"] for block in blocks] == [True] + [False] * (len(blocks) - 1)


def test_compressed_text_of_great_length_is_not_held_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.txt.zst"
    path.write_bytes(zstandard.compress(b"the same words again and again. " * 2**21))
    assert path.stat().st_size < 10_000
    length, file = 0, open_source([str(path)]).files[0]
    tracemalloc.start()
    with reading.open_file(file) as stream:
        while part := stream.read(2**20):
            length += len(part)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert length == 2**26
    assert peak < 2**25


# --- documents that take much memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_large_documents_are_announced_before_they_are_read(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 2**16)
    monkeypatch.setattr(reading, "LARGE_DOCUMENT_BYTES", 2**20)
    texts = ["small", os.urandom(2**20).hex()]
    path = tmp_path / f"x.{ending}"
    if ending == "parquet":
        write_table(path, texts)
    else:
        data = write_lines(tmp_path / "lines", texts).read_bytes()
        path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    heard: list[str] = []
    blocks = open_source([str(path)]).blocks(Position(), find_cut=FIND_CUT, notice=heard.append)
    large = next(block for block in blocks if len(block.payload) > 2**20)
    assert len(heard) == 1
    assert "reading it takes up to" in heard[0] or "reading one takes up to" in heard[0]
    if ending != "parquet":
        assert f"x.{ending} line 2 has 2 MiB" in heard[0]
    assert [text for text, _ in documents(large, Counts())][-1] == texts[1]


def test_rows_of_very_different_sizes_come_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three large documents side by side among small ones are never in memory together."""
    monkeypatch.setattr(reading, "BLOCK_BYTES", 2**16)
    monkeypatch.setattr(reading, "LARGE_DOCUMENT_BYTES", 2**20)
    texts = [character * 2**19 for character in "abc"] + [f"small {number}" for number in range(2000)]
    for dictionary in (True, False):
        source = open_source([str(write_table(tmp_path / f"{dictionary}.parquet", texts, use_dictionary=dictionary))])
        blocks = list(source.blocks(Position(), find_cut=FIND_CUT, notice=print))
        assert texts_of(blocks) == texts
        assert max(len(block.payload) for block in blocks) < 2**19 + 2**17
