"""Recipes as users start them: launched, on several processes and machines, killed, signalled, and mistyped."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes.train_demo import CONFIG as DEMO
from tests.support import ROOT, change, command, environment, flags, rows
from toolkit.config import TrainConfig

RECIPE = "recipes/train_demo.py"
TWO = (
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
)
MACHINES = ("--multi_gpu", "--num_processes", "2", "--num_machines", "2", "--main_process_ip", "127.0.0.1", *TWO[5:])
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]


def start(
    config: TrainConfig, *, launch: tuple[str, ...] | None = None, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """The recipe running in the background, in a session of its own, with its output in pipes."""
    prefix = [sys.executable] if launch is None else [*LAUNCH, *launch]
    return subprocess.Popen(
        [*prefix, RECIPE, *flags(config, DEMO)],
        env=env or environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(run: Path, step: int, *, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        path = run / "metrics.jsonl"
        if path.exists() and path.read_text().count('"loss/train"') >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within {timeout} s")


def assert_close(one: Path, other: Path) -> None:
    """The same samples in every step, the same metrics to within rounding."""
    assert rows(one, "ledger") == rows(other, "ledger")
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-5 if name.startswith(("loss/", "bits")) else 1e-3), name


def children_of(pid: int) -> list[int]:
    """Process ids of a launcher's Python children. Source: proc(5)."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def gone(pids: list[int], *, within: float) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not any(
            Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
            for pid in pids
        ):
            return True
        time.sleep(0.1)
    return False


def test_two_processes_and_two_machines_train_what_one_process_trains(tiny: TrainConfig, tmp_path: Path) -> None:
    runs = {name: change(tiny, run={"dir": str(tmp_path / name)}) for name in ("one", "two", "machines")}
    one = command(RECIPE, *flags(runs["one"], DEMO))
    assert one.returncode == 0, one.stderr
    two = command(RECIPE, *flags(runs["two"], DEMO), launch=TWO)
    assert two.returncode == 0, two.stderr
    assert "2 processes on cpu" in two.stderr
    assert_close(tmp_path / "one", tmp_path / "two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    machines = change(runs["machines"], training={"micro_batch_size": 1})
    started = [
        start(
            machines,
            launch=(*MACHINES, "--machine_rank", str(rank), "--main_process_port", port),
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert "2 processes on cpu" in outputs[0]
    assert_close(tmp_path / "one", tmp_path / "machines")


def test_a_killed_run_continues_as_if_nothing_had_happened(tiny: TrainConfig, tmp_path: Path) -> None:
    whole = change(tiny, run={"dir": str(tmp_path / "whole")}, model={"dropout": 0.1})
    cut = change(whole, run={"dir": str(tmp_path / "cut")})
    assert command(RECIPE, *flags(whole, DEMO)).returncode == 0
    # Half-way through step 6, then while the checkpoint of step 8 is being written.
    for point in ("trainer.before-backward=kill@22", "checkpoint.before-rename=kill@2"):
        killed = command(RECIPE, *flags(cut, DEMO), env=environment(TOOLKIT_FAILPOINTS=point))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = command(RECIPE, *flags(cut, DEMO))
    assert finished.returncode == 0, finished.stderr
    assert "dropped" in finished.stderr
    for name in ("metrics", "ledger", "samples"):
        assert rows(tmp_path / "cut", name) == rows(tmp_path / "whole", name)
    last = "checkpoints/step-00000008"
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "cut" / last / name).read_bytes() == (tmp_path / "whole" / last / name).read_bytes()
    starts = json.loads((tmp_path / "cut" / "run.json").read_text())["starts"]
    assert starts[1]["last_logged_step"] == 5  # of which the steps after the checkpoint are done again
    resumed_from = [start["resumed_from"] for start in starts]
    assert resumed_from[0] is None
    assert resumed_from[1] in (2, 4)  # the save of step 4 was in flight in the background
    assert resumed_from[2] in (4, 6)


def long(tiny: TrainConfig, **training: object) -> TrainConfig:
    """A run that goes on until it is stopped, and does nothing but train."""
    fields = {"max_steps": 100_000, "eval_every": None, "sample_every": None, "checkpoint_every": None, **training}
    return change(tiny, training=fields)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_to_one_process_saves_and_leaves(tiny: TrainConfig, number: signal.Signals) -> None:
    config = long(tiny)
    run = Path(config.run.dir)
    process = start(config)
    wait_for_step(run, 3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "preempted"
    assert number.name in status["reason"]
    assert (run / "checkpoints" / f"step-{status['step']:08d}" / "manifest.json").exists()
    assert rows(run)[-1]["step"] == status["step"]


def test_a_second_signal_leaves_at_once(tiny: TrainConfig) -> None:
    config = long(tiny, checkpoint_every=1)
    run = Path(config.run.dir)
    process = start(config, env=environment(TOOLKIT_FAILPOINTS="checkpoint.before-rename=sleep:60@4+"))
    wait_for_step(run, 4)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert process.poll() is None  # the save of step 4 sleeps
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    assert "received SIGTERM again: leaving at once" in output
    assert (run / "checkpoints" / "step-00000003" / "manifest.json").exists()


def test_a_signal_to_one_of_two_ranks_stops_both_at_one_step_and_a_dead_launcher_stops_all(tiny: TrainConfig) -> None:
    config = long(tiny)
    run = Path(config.run.dir)
    process = start(config, launch=TWO)
    wait_for_step(run, 3)
    ranks = children_of(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGTERM)  # the higher process id: most likely rank 1; either must do
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    stopped_at = json.loads((run / "status.json").read_text())
    assert stopped_at["status"] == "preempted"

    process = start(config, launch=TWO)  # continues, until its launcher is killed
    wait_for_step(run, stopped_at["step"] + 3)
    ranks = children_of(process.pid)
    process.kill()
    process.communicate(timeout=30)
    assert gone(ranks, within=30)
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "preempted"
    assert "launcher has died" in status["reason"]
    assert status["step"] > stopped_at["step"]


def test_a_dead_rank_takes_the_job_down_and_a_stuck_one_is_found(tiny: TrainConfig) -> None:
    config = long(tiny)
    dead = command(
        RECIPE,
        *flags(config, DEMO),
        launch=TWO,
        env=environment(TOOLKIT_FAILPOINTS="trainer.before-backward#1=kill@9"),
        timeout=60,
    )
    assert dead.returncode != 0
    assert "Signal 9 (SIGKILL)" in dead.stderr or "exitcode  : -9" in dead.stderr
    stuck = command(
        RECIPE,
        *flags(change(config, training={"watchdog_minutes": 0.05}), DEMO),
        launch=TWO,
        env=environment(TOOLKIT_FAILPOINTS="trainer.before-backward#1=sleep:60@9"),
        timeout=60,
    )
    assert stuck.returncode != 0
    assert stuck.stderr.count("Timeout (0:00:03)!") == 2  # every rank prints its stacks
    assert "failpoint.py" in stuck.stderr  # the line that hangs


def test_bad_input_gets_one_line_from_the_main_process_and_no_traceback(tiny: TrainConfig, tmp_path: Path) -> None:
    config = change(tiny, data={"path": (str(tmp_path / "missing"),)})
    single = command(RECIPE, *flags(config, DEMO))
    double = command(RECIPE, *flags(config, DEMO), launch=TWO)
    for result in (single, double):
        assert result.returncode != 0
        assert result.stderr.count("error: ") == 1
        assert str(tmp_path / "missing") in result.stderr
        assert "toolkit prepare" in result.stderr
    assert "Traceback" not in single.stderr
    unknown = command(RECIPE, "--model.n-layers", "3")
    assert unknown.returncode == 2
    assert "--model.n-layer" in unknown.stderr + unknown.stdout
    assert "Traceback" not in unknown.stderr


def test_a_full_disk_stops_all_with_one_line(tiny: TrainConfig) -> None:
    config = change(tiny, training={"max_steps": 1000, "checkpoint_every": 4, "eval_every": None, "sample_every": None})
    result = command(
        RECIPE, *flags(config, DEMO), launch=TWO, env=environment(TOOLKIT_FAILPOINTS="checkpoint.before-model=fail@2")
    )
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1
    assert "No space left on device" in result.stderr
    run = Path(config.run.dir)
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "failed"
    assert "No space left on device" in status["reason"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    assert rows(run)[-1]["step"] < 100  # it did not train on for long


def test_the_time_limit_saves_and_leaves(tiny: TrainConfig) -> None:
    config = long(tiny, max_hours=1e-5)
    result = command(RECIPE, *flags(config, DEMO))
    assert result.returncode == 0, result.stderr
    status = json.loads((Path(config.run.dir) / "status.json").read_text())
    assert status["status"] == "preempted"
    assert "training.max_hours" in status["reason"]
