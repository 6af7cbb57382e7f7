"""A recipe as a program: flags over its numbers, then the run.

Flags are read before torch is imported, so that `--help` and a mistyped flag are answered at once, and by one process of
each machine alone.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from toolkit.config import GPT2_SIZES, GPT2Config, TrainConfig, gpt2_config, load_recipe
from toolkit.errors import UserError, one_line_errors, speaks
from toolkit.training.supervision import StopRequests


def run(default: TrainConfig, arguments: Sequence[str] | None = None) -> None:
    """Trains the recipe `default` with the command line's flags over it: what every file in recipes/ ends with."""
    with one_line_errors():
        stop_requests = StopRequests()
        stop_requests.follow_launcher()  # it may die while torch is being imported
        config = parse(default, arguments)
        share_cores()
        from toolkit.training.trainer import Trainer

        Trainer(config, stop_requests=stop_requests).fit()


def share_cores() -> None:
    """Lets threads that wait for others spin briefly and then sleep, unless the environment says otherwise.

    Why: read by OpenMP when torch is imported. Where another program wants the cores too, a spinning thread keeps away
    the very one that it waits for: on 2 cores beside two busy processes, a step of the demo took 2.4 to 4.4 s, and 0.6 s
    with threads that sleep. But waking one costs more than a small operation takes: a step of a model of 0.8 million
    parameters took 98 ms with threads that sleep at once, and 66 ms with this (beside two busy processes 103 and 153).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # GNU's OpenMP, which torch uses on Linux, takes this first


def parse(default: TrainConfig, arguments: Sequence[str] | None = None, *, always: bool = False) -> TrainConfig:
    """The recipe with flags applied; `--model.size` and `--model.init-from` stand for flags of a shape before the others.

    Raises: SystemExit after `--help`, or for a flag that does not exist or a value that does not fit, with a message where
    the process `speaks`, or `always`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    return tyro.cli(
        TrainConfig,
        # As flags and not as defaults, which would have to fit the recipe's other defaults before flags change these.
        args=[*_starting_shape(given, run_dir=default.run.dir), *_without_size(given)],
        default=default,
        description=(sys.modules["__main__"].__doc__ or "").strip(),
        config=(tyro.conf.FlagConversionOff,),
        console_outputs=always or speaks(),
        registry=_flag_types(),
    )


def _flag_types() -> tyro.constructors.ConstructorRegistry:
    """Lets a truth value be written true or True, like in YAML and in Python."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def truth(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[bool] | None:
        if info.type is not bool:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="{true,false}",
            instance_from_str=lambda words: _truth(words[0]),
            is_instance=lambda value: isinstance(value, bool),
            str_from_instance=lambda value: [str(value).lower()],
        )

    return registry


def _truth(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise ValueError(f"{word!r} is neither true nor false")
    return word.lower() == "true"


def _starting_shape(arguments: Sequence[str], *, run_dir: str) -> list[str]:
    """Flags for the shape of the published GPT-2 or of the weights that these flags name.

    Raises: UserError if both are named, or for weights that cannot be read.
    """
    size, source = _value_of("--model.size", arguments), _value_of("--model.init-from", arguments)
    names: tuple[str, ...] = ("n_layer", "n_head", "n_embd")
    if size in GPT2_SIZES:
        if source not in (None, "None"):
            raise UserError(
                f"--model.size {size} and --model.init-from {source} both set the model's shape; give one of them"
            )
        shape = gpt2_config(size)
    elif source not in (None, "None"):
        names += ("context_length", "vocab_size")
        shape = _recorded_shape(Path(_value_of("--run.dir", arguments) or run_dir), source) or _shape_of_weights(source)
    else:
        return []
    return [word for name in names for word in (f"--model.{name.replace('_', '-')}", str(getattr(shape, name)))]


def _shape_of_weights(source: str) -> GPT2Config:
    from toolkit.model.huggingface import read_config  # imports torch, which flags alone do not need

    return read_config(source)


def _recorded_shape(run: Path, source: str) -> GPT2Config | None:
    """The shape that a run began with from these weights: they are needed no more, and may be gone or out of reach."""
    try:
        model = load_recipe(run / "recipe.json").model
    except (UserError, OSError):  # no run, or a damaged one, of which the run's folder itself tells
        return None
    return model if model.init_from == source else None


def _without_size(arguments: Sequence[str]) -> list[str]:
    """The flags but for a valid `--model.size`, which has done its work: a recorded recipe holds the shape alone."""
    kept: list[str] = []
    skip = False
    for index, argument in enumerate(arguments):
        name, equals, inline = argument.partition("=")
        value = inline if equals else next(iter(arguments[index + 1 : index + 2]), "")
        if skip:
            skip = False
        elif name.replace("_", "-") == "--model.size" and value in GPT2_SIZES:
            skip = not equals
        else:
            kept.append(argument)
    return kept


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The value of a flag as tyro will read it: the last of `--a-b v`, `--a-b=v`, `--a_b v`."""
    value = None
    for index, argument in enumerate(arguments):
        name, equals, inline = argument.partition("=")
        if name.replace("_", "-") == flag:
            value = inline if equals else next(iter(arguments[index + 1 : index + 2]), None)
    return value
