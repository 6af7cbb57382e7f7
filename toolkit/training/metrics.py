"""Rows of numbers and texts -> metrics.jsonl, samples.jsonl and ledger.jsonl in the run folder.

Guarantees: a row is one line of strict JSON, written with one system call, so that a killed process leaves at most its
last line torn; floats come back as the same floats; `sync` makes everything so far survive a power cut; `truncate_after`
brings the three files back to a checkpoint, each as a whole, and puts damaged lines aside instead of losing them in
silence. A changed digit counts as damage too: the checksum of every row is in `.rows.crc32` before the row is in its
log. A number that JSON does not have is written as the string "NaN", "Infinity" or "-Infinity"; `read_rows` turns those
back. Only the main process has a `RunLog`. It does not know W&B: `wandb_mirror` sends the same rows there.
"""

import contextlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from toolkit.disk import replace_file, sync_folder
from toolkit.errors import UserError, describe_os_error
from toolkit.failpoint import failpoint
from toolkit.redact import redact
from toolkit.training.files import parse_json, set_aside

LogName = Literal["metrics", "samples", "ledger"]
LOG_NAMES: tuple[LogName, ...] = ("metrics", "samples", "ledger")

# One line a row, of all three logs: the row's crc32, then that text's own, so that damage to either side shows.
# Without this file, with damage in it, or with lines of it lost, rows are checked as JSON only, and that is said.
CHECKSUMS = ".rows.crc32"

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
# Keys whose value is text: a model may well have written "NaN".
_TEXT_KEYS = ("prompt", "text")


class RunLog:
    """The three logs of a run, open for appending; a file is created by its first row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, _AppendFile] = {}

    def append(self, name: LogName, row: Mapping[str, Any]) -> None:
        """Adds one row, which must hold an integer `step`, at the end of a log and hands it to the operating system.

        Raises: UserError if the row cannot be written (disk full, file or folder gone); the log then ends as before.
        """
        assert type(row.get("step")) is int, f"a row of {name} needs an integer step: {row}"
        line = encode_row(redact(row) if name == "samples" else row)  # a prompt may hold a secret
        failpoint(f"{name}.append")
        checksums, checksum = self._file(self.folder / CHECKSUMS), _checksum_line(line)
        checksums.append(checksum)
        try:
            failpoint(f"{name}.checked")
            self._file(log_path(self.folder, name)).append(line)
        except (UserError, OSError):
            checksums.take_back(checksum)  # or the next start would miss a row that never was
            raise

    def sync(self) -> None:
        """Returns when every row appended so far is on the disk: to be called before a checkpoint is committed.

        Raises: UserError if the disk refuses.
        """
        failpoint("metrics.sync")
        for file in self._files.values():
            file.sync()

    def last_step(self) -> int:
        """The highest step that any log mentions, 0 if there is none: how far a run had come before it was cut off."""
        return max((row["step"] for name in LOG_NAMES for row in read_rows(log_path(self.folder, name))), default=0)

    def truncate_after(
        self,
        step: int,
        *,
        first: int | None = None,
        again: Callable[[LogName, Mapping[str, Any]], bool] | None = None,
    ) -> list[str]:
        """Drops the rows of later steps from all three logs and puts damaged lines aside; returns what to tell the user.

        A damaged line (torn by a kill, changed, not JSON, without a step) moves to `<log>.damaged`, whatever its step
        was. Each log is replaced as a whole or not at all, and one that needs no change is not touched. `again` names
        further rows to drop, because they will be written again. With `first`, the first step of the run, steps without
        a row of metrics or ledger are named: nothing can bring those rows back.

        Raises: UserError if a log cannot be read or replaced.
        """
        self.close()
        say = [
            f"{path.name} was not a file: it is {set_aside(path).name} now"
            for path in (*(log_path(self.folder, name) for name in LOG_NAMES), self.folder / CHECKSUMS)
            if _is_no_file(path)
        ]
        known = _known_checksums(self.folder)
        say += _rows_gone(self.folder, known)
        kept: list[_Line] = []
        for name in LOG_NAMES:
            lines, said = _truncate(
                log_path(self.folder, name), step, known, again=partial(again, name) if again else None
            )
            kept += lines
            say += said
            if first is not None and name != "samples":
                missing = _ranges(set(range(first, step + 1)) - {line.step for line in lines})
                say += [f"{name}.jsonl: the rows of step {missing} are missing"] if missing else []
        if known is None and kept:
            say.append(f"{CHECKSUMS} is missing or damaged: what is there was checked as JSON only; written anew")
        failpoint("metrics.truncated")
        checksums = [_checksum_line(line.data) for line in kept]
        if sorted(checksums) != sorted(_read(self.folder / CHECKSUMS).splitlines(keepends=True)):
            _replace(self.folder / CHECKSUMS, b"".join(checksums))
        return say

    def close(self) -> None:
        """Closes the files; a later row opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file(self, path: Path) -> "_AppendFile":
        if path not in self._files:
            self._files[path] = _AppendFile(path)
        return self._files[path]


def log_path(folder: Path, name: LogName) -> Path:
    """Where a log lies in its run folder."""
    return folder / f"{name}.jsonl"


def encode_row(row: Mapping[str, Any]) -> bytes:
    """A row as one line of strict JSON with its newline."""
    return json.dumps(_to_json(row), allow_nan=False, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The intact rows of a log in file order, with NaN and infinities as floats; damaged lines are left out.

    Raises: UserError if the file cannot be read. A missing file has no rows.
    """
    for line in _read_lines(path, _known_checksums(path.parent)):
        if line.row is not None:
            yield _from_json(line.row)


def damaged_lines(path: Path) -> list[int]:
    """The numbers, counted from 1, of the lines of a log that `read_rows` leaves out."""
    return [line.number for line in _read_lines(path, _known_checksums(path.parent)) if line.row is None]


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return value


def _from_json(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _NON_FINITE[value] if isinstance(value, str) and value in _NON_FINITE and key not in _TEXT_KEYS else value
        for key, value in row.items()
    }


class _AppendFile:
    """One log open for appending: whole lines or nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            created = not path.exists()
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if created:
                sync_folder(path.parent)
            self._end = os.fstat(self._fd).st_size
            if self._end and os.pread(self._fd, 1, self._end - 1) != b"\n":
                self._write(b"\n")  # a torn last line stays a line of its own
        except OSError as error:
            raise _cannot_write(path, error) from None

    def append(self, line: bytes) -> None:
        try:
            if not os.path.samestat(os.fstat(self._fd), self.path.stat()):
                raise UserError(
                    f"{self.path} was replaced while the run was writing to it; let only one program write it"
                )
            self._write(line)
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def _write(self, data: bytes) -> None:
        try:
            written = 0
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError:
            os.ftruncate(self._fd, self._end)  # take back half a line; shrinking needs no space
            raise
        self._end += len(data)

    def take_back(self, line: bytes) -> None:
        """Removes the last line; shrinking needs no space."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, self._end - len(line))
            self._end -= len(line)

    def sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def close(self) -> None:
        os.close(self._fd)


@dataclass(frozen=True, slots=True)
class _Line:
    number: int  # counted from 1
    data: bytes  # as it stands in the file, with its newline
    row: dict[str, Any] | None  # None: damaged

    @property
    def step(self) -> int | None:
        return None if self.row is None else self.row["step"]


def _rows_gone(folder: Path, known: set[bytes] | None) -> list[str]:
    """One line if rows were written that are in no log, not even as a damaged line.

    One may be missing: who dies between a row's checksum and the row leaves the first alone.
    """
    lines = [line for name in LOG_NAMES for line in _read_lines(log_path(folder, name), known)]
    found = {_crc(line.data.removesuffix(b"\n")) for line in lines if line.row is not None}
    gone = len((known or set()) - found) - sum(line.row is None for line in lines)
    return [f"{gone} rows that were written are in none of {', '.join(LOG_NAMES)} any more"] if gone > 1 else []


def _read_lines(path: Path, known: set[bytes] | None) -> Iterator[_Line]:
    # Not splitlines(): a damaged byte may be a carriage return, and text may hold other line separators.
    *lines, torn = _read(path).split(b"\n")
    for number, line in enumerate(lines, 1):
        yield _Line(number, line + b"\n", _parse(line) if known is None or _crc(line) in known else None)
    if torn:
        yield _Line(len(lines) + 1, torn, None)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line, where="row")
    except UserError:
        return None
    return row if type(row.get("step")) is int and row["step"] >= 0 else None


def _crc(data: bytes) -> bytes:
    return b"%08x" % zlib.crc32(data)


def _checksum_line(line: bytes) -> bytes:
    crc = _crc(line.removesuffix(b"\n"))
    return crc + _crc(crc) + b"\n"


def _known_checksums(folder: Path) -> set[bytes] | None:
    """The checksums of all rows that were ever written; None if they are not all known, so that nothing follows.

    A row whose checksum is not there was changed, and then the checksum that it had belongs to no row; where there are
    fewer of those than rows without a checksum, it is checksums that were lost.
    """
    *lines, _ = _read(folder / CHECKSUMS).split(b"\n")  # the last may be torn: then its row was not written
    if not lines or any(_crc(line[:8]) != line[8:] for line in lines):
        return None
    known = {line[:8] for line in lines}
    rows = [(_crc(line), line) for name in LOG_NAMES for line in _read(log_path(folder, name)).split(b"\n")[:-1]]
    strangers = sum(crc not in known and _parse(line) is not None for crc, line in rows)
    return known if strangers <= len(known.difference(crc for crc, _ in rows)) else None


def _is_no_file(path: Path) -> bool:
    """Whether something else than a file has this name: it holds no rows, and `truncate_after` puts it aside."""
    return path.exists() and not path.is_file()


def _read(path: Path) -> bytes:
    try:
        return b"" if _is_no_file(path) else path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"cannot read {describe_os_error(error)}") from None


def _truncate(
    path: Path, step: int, known: set[bytes] | None, *, again: Callable[[Mapping[str, Any]], bool] | None
) -> tuple[list[_Line], list[str]]:
    """Brings one log back to a step; returns the lines that stay and what to tell the user."""
    lines = list(_read_lines(path, known))
    damaged = [line for line in lines if line.row is None]
    kept = [
        line for line in lines if line.row is not None and line.row["step"] <= step and not (again and again(line.row))
    ]
    dropped = [line.step for line in lines if line.step is not None and line.step > step]
    say = []
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        moved = b"".join(line.data.rstrip(b"\n") + b"\n" for line in damaged)
        before = _read(aside)
        if not before.endswith(moved):  # a start that was cut off here may have moved them already
            _replace(aside, before + moved)
        numbers = ", ".join(str(line.number) for line in damaged[:10]) + (", ..." if len(damaged) > 10 else "")
        say.append(f"{path.name}: {_count(damaged, 'damaged line')} (line {numbers}) moved to {aside.name}")
    if dropped:
        say.append(
            f"{path.name}: {_count(dropped, 'row')} beyond step {step} dropped (up to step {max(dropped)}, done again now)"
        )
    if len(kept) < len(lines):
        failpoint("metrics.truncate")
        _replace(path, b"".join(line.data for line in kept))
    return kept, say


def _ranges(numbers: set[int]) -> str:
    """The numbers as words: "3", "1 to 6 and 9"."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    words = [str(first) if first == last else f"{first} to {last}" for first, last in ranges[:10]]
    return " and ".join(words) + (" and others" if len(ranges) > 10 else "")


def _count(things: list[Any], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _replace(path: Path, data: bytes) -> None:
    try:
        replace_file(path, data)
    except OSError as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError) -> UserError:
    named = OSError(error.errno, error.strerror or str(error), str(path))
    return UserError(f"cannot write {describe_os_error(named)}")
