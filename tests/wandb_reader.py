"""What a .wandb file says, read without wandb's own reader: history by step, configuration, id, tags, exit code.

The file is `:W&B`, 0xBEE1 and a version byte, then a LevelDB log: blocks of 32 KiB with records of crc32 (u32), length
(u16), type (u8) and data, where the crc covers type and data. A record is a `wandb_internal_pb2.Record`.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    folder: Path
    run_id: str = ""
    project: str = ""
    name: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)  # name or pattern -> its x axis
    preempting: bool = False
    exit_code: int | None = None

    def without_internals(self) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in self.rows]


def records(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    assert struct.unpack("<H", data[4:6])[0] == 0xBEE1
    position, parts = 7, []
    while position < len(data):
        room = BLOCK - position % BLOCK
        if room < 7:
            position += room
            continue
        crc, length, kind = struct.unpack("<IHB", data[position : position + 7])
        body = data[position + 7 : position + 7 + length]
        assert zlib.crc32(bytes([kind]) + body) == crc, f"damaged record at byte {position} of {path}"
        assert (kind in (FULL, FIRST)) == (not parts)
        parts.append(body)
        position += 7 + length
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []


def read_offline_run(path: Path) -> OfflineRun:
    from wandb.proto import wandb_internal_pb2

    run = OfflineRun(path.parent)
    for data in records(path):
        record = wandb_internal_pb2.Record.FromString(data)
        match record.WhichOneof("record_type"):
            case "run":
                run.run_id, run.project, run.name = record.run.run_id, record.run.project, record.run.display_name
                run.tags = list(record.run.tags)
                run.config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            case "history":
                row = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                run.rows.append(row | {"_step": record.history.step.num})
            case "metric":
                run.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            case "preempting":
                run.preempting = True
            case "exit":
                run.exit_code = record.exit.exit_code
    return run


def offline_runs(folder: Path) -> list[OfflineRun]:
    """The offline runs below a run folder, oldest first."""
    return [read_offline_run(path) for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))]
