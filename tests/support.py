"""What the tests share beside fixtures: a corpus, tiny changes to recipes, and ways to start programs as a user would."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from toolkit.config import TrainConfig

ROOT = Path(__file__).parent.parent
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "many",
    "small",
    "models",
    "learn",
    "to",
    "write",
    "their",
    "own",
    "words",
]
TIMINGS = ("time/", "throughput/", "memory/")


def write_corpus(folder: Path, *, files: int = 6, lines: int = 120, seed: int = 0) -> Path:
    """A folder of text files and one JSONL file with sentences of a small vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(4, 12))).capitalize() + "."

    for index in range(files):
        (folder / f"story-{index}.txt").write_text("\n".join(sentence() for _ in range(lines)) + "\n")
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(lines):
            file.write(json.dumps({"text": sentence() + " " + sentence()}) + "\n")
    return folder


def change(config: TrainConfig, **sections: dict[str, Any]) -> TrainConfig:
    """The recipe with some fields of some sections changed: change(config, training={"max_steps": 3})."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )


def rows(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    """The rows of a run's log without what differs from one machine or minute to another."""
    lines = (run / f"{name}.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMINGS)} for line in lines]


def flags(config: TrainConfig, default: TrainConfig) -> list[str]:
    """The command line that turns the recipe `default` into `config`."""
    result = []
    for section in dataclasses.fields(config):
        ours, theirs = getattr(config, section.name), getattr(default, section.name)
        for item in dataclasses.fields(ours):
            value = getattr(ours, item.name)
            if value != getattr(theirs, item.name):
                values = [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
                result += [f"--{section.name}.{item.name}".replace("_", "-"), *values]
    return result


def environment(**extra: str) -> dict[str, str]:
    """The environment of a process that a test starts."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **extra}


def command(
    *arguments: str, launch: tuple[str, ...] | None = None, env: dict[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS`, or `accelerate launch LAUNCH ARGUMENTS`, as a user would."""
    prefix = [sys.executable]
    if launch is not None:
        prefix += ["-m", "accelerate.commands.launch", "--quiet", *launch]
    return subprocess.run(
        [*prefix, *arguments], env=env or environment(), capture_output=True, text=True, timeout=timeout, cwd=ROOT
    )


TOOLKIT = "import sys; from toolkit.cli import main; sys.argv[0] = 'toolkit'; main()"  # as a program


def toolkit(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the `toolkit` command in a process of its own."""
    return command("-c", TOOLKIT, *arguments, env=env)


def exact_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """softmax(query @ key.T / sqrt(D)) @ value where `mask` is true, in the data type of its inputs."""
    scores = (query @ key.mT / query.size(-1) ** 0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value
