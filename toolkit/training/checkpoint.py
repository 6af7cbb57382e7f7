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

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from toolkit.config import CheckpointConfig
from toolkit.errors import UserError, describe_os_error
from toolkit.failpoint import failpoint

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
MAX_HEADER_BYTES = 1 << 20  # of a safetensors file; GPT-2 1558M with two moments needs 0.2 MB
MAX_JSON_BYTES = 16 << 20  # of a JSON file that is parsed
MAX_FILES = 64  # in one manifest
_CHUNK = 16 << 20  # bytes per write and per read: large enough to cost no time, small enough to overlap with hashing

_STEP_NAME = re.compile(r"step-([0-9]{8,15})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_LEFTOVER = re.compile(r"\.(tmp|del|old)-(step-[0-9]{8,15})-([0-9]+)-[0-9a-f]{8}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
T = TypeVar("T")

_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class DamagedCheckpointError(UserError):
    """The folder is not what was once written there: another checkpoint has to be used."""


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


# --- JSON: strict in both directions ---------------------------------------------------------------------------------


def render_json(values: Mapping[str, Any]) -> bytes:
    """The values as an indented JSON file. Raises: ValueError for a NaN or infinity, which JSON does not have."""
    return (json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def parse_json(data: bytes, *, where: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises: DamagedCheckpointError for anything else: a key given twice, NaN, nesting without end, other encodings.
    """
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DamagedCheckpointError(f"{where} is not valid JSON ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(values, dict):
        raise DamagedCheckpointError(f"{where} does not hold a JSON object")
    return values


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key is given twice")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def canonical_sha256(values: Mapping[str, Any]) -> str:
    """The hash that a file carries of itself: of all keys but "sha256", sorted, without spaces."""
    content = {key: value for key, value in values.items() if key != "sha256"}
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()


# --- The safetensors format, written and read in one pass ------------------------------------------------------------
# Layout: 8 bytes little-endian length of the header, the header (JSON, padded with spaces to a multiple of 8), the
# tensors without gaps. Source: https://github.com/huggingface/safetensors, README, "Format". Written here, because the
# library neither hashes nor fsyncs nor writes from buffers that are kept, and sets mode 0600 whatever the umask.


@dataclass(frozen=True)
class _Place:
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def view(self, data: torch.Tensor) -> torch.Tensor:
        return data[self.begin : self.end].view(self.dtype).view(self.shape)


class _Image:
    """A safetensors file in memory: its header, and one buffer into which the tensors are copied at every save."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        # Wide types first keeps each tensor aligned to its own size without gaps.
        order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.places: dict[str, _Place] = {}
        end = 0
        for name in order:
            tensor = tensors[name]
            begin, end = end, end + tensor.numel() * tensor.element_size()
            self.places[name] = _Place(tensor.dtype, tuple(tensor.shape), begin, end)
            header[name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        assert len(text) <= MAX_HEADER_BYTES, f"the header of {len(tensors)} tensors has {len(text)} bytes"
        self.header = struct.pack("<Q", len(text)) + text
        self.data = _buffer(end, pinned=any(tensor.is_cuda for tensor in tensors.values()))
        self.size = len(self.header) + end

    def fits(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether these tensors have the names, types and shapes that the buffer was made for."""
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
            name: (place.dtype, place.shape) for name, place in self.places.items()
        }

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies the tensors into the buffer; copies from a device are only queued."""
        for name, place in self.places.items():
            place.view(self.data).copy_(tensors[name].detach(), non_blocking=True)

    def pieces(self) -> list[memoryview]:
        return [memoryview(self.header), self.data.numpy().data]


def _buffer(size: int, *, pinned: bool) -> torch.Tensor:
    if pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:  # locked memory is limited: slower, but nothing is lost
            logger.warning("no pinned memory for a checkpoint of %d bytes (%s); saving takes longer", size, error)
    return torch.empty(size, dtype=torch.uint8)


def _parse_header(text: bytes, data_bytes: int, *, where: str) -> dict[str, _Place]:
    """Where each tensor lies in the data; the places fill it without gap or overlap."""
    header = parse_json(text, where=f"{where}: the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedCheckpointError(f"{where}: the header's metadata is not text")
    places: dict[str, _Place] = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise DamagedCheckpointError(f"{where}: tensor {name[:80]!r} has an entry of another form")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise DamagedCheckpointError(f"{where}: tensor {name[:80]!r} has type {str(dtype)[:20]!r}")
        # A dimension of 0 never occurs here, and beside a huge one it would hide from the comparison of sizes.
        if not _whole_numbers(shape, least=1) or len(shape) > 8:
            raise DamagedCheckpointError(f"{where}: tensor {name[:80]!r} has shape {str(shape)[:80]}")
        if not _whole_numbers(offsets, least=0) or len(offsets) != 2:
            raise DamagedCheckpointError(f"{where}: tensor {name[:80]!r} has offsets {str(offsets)[:80]}")
        size = _DTYPES[dtype].itemsize
        for dimension in shape:
            size *= dimension
        if offsets[1] - offsets[0] != size or offsets[0] % _DTYPES[dtype].itemsize:
            raise DamagedCheckpointError(f"{where}: tensor {name[:80]!r} does not fit its offsets {offsets}")
        places[name] = _Place(_DTYPES[dtype], tuple(shape), offsets[0], offsets[1])
    end = 0
    for name, place in sorted(places.items(), key=lambda item: item[1].begin):
        if place.begin != end:
            raise DamagedCheckpointError(f"{where}: tensor {name[:80]!r} starts at byte {place.begin}, not at {end}")
        end = place.end
    if end != data_bytes:
        raise DamagedCheckpointError(f"{where}: the tensors have {end} bytes, the file holds {data_bytes}")
    return places


def _whole_numbers(values: object, *, least: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and least <= value < 2**48 for value in values)


# --- Writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Snapshot:
    step: int
    facts: dict[str, Any]
    images: dict[str, _Image]
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
        self._images: dict[str, _Image] = {}
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
        on, library versions included) and any other facts; `validation_loss` is the loss of exactly these weights (for keep_best), None if it was not measured.

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

    def _image(self, name: str, tensors: Mapping[str, torch.Tensor]) -> _Image:
        """The kept buffer of one file, filled. Why kept: a fresh 1.5 GiB copy takes 20 times as long (page faults)."""
        image = self._images.get(name)
        if image is None or not image.fits(tensors):
            self._images.pop(name, None)  # freed before the new one is made
            image = self._images[name] = _Image(tensors)
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
            write_checkpoint(self.folder, snapshot)
        except OSError as error:
            self._error = UserError(_describe_failure(error, self.folder, snapshot))
        except Exception as error:
            self._error = error
        else:
            self._prune(snapshot.step)
        if self._error is not None:  # said at once: the boundary at which it is raised may be minutes away
            logger.error("%s", self._error)

    def _prune(self, newest: int) -> None:
        """Removes what retention no longer names. A failure is only warned about: the new checkpoint is complete."""
        try:
            failpoint("checkpoint.before-prune")
            self.damaged.discard(step_name(newest))
            kept = steps_to_keep(self.folder, self.config, newest=newest, damaged=self.damaged)
            for step in sorted(steps_in(self.folder)):
                if step <= newest and step not in kept:
                    _remove(self.folder / step_name(step))
            for path in _leftovers(self.folder, "del"):  # of this process: a removal that failed earlier
                shutil.rmtree(path)
            failpoint("checkpoint.after-prune")
        except OSError as error:
            logger.warning("older checkpoints could not be removed (%s); tried again after the next", error)


def write_checkpoint(folder: Path, snapshot: _Snapshot) -> None:
    """Writes one checkpoint folder, complete or not at all; durable when this returns.

    A damaged folder of the same step is renamed aside (`.damaged-step-...`); a valid one with the same content is left
    as it is; a valid one with other content (the step was redone after a rewind) is replaced.

    Raises: UserError if the space does not suffice; OSError for whatever the operating system refuses.
    """
    name = step_name(snapshot.step)
    if not folder.is_dir():
        folder.mkdir(parents=True)
        fsync_folder(folder.parent)
    _require_space(folder, snapshot)
    temporary = folder / f".tmp-{name}-{_mark()}"
    temporary.mkdir()
    try:
        with ThreadPoolExecutor(2, thread_name_prefix="sha256") as hashers:
            # The buffers do not change, so hashing runs beside writing; it would take longer than a fast disk does.
            pieces = {file: image.pieces() for file, image in snapshot.images.items()}
            pieces |= {file: [memoryview(data)] for file, data in snapshot.small.items()}
            hashes = {file: hashers.submit(_sha256, parts) for file, parts in pieces.items()}
            failpoint("checkpoint.before-model")
            _write_file(temporary / MODEL, pieces[MODEL], half_way="checkpoint.mid-model")
            failpoint("checkpoint.after-model")
            _write_file(temporary / OPTIMIZER, pieces[OPTIMIZER], half_way="checkpoint.mid-optimizer")
            failpoint("checkpoint.after-optimizer")
            for file in snapshot.small:
                _write_file(temporary / file, pieces[file])
            failpoint("checkpoint.after-state")
            files = {
                file: {"size": sum(map(len, parts)), "sha256": hashes[file].result()} for file, parts in pieces.items()
            }
        manifest = {**snapshot.facts, "files": files}
        manifest["sha256"] = canonical_sha256(manifest)
        failpoint("checkpoint.before-manifest")
        _write_file(temporary / MANIFEST, [memoryview(render_json(manifest))])
        fsync_folder(temporary)
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
        fsync_folder(target.parent)
        return
    problems = verify_checkpoint(target)
    if problems:
        aside = target.with_name(f".damaged-{target.name}-{_mark()}")
        target.rename(aside)
        logger.warning("%s was damaged (%s) and is now %s", target, problems[0], aside.name)
        temporary.rename(target)
    elif read_manifest(target)["files"] == files:
        shutil.rmtree(temporary)  # the same bytes are there already
    else:
        old = target.with_name(f".old-{target.name}-{_mark()}")
        target.rename(old)
        failpoint(REPLACE_PHASE)  # who dies here finds the old one under its name again: see clean_leftovers
        temporary.rename(target)
        fsync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    fsync_folder(target.parent)


def _write_file(path: Path, pieces: list[memoryview], *, half_way: str | None = None) -> None:
    """Writes the pieces and fsyncs; the mode is that of any file the user makes (0666 without the umask's bits)."""
    middle = sum(map(len, pieces)) // 2
    written = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in pieces:
            position = 0
            while position < len(piece):
                if half_way and written >= middle:
                    failpoint(half_way)
                    half_way = None
                count = os.write(descriptor, piece[position : position + _CHUNK])
                position, written = position + count, written + count
        os.fsync(descriptor)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        os.close(descriptor)


def _sha256(pieces: list[memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)  # releases the interpreter lock
    return digest.hexdigest()


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


def fsync_folder(folder: Path) -> None:
    """Makes the names in a folder durable; file systems that cannot do this for folders are left to themselves."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


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
    """The steps up to `newest` that retention keeps: the last few, multiples of keep_every, the best if asked.

    Why the best needs no record of its own: each manifest holds the validation loss of its weights, and the best one
    is never removed, so the lowest loss among the folders is the lowest of the run.
    """
    losses: dict[int, float | None] = {}
    for step in steps_in(folder):
        if step <= newest and step_name(step) not in damaged:
            try:
                losses[step] = read_manifest(folder / step_name(step))["validation_loss"]
            except UserError:
                continue  # not loadable: it takes nobody's place
    keep = set(sorted(losses)[-config.keep_last :])
    # Damaged ones between those that are kept stay for whoever wants to look; older ones go.
    keep |= {step for step in steps_in(folder) if keep and step > min(keep) and step not in losses}
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
                fsync_folder(folder)
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
        except DamagedCheckpointError as error:
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

    Raises: UserError if there is none, or none that can be loaded.
    """
    path = run_or_checkpoint
    if (path / MODEL).exists() and (path / MANIFEST).exists():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist; name a run folder or one of its checkpoints")
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


def _check(path: Path) -> None:
    """Reads and checks the whole checkpoint as `load` does, without keeping it."""
    manifest = read_manifest(path)
    for name in manifest["files"]:
        _check_file(path, name, manifest)


def _check_file(path: Path, name: str, manifest: Mapping[str, Any]) -> None:
    if name in (MODEL, OPTIMIZER):
        with _opened(path / name, manifest["files"][name]["size"]) as descriptor:
            size = manifest["files"][name]["size"]
            text = _read_header(descriptor, size, where=str(path / name))
            _parse_header(text[8:], size - len(text), where=str(path / name))
            _require_sha256(_stream_sha256(descriptor), path, name, manifest)
    elif name == STATE:
        _parse_state(_read_small(path, name, manifest), manifest, where=str(path / name))
    elif name == CONFIG:
        parse_json(_read_small(path, name, manifest), where=str(path / name))
    else:
        with _opened(path / name, manifest["files"][name]["size"]) as descriptor:
            _require_sha256(_stream_sha256(descriptor), path, name, manifest)


def load(path: Path) -> Loaded:
    """A checkpoint, read and checked in one pass; nothing is returned unless all of it is as it was written.

    Raises: UserError naming the file and what is wrong with it. There is no other checkpoint to fall back to here.
    """
    manifest = read_manifest(path)
    config_json = parse_json(_read_small(path, CONFIG, manifest), where=str(path / CONFIG))
    state = _parse_state(_read_small(path, STATE, manifest), manifest, where=str(path / STATE))
    model = _read_tensors(path, MODEL, manifest)
    optimizer = _read_tensors(path, OPTIMIZER, manifest)
    strangers = sorted({name.rpartition("|")[0] for name in optimizer} - set(model))
    if strangers:
        raise DamagedCheckpointError(
            f"{path / OPTIMIZER} has moments of parameters that the model does not have: {strangers[:3]}"
        )
    for name in manifest["files"]:
        if name not in REQUIRED_FILES:
            _check_file(path, name, manifest)
    failpoint("resume.loaded")
    return Loaded(path, manifest["step"], manifest["tokens"], model, optimizer, state, config_json, manifest)


def read_extra(path: Path, name: str) -> bytes | None:
    """An extra file of a checkpoint, checked against the manifest; None if it was saved without one."""
    manifest = read_manifest(path)
    return _read_small(path, name, manifest, most=256 << 20) if name in manifest["files"] else None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint: its own hash, its version and every field that this module relies on checked."""
    where = str(path / MANIFEST)
    with _opened(path / MANIFEST, None) as descriptor:
        data = _read_all(descriptor, most=MAX_JSON_BYTES, where=where)
    manifest = parse_json(data, where=where)
    # Written again it must give the same bytes, so that a flipped byte is found even where JSON would not mind it.
    if manifest.get("sha256") != canonical_sha256(manifest) or render_json(manifest) != data:
        raise DamagedCheckpointError(f"{where} is not as it was written (its own sha256 differs)")
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{where} has schema version {str(version)[:20]}, this toolkit reads version {SCHEMA_VERSION}; "
            f"use the toolkit's version that wrote it"
        )
    counts = all(type(manifest.get(key)) is int and 0 <= manifest[key] < 2**60 for key in ("step", "tokens"))
    loss = manifest.get("validation_loss")
    if (
        not counts
        or not isinstance(manifest.get("data_fingerprint"), str)
        or not isinstance(manifest.get("layout"), dict)
        or not (loss is None or type(loss) is float)
    ):
        raise DamagedCheckpointError(f"{where} lacks one of step, tokens, data_fingerprint, layout")
    if step_of(path.name) not in (None, manifest["step"]):
        raise DamagedCheckpointError(f"{where} is of step {manifest['step']}, the folder's name says otherwise")
    files = manifest.get("files")
    if not isinstance(files, dict) or not set(REQUIRED_FILES) <= set(files) or len(files) > MAX_FILES:
        raise DamagedCheckpointError(f"{where} does not list {', '.join(REQUIRED_FILES)}")
    for name, entry in files.items():
        if (
            not _FILE_NAME.fullmatch(name)
            or name == MANIFEST
            or not isinstance(entry, dict)
            or set(entry) != {"size", "sha256"}
            or not _whole_numbers([entry["size"]], least=0)
            or not isinstance(entry["sha256"], str)
            or not _SHA256.fullmatch(entry["sha256"])
        ):
            raise DamagedCheckpointError(f"{where} has an entry of another form for {name[:80]!r}")
    return manifest


def _parse_state(data: bytes, manifest: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    state = parse_json(data, where=where)
    version = state.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{where} has schema version {str(version)[:20]}, this toolkit reads {SCHEMA_VERSION}; "
            f"use the toolkit's version that wrote it"
        )
    if (state.get("step"), state.get("tokens")) != (manifest["step"], manifest["tokens"]):
        raise DamagedCheckpointError(f"{where} is of another step than {manifest['step']}, which the manifest states")
    return state


def _read_tensors(path: Path, name: str, manifest: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    where, size = str(path / name), manifest["files"][name]["size"]
    with _opened(path / name, size) as descriptor:
        header = _read_header(descriptor, size, where=where)
        places = _parse_header(header[8:], size - len(header), where=where)
        data = torch.empty(size - len(header), dtype=torch.uint8)
        digest = hashlib.sha256(header)
        with ThreadPoolExecutor(1, thread_name_prefix="sha256") as hasher:
            view = data.numpy().data
            position = 0
            pending: list[Future[None]] = []
            while position < len(view):
                count = os.preadv(descriptor, [view[position : position + _CHUNK]], len(header) + position)
                if count == 0:
                    raise DamagedCheckpointError(f"{where} became shorter while it was read")
                pending.append(hasher.submit(digest.update, view[position : position + count]))
                position += count
            for done in pending:
                done.result()
    _require_sha256(digest.hexdigest(), path, name, manifest)
    return {tensor: place.view(data) for tensor, place in places.items()}


def _read_header(descriptor: int, size: int, *, where: str) -> bytes:
    """The 8 bytes of the header's length and the header."""
    start = os.pread(descriptor, 8, 0)
    if len(start) < 8:
        raise DamagedCheckpointError(f"{where} has {size} bytes, too few for a safetensors file")
    (length,) = struct.unpack("<Q", start)
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise DamagedCheckpointError(
            f"{where} is not a safetensors file of this toolkit (a header of {length} bytes in a file of {size})"
        )
    text = os.pread(descriptor, length, 8)
    if len(text) < length:
        raise DamagedCheckpointError(f"{where} became shorter while it was read")
    return start + text


def _read_small(path: Path, name: str, manifest: Mapping[str, Any], *, most: int = MAX_JSON_BYTES) -> bytes:
    with _opened(path / name, manifest["files"][name]["size"]) as descriptor:
        data = _read_all(descriptor, most=most, where=str(path / name))
    _require_sha256(hashlib.sha256(data).hexdigest(), path, name, manifest)
    return data


@contextmanager
def _opened(path: Path, size: int | None) -> Iterator[int]:
    """A descriptor of a regular file (no symlink, no pipe) that has the stated size."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{path} is missing") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedCheckpointError(f"{path} is a symbolic link, not a file") from None
        raise
    try:
        found = os.fstat(descriptor)
        if not _is_regular(found.st_mode):
            raise DamagedCheckpointError(f"{path} is not a regular file")
        if size is not None and found.st_size != size:
            raise DamagedCheckpointError(f"{path} has {found.st_size} bytes, the manifest says {size}")
        yield descriptor
    except OSError as error:
        if error.errno == errno.EIO:  # a sector that cannot be read is damage like any other
            raise DamagedCheckpointError(f"{path} cannot be read ({error.strerror})") from None
        raise
    finally:
        os.close(descriptor)


def _is_regular(mode: int) -> bool:
    return mode & 0o170000 == 0o100000


def _read_all(descriptor: int, *, most: int, where: str) -> bytes:
    size = os.fstat(descriptor).st_size
    if size > most:
        raise DamagedCheckpointError(f"{where} has {size} bytes, more than the {most} that such a file may have")
    parts = []
    position = 0
    while part := os.pread(descriptor, min(_CHUNK, most - position), position):
        parts.append(part)
        position += len(part)
    return b"".join(parts)


def _stream_sha256(descriptor: int) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    position = 0
    while count := os.preadv(descriptor, [buffer], position):
        digest.update(buffer[:count])
        position += count
    return digest.hexdigest()


def _require_sha256(found: str, path: Path, name: str, manifest: Mapping[str, Any]) -> None:
    expected = manifest["files"][name]["sha256"]
    if found != expected:
        raise DamagedCheckpointError(
            f"{path / name} is not as it was written (sha256 {found[:12]}..., the manifest says {expected[:12]}...)"
        )
