"""Rows of metrics.jsonl -> the same rows in Weights & Biases, without any way to stop or slow training.

wandb itself runs in a helper process (`wandb_worker`), which is sent one line per row through a pipe that is never
waited for. Guarantees: no method raises because of W&B; `start`, `log` and `log_samples` return at once; `finish`
returns within its time limit; what goes wrong is said in one warning, after which W&B is left alone. metrics.jsonl is
the truth: whatever W&B missed, `toolkit wandb-sync RUN` brings there. Nothing secret is sent (see `redact`), and
neither the command line, the environment, the console output, the code nor the git state of the run.
"""

import contextlib
import importlib.util
import json
import logging
import netrc
import os
import select
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from toolkit.config import WandbConfig
from toolkit.training import wandb_worker
from toolkit.training.redact import redact

logger = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]
Status = Literal["finished", "preempted", "failed"]

# Values of WANDB_MODE; the last two are wandb's older words.
_MODES: dict[str, Mode] = {
    "online": "online",
    "offline": "offline",
    "disabled": "disabled",
    "run": "online",
    "dryrun": "offline",
}
# Hosts under which `wandb login` stores a key. Source: wandb 0.31, sdk/lib/urls.py.
_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com", "forge.coreweave.com")

# Rows that wait for a helper process which is slow to start or stuck; beyond this they are left out and counted.
MAX_WAITING_BYTES = 64 * 2**20
# How long wandb may take to reach its server at the start [seconds]; training does not wait for it.
INIT_SECONDS = 60.0
# How long `finish` waits for W&B [seconds]; a preempted job has about 30 s in all to leave.
FINISH_SECONDS: dict[Status, float] = {"finished": 60.0, "preempted": 8.0, "failed": 8.0}
# How long the helper process may take to leave once it has said that it is done [seconds].
LEAVE_SECONDS = 3.0


def resolve_mode(mode: str, environ: Mapping[str, str]) -> tuple[Mode, list[str]]:
    """The mode to use for the setting `wandb.mode`, and what to tell the user about it.

    "auto": WANDB_MODE if set, else online with a key, else offline. An explicit setting beats the environment and says
    so. Online without a key means offline, aloud: nobody is ever asked for one.
    """
    wish = environ.get("WANDB_MODE", "").strip().lower()
    lines = []
    if mode != "auto":
        resolved = _MODES[mode]
        if wish and _MODES.get(wish) != resolved:
            lines.append(f"W&B: --wandb.mode {mode} wins over WANDB_MODE={wish} in the environment")
    elif wish in _MODES:
        resolved = _MODES[wish]
    elif wish:
        resolved = "offline"
        lines.append(f"W&B: WANDB_MODE={wish} is none of {', '.join(_MODES)}; recording offline")
    elif environ.get("WANDB_DISABLED", "").strip().lower() in ("true", "1", "yes", "on"):
        resolved = "disabled"
    else:
        resolved = "online" if has_key(environ) else "offline"
        if resolved == "offline":
            lines.append(f"W&B: no API key, so this run is recorded offline; {_HOW_TO_GET_A_KEY}")
    if resolved == "online" and not has_key(environ):
        resolved = "offline"
        lines.append(f"W&B: online was asked for but there is no API key; recording offline; {_HOW_TO_GET_A_KEY}")
    return resolved, lines


_HOW_TO_GET_A_KEY = "to see it in W&B: `wandb login` once, then `toolkit wandb-sync RUN` (--wandb.mode disabled: never)"


def has_key(environ: Mapping[str, str]) -> bool:
    """True if W&B has credentials without asking: WANDB_API_KEY, an identity token, or an entry in netrc."""
    if environ.get("WANDB_API_KEY", "").strip() or environ.get("WANDB_IDENTITY_TOKEN_FILE", "").strip():
        return True
    home = Path(environ.get("HOME") or environ.get("USERPROFILE") or "~").expanduser()
    own_host = urllib.parse.urlsplit(environ.get("WANDB_BASE_URL", "")).netloc
    for path in [Path(environ["NETRC"])] if environ.get("NETRC") else [home / ".netrc", home / "_netrc"]:
        try:
            entries = netrc.netrc(path)
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
        if any((found := entries.authenticators(host)) and found[2] for host in (own_host or _HOSTS[0], *_HOSTS)):
            return True
    return False


class WandbMirror:
    """A run's mirror in W&B; before `start`, after `finish` and once something is wrong, every method does nothing."""

    def __init__(
        self,
        config: WandbConfig,
        *,
        finish_seconds: Mapping[Status, float] = FINISH_SECONDS,
        init_seconds: float = INIT_SECONDS,
    ) -> None:
        self._config = config
        self._finish_seconds = finish_seconds
        self._init_seconds = init_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting = bytearray()
        self._reports = bytearray()
        self._started: dict[str, Any] = {}
        self._finished: dict[str, Any] = {}
        self._left_out = 0
        self._warned = False
        self._folder = Path()

    def start(self, config: Mapping[str, Any], run_id: str, *, folder: Path) -> None:
        """Begins to mirror the run with this id and recipe, whose W&B files go below its folder.

        A run that W&B knows already is continued; steps that it has are not sent again.
        """
        self._folder = folder
        mode, lines = resolve_mode(self._config.mode, os.environ)
        for line in lines:
            logger.info("%s", line)
        if mode == "disabled":
            return
        if importlib.util.find_spec("wandb") is None:
            logger.warning("W&B: the package wandb is not installed, so nothing is recorded there; pip install wandb")
            return
        with self._never_raises():
            self._launch(_start_message(self._config, config, run_id, folder=folder, mode=mode))

    def log(self, row: Mapping[str, Any]) -> None:
        """Sends one row, which holds `step`; rows of the same step become one in W&B."""
        self._send({"log": row})

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends the texts sampled at a step, as a table."""
        self._send({"samples": redact(list(rows)), "step": step})

    def finish(self, status: Status) -> None:
        """Ends the W&B run as finished, preempted or failed, and says what became of it; returns within the time limit."""
        process, seconds = self._process, self._finish_seconds[status]
        if process is None:
            return
        self._send({"finish": {"exit_code": int(status != "finished"), "preempted": status == "preempted"}}, last=True)
        with self._never_raises():
            self._wait(process, time.monotonic() + seconds)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            process.wait(timeout=LEAVE_SECONDS if self._finished else 0)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            process.kill()  # does nothing to a process that has ended
            process.wait(timeout=LEAVE_SECONDS)
        self._process = None
        for line in self._closing_lines(seconds):
            logger.info("%s", line)

    def _launch(self, message: Mapping[str, Any]) -> None:
        # Not `-m toolkit...`: the worker needs nothing of the toolkit, and -P keeps a folder named wandb out of its way.
        # WANDB_SERVICE would make it share the helper of another wandb process, whose end would be its own.
        self._process = subprocess.Popen(
            [sys.executable, "-P", wandb_worker.__file__],
            env={name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C at the terminal is for training to answer
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        os.set_blocking(self._process.stdout.fileno(), False)
        start = dict(message, finish_seconds=max(self._finish_seconds.values()), init_seconds=self._init_seconds)
        self._send({"start": start})

    def _send(self, message: Mapping[str, Any], *, last: bool = False) -> None:
        if self._process is None:
            return
        if len(self._waiting) > MAX_WAITING_BYTES and not last:
            self._left_out += 1
        else:
            with self._never_raises():
                self._waiting += json.dumps(message).encode() + b"\n"
        with self._never_raises():
            self._exchange(self._process)

    def _exchange(self, process: subprocess.Popen[bytes]) -> None:
        """Writes and reads as much as is possible without waiting; notices when the helper process has ended."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            while self._waiting:
                del self._waiting[: os.write(process.stdin.fileno(), self._waiting[: 2**16])]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._waiting.clear()
        try:
            while data := os.read(process.stdout.fileno(), 2**16):
                self._reports += data
        except BlockingIOError:
            pass
        while b"\n" in self._reports:
            line, _, self._reports = self._reports.partition(b"\n")
            self._take(json.loads(line))
        if process.poll() is not None and not self._finished:
            self._warn(f"its helper process ended with status {process.returncode}")
            self._process = None

    def _take(self, report: Mapping[str, Any]) -> None:
        if "warning" in report:
            self._warn(report["warning"])
        elif "started" in report:
            self._started = report["started"]
            logger.info("W&B: %s", self._started["url"] or f"recording offline in {self._started['dir']}")
        elif "finished" in report:
            self._finished = report["finished"]

    def _wait(self, process: subprocess.Popen[bytes], deadline: float) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        while (left := deadline - time.monotonic()) > 0 and self._process is not None and process.poll() is None:
            to_write = [process.stdin] if self._waiting else []
            select.select([process.stdout], to_write, [], min(left, 0.05))
            self._exchange(process)
            if self._finished:  # what it still does is of no interest
                return

    def _closing_lines(self, seconds: float) -> list[str]:
        sync = f"`toolkit wandb-sync {self._folder}`"
        left_out = self._left_out + self._finished.get("left_out", 0)
        if not self._finished:
            return [f"W&B: not everything was recorded within {seconds:g} s; metrics.jsonl is complete: {sync}"]
        if not self._finished["complete"]:
            return [f"W&B: not everything was recorded; metrics.jsonl is complete: {sync}"]
        lines = []
        if left_out:
            lines.append(
                f"W&B: {left_out} rows of steps that it had already were not sent again; for a fresh copy: {sync}"
            )
        if self._started.get("mode") == "offline":
            lines.append(f"W&B: recorded offline in {self._started['dir']}; to send it, after `wandb login`: {sync}")
        return lines

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "W&B: %s; training goes on, metrics.jsonl is complete, and `toolkit wandb-sync %s` brings it to W&B later",
                redact(text),
                self._folder,
            )

    @contextlib.contextmanager
    def _never_raises(self) -> Any:
        try:
            yield
        except Exception as error:  # W&B is worth no training run
            self._process = None
            self._warn(f"{type(error).__name__}: {error}")


def _start_message(
    settings: WandbConfig, config: Mapping[str, Any], run_id: str, *, folder: Path, mode: Mode
) -> dict[str, Any]:
    """What the helper process is told about the run: nothing secret, nothing about this machine.

    WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME and WANDB_TAGS count where the configuration says nothing of its own.
    """
    environ = os.environ
    project = environ.get("WANDB_PROJECT") if settings.project == WandbConfig().project else None
    tags = settings.tags or tuple(tag for tag in environ.get("WANDB_TAGS", "").split(",") if tag)
    said = {
        "config": config,
        "entity": settings.entity or environ.get("WANDB_ENTITY") or None,
        "name": settings.name or environ.get("WANDB_NAME") or folder.resolve().name,
        "project": project or settings.project,
        "tags": list(tags),
    }
    return {**redact(said), "folder": str(folder.resolve()), "id": run_id, "mode": mode, "resume": "allow"}
