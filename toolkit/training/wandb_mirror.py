"""Rows of metrics.jsonl -> the same rows in Weights & Biases, without any way to stop or slow training.

wandb itself runs in a helper process (`wandb_worker`), which is sent one line per row through a pipe that is never
waited for. Guarantees: no method raises because of W&B; `start`, `log` and `log_samples` return at once; `finish`
returns within its time limit; what goes wrong is said in one warning, after which W&B is left alone. metrics.jsonl is
the truth: whatever W&B missed, `toolkit wandb-sync RUN` brings there. Nothing secret is sent (see `redact`), and
neither the command line, the environment, the console output, the code nor the git state of the run.
"""

import configparser
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from toolkit.config import WandbConfig
from toolkit.redact import redact

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
# Variables that would give wandb another run, mode or place than ours, or the helper process of another wandb.
_NOT_FOR_WANDB = {
    *("WANDB_DIR", "WANDB_FORK_FROM", "WANDB_MODE", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_RUN_ID"),
    *("WANDB_SERVICE", "WANDB_SWEEP_ID"),
}

WORKER = Path(__file__).with_name("wandb_worker.py")

# Hosts under which `wandb login` stores a key. Source: wandb 0.31, sdk/lib/urls.py.
_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com", "forge.coreweave.com")

# Rows that wait for a helper which is slow to start or stuck [bytes]; beyond this they are left out and counted.
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
    disabled = environ.get("WANDB_DISABLED", "").strip()
    is_disabled = disabled.lower() in ("true", "1", "yes", "on")
    if mode != "auto":
        resolved = _MODES[mode]
        if wish and _MODES.get(wish) != resolved:
            lines.append(f"W&B: --wandb.mode {mode} wins over WANDB_MODE={wish} in the environment")
        if is_disabled and resolved != "disabled":
            lines.append(f"W&B: --wandb.mode {mode} wins over WANDB_DISABLED={disabled} in the environment")
    elif wish in _MODES:
        resolved = _MODES[wish]
    elif wish:
        resolved = "offline"
        lines.append(f"W&B: WANDB_MODE={wish} is none of {', '.join(_MODES)}; recording offline")
    elif is_disabled:
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
    server = _server(environ, home)
    hosts = _HOSTS if server in ("", *_HOSTS) else (server,)
    for path in [Path(environ["NETRC"])] if environ.get("NETRC") else [home / ".netrc", home / "_netrc"]:
        try:
            entries = netrc.netrc(path)
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
        if any((found := entries.authenticators(host)) and found[2] for host in hosts):
            return True
    return False


def _server(environ: Mapping[str, str], home: Path) -> str:
    """Host and port of a W&B server of one's own, from the environment or `wandb login --host`; empty: W&B's."""
    url = environ.get("WANDB_BASE_URL", "")
    if not url:
        folder = environ.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb"
        settings = configparser.ConfigParser(interpolation=None)
        with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
            settings.read(Path(folder) / "settings")
            url = settings.get("default", "base_url", fallback="")
    return urllib.parse.urlsplit(url).netloc


class WandbProcess:
    """The helper process and the two pipes to it; nothing here waits unless it says so.

    Raises: OSError from any method if the operating system refuses.
    """

    def __init__(self, start: Mapping[str, Any]) -> None:
        # -P keeps the worker's own folder off its path: `metrics` and `files` there are no modules of wandb's.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            env={name: value for name, value in os.environ.items() if name not in _NOT_FOR_WANDB},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C at the terminal is for training to answer
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._commands, self._answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._commands, False)
        os.set_blocking(self._answers, False)
        self._unsent = bytearray()
        self._received = bytearray()
        self.send({"start": start})

    @property
    def pid(self) -> int:
        """The process id of the helper."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """The exit status of the helper, None while it runs."""
        return self._process.poll()

    @property
    def unsent_bytes(self) -> int:
        """How much the helper has not taken yet."""
        return len(self._unsent)

    def send(self, message: Mapping[str, Any]) -> None:
        """Queues a message; `exchange` and `wait` send what is queued."""
        self._unsent += json.dumps(message).encode() + b"\n"

    def exchange(self) -> list[dict[str, Any]]:
        """Writes and reads as much as is possible at once; returns the reports that came."""
        try:
            while self._unsent:
                del self._unsent[: os.write(self._commands, self._unsent[: 2**16])]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # it has gone: `exit_status` will say so
            self._unsent.clear()
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._answers, 2**16):
                self._received += data
        *lines, rest = self._received.split(b"\n")
        self._received = bytearray(rest)
        return [json.loads(line) for line in lines]

    def wait(self, seconds: float) -> None:
        """Returns when there is something to exchange, when the helper has ended, or after this time."""
        # The pipe stays readable for ever at its end; a short sleep there keeps a loop around this from spinning.
        readable, *_ = select.select([self._answers], [self._commands] if self._unsent else [], [], seconds)
        if readable and self.exit_status is not None:
            time.sleep(0.01)

    def close(self, *, patience: float) -> None:
        """Ends the helper: by itself if it does so in time, else by force."""
        for action in (
            lambda: self._process.wait(patience),
            self._process.kill,
            lambda: self._process.wait(LEAVE_SECONDS),
        ):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                action()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()


class WandbMirror:
    """A run's mirror in W&B; before `start`, after `finish` and once W&B has failed, every method does nothing."""

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
        self._process: WandbProcess | None = None
        self._started: dict[str, Any] = {}
        self._finished: dict[str, Any] = {}
        self._left_out = 0
        self._warned = False
        self._folder = Path()

    @property
    def pid(self) -> int | None:
        """The process id of the helper in which wandb runs, None without one."""
        return None if self._process is None else self._process.pid

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
            self._warn("the package wandb is not installed (pip install wandb)")
            return
        with self._never_raises():
            message = start_message(
                self._config, config, run_id=run_id, folder=folder, name=folder.resolve().name, mode=mode
            )
            limits = {"finish_seconds": max(self._finish_seconds.values()), "init_seconds": self._init_seconds}
            self._process = WandbProcess(message | limits)
            self._exchange()

    def log(self, row: Mapping[str, Any], *, again: bool = False) -> None:
        """Sends one row, which holds `step`; rows of the same step become one in W&B.

        `again`: of an earlier start, whose helper may have sent it.
        """
        self._send({"log": row, "again": again})

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]], *, again: bool = False) -> None:
        """Sends the texts sampled at a step, as a table."""
        self._send({"samples": redact(list(rows)), "step": step, "again": again})

    def finish(self, status: Status, *, step_is_complete: bool = True) -> None:
        """Ends the W&B run as finished, preempted or failed, and says what became of it; returns within the time limit.

        Unless `step_is_complete`, the last step is left to the next start, which will have more of it.
        """
        if self._process is None:
            return
        with self._never_raises():
            deadline = time.monotonic() + self._finish_seconds[status]
            self._process.send(finish_message(status, step_is_complete=step_is_complete))
            self._exchange()
            while not self._finished and self._process is not None and (left := deadline - time.monotonic()) > 0:
                self._process.wait(min(left, 0.1))
                self._exchange()
        if self._process is not None:  # else it has ended, which was said
            with self._never_raises():
                self._process.close(patience=LEAVE_SECONDS if self._finished else 0)
            self._say_what_became_of_it(self._finish_seconds[status])
        self._process = None

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._process is None:
            return
        with self._never_raises():
            if self._process.unsent_bytes > MAX_WAITING_BYTES:
                self._left_out += 1
            else:
                self._process.send(message)
            self._exchange()

    def _exchange(self) -> None:
        assert self._process is not None
        ended = self._process.exit_status  # before the last reports are read, so that none is lost
        for report in self._process.exchange():
            if "warning" in report:
                self._warn(report["warning"])
            elif "started" in report:
                self._started = report["started"]
                if self._started["url"]:
                    logger.info("W&B: %s", self._started["url"])
            elif "finished" in report:
                self._finished = report["finished"]
        if ended is not None and not self._finished:
            self._warn(f"its helper process ended with status {ended}")
            self._process.close(patience=0)
            self._process = None

    def _say_what_became_of_it(self, seconds: float) -> None:
        sync = f"`toolkit wandb-sync {self._folder}`"
        if not self._finished:
            self._warn(f"not everything was recorded within {seconds:g} s")
            return
        if self._finished["left_out"]:
            logger.info("W&B: it had %d of these rows already and keeps its own", self._finished["left_out"])
        if self._left_out:
            self._warn(f"{self._left_out} rows were left out because it did not take them for too long")
        elif not self._finished["complete"]:
            self._warn("not everything was recorded")
        elif self._started.get("mode") == "offline":
            logger.info("W&B: recorded offline in %s; to send it, after `wandb login`: %s", self._started["dir"], sync)

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "W&B: %s; training does not depend on it, metrics.jsonl has every row, and `toolkit wandb-sync %s` "
                "brings them to W&B later",
                redact(text),
                self._folder,
            )

    @contextlib.contextmanager
    def _never_raises(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # W&B is worth no training run
            self._process = None
            self._warn(f"{type(error).__name__}: {error}")


def start_message(
    settings: WandbConfig, config: Mapping[str, Any], *, run_id: str, folder: Path, name: str, mode: Mode
) -> dict[str, Any]:
    """What the helper process is told about a run besides its time limits: nothing secret, nothing about this machine.

    WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME and WANDB_TAGS count where the configuration says nothing of its own.
    """
    environ = os.environ
    project = environ.get("WANDB_PROJECT") if settings.project == WandbConfig().project else None
    tags = settings.tags or tuple(tag for tag in environ.get("WANDB_TAGS", "").split(",") if tag)
    said = {
        "config": config,
        "entity": settings.entity or environ.get("WANDB_ENTITY") or None,
        "name": settings.name or environ.get("WANDB_NAME") or name,
        "project": project or settings.project,
        "tags": list(tags),
    }
    return {
        **redact(said),
        "continue_local": True,
        "folder": str(folder.resolve()),
        "id": run_id,
        "may_fall_back": True,
        "mode": mode,
    }


def finish_message(status: Status, *, step_is_complete: bool = True) -> dict[str, Any]:
    """What the helper process is told at the end of a run."""
    ended = {"exit_code": int(status != "finished"), "preempted": status == "preempted"}
    return {"finish": ended | {"step_is_complete": step_is_complete}}
