"""What the processes of one run tell each other outside the step: JSON, tensors, and each other's errors.

Everything travels as plain tensors, so nothing is pickled. With one process every function is a no-op that returns what
it was given.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.errors import UserError, describe_os_error

_MESSAGE_BYTES = 4096


class Processes:
    """The processes of the run as seen from one of them; `device` is where collectives take their tensors from."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count = dist.get_world_size() if dist.is_initialized() else 1
        self.index = dist.get_rank() if dist.is_initialized() else 0
        self.is_main = self.index == 0

    def share(self, value: Any) -> Any:
        """The main process's `value` (anything that JSON holds) in every process."""
        if self.count == 1:
            return value
        text = json.dumps(value).encode() if self.is_main else b""
        size = torch.tensor([len(text)], dtype=torch.int64, device=self.device)
        dist.broadcast(size, src=0)
        body = torch.zeros(int(size.item()), dtype=torch.uint8, device=self.device)
        if self.is_main:
            body.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(body, src=0)
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
            dist.broadcast(buffer, src=0)
            shared[name] = tensors[name] if tensors is not None else buffer.cpu()
        return shared

    def all_texts(self, text: str) -> list[str]:
        """One text of at most 4096 bytes from each process, in the order of their ranks, in every process."""
        if self.count == 1:
            return [text]
        mine = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8, device=self.device)
        encoded = text.encode()[:_MESSAGE_BYTES]
        if encoded:
            mine[: len(encoded)].copy_(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
        rows = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(rows, mine)
        return [row.cpu().numpy().tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in every process (in place)."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def smallest(self, value: int) -> int:
        """The smallest of the processes' values."""
        return min(int(text) for text in self.all_texts(str(value)))

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
