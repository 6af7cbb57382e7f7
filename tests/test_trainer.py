"""The run in one process: what it leaves, what it repeats to the bit, and what it does when numbers go wrong."""

import dataclasses
import json
import logging
import math
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support import change, rows, write_corpus
from toolkit import cli
from toolkit.config import TrainConfig
from toolkit.data.loader import open_data, training_loader
from toolkit.data.prepare import prepare
from toolkit.data.shards import open_shards
from toolkit.errors import UserError
from toolkit.model.gpt2 import GPT2, load_canonical
from toolkit.training import trainer as trainer_module
from toolkit.training.audit import audit
from toolkit.training.seeds import mixed_seed
from toolkit.training.supervision import StopRequests
from toolkit.training.trainer import StepResult, Trainer

Fit = Callable[[TrainConfig], Path]


def state_of(run: Path, step: int) -> dict[str, Tensor]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def assert_equal_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def run_with(model_class: type[GPT2], config: TrainConfig) -> Trainer:
    """Trains with a model of one's own and returns the closed trainer."""
    AcceleratorState._reset_state(True)
    trainer = Trainer(config, model=model_class(config.model, seed=config.training.seed))
    trainer.fit()
    return trainer


def test_a_run_trains_and_leaves_everything_that_it_should(fit: Fit, tiny: TrainConfig) -> None:
    run = fit(tiny)
    metrics = rows(run)
    training = [row for row in metrics if "loss/train" in row]
    evaluations = [row for row in metrics if "loss/val" in row]
    assert [row["step"] for row in training] == list(range(1, 9))
    assert [row["tokens"] for row in training] == [256 * step for step in range(1, 9)]
    assert abs(training[0]["loss/train"] - math.log(257)) < 0.3
    assert training[-1]["loss/train"] < training[0]["loss/train"] - 1.0
    assert [row["step"] for row in evaluations] == [4, 8]
    assert evaluations[-1]["loss/val"] < evaluations[0]["loss/val"]
    assert training[0]["learning_rate"] == pytest.approx(0.5e-2)
    every_key = set().union(*(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()))
    assert {
        "loss/train", "loss/val", "bits_per_byte/val", "learning_rate", "optimizer/grad_norm", "optimizer/skipped_steps",
        "throughput/tokens_per_second", "memory/peak_gib", "time/step_seconds", "step", "tokens",
    } <= every_key  # fmt: skip
    assert "throughput/mfu" not in every_key  # a CPU's peak is not known, and no number is better than a wrong one
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-{s:08d}" for s in (2, 4, 6, 8)]
    names = {path.name for path in (run / "checkpoints" / "step-00000008").iterdir()}
    assert names >= {"manifest.json", "config.json", "model.safetensors", "optimizer.safetensors", "state.json"}
    assert [row["step"] for row in rows(run, "samples")] == [4, 8]
    assert all(row["text"].startswith("the ") for row in rows(run, "samples"))
    ledger = rows(run, "ledger")
    assert [(row["first_sample"], row["end_sample"]) for row in ledger] == [(8 * s, 8 * s + 8) for s in range(8)]


def test_bits_per_byte_of_bytes_follows_from_the_loss(fit: Fit, tiny: TrainConfig, data_dir: Path) -> None:
    run = fit(change(tiny, training={"max_steps": 1}))
    row = next(row for row in rows(run) if "loss/val" in row)
    targets = open_shards(data_dir, "val")[0].read(1, 1024)  # 32 windows of 32
    num_bytes = int((targets != 256).sum())  # end-of-text counts as no byte
    assert num_bytes < 1024
    assert row["bits_per_byte/val"] == pytest.approx(row["loss/val"] * 1024 / num_bytes / math.log(2), rel=1e-12)


@pytest.mark.parametrize(
    ("precision", "compiled", "cuts"),
    [("fp32", "off", (1, 4, 7)), ("bf16", "off", (3,)), ("fp32", "on", (5,))],
    ids=["fp32", "bf16", "compiled"],
)
def test_resume_at_any_step_repeats_the_uninterrupted_run_to_the_bit(
    fit: Fit,
    tiny: TrainConfig,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    precision: str,
    compiled: str,
    cuts: tuple[int, ...],
) -> None:
    # Few tokens in tiny shards: the 8 steps cross several shards and two ends of an epoch.
    few = tmp_path / "few"
    prepare(
        [str(write_corpus(tmp_path / "text", files=2, lines=12))],
        out=few,
        tokenizer="bytes",
        workers=1,
        shard_tokens=400,
        val_fraction=0.3,
        progress=False,
    )
    config = change(tiny, data={"path": (str(few),)}, model={"dropout": 0.1}, training={"precision": precision})
    config = change(config, training={"compile": compiled})
    config = change(config, training={"eval_every": None, "sample_every": None, "checkpoint_every": 1})
    whole = fit(config)
    assert "has been read 2 times and is repeated" in capfd.readouterr().err
    for cut in cuts:
        parts = change(config, run={"dir": str(tmp_path / f"parts-{cut}")})
        fit(change(parts, training={"max_steps": cut}))
        fit(parts)
        run = Path(parts.run.dir)
        train = [row for row in rows(run) if "loss/train" in row]
        assert train == [row for row in rows(whole) if "loss/train" in row]
        assert rows(run, "ledger") == rows(whole, "ledger")
        assert_equal_bits(state_of(run, 8), state_of(whole, 8))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_micro_batch_size_changes_neither_samples_nor_results(
    fit: Fit, tiny: TrainConfig, tmp_path: Path, optimizer: str
) -> None:
    config = change(tiny, optimizer={"name": optimizer, "muon_learning_rate": 0.1})
    one = fit(config)
    other = fit(change(config, run={"dir": str(tmp_path / "other")}, training={"micro_batch_size": 8}))
    assert rows(one, "ledger") == rows(other, "ledger")
    for a, b in zip(rows(one), rows(other), strict=True):
        for name in a:
            if name.startswith("loss/"):
                assert b[name] == pytest.approx(a[name], rel=1e-5)


def test_a_finished_run_says_so_and_changes_nothing(
    fit: Fit, tiny: TrainConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    run = fit(tiny)
    before = {path: path.read_bytes() for path in run.glob("*.jsonl")}
    fit(tiny)
    assert "finished at step 8 already; raise --training.max-steps" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in run.glob("*.jsonl")} == before


def test_an_extended_run_follows_the_curve_of_a_longer_one(fit: Fit, tiny: TrainConfig, tmp_path: Path) -> None:
    extended = change(tiny, run={"dir": str(tmp_path / "extended")})
    fit(change(extended, training={"max_steps": 5}))
    fit(extended)
    long = fit(tiny)
    assert_equal_bits(state_of(Path(extended.run.dir), 8), state_of(long, 8))


def test_other_settings_are_refused_with_a_table(fit: Fit, tiny: TrainConfig) -> None:
    fit(change(tiny, training={"max_steps": 2}))
    with pytest.raises(UserError) as refusal:
        fit(change(tiny, optimizer={"learning_rate": 5e-3}, schedule={"name": "linear"}))
    text = str(refusal.value)
    assert "optimizer.learning_rate" in text
    assert "0.01" in text
    assert "0.005" in text
    assert "schedule.name" in text
    assert "training.max_steps" not in text


def test_a_loop_of_ones_own_gives_the_losses_of_fit(fit: Fit, tiny: TrainConfig, tmp_path: Path) -> None:
    run = fit(tiny)
    losses = []
    AcceleratorState._reset_state(True)
    with Trainer(change(tiny, run={"dir": str(tmp_path / "own")})) as trainer:
        trainer.resume()
        while trainer.step < trainer.config.training.max_steps:
            result = trainer.train_step()
            trainer.log(result)
            losses.append(result.loss)
            if trainer.due(trainer.config.training.eval_every):
                trainer.evaluate()
        trainer.save()
        trainer.finish()
    assert losses == [row["loss/train"] for row in rows(run) if "loss/train" in row]


def test_a_new_run_starts_from_a_checkpoint_of_another(fit: Fit, tiny: TrainConfig, tmp_path: Path) -> None:
    run = fit(tiny)
    checkpoint = run / "checkpoints" / "step-00000004"
    branch = change(
        tiny,
        run={"dir": str(tmp_path / "branch"), "resume_from": str(checkpoint)},
        schedule={"name": "linear", "decay_steps": 4},
    )
    fit(branch)
    branched = [row for row in rows(Path(branch.run.dir)) if "loss/train" in row]
    original = [row for row in rows(run) if "loss/train" in row]
    assert [row["step"] for row in branched] == [5, 6, 7, 8]
    assert branched[0]["loss/train"] == original[4]["loss/train"]
    assert branched[-1]["learning_rate"] < original[-1]["learning_rate"]
    assert rows(Path(branch.run.dir), "ledger") == rows(run, "ledger")[4:]


def test_a_branch_stays_one(fit: Fit, tiny: TrainConfig, tmp_path: Path) -> None:
    """The next start need not name the checkpoint again, and may name no other."""
    run = fit(tiny)
    checkpoint = run / "checkpoints" / "step-00000004"
    branch = change(
        tiny,
        run={"dir": str(tmp_path / "branch"), "resume_from": str(checkpoint)},
        training={"checkpoint_every": None, "max_steps": 6},
    )
    with Trainer(branch) as trainer:  # and ends before it has a checkpoint
        trainer.resume()
        trainer.log(trainer.train_step())
    AcceleratorState._reset_state(True)
    unnamed = change(branch, run={"dir": branch.run.dir, "resume_from": None})
    fit(unnamed)
    assert [row["step"] for row in rows(Path(branch.run.dir)) if "loss/train" in row] == [5, 6]
    assert "steps 5 to 6" in list(audit(Path(branch.run.dir)))[-1]
    AcceleratorState._reset_state(True)
    other = change(branch, run={"dir": branch.run.dir, "resume_from": str(run / "checkpoints" / "step-00000008")})
    with pytest.raises(UserError, match=r"these may not change between starts"):
        Trainer(other)


def test_a_refused_first_start_leaves_the_folder_free(fit: Fit, tiny: TrainConfig, tmp_path: Path) -> None:
    run = fit(tiny)
    branch = tmp_path / "branch"

    def start(resume_from: Path, **sections: Any) -> None:
        AcceleratorState._reset_state(True)
        Trainer(change(tiny, run={"dir": str(branch), "resume_from": str(resume_from)}, **sections)).fit()

    four, eight = run / "checkpoints" / "step-00000004", run / "checkpoints" / "step-00000008"
    for resume_from, sections, said in (
        (run / "checkpoints" / "step-0000004", {}, "does not exist"),
        (four, {"training": {"tokens_per_step": 512}}, "counts its steps in"),
        (eight, {}, r"step-00000008 is at step 8, and training\.max_steps=8 leaves nothing to do; raise --training"),
    ):
        with pytest.raises(UserError, match=said):
            start(resume_from, **sections)
        assert [path.name for path in branch.iterdir()] == ["run.lock"]
    AcceleratorState._reset_state(True)
    with pytest.raises(UserError, match=r"config\.json is missing"):
        Trainer(change(tiny, run={"dir": str(branch)}, model={"init_from": str(tmp_path)}))
    assert [path.name for path in branch.iterdir()] == ["run.lock"]
    start(four)
    assert [row["step"] for row in rows(branch) if "loss/train" in row] == [5, 6, 7, 8]


def test_a_start_that_is_refused_for_its_data_changes_nothing(
    fit: Fit, tiny: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run = fit(tiny)
    prepare([str(write_corpus(tmp_path / "text", seed=9))], out=tmp_path / "other", tokenizer="bytes", val_fraction=0.2)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.lock"}
    caplog.clear()
    with pytest.raises(UserError, match="was trained on data with fingerprint"):
        fit(change(tiny, data={"path": (str(tmp_path / "other"),)}, training={"max_steps": 10}))
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.lock"}
    assert not any("changed since" in line for line in caplog.messages)
    assert "once per epoch" in list(audit(run))[-1]


def test_damaged_records_of_a_finished_run_are_rebuilt(fit: Fit, tiny: TrainConfig) -> None:
    run = fit(tiny)
    for name in ("run.json", "recipe.json"):
        data = bytearray((run / name).read_bytes())
        data[20] ^= 1
        (run / name).write_bytes(data)
    fit(tiny)
    before = json.loads((run / "run.json").read_text())["id"]
    assert "once per epoch" in list(audit(run))[-1]
    assert {path.name for path in run.glob("*.damaged")} == {"run.json.damaged", "recipe.json.damaged"}
    fit(tiny)
    assert json.loads((run / "run.json").read_text())["id"] == before
    assert len(list(run.glob("*.damaged*"))) == 2


def test_other_data_before_the_first_checkpoint_are_told(
    fit: Fit, tiny: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    data = tmp_path / "data"
    config = change(tiny, data={"path": (str(data),)}, training={"checkpoint_every": None})
    for seed in (8, 9):
        shutil.rmtree(data, ignore_errors=True)
        prepare([str(write_corpus(tmp_path / str(seed), seed=seed))], out=data, tokenizer="bytes", val_fraction=0.2)
        if seed == 8:
            with pytest.raises(Cut):
                fit_until(config, 2, monkeypatch)
        else:
            fit(config)
    assert [line for line in caplog.messages if "the data have changed since the start before (fingerprint" in line]


def test_the_best_checkpoint_stays_the_best_after_a_stop_before_its_evaluation(
    fit: Fit, tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rates that only harm, the first evaluation is the best; it is cut short and made up by the next start."""
    config = change(
        tiny,
        training={"eval_every": 2, "checkpoint_every": 2, "sample_every": None},
        optimizer={"learning_rate": 3.0},
        schedule={"warmup_steps": 100},
        checkpoint={"keep_last": 2, "keep_best": True},
    )
    whole = fit(change(config, run={"dir": str(tmp_path / "whole")}))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_anyone_wants_to_stop", lambda trainer: trainer.step == 2)
        parts = fit(config)
    assert json.loads((parts / "status.json").read_text())["status"] == "preempted"
    fit(config)
    names = ["step-00000002", "step-00000006", "step-00000008"]
    for run in (whole, parts):
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names
    for name in names:
        state = [json.loads((run / "checkpoints" / name / "state.json").read_text()) for run in (whole, parts)]
        assert state[0] == state[1]


def test_a_loop_that_ends_without_a_checkpoint_promises_none(
    tiny: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for save_at, goes_on in ((None, "begins anew"), (1, "continues from step 1"), (2, "continues from there")):
        AcceleratorState._reset_state(True)
        with Trainer(change(tiny, run={"dir": f"{tiny.run.dir}-{save_at}"})) as trainer:
            trainer.resume()
            for _ in range(2):
                trainer.train_step()
                if trainer.step == save_at:
                    trainer.save()
            trainer.finish(stopped=True)
        assert caplog.messages[-1] == f"stopped at step 2 (the loop ended early); the same command {goes_on}"


def test_what_the_rendezvous_says_is_not_taken_for_accelerates_word(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise UserError("process 0 of 2 waited")

    monkeypatch.setattr(trainer_module, "Accelerator", refuse)
    with pytest.raises(UserError, match=r"^process 0 of 2 waited$"):
        Trainer(tiny)


def test_a_branch_goes_on_in_the_counts_of_its_parent(fit: Fit, tiny: TrainConfig, tmp_path: Path) -> None:
    checkpoint = fit(tiny) / "checkpoints" / "step-00000004"
    for section, name in (("training", "tokens_per_step"), ("data", "sequence_length")):
        old = getattr(getattr(tiny, section), name)
        run = {"dir": str(tmp_path / name), "resume_from": str(checkpoint)}
        AcceleratorState._reset_state(True)
        with pytest.raises(
            UserError, match=f"counts its steps in {section}.{name}={old} and this run would go on with"
        ):
            Trainer(change(tiny, run=run, **{section: {name: old // 2}}))


def test_a_branch_with_another_order_says_so(
    fit: Fit, tiny: TrainConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = fit(tiny) / "checkpoints" / "step-00000004"
    run = {"dir": str(tmp_path / "branch"), "resume_from": str(checkpoint)}
    fit(change(tiny, run=run, training={"seed": 5}))
    assert "goes on with 5: another order, in which windows of that epoch come again" in capfd.readouterr().err


class Extra(GPT2):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.extra = nn.Parameter(torch.ones(3))


class Buffered(GPT2):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.register_buffer("count", torch.zeros(()))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda config: Extra(config, seed=1),
            r"Extra is not the GPT-2 of model\.\* that checkpoints hold: it has extra;",
        ),
        (
            lambda config: GPT2(config, seed=1).bfloat16(),
            r"GPT2 has wte\.weight in torch\.bfloat16, but weights are trained in torch\.float32, .*model\.float\(\)$",
        ),
        (
            lambda config: GPT2(dataclasses.replace(config, n_head=4), seed=1),
            r"GPT2 has n_head=4 and the recipe model\.n_head=2; make it from",
        ),
        (lambda config: Buffered(config, seed=1), "it has count; .*register buffers with persistent=False"),
        (lambda config: nn.Linear(2, 2), r"it has no GPT2Config as its config, has weight, has bias, and \d+ more"),
        (lambda config: GPT2(dataclasses.replace(config, n_layer=1), seed=1), r"it lacks h\.1\.ln_1\.weight"),
        (
            lambda config: GPT2(dataclasses.replace(config, vocab_size=300), seed=1),
            r"it has wte\.weight of shape \(300, ",
        ),
    ],
    ids=["parameter", "dtype", "heads", "buffer", "module", "layers", "vocabulary"],
)
def test_a_model_that_checkpoints_cannot_hold_is_refused_before_the_first_step(
    tiny: TrainConfig, make: Callable[[Any], nn.Module], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        Trainer(tiny, model=make(tiny.model))


@pytest.mark.parametrize("kept", ["left out", "frozen"])
def test_what_an_optimizer_of_ones_own_leaves_alone_stays_and_resumes(
    tiny: TrainConfig, tmp_path: Path, kept: str
) -> None:
    """Its gradient takes no part in the norm, and no next step has a remainder of it."""

    def start(run: str, max_steps: int) -> Path:
        AcceleratorState._reset_state(True)
        config = change(
            tiny, run={"dir": str(tmp_path / run)}, training={"max_steps": max_steps, "checkpoint_every": 2}
        )
        model = GPT2(config.model, seed=1)
        model.wpe.weight.requires_grad_(kept == "left out")
        parameters = [p for p in model.parameters() if kept == "frozen" or p is not model.wpe.weight]
        Trainer(config, model=model, optimizer=torch.optim.AdamW(parameters, lr=1e-2)).fit()
        return tmp_path / run

    whole = start("whole", 8)
    start("parts", 4)
    parts = start("parts", 8)
    assert_equal_bits(state_of(whole, 8), state_of(parts, 8))
    norms = [[row["optimizer/grad_norm"] for row in rows(run) if "loss/train" in row] for run in (whole, parts)]
    assert norms[0] == norms[1]
    assert torch.equal(state_of(whole, 8)["wpe.weight"], GPT2(tiny.model, seed=1).wpe.weight)


def test_optimizers_that_cannot_step_here_are_refused(tiny: TrainConfig) -> None:
    for make, said in (
        (lambda p: torch.optim.LBFGS(p), "LBFGS evaluates the loss within its step"),
        (lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)), "Adam has a tensor as its learning rate"),
        (lambda p: torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), "SGD has parameters that GPT2 does not have"),
    ):
        AcceleratorState._reset_state(True)
        model = GPT2(tiny.model, seed=1)
        with pytest.raises(UserError, match=said):
            Trainer(tiny, model=model, optimizer=make(model.parameters()))  # type: ignore[no-untyped-call]


def test_an_optimizer_whose_state_no_checkpoint_can_hold_is_refused_after_one_step(tiny: TrainConfig) -> None:
    """Before that step it has no state; the first checkpoint, where its state cannot be saved either, may be hours away."""
    model = GPT2(tiny.model, seed=1)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    with pytest.raises(UserError, match=r"Adafactor keeps 'row_var' for wte\.weight, which is neither"):
        Trainer(tiny, model=model, optimizer=optimizer).fit()
    assert [row["step"] for row in rows(Path(tiny.run.dir))] == [1]


class Returns(GPT2):
    """A GPT-2 whose training loss has been made something else."""

    def __init__(self, config: Any, change: Callable[[Tensor], Any]) -> None:
        super().__init__(config, seed=1)
        self.change = change

    def forward(self, input_ids: Tensor, targets: Tensor) -> Any:
        return self.change(super().forward(input_ids, targets))


@pytest.mark.parametrize(
    ("change_loss", "said"),
    [
        (lambda loss: loss.expand(3), r"Returns returns a tensor of shape \(3,\) for \(input_ids, targets\); return"),
        (lambda loss: loss.detach(), "Returns returns a tensor without a gradient for"),
        (lambda loss: (loss, {}), "Returns returns tuple for"),
        (lambda loss: None, "Returns returns NoneType for"),
    ],
    ids=["not a scalar", "no gradient", "tuple", "nothing"],
)
def test_a_model_that_returns_no_loss_is_refused(
    tiny: TrainConfig, change_loss: Callable[[Tensor], Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        Trainer(tiny, model=Returns(tiny.model, change_loss)).fit()


def test_a_model_without_anything_to_train_is_refused(tiny: TrainConfig) -> None:
    with pytest.raises(UserError, match="every parameter of GPT2 is frozen; nothing would be trained"):
        Trainer(tiny, model=GPT2(tiny.model, seed=1).requires_grad_(False))


def test_verbs_before_resume_are_refused_and_leave_the_run_as_it_was(fit: Fit, tiny: TrainConfig) -> None:
    run = fit(tiny)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    AcceleratorState._reset_state(True)
    with Trainer(change(tiny, training={"max_steps": 20})) as trainer:
        for verb in (trainer.train_step, trainer.evaluate, trainer.sample, trainer.save, trainer.finish):
            with pytest.raises(UserError, match=r"call the trainer's resume\(\) before its other verbs"):
                verb()
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {path.name for path in after if after[path] != before[path]} <= {
        "run.json",
        "recipe.json",
        "run.lock",
    }  # of this start
    assert after.keys() == before.keys()


def test_a_loop_that_ends_early_is_told_what_was_saved(tiny: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with Trainer(tiny) as trainer:
        trainer.resume()
        trainer.train_step()
        trainer.finish()
        assert caplog.messages[-1] == "finished at step 1; nothing was saved"
        trainer.save()
        trainer.finish()
        assert caplog.messages[-1].endswith(
            "finished at step 1; weights: " + tiny.run.dir + "/checkpoints/step-00000001"
        )
        trainer.train_step()
        trainer.finish()
        assert caplog.messages[-1] == "finished at step 2; nothing was saved since step 1"
        trainer.finish(stopped=True)
        assert caplog.messages[-1].startswith("stopped at step 2 (the loop ended early)")


def test_results_that_are_logged_later_keep_their_step(tiny: TrainConfig) -> None:
    with Trainer(change(tiny, training={"max_steps": 3})) as trainer:
        trainer.resume()
        for result in [trainer.train_step() for _ in range(3)]:
            trainer.log(result)
        trainer.save()
        trainer.finish()
    found = [(row["step"], row["tokens"]) for row in rows(Path(tiny.run.dir))]
    assert found == [(step, step * tiny.training.tokens_per_step) for step in (1, 2, 3)]
    assert "once per epoch" in list(audit(Path(tiny.run.dir)))[-1]


def test_a_run_in_a_thread_trains_and_lets_go_of_its_folder(
    tiny: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    thread = threading.Thread(target=lambda: Trainer(tiny).fit())
    thread.start()
    thread.join()
    assert json.loads((Path(tiny.run.dir) / "status.json").read_text())["status"] == "finished"
    assert any("not the program's main thread" in line for line in caplog.messages)
    Trainer(tiny).close()  # nobody holds the folder


def test_signals_are_as_before_after_a_trainer_that_resumed_twice(tiny: TrainConfig) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer = Trainer(change(tiny, training={"max_steps": 2}))
    trainer.resume()
    assert signal.getsignal(signal.SIGINT) != before[0]
    trainer.fit()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_another_precision_in_one_process_is_refused_in_one_line(fit: Fit, tiny: TrainConfig, tmp_path: Path) -> None:
    fit(change(tiny, training={"max_steps": 1}))
    with pytest.raises(
        UserError, match=r"was set up with another precision than bf16 in this process already, .*start another process"
    ):
        Trainer(change(tiny, run={"dir": str(tmp_path / "other")}, training={"precision": "bf16"}))


def test_a_ninth_compiled_run_of_one_process_is_compiled_too(tiny: TrainConfig, tmp_path: Path) -> None:
    """Torch counts the programs of a class in a process, and beyond its limit leaves the rest uncompiled."""
    limit = {"recompile_limit": 1, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limit):
        for n_embd in (32, 16):
            training = {"max_steps": 1, "compile": "on", "checkpoint_every": None}
            config = change(tiny, run={"dir": str(tmp_path / str(n_embd))}, model={"n_embd": n_embd}, training=training)
            with Trainer(config) as trainer:
                trainer.resume()
                assert math.isfinite(trainer.train_step().loss)


def test_a_failed_run_knows_of_the_checkpoint_that_was_saved_meanwhile(
    fit: Fit, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else, with its checkpoints lost, it would begin anew without a word."""
    config = change(tiny, training={"checkpoint_every": 2})
    monkeypatch.setenv("TOOLKIT_FAILPOINTS", "ledger.append=fail@3")
    with pytest.raises((UserError, OSError)):
        fit(config)
    monkeypatch.delenv("TOOLKIT_FAILPOINTS")
    run = Path(config.run.dir)
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert json.loads((run / "status.json").read_text())["saved_step"] == int(saved[-1].removeprefix("step-"))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="has had a checkpoint of step"):
        fit(config)


def test_a_folder_that_took_the_place_of_the_run_s_is_left_alone(tiny: TrainConfig, tmp_path: Path) -> None:
    run = Path(tiny.run.dir)
    with pytest.raises(UserError), Trainer(change(tiny, training={"checkpoint_every": None})) as trainer:  # noqa: PT012
        trainer.resume()
        trainer.train_step()
        run.rename(tmp_path / "moved")
        shutil.copytree(tmp_path / "moved", run)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        trainer.save()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


class NotFinite(GPT2):
    """A GPT-2 whose loss is NaN in some steps."""

    bad_calls: range = range(0)
    calls = 0

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        loss = super().forward(input_ids, targets)
        type(self).calls += 1
        return self.spoilt(loss) if type(self).calls - 1 in self.bad_calls else loss

    def spoilt(self, loss: Tensor) -> Tensor:
        return loss * float("nan")


def rows_with_step_three_skipped(model_class: type[NotFinite], config: TrainConfig) -> list[dict[str, Any]]:
    """The training's rows of a run whose third step left the weights as they were, to the bit."""
    config = change(config, training={"checkpoint_every": 1, "eval_every": None})
    run_with(model_class, config)
    run = Path(config.run.dir)
    assert_equal_bits(state_of(run, 3), state_of(run, 2))
    training = [row for row in rows(run) if "loss/train" in row]
    assert [row["optimizer/skipped_steps"] for row in training] == [0, 0, 1, 1, 1, 1, 1, 1]
    return training


def test_a_step_without_a_finite_gradient_leaves_the_weights_to_the_bit(tiny: TrainConfig) -> None:
    class BadInStepThree(NotFinite):
        bad_calls = range(9, 10)  # the second of step 3's four micro-batches

    training = rows_with_step_three_skipped(BadInStepThree, tiny)
    assert training[2]["loss/train"] == "NaN"
    assert training[3]["learning_rate"] != training[2]["learning_rate"]
    assert rows(Path(tiny.run.dir), "ledger")[3]["first_sample"] == 24  # data goes on


def test_a_finite_loss_with_a_gradient_that_is_not_leaves_the_weights_too(tiny: TrainConfig) -> None:
    class Steep(NotFinite):
        bad_calls = range(9, 10)

        def spoilt(self, loss: Tensor) -> Tensor:
            return loss + (loss - loss.detach()).abs().sqrt()  # adds nothing, and a slope that is no number

    training = rows_with_step_three_skipped(Steep, tiny)
    assert training[2]["loss/train"] < 6
    assert training[2]["optimizer/grad_norm"] == "NaN"


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_a_gradient_above_the_limit_is_scaled_down_to_it_and_one_below_is_left(tiny: TrainConfig, share: float) -> None:
    """A step of plain gradient descent moves the weights by the rate times the clipped gradient."""
    measured = one_step_of_descent(tiny, max_grad_norm=1e9)
    limit = share * measured.grad_norm
    limited = one_step_of_descent(change(tiny, run={"dir": f"{tiny.run.dir}-limited"}), max_grad_norm=limit)
    assert limited.grad_norm == measured.grad_norm
    assert measured.moved == pytest.approx(measured.learning_rate * measured.grad_norm, rel=1e-5)
    assert limited.moved == pytest.approx(measured.moved * min(share, 1.0), rel=1e-5)


@dataclasses.dataclass
class Descent:
    """What a step did: the gradient's norm before clipping, the rate, and the norm of the weights' change."""

    grad_norm: float
    learning_rate: float
    moved: float


def one_step_of_descent(config: TrainConfig, *, max_grad_norm: float) -> Descent:
    AcceleratorState._reset_state(True)
    model = GPT2(config.model, seed=config.training.seed)
    config = change(config, optimizer={"max_grad_norm": max_grad_norm})
    with Trainer(config, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0)) as trainer:
        trainer.resume()
        before = [parameter.detach().double() for parameter in model.parameters()]
        result = trainer.train_step()
        moves = [(parameter - old).norm() for parameter, old in zip(model.parameters(), before, strict=True)]
        return Descent(result.grad_norm, result.learning_rate, torch.stack(moves).norm().item())


def test_every_micro_batch_draws_random_numbers_of_its_own_and_a_resumed_run_the_same(tiny: TrainConfig) -> None:
    drawn: list[float] = []

    class Draws(GPT2):
        def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
            if self.training:
                drawn.append(torch.rand(()).item())
            return super().forward(input_ids, targets)

    run_with(Draws, change(tiny, run={"dir": tiny.run.dir + "-whole"}))
    whole, drawn[:] = list(drawn), []
    assert len(set(whole)) == 8 * 4  # steps, micro-batches
    run_with(Draws, change(tiny, training={"max_steps": 3}))
    run_with(Draws, tiny)
    assert drawn == whole


def test_too_many_steps_without_a_finite_gradient_stop_the_run(tiny: TrainConfig) -> None:
    class BadFromStepFour(NotFinite):
        bad_calls = range(12, 1000)

    config = change(tiny, training={"max_skipped_in_a_row": 3, "eval_every": None})
    with pytest.raises(UserError, match="3 steps in a row had no finite gradient"):
        run_with(BadFromStepFour, config)
    run = Path(config.run.dir)
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "failed"
    assert "no finite gradient" in status["reason"]
    assert all(torch.isfinite(tensor).all() for tensor in state_of(run, 2).values())


def test_a_loss_scale_that_collapses_stops_the_run(tiny: TrainConfig) -> None:
    class Overflows(NotFinite):
        bad_calls = range(8, 1000)  # from step 3 on

    # fp16 itself is refused on a CPU, so the scaler is put where Accelerate keeps it on CUDA.
    AcceleratorState._reset_state(True)
    config = change(tiny, training={"checkpoint_every": 1, "min_loss_scale": 2.0, "eval_every": None})
    trainer = Trainer(config, model=Overflows(config.model, seed=1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    trainer.accelerator.scaler = scaler
    trainer.optimizer = AcceleratedOptimizer(trainer.raw_optimizer, device_placement=False, scaler=scaler)
    with pytest.raises(UserError, match=r"loss scale fell to 1\.0, below training\.min_loss_scale=2\.0"):
        trainer.fit()
    run = Path(config.run.dir)
    training = [row for row in rows(run) if "loss/train" in row]
    assert [row["optimizer/loss_scale"] for row in training] == [8.0, 8.0, 8.0, 4.0, 2.0, 1.0]
    assert [row["optimizer/skipped_steps"] for row in training] == [0, 0, 1, 2, 3, 4]
    assert_equal_bits(state_of(run, 4), state_of(run, 2))  # skipped, counted, and the moments as they were
    assert json.loads((run / "checkpoints/step-00000004/state.json").read_text())["scaler"]["scale"] == 2.0
    assert "loss scale fell" in json.loads((run / "status.json").read_text())["reason"]


class NeedsMemory(GPT2):
    """A GPT-2 that pretends to run out of memory with more than one window, from some call on."""

    error: RuntimeError = torch.OutOfMemoryError("pretended")
    first_bad_call = 0
    calls = 0

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        type(self).calls += 1
        if input_ids.size(0) > 1 and type(self).calls > self.first_bad_call:
            raise self.error
        return super().forward(input_ids, targets)


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step(
    fit: Fit, tiny: TrainConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class InStepTwo(NeedsMemory):
        first_bad_call = 6  # half-way through step 2

    trainer = run_with(InStepTwo, tiny)
    assert trainer.micro_batch_size == 1
    assert "out of memory: going on with micro_batch_size 1 and 8 accumulation steps" in capfd.readouterr().err
    undisturbed = fit(change(tiny, run={"dir": str(tmp_path / "undisturbed")}))
    run = Path(tiny.run.dir)
    assert rows(run, "ledger") == rows(undisturbed, "ledger")
    for a, b in zip(rows(run), rows(undisturbed), strict=True):
        if "loss/train" in a:
            assert a["loss/train"] == pytest.approx(b["loss/train"], rel=1e-5)


@pytest.mark.parametrize("failpoints", ["", "trainer.trial=sleep:0"], ids=["in-a-step", "in-the-trial"])
@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
        "backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
    ],
)
def test_libraries_without_memory_halve_the_micro_batch_too(
    tiny: TrainConfig, message: str, failpoints: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library(NeedsMemory):
        error = RuntimeError(message)

    monkeypatch.setenv("TOOLKIT_FAILPOINTS", failpoints)
    assert run_with(Library, tiny).micro_batch_size == 1


def test_what_is_tried_before_the_first_step_meets_the_memory_of_a_step(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, gradients and moments: a trial without them would pass where the second micro-batch cannot."""
    held: list[int] = []

    class Counting(GPT2):
        def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
            held.append(sum(t.nbytes for state in trainer.raw_optimizer.state.values() for t in state.values()))
            held.append(sum(p.grad.nbytes for p in trainer.parameters if p.grad is not None))
            return super().forward(input_ids, targets)

    monkeypatch.setenv("TOOLKIT_FAILPOINTS", "trainer.trial=sleep:0")
    with Trainer(tiny, model=Counting(tiny.model, seed=1)) as trainer:
        trainer.resume()
        weights = sum(parameter.nbytes for parameter in trainer.parameters)
        assert trainer.grad_accum_steps > 1
        assert all(parameter.grad is None for parameter in trainer.parameters)  # nothing is left of it
    assert held == [pytest.approx(2 * weights, rel=0.05), weights]


@pytest.mark.parametrize("what", ["the weights", "the optimizer's moments"])
def test_a_device_too_small_for_what_lives_as_long_as_the_run_is_told_in_one_line(
    fit: Fit, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder = Path(tiny.run.dir)

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("pretended")

    def start() -> None:
        where: tuple[Any, str] = (GPT2, "to") if what == "the weights" else (trainer_module, "allocate_state")
        said = f"no memory left for {what}; weights, gradients and moments take 0.00 GiB"
        with monkeypatch.context() as patch:
            patch.setattr(*where, refuse)
            with pytest.raises(UserError, match=said), Trainer(tiny) as trainer:
                trainer.fit()

    start()
    assert [path.name for path in folder.iterdir()] == ["run.lock"]  # no run has begun: other settings may be tried
    fit(change(tiny, training={"max_steps": 2}))
    start()
    status = json.loads((folder / "status.json").read_text())
    assert status["status"] == "failed"
    assert what in status["reason"]


def test_a_device_too_small_for_the_saved_moments_is_told_in_one_line(
    fit: Fit, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("pretended")

    fit(change(tiny, training={"max_steps": 2}))
    monkeypatch.setattr(trainer_module, "load_optimizer", refuse)
    with pytest.raises(UserError, match="no memory left for the optimizer's moments"):
        fit(tiny)


def test_another_error_of_a_library_is_not_taken_for_missing_memory(tiny: TrainConfig) -> None:
    class Library(NeedsMemory):
        error = RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_with(Library, tiny)


def test_out_of_memory_with_one_window_stops_with_advice(tiny: TrainConfig) -> None:
    class Always(GPT2):
        def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("pretended")

    with pytest.raises(UserError, match=r"out of memory with micro_batch_size 1.*activation-checkpointing block"):
        run_with(Always, tiny)


def test_a_spike_is_rewound_and_its_samples_are_skipped(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from toolkit.training import spikes

    monkeypatch.setattr(spikes, "HISTORY_STEPS", 4)  # two losses are a history already

    class SpikesOnce(GPT2):
        calls = 0

        def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
            type(self).calls += 1
            loss = super().forward(input_ids, targets)
            return loss * 50 if 20 < self.calls <= 24 else loss  # step 6

    config = change(tiny, training={"on_spike": "rewind", "checkpoint_every": 2, "eval_every": None})
    trainer = run_with(SpikesOnce, config)
    assert "rewound from step 6 to step 4; samples 32 to 47 are skipped" in capfd.readouterr().err
    assert trainer.step == 8
    assert trainer.position == 8 * 8 + 16
    run = Path(config.run.dir)
    assert [row["step"] for row in rows(run) if "loss/train" in row] == list(range(1, 9))
    ledger = rows(run, "ledger")
    assert {"step": 5, "skipped_first_sample": 32, "skipped_end_sample": 48} in ledger
    assert [row["first_sample"] for row in ledger if "first_sample" in row] == [0, 8, 16, 24, 48, 56, 64, 72]


def test_a_spike_in_the_last_step_with_nothing_to_rewind_to_is_followed_by_all_that_a_last_step_is(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from toolkit.training import spikes

    monkeypatch.setattr(spikes, "HISTORY_STEPS", 4)

    class SpikesAtTheEnd(GPT2):
        calls = 0

        def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
            type(self).calls += 1
            loss = super().forward(input_ids, targets)
            return loss * 50 if 28 < self.calls <= 32 else loss  # step 8 of 8

    config = change(tiny, training={"on_spike": "rewind", "checkpoint_every": None, "eval_every": None})
    run_with(SpikesAtTheEnd, config)
    assert "no checkpoint to rewind to yet: training goes on" in capfd.readouterr().err
    run = Path(config.run.dir)
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-00000008"]
    assert [row["step"] for row in rows(run) if "loss/val" in row] == [8]
    assert json.loads((run / "status.json").read_text())["saved_step"] == 8


class SpikesForEver(GPT2):
    """A GPT-2 whose loss jumps from step 6 on, whatever it is given."""

    calls = 0

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        type(self).calls += 1
        loss = super().forward(input_ids, targets)
        return loss * 50 if self.calls > 20 else loss


def test_rewinding_to_one_checkpoint_ends(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.training import spikes

    monkeypatch.setattr(spikes, "HISTORY_STEPS", 4)
    training = {"on_spike": "rewind", "checkpoint_every": 2, "eval_every": None, "max_skipped_in_a_row": 3}
    config = change(tiny, training=training)
    monkeypatch.setattr(SpikesForEver, "calls", 0)
    with pytest.raises(UserError, match=r"rewound to .*step-00000004 3 times, and step 5 is a spike still"):
        run_with(SpikesForEver, config)
    assert rows(Path(config.run.dir))[-1]["step"] == 5


def test_a_stop_request_is_heard_while_steps_spike(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.training import spikes

    monkeypatch.setattr(spikes, "HISTORY_STEPS", 4)
    config = change(tiny, training={"on_spike": "rewind", "checkpoint_every": 2, "eval_every": None})
    rewind, asked = Trainer.rewind, []

    def rewind_and_ask(trainer: Trainer) -> bool:
        asked.append(trainer.step)
        return rewind(trainer)

    monkeypatch.setattr(SpikesForEver, "calls", 0)
    monkeypatch.setattr(Trainer, "rewind", rewind_and_ask)
    monkeypatch.setattr(StopRequests, "asked", lambda _: len(asked) == 2)
    trainer = run_with(SpikesForEver, config)
    status = json.loads((Path(config.run.dir) / "status.json").read_text())
    assert (status["status"], status["step"], trainer.step) == ("preempted", 5, 5)


def test_a_crash_after_a_rewind_rewinds_again(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.training import spikes

    monkeypatch.setattr(spikes, "HISTORY_STEPS", 4)

    class SpikesAtItsData(GPT2):
        calls = 0
        bad: frozenset[bytes] = frozenset()

        def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
            loss, kind, window = super().forward(input_ids, targets), type(self), input_ids.numpy().tobytes()
            kind.calls += 1
            if 20 < kind.calls <= 24:  # step 6
                kind.bad |= {window}
            return loss * 50 if window in kind.bad else loss

    config = change(tiny, training={"on_spike": "rewind", "checkpoint_every": 2, "eval_every": None})
    rewind = Trainer.rewind

    def rewind_and_end(trainer: Trainer) -> bool:
        rewind(trainer)
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "rewind", rewind_and_end)
        with pytest.raises(Cut):
            run_with(SpikesAtItsData, config)
    trainer = run_with(SpikesAtItsData, config)
    assert (trainer.step, trainer.position) == (8, 8 * 8 + 16)
    ledger = rows(Path(config.run.dir), "ledger")
    assert len([row for row in ledger if "skipped_first_sample" in row]) == 1
    assert [row["first_sample"] for row in ledger if "first_sample" in row] == [0, 8, 16, 24, 48, 56, 64, 72]
    said = list(audit(Path(config.run.dir)))
    assert any("samples 32 to 47 were skipped on purpose after a loss spike" in line for line in said)
    assert "once per epoch" in said[-1]


def test_weights_that_are_not_finite_are_never_saved(
    fit: Fit, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = change(tiny, training={"eval_every": None, "sample_every": None})
    log = Trainer.log

    def log_and_spoil(trainer: Trainer, result: StepResult) -> None:
        log(trainer, result)
        if trainer.step == 6:  # a checkpoint is due here, and its gradient was finite
            with torch.no_grad():
                trainer.raw_model.wte.weight[3, 1] = math.inf

    monkeypatch.setattr(Trainer, "log", log_and_spoil)
    with pytest.raises(UserError, match="the weights at step 6 are not finite and are not saved"):
        fit(config)
    folder = Path(config.run.dir)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert "not finite" in json.loads((folder / "status.json").read_text())["reason"]


def test_weights_that_break_before_the_first_checkpoint_are_told_that_there_is_none(
    fit: Fit, tiny: TrainConfig
) -> None:
    with pytest.raises(UserError, match=r"not finite and are not saved; there is no checkpoint yet: start anew with a"):
        fit(change(tiny, optimizer={"learning_rate": 1e30}, training={"checkpoint_every": 1}))


def test_a_model_that_no_memory_holds_is_refused_in_one_line(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred thousand times what an address space has: no overcommitment gives it."""
    monkeypatch.setattr("toolkit.config.MAX_DIMENSION", 10**16)
    with pytest.raises(UserError, match=r"has no memory left for the weights; weights, gradients and moments take \d+"):
        Trainer(change(tiny, model={"context_length": 10**16}))


def test_an_environment_that_accelerate_refuses_is_told_in_one_line(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_DEBUG_MODE", "perhaps")
    with pytest.raises(UserError, match=r"Accelerate refuses its environment: .*perhaps.*; unset that variable"):
        Trainer(tiny)


def test_a_checkpoint_is_read_once_to_resume_from_it(
    fit: Fit, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fit(change(tiny, training={"max_steps": 4}))
    read: dict[str, int] = {}
    preadv = os.preadv

    def count(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        read[name] = read.get(name, 0) + (got := preadv(descriptor, buffers, offset))
        return got

    monkeypatch.setattr(os, "preadv", count)
    fit(tiny)
    for name in ("model.safetensors", "optimizer.safetensors"):
        path = run / "checkpoints/step-00000004" / name
        assert 0 < read[str(path)] <= path.stat().st_size


def test_a_run_whose_checkpoints_have_gone_does_not_begin_anew(fit: Fit, tiny: TrainConfig) -> None:
    run = fit(change(tiny, training={"max_steps": 4}))
    before = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="has had a checkpoint of step 4 and has none now"):
        fit(tiny)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_state_that_lacks_a_part_is_refused(fit: Fit, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    state = Trainer._state
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_state", lambda trainer: {k: v for k, v in state(trainer).items() if k != "position"})
        fit(change(tiny, training={"max_steps": 2}))
    with pytest.raises(UserError, match=r"state\.json lacks position, without which no run can be continued"):
        fit(tiny)


def test_a_spike_is_only_logged_by_default(tiny: TrainConfig, capfd: pytest.CaptureFixture[str]) -> None:
    class SpikesOnce(GPT2):
        calls = 0

        def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
            type(self).calls += 1
            loss = super().forward(input_ids, targets)
            return loss * 50 if 69 <= self.calls <= 69 else loss

    config = change(
        tiny,
        optimizer={"learning_rate": 1e-6},
        training={
            "max_steps": 72,
            "micro_batch_size": 8,
            "eval_every": None,
            "checkpoint_every": None,
            "sample_every": None,
        },
    )
    trainer = run_with(SpikesOnce, config)
    assert capfd.readouterr().err.count("is a spike") == 1
    assert trainer.position == 72 * 8


def test_a_command_and_a_run_in_one_process_print_each_message_once_and_in_their_own_way(
    tiny: TrainConfig, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit = logging.getLogger("toolkit")
    monkeypatch.setattr(toolkit, "handlers", [])  # as in a new process
    for number in (1, 2):
        with pytest.raises(SystemExit):
            cli.main(["audit", "no-such-run"])
        toolkit.info("a message of the command")
        run_with(GPT2, change(tiny, run={"dir": f"{tiny.run.dir}-{number}"}))
        toolkit.info("a message of the run")
        lines = [line for line in capfd.readouterr().err.splitlines() if "a message of" in line]
        assert lines[0] == "a message of the command"
        assert re.fullmatch(r"\d\d:\d\d:\d\d a message of the run", lines[1])
        assert len(lines) == 2


def test_seeds_of_neighbouring_steps_differ_in_about_half_of_their_bits() -> None:
    seeds = [mixed_seed(1, step, index) for step in range(40) for index in range(5)]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    flips = [(a ^ b).bit_count() for a, b in pairwise(seeds)]
    assert 28 < sum(flips) / len(flips) < 35


def test_a_vocabulary_that_does_not_fit_the_model_is_refused(fit: Fit, tiny: TrainConfig) -> None:
    with pytest.raises(UserError, match=r"'bytes' has 257 ids but model\.vocab_size=50257; use --model.vocab-size 257"):
        fit(change(tiny, model={"vocab_size": 50257}))


def test_changed_data_are_refused(fit: Fit, tiny: TrainConfig, tmp_path: Path) -> None:
    fit(change(tiny, training={"max_steps": 2}))
    other = tmp_path / "other"
    text = write_corpus(tmp_path / "text", seed=1)
    prepare([str(text)], out=other, tokenizer="bytes", workers=1, shard_tokens=8192, val_fraction=0.2, progress=False)
    with pytest.raises(UserError, match=r"was trained on data with fingerprint \w{12}, but .* has \w{12}"):
        fit(change(tiny, data={"path": (str(other),)}))


def test_weights_of_transformers_are_a_starting_point(fit: Fit, tiny: TrainConfig, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=257, bos_token_id=256, eos_token_id=256
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    run = fit(change(tiny, model={"init_from": str(tmp_path / "theirs")}, training={"max_steps": 1}))
    first = next(row for row in rows(run) if "loss/train" in row)
    windows = sample_windows_of(tiny)
    with torch.no_grad():
        loss = theirs(input_ids=windows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(loss.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert first["loss/train"] == pytest.approx(expected, rel=1e-5)


def test_weights_of_another_vocabulary_than_the_datas_are_refused_with_what_helps(tiny: TrainConfig) -> None:
    with pytest.raises(UserError, match=r"257 ids but model\.vocab_size=300; use --model\.vocab-size 257"):
        Trainer(change(tiny, model={"vocab_size": 300}))
    AcceleratorState._reset_state(True)
    for vocab_size, said in (
        (320, r"=320; use --model\.vocab-size 257, with which the padding of the weights in theirs is left out$"),
        (384, r"=384; use --model\.vocab-size 257, with which the padding of the weights in theirs is left out$"),
        (300, r"=300; use data that is prepared with the tokenizer of the weights in theirs$"),
        (448, r"=448; use data that is prepared with the tokenizer of the weights in theirs$"),
        (256, r"=256; use data that is prepared with the tokenizer of the weights in theirs$"),
    ):
        with pytest.raises(UserError, match=said):
            Trainer(change(tiny, model={"vocab_size": vocab_size, "init_from": "theirs"}))
        AcceleratorState._reset_state(True)


def test_the_muon_recipe_resumes_to_the_bit_and_loads_in_transformers(
    fit: Fit, tiny: TrainConfig, tmp_path: Path
) -> None:
    import transformers

    from recipes.speedrun_124m import CONFIG

    assert CONFIG.optimizer.name == "muon"
    model = dataclasses.replace(tiny.model, zero_init_residual=CONFIG.model.zero_init_residual)
    short = dataclasses.replace(CONFIG.schedule, warmup_steps=2, decay_steps=6)
    config = dataclasses.replace(tiny, model=model, optimizer=CONFIG.optimizer, schedule=short)
    run = fit(config)
    losses = [row["loss/train"] for row in rows(run) if "loss/train" in row]
    assert losses[-1] < losses[0] - 0.4
    assert rows(run)[-2]["learning_rate"] == pytest.approx(CONFIG.optimizer.learning_rate / 6)  # linear, down to zero
    parts = change(config, run={"dir": str(tmp_path / "parts")})
    fit(change(parts, training={"max_steps": 3}))
    fit(parts)
    assert_equal_bits(state_of(Path(parts.run.dir), 8), state_of(run, 8))
    folder = run / "checkpoints" / "step-00000008"
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    ours = GPT2(config.model).eval()
    load_canonical(ours, load_file(folder / "model.safetensors"))
    windows = sample_windows_of(config)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(
            theirs(input_ids=windows[:, :-1]).logits.flatten(0, 1), windows[:, 1:].flatten()
        )
        assert ours(windows[:, :-1], windows[:, 1:]).item() == pytest.approx(loss.item(), rel=1e-5)


def sample_windows_of(config: TrainConfig) -> Tensor:
    """The windows (G, T + 1) of a recipe's first step."""
    loader = training_loader(
        open_data(config.data.path),
        sequence_length=config.data.sequence_length,
        micro_batch_size=8,
        seed=config.training.seed,
        position=0,
        shuffle_group_shards=config.data.shuffle_group_shards,
    )
    batch = next(iter(loader))
    return torch.cat([batch["input_ids"], batch["targets"][:, -1:]], dim=1)


def test_the_losses_of_the_demo_s_model_stay_what_they_are(fit: Fit, tiny: TrainConfig) -> None:
    """A golden curve: a change of these numbers is a change of what training computes, and has to be explained.

    The tolerance covers other orders of sums (threads, vector units), not another computation.
    """
    run = fit(change(tiny, training={"max_steps": 8, "eval_every": None, "sample_every": None}))
    losses = [row["loss/train"] for row in rows(run) if "loss/train" in row]
    assert losses == pytest.approx(GOLDEN, rel=1e-4)


GOLDEN = [5.550364, 5.270164, 4.944211, 4.51511, 4.146779, 3.860855, 3.659731, 3.470578]


def test_a_signal_during_an_evaluation_is_made_up_for(
    fit: Fit, tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(tiny)
    cut = change(tiny, run={"dir": str(tmp_path / "cut")})
    asked = StopRequests.asked
    with monkeypatch.context() as patch:
        # The request arrives after step 4's reduction: the evaluation of step 4 is the first to notice.
        calls = []

        def from_the_fifth_call_on(requests: StopRequests) -> bool:
            calls.append(requests)
            return len(calls) >= 5 or asked(requests)

        patch.setattr(StopRequests, "asked", from_the_fifth_call_on)
        fit(cut)
    assert [row["step"] for row in rows(Path(cut.run.dir)) if "loss/val" in row] == []
    assert json.loads((Path(cut.run.dir) / "status.json").read_text())["step"] == 4
    with pytest.raises(Cut):  # what was left out is made up for, and lost again with the steps after it
        fit_until(cut, 5, monkeypatch)
    assert [row["step"] for row in rows(Path(cut.run.dir), "samples")] == [4]
    fit(cut)
    for name in ("metrics", "ledger", "samples"):
        assert rows(Path(cut.run.dir), name) == rows(whole, name)


class Cut(BaseException):
    """The end of a run between two steps, as by a power cut."""


def fit_until(config: TrainConfig, step: int, monkeypatch: pytest.MonkeyPatch, *, model: GPT2 | None = None) -> None:
    """Trains until a step's rows are written, and no further: `Cut` is raised."""
    log = Trainer.log

    def log_and_end(trainer: Trainer, result: StepResult) -> None:
        log(trainer, result)
        if trainer.step == step:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "log", log_and_end)
        AcceleratorState._reset_state(True)
        Trainer(config, model=model).fit()


def test_a_mixture_is_trained_in_its_shares_and_evaluated_set_by_set(
    fit: Fit, tiny: TrainConfig, data_dir: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    text = write_corpus(tmp_path / "text", seed=5)
    prepare([str(text)], out=second, tokenizer="bytes", workers=1, shard_tokens=8192, val_fraction=0.2, progress=False)
    mixed = change(tiny, data={"path": (f"{data_dir}=0.75", f"{second}=0.25")})
    run = fit(mixed)
    row = [row for row in rows(run) if "loss/val" in row][-1]
    first, other = row[f"loss/val/{data_dir.name}"], row["loss/val/second"]
    assert row["loss/val"] == pytest.approx(0.75 * first + 0.25 * other, rel=1e-12)
    assert first != other
    parts = change(mixed, run={"dir": str(tmp_path / "parts")})
    fit(change(parts, training={"max_steps": 3}))
    fit(parts)
    assert rows(Path(parts.run.dir), "ledger") == rows(run, "ledger")
    assert_equal_bits(state_of(Path(parts.run.dir), 8), state_of(run, 8))
    with pytest.raises(UserError, match="was trained on data with fingerprint"):
        fit(change(mixed, data={"path": (f"{data_dir}=0.5", f"{second}=0.5")}))


def test_nothing_is_pickled_on_the_way_to_the_disk_and_back(
    fit: Fit, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a pickle was read or written")

    for module, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "dump")):
        monkeypatch.setattr(module, name, refuse)
    fit(change(tiny, training={"max_steps": 4}))
    run = fit(tiny)
    assert rows(run)[-1]["step"] == 8


def test_secrets_reach_no_file_of_a_run(
    fit: Fit, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    canaries = {
        "HF_TOKEN": "hf_canaryCANARYcanaryCANARY01",
        "WANDB_API_KEY": "c" * 40,
        "MY_PASSWORD": "canary-in-the-mine",
    }
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["train.py", "--wandb.name", canaries["HF_TOKEN"]])
    run = fit(
        change(
            tiny,
            training={"max_steps": 2},
            sampling={"prompt": canaries["MY_PASSWORD"]},
            wandb={"mode": "offline", "name": canaries["HF_TOKEN"], "tags": (canaries["MY_PASSWORD"],)},
        )
    )
    files = [path for path in run.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        for name, value in canaries.items():
            assert value.encode() not in content, f"{name} is in {path}"
