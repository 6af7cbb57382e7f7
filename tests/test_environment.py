"""What launchers and devices decide: precision, refused variables, compilers, spikes, one-line errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import ROOT, environment
from toolkit.errors import UserError, describe_os_error
from toolkit.failpoint import VARIABLE, failpoint, is_set
from toolkit.training import environment as surroundings
from toolkit.training.environment import (
    device_memory_bytes,
    idle_cores,
    refuse_environment,
    resolve_precision,
    should_compile,
    slow_precision,
)
from toolkit.training.progress import duration
from toolkit.training.spikes import SpikeDetector

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["passive", "10000"]),
        ({"GOMP_SPINCOUNT": "7"}, ["passive", "7"]),
        ({"OMP_WAIT_POLICY": "active"}, ["active", None]),
    ],
)
def test_waiting_threads_spin_briefly_unless_told_otherwise(given: dict[str, str], expected: list[str | None]) -> None:
    code = (
        "import json, os; from toolkit.recipe import share_cores; share_cores(); "
        "print(json.dumps([os.environ.get(name) for name in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')]))"
    )
    env = {name: value for name, value in environment().items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", code], env=env | given, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == expected


def test_precision_follows_recipe_launcher_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_precision("auto") == "fp32"
    assert resolve_precision("bf16") == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # silence
    assert resolve_precision("auto") == "fp32"
    assert resolve_precision("bf16") == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert resolve_precision("auto") == "bf16"
    assert resolve_precision("bf16") == "bf16"
    with pytest.raises(UserError, match=r"--training\.precision fp32 contradicts --mixed_precision bf16"):
        resolve_precision("fp32")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="fp8 of the launcher is not supported"):
        resolve_precision("auto")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    for asked in ("auto", "fp16"):
        with pytest.raises(UserError, match="fp16 needs a GradScaler, which acts on CUDA only"):
            resolve_precision(asked)
    # A CUDA device as torch describes it: native bf16 from compute capability 8.0 on.
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    assert resolve_precision("auto") == "bf16"
    assert resolve_precision("fp16") == "fp16"
    # Beside it, a launcher that was told to use the CPU.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert resolve_precision("auto") == "fp32"
    with pytest.raises(UserError, match="fp16 needs a GradScaler"):
        resolve_precision("fp16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert resolve_precision("auto") == "fp16"
    with pytest.raises(UserError, match="Some GPU does not compute bf16 natively"):
        resolve_precision("bf16")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "=4 would override the accumulation"),
        ("ACCELERATE_USE_FSDP", "true", "asks for FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks for DeepSpeed"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", "use --training.compile on instead"),
    ],
)
def test_what_the_environment_sets_behind_the_recipe_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        refuse_environment()


@pytest.mark.parametrize("said", ["0", "abc", "-1", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
    for ask in (idle_cores, device_memory_bytes):
        with pytest.raises(UserError, match=f"LOCAL_WORLD_SIZE={said} is no number of processes; unset it"):
            ask(CPU)


def test_harmless_variables_of_the_launcher_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    refuse_environment()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # the same variable, once it means something
    with pytest.raises(UserError, match="ACCELERATE_USE_FSDP"):
        refuse_environment()


def test_bf16_on_a_cpu_without_its_instructions_is_said_to_bring_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    line = slow_precision("bf16", cpu)
    assert line is not None
    assert line.endswith("no less time than --training.precision fp32")
    assert slow_precision("fp32", cpu) is None
    assert slow_precision("bf16", torch.device("cuda")) is None
    monkeypatch.setattr(surroundings, "cpu_has_bf16", lambda: True)
    assert slow_precision("bf16", cpu) is None


@pytest.mark.parametrize(
    ("cores", "physical", "threads", "processes", "words"),
    [
        (8, 8, 1, 1, "1 of this machine's 8 cores will train: more threads are given with OMP_NUM_THREADS=8, or by "),
        (8, 8, 2, 2, "4 of this machine's 8 cores will train: more threads are given with OMP_NUM_THREADS=4, or by "),
        (8, 8, 5, 1, None),  # somebody's choice
        (8, 4, 4, 1, None),  # two threads a core: torch's own number
        (2, 8, 2, 1, None),  # what this process may use counts
        (2, None, 1, 1, "1 of this machine's 2 cores will train"),
        (1, 1, 1, 1, None),
    ],
)
def test_cores_left_idle_by_a_launcher_are_named(
    monkeypatch: pytest.MonkeyPatch, cores: int, physical: int | None, threads: int, processes: int, words: str | None
) -> None:
    monkeypatch.setattr(surroundings, "usable_cores", lambda: cores)
    monkeypatch.setattr(surroundings.psutil, "cpu_count", lambda logical: physical)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    line = idle_cores(CPU)
    assert line is None if words is None else line is not None and line.startswith(words)
    assert idle_cores(torch.device("cuda")) is None


def test_compilation_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert should_compile("off", CPU) == (False, None)
    assert should_compile("auto", CPU) == (False, None)
    assert should_compile("on", CPU) == (True, None)
    monkeypatch.setattr(surroundings.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"--training.compile on cannot work here: no C\+\+ compiler found"):
        should_compile("on", CPU)
    compiles, line = should_compile("auto", torch.device("cuda"))
    assert not compiles
    assert line is not None
    assert "not compiling: no C++ compiler found" in line


def test_compilation_needs_pythons_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(surroundings.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(surroundings.sysconfig, "get_config_var", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"--training.compile on cannot work here: Python's headers are not installed"):
        should_compile("on", CPU)
    compiles, line = should_compile("auto", torch.device("cuda"))
    assert (compiles, line) == (
        False,
        "not compiling: Python's headers are not installed (python3-dev or python3-devel of the system's packages)",
    )


def test_a_spike_lies_far_above_the_median_and_leaves_the_history_alone() -> None:
    detector = SpikeDetector(z_score=6.0)
    losses = [3.0 + 0.01 * (i % 7) for i in range(100)]
    assert not any(detector.is_spike(loss) for loss in losses)
    assert not detector.is_spike(float("nan"))
    assert not detector.is_spike(2.0)  # a fall is no spike
    assert detector.is_spike(4.0)
    assert detector.is_spike(4.0)  # the first has not become part of what is normal
    assert not detector.is_spike(3.05)
    assert SpikeDetector(z_score=6.0, history=detector.history).is_spike(4.0)


def test_without_history_there_is_no_spike() -> None:
    detector = SpikeDetector(z_score=1.0)
    assert not any(detector.is_spike(loss) for loss in [10.0, 9.0, 50.0, 8.0])


def test_durations_are_words() -> None:
    assert [duration(s) for s in (9, 428, 18_360, 273_600)] == ["9 s", "7 min 8 s", "5 h 6 min", "3 d 4 h"]


def test_failure_points_act_when_and_where_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    failpoint("here")
    monkeypatch.setenv(VARIABLE, "here=raise@2; there#3=raise; everywhere=fail@2+")
    assert is_set("there")
    failpoint("here")
    with pytest.raises(RuntimeError, match="failpoint here"):
        failpoint("here")
    failpoint("here")
    failpoint("there")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(RuntimeError):
        failpoint("there")
    failpoint("everywhere")
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            failpoint("everywhere")


@pytest.mark.parametrize(
    ("code", "status", "printed"),
    [
        ("raise UserError('x=1 is wrong; use 2')", 1, "error: x=1 is wrong; use 2\n"),
        ("open('/no/such/file')", 1, "error: /no/such/file: No such file or directory\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("os.environ |= {'RANK': '1', 'LOCAL_RANK': '1', 'WORLD_SIZE': '2'}; raise UserError('rank 0 says it')", 1, ""),
        (
            "os.environ |= {'RANK': '1', 'LOCAL_RANK': '0', 'WORLD_SIZE': '2'}; raise UserError('here')",
            1,
            "error: here\n",
        ),
        (
            "os.environ |= {'RANK': '1', 'LOCAL_RANK': '1', 'WORLD_SIZE': '1'}; raise UserError('here')",
            1,
            "error: here\n",
        ),
        ("os.environ |= {'RANK': '1', 'LOCAL_RANK': '1'}; raise UserError('here')", 1, "error: here\n"),
    ],
)
def test_errors_of_users_are_one_line(code: str, status: int, printed: str) -> None:
    program = f"import os\nfrom toolkit.errors import UserError, one_line_errors\nwith one_line_errors():\n    {code}"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, printed)


def test_mistakes_of_ours_keep_their_traceback() -> None:
    program = "from toolkit.errors import one_line_errors\nwith one_line_errors():\n    1 / 0"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert "ZeroDivisionError" in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    program = (
        "from toolkit.errors import one_line_errors\n"
        "with one_line_errors():\n    while True:\n        print('word ' * 1000, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(100)
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_program_without_streams_works_and_writes_into_no_file_of_its_own(tmp_path: Path, closed: str) -> None:
    code = (
        "import faulthandler, sys\nfrom toolkit.errors import UserError, one_line_errors\n"
        "with one_line_errors():\n"
        "    file = open(sys.argv[1], 'w')\n"
        "    faulthandler.dump_traceback_later(60, file=sys.__stderr__ or sys.stderr)\n"
        "    faulthandler.cancel_dump_traceback_later()\n"
        "    raise UserError('a message')"
    )
    line = f'"{sys.executable}" -c "$CODE" {tmp_path / "file"} {closed}'
    result = subprocess.run(["sh", "-c", line], env=environment(CODE=code), capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "")
    assert (tmp_path / "file").read_text() == ""


def test_what_a_stream_cannot_encode_is_escaped() -> None:
    code = "print('oé'); print('\\udcff', file=sys.stderr); raise UserError('☃ is wrong')"
    program = f"import sys\nfrom toolkit.errors import UserError, one_line_errors\nwith one_line_errors():\n    {code}"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(PYTHONIOENCODING="ascii:strict"),
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout, result.stderr) == (1, "o\\xe9\n", "\\udcff\nerror: \\u2603 is wrong\n")


def test_an_error_is_printed_without_secrets() -> None:
    code = "raise UserError('s3://me:hunter2hunter2@host/set?token=canary1canary1 and canary2canary2 are wrong')"
    program = f"from toolkit.errors import UserError, one_line_errors\nwith one_line_errors():\n    {code}"
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment(MY_TOKEN="canary2canary2"), capture_output=True, text=True
    )
    expected = "error: s3://[redacted]@host/set?token=[redacted] and [redacted] are wrong\n"
    assert result.stderr == expected


def test_a_full_disk_is_described_with_its_path_and_a_way_out() -> None:
    error = OSError(28, os.strerror(28), "runs/a/metrics.jsonl")
    text = describe_os_error(error)
    assert text.startswith("runs/a/metrics.jsonl: No space left on device")
    assert "free some space" in text


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_launcher_configurations_are_ones_that_accelerate_reads(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    expected = {
        "cpu": ("NO", "no", 1),
        "one_gpu_bf16": ("NO", "bf16", 1),
        "one_gpu_fp16": ("NO", "fp16", 1),
        "multi_gpu": ("MULTI_GPU", "bf16", 8),
        "two_machines": ("MULTI_GPU", "bf16", 16),
    }[path.stem]
    assert (str(config.distributed_type.value), str(config.mixed_precision), config.num_processes) == expected
    assert config.use_cpu is (path.stem == "cpu")
