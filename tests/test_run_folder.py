"""The run folder: its lock, identity, recipe and status; what is damaged, edited, secret, killed or not allowed."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.config import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    TrainingConfig,
    WandbConfig,
    load_recipe,
    to_dict,
)
from toolkit.errors import UserError
from toolkit.training import run_folder
from toolkit.training.checkpoint import CheckpointWriter, read_extra, step_name
from toolkit.training.run_folder import OPEN_PHASES, Opened, RunFolder

LAYOUT = {"num_processes": 1, "micro_batch_size": 8, "versions": {"torch": "2.13.0"}}
CONFIG = TrainConfig(training=TrainingConfig(max_steps=10))
OTHER_STEPS = dataclasses.replace(CONFIG, training=TrainingConfig(max_steps=20))


@contextmanager
def started(
    path: Path, config: TrainConfig = CONFIG, layout: dict[str, Any] = LAYOUT, argv: tuple[str, ...] = ("train.py",)
) -> Iterator[tuple[RunFolder, Opened]]:
    """A folder, locked, opened and written to as a start of the run does it."""
    folder = RunFolder(path)
    try:
        opened = folder.open(config, data_fingerprint="f" * 64, layout=layout, argv=argv)
        folder.record()
        yield folder, opened
    finally:
        folder.close()


def save(folder: RunFolder, step: int, layout: dict[str, Any] = LAYOUT) -> None:
    writer = CheckpointWriter(folder.checkpoints, CheckpointConfig())
    writer.snapshot(
        step,
        model={"w": torch.ones(3)},
        optimizer={},
        state={},
        config_json={},
        manifest={"tokens": step, "data_fingerprint": "f" * 64, "layout": layout},
        extra=folder.copies(),
    )
    writer.write(blocking=True)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the checkpoint of step 5; nobody holds it."""
    with started(tmp_path / "run") as (folder, _):
        save(folder, 5)
    return tmp_path / "run"


def run_json(path: Path) -> dict[str, Any]:
    return json.loads((path / "run.json").read_text())


@contextmanager
def failpoints(setting: str) -> Iterator[None]:
    from toolkit import failpoint

    failpoint._passages.clear()
    os.environ["TOOLKIT_FAILPOINTS"] = setting
    try:
        yield
    finally:
        del os.environ["TOOLKIT_FAILPOINTS"]


def fork(action: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(status)
    return pid


def test_a_new_run_and_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "new"
    with started(path) as (folder, opened):
        assert opened == Opened(opened.resolved, is_new=True, lines=[], loaded=None, branched_from=None)
        assert opened.resolved.path is None
        run_id = folder.run_id
        assert re.fullmatch(r"[a-z0-9]{8,}", run_id)
        assert load_recipe(path / "recipe.json") == CONFIG
        assert folder.copies() == {name: (path / name).read_bytes() for name in ("run.json", "recipe.json")}
        assert folder.status() is None
        folder.set_status("running", step=3)
        folder.set_status("preempted", step=5, reason="SIGTERM")
        status = folder.status()
        assert status is not None
        assert (status["status"], status["step"], status["reason"]) == ("preempted", 5, "SIGTERM")
        save(folder, 5)
    other_layout = LAYOUT | {"num_processes": 2, "versions": {"torch": "2.14.0"}}
    with started(path, OTHER_STEPS, other_layout, ("train.py", "--run.dir", "my run")) as (folder, opened):
        assert folder.run_id == run_id, "one id for life"
        assert not opened.is_new
        assert opened.resolved.path == path / "checkpoints" / step_name(5)
        assert opened.lines[0] == "changed since the start before: training.max_steps 10 -> 20"
        assert "num_processes 1 -> 2, versions.torch 2.13.0 -> 2.14.0" in opened.lines[1]
        assert load_recipe(path / "recipe.json") == OTHER_STEPS
    starts = run_json(path)["starts"]
    assert [start["resumed_from"] for start in starts] == [None, 5]
    assert starts[1]["changed"] == {"training.max_steps": [10, 20]}
    assert starts[1]["layout"] == other_layout
    assert starts[1]["command"] == "train.py --run.dir 'my run'"
    assert starts[1]["pid"] == os.getpid()
    with started(path, OTHER_STEPS) as (_, opened):  # the newest checkpoint still holds the recipe of the first start
        assert not [line for line in opened.lines if "recipe.json" in line or "changed" in line]


# --- The lock ---------------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_dead(run: Path) -> None:
    reader, pipe = os.pipe()

    def hold() -> None:
        RunFolder(run)
        worker = os.fork()  # as a DataLoader's worker, which outlives a killed process for some seconds
        if worker == 0:
            time.sleep(60)
        os.write(pipe, f"{worker}\n".encode())
        time.sleep(60)

    holder = fork(hold)
    worker = int(os.read(reader, 20))
    with pytest.raises(UserError) as caught:
        RunFolder(run)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{run} is in use by pid {holder} on host {socket.gethostname()}" in message
    assert "choose another --run.dir" in message
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    os.kill(worker, 0)  # alive
    RunFolder(run).close()
    os.kill(worker, signal.SIGKILL)


def test_a_child_that_closes_its_copy_closes_nothing_else(run: Path) -> None:
    folder = RunFolder(run)

    def close() -> None:
        descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]  # one of them under the lock's number
        folder.close()
        for descriptor in descriptors:
            os.fstat(descriptor)

    assert os.waitpid(fork(close), 0)[1] == 0
    with pytest.raises(UserError, match="is in use by pid"):
        RunFolder(run)
    folder.close()


def test_closing_frees_the_folder_and_a_second_one_in_the_same_process_is_refused(run: Path) -> None:
    first = RunFolder(run)
    with pytest.raises(UserError, match="is in use by pid"):
        RunFolder(run)
    first.close()
    first.close()
    RunFolder(run).close()


def test_a_file_system_without_locks(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    leftover = run / "checkpoints" / f".tmp-step-00000009-{os.getppid()}-01234567"
    leftover.mkdir()
    with started(run) as (_, opened):
        assert "cannot be locked (No locks available): make sure yourself that no second run uses it" in opened.lines[0]
        assert f"pid {os.getpid()} on host {socket.gethostname()}" in opened.lines[0], "the last to hold it"
        assert leftover.exists(), "its process lives, and may be saving"
    monkeypatch.undo()
    with started(run) as (_, opened):
        assert opened.lines == [f"removed {leftover.name}: a save of step-00000009 that did not finish"]


def test_folders_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=rf"the run folder {path} cannot be used: .*(File exists|Not a directory)"):
            RunFolder(path)
    really_open = os.open

    def refuse(path: Any, flags: int, *arguments: Any, **keywords: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return really_open(path, flags, *arguments, **keywords)

    monkeypatch.setattr(os, "open", refuse)  # root is refused nothing
    with pytest.raises(UserError, match=r"run\.lock: Read-only file system; choose a folder on a writable") as caught:
        RunFolder(tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_folder_of_another_user_that_everybody_may_write(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.chmod(0o777)
    RunFolder(run).close()
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(UserError, match=rf"belongs to user {owner} and everybody may write to it; .*chmod o-w"):
        RunFolder(run)
    run.chmod(0o775)  # a group that works together
    RunFolder(run).close()


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_with_a_table(run: Path) -> None:
    before = {file: file.read_bytes() for file in run.iterdir() if file.name in ("run.json", "recipe.json")}
    config = dataclasses.replace(
        OTHER_STEPS,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        data=DataConfig(path=("elsewhere",), sequence_length=512),
    )
    with pytest.raises(UserError) as caught, started(run, config):
        pass
    first, *rows = str(caught.value).splitlines()
    assert first.startswith(f"{run} holds a run with other settings")
    assert "choose another --run.dir" in first
    assert [row.split() for row in rows] == [
        ["setting", "this", "run", "asked", "for"],
        ["data.sequence_length", "1024", "512"],
        ["optimizer.learning_rate", "0.0006", "0.001"],
    ]
    assert {file: file.read_bytes() for file in before} == before, "a refused start leaves no trace"
    with started(run):
        pass


def test_a_moved_run_is_the_same_run(run: Path, tmp_path: Path) -> None:
    moved = run.rename(tmp_path / "moved")
    config = dataclasses.replace(CONFIG, run=RunConfig(dir=str(moved)), data=DataConfig(path=("/mnt/data",)))
    with started(moved, config) as (_, opened):
        assert opened.resolved.path == moved / "checkpoints" / step_name(5)
        assert run_json(moved)["starts"][-1]["changed"].keys() == {"run.dir", "data.path"}


def test_secrets_are_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "canary-7f3a9c21")
    path = tmp_path / "run"
    url = "s3://user:hunter2-canary@bucket/set?X-Amz-Signature=canary-5555"
    config = dataclasses.replace(CONFIG, data=DataConfig(path=(url,)))
    argv = ("train.py", "--data.path", url, "--wandb.name", "canary-7f3a9c21")
    for _ in range(2):
        with started(path, config, argv=argv) as (folder, opened):
            folder.set_status("failed", step=1, reason=f"cannot read {url} with canary-7f3a9c21")
            save(folder, 5)
            assert not [line for line in opened.lines if "changed" in line], "left out on both sides alike"
    files = [file for file in path.rglob("*") if file.is_file()]
    assert len(files) > 8
    assert [file for file in files if b"canary" in file.read_bytes()] == []


def test_words_of_a_choice_and_paths_are_recorded_whatever_variables_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DB_PASSWORD=postgres in the environment of a machine must not make a run impossible, nor its data unfindable."""
    for name, value in (("REDIS_AUTH", "disabled"), ("MINIO_AUTH", "constant"), ("DB_PASSWORD", "postgres")):
        monkeypatch.setenv(name, value)
    paths = ("data/postgres", "https://host/postgres/set")
    settings = {"wandb": WandbConfig(mode="disabled", name="postgres"), "schedule": ScheduleConfig(name="constant")}
    config = dataclasses.replace(CONFIG, data=DataConfig(path=paths), **settings)
    with started(tmp_path / "run", config):
        recorded = load_recipe(tmp_path / "run" / "recipe.json")
    assert (recorded.wandb.mode, recorded.schedule.name, recorded.wandb.name) == ("disabled", "constant", "[redacted]")
    assert recorded.data.path == ("data/postgres", "https://host/[redacted]/set")


# --- Damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run.json", "recipe.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b""),
        lambda file: os.truncate(file, file.stat().st_size // 2),
        lambda file: file.write_bytes(bytes(1000)),
        lambda file: os.truncate(file, 1 << 30),
        lambda file: file.write_text("[]"),
        lambda file: file.write_text("{}"),
        lambda file: file.write_text(file.read_text().replace("1", "2")),
        lambda file: file.write_text(file.read_text() + "\n"),
        lambda file: (file.unlink(), file.mkdir()),
        lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
    ],
    ids=["missing", "empty", "half", "zeros", "1 GB", "list", "object", "edited", "newline", "folder", "link"],
)
def test_a_damaged_file_is_rebuilt_from_the_newest_checkpoint(
    run: Path, name: str, damage: Callable[[Path], object]
) -> None:
    run_id, recipe = run_json(run)["id"], load_recipe(run / "recipe.json")
    damage(run / name)
    with started(run, OTHER_STEPS) as (folder, opened):
        said = [line for line in opened.lines if line.startswith(str(run / name))]
        assert len(said) == 1
        assert f"rebuilt from the copy in {run / 'checkpoints' / step_name(5)}" in said[0]
        assert folder.run_id == run_id
        save(folder, 6)
    assert load_recipe(run / "recipe.json") == OTHER_STEPS
    starts = run_json(run)["starts"]
    assert len(starts) == 2
    assert starts[1]["changed"] == {"training.max_steps": [10, 20]}, f"compared with {recipe}"
    with started(run, OTHER_STEPS) as (_, opened):
        assert opened.lines == []


@pytest.mark.parametrize("name", ["run.json", "recipe.json"])
def test_any_flipped_bit_is_found(run: Path, name: str) -> None:
    """Also in what was written after the newest checkpoint, which holds no copy of it."""
    with started(run, OTHER_STEPS):
        pass
    intact = {file: (run / file).read_bytes() for file in ("run.json", "recipe.json")}
    rng = random.Random(name)
    for offset in rng.sample(range(len(intact[name])), 25):
        damaged = bytearray(intact[name])
        damaged[offset] ^= 1 << rng.randrange(8)
        (run / name).write_bytes(damaged)
        with started(run, OTHER_STEPS) as (_, opened):
            assert [line for line in opened.lines if line.startswith(str(run / name)) and "rebuilt" in line], offset
        for file, data in intact.items():
            (run / file).write_bytes(data)


def test_the_damaged_file_is_kept_aside(run: Path) -> None:
    (run / "run.json").write_text("mine")
    with started(run):
        pass
    assert (run / "run.json.damaged").read_text() == "mine"


def test_damage_before_the_first_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with started(path) as (folder, _):
        run_id = folder.run_id
    (path / "recipe.json").write_text("{")
    with started(path) as (folder, opened):
        assert folder.run_id == run_id
        assert "no checkpoint holds a copy: written anew from this start's settings" in opened.lines[0]
    (path / "run.json").write_text("{")
    with started(path) as (folder, opened):
        assert folder.run_id != run_id
        assert f"no checkpoint holds a copy: the run gets the new id {folder.run_id}" in opened.lines[0]
    assert load_recipe(path / "recipe.json") == CONFIG


def test_damaged_checkpoints(run: Path) -> None:
    with started(run) as (folder, _):
        save(folder, 6)
    for step, text in ((6, "skipped the damaged checkpoint step-00000006"), (5, None)):
        (run / "checkpoints" / step_name(step) / "state.json").write_bytes(b"{}")
        if text is not None:
            with started(run) as (_, opened):
                assert opened.resolved.path == run / "checkpoints" / step_name(5)
                assert text in opened.lines[0]
                assert run_json(run)["starts"][-1]["resumed_from"] == 5
        else:
            with pytest.raises(UserError, match=r"no checkpoint in .* can be loaded"), started(run):
                pass


def test_a_run_whose_checkpoints_have_gone_does_not_begin_anew(run: Path) -> None:
    with started(run) as (folder, _):
        assert folder.saved_step == 5
        folder.set_status("running", step=7)
    (run / "checkpoints").rename(run / "elsewhere")
    lost = "has had a checkpoint of step 5 and has none now; put its checkpoints back"
    for remembering in ("status.json", "run.json"):  # each of the two is enough
        (run / ("run.json" if remembering == "status.json" else "status.json")).unlink()
        with pytest.raises(UserError, match=lost), started(run):
            pass
        if remembering == "status.json":
            (run / "elsewhere").rename(run / "checkpoints")
            with started(run):
                pass
            (run / "checkpoints").rename(run / "elsewhere")
    (run / "elsewhere").rename(run / "checkpoints")
    with started(run) as (_, opened):
        assert opened.resolved.path == run / "checkpoints" / step_name(5)


@pytest.mark.parametrize(
    "make", [Path.mkdir, Path.touch, lambda path: path.write_text("{}x")], ids=["folder", "empty", "x"]
)
def test_a_damaged_status_is_put_aside_aloud(run: Path, make: Callable[[Path], object]) -> None:
    make(run / "status.json")
    with started(run) as (folder, opened):
        assert opened.lines == [f"{run}/status.json was damaged: it is status.json.damaged now, and written anew"]
        folder.set_status("running", step=5)
    assert (run / "status.json.damaged").exists()


def test_a_damaged_status_is_none(run: Path) -> None:
    folder = RunFolder(run)
    for data in (b"", b"{", b"[]", bytes(100)):
        (run / "status.json").write_bytes(data)
        assert folder.status() is None
    folder.set_status("finished", step=10)
    status = folder.status()
    assert status is not None
    assert status["status"] == "finished"
    folder.close()


def test_files_of_another_version(run: Path) -> None:
    from toolkit.training.files import parse_json, render_json, sealed

    values = parse_json((run / "run.json").read_bytes(), where="")
    (run / "run.json").write_bytes(render_json(sealed(values | {"schema_version": 2})))
    with pytest.raises(UserError, match=r"run\.json has schema version 2, this toolkit reads 1"), started(run):
        pass
    (run / "run.json").write_bytes(render_json(values))
    recipe = render_json(to_dict(CONFIG) | {"future": {}})
    values["starts"][0]["recipe_sha256"] = hashlib.sha256(recipe).hexdigest()
    (run / "run.json").write_bytes(render_json(sealed(values)))
    (run / "recipe.json").write_bytes(recipe)
    with (
        pytest.raises(UserError, match=r"recipe\.json: unknown keys \['future'\].*made by another version"),
        started(run),
    ):
        pass


# --- Kills and full disks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [True, False], ids=["first start", "later start"])
def test_kill_at_each_phase_of_a_start(run: Path, tmp_path: Path, fresh: bool) -> None:
    """The next start of either settings finds nothing to repair, once anything was written."""

    def start(path: Path) -> None:
        with started(path, OTHER_STEPS) as (folder, _):
            folder.set_status("running", step=0)

    points = [f"{phase}=kill" for phase in OPEN_PHASES] + [f"files.before-replace=kill@{n}" for n in (1, 2, 3)]
    for index, point in enumerate(points):
        path = tmp_path / f"run-{index}" if fresh else shutil.copytree(run, tmp_path / f"run-{index}")
        with failpoints(point):
            status = os.waitpid(fork(lambda path=path: start(path)), 0)[1]
        assert os.WIFSIGNALED(status), point
        before = run_json(path)["id"] if (path / "run.json").exists() else None
        with started(path, OTHER_STEPS if index % 2 else CONFIG) as (folder, opened):
            assert before in (None, folder.run_id)
            repaired = [line for line in opened.lines if "damaged" in line or "rebuilt" in line]
            assert repaired == [], point
            assert (path / "recipe.json").exists()
            assert not (path / "run.json.damaged").exists()
        assert {file.name for file in path.iterdir()} <= {
            *("run.json", "recipe.json", "status.json", "run.lock", "checkpoints", ".status.json.tmp"),
        }, point


def test_a_full_disk(run: Path) -> None:
    before = (run / "run.json").read_bytes()
    with (
        failpoints("files.before-replace=fail"),
        pytest.raises(UserError, match=r"the run folder .* cannot be used: .*No space left on device"),
        started(run),
    ):
        pass
    assert (run / "run.json").read_bytes() == before
    assert not (run / ".run.json.tmp").exists()
    folder = RunFolder(run)
    folder.set_status("running", step=5)
    with failpoints("files.before-replace=fail"), pytest.raises(OSError, match="No space left"):
        folder.set_status("finished", step=10)
    status = folder.status()
    assert status is not None
    assert status["step"] == 5
    folder.close()


def test_a_run_that_crashes_at_every_start_does_not_grow_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "MAX_STARTS", 3)
    for number in range(6):
        with started(tmp_path / "run", argv=(str(number),)):
            pass
    assert [start["command"] for start in run_json(tmp_path / "run")["starts"]] == ["0", "4", "5"]


def test_every_checkpoint_carries_the_copies(run: Path) -> None:
    checkpoint = run / "checkpoints" / step_name(5)
    for name in ("run.json", "recipe.json"):
        assert read_extra(checkpoint, name) == (run / name).read_bytes()
