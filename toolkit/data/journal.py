"""How far a `prepare` got, on disk in `.prepare/` beside the shards, so that it goes on after a kill at any moment.

`journal.json` (replaced as a whole) says up to which position of the source the shards on disk reach; `files.json` what
the files of the source were when the work began (a file has changed if its size or modification time has; on the Hub, its
hash); `lock` keeps a second `prepare` out. Nothing of it belongs to the data set: a copy without `.prepare/` is complete.
"""

import contextlib
import errno
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from toolkit.data.documents import Counts, Position
from toolkit.data.manifest import SPLITS, ShardInfo, Split
from toolkit.data.sources import Source
from toolkit.disk import replace_file
from toolkit.errors import UserError, describe_os_error
from toolkit.failpoint import failpoint

STATE_FOLDER = ".prepare"
JOURNAL_FILE = "journal.json"
FILES_FILE = "files.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenShard:
    """The unfinished shard of a split: what of it is safely on disk."""

    tokens: int
    documents: int
    utf8_bytes: int
    sha256: str = ""  # of `ShardWriter`; empty: written by an older version, nothing to compare


@dataclass(kw_only=True, slots=True)
class Journal:
    """What has been done, and with which settings."""

    settings: dict[str, Any]
    position: Position = field(default_factory=Position)
    source_bytes: int = 0
    counts: Counts = field(default_factory=Counts)
    shards: dict[Split, list[ShardInfo]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    open_shards: dict[Split, OpenShard] = field(default_factory=dict)
    read_all: bool = False
    kept_tokens: int | None = None  # of the train split, once its end has become the validation split

    @property
    def tokens(self) -> int:
        """Tokens that are safely on disk."""
        finished = sum(info.tokens for split in SPLITS for info in self.shards[split])
        return finished + sum(shard.tokens for shard in self.open_shards.values())

    @classmethod
    def load(cls, out: Path) -> "Journal | None":
        """The journal of unfinished work in `out`, or None.

        Raises: UserError if the file is not one that this version wrote.
        """
        path = out / STATE_FOLDER / JOURNAL_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            shards = {split: [ShardInfo(**entry) for entry in values["shards"][split]] for split in SPLITS}
            open_shards = {
                split: OpenShard(**values["open_shards"][split]) for split in SPLITS if split in values["open_shards"]
            }
            typed = {
                "position": Position(**values["position"]),
                "counts": Counts(**values["counts"]),
                "shards": shards,
                "open_shards": open_shards,
            }
            return cls(**(values | typed))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete {out} and run again") from None

    def save(self, out: Path) -> None:
        """Replaces the journal on disk."""
        values = {
            "settings": self.settings,
            "position": asdict(self.position),
            "source_bytes": self.source_bytes,
            "counts": self.counts.to_dict(),
            "shards": {split: [asdict(info) for info in self.shards[split]] for split in SPLITS},
            "open_shards": {split: asdict(shard) for split, shard in self.open_shards.items()},
            "read_all": self.read_all,
            "kept_tokens": self.kept_tokens,
        }
        failpoint("prepare.before-journal")
        replace_file(out / STATE_FOLDER / JOURNAL_FILE, json.dumps(values).encode())
        failpoint("prepare.after-journal")


def make_folder(out: Path) -> None:
    """Makes `out` and its `.prepare/`.

    Raises: UserError if it is a file, or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder for the shards with --out")
    try:
        (out / STATE_FOLDER).mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(out))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {describe_os_error(error)}") from None


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps a second `prepare` out of the folder; the lock goes with the process (none on Windows)."""
    with (out / STATE_FOLDER / "lock").open("a") as file:
        try:
            import fcntl
        except ImportError:
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another `toolkit prepare` is at work in {out}; wait for it or use another --out"
            ) from None
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): make sure yourself that no second `toolkit prepare` uses it",
                out,
                error.strerror,
            )
        yield


def begin(out: Path, settings: dict[str, Any], source: Source) -> Journal:
    """A new journal in a folder that holds no shards yet.

    Raises: UserError if shards lie there.
    """
    foreign = sorted(path.name for path in out.glob("*.bin"))
    if foreign:
        raise UserError(
            f"{out} holds {foreign[0]} but neither a manifest nor work of `toolkit prepare` to continue; use an empty "
            f"folder, or, for llm.c shards, `toolkit adopt {out}`"
        )
    replace_file(out / STATE_FOLDER / FILES_FILE, json.dumps(_stamps(source)).encode())
    journal = Journal(settings=settings)
    journal.save(out)
    return journal


def _stamps(source: Source) -> dict[str, list[list[Any]]]:
    """Size and stamp of the files of each name, in their order; several folders may hold a file of one name."""
    stamps: dict[str, list[list[Any]]] = {}
    for file in source.files:
        stamps.setdefault(file.name, []).append([file.size, file.stamp])
    return stamps


def _recorded_stamps(out: Path, *, finished: bool) -> dict[str, Any] | None:
    """What `files.json` says; None: it is not there, as in a copy of a finished set without its working notes.

    Raises: UserError if it is damaged, or gone while the work is unfinished.
    """
    path = out / STATE_FOLDER / FILES_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{type(values).__name__}, not a JSON object")
        return values
    except FileNotFoundError:
        if finished:
            return None
        problem = "is gone"
    except ValueError as error:
        problem = f"is damaged ({error})"
    fix = "delete it if the source is as it was" if finished else f"delete {out} and run again"
    raise UserError(f"{path} {problem}, so that a changed source would not be noticed; {fix}")


def refuse_changed_files(out: Path, source: Source, *, finished: bool) -> None:
    """Raises UserError if the files of the source are not as they were when the work in `out` began."""
    before = _recorded_stamps(out, finished=finished)
    if before is None:
        return
    now = _stamps(source)
    changed = [
        f"{name} changed"
        for name in before
        if name in now and before[name] not in (now[name], now[name][-1])  # older versions kept the last one of a name
    ]
    gone, new = (
        [f"{name} is gone" for name in before if name not in now],
        [f"{name} is new" for name in now if name not in before],
    )
    if changed or gone or new:
        raise UserError(
            f"the source is not the one that {out} was begun with: {', '.join([*changed, *gone, *new][:3])}; put it back "
            f"as it was, or use another --out, or delete {out} to start over"
        )


def refuse_other_settings(out: Path, old: Mapping[str, Any], new: Mapping[str, Any], *, state: str) -> None:
    """Raises UserError if the settings differ, naming which."""
    differences = list(_differences(old, new))
    if differences:
        raise UserError(
            f"{out} holds {state} data set with other settings: {'; '.join(differences[:5])}; use another --out, or "
            f"delete {out}"
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{prefix}{name}.")
        elif before != now:
            yield f"{prefix}{name} was {before!r}, is now {now!r}"
