"""metrics.jsonl, samples.jsonl and ledger.jsonl: exact, durable, repairable; and what redact leaves out."""

import json
import math
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from toolkit.errors import UserError
from toolkit.redact import REDACTED, redact
from toolkit.training.metrics import LOG_NAMES, RunLog, damaged_lines, encode_row, log_path, read_rows


def training_row(step: int) -> dict[str, float | int]:
    return {
        "step": step,
        "tokens": step * 1024,
        "loss/train": 10 / (step + 1) ** 0.5,
        "learning_rate": 6e-4 / (step + 1),
    }


def fill(folder: Path, steps: int) -> RunLog:
    log = RunLog(folder)
    for step in range(1, steps + 1):
        log.append("metrics", training_row(step))
        log.append("ledger", {"step": step, "first": step * 4, "count": 4, "digest": f"{step:016x}"})
        if step % 5 == 0:
            log.append("metrics", {"step": step, "tokens": step * 1024, "loss/val": 3.5, "bits_per_byte/val": 1.25})
            log.append("samples", {"step": step, "prompt": "", "text": f"text {step}"})
    log.sync()
    return log


def rows(folder: Path, name: str = "metrics") -> list[dict[str, object]]:
    return list(read_rows(folder / f"{name}.jsonl"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path, position: int, mask: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


# ---------------------------------------------------------------------------------------------------------- rows


def test_every_float_comes_back_to_the_bit(tmp_path: Path) -> None:
    random_bits = random.Random(0)
    values = [struct.unpack("<d", random_bits.randbytes(8))[0] for _ in range(500)]
    values = [value for value in values if math.isfinite(value)] + [
        0.1,
        -0.0,
        5e-324,
        1.7976931348623157e308,
        1e22,
        1 / 3,
    ]
    log = RunLog(tmp_path)
    for step, value in enumerate(values):
        log.append("metrics", {"step": step, "loss/train": value})
    assert [struct.pack("<d", row["loss/train"]) for row in rows(tmp_path)] == [struct.pack("<d", v) for v in values]


def test_numbers_that_json_lacks_are_strict_json_and_come_back(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.append("metrics", {"step": 1, "loss/train": math.nan, "a": math.inf, "b": -math.inf})
    log.append("samples", {"step": 1, "prompt": "", "text": "NaN"})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "loss/train": "NaN", "a": "Infinity", "b": "-Infinity"}\n'
    row = rows(tmp_path)[0]
    assert math.isnan(row["loss/train"])
    assert (row["a"], row["b"]) == (math.inf, -math.inf)
    assert rows(tmp_path, "samples") == [{"step": 1, "prompt": "", "text": "NaN"}]


@pytest.mark.parametrize(
    "text", ["a\nb\r\u2028\u0085c", "\x00\x1f", "\ud800 lone", "\N{GRINNING FACE}", '"}\n{"step": 9}']
)
def test_any_text_is_one_line_and_comes_back(tmp_path: Path, text: str) -> None:
    RunLog(tmp_path).append("samples", {"step": 1, "text": text})
    data = (tmp_path / "samples.jsonl").read_bytes()
    assert data.count(b"\n") == 1
    assert rows(tmp_path, "samples") == [{"step": 1, "text": text}]


def test_rows_are_there_at_once_and_after_a_kill(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in range(1, 4):
        log.append("metrics", training_row(step))
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step
    code = (
        "import os, signal, sys; from pathlib import Path; from toolkit.training.metrics import RunLog\n"
        "log = RunLog(Path(sys.argv[1]))\n"
        "for step in range(4, 8): log.append('metrics', {'step': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == -signal.SIGKILL
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_row_without_a_step_is_our_mistake(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="needs an integer step"):
        RunLog(tmp_path).append("metrics", {"step": 1.0})


# ------------------------------------------------------------------------------------------------------ truncate


def test_resuming_drops_the_rows_beyond_the_checkpoint_in_all_three(tmp_path: Path) -> None:
    log = fill(tmp_path, 23)
    assert log.last_step() == 23
    said = log.truncate_after(15)
    assert said == [
        "metrics.jsonl: 9 rows beyond step 15 dropped (up to step 23, done again now)",
        "samples.jsonl: 1 row beyond step 15 dropped (up to step 20, done again now)",
        "ledger.jsonl: 8 rows beyond step 15 dropped (up to step 23, done again now)",
    ]
    assert log.last_step() == 15
    for step in range(16, 24):
        log.append("metrics", training_row(step))
    assert [row["step"] for row in rows(tmp_path) if "loss/train" in row] == list(range(1, 24))
    assert [row["step"] for row in rows(tmp_path) if "loss/val" in row] == [5, 10, 15]
    log.truncate_after(0)
    assert all(log_path(tmp_path, name).read_bytes() == b"" for name in LOG_NAMES)


def test_nothing_is_touched_when_nothing_has_to_change(tmp_path: Path) -> None:
    log = fill(tmp_path, 10)
    before = {path: path.stat().st_ino for path in tmp_path.iterdir()}
    assert log.truncate_after(10) == []
    assert {path: path.stat().st_ino for path in tmp_path.iterdir()} == before
    assert RunLog(tmp_path / "absent").truncate_after(5) == []


@pytest.mark.parametrize("torn", [b'{"step": 11, "loss', b"{", b"\x00\x00\x00", b'{"step": 11}'])
def test_a_torn_last_line_is_kept_aside_and_named(tmp_path: Path, torn: bytes) -> None:
    log = fill(tmp_path, 10)
    log.close()
    good = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(good + torn)
    assert log.truncate_after(10) == ["metrics.jsonl: 1 damaged line (line 13) moved to metrics.jsonl.damaged"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == good
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == torn + b"\n"
    assert log.truncate_after(10) == []


def test_a_row_after_a_torn_line_is_not_lost_with_it(tmp_path: Path) -> None:
    fill(tmp_path, 2).close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "lo')
    log = RunLog(tmp_path)
    log.append("metrics", training_row(3))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    assert damaged_lines(tmp_path / "metrics.jsonl") == [3]


@pytest.mark.parametrize("mask", [0x01, 0x04, 0x20, 0xFF])
def test_a_flipped_byte_anywhere_in_a_line_is_named_and_kept_aside(tmp_path: Path, mask: int) -> None:
    log = fill(tmp_path, 12)
    log.close()
    good = contents(tmp_path)
    lines = good["metrics.jsonl"].splitlines(keepends=True)
    start = sum(map(len, lines[:6]))
    for offset in [*range(mask % 5, len(lines[6]), 8), len(lines[6]) - 1]:
        for name, data in good.items():
            (tmp_path / name).write_bytes(data)
        (tmp_path / "metrics.jsonl.damaged").unlink(missing_ok=True)
        flip(tmp_path / "metrics.jsonl", start + offset, mask)
        said = log.truncate_after(12)
        changed = [line for line in said if "line 7)" in line or "line 7, 8" in line]
        assert len(said) == len(changed) == 1, f"offset {offset}: {said}"
        kept = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        assert kept in (lines[:6] + lines[7:], lines[:6] + lines[8:])  # a lost newline takes the next line with it
        assert (tmp_path / "metrics.jsonl.damaged").stat().st_size >= len(lines[6]) - 1


def test_damaged_checksums_cost_no_row(tmp_path: Path) -> None:
    log = fill(tmp_path, 12)
    log.close()
    good = contents(tmp_path)
    for position in range(0, len(good[".rows.crc32"]), 41):
        (tmp_path / ".rows.crc32").write_bytes(good[".rows.crc32"])
        flip(tmp_path / ".rows.crc32", position, 0x01)
        assert log.truncate_after(12) == [REMADE]
        checksums = (tmp_path / ".rows.crc32").read_bytes()
        assert sorted(checksums.splitlines()) == sorted(good[".rows.crc32"].splitlines())  # made again
    for damage in (
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[: -18 * 3]),
        lambda path: path.write_bytes(path.read_bytes()[: -18 * 20 - 7]),
    ):
        damage(tmp_path / ".rows.crc32")
        assert log.truncate_after(12) == [REMADE]
        assert contents(tmp_path) == good | {".rows.crc32": checksums}


REMADE = ".rows.crc32 is missing or damaged: what is there was checked as JSON only; written anew"


def test_rows_that_have_gone_are_named(tmp_path: Path) -> None:
    log = fill(tmp_path, 12)
    log.close()
    metrics = tmp_path / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(
        b"".join(lines[:2] + lines[6:8] + lines[9:])
    )  # without steps 3 to 5 and 8, row of 5's evaluation
    (tmp_path / "ledger.jsonl").unlink()
    named = [
        "metrics.jsonl: the rows of step 3 to 5 and 8 are missing",
        "ledger.jsonl: the rows of step 1 to 12 are missing",
    ]
    assert log.truncate_after(12, first=1) == [
        "17 rows that were written are in none of metrics, samples, ledger any more",
        *named,
    ]
    assert log.truncate_after(12) == []  # where a run begins elsewhere, nobody can know
    (tmp_path / "samples.jsonl").unlink()
    assert log.truncate_after(12)[0].startswith("2 rows that were written")
    assert log.truncate_after(2, first=1)[-1] == "ledger.jsonl: the rows of step 1 to 2 are missing"


def test_rows_that_will_be_written_again_are_dropped(tmp_path: Path) -> None:
    log = fill(tmp_path, 10)
    assert log.truncate_after(10, again=lambda name, row: row["step"] == 10 and "loss/val" in row) == []
    assert [row["step"] for row in rows(tmp_path) if "loss/val" in row] == [5]
    assert [row["step"] for row in rows(tmp_path) if "loss/train" in row] == list(range(1, 11))
    assert len(rows(tmp_path, "samples")) == 2


@pytest.mark.parametrize("name", [*(f"{name}.jsonl" for name in LOG_NAMES), ".rows.crc32"])
def test_something_else_under_the_name_of_a_log_is_put_aside(tmp_path: Path, name: str) -> None:
    log = fill(tmp_path, 10)
    log.close()
    for make in (Path.mkdir, os.mkfifo):  # reading a pipe would wait for ever
        (tmp_path / name).unlink()
        make(tmp_path / name)
        said = log.truncate_after(10)
        aside = said[0].split(" it is ")[1].removesuffix(" now")
        assert not (tmp_path / aside).is_file()
        log.append("metrics", training_row(11))
        log.append("ledger", {"step": 11})
        log.append("samples", {"step": 11})
        log.close()
        assert (tmp_path / name).is_file()


def test_a_kill_at_any_moment_of_a_truncation_loses_nothing(tmp_path: Path) -> None:
    def cut_off(folder: Path) -> RunLog:
        log = fill(folder, 23)
        log.close()
        flip(folder / "metrics.jsonl", 12, 0x01)  # one damaged line
        return log

    expected = tmp_path / "expected"
    expected.mkdir()
    cut_off(expected).truncate_after(15)
    code = (
        "import sys; from pathlib import Path; from toolkit.training.metrics import RunLog\n"
        "RunLog(Path(sys.argv[1])).truncate_after(15)"
    )
    points = [
        "metrics.truncate=kill@1",
        "metrics.truncate=kill@3",
        "files.before-replace=kill@2",
        "metrics.truncated=kill",
    ]
    folders = [tmp_path / str(number) for number in range(len(points))]
    processes = []
    for folder, point in zip(folders, points, strict=True):
        folder.mkdir()
        cut_off(folder)
        environ = os.environ | {"TOOLKIT_FAILPOINTS": point}
        processes.append(subprocess.Popen([sys.executable, "-c", code, folder], env=environ, stderr=subprocess.PIPE))
    for folder, process in zip(folders, processes, strict=True):
        _, error = process.communicate()
        assert (process.returncode, error.decode()) == (-signal.SIGKILL, "")
        RunLog(folder).truncate_after(15)
        assert contents(folder) == contents(expected)


def test_twenty_thousand_rows_are_cut_in_a_moment(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in range(1, 20_001):
        log.append("metrics", training_row(step))
    began = time.process_time()
    log.truncate_after(15_000)
    assert time.process_time() - began < 3  # about 0.4 s on one core in 2025
    assert len(rows(tmp_path)) == 15_000


# ---------------------------------------------------------------------------------------------------- hard disks


def test_a_full_disk_is_one_line_and_leaves_whole_rows(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.append("metrics", training_row(1))
    size = (tmp_path / "metrics.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, hard))  # room for half a row
    try:
        with pytest.raises(UserError, match=r"^cannot write .*metrics\.jsonl: File too large; .*\(ulimit -f\).*$"):
            log.append("metrics", training_row(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "metrics.jsonl").read_bytes() == encode_row(training_row(1))
    assert (tmp_path / ".rows.crc32").read_bytes().count(b"\n") == 1  # none of a row that never was
    log.append("metrics", training_row(2))  # once there is space again
    assert log.truncate_after(2) == []
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


@pytest.mark.parametrize("what", ["file", "folder", "other"])
def test_a_file_that_vanishes_while_it_is_written_is_one_line(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    log = RunLog(folder)
    log.append("metrics", training_row(1))
    match what:
        case "file":
            (folder / "metrics.jsonl").unlink()
        case "folder":
            folder.rename(tmp_path / "moved")
        case "other":
            (folder / "metrics.jsonl").unlink()
            (folder / "metrics.jsonl").write_text("")
    with pytest.raises(
        UserError, match=r"^(cannot write .*No such file or directory|.*metrics\.jsonl was replaced while .*)$"
    ):
        log.append("metrics", training_row(2))


def test_the_failure_point_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path)
    monkeypatch.setenv("TOOLKIT_FAILPOINTS", "metrics.append=raise@1")
    with pytest.raises(RuntimeError, match=r"metrics\.append"):
        log.append("metrics", training_row(1))


# -------------------------------------------------------------------------------------------------------- redact

ENVIRONMENT = {
    "HF_TOKEN": "environment-canary-1",
    "MY_API_KEY": "environment-canary-2",
    "PGPASSWORD": "environment-canary-3",
    "AWS_ACCESS_KEY_ID": "environment-canary-4",
    "SHORT_TOKEN": "gpt2",
    "MAX_TOKENS": "10485760",
    "TOKENIZER": "some-tokenizer",
    "HF_TOKEN_PATH": "data/fineweb-edu-10b",
    "KEYBOARD": "us-international",
    "SSH_AUTH_SOCK": "/tmp",
    "PWD": "/work/somewhere",
}
HASH = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"prompt": "say environment-canary-1!"}, {"prompt": f"say {REDACTED}!"}),
        (["environment-canary-2", {"a": "xenvironment-canary-3x"}], [REDACTED, {"a": f"x{REDACTED}x"}]),
        ("id environment-canary-4", f"id {REDACTED}"),
        ("hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345", REDACTED),
        ("token=hf_AbCdEfGhIjKlMnOp0", f"token={REDACTED}"),
        ("https://user:url-canary@host.org/data", f"https://{REDACTED}@host.org/data"),
        ("s3://url-canary@bucket/x and ftp://u:p@q@h/", f"s3://{REDACTED}@bucket/x and ftp://{REDACTED}@h/"),
        (
            "https://h.org/d/train_000000.bin?X-Amz-Date=2026&X-Amz-Signature=url-canary&X-Amz-Credential=a%2Fb&v=2",
            f"https://h.org/d/train_000000.bin?X-Amz-Date=2026&X-Amz-Signature={REDACTED}&X-Amz-Credential={REDACTED}&v=2",
        ),
        (
            "https://b.blob.core.windows.net/c?sv=1&sig=url-canary",
            f"https://b.blob.core.windows.net/c?sv=1&sig={REDACTED}",
        ),
        (
            {"api_key": "x", "Auth-Token": "y", "password": ""},
            {"api_key": REDACTED, "Auth-Token": REDACTED, "password": ""},
        ),
        (["--wandb.api-key", "x", "--token=y", "--a"], ["--wandb.api-key", REDACTED, f"--token={REDACTED}", "--a"]),
        ("Authorization: Bearer abcdefgh.ijkl", f"Authorization: Bearer {REDACTED}"),
    ],
)
def test_secrets_are_left_out(value: object, expected: object) -> None:
    assert redact(value, environ=ENVIRONMENT) == expected


@pytest.mark.parametrize(
    "value",
    [
        {"tokens_per_step": 524288, "token": 5, "secret": None, "password": True, "tokens": 10485760, "loss": 1.5},
        {"tokenizer": "gpt2", "sha256": HASH, "revision": HASH[:40], "fingerprint": HASH},
        "tokens_per_step=10485760",
        "data/fineweb-edu-10b",
        "https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu?revision=main&split=train#token-counts",
        "mail someone@example.org or look at http://host/a@b",
        ["--training.tokens-per-step", "524288", "--data.path=data/x", "--run.dir", "runs/hf_checkpoint1000"],
        "some-tokenizer us-international /tmp /work/somewhere hf_transfer",
    ],
)
def test_what_is_no_secret_stays(value: object) -> None:
    assert redact(value, environ=ENVIRONMENT) == value


def test_samples_are_redacted_before_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_TOKEN", "environment-canary-5")
    RunLog(tmp_path).append("samples", {"step": 1, "prompt": "environment-canary-5", "text": "and on"})
    assert json.loads((tmp_path / "samples.jsonl").read_text()) == {"step": 1, "prompt": REDACTED, "text": "and on"}
