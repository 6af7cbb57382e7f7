"""Every setting of a training run: what it means, its unit, and where a default comes from.

Frozen dataclasses, one per section; every field is a flag (`--section.field-name`) whose help is the comment behind it.
A section checks its own fields, `TrainConfig` the combinations; all problems are collected and raised at once, and
nothing is ever adjusted. This file imports no torch, so that `--help` and a wrong flag are answered at once.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from toolkit.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]

# n_layer, n_head, n_embd of the four published GPT-2 models. Source: Radford et al. 2019, table 2 (with the sizes as
# released: 124M where the paper says 117M).
GPT2_SIZES: dict[str, tuple[int, int, int]] = {
    "124M": (12, 12, 768),
    "355M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
}


# Bounds of a model's numbers, far beyond any GPT-2: what larger ones would ask for takes for ever to compute.
MAX_LAYERS = 4096
MAX_DIMENSION = 2**24


def _raise_all(problems: Sequence[str]) -> None:
    if problems:
        raise UserError("; ".join(problems))


def _positive(section: str, config: Any, *names: str) -> list[str]:
    """A problem for each named field that is neither None nor a finite number above zero."""
    values = [(name, getattr(config, name)) for name in names]
    return [
        f"{section}.{name}={value} must be above 0"
        for name, value in values
        if value is not None and not isinstance(value, str) and not 0 < value < math.inf
    ]


# A field's comment is its --help and stays on the field's line.
# fmt: off


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where the run lives on disk."""

    dir: str = "runs/gpt2"  # folder of this run; starting again with the same folder resumes it [path]
    resume_from: str | None = None  # checkpoint folder of another run from which a new run starts [path]; None: no other

    def __post_init__(self) -> None:
        _check_types("run", self)
        _raise_all([f"run.{name} is empty; name a folder" for name in ("dir", "resume_from") if getattr(self, name) == ""])


@dataclass(frozen=True, kw_only=True, slots=True)
class GPT2Config:
    """The shape of the model; the defaults are GPT-2 124M. Source: Radford et al. 2019, sec. 2.3."""

    n_layer: int = 12  # transformer blocks [count]
    n_head: int = 12  # attention heads per block; must divide n_embd [count]
    n_embd: int = 768  # width of the residual stream [features]
    context_length: int = 1024  # most positions that the model has [tokens]
    vocab_size: int = 50257  # ids that the model knows; must be that of the data's tokenizer [ids]
    dropout: float = 0.0  # probability in embeddings, attention and residuals; 0 suits less than one epoch [0..1)
    zero_init_residual: bool = False  # start attn.c_proj and mlp.c_proj at zero instead of GPT-2's scaled normal
    size: Literal["as-stated", "124M", "355M", "774M", "1558M"] = "as-stated"  # a published GPT-2 whose n_layer, n_head, n_embd to start from; flags beside it win
    init_from: str | None = None  # GPT-2 weights in Hugging Face format to start from [folder or Hub name]; None: random

    def __post_init__(self) -> None:
        _check_types("model", self)
        numbers = ("n_layer", "n_head", "n_embd", "context_length", "vocab_size")
        problems = _positive("model", self, *numbers)
        for name in numbers:
            most = MAX_LAYERS if name == "n_layer" else MAX_DIMENSION
            if getattr(self, name) > most:
                problems.append(f"model.{name}={getattr(self, name)} must be at most {most:,}")
        if not problems and self.n_embd % self.n_head:
            nearest = sorted(
                {max(1, self.n_embd // self.n_head) * self.n_head, (self.n_embd // self.n_head + 1) * self.n_head}
            )
            problems.append(
                f"model.n_embd={self.n_embd} is not a multiple of model.n_head={self.n_head}; "
                f"use n_embd {' or '.join(map(str, nearest))}"
            )
        if self.init_from == "":
            problems.append("model.init_from is empty; name a folder or a model of the Hub, or None")
        if not 0 <= self.dropout < 1:
            problems.append(f"model.dropout={self.dropout} must be at least 0 and below 1")
        if self.size != "as-stated" and (self.n_layer, self.n_head, self.n_embd) != GPT2_SIZES[self.size]:
            problems.append(
                f"model.size={self.size} means n_layer, n_head, n_embd = {GPT2_SIZES[self.size]}, not "
                f"{(self.n_layer, self.n_head, self.n_embd)}; in Python write gpt2_config('{self.size}', ...)"
            )
        _raise_all(problems)


def gpt2_config(size: str, **fields: Any) -> GPT2Config:
    """The configuration of a published GPT-2 (124M, 355M, 774M or 1558M), with other fields as given."""
    if size not in GPT2_SIZES:
        raise UserError(f"model.size={size} is not a published GPT-2; use one of {', '.join(GPT2_SIZES)}")
    n_layer, n_head, n_embd = GPT2_SIZES[size]
    return GPT2Config(**{"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd} | fields)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What the run reads."""

    path: tuple[str, ...] = ("data/fineweb-edu-10b",)  # prepared sets; several are mixed by weight: DIR=0.7 DIR=0.3; a URL whose path ends in =NUMBER needs one, a folder not [folder or fsspec URL]
    sequence_length: int = 1024  # T, tokens in one training window; at most context_length [tokens]
    shuffle_group_shards: int = 8  # consecutive shards (in the epoch's order) whose windows are permuted together [shards]
    cache_dir: str | None = None  # where shards of a remote set are kept while in use [path]; None: below the user's cache
    cache_gib: float = 4.0  # most disk that the cache of a remote set may use [GiB]

    def __post_init__(self) -> None:
        _check_types("data", self)
        problems = _positive("data", self, "sequence_length", "shuffle_group_shards", "cache_gib")
        if not self.path or not all(self.path):
            problems.append("data.path is empty; name a folder made by `toolkit prepare`")
        if self.cache_dir == "":
            problems.append("data.cache_dir is empty; name a folder, or None")
        _raise_all(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How long, how much per step, in which precision; what happens every so often."""

    max_steps: int = 19_073  # optimizer steps after which the run is finished; a later start may raise it [steps]
    tokens_per_step: int = 2**19  # tokens in one optimizer step over all processes; fixes the recipe [tokens]
    micro_batch_size: int | Literal["auto"] = 16  # windows per process in one forward; no part of the result [windows]
    seed: int = 1337  # initial weights, order of the data, dropout, samples
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on CUDA that has it, fp16 on older CUDA, else fp32
    eval_every: int | None = 250  # steps between validations; None: only at the last step [steps]
    checkpoint_every: int | None = 250  # steps between checkpoints; None: only at the last step [steps]
    sample_every: int | None = 1000  # steps between sampled texts; None: never [steps]
    max_hours: float | None = None  # wall-clock time after which this start saves and leaves [hours]; None: no limit
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on CUDA where a compiler is found
    activation_checkpointing: Literal["none", "block"] = "none"  # block: recompute each block in the backward pass
    loss_chunk_tokens: int = 1024  # positions whose logits exist at one time [tokens]
    deterministic: bool = False  # on CUDA, bitwise repeatable kernels at some speed; a CPU is repeatable anyway
    max_skipped_in_a_row: int = 20  # steps in a row without a finite gradient, or rewinds to one checkpoint, after which the run stops [count]
    min_loss_scale: float = 1.0  # fp16: a loss scale below this stops the run [factor]
    spike_z_score: float = 7.0  # a loss this many robust deviations above its recent median is logged as a spike [deviations]
    on_spike: Literal["log", "rewind"] = "log"  # rewind: go back to the last checkpoint and skip the samples since it
    watchdog_minutes: float = 30.0  # a process without progress for this long prints its stacks and ends the job [minutes]

    def __post_init__(self) -> None:
        _check_types("training", self)
        counts = ("max_steps", "tokens_per_step", "micro_batch_size", "eval_every", "checkpoint_every", "sample_every")
        others = (
            "max_hours",
            "loss_chunk_tokens",
            "max_skipped_in_a_row",
            "min_loss_scale",
            "spike_z_score",
            "watchdog_minutes",
        )
        problems = _positive("training", self, *counts, *others)
        if self.watchdog_minutes > 1e6:
            problems.append(f"training.watchdog_minutes={self.watchdog_minutes} must be at most 1,000,000, which is two years")
        if not 0 <= self.seed < 2**63:
            problems.append(f"training.seed={self.seed} must be at least 0 and below 2**63")
        _raise_all(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW as GPT-3 used it, or Muon on the hidden matrices. Source: Brown et al. 2020, app. B; Jordan et al. 2024."""

    learning_rate: float = 6e-4  # AdamW's peak learning rate
    weight_decay: float = 0.1  # on matrices and embeddings only
    beta1: float = 0.9  # decay of the first moment [0..1)
    beta2: float = 0.95  # decay of the second moment [0..1)
    eps: float = 1e-8  # added to the root of the second moment
    max_grad_norm: float = 1.0  # gradients with a larger global norm are scaled down to it
    name: Literal["adamw", "muon"] = "adamw"  # muon: Muon on the blocks' matrices, AdamW on the rest
    muon_learning_rate: float = 0.02  # Muon's peak learning rate; follows the same schedule
    muon_momentum: float = 0.95  # Muon's momentum [0..1)
    muon_weight_decay: float = 0.0  # Muon's decoupled weight decay

    def __post_init__(self) -> None:
        _check_types("optimizer", self)
        problems = _positive("optimizer", self, "learning_rate", "eps", "max_grad_norm", "muon_learning_rate")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"optimizer.{name}={getattr(self, name)} must be at least 0 and below 1")
        for name in ("weight_decay", "muon_weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                problems.append(f"optimizer.{name}={getattr(self, name)} must be at least 0")
        _raise_all(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """The learning rate as a function of the step: warm-up, then (wsd only) a plateau, then the decay, then the floor."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # shape of the decay; wsd: plateau, then linear decay
    warmup_steps: int = 715  # steps of linear warm-up; 375M tokens at 2**19 a step, Brown et al. 2020 [steps]
    decay_steps: int = 18_358  # length of the decay, counted from the end of the warm-up (wsd: of the plateau) [steps]
    stable_steps: int = 0  # wsd only: steps at the peak between warm-up and decay [steps]
    final_ratio: float = 0.1  # learning rate after the decay, as a share of the peak [0..1]

    def __post_init__(self) -> None:
        _check_types("schedule", self)
        problems = [
            f"schedule.{name}={getattr(self, name)} must be at least 0"
            for name in ("warmup_steps", "stable_steps", "decay_steps")
            if getattr(self, name) < 0
        ]
        if not 0 <= self.final_ratio <= 1:
            problems.append(f"schedule.final_ratio={self.final_ratio} must be between 0 and 1")
        if self.stable_steps and self.name != "wsd":
            problems.append(
                f"schedule.stable_steps={self.stable_steps} has no effect with schedule.name={self.name}; use wsd or 0"
            )
        _raise_all(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """The validation loss: always the same windows, whatever the number of processes."""

    max_tokens: int = 10_485_760  # evaluates the first windows of the validation split up to this many tokens [tokens]
    micro_batch_size: int = 8  # windows per process in one forward of an evaluation [windows]

    def __post_init__(self) -> None:
        _check_types("evaluation", self)
        _raise_all(_positive("evaluation", self, "max_tokens", "micro_batch_size"))


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """The text sampled while training (every `training.sample_every` steps), written to samples.jsonl and W&B."""

    prompt: str = ""  # what the text continues; empty: the start of a document
    num_samples: int = 2  # texts each time [count]
    max_new_tokens: int = 128  # length of each text [tokens]
    temperature: float = 0.8  # below 1 sharpens the distribution; 0 always takes the likeliest token
    top_k: int | None = 200  # only the k likeliest tokens are drawn from; None: all [count]

    def __post_init__(self) -> None:
        _check_types("sampling", self)
        problems = _positive("sampling", self, "num_samples", "max_new_tokens", "top_k")
        if not 0 <= self.temperature < math.inf:
            problems.append(f"sampling.temperature={self.temperature} must be at least 0")
        _raise_all(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Which checkpoints stay on disk; how often they are written is `training.checkpoint_every`."""

    keep_last: int = 2  # newest checkpoints that are kept, at least 2 so that a damaged one has a predecessor [count]
    keep_every: int | None = None  # checkpoints at multiples of this are kept for good [steps]; None: none
    keep_best: bool = False  # also keep the checkpoint with the lowest validation loss

    def __post_init__(self) -> None:
        _check_types("checkpoint", self)
        problems = _positive("checkpoint", self, "keep_every")
        if self.keep_last < 2:
            problems.append(
                f"checkpoint.keep_last={self.keep_last} must be at least 2, so that a damaged checkpoint has a predecessor"
            )
        _raise_all(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases, a mirror of metrics.jsonl that can never stop training."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: WANDB_MODE if set, else online with a key, else offline
    project: str = "gpt2-toolkit"  # W&B project
    entity: str | None = None  # W&B user or team; None: the account's default
    name: str | None = None  # name shown in W&B; None: the run folder's name
    tags: tuple[str, ...] = ()  # W&B tags

    def __post_init__(self) -> None:
        _check_types("wandb", self)
        problems = [f"wandb.tags holds {tag!r}; a tag has 1 to 64 characters" for tag in self.tags if not 1 <= len(tag) <= 64]
        if not 1 <= len(self.project) <= 128 or set(self.project) & set("/\\#?%:"):
            problems.append(f"wandb.project={self.project!r} is no project's name; use 1 to 128 characters, none of / \\ # ? % :")
        _raise_all(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A whole run as numbers."""

    run: RunConfig = field(default_factory=RunConfig)
    model: GPT2Config = field(default_factory=GPT2Config)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        for name, section in typing.get_type_hints(TrainConfig).items():
            if not isinstance(getattr(self, name), section):
                raise UserError(f"{name}={getattr(self, name)!r} is not of the expected type; give {section.__name__}(...)")
        problems = []
        if self.data.sequence_length > self.model.context_length:
            raised = "" if self.model.init_from else " or raise --model.context-length"
            problems.append(
                f"data.sequence_length={self.data.sequence_length} is longer than model.context_length="
                f"{self.model.context_length}; lower --data.sequence-length{raised}"
            )
        if self.training.tokens_per_step % self.data.sequence_length:
            problems.append(
                f"training.tokens_per_step={self.training.tokens_per_step} is not a multiple of data.sequence_length="
                f"{self.data.sequence_length}; use {nearest_multiples(self.training.tokens_per_step, self.data.sequence_length)}"
            )
        _raise_all(problems)


# fmt: on

# A later start of the same run may change these and nothing else; what changed is recorded in run.json.
MAY_CHANGE_ON_RESUME = frozenset(
    {
        "run.dir",  # the folder was moved: it is the same run
        "data.path",  # the data was moved: fingerprints and weights are compared instead
        "data.cache_dir",
        "data.cache_gib",
        "training.max_steps",
        "training.max_hours",
        "training.eval_every",
        "training.checkpoint_every",
        "training.sample_every",
        "checkpoint.keep_every",
        "checkpoint.keep_last",
        "checkpoint.keep_best",
        "training.compile",
        "training.activation_checkpointing",
        "training.micro_batch_size",
        "training.watchdog_minutes",
        "wandb.mode",
        "wandb.project",
        "wandb.entity",
        "wandb.name",
        "wandb.tags",
    }
)


# Where something lies on one machine.
PATHS = frozenset({"run.dir", "run.resume_from", "data.path", "data.cache_dir", "model.init_from"})

# The machines of a run may differ in these and in nothing else: paths (data are compared by fingerprint, weights sent by the
# main process), and what only one process minds.
MAY_DIFFER_BETWEEN_MACHINES = frozenset(
    {
        *PATHS,
        "data.cache_gib",
        "training.max_hours",
        *(f"wandb.{field.name}" for field in dataclasses.fields(WandbConfig)),
    }
)


def nearest_multiples(value: int, unit: int) -> str:
    """The multiples of `unit` next to `value`, as words: "499712 or 507904"."""
    below, above = value // unit * unit, (value // unit + 1) * unit
    return f"{below} or {above}" if below else str(above)


def divisors(number: int) -> list[int]:
    """The whole numbers that divide `number`, in order."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return small + [number // divisor for divisor in reversed(small) if divisor * divisor != number]


def grad_accum_steps(config: TrainConfig, *, micro_batch_size: int, num_processes: int) -> int:
    """Forward-backward passes that each process makes in one step.

    Raises: UserError if tokens_per_step is not a whole number of them; it names the nearest values that are.
    """
    tokens, length = config.training.tokens_per_step, config.data.sequence_length
    unit = micro_batch_size * length * num_processes
    if tokens % unit:
        windows = tokens // length
        fitting = divisors(windows // num_processes) if windows % num_processes == 0 else []
        below = max((size for size in fitting if size < micro_batch_size), default=None)
        above = min((size for size in fitting if size > micro_batch_size), default=None)
        sizes = " or ".join(str(size) for size in (below, above) if size)
        raise UserError(
            f"training.tokens_per_step={tokens} is not a multiple of micro_batch_size * sequence_length * num_processes = "
            f"{micro_batch_size} * {length} * {num_processes} = {unit}; use tokens_per_step {nearest_multiples(tokens, unit)}"
            + (f", or micro_batch_size {sizes}" if sizes else "")
        )
    return tokens // unit


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values, section by section; `from_dict` gives an equal object back."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False)))


_T = typing.TypeVar("_T")


def from_dict(cls: type[_T], values: Mapping[str, Any], *, where: str = "") -> _T:
    """The configuration that `to_dict` described.

    Raises: UserError for an unknown key, a missing key or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    unknown, missing = sorted(set(values) - set(hints)), sorted(set(hints) - set(values))
    if unknown or missing:
        raise UserError(
            f"{where or cls.__name__}: unknown keys {unknown}, missing keys {missing}; made by another version?"
        )
    return cls(**{name: _from_json(hints[name], values[name], f"{where}.{name}".lstrip(".")) for name in hints})


def _check_types(section: str, values: Any) -> None:
    """Raises UserError for a value of a type that `from_dict` would not take back; Python lets any pass."""
    for name, hint in typing.get_type_hints(type(values)).items():
        value = getattr(values, name)
        _from_json(hint, list(value) if isinstance(value, tuple) else value, f"{section}.{name}")


def _from_json(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return from_dict(hint, value, where=where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _from_json(option, value, where)
            except UserError:
                continue
    elif origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_from_json(arguments[0], item, where) for item in value)
    elif hint is float and type(value) in (int, float):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{where} is a whole number of {value.bit_length()} bits, which no float holds") from None
    elif type(value) is hint:
        return value
    expected = hint.__name__ if origin is None and isinstance(hint, type) else str(hint)
    if origin is Literal:
        expected = " or ".join(map(repr, arguments))
    raise UserError(f"{where}={value!r} is not of the expected type; give {expected}")


def differences(old: TrainConfig, new: TrainConfig) -> list[tuple[str, Any, Any]]:
    """(section.field, old, new) for every field in which two configurations differ."""
    flat_old, flat_new = to_dict(old), to_dict(new)
    return [
        (f"{section}.{name}", flat_old[section][name], value)
        for section, fields in flat_new.items()
        for name, value in fields.items()
        if flat_old[section][name] != value
    ]


def load_recipe(path: Path) -> TrainConfig:
    """The configuration in a recipe.json.

    Raises: UserError if the file is not one that this version wrote.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} is not a run folder (it has no {path.name}); give the folder of --run.dir"
        ) from None
    except (ValueError, RecursionError) as error:  # no JSON, or no text
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a recipe")
    return from_dict(TrainConfig, values, where=str(path))
