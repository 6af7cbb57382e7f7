"""Recipes as users start them: launched, on several processes and machines, killed, signalled, and mistyped."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from recipes.train_demo import CONFIG as DEMO
from tests.support import ROOT, change, command, environment, flags, rows
from toolkit.config import TrainConfig
from toolkit.data.loader import open_data, sample_windows
from toolkit.model.huggingface import config_json

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
    "--main_process_port",
    "0",  # a free one: tests run side by side, and two launchers that start at once would both take 29500
)
MACHINES = ("--multi_gpu", "--num_processes", "2", "--num_machines", "2", "--main_process_ip", "127.0.0.1", *TWO[5:9])
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]


_started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """A test that fails would leave a run behind that goes on for ever."""
    yield
    for process in _started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    _started.clear()


def start(
    config: TrainConfig, *, launch: tuple[str, ...] | None = None, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """The recipe running in the background, in a session of its own, with its output in pipes."""
    prefix = [sys.executable] if launch is None else [*LAUNCH, *launch]
    process = subprocess.Popen(
        [*prefix, RECIPE, *flags(config, DEMO)],
        env=env or environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    _started.append(process)
    return process


def wait_for_step(run: Path, step: int, *, timeout: float = 180) -> None:
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
    # From step 2 on, a save takes a second, and the next one waits for it: the signal comes in the middle of one.
    config = long(tiny, checkpoint_every=1, sample_every=1, eval_every=1)
    run = Path(config.run.dir)
    process = start(config, env=environment(TOOLKIT_FAILPOINTS="checkpoint.mid-optimizer=sleep:1@2+"))
    wait_for_step(run, 3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert not [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
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
    output, _ = process.communicate(timeout=30)
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
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    stopped_at = json.loads((run / "status.json").read_text())
    assert stopped_at["status"] == "preempted"

    process = start(config, launch=TWO)  # continues, until its launcher is killed
    wait_for_step(run, stopped_at["step"] + 3)
    ranks = children_of(process.pid)
    process.kill()
    process.communicate(timeout=60)
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
        timeout=180,
    )
    assert dead.returncode != 0
    assert "Signal 9 (SIGKILL)" in dead.stderr or "exitcode  : -9" in dead.stderr
    stuck = command(
        RECIPE,
        *flags(change(config, training={"watchdog_minutes": 0.05}), DEMO),
        launch=TWO,
        env=environment(TOOLKIT_FAILPOINTS="trainer.before-backward#1=sleep:60@9"),
        timeout=180,
    )
    assert stuck.returncode != 0
    assert stuck.stderr.count("Timeout (0:00:03)!") == 2  # every rank prints its stacks
    assert "failpoint.py" in stuck.stderr  # the line that hangs


def test_a_rank_that_leaves_or_is_stopped_takes_the_job_down(tiny: TrainConfig) -> None:
    config = long(tiny, checkpoint_every=1, watchdog_minutes=0.1)
    run = Path(config.run.dir)
    left = command(
        RECIPE,
        *flags(config, DEMO),
        launch=TWO,
        env=environment(TOOLKIT_FAILPOINTS="trainer.before-backward#1=exit:0@9"),
    )
    assert left.returncode != 0
    assert "process 0 lost the connection to another process in step 5" in left.stderr
    assert "lost the connection" in json.loads((run / "status.json").read_text())["reason"]
    process = start(config, launch=TWO)  # continues
    wait_for_step(run, 8)
    ranks = children_of(process.pid)
    os.kill(ranks[0], signal.SIGSTOP)
    assert gone(ranks[1:], within=90)  # the watchdog of the rank that waits for it
    os.kill(ranks[0], signal.SIGCONT)  # or the launcher would wait for 30 s before it kills it
    output, _ = process.communicate(timeout=180)
    assert process.returncode != 0
    assert "Timeout (0:00:06)!" in output
    assert 'trainer.py", line' in output  # where it waited
    assert gone(ranks, within=30)


def test_ctrl_c_in_a_terminal_is_one_request(tiny: TrainConfig) -> None:
    """Launcher and ranks get it at once, and the ranks a second time from their launcher."""
    config = long(tiny)
    run = Path(config.run.dir)
    process = start(config, launch=TWO)
    wait_for_step(run, 3)
    ranks = children_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=180)
    assert gone(ranks, within=30)
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("preempted", "received SIGINT"), output
    assert status["saved_step"] == status["step"] == rows(run)[-1]["step"]
    assert "leaving at once" not in output


OWN_MODEL = """
import os, sys
import torch
from recipes.train_demo import CONFIG
from toolkit.errors import one_line_errors
from toolkit.model.gpt2 import GPT2
from toolkit.recipe import parse
from toolkit.training.trainer import Trainer

class Faulty(GPT2):
    '''A GPT-2 that goes wrong in process 1: NaN in step 3, and no memory for more than one window from call OOM on.'''
    calls = 0
    def forward(self, input_ids, targets):
        loss = super().forward(input_ids, targets)
        if os.environ["RANK"] != "1":
            return loss
        self.calls += 1
        if len(input_ids) > 1 and self.calls >= int(os.environ["OOM"]):
            raise torch.OutOfMemoryError("pretended")
        # The trial, then two or four micro-batches of one window a step.
        return loss * float("nan") if self.calls == int(os.environ["NAN"]) else loss

with one_line_errors():
    config = parse(CONFIG)
    Trainer(config, model=Faulty(config.model, seed=config.training.seed)).fit()
"""


def test_what_goes_wrong_in_one_process_is_answered_by_both(tiny: TrainConfig, tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text(OWN_MODEL)
    # Its first forward, the trial before step 1, does not fit: both halve, and train what they would have trained.
    halved = change(tiny, training={"checkpoint_every": 1, "eval_every": None, "sample_every": None})
    env = environment(TOOLKIT_FAILPOINTS="trainer.trial=sleep:0", OOM="1", NAN="12")
    result = command(str(script), *flags(halved, DEMO), launch=TWO, env=env)
    assert result.returncode == 0, result.stderr
    assert "out of memory: going on with micro_batch_size 1 and 4 accumulation steps" in result.stderr
    run = Path(halved.run.dir)
    assert [row["first_sample"] for row in rows(run, "ledger")] == list(range(0, 64, 8))
    # Its second forward in step 3 (calls 1 and 2 are trials) gives NaN: both keep their weights, count the step and go on.
    training = [row for row in rows(run) if "loss/train" in row]
    assert [row["optimizer/skipped_steps"] for row in training] == [0, 0, 1, 1, 1, 1, 1, 1]
    before, after = (run / "checkpoints" / f"step-{step:08d}" / "model.safetensors" for step in (2, 3))
    assert before.read_bytes() == after.read_bytes()
    # In the middle of step 2 the other process waits in a reduction already: the run stops and says what to start with.
    stopping = change(halved, run={"dir": str(tmp_path / "stopping")})
    result = command(str(script), *flags(stopping, DEMO), launch=TWO, env=environment(OOM="4", NAN="0"))
    assert result.returncode != 0
    assert "error: process 1: out of memory in step 2" in result.stderr
    assert "start again with --training.micro-batch-size 1" in result.stderr
    again = command(
        RECIPE, *flags(change(stopping, training={"micro_batch_size": 1}), DEMO), launch=TWO, env=environment()
    )
    assert again.returncode == 0, again.stderr
    assert rows(tmp_path / "stopping", "ledger") == rows(run, "ledger")


def test_launchers_that_restart_a_failed_group_continue_the_run(tiny: TrainConfig, tmp_path: Path) -> None:
    whole = change(tiny, run={"dir": str(tmp_path / "whole")})
    assert command(RECIPE, *flags(whole, DEMO), launch=TWO).returncode == 0
    # Process 1 dies in step 5, is started again with its peer, and gets to the end: fewer steps are left than it lived for.
    dying = environment(TOOLKIT_FAILPOINTS="trainer.before-backward#1=kill@9")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3")
    for name, prefix, launch in (
        ("accelerate", (), (*TWO, "--max_restarts", "3")),
        ("torchrun", (*torchrun, "--standalone"), None),
    ):
        config = change(tiny, run={"dir": str(tmp_path / name)})
        result = command(*prefix, RECIPE, *flags(config, DEMO), launch=launch, env=dying)
        assert result.returncode == 0, f"{name}: {result.stderr}"
        run = tmp_path / name
        assert len(json.loads((run / "run.json").read_text())["starts"]) >= 2
        for log in ("metrics", "ledger", "samples"):
            assert rows(run, log) == rows(tmp_path / "whole", log), name
        for file in ("model.safetensors", "optimizer.safetensors"):
            last = Path("checkpoints") / "step-00000008" / file
            assert (run / last).read_bytes() == (tmp_path / "whole" / last).read_bytes(), name


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


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_one_process_alone_has_read_is_named_by_it(tiny: TrainConfig, tmp_path: Path, split: str) -> None:
    """The main process sees no more than a lost connection."""
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny.data.path[0], damaged)
    if split == "train":
        found = sample_windows(
            open_data(str(damaged)),
            6,  # of four windows in the first step, in micro-batches of two, that is process 1's
            1,
            sequence_length=tiny.data.sequence_length,
            seed=tiny.training.seed,
            shuffle_group_shards=tiny.data.shuffle_group_shards,
        )[0]
        shard, window = damaged / found.shard, found.window
    else:
        shard, window = damaged / "val_000000.bin", tiny.evaluation.micro_batch_size  # of the second batch
    ids = np.memmap(shard, dtype=np.uint16, mode="r+", offset=1024)
    ids[window * tiny.data.sequence_length + 3] = 60_000
    ids.flush()
    config = change(tiny, data={"path": (str(damaged),)}, training={"max_steps": 1, "sample_every": None})
    result = command(RECIPE, *flags(config, DEMO), launch=TWO)
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if "error: " in line]
    assert any("error: process 1: " in line and "id 60000" in line for line in said), result.stderr
    assert len(said) == 2


OTHER_SETTINGS = """
import os, sys
from recipes.train_demo import CONFIG
from toolkit.recipe import run

if os.environ["RANK"] == "1":
    sys.argv += os.environ["OTHER"].split()
run(CONFIG)
"""


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("--training.seed 8", "training.seed=8 instead of 7 of"),
        (
            "--optimizer.learning-rate 0.3 --training.max-steps 4",
            "training.max_steps=4 instead of 8, optimizer.learning_rate=0.3",
        ),
        (
            "--training.precision bf16",
            "training.precision='bf16' instead of 'fp32', precision='bf16' instead of 'fp32' of",
        ),
        ("--model.init-from theirs", "model.init_from='theirs' instead of None of"),
        ("--run.dir elsewhere --training.max-hours 3 --wandb.name mine", None),
    ],
)
def test_machines_that_were_given_other_settings_do_not_train(
    tiny: TrainConfig, tmp_path: Path, other: str, said: str | None
) -> None:
    script = tmp_path / "own.py"
    script.write_text(OTHER_SETTINGS)
    (tmp_path / "config.json").write_text(json.dumps(config_json(tiny.model, eot_id=256)))
    other, said = other.replace("theirs", str(tmp_path)), said and said.replace("theirs", str(tmp_path))
    result = command(str(script), *flags(tiny, DEMO), launch=TWO, env=environment(OTHER=other))
    if said is None:
        assert result.returncode == 0, result.stderr
        return
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert f"error: process 1: started with {said}" in errors[0]
    assert errors[0].endswith("of the main process; give every machine the same settings")
    assert not Path(tiny.run.dir).exists()


def test_a_peer_that_dies_while_the_run_starts_is_one_line(tiny: TrainConfig) -> None:
    env = environment(TOOLKIT_FAILPOINTS="run_folder.after-run=kill")  # of the main process, which alone opens it
    result = command(RECIPE, *flags(tiny, DEMO), launch=TWO, env=env)
    assert result.returncode != 0
    assert "gloo" not in result.stderr


def test_a_path_that_is_no_text_is_one_line_for_two_processes_too(tiny: TrainConfig) -> None:
    config = change(tiny, data={"path": ("caf\udce9",)})
    result = command(RECIPE, *flags(config, DEMO), launch=TWO)
    assert result.returncode != 0
    assert "caf\\udce9 does not exist" in result.stderr
    assert "UnicodeEncodeError" not in result.stderr


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
