"""Rows of numbers and texts -> metrics.jsonl, samples.jsonl and ledger.jsonl in the run folder.

Guarantees: a row is one line of strict JSON, written with one system call, so that a killed process leaves at most its
last line torn; floats come back as the same floats; `sync` makes everything so far survive a power cut; `truncate_after`
brings the three files back to a checkpoint, atomically, and puts damaged lines aside instead of losing them in silence.
A number that JSON does not have is written as the string "NaN", "Infinity" or "-Infinity"; `read_rows` turns those back.
Only the main process has a `RunLog`. It does not know W&B: `wandb_mirror` sends the same rows there.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from toolkit.errors import UserError, describe_os_error
from toolkit.failpoint import failpoint
from toolkit.training.redact import redact

logger = logging.getLogger(__name__)

LogName = Literal["metrics", "samples", "ledger"]
LOG_NAMES: tuple[LogName, ...] = ("metrics", "samples", "ledger")

# Evaluation rows are the rows of metrics.jsonl with this key; every other row is a training row.
EVALUATION_KEY = "loss/val"

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunLog:
    """The three logs of a run, open for appending; a file is created by its first row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[LogName, _AppendFile] = {}

    def append(self, name: LogName, row: Mapping[str, Any]) -> None:
        """Adds one row, which must hold an integer `step`, at the end of a log and hands it to the operating system.

        Raises: UserError if the row cannot be written (disk full, file or folder gone); the file then ends as before.
        """
        assert type(row.get("step")) is int, f"a row of {name} needs an integer step: {row}"
        failpoint(f"{name}.append")
        if name not in self._files:
            self._files[name] = _AppendFile(log_path(self.folder, name))
        self._files[name].append(encode_row(redact(row) if name == "samples" else row))  # a prompt may hold a secret

    def sync(self) -> None:
        """Returns when every row appended so far is on the disk: to be called before a checkpoint is committed.

        Raises: UserError if the disk refuses.
        """
        failpoint("metrics.sync")
        for file in self._files.values():
            file.sync()

    def last_step(self) -> int:
        """The highest step that any log mentions, 0 if there is none: how far a run had come before it was cut off."""
        return max(
            (line.step or 0 for name in LOG_NAMES for line in _read_lines(log_path(self.folder, name))), default=0
        )

    def truncate_after(self, step: int) -> list[str]:
        """Drops the rows of later steps from all three logs and puts damaged lines aside; returns what to tell the user.

        A damaged line (torn by a kill, not JSON, without a step) moves to `<log>.damaged`, whatever step it was. Each
        log is replaced as a whole or not at all, and one that needs no change is not touched.

        Raises: UserError if a log cannot be read or replaced.
        """
        self.close()
        return [line for name in LOG_NAMES for line in _truncate(log_path(self.folder, name), step)]

    def close(self) -> None:
        """Closes the files; a later row opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()


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
    for line in _read_lines(path):
        if line.row is not None:
            yield _from_json(line.row)


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return value


def _from_json(row: dict[str, Any]) -> dict[str, Any]:
    # Texts of samples stay texts: a model may well have written "NaN".
    return {
        key: _NON_FINITE[value]
        if isinstance(value, str) and value in _NON_FINITE and key not in ("prompt", "text")
        else value
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
                _sync_folder(path.parent)
            self._end = os.fstat(self._fd).st_size
            if self._end and os.pread(self._fd, 1, self._end - 1) != b"\n":
                self._write(b"\n")  # a torn last line stays a line of its own
        except OSError as error:
            raise _cannot_write(path, error) from None

    def append(self, line: bytes) -> None:
        try:
            here, named = os.fstat(self._fd), self.path.stat()
            if (here.st_dev, here.st_ino) != (named.st_dev, named.st_ino):
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


def _read_lines(path: Path) -> Iterator[_Line]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot read {describe_os_error(error)}") from None
    # Not splitlines(): a damaged byte may be a carriage return, and text may hold other line separators.
    *lines, torn = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        yield _Line(number, line + b"\n", _parse(line))
    if torn:
        yield _Line(len(lines) + 1, torn, None)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int and row["step"] >= 0 else None


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _truncate(path: Path, step: int) -> list[str]:
    lines = list(_read_lines(path))
    damaged = [line for line in lines if line.row is None]
    dropped = [line for line in lines if line.step is not None and line.step > step]
    if not damaged and not dropped:
        return []
    say = []
    try:
        if damaged:
            aside = path.with_name(f"{path.name}.damaged")
            _put_aside(aside, b"".join(line.data.rstrip(b"\n") + b"\n" for line in damaged))
            numbers = ", ".join(str(line.number) for line in damaged[:10]) + (", ..." if len(damaged) > 10 else "")
            say.append(
                f"{path.name}: {len(damaged)} damaged line{'s' * (len(damaged) > 1)} (line {numbers}) moved to {aside.name}"
            )
        failpoint("metrics.truncate")
        _replace(path, b"".join(line.data for line in lines if line.step is not None and line.step <= step))
    except OSError as error:
        raise _cannot_write(path, error) from None
    if dropped:
        steps = [line.step for line in dropped if line.step is not None]
        say.append(
            f"{path.name}: {len(dropped)} row{'s' * (len(dropped) > 1)} beyond step {step} dropped "
            f"(steps {min(steps)} to {max(steps)} are done again)"
        )
    return say


def _put_aside(path: Path, data: bytes) -> None:
    """Adds damaged lines to the file of earlier ones, unless a start that was cut off has just added the same ones."""
    before = path.read_bytes() if path.exists() else b""
    if not before.endswith(data):
        _replace(path, before + data)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        temporary.chmod(path.stat().st_mode & 0o7777)
    failpoint("metrics.before-rename")
    temporary.rename(path)
    _sync_folder(path.parent)
    failpoint("metrics.after-rename")


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _cannot_write(path: Path, error: OSError) -> UserError:
    named = OSError(error.errno, error.strerror or str(error), str(path))
    return UserError(f"cannot write {describe_os_error(named)}")
