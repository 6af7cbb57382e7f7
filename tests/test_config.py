"""Settings: every field documented and read, round trips, and one line for each wrong combination."""

import ast
import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from recipes.train_124m import CONFIG as RECIPE_124M
from recipes.train_demo import CONFIG as DEMO
from tests.support import ROOT, change
from toolkit.config import (
    GPT2_SIZES,
    MAY_CHANGE_ON_RESUME,
    CheckpointConfig,
    DataConfig,
    GPT2Config,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    TrainingConfig,
    WandbConfig,
    differences,
    from_dict,
    gpt2_config,
    grad_accum_steps,
    load_recipe,
    to_dict,
)
from toolkit.errors import UserError
from toolkit.recipe import parse
from toolkit.training.plan import plan

FIELDS = [
    (section.name, field.name)
    for section in dataclasses.fields(TrainConfig)
    for field in dataclasses.fields(getattr(TrainConfig(), section.name))
]


@functools.cache
def attributes_read() -> set[str]:
    """Names of all attributes that the library looks at, the settings' own file apart."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "toolkit").rglob("*.py") if path.name != "config.py"]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("recipe", [TrainConfig(), RECIPE_124M, DEMO], ids=["defaults", "124m", "demo"])
def test_a_recipe_survives_its_json(recipe: TrainConfig) -> None:
    assert from_dict(TrainConfig, to_dict(recipe)) == recipe


def test_a_recipe_that_is_no_json_is_refused(tmp_path) -> None:
    for text in (b"[" * 200_000, b"\xff", b"{"):
        (tmp_path / "recipe.json").write_bytes(text)
        with pytest.raises(UserError, match=r"recipe\.json is not valid JSON"):
            load_recipe(tmp_path / "recipe.json")


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("training", {"max_steps": 5.5}, r"^training\.max_steps=5\.5 is not of the expected type; give int$"),
        ("training", {"max_steps": "6"}, r"^training\.max_steps='6' is not of the expected type; give int$"),
        (
            "training",
            {"watchdog_minutes": None},
            r"^training\.watchdog_minutes=None is not of the expected type; give float$",
        ),
        ("model", {"dropout": "0.1"}, r"^model\.dropout='0\.1' is not of the expected type; give float$"),
        ("optimizer", {"beta1": "0.9"}, r"^optimizer\.beta1='0\.9' is not of the expected type; give float$"),
        ("schedule", {"warmup_steps": "1"}, r"^schedule\.warmup_steps='1' is not of the expected type; give int$"),
        ("checkpoint", {"keep_last": "2"}, r"^checkpoint\.keep_last='2' is not of the expected type; give int$"),
        ("data", {"cache_dir": ""}, r"^data\.cache_dir is empty; name a folder, or None$"),
        (
            "training",
            {"precision": "float32"},
            r"^training\.precision='float32' .*; give 'auto' or 'fp32' or 'bf16' or 'fp16'$",
        ),
        ("run", {"dir": Path("runs/a")}, r"^run\.dir=PosixPath\('runs/a'\) is not of the expected type; give str$"),
        ("training", {"max_steps": np.int64(6)}, r"^training\.max_steps=np\.int64\(6\) is not .*; give int$"),
        ("data", {"path": (Path("data"),)}, r"^data\.path=PosixPath\('data'\) is not of the expected type; give str$"),
        (
            "training",
            {"precision": np.array(["bf16", "fp16"])},
            r"^training\.precision=array\(.*\) is not .*; give 'auto' or 'fp32' or 'bf16' or 'fp16'$",
        ),
        (
            "optimizer",
            {"learning_rate": 10**5000},
            r"^optimizer\.learning_rate is a whole number of 16610 bits, which no float holds$",
        ),
        ("data", {"path": "data"}, r"^data\.path='data' is not of the expected type; give tuple\[str, \.\.\.\]$"),
    ],
)
def test_a_recipe_with_a_value_of_another_type_is_refused_before_anything_is_done(
    section: str, values: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        change(RECIPE_124M, **{section: values})


def test_a_recipe_of_another_version_is_refused(tmp_path) -> None:
    values = to_dict(TrainConfig())
    del values["model"]["n_head"]
    values["model"]["num_heads"] = 12
    with pytest.raises(UserError, match=r"unknown keys \['num_heads'\], missing keys \['n_head'\]"):
        from_dict(TrainConfig, values)
    values = to_dict(TrainConfig())
    values["training"]["seed"] = "7"
    with pytest.raises(UserError, match=r"training\.seed='7' is not of the expected type"):
        from_dict(TrainConfig, values)
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        load_recipe(tmp_path / "recipe.json")


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_every_field_is_read_by_the_library_and_explained(section: str, name: str) -> None:
    source = (ROOT / "toolkit" / "config.py").read_text()
    assert re.search(rf"^    {name}: [^#\n]*# \w", source, re.MULTILINE), f"{name} has no comment for --help"
    assert name in attributes_read() or name == "size", (
        f"nobody reads {section}.{name}"
    )  # size is replaced by the shape it stands for


def test_what_may_change_on_resume_exists() -> None:
    assert {f"{section}.{name}" for section, name in FIELDS} >= MAY_CHANGE_ON_RESUME


def test_differences_name_the_field_and_both_values() -> None:
    changed = change(TrainConfig(), training={"seed": 3}, model={"n_layer": 2})
    assert differences(TrainConfig(), changed) == [("model.n_layer", 12, 2), ("training.seed", 1337, 3)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPT2Config(n_embd=100, n_head=12), r"n_embd=100 is not a multiple of model\.n_head=12; use n_embd 96 or 108"),
        (lambda: GPT2Config(n_layer=0), "n_layer=0 must be above 0"),
        (lambda: GPT2Config(n_layer=4097), "n_layer=4097 must be at most 4,096"),
        (lambda: GPT2Config(vocab_size=2**24 + 1), "vocab_size=16777217 must be at most 16,777,216"),
        (lambda: GPT2Config(dropout=1.0), r"dropout=1\.0 must be at least 0 and below 1"),
        (lambda: GPT2Config(size="355M"), r"model\.size=355M means"),
        (lambda: gpt2_config("3M"), "size=3M is not a published GPT-2; use one of 124M"),
        (lambda: TrainingConfig(max_steps=0), "max_steps=0 must be above 0"),
        (lambda: TrainingConfig(seed=-1), "seed=-1 must be at least 0"),
        (lambda: TrainingConfig(watchdog_minutes=1e9), r"watchdog_minutes=1000000000\.0 must be at most 1,000,000"),
        (lambda: DataConfig(path=("",)), r"data\.path is empty; name a folder"),
        (lambda: GPT2Config(init_from=""), r"model\.init_from is empty; name a folder"),
        (lambda: OptimizerConfig(learning_rate=float("nan")), "learning_rate=nan must be above 0"),
        (lambda: OptimizerConfig(beta2=1.0), r"beta2=1\.0 must be"),
        (lambda: ScheduleConfig(stable_steps=5), r"stable_steps=5 has no effect with schedule\.name=cosine; use wsd or 0"),
        (lambda: CheckpointConfig(keep_last=1), "keep_last=1 must be at least 2"),
        (lambda: RunConfig(dir="", resume_from=""), r"run\.dir is empty; name a folder; run\.resume_from is empty"),
        (lambda: WandbConfig(tags=("", "x")), r"wandb\.tags holds ''; a tag has 1 to 64 characters"),
        (lambda: WandbConfig(project="a/b"), r"wandb\.project='a/b' is no project's name; use 1 to 128 characters"),
        (lambda: change(TrainConfig(), data={"sequence_length": 2048}), "sequence_length=2048 is longer than model.context_length=1024"),
        (lambda: change(TrainConfig(), training={"tokens_per_step": 500_000}), "use 499712 or 500736"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_rule(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_all_problems_of_a_section_are_told_at_once() -> None:
    with pytest.raises(UserError, match=r"max_steps=0 .*; training\.eval_every=-1 "):
        TrainingConfig(max_steps=0, eval_every=-1)


def test_accumulation_follows_and_what_does_not_divide_is_refused_with_the_nearest() -> None:
    config = TrainConfig()
    assert grad_accum_steps(config, micro_batch_size=8, num_processes=1) == 64
    assert grad_accum_steps(config, micro_batch_size=8, num_processes=8) == 8
    with pytest.raises(UserError) as refusal:
        grad_accum_steps(config, micro_batch_size=12, num_processes=1)
    assert str(refusal.value) == (
        "training.tokens_per_step=524288 is not a multiple of micro_batch_size * sequence_length * num_processes = "
        "12 * 1024 * 1 = 12288; use tokens_per_step 516096 or 528384, or micro_batch_size 8 or 16"
    )
    with pytest.raises(UserError, match="use tokens_per_step 522240 or 525312"):
        grad_accum_steps(config, micro_batch_size=1, num_processes=3)
    huge = change(config, training={"tokens_per_step": 3 * 1024 * 10**9})  # answered without trying every number
    with pytest.raises(UserError, match=r"or micro_batch_size 6 or 8$"):
        grad_accum_steps(huge, micro_batch_size=7, num_processes=1)


def test_published_sizes_have_the_published_numbers_of_parameters() -> None:
    from toolkit.model.gpt2 import num_parameters

    counts = {size: num_parameters(gpt2_config(size)) for size in GPT2_SIZES}
    assert counts == {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}


def test_flags_reach_their_fields() -> None:
    arguments = "--training.max-steps 7 --data.path a=0.5 b=0.5 --training.micro-batch-size auto --wandb.mode offline"
    arguments += " --training.deterministic true --training.eval-every None"
    config = parse(RECIPE_124M, arguments.split())
    assert config.training.max_steps == 7
    assert config.data.path == ("a=0.5", "b=0.5")
    assert config.training.micro_batch_size == "auto"
    assert config.training.deterministic is True
    assert config.training.eval_every is None
    assert config.wandb.mode == "offline"


def test_a_size_gives_the_shape_that_other_flags_start_from() -> None:
    assert parse(RECIPE_124M, ["--model.size", "355M"]).model == gpt2_config("355M")
    mixed = parse(RECIPE_124M, ["--model.n-layer", "3", "--model.size=774M"])
    assert mixed.model == gpt2_config("774M", n_layer=3)


def test_weights_give_the_shape_that_other_flags_start_from(tmp_path: Path, capsys) -> None:
    theirs = {"model_type": "gpt2", "n_layer": 3, "n_head": 2, "n_embd": 6, "n_positions": 32, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    given = ["--model.init-from", str(tmp_path), "--run.dir", str(tmp_path / "run")]
    config = parse(RECIPE_124M, [*given, "--data.sequence-length", "32", "--model.dropout", "0.1"])
    shape = {"n_layer": 3, "n_head": 2, "n_embd": 6, "context_length": 32, "vocab_size": 300, "dropout": 0.1}
    assert config.model == GPT2Config(**shape, init_from=str(tmp_path))
    with pytest.raises(SystemExit):
        parse(RECIPE_124M, given)
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "sequence_length=1024 is longer than model.context_length=32; lower --data.sequence-length" in printed
    assert "raise --model.context-length" not in printed


def test_a_run_that_began_with_weights_needs_them_no_more(tmp_path: Path) -> None:
    """Its recipe knows their shape, and its checkpoints have what became of them."""
    given = ["--model.init-from", str(tmp_path / "gone"), "--run.dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"there is no folder .*gone"):
        parse(RECIPE_124M, given)
    recorded = gpt2_config("355M", init_from=str(tmp_path / "gone"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(to_dict(dataclasses.replace(RECIPE_124M, model=recorded))))
    assert parse(RECIPE_124M, given).model == recorded
    with pytest.raises(UserError, match=r"there is no folder .*other"):
        parse(RECIPE_124M, ["--model.init-from", str(tmp_path / "other"), *given[2:]])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.n-layers", "3"], ["--model.n-layer"]),
        (["--training.max-steps", "many"], ["--training.max-steps", "many"]),
        (["--training.precision", "fp8"], ["fp8", "bf16"]),
        (["--data.sequence-length", "2048"], ["2048", "context_length=1024", "--model.context-length"]),
        (["--model.size", "1B"], ["1B", "355M"]),
    ],
)
def test_a_wrong_flag_is_answered_in_a_box(arguments: list[str], words: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(RECIPE_124M, arguments)
    assert stop.value.code == 2
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert all(word in printed for word in words), printed


def test_the_recipe_has_the_numbers_it_states() -> None:
    training, schedule = RECIPE_124M.training, RECIPE_124M.schedule
    assert training.tokens_per_step * training.max_steps == pytest.approx(10e9, rel=1e-4)
    assert schedule.warmup_steps + schedule.decay_steps == training.max_steps
    assert plan(RECIPE_124M, "rtx3060").micro_batch_size == training.micro_batch_size
