"""Tensors and state of a run -> a checkpoint folder that is complete or absent -> the same tensors and state.

A checkpoint is `checkpoints/step-00001000/` with model.safetensors, optimizer.safetensors, config.json, state.json,
small extra files (copies of recipe.json and run.json, the vocabulary), and manifest.json, which is written last and is
the commit record: sizes and sha256 of every other file, and the sha256 of its own canonical content (all keys but
"sha256", sorted, without spaces). Guarantees: training waits only for a copy into buffers kept from the first save; a
background thread writes the files under a temporary name, fsyncs them, renames the folder, fsyncs its parent and only
then removes older checkpoints, so a process that dies at any moment leaves every earlier checkpoint as it was; reading
checks everything before it returns anything. The checksums catch accidents, not an attacker, who is met by strict
parsing with bounded sizes instead: no pickle, no tensor name used as a path. Only the main process uses this module,
and nothing here knows about other processes.
"""

import hashlib
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from toolkit.config import CheckpointConfig
from toolkit.disk import sync_folder, write_new_file
from toolkit.errors import UserError, describe_os_error
from toolkit.failpoint import failpoint
from toolkit.training.files import (
    MAX_JSON_BYTES,
    DamagedFileError,
    is_as_sealed,
    opened,
    parse_json,
    read_bounded,
    render_json,
    sealed,
    stream_sha256,
)
from toolkit.training.tensor_file import TensorFileImage, read_header, read_tensors, whole_numbers

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MANIFEST, CONFIG, MODEL, OPTIMIZER, STATE = (
    "manifest.json",
    "config.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
)
REQUIRED_FILES = (CONFIG, MODEL, OPTIMIZER, STATE)

# Every point at which a save can be interrupted, in the order in which one save passes them.
SAVE_PHASES = (
    "checkpoint.before-snapshot",
    "checkpoint.after-snapshot",
    "checkpoint.before-model",
    "checkpoint.mid-model",
    "checkpoint.after-model",
    "checkpoint.mid-optimizer",
    "checkpoint.after-optimizer",
    "checkpoint.after-state",
    "checkpoint.before-manifest",
    "checkpoint.after-manifest",
    "checkpoint.before-rename",
    "checkpoint.after-rename",
    "checkpoint.before-prune",
    "checkpoint.mid-prune",  # passed once for each folder that is removed
    "checkpoint.after-prune",
)
REPLACE_PHASE = "checkpoint.mid-replace"  # only where a different, valid checkpoint of the same step is replaced
RESUME_PHASES = ("resume.clean", "resume.resolve", "resume.loaded")

FREE_SPACE_FACTOR = 1.2  # a save starts only with this much more space than it needs [factor]
MAX_FILES = 64  # in one manifest
MAX_EXTRA_BYTES = 256 << 20  # of an extra file; the largest is a vocabulary

_STEP_NAME = re.compile(r"step-([0-9]{8,15})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_LEFTOVER = re.compile(r"\.(tmp|del|old)-(step-[0-9]{8,15})-([0-9]+)-[0-9a-f]{8}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")


@dataclass(frozen=True)
class Resolved:
    """The newest checkpoint that passed every check, and the newer ones that did not, each with the reason."""

    path: Path | None  # None: there is no checkpoint at all
    skipped: list[tuple[str, str]]  # (folder name, reason), newest first


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory, every check passed. The tensors are on the CPU and belong to the caller."""

    path: Path
    step: int
    tokens: int
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]  # "<parameter name>|<key>" -> moment
    state: dict[str, Any]  # what `snapshot` was given, with "step" and "tokens"
    config_json: dict[str, Any]
    manifest: dict[str, Any]


def step_name(step: int) -> str:
    """The folder name of a step's checkpoint: step-00001000."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder name; None for any other name."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


# --- Writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Snapshot:
    step: int
    facts: dict[str, Any]
    images: dict[str, TensorFileImage]
    small: dict[str, bytes]

    @property
    def size(self) -> int:
        return sum(image.size for image in self.images.values()) + sum(len(data) for data in self.small.values())


class CheckpointWriter:
    """Saves checkpoints into one folder and keeps those that the retention rules name; at most one save in flight.

    Use: `snapshot(...)`, then `write(blocking=False)`; `raise_error()` at each step boundary; `wait()` at the end. The
    thread is no daemon, so a process that ends by itself finishes the save first.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, resolved: Resolved | None = None) -> None:
        self.folder = folder
        self.config = config
        self.damaged: set[str] = set()  # folder names that resuming skipped: they do not count as kept
        if resolved is not None:
            self.resumed(resolved)
        self._images: dict[str, TensorFileImage] = {}
        self._snapshot: _Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def resumed(self, resolved: Resolved) -> None:
        """Tells the writer what resuming found, so that a damaged checkpoint never displaces a valid one."""
        self.damaged = {name for name, _ in resolved.skipped}

    def snapshot(
        self,
        step: int,
        *,
        model: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],
        config_json: Mapping[str, Any],
        manifest: Mapping[str, Any],
        validation_loss: float | None = None,
        extra: Mapping[str, bytes] | None = None,
    ) -> None:
        """Copies everything that a checkpoint holds; training may go on as soon as this returns.

        Waits for the save in flight first. `manifest` holds tokens, data_fingerprint, layout (what equal bits depend
        on, library versions included) and any other facts; `validation_loss` is the loss of exactly these weights (for
        keep_best), None if it was not measured. `extra` are small files to keep beside the others.

        Raises: UserError if the save before failed; ValueError for a number that JSON does not have.
        """
        self.wait()
        self.raise_error()
        failpoint("checkpoint.before-snapshot")
        missing = {"tokens", "data_fingerprint", "layout"} - set(manifest)
        assert not missing, f"the manifest lacks {sorted(missing)}"
        loss = None if validation_loss is None else float(validation_loss)
        facts = {**manifest, "schema_version": SCHEMA_VERSION, "step": step, "validation_loss": loss}
        small = {
            CONFIG: render_json(config_json),
            STATE: render_json({**state, "schema_version": SCHEMA_VERSION, "step": step, "tokens": manifest["tokens"]}),
            **(extra or {}),
        }
        assert all(_FILE_NAME.fullmatch(name) for name in small), f"file names {sorted(small)}"
        assert not set(extra or {}) & {MANIFEST, *REQUIRED_FILES}, f"extra files {sorted(extra or {})}"
        render_json(facts)  # what cannot be written is our mistake: it is found here and not in the thread
        images = {MODEL: self._image(MODEL, model), OPTIMIZER: self._image(OPTIMIZER, optimizer)}
        if any(tensor.device.type != "cpu" for tensors in (model, optimizer) for tensor in tensors.values()):
            torch.accelerator.synchronize()
        self._snapshot = _Snapshot(step, facts, images, small)
        failpoint("checkpoint.after-snapshot")

    def _image(self, name: str, tensors: Mapping[str, torch.Tensor]) -> TensorFileImage:
        """The kept buffer of one file, filled. Why kept: a fresh 1.5 GiB copy takes 20 times as long (page faults)."""
        image = self._images.get(name)
        if image is None or not image.fits(tensors):
            self._images.pop(name, None)  # freed before the new one is made
            image = self._images[name] = TensorFileImage(tensors)
        image.fill(tensors)
        return image

    def write(self, *, blocking: bool) -> None:
        """Writes the snapshot: in a thread, or (blocking) before this returns.

        Raises: UserError if a blocking write failed; the checkpoints before it are intact.
        """
        snapshot, self._snapshot = self._snapshot, None
        assert snapshot is not None, "write() without snapshot()"
        assert self._thread is None, "snapshot() waits for the save in flight"
        if blocking:
            self._save(snapshot)
            self.raise_error()
        else:
            self._thread = threading.Thread(target=self._save, args=(snapshot,), name=f"save-{snapshot.step}")
            self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def error(self) -> Exception | None:
        """What the last save failed with, until `raise_error` raised it; for telling the other processes."""
        return self._error

    def wait(self) -> None:
        """Returns when no save is in flight; its error, if any, is kept for `raise_error`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def raise_error(self) -> None:
        """Raises, once, what a save in the background failed with: UserError for anything of the operating system."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _save(self, snapshot: _Snapshot) -> None:
        try:
            _write_checkpoint(self.folder, snapshot)
            self._prune(snapshot.step)
        except OSError as error:
            self._error = UserError(_describe_failure(error, self.folder, snapshot))
        except Exception as error:
            self._error = error
        if self._error is not None:  # said at once: the boundary at which it is raised may be minutes away
            logger.error("%s", self._error)

    def _prune(self, newest: int) -> None:
        """Removes what retention no longer names. A failure is only warned about: the new checkpoint is complete."""
        try:
            failpoint("checkpoint.before-prune")
            self.damaged.discard(step_name(newest))
            kept = steps_to_keep(self.folder, self.config, newest=newest, damaged=self.damaged)
            for step in sorted(steps_in(self.folder)):
                if step not in kept:
                    _remove(self.folder / step_name(step))
            for path in _leftovers(self.folder, "del"):  # of this process: a removal that failed earlier
                shutil.rmtree(path)
            failpoint("checkpoint.after-prune")
        except OSError as error:
            logger.warning("older checkpoints could not be removed (%s); tried again after the next", error)


class _Hashing(threading.Thread):
    """The size and sha256 of a file that is about to be written, found in a thread of its own.

    Why not a pool: a pool takes no more work once the interpreter has begun to exit, when a save may still be running.
    """

    def __init__(self, pieces: list[memoryview]) -> None:
        super().__init__(name="sha256")
        self.pieces = pieces
        self._digest = hashlib.sha256()
        self.start()

    def run(self) -> None:
        for piece in self.pieces:
            self._digest.update(piece)  # releases the interpreter lock

    def result(self) -> dict[str, Any]:
        """The file's entry in the manifest."""
        self.join()
        return {"size": sum(map(len, self.pieces)), "sha256": self._digest.hexdigest()}


def _write_checkpoint(folder: Path, snapshot: _Snapshot) -> None:
    """Writes one checkpoint folder, complete or not at all; durable when this returns.

    A damaged folder of the same step is renamed aside (`.damaged-step-...`); a valid one with the same weights, moments
    and state is left as it is; a valid one with others (the step was redone after a rewind) is replaced.

    Raises: UserError if the space does not suffice; OSError for whatever the operating system refuses.
    """
    name = step_name(snapshot.step)
    if not folder.is_dir():
        folder.mkdir(parents=True)
        sync_folder(folder.parent)
    _require_space(folder, snapshot)
    temporary = folder / f".tmp-{name}-{_mark()}"
    temporary.mkdir()
    try:
        # The buffers do not change, so hashing runs beside writing; it would take longer than a fast disk does.
        hashes = {file: _Hashing(image.pieces()) for file, image in snapshot.images.items()}
        hashes |= {file: _Hashing([memoryview(data)]) for file, data in snapshot.small.items()}
        failpoint("checkpoint.before-model")
        write_new_file(temporary / MODEL, hashes[MODEL].pieces, half_way="checkpoint.mid-model")
        failpoint("checkpoint.after-model")
        write_new_file(temporary / OPTIMIZER, hashes[OPTIMIZER].pieces, half_way="checkpoint.mid-optimizer")
        failpoint("checkpoint.after-optimizer")
        for file in snapshot.small:
            write_new_file(temporary / file, hashes[file].pieces)
        failpoint("checkpoint.after-state")
        files = {file: hashing.result() for file, hashing in hashes.items()}
        failpoint("checkpoint.before-manifest")
        manifest = sealed({**snapshot.facts, "files": files})
        write_new_file(temporary / MANIFEST, [memoryview(render_json(manifest))])
        sync_folder(temporary)
        failpoint("checkpoint.after-manifest")
        _put_in_place(temporary, folder / name, files)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    failpoint("checkpoint.after-rename")


def _put_in_place(temporary: Path, target: Path, files: Mapping[str, Any]) -> None:
    failpoint("checkpoint.before-rename")
    if not os.path.lexists(target):
        temporary.rename(target)
        sync_folder(target.parent)
        return
    problems = verify_checkpoint(target)
    if problems:
        aside = target.with_name(f".damaged-{target.name}-{_mark()}")
        target.rename(aside)
        logger.warning("%s was damaged (%s) and is now %s", target, problems[0], aside.name)
        temporary.rename(target)
    elif all(read_manifest(target)["files"][file] == files[file] for file in REQUIRED_FILES):
        shutil.rmtree(temporary)  # the same step is there already; only the records of the starts may differ
    else:
        old = target.with_name(f".old-{target.name}-{_mark()}")
        target.rename(old)
        failpoint(REPLACE_PHASE)  # who dies here finds the old one under its name again: see clean_leftovers
        temporary.rename(target)
        sync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(target.parent)


def _require_space(folder: Path, snapshot: _Snapshot) -> None:
    space = os.statvfs(folder)
    free, needed = space.f_bavail * space.f_frsize, int(snapshot.size * FREE_SPACE_FACTOR)
    if free < needed:
        raise UserError(
            f"the checkpoint of step {snapshot.step} needs {needed} bytes ({needed / 2**30:.2f} GiB) in {folder}, "
            f"{free} are free; free some space and start again: the checkpoints before it are intact"
        )


def _describe_failure(error: OSError, folder: Path, snapshot: _Snapshot) -> str:
    try:
        space = os.statvfs(folder)
        free = f", {space.f_bavail * space.f_frsize} are free"
    except OSError:
        free = ""
    return (
        f"the checkpoint of step {snapshot.step} could not be written to {folder}: {describe_os_error(error)}; it needs "
        f"{snapshot.size} bytes ({snapshot.size / 2**30:.2f} GiB){free}; the checkpoints before it are intact"
    )


def _mark() -> str:
    return f"{os.getpid()}-{secrets.token_hex(4)}"


# --- Retention -------------------------------------------------------------------------------------------------------


def steps_in(folder: Path) -> list[int]:
    """The steps of all checkpoint folders, oldest first, by name alone; anything else in the folder is ignored."""
    try:
        with os.scandir(folder) as entries:
            steps = [step_of(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return sorted(step for step in steps if step is not None)


def steps_to_keep(folder: Path, config: CheckpointConfig, *, newest: int, damaged: set[str]) -> set[int]:
    """The steps that stay once `newest` is saved: the last few, multiples of keep_every, the best if asked.

    Why the best needs no record of its own: each manifest holds the validation loss of its weights, and the best one
    is never removed, so the lowest loss among the folders is the lowest of the run.
    """
    present = steps_in(folder)
    losses: dict[int, float | None] = {}
    for step in present:
        if step <= newest and step_name(step) not in damaged:
            try:
                losses[step] = read_manifest(folder / step_name(step))["validation_loss"]
            except UserError:
                continue  # not loadable: it takes nobody's place
    if newest not in losses:
        return set(present)  # what was just saved cannot be read back: not the moment to remove anything
    keep = set(sorted(losses)[-config.keep_last :])
    # What is newer was left by a start whose steps are being repeated; it and damaged ones between go when they are old.
    keep |= {step for step in present if step > min(keep) and step not in losses}
    if config.keep_every is not None:
        keep |= {step for step in losses if step % config.keep_every == 0}
    if config.keep_best:
        measured = {step: loss for step, loss in losses.items() if loss is not None}
        keep |= {min(measured, key=lambda step: (measured[step], step))} if measured else set()
    return keep


def _remove(path: Path) -> None:
    """Removes a folder so that its name disappears at once and whole."""
    doomed = path.with_name(f".del-{path.name}-{_mark()}")
    path.rename(doomed)
    failpoint("checkpoint.mid-prune")
    shutil.rmtree(doomed)


def _leftovers(folder: Path, kind: str) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match and match[1] == kind and path.is_dir() and not path.is_symlink():
            yield path


def clean_leftovers(folder: Path, *, alone: bool) -> list[str]:
    """Removes what processes that died while saving left behind; lines about what was done.

    `alone` says that the run's lock is held, so that nobody can be saving; otherwise folders of processes that are
    alive on this machine are left. Only names that this module gives are touched.
    """
    failpoint("resume.clean")
    if not folder.is_dir():
        return []
    lines = []
    for kind in ("old", "tmp", "del"):
        for path in _leftovers(folder, kind):
            match = _LEFTOVER.fullmatch(path.name)
            assert match is not None
            if not alone and _alive(int(match[3])):
                continue
            target = folder / match[2]
            if kind == "old" and not os.path.lexists(target):
                path.rename(target)
                sync_folder(folder)
                lines.append(f"{target} was being replaced when the process died: the one before is back")
                continue
            shutil.rmtree(path, ignore_errors=True)
            if kind == "tmp":
                lines.append(f"removed {path.name}: a save of {match[2]} that did not finish")
    return lines


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


# --- Reading ---------------------------------------------------------------------------------------------------------


def resolve(folder: Path) -> Resolved:
    """The newest checkpoint in a `checkpoints` folder whose every byte is as it was written.

    Raises: UserError if there are checkpoints and all are damaged, or if the newest is of another schema version.
    """
    return _newest(folder, _check)[0]


def load_newest(folder: Path) -> tuple[Resolved, Loaded | None]:
    """`resolve` and `load` in one, reading the chosen checkpoint only once."""
    return _newest(folder, load)


def _newest(folder: Path, read: Callable[[Path], T]) -> tuple[Resolved, T | None]:
    failpoint("resume.resolve")
    skipped: list[tuple[str, str]] = []
    for step in reversed(steps_in(folder)):
        path = folder / step_name(step)
        try:
            return Resolved(path, skipped), read(path)
        except DamagedFileError as error:
            skipped.append((path.name, str(error)))
    if skipped:
        reasons = "; ".join(reason for _, reason in skipped)
        raise UserError(
            f"no checkpoint in {folder} can be loaded ({reasons}); restore one from a backup, "
            f"or start anew in another --run.dir"
        )
    return Resolved(None, []), None


def find_checkpoint(run_or_checkpoint: Path) -> Path:
    """The checkpoint that a user means who names a run folder, its `checkpoints` folder or a checkpoint.

    One that is named itself is not checked here: `load` checks it, `verify_checkpoint` for those who read a part of it.
    Raises: UserError if there is none, or none that can be loaded.
    """
    path = run_or_checkpoint
    if (path / MANIFEST).exists() and ((path / MODEL).exists() or (path / STATE).exists()):
        return path
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; name a run folder or one of its checkpoints")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if folder is path and not steps_in(path):
        raise UserError(f"{path} is neither a run folder with checkpoints nor a checkpoint; name one of these")
    resolved = resolve(folder)
    for name, reason in resolved.skipped:
        logger.warning("skipped %s: %s", name, reason)
    if resolved.path is None:
        raise UserError(f"{path} has no checkpoint yet; train until the first one is saved")
    return resolved.path


def verify_checkpoint(path: Path) -> list[str]:
    """All problems of a checkpoint folder, each in one line; an empty list if every byte is as it was written."""
    try:
        manifest = read_manifest(path)
    except UserError as error:
        return [str(error)]
    problems = []
    for name in manifest["files"]:
        try:
            _check_file(path, name, manifest)
        except UserError as error:
            problems.append(str(error))
    return problems


def load(path: Path) -> Loaded:
    """A checkpoint, read and checked in one pass; nothing is returned unless all of it is as it was written.

    Raises: UserError naming the file and what is wrong with it. There is no other checkpoint to fall back to here.
    """
    manifest = read_manifest(path)
    config_json = parse_json(_read_small(path, CONFIG, manifest), where=str(path / CONFIG))
    state = _parse_state(_read_small(path, STATE, manifest), manifest, where=str(path / STATE))
    for name in set(manifest["files"]) - set(REQUIRED_FILES):
        _check_file(path, name, manifest)
    tensors = {}
    for name in (MODEL, OPTIMIZER):
        size = manifest["files"][name]["size"]
        with opened(path / name, size=size) as descriptor:
            tensors[name], digest = read_tensors(descriptor, size, where=str(path / name))
        _require_sha256(digest, path, name, manifest)
    strangers = sorted({name.rpartition("|")[0] for name in tensors[OPTIMIZER]} - set(tensors[MODEL]))
    if strangers:
        raise DamagedFileError(
            f"{path / OPTIMIZER} has moments of parameters that the model does not have: {strangers[:3]}"
        )
    failpoint("resume.loaded")
    return Loaded(
        path, manifest["step"], manifest["tokens"], tensors[MODEL], tensors[OPTIMIZER], state, config_json, manifest
    )


def _check(path: Path) -> None:
    """Reads and checks the whole checkpoint as `load` does, without keeping it."""
    manifest = read_manifest(path)
    for name in manifest["files"]:
        _check_file(path, name, manifest)


def _check_file(path: Path, name: str, manifest: Mapping[str, Any]) -> None:
    where = str(path / name)
    if name == STATE:
        _parse_state(_read_small(path, name, manifest), manifest, where=where)
    elif name == CONFIG:
        parse_json(_read_small(path, name, manifest), where=where)
    else:
        size = manifest["files"][name]["size"]
        with opened(path / name, size=size) as descriptor:
            if name in (MODEL, OPTIMIZER):
                read_header(descriptor, size, where=where)
            _require_sha256(stream_sha256(descriptor), path, name, manifest)


def read_extra(path: Path, name: str) -> bytes | None:
    """An extra file of a checkpoint, checked against the manifest; None if it was saved without one."""
    manifest = read_manifest(path)
    return _read_small(path, name, manifest, most=MAX_EXTRA_BYTES) if name in manifest["files"] else None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint: its own hash, its version and every field that this module relies on checked.

    Raises: DamagedFileError if it is not as it was written; UserError for the schema of another version.
    """
    where = str(path / MANIFEST)
    data = read_bounded(path / MANIFEST)
    manifest = parse_json(data, where=where)
    if not is_as_sealed(manifest, data):
        raise DamagedFileError(f"{where} is not as it was written (its own sha256 differs)")
    _require_version(manifest, where=where)
    counts = all(type(manifest.get(key)) is int and 0 <= manifest[key] < 2**60 for key in ("step", "tokens"))
    loss = manifest.get("validation_loss")
    if (
        not counts
        or not isinstance(manifest.get("data_fingerprint"), str)
        or not isinstance(manifest.get("layout"), dict)
        or not (loss is None or type(loss) is float)
    ):
        raise DamagedFileError(f"{where} lacks one of step, tokens, data_fingerprint, layout")
    if step_of(path.name) not in (None, manifest["step"]):
        raise DamagedFileError(f"{where} is of step {manifest['step']}, the folder's name says otherwise")
    files = manifest.get("files")
    if not isinstance(files, dict) or not set(REQUIRED_FILES) <= set(files) or len(files) > MAX_FILES:
        raise DamagedFileError(f"{where} does not list {', '.join(REQUIRED_FILES)}")
    for name, entry in files.items():
        if not _is_file_entry(name, entry):
            raise DamagedFileError(f"{where} has an entry of another form for {name[:80]!r}")
    return manifest


def _is_file_entry(name: str, entry: object) -> bool:
    return (
        _FILE_NAME.fullmatch(name) is not None
        and isinstance(entry, dict)
        and set(entry) == {"size", "sha256"}
        and whole_numbers([entry["size"]], least=0)
        and isinstance(entry["sha256"], str)
        and _SHA256.fullmatch(entry["sha256"]) is not None
    )


def _require_version(values: Mapping[str, Any], *, where: str) -> None:
    version = values.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise UserError(
            f"{where} has schema version {str(version)[:20]}, this toolkit reads version {SCHEMA_VERSION}; "
            f"use the version of the toolkit that wrote it"
        )


def _parse_state(data: bytes, manifest: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    state = parse_json(data, where=where)
    _require_version(state, where=where)
    if (state.get("step"), state.get("tokens")) != (manifest["step"], manifest["tokens"]):
        raise DamagedFileError(f"{where} is of another step than {manifest['step']}, which the manifest states")
    del state["schema_version"]
    return state


def _read_small(path: Path, name: str, manifest: Mapping[str, Any], *, most: int = MAX_JSON_BYTES) -> bytes:
    data = read_bounded(path / name, size=manifest["files"][name]["size"], most=most)
    _require_sha256(hashlib.sha256(data).hexdigest(), path, name, manifest)
    return data


def _require_sha256(found: str, path: Path, name: str, manifest: Mapping[str, Any]) -> None:
    expected = manifest["files"][name]["sha256"]
    if found != expected:
        raise DamagedFileError(
            f"{path / name} is not as it was written (sha256 {found[:12]}..., the manifest says {expected[:12]}...)"
        )
