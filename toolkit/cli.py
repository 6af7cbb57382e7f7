"""The `toolkit` command: one subcommand per verb that is not a training run. Each is a thin layer over the library.

Verbs print to stdout; progress and warnings go to stderr. Imports happen inside the verbs, so that `--help` is quick
and a verb needs only the packages that it uses.
"""

import codecs
import json as json_format
import runpy
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional

from toolkit.config import TrainConfig, load_recipe
from toolkit.errors import UserError, one_line_errors
from toolkit.recipe import parse, share_cores
from toolkit.training.progress import configure_logging

if TYPE_CHECKING:
    from toolkit.data.tokenizer import Tokenizer


def prepare(
    paths: Positional[tuple[str, ...]],
    /,
    *,
    out: Path,
    tokenizer: str = "gpt2",
    text_column: str = "text",
    workers: int | None = None,
    shard_tokens: int = 100_000_000,
    val_fraction: float = 0.005,
) -> None:
    """Text -> shards: files and folders (.txt, .jsonl, .parquet, also .gz/.zst), hub:DATASET[:CONFIG], or stdlib.

    Killed at any moment, the same command continues; the bytes do not depend on the number of workers. If a file's size or
    modification time has changed in between, it says so and stops.

    Args:
        paths: files, folders, hub:DATASET[:CONFIG], or stdlib (the source files of Python's own standard library).
        out: folder for the shards and their manifest.json.
        tokenizer: gpt2, bytes, or a tokenizer file made by `toolkit tokenizer train`.
        text_column: field of a JSONL or Parquet row that holds the text.
        workers: worker processes; None: one per core.
        shard_tokens: tokens in one shard [tokens].
        val_fraction: share of the documents that become the validation split [0..1].
    """
    from toolkit.data.prepare import prepare as prepare_data

    result = prepare_data(
        paths,
        out=out,
        tokenizer=tokenizer,
        text_column=text_column,
        workers=workers,
        shard_tokens=shard_tokens,
        val_fraction=val_fraction,
    )
    _print_lines(result.lines)


def adopt(folder: Positional[Path], /, *, tokenizer: str = "gpt2") -> None:
    """Shards that others made (llm.c's .bin layout, names with train and val in them) -> a checked manifest.json.

    Args:
        folder: folder of .bin shards without a manifest.json.
        tokenizer: what the ids were made with: gpt2, bytes, or a tokenizer file.
    """
    from toolkit.data.shards import adopt as adopt_shards
    from toolkit.data.tokenizer import load_tokenizer

    manifest = adopt_shards(folder, load_tokenizer(tokenizer))
    for split, shards in manifest.splits.items():
        print(f"{split}: {len(shards)} shards, {sum(shard.tokens for shard in shards):,} tokens")
    print(f"{folder}: adopted, fingerprint {manifest.fingerprint[:12]}")


def verify(where: Positional[str], /) -> None:
    """Checks every byte of a data set, a checkpoint, or all checkpoints of a run against their manifests.

    Args:
        where: a prepared data folder or its URL (https://, hf://, s3://, ...), a checkpoint folder, or a run folder.
    """
    from toolkit.data.manifest import is_url

    if is_url(where):
        from toolkit.data.remote import verify_remote

        _print_lines(verify_remote(where))
        return
    path = Path(where)
    if not path.is_dir():
        raise UserError(f"there is no folder {path}; give a prepared data set, a checkpoint or a run")
    from toolkit.training.checkpoint import steps_in

    if (path / "model.safetensors").exists() or (path / "state.json").exists():
        _verify_checkpoints(path, [path])
    elif (path / "checkpoints").is_dir():
        _verify_checkpoints(path, _checkpoints_in(path / "checkpoints"))
    elif steps_in(path) or (path / "run.lock").exists():
        _verify_checkpoints(path, _checkpoints_in(path))
    else:
        from toolkit.data.shards import verify_data

        _print_lines(verify_data(path))


def _checkpoints_in(folder: Path) -> list[Path]:
    from toolkit.training.checkpoint import step_name, steps_in

    return [folder / step_name(step) for step in steps_in(folder)]


def _verify_checkpoints(path: Path, folders: Sequence[Path]) -> None:
    from toolkit.training.checkpoint import verify_checkpoint

    if not folders:
        raise UserError(f"{path} has no checkpoint yet; train until the first one (--training.checkpoint-every)")
    if _is_exported(path):
        raise UserError(
            f"{path} is an exported model, which names no hashes; verify the checkpoint that it was made from"
        )
    damaged = []
    for folder in folders:
        problems = verify_checkpoint(folder)
        print(f"{folder}: {'; '.join(problems) or 'ok'}")
        damaged += [folder.name] * bool(problems)
    if damaged:
        raise UserError(
            f"{len(damaged)} of {len(folders)} damaged: {', '.join(damaged)}; a run skips them when it resumes"
        )


def generate(
    run: Positional[Path],
    prompt: Positional[str] = "",
    /,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 200,
    top_p: float | None = None,
    num_samples: int = 1,
    seed: int = 1337,
    device: str = "auto",
) -> None:
    """Continues a text, printed as it is generated.

    Args:
        run: a run folder (its newest checkpoint), a checkpoint, or an exported model.
        prompt: text to continue; empty: the start of a document.
        max_new_tokens: length of each sample [tokens].
        temperature: below 1 sharpens the distribution; 0 always takes the likeliest token.
        top_k: only the k likeliest tokens are drawn from; None: all [count].
        top_p: only the likeliest tokens that together reach this probability; None: all [0..1].
        num_samples: texts to generate [count].
        seed: the same seed gives the same texts.
        device: auto (an accelerator if there is one), cpu, cuda, ...
    """
    from toolkit.evaluation.generate import generate as generate_tokens
    from toolkit.model.huggingface import load_model

    folder = _model_folder(run)
    tokenizer = _tokenizer_of(folder)
    model = load_model(folder, device=_device(device))
    tokens = generate_tokens(
        model,
        tokenizer.encode(prompt),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        num_samples=num_samples,
        eot_id=tokenizer.eot_id,
        num_ids=tokenizer.vocab_size,
    )
    current = -1
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end inside a character
    for sample, token in tokens:
        if sample != current:
            _begin_sample(current, sample, prompt, num_samples, decoder)
            current = sample
        print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)
    if current < 0:
        _begin_sample(current, 0, prompt, num_samples, decoder)
    print(decoder.decode(b"", True))


def _begin_sample(before: int, sample: int, prompt: str, num_samples: int, decoder: codecs.IncrementalDecoder) -> None:
    if before >= 0:
        print(decoder.decode(b"", True))
        decoder.reset()
    if num_samples > 1:
        print(f"--- sample {sample + 1} of {num_samples}")
    print(prompt, end="", flush=True)


def evaluate(
    run: Positional[Path],
    /,
    *,
    data: Annotated[tuple[str, ...] | None, tyro.conf.arg(name="data.path")] = None,
    sequence_length: int | None = None,
    max_tokens: int | None = None,
    micro_batch_size: int = 8,
    device: str = "auto",
) -> None:
    """Loss, perplexity and bits per byte on the validation split.

    Args:
        run: a run folder (its newest checkpoint), a checkpoint, or an exported model.
        data: prepared sets; None: those of the run's recipe.
        sequence_length: T of the windows; None: the recipe's, or the model's context [tokens].
        max_tokens: evaluates the first windows up to this many tokens; None: the recipe's limit [tokens].
        micro_batch_size: windows per forward [windows].
        device: auto (an accelerator if there is one), cpu, cuda, ...
    """
    from toolkit.config import DataConfig, EvaluationConfig
    from toolkit.data.loader import open_data, validation_loader
    from toolkit.evaluation.loss import evaluate as evaluate_model
    from toolkit.model.huggingface import load_model

    given = {"sequence-length": sequence_length, "max-tokens": max_tokens, "micro-batch-size": micro_batch_size}
    if wrong := [
        f"--{name} {value} must be at least 1" for name, value in given.items() if value is not None and value < 1
    ]:
        raise UserError("; ".join(wrong))
    folder = _model_folder(run)
    recipe = _recipe_of(folder)
    if data is None and recipe is None:
        raise UserError(f"{folder} has no recipe that names its data; say which with --data.path DIR")
    paths = data or (recipe.data.path if recipe is not None else ())
    tokenizer = _tokenizer_of(folder)
    model = load_model(folder, device=_device(device))
    if sequence_length is None:
        sequence_length = recipe.data.sequence_length if recipe is not None else model.config.context_length
    if sequence_length > model.config.context_length:
        raise UserError(
            f"sequence_length={sequence_length} is longer than the model's context_length={model.config.context_length}; "
            f"use at most {model.config.context_length}"
        )
    limit = max_tokens or (recipe.evaluation if recipe is not None else EvaluationConfig()).max_tokens
    cache = recipe.data if recipe is not None else DataConfig()
    opened = open_data(paths, cache_dir=cache.cache_dir, cache_gib=cache.cache_gib)
    if opened.tokenizer_info.sha256 != tokenizer.sha256:
        raise UserError(
            f"{', '.join(paths)} was made with tokenizer {opened.tokenizer_info.name!r}, the model was trained with "
            f"{tokenizer.name!r}; evaluate on data of the model's own tokenizer"
        )
    for data_set in opened.sets:
        batches = validation_loader(
            data_set, sequence_length=sequence_length, max_tokens=limit, micro_batch_size=micro_batch_size
        )
        result = evaluate_model(model, batches, tokenizer.token_bytes())
        assert result is not None
        print(f"{data_set.path}: {result.tokens:,} tokens of the validation split, {result.utf8_bytes:,} bytes")
        print(f"  loss          {result.loss:.6f} nats per token")
        print(f"  perplexity    {result.perplexity:.4f}")
        print(f"  bits per byte {result.bits_per_byte:.6f}")


def export(run: Positional[Path], out: Positional[Path], /) -> None:
    """A checkpoint -> a folder for transformers, with tokenizer files: pipeline("text-generation", model=DIR) runs.

    Args:
        run: a run folder (its newest checkpoint) or a checkpoint.
        out: folder to make.
    """
    from toolkit.data.tokenizer import write_transformers_files
    from toolkit.model.huggingface import export as export_model

    folder = _model_folder(run)
    tokenizer = _tokenizer_of(folder)
    export_model(folder, out)
    write_transformers_files(tokenizer, out)
    print(f'{out}: exported from {folder}; in Python: transformers.pipeline("text-generation", model="{out}")')


def audit(
    run: Positional[Path],
    /,
    *,
    data: Annotated[tuple[str, ...], tyro.conf.arg(name="data.path")] = (),
) -> None:
    """Proves from a run's ledger and the shards that every sample was trained on once per epoch.

    Args:
        run: run folder.
        data: where the data lies now; none given: where the recipe says.
    """
    from toolkit.training.audit import audit as audit_run

    _print_lines(audit_run(run, data_path=data))


def plan(
    recipe: Positional[Path | None] = None,
    /,
    *,
    device: str = "this",
    memory_gib: float | None = None,
    tflops: float | None = None,
    num_processes: int = 1,
    json: bool = False,
) -> Callable[[Sequence[str]], None]:
    """What a run will cost, without the device: memory, micro-batch, days, disk. Recipe flags (--model.n-layer ...) follow.

    Args:
        recipe: a recipe file (recipes/train_124m.py) or a run folder; none given: GPT-2 124M on 10 billion tokens.
        device: rtx3060, 3090, a100, ... (an unknown name lists all), or this: the machine at hand.
        memory_gib: memory of one device; with --tflops it describes a card that has no name here [GiB].
        tflops: peak rate of one device in the run's precision [TFLOP/s].
        num_processes: devices that train together [count].
        json: prints one JSON object instead of a table.
    """

    def with_flags(flags: Sequence[str]) -> None:
        from toolkit.training.plan import plan as make_plan

        config = _recipe(recipe, flags)
        made = make_plan(config, device=device, memory_gib=memory_gib, tflops=tflops, num_processes=num_processes)
        _print_lines([json_format.dumps(made.to_dict(), indent=2)] if json else made.lines())

    return with_flags


def verify_resume(
    recipe: Positional[Path | None] = None,
    /,
    *,
    steps: int = 10,
    cut: int | None = None,
    num_processes: int = 1,
) -> Callable[[Sequence[str]], None]:
    """Proves on this machine that a resumed run equals an uninterrupted one to the bit. Recipe flags follow.

    Args:
        recipe: a recipe file (recipes/train_124m.py) or a run folder; none given: GPT-2 124M.
        steps: steps of the uninterrupted run [steps].
        cut: step at which the other run stops and starts again; None: half-way [steps].
        num_processes: processes of each run [count].
    """

    def with_flags(flags: Sequence[str]) -> None:
        from toolkit.training.verify_resume import verify_resume as verify_it

        config = _recipe(recipe, flags)
        at = cut if cut is not None else max(1, steps // 2)
        _print_lines(verify_it(config, steps=steps, cut=at, num_processes=num_processes))

    return with_flags


def _recipe(source: Path | None, flags: Sequence[str]) -> TrainConfig:
    """The configuration in a recipe file or a run folder (none: the 124M recipe's numbers), with flags applied."""
    if source is None:
        default = TrainConfig()
    elif source.is_dir():
        default = load_recipe(source / "recipe.json")
    elif source.suffix == ".py" and source.exists():
        found = _run_recipe(source).get("CONFIG")
        if not isinstance(found, TrainConfig):
            raise UserError(f"{source} defines no CONFIG = TrainConfig(...); give one of recipes/*.py")
        default = found
    else:
        raise UserError(f"{source} is neither a recipe file nor a run folder; give one of recipes/*.py or a --run.dir")
    return parse(default, flags, always=True)


def _run_recipe(source: Path) -> dict[str, Any]:
    """What a recipe file defines; it is not __main__, so nothing is trained. As a program it finds modules beside it."""
    before = list(sys.path)
    sys.path.insert(0, str(source.resolve().parent))
    try:
        return runpy.run_path(str(source), run_name="recipe")
    except UserError:
        raise
    except SystemExit:
        raise UserError(
            f"{source} ends the program where its numbers are read; its CONFIG has to stand outside of "
            '`if __name__ == "__main__":`, and what trains inside'
        ) from None
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{source} cannot be read as a recipe: {reason}; it has to run by itself and define CONFIG"
        ) from None
    finally:
        sys.path[:] = before


def _split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(a verb's own arguments, recipe flags with their values): a recipe's flags have a dot, --section.field."""
    own: list[str] = []
    recipe: list[str] = []
    target = own
    for argument in arguments:
        if argument.startswith("--"):
            target = recipe if "." in argument.partition("=")[0] else own
        target.append(argument)
    return own, recipe


def tokenizer_train(
    paths: Positional[tuple[str, ...]], /, *, vocab_size: int, out: Path, text_column: str = "text"
) -> None:
    """Trains a byte-level BPE of your own.

    Args:
        paths: files and folders to learn from, as for `toolkit prepare`.
        vocab_size: ids in all, the 256 bytes and end-of-text included [ids].
        out: tokenizer file to write, for `toolkit prepare --tokenizer FILE`.
        text_column: field of a JSONL or Parquet row that holds the text.
    """
    from toolkit.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(paths, vocab_size=vocab_size, out=out, text_column=text_column)
    print(f"{out}: {tokenizer.vocab_size:,} ids, sha256 {tokenizer.sha256[:12]}")


def wandb_sync(run: Positional[Path], /, *, fresh: bool = False, offline_to: Path | None = None) -> None:
    """A run's metrics.jsonl -> Weights & Biases: each step once, in order, whatever crashed in between.

    Args:
        run: run folder.
        fresh: send it as a new W&B run, beside the one that is there.
        offline_to: write it below this folder as an offline run instead of sending it [path].
    """
    from toolkit.training.wandb_sync import wandb_sync as sync

    _print_lines(sync(run, fresh=fresh, offline_to=offline_to))


_VERBS: dict[str, Callable[..., Any]] = {
    "prepare": prepare,
    "adopt": adopt,
    "verify": verify,
    "generate": generate,
    "evaluate": evaluate,
    "export": export,
    "audit": audit,
    "wandb-sync": wandb_sync,
}
# These take a recipe and its flags: they return what is to be done with the flags.
_RECIPE_VERBS: dict[str, Callable[..., Any]] = {"plan": plan, "verify-resume": verify_resume}
_DESCRIPTION = (
    "GPT-2 pretraining: prepare data, look after checkpoints, use models. Training runs are started with `accelerate "
    "launch recipes/...`; `toolkit tokenizer train` makes a tokenizer of one's own."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of the `toolkit` command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with one_line_errors(always=True):
        _refuse_empty(given)
        configure_logging(with_time=False)
        share_cores()
        if given[:1] == ["tokenizer"]:
            tyro.extras.subcommand_cli_from_dict(
                {"train": tokenizer_train},
                prog="toolkit tokenizer",
                description="A tokenizer of one's own.",
                args=given[1:],
            )
            return
        flags: list[str] = []
        if given[:1] and given[0] in _RECIPE_VERBS:
            given, flags = _split_flags(given)
        verbs = _VERBS | _RECIPE_VERBS
        rest = tyro.extras.subcommand_cli_from_dict(verbs, prog="toolkit", description=_DESCRIPTION, args=given)
        if rest is not None:
            rest(flags)


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Raises UserError for an empty argument, which as a path would be the current folder; a prompt may be empty."""
    prompt = 2 if arguments[:1] == ["generate"] else len(arguments)
    for before, word in zip(["toolkit", *arguments], arguments[:prompt], strict=False):
        flag, equals, value = word.partition("=")
        empty = not word or (flag.startswith("--") and equals and not value)
        if empty and "--sampling.prompt" not in (before, flag):
            which = word or f"after {before}"
            raise UserError(
                f"an argument {which} is empty; name a path (is a variable of the shell not set?), or . for this folder"
            )


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


def _device(name: str) -> str:
    import torch

    if name != "auto":
        try:
            torch.ones(1, device=name).item()  # "meta" has no numbers
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"--device {name} is not usable here ({str(error).splitlines()[0]}); use auto or cpu"
            ) from None
        return name
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"


def _model_folder(run: Path) -> Path:
    """The folder with the model: the newest valid checkpoint of a run, a checkpoint, or an exported model."""
    from toolkit.training.checkpoint import find_checkpoint, verify_checkpoint

    if _is_exported(run):
        return run
    found = find_checkpoint(run)
    if found == run and (problems := verify_checkpoint(found)):  # of a run it was checked when it was found
        raise UserError(f"{problems[0]}; use another checkpoint, or name the run for its newest good one")
    return found


def _is_exported(folder: Path) -> bool:
    """True for a model that was exported, or published by others, and is no checkpoint."""
    return (folder / "config.json").exists() and not any((folder / n).exists() for n in ("state.json", "manifest.json"))


def _recipe_of(folder: Path) -> TrainConfig | None:
    return load_recipe(folder / "recipe.json") if (folder / "recipe.json").exists() else None


def _tokenizer_of(folder: Path) -> "Tokenizer":
    """The tokenizer of a checkpoint or an exported model, checked against the one that the checkpoint names."""
    from toolkit.data.tokenizer import load_tokenizer
    from toolkit.training.checkpoint import read_manifest

    if not (folder / "manifest.json").exists():
        return _published_tokenizer(folder)
    own = folder / "tokenizer.json"
    info = read_manifest(folder)["tokenizer"]
    tokenizer = load_tokenizer(str(own) if own.exists() else info["name"])
    if tokenizer.sha256 != info["sha256"]:
        raise UserError(
            f"{folder} was trained with a tokenizer {info['name']!r} of sha256 {info['sha256'][:12]}, but the one here has "
            f"{tokenizer.sha256[:12]}; use the toolkit's version that trained it"
        )
    return tokenizer


def _published_tokenizer(folder: Path) -> "Tokenizer":
    """The tokenizer.json of a model that is no checkpoint of ours, or GPT-2's where nothing there speaks of another."""
    from toolkit.data.tokenizer import is_gpt2_vocabulary, load_tokenizer
    from toolkit.model.huggingface import is_padded, read_config

    own = folder / "tokenizer.json"
    others = [*folder.glob("vocab.*"), *folder.glob("*.model")]  # of slower tokenizers, and of other kinds
    foreign = [path.name for path in others if not is_gpt2_vocabulary(path)]
    if foreign and not own.exists():
        raise UserError(
            f"{folder} has a tokenizer of another form ({foreign[0]}) and no tokenizer.json; write one there with "
            f"transformers: AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    tokenizer = load_tokenizer(str(own) if own.exists() else "gpt2")
    vocab_size = read_config(str(folder)).vocab_size
    if tokenizer.vocab_size != vocab_size and not is_padded(vocab_size, tokenizer.vocab_size):
        found = "no tokenizer.json, which stands for GPT-2 with 50257"
        if own.exists():
            found = f"its tokenizer.json of {tokenizer.vocab_size}"
        raise UserError(
            f"{folder} has a model of {vocab_size} ids and {found}; put the model's own tokenizer.json there"
        )
    return tokenizer
