"""A run's folder -> its identity, recipe, status and lock.

run.json (one id for life, and a record of every start), recipe.json (the resolved settings), status.json (running,
finished, preempted or failed) and run.lock. Guarantees: one process at a time holds a folder, and its death frees it;
each file is replaced as a whole and durably; a run.json or recipe.json that is damaged or was edited is found and
rebuilt from the copy in the newest checkpoint, aloud; a start with other settings than may change is refused. Secrets
are left out of everything that is written here. Only the main process uses this module.
"""

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import shlex
import socket
import stat
import string
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from toolkit.config import MAY_CHANGE_ON_RESUME, PATHS, TrainConfig, differences, from_dict, to_dict
from toolkit.disk import replace_file, sync_folder
from toolkit.errors import UserError, describe_os_error
from toolkit.failpoint import failpoint
from toolkit.redact import redact
from toolkit.training.checkpoint import (
    Loaded,
    Resolved,
    clean_leftovers,
    load_newest,
    read_extra,
    read_manifest,
)
from toolkit.training.files import (
    DamagedFileError,
    is_as_sealed,
    parse_json,
    read_bounded,
    render_json,
    sealed,
    set_aside,
)

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
RUN, RECIPE, STATUS, LOCK, CHECKPOINTS = "run.json", "recipe.json", "status.json", "run.lock", "checkpoints"
ID_CHARACTERS = 10  # lower-case letters and digits: 3.6e15 ids, and W&B takes it as it is
MAX_STARTS = 1000  # records in run.json; a run that crashes at every start must not fill the disk with them

Status = Literal["running", "finished", "preempted", "failed"]

# Every point at which opening a folder can be interrupted, in the order in which a start passes them.
OPEN_PHASES = (
    "run_folder.locked",
    "run_folder.resolved",
    "run_folder.before-run",
    "run_folder.after-run",
    "run_folder.after-recipe",
)


@dataclass(frozen=True)
class Opened:
    """What `open` found: where to resume from, whether the run begins here, and what the user should know."""

    resolved: Resolved
    is_new: bool
    lines: list[str]
    loaded: Loaded | None  # the checkpoint to resume from, as it was read to check it
    branched_from: str | None  # the checkpoint of another run that the first start was told to begin with


# Descriptors of held locks. A forked child (a DataLoader's worker) closes its copy: otherwise a worker that outlives a
# killed process would hold the lock on its behalf.
_held: set[int] = set()


def _close_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


class RunFolder:
    """The folder of one run, locked from the moment this object exists until `close` or the end of the process."""

    def __init__(self, path: Path) -> None:
        """Makes the folder and takes its lock.

        Raises: UserError if another process holds the folder or it cannot be written.
        """
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        self.run: dict[str, Any] = {}
        self.saved_step: int | None = None  # of the newest checkpoint that is complete, for status.json
        self._copies: dict[str, bytes] = {}
        self._start: dict[str, Any] = {}  # this start, as run.json will have it; empty once it has
        self._damaged: list[Path] = []
        self._lines: list[str] = []
        self._lock: int | None = None
        try:
            if not path.is_dir():
                path.mkdir(parents=True)
                sync_folder(path.parent)
            _refuse_strangers_folder(path)
            self._identity = path.stat()
            self._exclusive = self._take_lock()
        except OSError as error:
            raise UserError(f"the run folder {path} cannot be used: {describe_os_error(error)}") from None
        failpoint("run_folder.locked")

    @property
    def run_id(self) -> str:
        """The run's id, the same in every start and in W&B."""
        return str(self.run["id"])

    def open(
        self,
        config: TrainConfig,
        *,
        data_fingerprint: str,
        layout: Mapping[str, Any],
        argv: Sequence[str] = (),
        last_logged_step: int = 0,
    ) -> Opened:
        """Cleans up after a start that died, finds the newest checkpoint, and gets ready to `record` this start.

        `last_logged_step` is how far the logs say that the run has come: steps beyond the checkpoint are done again.
        Raises: UserError if all checkpoints are damaged, or the settings differ in what may not change.
        """
        try:
            self._lines += clean_leftovers(self.checkpoints, alone=self._exclusive)
            resolved, loaded = load_newest(self.checkpoints)
            failpoint("run_folder.resolved")
            self._lines += [f"skipped the damaged checkpoint {name}: {reason}" for name, reason in resolved.skipped]
            self.saved_step = loaded.step if loaded is not None else None
            is_new = resolved.path is None and not (self.path / RUN).exists() and not (self.path / RECIPE).exists()
            recipe = _without_secrets(config)
            self._read_run(resolved.path, is_new=is_new)
            self._put_aside_what_is_no_status()
            if resolved.path is None:
                self._refuse_lost_checkpoints()
                self._tell_other_data(data_fingerprint)
            before = self._read_recipe(resolved.path, is_new=is_new)
            if before is not None and recipe.run.resume_from is None:  # a branch stays one
                recipe = replace(recipe, run=replace(recipe.run, resume_from=before.run.resume_from))
            changed = self._compare(before, recipe)
            resumed_from = None
            if resolved.path is not None:
                manifest = read_manifest(resolved.path)
                resumed_from = manifest["step"]
                self._lines += _layout_changes(manifest["layout"], layout)
            self._copies = {RECIPE: render_json(to_dict(recipe))}
            self._start = {
                "time": _now(),
                "command": shlex.join(argv),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "resumed_from": resumed_from,
                "last_logged_step": last_logged_step,
                "changed": changed,
                "data_fingerprint": data_fingerprint,
                "layout": dict(layout),
                "recipe_sha256": hashlib.sha256(self._copies[RECIPE]).hexdigest(),
            }
        except OSError as error:
            raise UserError(f"the run folder {self.path} cannot be used: {describe_os_error(error)}") from None
        lines, self._lines = self._lines, []
        return Opened(resolved, is_new, lines, loaded, recipe.run.resume_from)

    def record(self) -> None:
        """Adds this start to run.json, then writes recipe.json; both stay in memory for the checkpoints' copies.

        Why not in `open`: a start that is refused for what only later comes to light leaves the run as it was.
        Raises: UserError if the folder cannot be written.
        """
        if not self._start:
            return
        starts = [*self.run["starts"], redact(self._start)]
        self.run = sealed({**self.run, "starts": starts[:1] + starts[1:][-(MAX_STARTS - 1) :]})
        self._copies[RUN] = render_json(self.run)
        self._start = {}
        try:
            for path in filter(os.path.lexists, self._damaged):
                set_aside(path)
            failpoint("run_folder.before-run")
            replace_file(self.path / RUN, self._copies[RUN])
            failpoint("run_folder.after-run")
            replace_file(self.path / RECIPE, self._copies[RECIPE])
            failpoint("run_folder.after-recipe")
        except OSError as error:
            raise UserError(f"the run folder {self.path} cannot be used: {describe_os_error(error)}") from None

    def copies(self) -> dict[str, bytes]:
        """run.json and recipe.json as they should be on disk: every checkpoint carries them."""
        return dict(self._copies)

    def status(self) -> dict[str, Any] | None:
        """What status.json says; None if there is none or it is damaged (the next `set_status` replaces it)."""
        data = _read(self.path / STATUS)
        try:
            return None if data is None else parse_json(data, where=str(self.path / STATUS))
        except UserError:
            return None

    def set_status(self, status: Status, *, step: int, reason: str = "") -> None:
        """Replaces status.json. Raises: OSError if the disk refuses it, UserError if the folder is not this run's any more."""
        self.refuse_replaced()
        values = {
            "schema_version": SCHEMA_VERSION,
            "status": status,
            "step": step,
            "saved_step": self.saved_step,
            "reason": redact(reason),
            "updated": _now(),
        }
        replace_file(self.path / STATUS, render_json(values))

    def refuse_replaced(self) -> None:
        """Raises UserError if another folder has taken the place of the one that this run holds."""
        if self._lock is None:
            return
        try:
            named = self.path.stat()
        except FileNotFoundError:
            return  # whoever needs what has gone with it says so
        if not os.path.samestat(self._identity, named):
            raise UserError(
                f"{self.path} was moved away while the run was writing to it, and another is there now; nothing was changed in it"
            )

    def close(self) -> None:
        """Frees the folder for another process."""
        if self._lock in _held:  # not so in a forked child, which has let go of it already
            _held.discard(self._lock)
            os.close(self._lock)
        self._lock = None

    def _take_lock(self) -> bool:
        """Locks the folder; False where the file system knows no locks, which is said and not fatal."""
        path = self.path / LOCK
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError as error:
            holder = _holder(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                raise UserError(
                    f"the run folder {self.path} is in use by {holder}; wait until that run has ended, stop it, or "
                    f"choose another --run.dir"
                ) from None
            self._lines.append(
                f"{self.path} cannot be locked ({error.strerror}): make sure yourself that no second run uses it (the "
                f"last to open it was {holder})"
            )
            locked = False
        if not _held:
            _register_fork_handler()
        _held.add(descriptor)
        self._lock = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on host {socket.gethostname()} since {_now()}\n".encode(), 0)
        return locked

    def _read_run(self, checkpoint: Path | None, *, is_new: bool) -> None:
        """Sets `self.run` from run.json, from its copy, or (nothing there) to a new identity."""
        path = self.path / RUN
        data = _read(path)
        problem = "is missing" if data is None else _problem_of_run(data)
        if data is not None and problem is None:
            self.run = parse_json(data, where=str(path))
            return
        copy = read_extra(checkpoint, RUN) if checkpoint else None
        if copy is not None and _problem_of_run(copy) is None:
            self._set_aside(path)
            self.run = parse_json(copy, where=str(path))
            self._lines.append(f"{path} {problem}: rebuilt from the copy in {checkpoint}")
            return
        self.run = {
            "schema_version": SCHEMA_VERSION,
            "id": "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(ID_CHARACTERS)),
            "created": _now(),
            "starts": [],
        }
        if not is_new:
            self._set_aside(path)
            self._lines.append(
                f"{path} {problem} and no checkpoint holds a copy: the run gets the new id {self.run['id']}"
            )

    def _read_recipe(self, checkpoint: Path | None, *, is_new: bool) -> TrainConfig | None:
        """The recipe of the start before: recipe.json if it is as it was written, else its copy; None if there is none.

        Why run.json knows its hash: settings that may change make recipe.json differ from the newest checkpoint's copy
        until the next save. Any start's recipe counts, because a start can die between writing the two files.
        """
        path = self.path / RECIPE
        data = _read(path)
        copy = read_extra(checkpoint, RECIPE) if checkpoint else None
        known = {start.get("recipe_sha256") for start in self.run["starts"]}
        if data is not None and (data == copy or hashlib.sha256(data).hexdigest() in known):
            return _parse_recipe(data, path)
        if is_new:
            return None
        problem = "is missing" if data is None else "is damaged or was edited by hand"
        self._set_aside(path)
        if copy is None:
            self._lines.append(
                f"{path} {problem} and no checkpoint holds a copy: written anew from this start's settings"
            )
            return None
        self._lines.append(
            f"{path} {problem}: rebuilt from the copy in {checkpoint} (settings are changed by flags, not in this file)"
        )
        return _parse_recipe(copy, path)

    def _set_aside(self, path: Path) -> None:
        """Marks what is damaged: `record` renames it before it writes the file anew."""
        self._damaged.append(path)

    def _put_aside_what_is_no_status(self) -> None:
        path = self.path / STATUS
        if os.path.lexists(path) and self.status() is None:
            self._lines.append(f"{path} was damaged: it is {set_aside(path).name} now, and written anew")

    def _refuse_lost_checkpoints(self) -> None:
        """Refuses to start a run from step 0 that has had a checkpoint; run.json and status.json remember it."""
        known = [(self.status() or {}).get("saved_step"), *(start.get("resumed_from") for start in self.run["starts"])]
        saved = max((step for step in known if type(step) is int), default=None)
        if saved is not None:
            raise UserError(
                f"{self.path} has had a checkpoint of step {saved} and has none now; put its checkpoints back, or start anew "
                "in another --run.dir"
            )

    def _tell_other_data(self, data_fingerprint: str) -> None:
        """Says where a run that begins anew, for want of a checkpoint, does so with other data than before."""
        before = str(self.run["starts"][-1].get("data_fingerprint", "")) if self.run["starts"] else ""
        if before not in ("", data_fingerprint):
            self._lines.append(
                f"there is no checkpoint yet and the data have changed since the start before (fingerprint {before[:12]} -> "
                f"{data_fingerprint[:12]}): the run begins anew with them"
            )

    def _compare(self, old: TrainConfig | None, new: TrainConfig) -> dict[str, list[Any]]:
        """Settings that differ from the start before and may. Raises: UserError with a table of those that may not."""
        changed = differences(old, new) if old is not None else []
        refused = [row for row in changed if row[0] not in MAY_CHANGE_ON_RESUME]
        if refused:
            rows = [("setting", "this run", "asked for"), *((name, repr(a), repr(b)) for name, a, b in refused)]
            widths = [max(len(row[column]) for row in rows) for column in range(2)]
            table = "\n".join(f"  {name:<{widths[0]}}  {a:<{widths[1]}}  {b}" for name, a, b in rows)
            raise UserError(
                f"{self.path} holds a run with other settings, and these may not change between starts; start with the "
                f"old values, or choose another --run.dir:\n{table}"
            )
        self._lines += [f"changed since the start before: {name} {a!r} -> {b!r}" for name, a, b in changed]
        return {name: [a, b] for name, a, b in changed}


_registered = False


def _register_fork_handler() -> None:
    global _registered
    if not _registered:  # it cannot be taken back, so once per process
        os.register_at_fork(after_in_child=_close_in_child)
        _registered = True


def _without_secrets(config: TrainConfig) -> TrainConfig:
    """The configuration as it is recorded.

    A choice among words holds no secret, and neither does a path here: the value of a variable such as DB_PASSWORD=postgres
    may stand in both.
    """
    values = to_dict(config)
    for section, fields in values.items():
        hints = typing.get_type_hints(type(getattr(config, section)))
        for name, value in fields.items():
            if Literal in (typing.get_origin(hints[name]), *map(typing.get_origin, typing.get_args(hints[name]))):
                continue
            if f"{section}.{name}" not in PATHS:
                fields[name] = redact(value)
            elif isinstance(value, list):
                fields[name] = [_redact_path(item) for item in value]
            elif value is not None:
                fields[name] = _redact_path(value)
    return from_dict(TrainConfig, values, where=RECIPE)


def _redact_path(path: str) -> str:
    return typing.cast(str, redact(path, environ=None if "://" in path else {}))


def _read(path: Path) -> bytes | None:
    """The file's content; None if it is missing, nothing if it cannot be one of ours (a folder, a link, too large)."""
    if not os.path.lexists(path):
        return None
    try:
        return read_bounded(path)
    except DamagedFileError:
        return b""


def _problem_of_run(data: bytes) -> str | None:
    try:
        run = parse_json(data, where=RUN)
    except UserError:
        return "is not valid JSON"
    if not is_as_sealed(run, data):
        return "is damaged or was edited by hand"
    if run.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{RUN} has schema version {str(run.get('schema_version'))[:20]}, this toolkit reads {SCHEMA_VERSION}; use "
            f"the toolkit's version that wrote it"
        )
    run_id, starts = run.get("id"), run.get("starts")
    if not isinstance(run_id, str) or not isinstance(starts, list) or not all(isinstance(s, dict) for s in starts):
        return "lacks the run's id or its starts"
    return None


def _parse_recipe(data: bytes, path: Path) -> TrainConfig:
    return from_dict(TrainConfig, parse_json(data, where=str(path)), where=str(path))


def _layout_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line on what differs from the layout that saved the checkpoint: bits are promised for an equal one only."""
    before, after = _flat(old), _flat(new)
    changes = [
        f"{name} {before.get(name)} -> {after.get(name)}"
        for name in sorted(set(before) | set(after))
        if before.get(name) != after.get(name)
    ]
    if not changes:
        return []
    return [
        f"the checkpoint was saved with another layout ({', '.join(changes)}): the same samples follow, but losses equal "
        f"an uninterrupted run's only within rounding, not to the bit"
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _holder(descriptor: int) -> str:
    try:
        text = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
    except OSError:
        text = ""
    return "".join(c for c in text if c.isprintable()) or "another process"


def _refuse_strangers_folder(path: Path) -> None:
    """Refuses a folder of another user that anybody may write: what lies in it need not come from that user."""
    found = path.stat()
    if found.st_uid != os.geteuid() and found.st_mode & stat.S_IWOTH:
        raise UserError(
            f"the run folder {path} belongs to user {found.st_uid} and everybody may write to it; take that right away "
            f"(chmod o-w {shlex.quote(str(path))}) or choose another --run.dir"
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
