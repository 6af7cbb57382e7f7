"""Tensors <-> a safetensors file: kept buffers that are written as they are, and a strict reader that hashes as it reads.

The format: 8 bytes little-endian length of the header, the header (JSON, padded with spaces to a multiple of 8), the
tensors without gaps. Source: https://github.com/huggingface/safetensors, README, "Format". Why not that library's
writer: it neither hashes nor fsyncs, copies everything once more, and sets mode 0600 whatever the umask. Its reader
opens what is written here. The reader refuses headers that are huge, overlap, leave holes, name a tensor twice or have
shapes that do not fit; tensor names are keys and never paths.
"""

import hashlib
import json
import logging
import mmap
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from toolkit.disk import CHUNK
from toolkit.training.files import DamagedFileError, parse_json

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 1 << 20  # GPT-2 1558M with two moments needs 0.2 MB
MAX_DIMENSIONS = 8
HUGE_PAGES_FROM = 64 << 20  # bytes; below, the time for page faults does not matter

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the data behind the header: bytes [begin, end)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def view(self, data: torch.Tensor) -> torch.Tensor:
        """The tensor itself, sharing memory with the data (uint8)."""
        return data[self.begin : self.end].view(self.dtype).view(self.shape)


class TensorFileImage:
    """A safetensors file in memory: its header, and one buffer into which the tensors are copied at every save."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        # Wide types first keeps each tensor aligned to its own size without gaps.
        order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
        self.places: dict[str, Place] = {}
        end = 0
        for name in order:
            tensor = tensors[name]
            assert tensor.numel(), f"{name} is empty"  # the reader refuses it, see _parse_place
            begin, end = end, end + tensor.numel() * tensor.element_size()
            self.places[name] = Place(tensor.dtype, tuple(tensor.shape), begin, end)
            dtype = _DTYPE_NAMES[tensor.dtype]
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        assert len(text) <= MAX_HEADER_BYTES, f"the header of {len(tensors)} tensors has {len(text)} bytes"
        self.header = struct.pack("<Q", len(text)) + text
        self.data = _buffer(end, pinned=any(tensor.is_cuda for tensor in tensors.values()))
        self.size = len(self.header) + end

    def fits(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether these tensors have the names, types and shapes that the buffer was made for."""
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
            name: (place.dtype, place.shape) for name, place in self.places.items()
        }

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies the tensors into the buffer; copies from a device are only queued."""
        for name, place in self.places.items():
            place.view(self.data).copy_(tensors[name].detach(), non_blocking=True)

    def pieces(self) -> list[memoryview]:
        """The file's bytes, in order; they change with the next `fill`."""
        return [memoryview(self.header), self.data.numpy().data]


def _buffer(size: int, *, pinned: bool = False) -> torch.Tensor:
    """Memory for the data of a file, uint8."""
    if pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:  # locked memory is limited: slower, but nothing is lost
            logger.warning("no pinned memory for a checkpoint of %d bytes (%s); saving takes longer", size, error)
    if size < HUGE_PAGES_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    # Large pages: 1.5 GB is touched for the first time in 0.3 s instead of 1.3 s (2 cores of a Xeon, 2026-11).
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def read_tensors(descriptor: int, size: int, *, where: str) -> tuple[dict[str, torch.Tensor], str]:
    """All tensors of an open file of `size` bytes, and the file's sha256, from one pass over it.

    Raises: DamagedFileError unless the header describes exactly the bytes behind it.
    """
    header, places = read_header(descriptor, size, where=where)
    data = _buffer(size - len(header))
    view = data.numpy().data
    digest = hashlib.sha256(header)
    position = 0
    with ThreadPoolExecutor(1, thread_name_prefix="sha256") as hasher:  # hashes one chunk while the next is read
        while position < len(view):
            count = os.preadv(descriptor, [view[position : position + CHUNK]], len(header) + position)
            if count == 0:
                raise DamagedFileError(f"{where} became shorter while it was read")
            hasher.submit(digest.update, view[position : position + count])
            position += count
    return {name: place.view(data) for name, place in places.items()}, digest.hexdigest()


def read_header(descriptor: int, size: int, *, where: str) -> tuple[bytes, dict[str, Place]]:
    """The bytes before the data, and where each tensor lies in the data.

    Raises: DamagedFileError unless the header describes exactly the bytes behind it.
    """
    start = os.pread(descriptor, 8, 0)
    if len(start) < 8:
        raise DamagedFileError(f"{where} has {size} bytes, too few for a safetensors file")
    (length,) = struct.unpack("<Q", start)
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise DamagedFileError(f"{where} is not a safetensors file (a header of {length} bytes in a file of {size})")
    text = os.pread(descriptor, length, 8)
    if len(text) < length:
        raise DamagedFileError(f"{where} became shorter while it was read")
    return start + text, _parse_header(text, size - 8 - length, where=where)


def _parse_header(text: bytes, data_bytes: int, *, where: str) -> dict[str, Place]:
    header = parse_json(text, where=f"the header of {where}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedFileError(f"{where}: the header's metadata is not text")
    places = {name: _parse_place(name, entry, where=where) for name, entry in header.items()}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: item[1].begin):
        if place.begin != end:
            raise DamagedFileError(f"{where}: tensor {name[:80]!r} starts at byte {place.begin}, not at {end}")
        end = place.end
    if end != data_bytes:
        raise DamagedFileError(f"{where}: the tensors have {end} bytes, the file holds {data_bytes}")
    return places


def _parse_place(name: str, entry: object, *, where: str) -> Place:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise DamagedFileError(f"{where}: tensor {name[:80]!r} has an entry of another form")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    shape, offsets = entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise DamagedFileError(f"{where}: tensor {name[:80]!r} has a type that does not occur here")
    # A dimension of 0 never occurs here, and beside a huge one it would hide from the comparison of sizes.
    if not whole_numbers(shape, least=1) or len(shape) > MAX_DIMENSIONS:
        raise DamagedFileError(f"{where}: tensor {name[:80]!r} has a shape that is not a few positive numbers")
    if not whole_numbers(offsets, least=0) or len(offsets) != 2:
        raise DamagedFileError(f"{where}: tensor {name[:80]!r} has offsets that are not two numbers")
    begin, end = offsets
    if end - begin != prod(shape) * dtype.itemsize or begin % dtype.itemsize:
        raise DamagedFileError(f"{where}: tensor {name[:80]!r} does not fit its offsets {offsets}")
    return Place(dtype, tuple(shape), begin, end)


def whole_numbers(values: object, *, least: int) -> bool:
    """Whether this is a list of integers from `least` to 2**48, which no size of ours reaches."""
    return isinstance(values, list) and all(type(value) is int and least <= value < 2**48 for value in values)
