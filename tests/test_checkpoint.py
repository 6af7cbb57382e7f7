"""Checkpoints under what happens to them: kills, full disks, damaged and hostile files, retention, the background."""

import base64
import contextlib
import errno
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from toolkit.config import CheckpointConfig
from toolkit.errors import UserError
from toolkit.training import checkpoint
from toolkit.training.checkpoint import (
    REPLACE_PHASE,
    RESUME_PHASES,
    SAVE_PHASES,
    CheckpointWriter,
    Resolved,
    clean_leftovers,
    find_checkpoint,
    load,
    load_newest,
    read_extra,
    resolve,
    step_name,
    steps_in,
    verify_checkpoint,
)
from toolkit.training.files import render_json, sealed

FACTS = {"data_fingerprint": "f" * 64, "layout": {"num_processes": 1, "versions": {"torch": "2.13.0"}}}
IN_THREAD = [phase for phase in SAVE_PHASES if not phase.endswith("snapshot")]


def tensors_of(step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and moments that tell which step they are of."""
    generator = torch.Generator().manual_seed(step)
    model = {
        "wte.weight": torch.randn(40, 16, generator=generator),
        "ln_f.weight": torch.randn(16, generator=generator).bfloat16(),
        "scale": torch.tensor(float(step)),
    }
    optimizer = {f"{name}|{key}": torch.randn_like(model[name].float()) for name in model for key in ("exp_avg", "v")}
    return model, {name: tensor.fill_(step) for name, tensor in optimizer.items()}


def snapshot(writer: CheckpointWriter, step: int, **arguments: Any) -> None:
    model, optimizer = tensors_of(step)
    defaults: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "state": {"position": step * 8, "loss_history": [1.5, step / 3]},
        "config_json": {"model_type": "gpt2"},
        "manifest": {**FACTS, "tokens": step * 256},
        "extra": {"recipe.json": b'{"a": 1}\n'},
    }
    writer.snapshot(step, **(defaults | arguments))


def save(writer: CheckpointWriter, step: int, **arguments: Any) -> None:
    snapshot(writer, step, **arguments)
    writer.write(blocking=True)


def make(folder: Path, *steps: int, **config: Any) -> CheckpointWriter:
    writer = CheckpointWriter(folder, CheckpointConfig(**({"keep_last": 9} | config)))
    for step in steps:
        save(writer, step)
    return writer


def assert_is(loaded: checkpoint.Loaded, step: int) -> None:
    model, optimizer = tensors_of(step)
    assert (loaded.step, loaded.tokens) == (step, step * 256)
    assert loaded.state == {
        "position": step * 8,
        "loss_history": [1.5, step / 3],
        "step": step,
        "tokens": step * 256,
    }
    for expected, found in ((model, loaded.model), (optimizer, loaded.optimizer)):
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def failpoints(setting: str) -> Iterator[None]:
    from toolkit import failpoint

    failpoint._passages.clear()
    os.environ["TOOLKIT_FAILPOINTS"] = setting
    try:
        yield
    finally:
        del os.environ["TOOLKIT_FAILPOINTS"]


def in_child(action: Callable[[int], object]) -> tuple[int, list[int], int]:
    """Runs `action(pipe)` in a forked process -> (pid, lines of numbers it wrote, how it ended).

    Forked, because importing torch anew costs seconds; the tensors are too small for torch to use threads.
    """
    reader, pipe = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            action(pipe)
            status = 0
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(status)
    os.close(pipe)
    with os.fdopen(reader) as file:
        lines = [int(line) for line in file]
    return pid, lines, os.waitpid(pid, 0)[1]


# --- What a checkpoint is ---------------------------------------------------------------------------------------------


def test_round_trip_in_the_background_and_layout_of_the_folder(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        writer = CheckpointWriter(tmp_path / "run" / "checkpoints", CheckpointConfig())
        snapshot(writer, 1000)
        writer.write(blocking=False)
        writer.wait()
        writer.raise_error()
    finally:
        os.umask(umask)
    path = tmp_path / "run" / "checkpoints" / "step-00001000"
    files = ["config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "recipe.json", "state.json"]
    assert names(path) == files
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}, "0666 without the umask's bits"
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    assert_is(load(path), 1000)
    assert verify_checkpoint(path) == []
    assert read_extra(path, "recipe.json") == b'{"a": 1}\n'
    assert read_extra(path, "tokenizer.json") is None

    manifest = json.loads((path / "manifest.json").read_text())
    for name in set(files) - {"manifest.json"}:
        data = (path / name).read_bytes()
        assert manifest["files"][name] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    own = manifest.pop("sha256")
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    assert own == hashlib.sha256(canonical).hexdigest()
    assert (manifest["step"], manifest["tokens"], manifest["data_fingerprint"]) == (1000, 256000, "f" * 64)
    assert manifest["layout"] == FACTS["layout"]


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    make(tmp_path, 3)
    model, optimizer = tensors_of(3)
    for name, tensors in (("model", model), ("optimizer", optimizer)):
        file = tmp_path / step_name(3) / f"{name}.safetensors"
        read = load_file(file)
        assert set(read) == set(tensors)
        assert all(
            torch.equal(read[key], tensor) and read[key].dtype == tensor.dtype for key, tensor in tensors.items()
        )
        with safetensors.safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_no_tensors_and_odd_layouts(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointConfig())
    strided = torch.arange(12.0).view(3, 4).t()
    for step, optimizer in ((1, {}), (2, {"m|a": strided, "m|mask": torch.tensor([True, False])})):  # state grows
        save(writer, step, model={"m": strided, "rows": torch.arange(20.0).view(5, 4)[:3]}, optimizer=optimizer)
        loaded = load(tmp_path / step_name(step))
        assert torch.equal(loaded.model["m"], strided)
        assert loaded.model["rows"].shape == (3, 4), "a view is saved as what it shows"
        assert set(loaded.optimizer) == set(optimizer)


def test_large_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory in large pages, several chunks, and writing back behind the writer: as for the real model."""
    for module in ("disk", "training.files", "training.tensor_file"):
        monkeypatch.setattr(f"toolkit.{module}.CHUNK", 1 << 16)
    monkeypatch.setattr("toolkit.disk.BEHIND", 1 << 17)
    monkeypatch.setattr("toolkit.training.tensor_file.HUGE_PAGES_FROM", 1 << 16)
    model = {"a": torch.randn(300_001), "b": torch.randn(7)}
    save(CheckpointWriter(tmp_path, CheckpointConfig()), 1, model=model, optimizer={})
    loaded = load(tmp_path / step_name(1))
    assert all(torch.equal(loaded.model[name], tensor) for name, tensor in model.items())
    assert verify_checkpoint(tmp_path / step_name(1)) == []


# A checkpoint that schema version 1 wrote: it stays loadable, or the version number changes.
GOLDEN = {
    "config.json": ("ewogICJtb2RlbF90eXBlIjogImdwdDIiCn0K"),
    "manifest.json": (
        "ewogICJkYXRhX2ZpbmdlcnByaW50IjogImQxIiwKICAiZmlsZXMiOiB7CiAgICAiY29uZmlnLmpzb24iOiB7CiAgICAgICJzaGEy"
        "NTYiOiAiZDFmNjgyNTQwMjcwMGMwYTJkNmIyMzY0MmFkNzM4ZjRiZWU4OTZiMDI3N2U1MDRmM2JkNGNlZDZhNjM0NmYyYyIsCiAg"
        "ICAgICJzaXplIjogMjcKICAgIH0sCiAgICAibW9kZWwuc2FmZXRlbnNvcnMiOiB7CiAgICAgICJzaGEyNTYiOiAiMzYyMmI3YzBk"
        "NWNiZGVhNWVkM2I0M2M5NDU5OGMyMzllZjVmYTg5Nzk4NWExYTJmZDFkZGY0NzBlMmQ2N2QzNiIsCiAgICAgICJzaXplIjogMTA0"
        "CiAgICB9LAogICAgIm9wdGltaXplci5zYWZldGVuc29ycyI6IHsKICAgICAgInNoYTI1NiI6ICJmNWQwYjcyYjEyMmUyOWNiZjc1"
        "MDMyYjU5NzM4MzhkOTU5YjZkMGU0N2Q3ZTNlNDhmMzViMGFiYjI4NTZlOGU3IiwKICAgICAgInNpemUiOiAxMTIKICAgIH0sCiAg"
        "ICAic3RhdGUuanNvbiI6IHsKICAgICAgInNoYTI1NiI6ICJkNzYxNzdkZDlhY2E0ZmNmODI2YTA4M2ViNjg1M2YxM2Q2NzllNmVm"
        "NzQ2YjU0NDZhNzNjYmIzMzVmMTFiODM0IiwKICAgICAgInNpemUiOiA3NQogICAgfQogIH0sCiAgImxheW91dCI6IHt9LAogICJz"
        "Y2hlbWFfdmVyc2lvbiI6IDEsCiAgInNoYTI1NiI6ICI4ODE2NzBlOTQyMThjYjA1ZWFlYTY4YmYzYjNhNTViODMzYmYyMWRmODA1"
        "NTU5Yjk5Y2FiMzcxMTFlNzNjNjAxIiwKICAic3RlcCI6IDUsCiAgInRva2VucyI6IDEyODAsCiAgInZhbGlkYXRpb25fbG9zcyI6"
        "IDMuMjUKfQo="
    ),
    "model.safetensors": (
        "WAAAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJmb3JtYXQiOiJwdCJ9LCJ3Ijp7ImR0eXBlIjoiRjMyIiwic2hhcGUiOlsyXSwiZGF0"
        "YV9vZmZzZXRzIjpbMCw4XX19ICAgAACAPwAAAEA="
    ),
    "optimizer.safetensors": (
        "YAAAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJmb3JtYXQiOiJwdCJ9LCJ3fGV4cF9hdmciOnsiZHR5cGUiOiJGMzIiLCJzaGFwZSI6"
        "WzJdLCJkYXRhX29mZnNldHMiOlswLDhdfX0gICAAAAA/AACAPg=="
    ),
    "state.json": (
        "ewogICJwb3NpdGlvbiI6IDQwLAogICJzY2hlbWFfdmVyc2lvbiI6IDEsCiAgInN0ZXAiOiA1LAogICJ0b2tlbnMiOiAxMjgwCn0K"
    ),
}


def test_a_checkpoint_of_the_first_version_stays_loadable(tmp_path: Path) -> None:
    (tmp_path / step_name(5)).mkdir()
    for name, text in GOLDEN.items():
        (tmp_path / step_name(5) / name).write_bytes(base64.b64decode(text))
    loaded = load(tmp_path / step_name(5))
    assert loaded.model["w"].tolist() == [1.0, 2.0]
    assert loaded.optimizer["w|exp_avg"].tolist() == [0.5, 0.25]
    assert loaded.state == {"position": 40, "step": 5, "tokens": 1280}
    assert loaded.config_json == {"model_type": "gpt2"}
    assert loaded.manifest["validation_loss"] == 3.25


@pytest.mark.parametrize("file", ["manifest.json", "state.json"])
@pytest.mark.parametrize("version", [0, 2, None, "1", True])
def test_another_schema_version_is_refused_and_not_taken_for_damage(tmp_path: Path, file: str, version: object) -> None:
    make(tmp_path, 1, 2)
    alter(tmp_path / step_name(2), file, lambda values: values | {"schema_version": version})
    with pytest.raises(UserError, match=r"schema version .* reads version 1; use the version of the toolkit"):
        resolve(tmp_path)  # an older one would lose steps in silence


# --- Kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passage", [1, 3])
@pytest.mark.parametrize("phase", SAVE_PHASES)
def test_kill_at_each_phase_of_a_save(tmp_path: Path, phase: str, passage: int) -> None:
    """Every acknowledged step stays loadable, and the next start saves as if nothing had been."""

    def train(pipe: int) -> None:
        writer = CheckpointWriter(tmp_path, CheckpointConfig(keep_last=2))
        for step in (10, 20, 30, 40, 50, 60):
            snapshot(writer, step)
            writer.write(blocking=False)
            writer.wait()
            writer.raise_error()
            os.write(pipe, f"{step}\n".encode())

    with failpoints(f"{phase}=kill@{passage}"):
        _, acknowledged, status = in_child(train)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL, "the phase was not passed"
    clean_leftovers(tmp_path, alone=True)
    assert not [name for name in (names(tmp_path) if tmp_path.exists() else []) if name.startswith(".")]
    resolved, loaded = load_newest(tmp_path)
    assert resolved.skipped == []
    for step in acknowledged[-1:]:
        assert_is(load(tmp_path / step_name(step)), step)
    if loaded is not None:
        assert loaded.step >= max(acknowledged, default=0)
        assert_is(loaded, loaded.step)
    else:
        assert acknowledged == []
    writer = CheckpointWriter(tmp_path, CheckpointConfig(keep_last=2), resolved=resolved)
    for step in (50, 60, 70):
        save(writer, step)
    assert names(tmp_path) == [step_name(60), step_name(70)]


def test_kill_at_random_times_ends_in_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    def step_once(weights: torch.Tensor, step: int) -> torch.Tensor:
        return weights * 1.01 + torch.sin(weights * step)

    def train(folder: Path, steps: int) -> torch.Tensor:
        clean_leftovers(folder, alone=True)
        resolved, loaded = load_newest(folder)
        assert resolved.skipped == []
        writer = CheckpointWriter(folder, CheckpointConfig(), resolved=resolved)
        first, weights = (loaded.step, loaded.model["w"]) if loaded else (0, torch.linspace(0, 1, 64))
        for step in range(first, steps):
            weights = step_once(weights, step)
            model = {"w": weights}
            snapshot(writer, step + 1, model=model, optimizer={"w|m": weights}, manifest={**FACTS, "tokens": step})
            writer.write(blocking=False)
        writer.wait()
        writer.raise_error()
        return weights

    rng = random.Random(0)
    steps = 60
    for round_number in range(20):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                train(tmp_path, steps)
                status = 0
            finally:
                os._exit(status)
        time.sleep(rng.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"round {round_number}"
    assert steps_in(tmp_path)[-1] > 0, "the kills came too early to test anything"
    expected = torch.linspace(0, 1, 64)
    for step in range(steps):
        expected = step_once(expected, step)
    assert torch.equal(train(tmp_path, steps), expected)


def test_kill_while_resuming_changes_nothing(tmp_path: Path) -> None:
    make(tmp_path, 1, 2)
    before = names(tmp_path)
    for phase in RESUME_PHASES:
        with failpoints(f"{phase}=kill"):
            status = in_child(lambda _: (clean_leftovers(tmp_path, alone=True), load_newest(tmp_path)))[2]
        assert os.WIFSIGNALED(status), phase
        assert names(tmp_path) == before
    assert_is(load(tmp_path / step_name(2)), 2)


def test_leftovers_of_living_processes_and_other_names_are_left_alone(tmp_path: Path) -> None:
    make(tmp_path, 1)
    gone, _, _ = in_child(lambda pipe: None)
    ours = [f".tmp-step-00000002-{gone}-0123abcd", f".del-step-00000001-{gone}-0123abcd"]
    living = f".tmp-step-00000002-{os.getppid()}-0123abcd"
    strange = [".tmp-step-2", ".tmp-step-00000002-1-xyz", ".tmpfile", ".damaged-step-00000001-1-0123abcd"]
    for name in (*ours, living, *strange):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / f".tmp-step-00000003-{gone}-0123abcd").symlink_to(tmp_path / step_name(1))
    lines = clean_leftovers(tmp_path, alone=False)
    assert lines == [f"removed {ours[0]}: a save of step-00000002 that did not finish"]
    assert not any((tmp_path / name).exists() for name in ours)
    assert all((tmp_path / name / "file").exists() for name in (living, *strange))
    clean_leftovers(tmp_path, alone=True)  # the lock is held, so the number is another process's by now
    assert not (tmp_path / living).exists()
    assert all((tmp_path / name / "file").exists() for name in strange)
    assert verify_checkpoint(tmp_path / step_name(1)) == []
    assert clean_leftovers(tmp_path / "none", alone=True) == []


# --- The disk says no -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", IN_THREAD)
def test_a_full_disk_at_each_phase(tmp_path: Path, phase: str, caplog: pytest.LogCaptureFixture) -> None:
    writer = make(tmp_path, 1, 2, keep_last=2)
    with failpoints(f"{phase}=fail"):
        snapshot(writer, 3)
        writer.write(blocking=False)
        writer.wait()
    if "prune" in phase:
        writer.raise_error()
        assert "older checkpoints could not be removed" in caplog.text
        assert_is(load(tmp_path / step_name(3)), 3)
    else:
        assert writer.error is not None
        with pytest.raises(UserError) as caught:
            writer.raise_error()
        message = str(caught.value)
        assert "\n" not in message
        assert f"the checkpoint of step 3 could not be written to {tmp_path}: " in message
        assert "No space left on device" in message
        assert "it needs" in message
        assert "bytes" in message
        assert "the checkpoints before it are intact" in message
        assert message in caplog.text, "said when it happens, not only when it is raised"
        assert_is(load(tmp_path / step_name(1)), 1)
        assert_is(load(tmp_path / step_name(2)), 2)
    assert not [name for name in names(tmp_path) if name.startswith((".tmp", ".old"))]
    assert writer.error is None, "raised once"
    save(writer, 4)
    assert_is(load(tmp_path / step_name(4)), 4)
    complete = [2, 4] if phase in IN_THREAD[: IN_THREAD.index("checkpoint.after-rename")] else [3, 4]
    assert names(tmp_path) == [step_name(step) for step in complete]


def test_too_little_space_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = make(tmp_path, 1)
    size = sum(file.stat().st_size for file in (tmp_path / step_name(1)).iterdir() if file.name != "manifest.json")
    real = os.statvfs(tmp_path)

    def with_free(free: int) -> Callable[[object], os.statvfs_result]:
        values = list(real)
        values[1], values[4] = 1, free  # f_frsize, f_bavail
        return lambda path: os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", with_free(int(size * 1.19)))
    with pytest.raises(
        UserError, match=rf"step 2 needs \d+ bytes .* in {tmp_path}, {int(size * 1.19)} are free"
    ) as caught:
        save(writer, 2)
    needed = re.search(r"needs (\d+) bytes", str(caught.value))
    assert needed is not None
    assert int(needed[1]) == pytest.approx(size * 1.2, abs=2)
    assert names(tmp_path) == [step_name(1)]
    monkeypatch.setattr(os, "statvfs", with_free(int(size * 1.21) + 10))
    save(writer, 2)


def test_the_file_size_limit_of_the_shell(tmp_path: Path) -> None:
    make(tmp_path, 1)

    def save_large(pipe: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        writer = CheckpointWriter(tmp_path, CheckpointConfig())
        with pytest.raises(UserError, match=r"model\.safetensors: File too large; the file size limit \(ulimit -f\)"):
            save(writer, 2, model={"w": torch.ones(50_000)}, optimizer={})
        os.write(pipe, b"1\n")

    assert in_child(save_large)[1] == [1]
    assert names(tmp_path) == [step_name(1)]


def test_permission_lost_while_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = make(tmp_path, 1)
    really_open = os.open

    def refuse(path: Any, *arguments: Any, **keywords: Any) -> int:
        if "optimizer" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really_open(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", refuse)  # root is refused nothing
    with pytest.raises(UserError, match=r"optimizer\.safetensors: Permission denied; choose a folder"):
        save(writer, 2)
    monkeypatch.undo()
    assert names(tmp_path) == [step_name(1)]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"could not be written"):
        save(CheckpointWriter(tmp_path / "file" / "checkpoints", CheckpointConfig()), 1)


# --- Damage -----------------------------------------------------------------------------------------------------------


def flip(file: Path, offset: int, mask: int = 0xFF) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= mask
    file.write_bytes(data)


def alter(path: Path, file: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Changes a JSON file of a checkpoint and makes every hash fit again, as no accident does."""
    manifest = json.loads((path / "manifest.json").read_text())
    if file != "manifest.json":
        replace(path, file, render_json(change(json.loads((path / file).read_text()))))
        return
    (path / "manifest.json").write_bytes(render_json(sealed(change(manifest))))


def replace(path: Path, file: str, data: bytes) -> None:
    (path / file).write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    alter(path, "manifest.json", lambda manifest: manifest | {"files": manifest["files"] | {file: entry}})


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "recipe.json", "manifest.json"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 1 and 2; tests copy it."""
    folder = tmp_path_factory.mktemp("two")
    make(folder, 1, 2)
    return folder


def assert_skipped(folder: Path, file: str) -> None:
    newest = folder / step_name(2)
    resolved = resolve(folder)
    assert resolved.path == folder / step_name(1)
    assert [name for name, _ in resolved.skipped] == [newest.name]
    assert file in resolved.skipped[0][1]
    again, loaded = load_newest(folder)
    assert again == resolved
    assert loaded is not None
    assert_is(loaded, 1)
    with pytest.raises(UserError, match=file.replace(".", r"\.")) as caught:
        load(newest)
    assert "\n" not in str(caught.value)
    assert any(file in problem for problem in verify_checkpoint(newest))


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_byte_anywhere(tmp_path: Path, two: Path, file: str) -> None:
    folder = shutil.copytree(two, tmp_path / "copy")
    target = folder / step_name(2) / file
    intact = target.read_bytes()
    for share in (0, 0.01, 0.3, 0.5, 0.77, 1):
        flip(target, round(share * (len(intact) - 1)))
        assert_skipped(folder, file)
        target.write_bytes(intact)
    assert resolve(folder).path == folder / step_name(2)


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "model.safetensors"])
def test_flipped_bits_anywhere(tmp_path: Path, two: Path, file: str) -> None:
    """Also where the format would not mind: the padding of a header, the letter of an exponent, a space for a tab."""
    path = shutil.copytree(two / step_name(2), tmp_path / step_name(2))
    target = path / file
    intact = target.read_bytes()
    for offset in sorted(random.Random(file).sample(range(len(intact)), min(len(intact), 200))):
        damaged = bytearray(intact)
        damaged[offset] ^= 1 << random.Random(offset).randrange(8)
        target.write_bytes(damaged)
        with pytest.raises(UserError):
            load(path)
    if file == "manifest.json":
        target.write_bytes(intact.replace(b"  ", b" \t", 1))
        with pytest.raises(UserError, match="not as it was written"):
            load(path)
    target.write_bytes(intact)
    assert_is(load(path), 2)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b""),
        lambda file: os.truncate(file, file.stat().st_size - 1),
        lambda file: os.truncate(file, 5),
        lambda file: file.write_bytes(file.read_bytes() + b" "),
        lambda file: file.write_bytes(bytes(file.stat().st_size)),
        lambda file: file.rename(file.with_suffix(".moved")) and file.symlink_to(file.with_suffix(".moved")),
        lambda file: (file.unlink(), file.mkdir()),
        lambda file: (file.unlink(), os.mkfifo(file)),
    ],
    ids=["missing", "empty", "one byte short", "five bytes", "one byte more", "zeros", "symlink", "folder", "pipe"],
)
def test_a_file_that_is_another_one(tmp_path: Path, two: Path, file: str, damage: Callable[[Path], object]) -> None:
    folder = shutil.copytree(two, tmp_path / "copy")
    damage(folder / step_name(2) / file)
    assert_skipped(folder, file)


def test_extra_files_and_stray_names_are_ignored(tmp_path: Path) -> None:
    make(tmp_path, 1, 2)
    (tmp_path / step_name(2) / "notes.txt").write_text("mine")
    for name in ("tmp", "step-abc", "step-3", "step-000000003", "step-00000004.bak", ".hidden", "step-٠٠٠٠٠٠٠٩"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000007").write_text("a file")
    (tmp_path / "step-00000008").symlink_to(tmp_path / step_name(1))
    (tmp_path / "step-00000006").symlink_to(tmp_path / "nowhere")
    assert steps_in(tmp_path) == [1, 2]
    assert resolve(tmp_path) == Resolved(tmp_path / step_name(2), [])
    assert verify_checkpoint(tmp_path / step_name(2)) == []


def test_none_at_all_is_a_fresh_start_and_all_damaged_an_error(tmp_path: Path) -> None:
    assert resolve(tmp_path / "none") == Resolved(None, [])
    assert load_newest(tmp_path / "none") == (Resolved(None, []), None)
    make(tmp_path, 1, 2)
    flip(tmp_path / step_name(1) / "state.json", 3)
    (tmp_path / step_name(2) / "manifest.json").unlink()
    for read in (resolve, load_newest):
        with pytest.raises(UserError, match=r"step-00000002.*manifest\.json is missing; .*step-00000001.*state\.json"):
            read(tmp_path)


def test_a_renamed_folder_is_not_taken_for_another_step(tmp_path: Path) -> None:
    make(tmp_path, 1)
    shutil.copytree(tmp_path / step_name(1), tmp_path / step_name(9))
    resolved = resolve(tmp_path)
    assert resolved.path == tmp_path / step_name(1)
    assert "of step 1, the folder's name says otherwise" in resolved.skipped[0][1]
    shutil.copytree(tmp_path / step_name(1), tmp_path / "kept for later")
    assert_is(load(tmp_path / "kept for later"), 1)


def test_what_a_user_may_name_to_the_verbs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run" / "checkpoints"
    make(folder, 1, 2)
    for name in (tmp_path / "run", folder, folder / step_name(2)):
        assert find_checkpoint(name) == folder / step_name(2)
    flip(folder / step_name(2) / "state.json", 3)
    assert find_checkpoint(tmp_path / "run") == folder / step_name(1)
    assert "skipped step-00000002" in caplog.text
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    for name, text in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "neither a run folder"),
        (tmp_path / "young", "has no checkpoint yet"),
    ):
        with pytest.raises(UserError, match=text):
            find_checkpoint(name)


# --- Hostile files ----------------------------------------------------------------------------------------------------


def tensor_file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "pickle": b"\x80\x04\x95\x1b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.",
    "zip": b"PK\x03\x04" + bytes(60),
    "no header": b"\x00" * 7,
    "length beyond the file": tensor_file({}, length=1 << 20),
    "length beyond 64 bits of sense": tensor_file({}, length=2**64 - 1),
    "spaces": tensor_file(b"{}" + b" " * (1 << 20)),
    "not JSON": tensor_file(b"{"),
    "not UTF-8": tensor_file(b'{"\xff": 1}'),
    "deep": tensor_file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep shape": tensor_file(
        b'{"w":{"dtype":"F32","data_offsets":[0,4],"shape":' + b"[" * 900 + b"]" * 900 + b"}}", bytes(4)
    ),
    "a list": tensor_file([]),
    "name twice": tensor_file(
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        bytes(8),
    ),
    "overlap": tensor_file({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "hole": tensor_file({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "trailing bytes": tensor_file({"w": entry([1], 0, 4)}, bytes(8)),
    "truncated": tensor_file({"w": entry([4], 0, 16)}, bytes(8)),
    "overflowing shape": tensor_file({"w": entry([2**32, 2**32], 0, 4)}, bytes(4)),
    "empty with a huge side": tensor_file({"w": entry([0, 2**40], 0, 0)}),
    "negative": tensor_file({"w": entry([-1], 0, 4)}, bytes(4)),
    "backwards": tensor_file({"w": entry([1], 4, 0)}, bytes(4)),
    "fraction": tensor_file({"w": entry([1.0], 0, 4)}, bytes(4)),
    "truth for a number": tensor_file({"w": entry([True], 0, 4)}, bytes(4)),
    "type unknown": tensor_file({"w": entry([1], 0, 4, "F4")}, bytes(4)),
    "type not text": tensor_file({"w": entry([1], 0, 4, ["F32"])}, bytes(4)),
    "offsets of three": tensor_file({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, bytes(4)),
    "more keys": tensor_file({"w": entry([1], 0, 4) | {"x": 1}}, bytes(4)),
    "misaligned": tensor_file({"a": entry([1], 0, 1, "U8"), "w": entry([1], 1, 5)}, bytes(5)),
    "metadata not text": tensor_file({"__metadata__": {"a": 1}, "w": entry([1], 0, 4)}, bytes(4)),
    "many dimensions": tensor_file({"w": entry([1] * 65, 0, 4)}, bytes(4)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tensor_files_are_refused(tmp_path: Path, two: Path, case: str) -> None:
    """With hashes that fit, as somebody who means harm would make them."""
    path = shutil.copytree(two / step_name(2), tmp_path / step_name(2))
    replace(path, "model.safetensors", HOSTILE[case])
    with pytest.raises(UserError, match=r"model\.safetensors") as caught:
        load(path)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)
    assert verify_checkpoint(path)


def test_names_of_tensors_are_never_paths(tmp_path: Path, two: Path) -> None:
    path = shutil.copytree(two / step_name(2), tmp_path / step_name(2))
    replace(path, "model.safetensors", tensor_file({"../../etc/x": entry([1], 0, 4)}, bytes(4)))
    with pytest.raises(UserError, match="moments of parameters that the model does not have"):
        load(path)
    replace(path, "optimizer.safetensors", tensor_file({}))
    assert set(load(path).model) == {"../../etc/x"}, "a key like any other; the model's own names decide later"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m | {"files": m["files"] | {"../x": {"size": 1, "sha256": "0" * 64}}},
        lambda m: m | {"files": m["files"] | {".x": {"size": 1, "sha256": "0" * 64}}},
        lambda m: m | {"files": m["files"] | {"/etc/passwd": {"size": 1, "sha256": "0" * 64}}},
        lambda m: m | {"files": m["files"] | {"manifest.json": {"size": 1, "sha256": "0" * 64}}},
        lambda m: m | {"files": m["files"] | {"state.json": {"size": -1, "sha256": "0" * 64}}},
        lambda m: m | {"files": m["files"] | {"state.json": {"size": 2**60, "sha256": "0" * 64}}},
        lambda m: m | {"files": m["files"] | {"state.json": {"size": 10, "sha256": 3}}},
        lambda m: m | {"files": m["files"] | {"state.json": [1]}},
        lambda m: m | {"files": {"state.json": m["files"]["state.json"]}},
        lambda m: m | {"files": m["files"] | {f"x{i}": {"size": 1, "sha256": "0" * 64} for i in range(100)}},
        lambda m: m | {"files": None},
        lambda m: m | {"step": -1},
        lambda m: m | {"step": 2.0},
        lambda m: m | {"tokens": True},
        lambda m: m | {"tokens": 10**30},
        lambda m: m | {"data_fingerprint": None},
        lambda m: m | {"layout": []},
        lambda m: m | {"validation_loss": "low"},
        lambda m: {key: value for key, value in m.items() if key != "tokens"},
    ],
)
def test_hostile_manifests_are_refused(tmp_path: Path, two: Path, change: Callable[[Any], Any]) -> None:
    path = shutil.copytree(two / step_name(2), tmp_path / step_name(2))
    alter(path, "manifest.json", change)
    with pytest.raises(UserError, match=r"manifest\.json"):
        load(path)


@pytest.mark.parametrize(
    "data", [b"[]", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": 1, "a": 1}', b"\xff\xfe{}", b'"x"', b"{}{}"]
)
@pytest.mark.parametrize("file", ["state.json", "config.json", "manifest.json"])
def test_json_that_is_none(tmp_path: Path, two: Path, file: str, data: bytes) -> None:
    path = shutil.copytree(two / step_name(2), tmp_path / step_name(2))
    if file == "manifest.json":
        (path / file).write_bytes(data)
    else:
        replace(path, file, data)
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        load(path)


def test_a_manifest_nested_without_end(tmp_path: Path, two: Path) -> None:
    path = shutil.copytree(two / step_name(2), tmp_path / step_name(2))
    for depth in (200, 330, 900, 100_000):  # what parsing bears and writing does not lies between
        (path / "manifest.json").write_bytes(b'{"layout":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}")
        with pytest.raises(UserError, match=r"manifest\.json"):
            load(path)


def test_state_of_another_step(tmp_path: Path, two: Path) -> None:
    path = shutil.copytree(two / step_name(2), tmp_path / step_name(2))
    alter(path, "state.json", lambda state: state | {"step": 3})
    with pytest.raises(UserError, match=r"state\.json is of another step than 2"):
        load(path)


@pytest.mark.parametrize("file", ["state.json", "manifest.json", "config.json", "model.safetensors"])
def test_files_of_a_gigabyte_take_no_memory(tmp_path: Path, two: Path, file: str) -> None:
    path = shutil.copytree(two / step_name(2), tmp_path / step_name(2))
    os.truncate(path / file, 1 << 30)  # sparse
    if file != "manifest.json":
        large = {"size": 1 << 30, "sha256": "0" * 64}
        alter(path, "manifest.json", lambda manifest: manifest | {"files": manifest["files"] | {file: large}})
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=file.replace(".", r"\.")):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


# --- Retention --------------------------------------------------------------------------------------------------------


def test_the_last_few_every_nth_and_the_best_are_kept_across_starts(tmp_path: Path) -> None:
    losses = {10: 5.0, 20: 3.0, 30: 2.0, 40: 2.5, 50: None, 60: 2.0, 70: 2.1, 80: 2.2}
    config = CheckpointConfig(keep_last=2, keep_every=40, keep_best=True)
    for step, loss in losses.items():
        writer = CheckpointWriter(tmp_path, config, resolved=resolve(tmp_path))  # a new start each time
        save(writer, step, validation_loss=loss)
    assert steps_in(tmp_path) == [30, 40, 70, 80], "the first of two equal losses is the best"
    save(CheckpointWriter(tmp_path, config), 90, validation_loss=1)
    assert steps_in(tmp_path) == [40, 80, 90]
    save(CheckpointWriter(tmp_path, CheckpointConfig(keep_last=2)), 100)
    assert steps_in(tmp_path) == [90, 100]


def test_a_damaged_checkpoint_never_takes_the_place_of_a_valid_one(tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30, 40)
    for step in (20, 30, 40):
        flip(tmp_path / step_name(step) / "optimizer.safetensors", -1)
    resolved = resolve(tmp_path)
    assert resolved.path == tmp_path / step_name(10)
    writer = CheckpointWriter(tmp_path, CheckpointConfig(keep_last=2), resolved=resolved)
    save(writer, 15)
    assert steps_in(tmp_path) == [10, 15, 20, 30, 40], "nothing newer than what was saved is touched"
    save(writer, 35)
    assert steps_in(tmp_path) == [15, 20, 30, 35, 40]
    assert resolve(tmp_path).path == tmp_path / step_name(35)
    save(writer, 45)
    save(writer, 55)
    assert steps_in(tmp_path) == [45, 55]
    # Not even one whose manifest alone shows the damage, where no start has looked yet.
    (tmp_path / step_name(55) / "manifest.json").unlink()
    save(CheckpointWriter(tmp_path, CheckpointConfig(keep_last=2)), 65)
    assert resolve(tmp_path).path == tmp_path / step_name(65)
    assert steps_in(tmp_path) == [45, 55, 65]


def test_nothing_is_removed_for_a_checkpoint_that_cannot_be_read_back(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3)
    (tmp_path / step_name(3) / "manifest.json").unlink()
    assert checkpoint.steps_to_keep(tmp_path, CheckpointConfig(keep_last=2), newest=3, damaged=set()) == {1, 2, 3}


def test_a_removal_that_failed_is_made_up_for(tmp_path: Path) -> None:
    writer = make(tmp_path, 1, 2, keep_last=2)
    with failpoints("checkpoint.mid-prune=fail"):
        save(writer, 3)
    assert [name[:5] for name in names(tmp_path)] == [".del-", "step-", "step-"]
    save(writer, 4)
    assert names(tmp_path) == [step_name(3), step_name(4)]


# --- The same step again ----------------------------------------------------------------------------------------------


def test_a_damaged_folder_of_the_same_step_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = make(tmp_path, 1, 2)
    flip(tmp_path / step_name(2) / "model.safetensors", -1)
    save(writer, 2)
    assert_is(load(tmp_path / step_name(2)), 2)
    assert [name for name in names(tmp_path) if name.startswith(".damaged-step-00000002-")]
    assert "model.safetensors is not as it was written" in caplog.text


@pytest.mark.parametrize("what", ["file", "link", "empty folder"])
def test_anything_else_under_the_name_is_put_aside(tmp_path: Path, what: str) -> None:
    writer = make(tmp_path, 1)
    target = tmp_path / step_name(2)
    {"file": target.touch, "link": lambda: target.symlink_to(tmp_path), "empty folder": target.mkdir}[what]()
    save(writer, 2)
    assert_is(load(target), 2)
    assert not target.is_symlink()
    assert len(names(tmp_path)) == 3


def test_the_same_content_again_is_left_and_other_content_replaces(tmp_path: Path) -> None:
    writer = make(tmp_path, 1, 2)
    inode = (tmp_path / step_name(2) / "manifest.json").stat().st_ino
    for extra in ({"recipe.json": b'{"a": 1}\n'}, {"run.json": b"{}"}):  # a later start adds a record to run.json
        save(writer, 2, extra=extra)
        assert (tmp_path / step_name(2) / "manifest.json").stat().st_ino == inode
    save(writer, 2, state={"position": 99})
    assert load(tmp_path / step_name(2)).state["position"] == 99
    assert names(tmp_path) == [step_name(1), step_name(2)]


def test_kill_while_replacing_brings_the_old_one_back(tmp_path: Path) -> None:
    writer = make(tmp_path, 1, 2)
    with failpoints(f"{REPLACE_PHASE}=kill"):
        status = in_child(lambda _: save(writer, 2, state={"position": 99}))[2]
    assert os.WIFSIGNALED(status)
    assert steps_in(tmp_path) == [1]
    lines = clean_leftovers(tmp_path, alone=True)
    assert any("the one before is back" in line for line in lines)
    assert_is(load(tmp_path / step_name(2)), 2)
    assert names(tmp_path) == [step_name(1), step_name(2)]


# --- The background ---------------------------------------------------------------------------------------------------


def test_training_goes_on_while_a_save_is_written(tmp_path: Path) -> None:
    """What is saved is the moment of the snapshot; the next snapshot waits for the writer."""
    writer = CheckpointWriter(tmp_path, CheckpointConfig())
    model, optimizer = tensors_of(1)
    with failpoints("checkpoint.before-model=sleep:1.5@1"):
        snapshot(writer, 1, model=model, optimizer=optimizer)
        writer.write(blocking=False)
        assert writer.busy
        for tensors in (model, optimizer):
            for tensor in tensors.values():
                tensor.zero_()  # in place, as an optimizer does
        assert steps_in(tmp_path) == []
        snapshot(writer, 2)
        assert steps_in(tmp_path) == [1], "one save in flight at most"
        assert not writer.busy
    loaded = load(tmp_path / step_name(1))
    expected = tensors_of(1)[0]
    assert all(torch.equal(loaded.model[name], tensor) for name, tensor in expected.items())
    writer.write(blocking=False)
    writer.wait()
    assert_is(load(tmp_path / step_name(2)), 2)


def test_the_buffers_are_kept(tmp_path: Path) -> None:
    writer = make(tmp_path, 1)
    before = {name: image.data.data_ptr() for name, image in writer._images.items()}
    save(writer, 2)
    assert {name: image.data.data_ptr() for name, image in writer._images.items()} == before


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ("before-manifest=fail", UserError),
        ("before-manifest=raise", RuntimeError),
        ("before-prune=raise", RuntimeError),
    ],
)
def test_an_error_in_the_background_reaches_the_next_boundary(tmp_path: Path, point: str, expected: type) -> None:
    """A mistake of ours keeps its type, so that its traceback is not hidden behind one line."""
    writer = make(tmp_path, 1)
    with failpoints(f"checkpoint.{point}"):
        snapshot(writer, 2)
        writer.write(blocking=False)
        writer.wait()
    with pytest.raises(expected):
        snapshot(writer, 3)
    snapshot(writer, 3)
    writer.write(blocking=True)
    assert steps_in(tmp_path) == ([1, 2, 3] if "prune" in point else [1, 3])


def test_numbers_that_json_lacks_are_found_before_the_thread(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointConfig())
    for arguments in (
        {"state": {"x": float("nan")}},
        {"validation_loss": float("inf")},
        {"config_json": {"x": float("nan")}},
    ):
        with pytest.raises(ValueError, match="not JSON compliant"):
            snapshot(writer, 1, **arguments)
    assert threading.active_count() == 1 or not writer.busy


def test_a_process_that_ends_finishes_the_save_in_flight(tmp_path: Path) -> None:
    """Also with an exception, and although the interpreter is on its way out when the thread goes on."""
    script = f"""
import torch
from pathlib import Path
from toolkit.config import CheckpointConfig
from toolkit.training.checkpoint import CheckpointWriter
writer = CheckpointWriter(Path({str(tmp_path)!r}), CheckpointConfig())
facts = {{"tokens": 1, "data_fingerprint": "", "layout": {{}}}}
writer.snapshot(1, model={{"w": torch.ones(9)}}, optimizer={{}}, state={{}}, config_json={{}}, manifest=facts)
writer.write(blocking=False)
raise SystemExit(3)
"""
    environment = os.environ | {"TOOLKIT_FAILPOINTS": "checkpoint.before-model=sleep:0.5"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3, "")
    assert load(tmp_path / step_name(1)).model["w"].sum() == 9
    assert names(tmp_path) == [step_name(1)]
