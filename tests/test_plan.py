"""The plan against reality: bytes that autograd saves, bytes that are allocated, sizes of checkpoints, published rates."""

import gc
import json
import math
import runpy
import weakref
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support import change
from toolkit.config import (
    CheckpointConfig,
    DataConfig,
    GPT2Config,
    OptimizerConfig,
    TrainConfig,
    TrainingConfig,
    gpt2_config,
)
from toolkit.errors import UserError
from toolkit.model import product
from toolkit.model.gpt2 import GPT2, canonical_tensors
from toolkit.training.hardware import DEVICES, find_device, peak_flops
from toolkit.training.optimizer import build_optimizer, optimizer_tensors
from toolkit.training.plan import (
    GIB,
    largest_micro_batch,
    memory_estimate,
    plan,
    saved_activation_bytes,
    usable_bytes,
)

SMALL = GPT2Config(n_layer=2, n_head=4, n_embd=64, context_length=48, vocab_size=200)
MIDDLE = GPT2Config(n_layer=3, n_head=6, n_embd=96, context_length=64, vocab_size=257)
LARGE = GPT2Config(n_layer=4, n_head=4, n_embd=256, context_length=128, vocab_size=1000)
RECIPE = TrainConfig(model=gpt2_config("124M"))  # tokens_per_step 2**19, sequence length 1024


def recipe(model, *, batch=4, sequence_length=None, optimizer="adamw", **training):
    length = sequence_length or model.context_length
    return TrainConfig(
        model=model,
        data=DataConfig(sequence_length=length),
        training=TrainingConfig(**{"tokens_per_step": batch * length, "micro_batch_size": batch} | training),
        optimizer=OptimizerConfig(name=optimizer),
    )


def build(config, seed=0):
    return GPT2(
        config.model,
        seed=seed,
        activation_checkpointing=config.training.activation_checkpointing,
        loss_chunk_tokens=config.training.loss_chunk_tokens,
    )


def forward(model, config, precision):
    ids = torch.zeros(config.training.micro_batch_size, config.data.sequence_length, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return model(ids, ids)


# Memory


def bytes_saved_by_autograd(config, precision):
    model = build(config)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model, config, precision)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("chunk", [50, 10**6], ids=["chunked", "whole"])
@pytest.mark.parametrize(
    ("precision", "units"), [("fp32", True), ("bf16", True), ("bf16", False)], ids=["fp32", "bf16", "bf16-no-units"]
)
@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("model", [SMALL, MIDDLE, LARGE], ids=["small", "middle", "large"])
def test_saved_bytes_are_those_that_autograd_really_saves(model, checkpointing, precision, units, chunk, monkeypatch):
    monkeypatch.setattr(product, "cpu_has_bf16", lambda: units)
    config = recipe(model, sequence_length=40, activation_checkpointing=checkpointing, loss_chunk_tokens=chunk, batch=3)
    predicted = saved_activation_bytes(config, precision, micro_batch_size=3)
    # Where attention is computed again, in fp32, its normalisers are not kept.
    assert predicted == pytest.approx(bytes_saved_by_autograd(config, precision), rel=0.002 if units else 0.008)


@pytest.mark.parametrize(
    ("precision", "units"), [("fp32", True), ("bf16", True), ("bf16", False)], ids=["fp32", "bf16", "bf16-no-units"]
)
@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("model", [SMALL, MIDDLE, LARGE], ids=["small", "middle", "large"])
def test_saved_bytes_with_dropout_are_those_of_a_cpu(model, checkpointing, precision, units, monkeypatch):
    """It has no fused attention with dropout, and so keeps every probability."""
    monkeypatch.setattr(product, "cpu_has_bf16", lambda: units)
    config = recipe(model, sequence_length=40, activation_checkpointing=checkpointing, loss_chunk_tokens=50, batch=3)
    config = change(config, model={"dropout": 0.1})
    predicted = saved_activation_bytes(config, precision, micro_batch_size=3, on_cpu=True)
    assert predicted == pytest.approx(bytes_saved_by_autograd(config, precision), rel=0.002 if units else 0.008)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("batch", "n_head"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_saved_bytes_with_dropout_of_one_head_or_one_window(precision, batch, n_head):
    """Where a product's operands are views of what made them."""
    config = recipe(SMALL, sequence_length=40, activation_checkpointing="none", loss_chunk_tokens=50, batch=batch)
    config = change(config, model={"dropout": 0.1, "n_head": n_head})
    predicted = saved_activation_bytes(config, precision, micro_batch_size=batch, on_cpu=True)
    assert predicted == pytest.approx(bytes_saved_by_autograd(config, precision), rel=0.002)


def test_a_step_of_any_size_is_planned_at_once():
    config = change(RECIPE, training={"tokens_per_step": 1024 * 10**12})
    size = largest_micro_batch(config, "bf16", memory_bytes=12 * GIB)
    assert 10**12 % size == 0
    assert memory_estimate(config, "bf16", micro_batch_size=size).peak <= usable_bytes(12 * GIB)
    assert size == 20  # the next divisor, 25, does not fit
    assert memory_estimate(config, "bf16", micro_batch_size=25).peak > usable_bytes(12 * GIB)


class AllocatedBytes(TorchDispatchMode):
    """The most bytes that are alive at one time in the tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.storages = weakref.WeakSet()

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.storages:
            self.storages.add(storage)
            weakref.finalize(storage, self.remove, storage.nbytes())
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)

    def remove(self, size):
        self.alive -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


def peak_of_a_step(config, precision):
    """Of the second of two steps, in tensors that have sizes but no memory."""
    with FakeTensorMode(), AllocatedBytes() as allocated:
        model = build(config, seed=None)
        optimizer = build_optimizer(model, config.optimizer, device_type="cpu")
        for _ in range(2):
            gc.collect()
            allocated.peak = allocated.alive
            for _ in range(2):  # micro-batches: in the second one the gradients exist
                forward(model, config, precision).backward()
            optimizer.step()
            optimizer.zero_grad()
    return allocated.peak


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        (recipe(gpt2_config("124M", n_layer=4), batch=16), "bf16"),
        (recipe(gpt2_config("124M", n_layer=3), batch=8, activation_checkpointing="block"), "bf16"),
        (recipe(gpt2_config("124M", n_layer=2), batch=1), "fp32"),
        (recipe(gpt2_config("355M", n_layer=2, vocab_size=257), batch=8), "bf16"),  # the blocks decide, not the logits
        (recipe(gpt2_config("355M", n_layer=2, vocab_size=257), batch=8, activation_checkpointing="block"), "fp32"),
    ],
    ids=["124M", "checkpointed", "one-chunk", "bytes", "bytes-checkpointed"],
)
def test_the_predicted_peak_is_never_below_what_a_step_allocates_and_at_most_a_tenth_above(
    config, precision, monkeypatch
):
    monkeypatch.setattr(product, "cpu_has_bf16", lambda: True)  # as on a GPU, for which this CPU stands here
    predicted = memory_estimate(config, precision, micro_batch_size=config.training.micro_batch_size).peak
    ratio = predicted / peak_of_a_step(config, precision)
    assert 0.995 < ratio < 1.10


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_moments_and_checkpoint_have_their_real_sizes(optimizer):
    config = recipe(MIDDLE, optimizer=optimizer)  # 257 ids: 63 rows of padding
    model = build(config)
    forward(model, config, "fp32").backward()
    real = build_optimizer(model, config.optimizer, device_type="cpu")
    real.step()
    found = memory_estimate(config, "fp32", micro_batch_size=4)
    parameters = list(model.parameters())
    assert found.weights == sum(p.nbytes for p in parameters)
    assert found.gradients == sum(p.grad.nbytes for p in parameters)
    counters = 4 * len(parameters)
    state = sum(t.nbytes for p in parameters for t in real.state[p].values())
    assert found.moments == pytest.approx(state, abs=counters)
    saved = [*canonical_tensors(model).values(), *optimizer_tensors(real, model).values()]
    assert plan(config, "rtx3060").checkpoint_bytes == pytest.approx(sum(t.nbytes for t in saved), abs=counters)


# The micro-batch


def test_the_124m_recipe_on_12_gb():
    """16 windows: 8.3 GiB in eager bf16; 32 would need 13.7."""
    found = plan(RECIPE, "rtx3060")
    assert (found.micro_batch_size, found.grad_accum_steps, found.precision) == (16, 32, "bf16")
    assert found.num_parameters == 124_439_808
    assert found.memory.peak / GIB == pytest.approx(7.66, abs=0.4)
    assert memory_estimate(RECIPE, "bf16", micro_batch_size=32).peak > usable_bytes(12 * GIB)


@pytest.mark.parametrize("name", ["train_124m", "speedrun_124m"])
def test_the_recipe_files_have_the_micro_batch_that_the_plan_finds_for_12_gb(name):
    path = Path(__file__).parents[1] / "recipes" / f"{name}.py"
    config = runpy.run_path(str(path), run_name="recipe")["CONFIG"]
    assert config.training.micro_batch_size == plan(config, "rtx3060").micro_batch_size


@pytest.mark.parametrize("num_processes", [1, 2, 8])
@pytest.mark.parametrize("memory_gib", [6, 8, 12, 24])
def test_the_largest_micro_batch_divides_fits_and_is_the_largest(memory_gib, num_processes):
    config = TrainConfig(training=TrainingConfig(tokens_per_step=480 * 1024))  # windows: a number with many divisors
    size = largest_micro_batch(config, "bf16", memory_bytes=memory_gib * GIB, num_processes=num_processes)
    windows = 480 // num_processes
    assert windows % size == 0
    fits = [
        other
        for other in range(1, windows + 1)
        if memory_estimate(config, "bf16", micro_batch_size=other).peak <= usable_bytes(memory_gib * GIB)
    ]
    assert size == max(other for other in fits if windows % other == 0)


def test_checkpointing_and_chunking_make_room():
    def largest(**training):
        config = TrainConfig(model=gpt2_config("355M"), training=TrainingConfig(**training))
        return largest_micro_batch(config, "bf16", memory_bytes=12 * GIB)

    assert largest() == 4
    assert largest(activation_checkpointing="block") == 16
    whole = change(RECIPE, training={"loss_chunk_tokens": 2**20})
    peaks = [memory_estimate(config, "bf16", micro_batch_size=16).peak for config in (RECIPE, whole)]
    assert peaks[1] - peaks[0] > GIB  # 16 x 1024 rows of 50,304 logits in bf16 are 1.5 GiB


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (RECIPE, {"device": "rtx-9999"}, r"device 'rtx-9999' is not known; use this, rtx3060, 3060-ti, .*--memory-gib"),
        (
            TrainConfig(model=gpt2_config("1558M")),
            {"device": "rtx3060"},
            r"1,557,611,200 parameters needs .* RTX 3060 has 10\.54 GiB usable of 12\.0; weights, gradients and moments "
            r"alone take 23\.2\d GiB: use a smaller model",
        ),
        (
            TrainConfig(model=gpt2_config("774M")),
            {"device": "3090", "memory_gib": 14.0},
            r"for one window of 1024 tokens.*use --training\.activation-checkpointing block, a shorter",
        ),
        (
            RECIPE,
            {"device": "rtx3060", "num_processes": 3},
            r"is not a multiple of micro_batch_size \* sequence_length",
        ),
        (RECIPE, {"device": "rtx3060", "memory_gib": 0.0}, r"memory_gib=0\.0 must be above 0"),
        (RECIPE, {"tflops": math.nan}, r"tflops=nan must be above 0"),
        (RECIPE, {"memory_gib": 1e300, "tflops": 1.0}, r"memory_gib=1e\+300 is that of no device"),
        (RECIPE, {"device": "rtx3060", "tflops": 1e-320}, r"tflops=1e-320 is that of no device"),
        (
            TrainConfig(training=TrainingConfig(precision="bf16")),
            {"device": "2080-ti"},
            r"2080-ti does not compute bf16 natively; use --training\.precision fp16 or fp32",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(config, options, message):
    with pytest.raises(UserError, match=message) as error:
        plan(config, options.pop("device", "this"), **options)
    assert "\n" not in str(error.value)


# Time, disk and what is shown


def test_days_on_an_rtx_3060_are_the_published_ones():
    """30 to 60 % of 25.5 TFLOP/s at 0.855 GFLOP per token, for 10 billion tokens."""
    found = plan(RECIPE, "rtx3060")
    assert found.flops_per_token / 1e9 == pytest.approx(0.855, abs=0.0005)
    assert [round(speed.tokens_per_second / 1000, 1) for speed in found.speeds] == [8.9, 11.9, 14.9, 17.9]
    assert [round(speed.days, 1) for speed in found.speeds] == [13.0, 9.7, 7.8, 6.5]


def test_eight_devices_share_the_step_and_the_time():
    one, eight = plan(RECIPE, "rtx3060"), plan(RECIPE, "rtx3060", num_processes=8)
    assert eight.grad_accum_steps * 8 == one.grad_accum_steps
    assert eight.speeds[0].days == pytest.approx(one.speeds[0].days / 8)


def test_disk():
    config = TrainConfig(
        training=TrainingConfig(max_steps=1000, checkpoint_every=100),
        checkpoint=CheckpointConfig(keep_last=2, keep_every=500, keep_best=True),
    )
    found = plan(config, "rtx3060")
    assert found.data_bytes == 2 * 1000 * 2**19
    assert found.num_checkpoints == 2 + 2 + 1 + 1  # newest, kept for good, best, being written
    assert plan(TrainConfig(model=GPT2Config(vocab_size=70_000)), "3090").data_bytes == 4 * 19_073 * 2**19


def test_a_device_as_described_and_this_machine():
    described = plan(RECIPE, memory_gib=12, tflops=25.5)
    assert (described.micro_batch_size, described.tflops, described.precision) == (16, 25.5, "bf16")
    assert plan(RECIPE, "3090", memory_gib=12).micro_batch_size == 16
    config = recipe(SMALL)
    here = plan(config, "this")
    assert here.memory_bytes > 0
    assert here.micro_batch_size == 4
    assert "this machine" in here.lines()[1]
    if not torch.cuda.is_available():  # processes on one machine share its memory
        half = plan(config, "this", num_processes=2).memory_bytes
        assert half == pytest.approx(here.memory_bytes / 2, rel=0.25)  # what is free now, which others change


def test_lines_and_json_say_the_same():
    config = TrainConfig(training=TrainingConfig(micro_batch_size=32, activation_checkpointing="none"))
    found = plan(config, "rtx3060")
    text = "\n".join(found.lines())
    for words in (
        "124,439,808 parameters",
        "0.855 GFLOP",
        "25.5 TFLOP/s in bf16",
        "524,288 tokens = 16 windows x 1024 tokens x 32 accumulation steps x 1 process",
        "micro_batch_size 32 does not fit; use 16",
        "14,895 tokens/s,     7.77 days",
    ):
        assert words in text
    for size, said in (
        (7, "7 makes no whole step of 512 windows; use 16"),
        (8, "8 fits too"),
        (20, "20 makes no whole"),
    ):
        config = TrainConfig(training=TrainingConfig(micro_batch_size=size))
        assert any(f"the recipe's micro_batch_size {said}" in line for line in plan(config, "rtx3060").lines()), size
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["micro_batch_size"] == 16
    assert values["memory"]["peak"] == found.memory.peak
    assert values["speeds"][2]["days"] == found.speeds[2].days
    memory = found.memory
    fixed = memory.weights + memory.gradients + memory.moments + memory.saved_activations
    assert memory.peak == fixed + max(memory.logits_chunk, memory.backward_pass)


# Devices


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA GeForce RTX 3060", "bf16", 25.5),  # llm.c, llmc/mfu.h
        ("NVIDIA GeForce RTX 3060", "fp32", 12.7),
        ("NVIDIA GeForce RTX 3090", "fp16", 71.2),  # GA102 whitepaper: 71
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),  # Ada whitepaper: 165.2
        ("NVIDIA GeForce RTX 5090", "bf16", 209.5),  # RTX Blackwell whitepaper: 209.5
        ("NVIDIA GeForce RTX 2080 Ti", "fp16", 53.8),
        ("NVIDIA GeForce RTX 4060 Ti", "bf16", 44.1),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-PCIE-40GB", "fp32", 156.0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("Tesla T4", "fp16", 65.0),
    ],
)
def test_published_peaks(name, precision, tflops):
    assert peak_flops(name, precision) == pytest.approx(tflops * 1e12, rel=0.005)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "bf16"),
        ("NVIDIA GeForce RTX 4090 D", "bf16"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16"),
        ("NVIDIA GeForce GTX 1080", "fp32"),
        ("cpu (x86_64)", "fp32"),
        ("", "bf16"),
        ("Tesla T4", "bf16"),
    ],
)
def test_no_peak_rather_than_a_wrong_one(name, precision):
    assert peak_flops(name, precision) is None


def test_device_keys_are_unique_and_forgiving():
    assert len({device.key for device in DEVICES}) == len(DEVICES)
    wanted = "rtx3060 3060-ti 3090 4060-ti 4070 4090 a100 h100"
    assert [find_device(key).key for key in wanted.split()] == wanted.split()
    assert find_device("RTX 4090") is find_device("rtx4090") is find_device("4090")
    assert find_device("3060") is find_device("rtx3060")
    assert all(device.source for device in DEVICES)
