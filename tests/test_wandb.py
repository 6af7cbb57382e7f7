"""Weights & Biases as a mirror that can never hurt: real wandb, offline and against a stand-in server on 127.0.0.1."""

import fcntl
import json
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from tests.support import ROOT
from tests.wandb_reader import offline_runs
from tests.wandb_server import WandbServer
from toolkit.config import RunConfig, SamplingConfig, TrainConfig, WandbConfig, to_dict
from toolkit.errors import UserError
from toolkit.training import trainer as trainer_module
from toolkit.training.metrics import RunLog, read_rows
from toolkit.training.trainer import Trainer
from toolkit.training.wandb_mirror import WandbMirror, has_key, resolve_mode
from toolkit.training.wandb_sync import wandb_sync

KEY = "0123456789" * 4
LIMITS: dict[Any, float] = {"finished": 20.0, "preempted": 20.0, "failed": 20.0}
NAMES = {  # DESIGN: the names of the metrics
    *("step", "tokens", "loss/train", "learning_rate", "optimizer/grad_norm", "throughput/tokens_per_second"),
    *("throughput/mfu", "memory/peak_gib", "time/step_seconds"),
}


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)
    caplog.set_level(logging.INFO, logger="toolkit")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    server = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield server
    server.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "fine"
    folder.mkdir(parents=True)
    return folder


def row(step: int) -> dict[str, Any]:
    values = dict.fromkeys(NAMES, step / 7)
    return values | {"step": step, "tokens": step * 1024}


def evaluation(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": step * 1024, "loss/val": 3 + 1 / step, "bits_per_byte/val": 1 + 1 / step}


def samples(step: int) -> list[dict[str, Any]]:
    return [{"step": step, "tokens": step * 1024, "prompt": "Once", "text": f"upon a time {step}"}]


def expected(step: int) -> dict[str, Any]:
    return row(step) | (evaluation(step) if step % 10 == 0 else {})


def mirror(mode: str = "online", **settings: Any) -> WandbMirror:
    return WandbMirror(WandbConfig(mode=mode), **({"finish_seconds": LIMITS, "init_seconds": 10.0} | settings))  # type: ignore[arg-type]


def log_steps(mirror: WandbMirror, first: int, last: int) -> float:
    """Logs the steps as a trainer does; returns the longest time that training had to wait for it."""
    longest = 0.0
    for step in range(first, last + 1):
        began = time.perf_counter()
        mirror.log(row(step))
        if step % 10 == 0:
            mirror.log(evaluation(step))
            mirror.log_samples(step, samples(step))
        longest = max(longest, time.perf_counter() - began)
    return longest


def without_internals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith(("_", "samples"))} for row in rows]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in said(caplog) if record.levelno >= logging.WARNING]


def said(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the mirror logged: a thread that another test has left behind may log meanwhile, too."""
    return [record for record in caplog.records if record.name.startswith("toolkit.training.")]


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


@contextmanager
def stopped(pid: int | None) -> Iterator[None]:
    """The process makes no progress within the block."""
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def has_ended(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


# ---------------------------------------------------------------------------------------------------------- mode


@pytest.mark.parametrize(
    ("mode", "environ", "expected_mode", "said"),
    [
        (
            "auto",
            {},
            "offline",
            "no API key, so this run is recorded offline; to see it in W&B: `wandb login` once, then",
        ),
        ("auto", {"WANDB_API_KEY": KEY}, "online", None),
        ("auto", {"WANDB_API_KEY": "  "}, "offline", "no API key"),
        ("auto", {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, "offline", None),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled", None),
        ("auto", {"WANDB_MODE": "dryrun"}, "offline", None),
        ("auto", {"WANDB_MODE": "online", "WANDB_API_KEY": KEY}, "online", None),
        (
            "auto",
            {"WANDB_MODE": "online"},
            "offline",
            "online was asked for but there is no API key; recording offline",
        ),
        ("auto", {"WANDB_MODE": "ofline"}, "offline", "WANDB_MODE=ofline is none of online, offline, disabled"),
        ("auto", {"WANDB_DISABLED": "true", "WANDB_API_KEY": KEY}, "disabled", None),
        ("offline", {"WANDB_API_KEY": KEY}, "offline", None),
        ("offline", {"WANDB_MODE": "offline"}, "offline", None),
        ("offline", {"WANDB_MODE": "online"}, "offline", "--wandb.mode offline wins over WANDB_MODE=online"),
        (
            "disabled",
            {"WANDB_MODE": "online", "WANDB_API_KEY": KEY},
            "disabled",
            "disabled wins over WANDB_MODE=online",
        ),
        ("online", {"WANDB_MODE": "disabled", "WANDB_API_KEY": KEY}, "online", "online wins over WANDB_MODE=disabled"),
        ("online", {}, "offline", "online was asked for but there is no API key"),
        ("offline", {"WANDB_DISABLED": "true"}, "offline", "--wandb.mode offline wins over WANDB_DISABLED=true"),
        ("disabled", {"WANDB_DISABLED": "true"}, "disabled", None),
    ],
)
def test_the_mode(mode: str, environ: dict[str, str], expected_mode: str, said: str | None) -> None:
    environ = {"HOME": "/nonexistent"} | environ
    resolved, lines = resolve_mode(mode, environ)
    assert resolved == expected_mode
    assert [said in line and "\n" not in line for line in lines] == ([True] if said else [])  # type: ignore[operator]


@pytest.mark.parametrize(
    ("machine", "variables", "settings", "found"),
    [
        ("api.wandb.ai", {}, "", True),
        ("api.forge.coreweave.com", {}, "", True),
        ("github.com", {}, "", False),
        ("api.wandb.ai", {"WANDB_BASE_URL": "https://wandb.example.org"}, "", False),
        ("wandb.example.org:8080", {"WANDB_BASE_URL": "http://wandb.example.org:8080"}, "", True),
        ("wandb.example.org", {}, "[default]\nbase_url = https://wandb.example.org\n", True),
        ("wandb.example.org", {}, "not an ini file %", False),
    ],
)
def test_a_key_in_netrc(tmp_path: Path, machine: str, variables: dict[str, str], settings: str, found: bool) -> None:
    (tmp_path / ".netrc").write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
    (tmp_path / ".config" / "wandb").mkdir(parents=True)
    (tmp_path / ".config" / "wandb" / "settings").write_text(settings)
    assert has_key({"HOME": str(tmp_path)} | variables) is found
    (tmp_path / ".netrc").write_text("machine [ ???")
    assert has_key({"HOME": str(tmp_path)} | variables) is False


# ------------------------------------------------------------------------------------- what W&B has at the end

TRAINING = """
import json, os, sys, time
from pathlib import Path
from tests.test_wandb import log_steps, mirror, row
mirror = mirror("offline")
mirror.start(json.loads(os.environ["RECIPE"]), "id123", folder=Path(sys.argv[1]))
log_steps(mirror, 1, 29)
mirror.log(row(30))  # and no evaluation: it is killed in it
print(mirror.pid, flush=True)
print("canary-printed", file=sys.stderr)
time.sleep(600)
"""

CANARIES = {
    "HF_TOKEN": "canary-environment-hf",
    "AWS_SECRET_ACCESS_KEY": "canary-environment-aws",
    "HTTPS_PROXY": "http://canary-user:canary-proxy@127.0.0.1:9",
}


def test_offline_through_a_kill_then_wandb_sync(
    folder: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    recipe = to_dict(TrainConfig(sampling=SamplingConfig(prompt="say canary-environment-hf")))
    recipe["data"]["path"] = ["https://user:canary-url@host/data?X-Amz-Signature=canary-signature"]
    monkeypatch.setenv("RECIPE", json.dumps(recipe))
    command = [sys.executable, "-c", TRAINING, folder, "--token=canary-argument"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as training:
        assert training.stdout is not None
        helper = int(training.stdout.readline())
        until(lambda: list(folder.glob("wandb/*/*.wandb")))
        with stopped(helper):  # it takes its time to finish the run, and the next one waits for it
            training.kill()
            again = mirror("offline")  # from the checkpoint at step 20
            again.start(recipe, "id123", folder=folder)
            log_steps(again, 21, 50)
            time.sleep(3)  # longer than wandb takes to start
    again.finish("finished")

    first, second = offline_runs(folder)
    assert without_internals(first.rows) == [expected(step) for step in range(1, 30)]
    assert without_internals(second.rows) == [expected(step) for step in range(30, 51)]
    assert [run["_step"] for run in first.rows + second.rows] == list(range(1, 51))
    assert [(run.run_id, run.exit_code) for run in (first, second)] == [("id123", 1), ("id123", 0)]
    assert (second.project, second.name, second.tags) == ("gpt2-toolkit", "fine", ["a", "b"])
    assert second.metrics == {"step": "", "*": "step"}
    assert second.config["training"] == recipe["training"]
    table = json.loads((second.folder / "files" / second.rows[-1]["samples/path"]).read_text())
    assert table == {"columns": list(samples(50)[0]), "data": [list(samples(50)[0].values())]}
    assert warnings(caplog) == []
    assert f"`toolkit wandb-sync {folder}`" in said(caplog)[-1].getMessage()
    assert str(second.folder) in said(caplog)[-1].getMessage()

    monkeypatch.delenv("HTTPS_PROXY")
    sync = [sys.executable, "-m", "wandb", "sync", str(first.folder), str(second.folder)]
    subprocess.run(sync, check=True, capture_output=True)
    assert [run["_step"] for run in server.history["id123"]] == list(range(1, 51))
    assert without_internals(server.history["id123"]) == [expected(step) for step in range(1, 51)]
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        assert b"canary" not in path.read_bytes(), path
    assert not {"wandb-metadata.json", "requirements.txt"} & {path.name for path in files}
    assert not any(b"canary" in body for body in server.bodies)
    assert not any("canary" in request for request in server.requests)


def test_online_a_resumed_run_is_continued_without_a_step_twice(
    folder: Path, server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = to_dict(TrainConfig())
    for first, last, status in ((1, 30, "preempted"), (21, 50, "finished")):
        run = mirror()
        run.start(recipe, "id123", folder=folder)
        assert log_steps(run, first, last) < 3.0  # typically 0.001 s; the rest is a busy machine
        run.finish(status)  # type: ignore[arg-type]
    assert [row["_step"] for row in server.history["id123"]] == list(range(1, 51))
    assert without_internals(server.history["id123"]) == [expected(step) for step in range(1, 51)]
    assert server.exit_codes == {"id123": 0}
    assert sum("samples_50" in request for request in server.requests) == 1
    assert warnings(caplog) == []
    assert [record.getMessage() for record in said(caplog)] == [
        f"W&B: {server.url}/e/p/runs/id123",
        f"W&B: {server.url}/e/p/runs/id123",
        "W&B: it had 12 of these rows already and keeps its own",
    ]
    assert not any(KEY.encode() in body for body in server.bodies)
    assert not any("otel" in request for request in server.requests)  # wandb's telemetry


def test_a_step_whose_evaluation_a_stop_cut_short_is_sent_as_a_whole_by_the_next_start(
    tiny: TrainConfig, fit: Callable[[TrainConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, run=RunConfig(dir=str(tmp_path / "run")), wandb=WandbConfig(mode="offline"))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_anyone_wants_to_stop", lambda trainer: trainer.step == 4)
        folder = fit(config)
        fit(config)  # and is cut short once more
    assert json.loads((folder / "status.json").read_text())["status"] == "preempted"
    fit(config)
    first, again, second = offline_runs(folder)
    assert [row["step"] for row in first.rows] == [1, 2, 3]
    assert again.rows == []
    assert [row["step"] for row in second.rows] == [4, 5, 6, 7, 8]
    rows = {row["step"]: row for row in first.rows + second.rows}
    for recorded in read_rows(folder / "metrics.jsonl"):
        assert rows[recorded["step"]].items() >= recorded.items()
    assert [row["step"] for row in second.rows if "loss/val" in row] == [4, 8]
    assert [row["step"] for row in second.rows if "samples/path" in row] == [4, 8]


def test_a_step_in_whose_evaluation_a_run_failed_is_sent_as_a_whole_by_the_next_start(
    tiny: TrainConfig, fit: Callable[[TrainConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, run=RunConfig(dir=str(tmp_path / "run")), wandb=WandbConfig(mode="offline"))
    for part in ("evaluate", "generate"):
        with monkeypatch.context() as patch:

            def fail(model: object, *arguments: object, **settings: object) -> None:
                raise UserError("as on a device that is gone")

            patch.setattr(trainer_module, part, fail)
            with pytest.raises(UserError, match="a device that is gone"):
                fit(config)
    folder = fit(config)
    runs = offline_runs(folder)
    assert [row["step"] for run in runs for row in run.rows] == list(range(1, 9))
    assert [row["step"] for row in runs[-1].rows if "loss/val" in row] == [4, 8]
    assert [row["step"] for row in runs[-1].rows if "samples/path" in row] == [4, 8]


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_loop_that_saves_before_it_evaluates_has_its_last_step_in_wandb(tiny: TrainConfig, evaluates: bool) -> None:
    config = replace(tiny, wandb=WandbConfig(mode="offline"))
    AcceleratorState._reset_state(True)
    with Trainer(config) as trainer:
        trainer.resume()
        while trainer.step < 8:
            trainer.log(trainer.train_step())
            if trainer.due(4):
                trainer.save()
                if evaluates:
                    trainer.evaluate()
        trainer.finish()
    (run,) = offline_runs(Path(config.run.dir))
    assert [row["step"] for row in run.rows] == list(range(1, 9))
    assert ("loss/val" in run.rows[-1]) is evaluates


def test_a_start_sends_again_what_the_one_before_knew_of_its_last_step(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for first, complete in ((1, False), (20, True), (20, True)):
        run = mirror("offline")
        run.start(to_dict(TrainConfig()), "id123", folder=folder)
        if first == 20:
            run.log(row(20), again=True)
            run.log(evaluation(20), again=True)
            run.log_samples(20, samples(20), again=True)
        else:
            log_steps(run, 1, 20)
        run.finish("preempted", step_is_complete=complete)
    rows = [recorded for one in offline_runs(folder) for recorded in one.rows]
    assert without_internals(rows) == [expected(step) for step in range(1, 21)]
    assert "rows already" not in caplog.text  # the third start's are not worth a word


def test_training_is_the_same_with_wandb_without_it_and_with_wandb_in_trouble(
    tiny: TrainConfig, fit: Callable[[TrainConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    folders = [
        fit(replace(tiny, run=RunConfig(dir=str(tmp_path / mode)), wandb=WandbConfig(mode=mode)))  # type: ignore[arg-type]
        for mode in ("disabled", "offline", "online")
    ]
    logs = [list(read_rows(folder / "metrics.jsonl")) for folder in folders]
    assert [steady(log) for log in logs] == [steady(logs[0])] * 3
    weights = [next(folder.glob("checkpoints/step-*8/model.safetensors")).read_bytes() for folder in folders]
    assert weights == [weights[0]] * 3
    for folder, log in zip(folders[1:], logs[1:], strict=True):
        (run,) = offline_runs(folder)
        assert run.run_id == json.loads((folder / "run.json").read_text())["id"]
        assert [row["step"] for row in run.rows] == list(range(1, 9))
        for recorded in log:  # training rows and evaluations, each with all that it holds
            assert run.rows[recorded["step"] - 1].items() >= recorded.items()
        assert all(set(row) >= NAMES - {"throughput/mfu"} for row in run.rows)  # no peak is known for this CPU
        assert [row["step"] for row in run.rows if "samples/path" in row] == [4, 8]


def steady(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what is measured with a clock or depends on what else the process did."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/", "memory/"))} for row in rows]


# ------------------------------------------------------------------------------------------------------- trouble


@dataclass
class Trouble:
    """What became of one run whose W&B met something."""

    folder: Path
    mirror: WandbMirror
    warnings: list[str] = field(default_factory=list)
    longest_wait: float = 0.0
    finish_seconds: float = 0.0
    processes: list[int] = field(default_factory=list)

    def log(self, first: int, last: int) -> None:
        self.longest_wait = max(self.longest_wait, log_steps(self.mirror, first, last))

    def steps(self) -> list[int]:
        (run,) = offline_runs(self.folder)
        return [row["step"] for row in run.rows]


@pytest.fixture(scope="module")
def troubles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Trouble]]:
    """All of them side by side, since most of the time is wandb starting: name -> what became of it."""
    base = tmp_path_factory.mktemp("troubles")
    silent, falls_silent = WandbServer(), WandbServer()
    silent.silent.set()
    closed = socket.socket()  # bound, not listening: connections are refused
    closed.bind(("127.0.0.1", 0))
    with pytest.MonkeyPatch.context() as patch, collected_warnings() as said:
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("HOME", str(base))

        def begin(name: str, mode: str = "online", **settings: Any) -> Trouble:
            folder = base / name
            folder.mkdir(exist_ok=True)
            run = mirror(mode, **settings)
            run.start({}, "id123", folder=folder)
            return Trouble(folder, run)

        patch.setenv("WANDB_BASE_URL", silent.url)
        runs = {"start hangs": begin("start hangs", init_seconds=4.0)}
        patch.setenv("WANDB_BASE_URL", falls_silent.url)
        runs["finish hangs"] = begin("finish hangs", finish_seconds={"failed": 1.0})
        patch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        runs["unreachable"] = begin("unreachable")
        runs["helper dies"] = begin("helper dies", "offline")
        runs["core dies"] = begin("core dies", "offline")
        (base / "no folder").mkdir()
        (base / "no folder" / "wandb").write_text("a file where the folder should be")
        runs["no folder"] = begin("no folder", "offline")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # for this helper, which inherits it
        runs["disk full"] = begin("disk full", "offline")
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        runs["takes nothing"] = begin("takes nothing", "offline")

        with stopped(runs["takes nothing"].mirror.pid), pytest.MonkeyPatch.context() as smaller:
            smaller.setattr("toolkit.training.wandb_mirror.MAX_WAITING_BYTES", 100_000)
            runs["takes nothing"].log(1, 3000)
        runs["disk full"].log(1, 200)
        for name in ("start hangs", "unreachable", "no folder"):
            runs[name].log(1, 20)
        for name in ("finish hangs", "helper dies", "core dies"):
            run = runs[name]
            until(lambda run=run: is_recording(run))
            run.processes = [run.mirror.pid or 0, *children(run.mirror.pid or 0)]
            run.log(1, 20)
        falls_silent.silent.set()
        os.kill(runs["helper dies"].processes[0], signal.SIGKILL)
        os.kill(runs["core dies"].processes[1], signal.SIGKILL)
        for step in range(21, 121):
            for name in ("finish hangs", "helper dies", "core dies"):
                runs[name].log(step, step)
            time.sleep(0.005)
        for name in sorted(runs, key=lambda name: name == "start hangs"):
            began = time.monotonic()
            runs[name].mirror.finish("failed")
            runs[name].finish_seconds = time.monotonic() - began
        for run in runs.values():
            run.mirror.log(row(9999))  # after the end: nothing
            run.warnings = [text for text in said if f"wandb-sync {run.folder}`" in text]
        assert sum(len(run.warnings) for run in runs.values()) == len(said)
    yield runs
    closed.close()
    silent.close()
    falls_silent.close()


def is_recording(run: Trouble) -> bool:
    """True once wandb has said where it records: its helper is up and the run has begun."""
    run.mirror.log(row(0))
    return bool(list(run.folder.glob("wandb/*run-*/run-id123.wandb"))) and len(children(run.mirror.pid or 0)) == 1


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("toolkit.training.wandb_mirror")
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("start hangs", "recording offline"),
        ("finish hangs", "not everything was recorded within 1 s"),
        ("unreachable", r"127\.0\.0\.1:\d+ cannot be reached .*; recording offline"),
        ("helper dies", "its helper process ended with status -9"),
        ("core dies", "wandb's own process, wandb-core, has ended"),
        ("disk full", "not everything was recorded;"),
        ("no folder", "NotADirectoryError"),
        ("takes nothing", r"\d+ rows were left out because it did not take them"),
    ],
)
def test_trouble_costs_one_warning_and_no_time(troubles: dict[str, Trouble], name: str, warning: str) -> None:
    run = troubles[name]
    assert len(run.warnings) == 1
    assert re.search(warning, run.warnings[0])
    assert "metrics.jsonl has every row" in run.warnings[0]
    assert run.longest_wait < 3.0  # typically 0.001 s; the rest is a busy machine
    assert run.finish_seconds < (5 if name == "finish hangs" else 21)
    until(lambda: all(has_ended(pid) for pid in run.processes))


@pytest.mark.parametrize("name", ["start hangs", "unreachable"])
def test_without_a_server_every_row_is_recorded_offline(troubles: dict[str, Trouble], name: str) -> None:
    assert troubles[name].steps() == list(range(1, 21))


def test_rows_left_out_for_want_of_memory_leave_the_others_in_order(troubles: dict[str, Trouble]) -> None:
    steps = troubles["takes nothing"].steps()
    assert steps == list(range(1, len(steps) + 1))
    assert 100 < len(steps) < 3000


def test_without_wandb_there_is_one_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = mirror("offline")
    run.start({}, "id123", folder=folder)
    log_steps(run, 1, 20)
    run.finish("finished")
    assert len(warnings(caplog)) == 1
    assert "the package wandb is not installed (pip install wandb)" in warnings(caplog)[0]


def test_disabled_starts_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = mirror("disabled")
    run.start({}, "id123", folder=folder)
    log_steps(run, 1, 20)
    run.finish("finished")
    assert run.pid is None
    assert [record.getMessage() for record in said(caplog)] == []
    assert list(folder.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- wandb-sync


def finished_run(folder: Path, steps: int) -> None:
    (folder / "run.json").write_text(json.dumps({"id": "id123"}))
    (folder / "recipe.json").write_text(
        json.dumps(to_dict(TrainConfig(wandb=WandbConfig(mode="disabled", tags=("c",)))))
    )
    (folder / "status.json").write_text(json.dumps({"status": "finished"}))
    log = RunLog(folder)
    for step in range(1, steps + 1):
        log.append("metrics", row(step))
        if step % 10 == 0:
            log.append("metrics", evaluation(step))
            for text in samples(step):
                log.append("samples", text)


def test_wandb_sync_rebuilds_the_run_from_its_metrics(folder: Path, tmp_path: Path, server: WandbServer) -> None:
    finished_run(folder, 30)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')  # the run was cut off there
    first, *_, last = wandb_sync(folder, offline_to=tmp_path / "copy")
    assert first == f"{folder / 'metrics.jsonl'}: left out 1 damaged lines (the first is line 34)"
    assert last == "W&B has all of it"
    (offline,) = offline_runs(tmp_path / "copy")
    assert without_internals(offline.rows) == [expected(step) for step in range(1, 31)]
    assert (offline.run_id, offline.name, offline.tags, offline.exit_code) == ("id123", "fine", ["c"], 0)
    assert offline.config["training"] == to_dict(TrainConfig())["training"]
    assert [row["_step"] for row in offline.rows if "samples/path" in row] == [10, 20, 30]

    assert list(wandb_sync(folder))[1:3] == [
        f"{folder}: 30 steps up to step 30, W&B id id123",
        f"W&B: {server.url}/e/p/runs/id123",
    ]
    assert [row["_step"] for row in server.history["id123"]] == list(range(1, 31))
    RunLog(folder).truncate_after(30)
    finished_run(folder, 0)
    for step in range(31, 36):
        RunLog(folder).append("metrics", row(step))
    assert "W&B has this run up to step 30 and keeps that" in list(wandb_sync(folder))[2]
    assert without_internals(server.history["id123"]) == [expected(step) for step in range(1, 36)]
    list(wandb_sync(folder, fresh=True))
    (copy,) = set(server.history) - {"id123"}
    assert without_internals(server.history[copy]) == [expected(step) for step in range(1, 36)]
    assert not (folder / "wandb").exists()


def test_wandb_sync_says_what_is_wrong_in_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message() -> str:
        with pytest.raises(UserError) as caught:
            list(wandb_sync(folder))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is not a run folder (it has no run.json)" in message()
    finished_run(folder, 0)
    assert "has no rows" in message()
    RunLog(folder).append("samples", samples(3)[0])
    assert "metrics.jsonl has no rows" in message()
    finished_run(folder, 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to --offline-to .*file: .*name a folder"):
        list(wandb_sync(folder, offline_to=tmp_path / "file"))
    assert "W&B has no API key here; `wandb login` once" in message()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert "127.0.0.1:9 cannot be reached" in message()
    with (folder / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is being trained now" in message()
    (folder / "run.json").write_text("{")
    assert "run.json cannot be read" in message()
