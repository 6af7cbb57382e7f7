"""A run folder -> the whole run in W&B, rebuilt from metrics.jsonl and samples.jsonl: `toolkit wandb-sync RUN`.

Why: W&B's own files lose rows when a machine dies, and hold steps twice when a run is resumed; metrics.jsonl does not.
Guarantees: each step is sent once, in order, with its evaluation and its samples. W&B never takes a step a second time:
where it has the run already, only the steps after its last one are added. So the same command may be repeated, and
`fresh` makes a complete copy under a new id where W&B's own record has holes.
"""

import fcntl
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit.config import TrainConfig, load_recipe, to_dict
from toolkit.errors import UserError, describe_os_error
from toolkit.redact import redact
from toolkit.training.metrics import damaged_lines, log_path, read_rows
from toolkit.training.run_folder import LOCK, RECIPE, RUN, STATUS
from toolkit.training.wandb_mirror import (
    INIT_SECONDS,
    WandbProcess,
    finish_message,
    has_key,
    start_message,
)

# How long W&B may take to upload what it was given [seconds].
UPLOAD_SECONDS = 3600.0
# Rows are handed over in portions of this size, so that an end of the helper is noticed between them.
MOST_UNSENT_BYTES = 2**20


def wandb_sync(run_dir: Path, *, fresh: bool = False, offline_to: Path | None = None) -> Iterator[str]:
    """Sends a run to W&B, or writes it below `offline_to` as an offline run; yields what to tell the user.

    Raises: UserError if the folder holds no run or one that is being trained now, if W&B has no key here, cannot be reached or does not take everything.
    """
    run_id, config = _read_run(run_dir)
    steps = _steps(run_dir)
    if not any("log" in message for messages in steps.values() for message in messages):
        raise UserError(f"{log_path(run_dir, 'metrics')} has no rows; there is nothing to send to W&B")
    if offline_to is not None:
        _make_folder(offline_to)
    if offline_to is None and not has_key(os.environ):
        raise UserError("W&B has no API key here; `wandb login` once (or set WANDB_API_KEY), then run this again")
    if offline_to is None and not fresh and _is_running(run_dir):
        raise UserError(f"{run_dir} is being trained now and sends its rows itself; wait until it ends, or use --fresh")
    if fresh:
        run_id = f"{run_id}-{secrets.token_hex(3)}"
    for name in ("metrics", "samples"):
        path = log_path(run_dir, name)
        if damaged := damaged_lines(path):
            yield f"{path}: left out {len(damaged)} damaged lines (the first is line {damaged[0]})"
    yield f"{run_dir}: {len(steps)} steps up to step {max(steps)}, W&B id {run_id}"
    with tempfile.TemporaryDirectory(prefix="toolkit-wandb-") as temporary:
        folder = Path(temporary) if offline_to is None else offline_to
        start = start_message(
            config.wandb,
            to_dict(config),
            run_id=run_id,
            folder=folder,
            name=run_dir.resolve().name,
            mode="online" if offline_to is None else "offline",
        )
        start |= {"continue_local": False, "may_fall_back": False}
        helper = WandbProcess(start | {"finish_seconds": UPLOAD_SECONDS, "init_seconds": INIT_SECONDS})
        try:
            yield from _send(helper, steps, status=_read_status(run_dir))
        finally:
            helper.close(patience=0)


def _send(helper: WandbProcess, steps: dict[int, list[dict[str, Any]]], *, status: dict[str, Any]) -> Iterator[str]:
    finished: dict[str, Any] = {}
    messages = iter([message for step in sorted(steps) for message in steps[step]] + [status])
    more = True
    while not finished:
        while more and helper.unsent_bytes < MOST_UNSENT_BYTES:
            message = next(messages, None)
            if message is None:
                more = False
            else:
                helper.send(message)
        helper.wait(1.0)
        ended = helper.exit_status
        for report in helper.exchange():
            if "warning" in report:
                raise UserError(f"W&B: {redact(report['warning'])}; nothing here has changed: run this again")
            if "started" in report:
                yield f"W&B: {report['started']['url'] or report['started']['dir']}"
                if report["started"]["next_step"]:
                    last = report["started"]["next_step"] - 1
                    yield f"W&B has this run up to step {last} and keeps that; --fresh sends a complete copy as a new run"
            if "finished" in report:
                finished = report["finished"]
        if ended is not None and not finished:
            raise UserError(
                f"W&B: its helper process ended with status {ended}; nothing here has changed: run this again"
            )
    if not finished["complete"]:
        raise UserError("W&B did not take everything; run this again to add what is missing")
    yield "W&B has all of it"


def _make_folder(folder: Path) -> None:
    """Raises UserError if no offline run can be written there; W&B would put it elsewhere without asking."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to --offline-to {folder}: {describe_os_error(error)}; name a folder") from None


def _is_running(run_dir: Path) -> bool:
    """Whether a process holds the run folder; False where that cannot be known."""
    try:
        with (run_dir / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _read_run(run_dir: Path) -> tuple[str, TrainConfig]:
    path = run_dir / RUN
    try:
        run_id = json.loads(path.read_bytes())["id"]
    except FileNotFoundError:
        raise UserError(f"{run_dir} is not a run folder (it has no {RUN}); name one, such as runs/gpt2") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); starting the run again rebuilds it") from None
    if not isinstance(run_id, str):
        raise UserError(f"{path}: id={run_id!r} is not a text; starting the run again rebuilds it")
    return run_id, load_recipe(run_dir / RECIPE)


def _read_status(run_dir: Path) -> dict[str, Any]:
    """How the W&B run ends: as the run did; a run that is going on, or was cut off, counts as preempted."""
    try:
        status = json.loads((run_dir / STATUS).read_bytes())["status"]
    except (OSError, ValueError, TypeError, KeyError):
        status = "preempted"
    return finish_message(status if status in ("finished", "failed") else "preempted")


def _steps(run_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """The messages of each step: one row with everything that was measured, and the samples if there are any."""
    rows: dict[int, dict[str, Any]] = {}
    for row in read_rows(log_path(run_dir, "metrics")):
        rows.setdefault(row["step"], {}).update(row)
    samples: dict[int, list[dict[str, Any]]] = {}
    for row in read_rows(log_path(run_dir, "samples")):
        samples.setdefault(row["step"], []).append(row)
    messages: dict[int, list[dict[str, Any]]] = {step: [{"log": row}] for step, row in rows.items()}
    for step, texts in samples.items():
        messages.setdefault(step, []).append({"samples": redact(texts), "step": step})
    return messages
