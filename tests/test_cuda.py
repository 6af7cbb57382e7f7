"""What only a CUDA device shows: 16-bit training, the scaler, real synchronisations, real memory. Skipped without one."""

import copy
import gc
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from recipes.train_demo import CONFIG as DEMO
from tests.support import change, command, environment, flags, rows, toolkit
from tests.test_step_costs import assert_compiled_once
from toolkit.config import TrainConfig
from toolkit.model.loss import mean_cross_entropy
from toolkit.training.checkpoint import load
from toolkit.training.plan import memory_estimate
from toolkit.training.trainer import Trainer

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
# Read when cuBLAS starts, which is before some of these tests.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

PRECISIONS = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "muon")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    from accelerate.state import AcceleratorState

    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


@pytest.fixture
def small(tiny: TrainConfig) -> TrainConfig:
    """The tiny recipe, eagerly."""
    return change(tiny, training={"compile": "off"})


def sha256_of_tensors(run: Path, step: int) -> dict[str, str]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


# Runs


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one_to_the_bit(
    small: TrainConfig,
    fit: Callable[[TrainConfig], Path],
    tmp_path: Path,
    precision: str,
    optimizer: str,
    compiled: str,
) -> None:
    config = change(
        small,
        training={"precision": precision, "compile": compiled, "deterministic": True, "max_steps": 6},
        optimizer={"name": optimizer},
    )
    whole = fit(config)
    parts = change(config, run={"dir": str(tmp_path / "parts")})
    with Trainer(parts) as trainer:
        trainer.resume()
        for _ in range(3):
            trainer.log(trainer.train_step())
        trainer.save()
    fit(parts)
    ours = Path(parts.run.dir)
    assert sha256_of_tensors(ours, 6) == sha256_of_tensors(whole, 6)
    assert len(sha256_of_tensors(ours, 6)) == 2
    assert [row for row in rows(ours) if "loss/train" in row] == [row for row in rows(whole) if "loss/train" in row]
    assert rows(ours, "ledger") == rows(whole, "ledger")


def test_every_precision_learns_what_the_cpu_learns(
    small: TrainConfig, fit: Callable[[TrainConfig], Path], tmp_path: Path
) -> None:
    on_cpu = change(small, run={"dir": str(tmp_path / "cpu")}, training={"precision": "fp32"})
    done = command("recipes/train_demo.py", *flags(on_cpu, DEMO), env=environment(CUDA_VISIBLE_DEVICES=""))
    assert done.returncode == 0, done.stderr
    expected = [row["loss/train"] for row in rows(Path(on_cpu.run.dir)) if "loss/train" in row]
    for precision, tolerance in (("fp32", 2e-3), ("fp16", 5e-3), ("bf16", 2e-2)):
        run = fit(change(small, run={"dir": str(tmp_path / precision)}, training={"precision": precision}))
        losses = [row["loss/train"] for row in rows(run) if "loss/train" in row]
        assert losses == pytest.approx(expected, rel=tolerance)
        assert rows(run, "ledger") == rows(Path(on_cpu.run.dir), "ledger")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_overflow_in_fp16_skips_the_step_and_lowers_the_scale(small: TrainConfig, optimizer: str) -> None:
    config = change(small, training={"precision": "fp16"}, optimizer={"name": optimizer})
    with Trainer(config) as trainer:
        trainer.resume()
        trainer.log(trainer.train_step())
        scaler = trainer.accelerator.scaler
        assert scaler is not None
        scaler.update(2.0**31)
        before = copy.deepcopy(trainer.raw_model.state_dict())
        result = trainer.train_step()
        assert not result.updated
        assert trainer.skipped_steps == 1
        assert scaler.get_scale() == 2.0**30
        assert all(torch.equal(before[name], value) for name, value in trainer.raw_model.state_dict().items())
        scaler.update(2.0**10)
        assert trainer.train_step().updated
        assert trainer.skipped_in_a_row == 0
        assert not torch.equal(before["wte.weight"], trainer.raw_model.state_dict()["wte.weight"])
        trainer.save()
    state = load(Path(config.run.dir) / "checkpoints" / "step-00000003").state
    assert state["scaler"]["scale"] == 2.0**10


def test_the_verbs_work_on_a_run_of_the_gpu(small: TrainConfig, fit: Callable[[TrainConfig], Path]) -> None:
    run = str(fit(change(small, training={"precision": "bf16"})))
    for arguments in (
        ("generate", run, "the ", "--max-new-tokens", "8"),
        ("evaluate", run),
        ("verify", run),
        ("audit", run),
    ):
        done = toolkit(*arguments)
        assert done.returncode == 0, done.stderr
    done = toolkit("verify-resume", "recipes/train_demo.py", "--steps", "4", *flags(small, DEMO))
    assert done.returncode == 0, done.stdout + done.stderr


# What a step costs


def synchronisations(trainer: Trainer) -> list[str]:
    """Where a step waits for the device; its batches are there already, because reading data is work of the host."""
    trainer.batches = iter([next(trainer.batches) for _ in range(trainer.grad_accum_steps)])
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        trainer.train_step()
        torch.cuda.set_sync_debug_mode("default")
    found = [f"{warning.filename}:{warning.lineno} {warning.message}" for warning in caught]
    return [line for line in found if "called a synchronizing CUDA operation" in line]


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [("fp32", "adamw"), ("bf16", "adamw"), ("fp16", "adamw"), ("fp32", "muon"), ("bf16", "muon")],
)
def test_a_step_waits_for_the_device_once(small: TrainConfig, precision: str, optimizer: str, compiled: str) -> None:
    config = change(small, training={"precision": precision, "compile": compiled}, optimizer={"name": optimizer})
    with Trainer(config) as trainer:
        trainer.resume()
        assert trainer.grad_accum_steps == 4
        for _ in range(2):
            trainer.train_step()
        found = synchronisations(trainer)
    assert len(found) == 1, found
    assert "trainer.py" in found[0]


def test_muon_in_fp16_waits_twice(small: TrainConfig) -> None:
    """Its update cannot be left out on the device, so the scaler asks first."""
    with Trainer(change(small, training={"precision": "fp16"}, optimizer={"name": "muon"})) as trainer:
        trainer.resume()
        for _ in range(2):
            trainer.train_step()
        assert len(synchronisations(trainer)) == 2


def test_batches_come_from_pinned_memory(small: TrainConfig) -> None:
    with Trainer(small) as trainer:
        trainer.resume()
        assert next(trainer.batches)["input_ids"].device.type == "cuda"
        loader: Any = trainer.accelerator._dataloaders[-1]
        assert loader.base_dataloader.pin_memory
        assert trainer.accelerator.non_blocking


def test_nothing_is_compiled_again_after_the_second_step(small: TrainConfig) -> None:
    assert_compiled_once(change(small, training={"compile": "auto", "precision": "bf16"}))  # auto compiles on CUDA


# Memory


@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plan_foretells_the_memory_of_a_step(small: TrainConfig, precision: str, checkpointing: str) -> None:
    config = change(
        small,
        model={"n_layer": 6, "n_head": 4, "n_embd": 256, "context_length": 256},
        data={"sequence_length": 256},
        training={
            "precision": precision,
            "activation_checkpointing": checkpointing,
            "tokens_per_step": 2 * 256 * 256,
            "micro_batch_size": 256,
        },
    )
    expected = memory_estimate(config, precision, micro_batch_size=256).peak  # type: ignore[arg-type]
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()  # cuBLAS's workspace, if an earlier test has used it
    with Trainer(config) as trainer:
        trainer.resume()
        for _ in range(3):
            trainer.train_step()
        measured = torch.cuda.max_memory_allocated() - before
    assert measured == pytest.approx(expected, rel=0.1)


def test_out_of_memory_halves_the_micro_batch_and_changes_no_sample(
    small: TrainConfig, fit: Callable[[TrainConfig], Path], tmp_path: Path
) -> None:
    config = change(
        small,
        model={"n_layer": 4, "n_head": 4, "n_embd": 256, "context_length": 256},
        data={"sequence_length": 256},
        training={"tokens_per_step": 256 * 256, "micro_batch_size": 256, "max_steps": 2, "eval_every": None},
    )
    needed = memory_estimate(config, "fp32", micro_batch_size=128).peak
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1.4 * needed) / total)
    with Trainer(config) as trainer:
        trainer.resume()
        assert trainer.micro_batch_size in (64, 128)
        result = trainer.train_step()
        trainer.log(result)
    torch.cuda.set_per_process_memory_fraction(1.0)
    roomy = change(config, run={"dir": str(tmp_path / "roomy")}, training={"max_steps": 1})
    whole = [row for row in rows(fit(roomy)) if "loss/train" in row]
    assert result.loss == pytest.approx(whole[0]["loss/train"], rel=1e-4)
    assert rows(Path(config.run.dir), "ledger") == rows(Path(roomy.run.dir), "ledger")


def test_auto_asks_the_plan_for_the_micro_batch(small: TrainConfig) -> None:
    with Trainer(change(small, training={"micro_batch_size": "auto"})) as trainer:
        assert trainer.micro_batch_size == 8  # the whole step fits


# The loss


def loss_arguments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random hidden states (256, 64), a weight with 20 rows of padding (320, 64), and targets (256,)."""
    generator = torch.Generator("cuda").manual_seed(1)
    hidden = torch.randn(256, 64, device="cuda", generator=generator).requires_grad_()
    weight = (0.3 * torch.randn(320, 64, device="cuda", generator=generator)).requires_grad_()
    return hidden, weight, torch.randint(0, 300, (256,), device="cuda", generator=generator)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("chunk_tokens", [96, 256])
def test_gradients_of_the_chunked_loss_are_the_plain_ones(chunk_tokens: int, compiled: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    hidden, weight, targets = loss_arguments()
    targets[::7] = -100
    function = torch.compile(mean_cross_entropy) if compiled else mean_cross_entropy
    function(hidden, weight, targets, vocab_size=300, chunk_tokens=chunk_tokens).backward()
    ours = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    logits = (hidden.double() @ weight.double().t())[:, :300]
    F.cross_entropy(logits, targets).backward()
    for mine, plain in zip(ours, (hidden.grad, weight.grad), strict=True):
        assert mine is not None
        assert plain is not None
        assert (mine - plain).norm() <= 1e-6 * plain.norm()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_of_several_chunks_are_as_exact_as_those_of_one(dtype: torch.dtype, compiled: bool) -> None:
    hidden, weight, targets = loss_arguments()
    F.cross_entropy((hidden.double() @ weight.double().t())[:, :300], targets).backward()
    assert weight.grad is not None
    plain = weight.grad.double()
    function = torch.compile(mean_cross_entropy) if compiled else mean_cross_entropy
    errors = []
    for chunk_tokens in (256, 32):
        hidden.grad = weight.grad = None
        with torch.autocast("cuda", dtype):
            function(hidden, weight, targets, vocab_size=300, chunk_tokens=chunk_tokens).backward()
        gradient: torch.Tensor = weight.grad
        assert gradient.dtype == torch.float32
        errors.append(((gradient.double() - plain).norm() / plain.norm()).item())
    assert errors[0] < 0.02
    assert errors[1] < 1.2 * errors[0]
