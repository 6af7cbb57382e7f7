"""What the processes of one run tell each other outside the step: JSON, tensors, and each other's errors.

Everything travels as plain tensors, so nothing is pickled. With one process every function is a no-op that returns what
it was given. How the processes find each other again after the launcher has restarted them is here as well.
"""

import json
import logging
import os
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from toolkit.errors import UserError, describe_os_error, speaks

logger = logging.getLogger(__name__)

_MESSAGE_BYTES = 4096
_POLL_SECONDS = 0.02
_SETTLE_SECONDS = 10.0


def restartable_init_method() -> str | None:
    """The init_method with which a restarted group of processes finds itself; None where the launcher never restarts.

    Why: a launcher with --max-restarts keeps one key-value store for all its attempts, and torch 2.13 gives the attempts
    no names of their own in it, so that a restarted process reads the addresses of dead ones and waits for them.
    """
    return "fresh://" if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 else None


def _fresh_rendezvous(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Store, int, int]]:
    """torch's own rendezvous from the environment, in a part of its store that no earlier attempt has written to."""
    store, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
    yield PrefixStore(_agree_on_attempt(store, rank, world_size, timeout=timeout), store), rank, world_size


def _agree_on_attempt(store: Store, rank: int, world_size: int, *, timeout: timedelta) -> str:
    """A name for this attempt that every living process agrees on, whatever dead ones have left in the store.

    Every process puts a token of its own up; process 0 lists them, the others confirm a list that has their own in it,
    and the list that all confirmed is the name. The launcher's count of restarts would not do: on several
    machines it differs, as only the machine whose process fails first counts.
    """
    mine = uuid.uuid4().hex
    store.set(f"token/{rank}", mine)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if rank == 0:
            listed = ",".join(_peek(store, f"token/{index}") for index in range(world_size))
            store.set("listed", listed)
            if all(_peek(store, f"confirmed/{index}") == listed for index in range(1, world_size)):
                store.set("agreed", listed)
                return listed
        else:
            listed = _peek(store, "listed")
            if mine in listed.split(","):
                store.set(f"confirmed/{rank}", listed)
            agreed = _peek(store, "agreed")
            if mine in agreed.split(","):
                return agreed
        time.sleep(_POLL_SECONDS)
    raise UserError(
        f"process {rank} of {world_size} waited {timeout} for the others to start; look at what they printed, and at "
        "the launcher's --machine_rank and --main_process_ip on every machine"
    )


def _peek(store: Store, key: str) -> str:
    """The value of a key, or "" if nobody has set it yet; never waits."""
    return store.get(key).decode() if store.check([key]) else ""


register_rendezvous_handler("fresh", _fresh_rendezvous)  # type: ignore[no-untyped-call]


class Processes:
    """The processes of the run as seen from one of them; `device` is where collectives take their tensors from."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count = dist.get_world_size() if dist.is_initialized() else 1
        self.index = dist.get_rank() if dist.is_initialized() else 0
        self.is_main = self.index == 0
        self._lent: list[weakref.ref[Tensor]] = []  # to the last collective

    def settle(self) -> None:
        """Waits until the group's threads have let go of the last collective's tensors; call it before the group goes.

        Why: gloo's threads do so some time after a collective has returned, and need Python's lock for it. A group that is
        destroyed meanwhile, by the thread that has this lock, waits for them for ever (seen with torch 2.13).
        """
        deadline = time.monotonic() + _SETTLE_SECONDS
        while any(tensor() is not None for tensor in self._lent) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)  # gives the lock away

    @contextmanager
    def _lending(self, *tensors: Tensor) -> Iterator[list[Tensor]]:
        """Views of the tensors for one collective, which nobody else holds: when they are gone, it is over."""
        views = [tensor.detach() for tensor in tensors]
        self._lent = [weakref.ref(view) for view in views]
        try:
            yield views
        except RuntimeError:
            self._lent.clear()  # a peer is gone: the error's traceback holds the views, and nobody would let go of them
            raise

    def _broadcast(self, tensor: Tensor) -> None:
        with self._lending(tensor) as (view,):
            dist.broadcast(view, src=0)

    def share(self, value: Any) -> Any:
        """The main process's `value` (anything that JSON holds) in every process."""
        if self.count == 1:
            return value
        text = json.dumps(value).encode() if self.is_main else b""
        size = torch.tensor([len(text)], dtype=torch.int64, device=self.device)
        self._broadcast(size)
        body = torch.zeros(int(size.item()), dtype=torch.uint8, device=self.device)
        if self.is_main:
            body.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self._broadcast(body)
        return json.loads(body.cpu().numpy().tobytes())

    def share_tensors(self, tensors: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        """The main process's tensors in every process, by name, on the CPU; other processes pass None."""
        if self.count == 1:
            assert tensors is not None
            return tensors
        specification = self.share(
            [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
            if tensors
            else []
        )
        shared: dict[str, Tensor] = {}
        for name, dtype, shape in specification:
            if tensors is not None:
                buffer = tensors[name].to(self.device).contiguous()
            else:
                buffer = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            self._broadcast(buffer)
            shared[name] = tensors[name] if tensors is not None else buffer.cpu()
        return shared

    def all_texts(self, text: str) -> list[str]:
        """One text of at most 4096 bytes from each process, in the order of their ranks, in every process."""
        if self.count == 1:
            return [text]
        mine = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8, device=self.device)
        encoded = text.encode(errors="backslashreplace")[:_MESSAGE_BYTES]  # a path may be no text
        if encoded:
            mine[: len(encoded)].copy_(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
        rows = [torch.empty_like(mine) for _ in range(self.count)]
        with self._lending(mine, *rows) as (own, *gathered):
            dist.all_gather(gathered, own)
        return [row.cpu().numpy().tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in every process (in place)."""
        if self.count > 1:
            with self._lending(values) as (view,):
                dist.all_reduce(view)
        return values

    def smallest(self, value: int) -> int:
        """The smallest of the processes' values."""
        return min(int(text) for text in self.all_texts(str(value)))

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Says what this process alone has met, before it goes: all that its peers see is a lost connection.

        For blocks in which others wait in no collective of `together`. What a process that `speaks` raises is printed anyway.
        """
        try:
            yield
        except (UserError, OSError) as error:
            if not self.is_main and not speaks():
                message = describe_os_error(error) if isinstance(error, OSError) else str(error)
                logger.error("error: process %d: %s", self.index, message)
            raise

    @contextmanager
    def together(self) -> Iterator[None]:
        """All processes leave this block, or all raise the same `UserError` naming the process that met it.

        Why: a process that raises alone leaves its peers waiting in their next collective.
        """
        error = ""
        try:
            yield
        except UserError as problem:
            error = str(problem)
        except OSError as problem:
            error = describe_os_error(problem)
        for index, text in enumerate(self.all_texts(error)):
            if text:
                whole = error if index == self.index else text
                raise UserError(whole if index == 0 else f"process {index}: {whole}")
