"""What a step does beside its arithmetic, counted: host synchronisations, collectives, compilations, collections, copies."""

import ctypes
import gc
import json
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.train_demo import CONFIG as DEMO
from tests.support import change, command, environment, flags
from tests.test_launch import TWO
from toolkit.config import GPT2Config, OptimizerConfig, TrainConfig
from toolkit.model.gpt2 import GPT2
from toolkit.training import trainer as trainer_module
from toolkit.training.environment import configure_torch
from toolkit.training.optimizer import build_optimizer
from toolkit.training.trainer import Trainer

# On CUDA each of these waits for the device. Those of Tensor never reach the dispatcher where the tensor is on the CPU.
SYNCHRONISING_OPERATIONS = {
    "aten._local_scalar_dense.default",  # item(), bool(), int(), float(), and item() within C++
    "aten.equal.default",
    "aten.nonzero.default",  # also a mask as an index
    "aten.masked_select.default",
    "aten._unique2.default",
}
SYNCHRONISING_METHODS = {"tolist", "cpu", "numpy", "__array__"}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


# Host synchronisations


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen[str(function)] += 1
        return function(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen[getattr(function, "__name__", "")] += 1
        return function(*args, **(kwargs or {}))


def host_synchronisations(trainer: Trainer) -> Counter[str]:
    """Those of one step; its batches are there already, because reading data is work of the host."""
    trainer.batches = iter([next(trainer.batches) for _ in range(trainer.grad_accum_steps)])
    with Methods() as methods, Operations() as operations:
        trainer.train_step()
    found = Counter({name: count for name, count in operations.seen.items() if name in SYNCHRONISING_OPERATIONS})
    return found + Counter({name: count for name, count in methods.seen.items() if name in SYNCHRONISING_METHODS})


def test_what_synchronises_is_seen_by_the_count() -> None:
    values = torch.arange(3.0)
    with Methods() as methods, Operations() as operations:
        values.sum().item()
        bool(values[0] > 0)
        float(values[1])
        values.tolist()
        values.cpu()
        values.numpy()
        values[values > 1]
    assert operations.seen["aten._local_scalar_dense.default"] == 3
    assert operations.seen["aten.index.Tensor"] + operations.seen["aten.nonzero.default"] >= 1
    assert [methods.seen[name] for name in ("tolist", "cpu", "numpy")] == [1, 1, 1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("micro_batch_size", [8, 1])
def test_a_step_synchronises_with_the_host_once(
    tiny: TrainConfig, micro_batch_size: int, precision: str, optimizer: str
) -> None:
    config = change(
        tiny,
        training={"micro_batch_size": micro_batch_size, "precision": precision},
        optimizer={"name": optimizer},
    )
    with Trainer(config) as trainer:
        trainer.resume()
        assert trainer.grad_accum_steps == 8 // micro_batch_size
        trainer.train_step()  # the first one makes the optimizer's state
        assert host_synchronisations(trainer) == {"tolist": 1}


# Kernels


def test_muon_launches_no_more_kernels_for_more_layers() -> None:
    counts = []
    for n_layer in (2, 6):
        model = GPT2(GPT2Config(n_layer=n_layer, n_head=2, n_embd=16, context_length=8, vocab_size=17), seed=1)
        optimizer = build_optimizer(model, OptimizerConfig(name="muon"), device_type="cpu")
        ids = torch.zeros((1, 8), dtype=torch.int64)
        model(ids, ids).backward()
        optimizer.step()  # makes the state
        with Operations() as operations:
            optimizer.step()
        counts.append(operations.seen.total() - operations.seen["aten.detach.default"])
    assert counts[0] == counts[1]


# Collectives

WORKER = """
import json, sys
from collections import Counter
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from recipes.train_demo import CONFIG
from toolkit.recipe import parse
from toolkit.training.trainer import Trainer

class Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen, self.micro_step = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.seen.append([str(function), self.micro_step])
        return function(*args, **(kwargs or {}))

out, *arguments = sys.argv[1:]
with Trainer(parse(CONFIG, arguments)) as trainer:
    trainer.resume()
    during = []  # storages of the gradients before each micro-batch of the first steps
    watching = trainer.raw_model.register_forward_pre_hook(
        lambda *_: during.append(len({p.grad.untyped_storage().data_ptr() for p in trainer.parameters}))
    )
    for _ in range(2):  # DDP lays out its buckets anew after the first
        trainer.train_step()
    watching.remove()
    facts = {"accumulation": trainer.grad_accum_steps, "processes": trainer.processes.count}
    facts["gradient_as_bucket_view"] = trainer.model.gradient_as_bucket_view
    facts["static_graph"] = trainer.model.static_graph
    storages = set()
    trainer.raw_optimizer.register_step_pre_hook(
        lambda *_: storages.update(p.grad.untyped_storage().data_ptr() for p in trainer.parameters)
    )
    with Collectives() as collectives:
        trainer.raw_model.register_forward_pre_hook(
            lambda *_: setattr(collectives, "micro_step", collectives.micro_step + 1)
        )
        trainer.train_step()
    facts |= {"collectives": collectives.seen, "gradient_storages": len(storages), "during": during}
    if trainer.is_main:
        Path(out).write_text(json.dumps(facts))
"""


def test_gradients_are_reduced_in_the_last_micro_batch_alone_and_the_step_once(
    tiny: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    config = change(tiny, training={"micro_batch_size": 1})
    done = command(
        str(tmp_path / "worker.py"),
        str(tmp_path / "facts.json"),
        *flags(config, DEMO),
        launch=TWO,
        env=environment(OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads((tmp_path / "facts.json").read_text())
    assert (facts["processes"], facts["accumulation"]) == (2, 4)
    # A model of 30,000 parameters fits into one bucket; the other reduction is that of the step's few numbers.
    assert facts["collectives"] == [["c10d.allreduce_.default", 4]] * 2
    # Gradients are views into the buckets: they exist once. A static graph would fail under no_sync.
    assert facts["gradient_as_bucket_view"] is True
    assert facts["gradient_storages"] == 1
    assert facts["during"] == [1] * 8
    assert facts["static_graph"] is False


# Compilations


def assert_compiled_once(config: TrainConfig) -> None:
    """One graph in the first two steps, and nothing compiled in those after them, in validations and samples."""
    # 9 validation windows in batches of 4: the last one is shorter.
    config = change(config, evaluation={"max_tokens": 9 * 32, "micro_batch_size": 4})
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with Trainer(config) as trainer:
        assert trainer.compiled
        trainer.resume()
        for _ in range(2):
            trainer.train_step()
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
        frames = dict(counters["frames"])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                assert trainer.evaluate() is not None
                trainer.train_step()
                trainer.sample()
                trainer.train_step()
    assert counters["stats"]["unique_graphs"] == 1
    assert dict(counters["frames"]) == frames


def test_nothing_is_compiled_again_after_the_second_step(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_FAILPOINTS", "trainer.trial=sleep:0")  # as on a GPU, where memory is tried first
    assert_compiled_once(change(tiny, model={"n_layer": 1}, training={"compile": "on", "precision": "bf16"}))


# Memory and garbage


def live_tensors() -> list[torch.Tensor]:
    """All tensors that Python can reach, also those that the trainer hides from collections."""
    gc.unfreeze()
    return [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    storages = [tensor.untyped_storage() for tensor in live_tensors()]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(("precision", "compiled"), [("fp32", "off"), ("bf16", "off"), ("fp32", "on")])
def test_weights_gradients_and_moments_exist_once(tiny: TrainConfig, precision: str, compiled: str) -> None:
    config = change(tiny, model={"n_layer": 1, "n_embd": 128}, training={"precision": precision, "compile": compiled})
    gc.collect()
    _others = live_tensors()  # of earlier tests: held, so that none is freed while this one counts
    before = live_bytes()
    with Trainer(config) as trainer:
        trainer.resume()
        weights = sum(parameter.nbytes for parameter in trainer.parameters)
        held: list[int] = []

        def note() -> None:
            if gc.isenabled():  # in the first step alone: what its compilation has dropped is held by nobody
                gc.collect()
            held.append(live_bytes() - before)

        trainer.raw_optimizer.register_step_pre_hook(lambda *_: note())
        for _ in range(3):
            trainer.train_step()
            note()
    slack = 0.1 * weights  # batches, the optimizer's counters
    # Weights, gradients and two moments, from the first step on; between steps there are no gradients.
    assert held == pytest.approx([4 * weights, 3 * weights] * 3, abs=slack)


def test_garbage_is_collected_in_step_and_never_in_between(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "GARBAGE_EVERY", 3)
    collected_at: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            collected_at.append(trainer.step)

    with Trainer(tiny) as trainer:
        trainer.resume()
        assert gc.get_freeze_count() > 10_000  # torch and all that was imported: no collection looks at them
        assert gc.isenabled()  # for the first step, which may compile
        trainer.train_step()
        gc.callbacks.append(note)
        try:
            for _ in range(6):
                trainer.train_step()
            assert not gc.isenabled()
        finally:
            gc.callbacks.remove(note)
    assert collected_at == [1, 3, 6]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


class AllocatorCounts(ctypes.Structure):
    """What glibc's mallinfo2 returns: ten counts, of which hblkhd is the bytes of blocks that have mappings of their own."""

    _fields_ = [("before", ctypes.c_size_t * 4), ("hblkhd", ctypes.c_size_t), ("after", ctypes.c_size_t * 5)]


def mapped_bytes() -> int:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = AllocatorCounts
    return int(mallinfo2().hblkhd)


def huge_pages() -> str:
    """To whom the kernel gives huge pages: "always" to all, "madvise" to those who ask, "never" to nobody."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text().split("[")[1].split("]")[0] if setting.exists() else "never"


def huge_bytes() -> int:
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) * 1024 for row in rows if row.startswith("AnonHugePages:"))


def print_memory_of_steps(data: str, run: str) -> None:
    """As JSON: bytes that have mappings when each of three steps is about to go backward beyond those at the beginning, the
    bytes that are then in huge pages, and the pages that each step faulted in."""
    config = change(
        DEMO,
        run={"dir": run},
        model={"n_embd": 256},
        data={"path": (data,), "sequence_length": 32},
        training={"tokens_per_step": 2048, "micro_batch_size": 64, "compile": "off"},
        wandb={"mode": "disabled"},
    )
    mapped, huge, faults = [], [], []
    with Trainer(config) as trainer:
        trainer.resume()
        before = mapped_bytes()
        trainer.raw_model.register_forward_hook(lambda *_: mapped.append(mapped_bytes() - before))
        trainer.raw_model.register_forward_hook(lambda *_: huge.append(huge_bytes()))
        for _ in range(3):
            faulted = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            trainer.train_step()
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faulted)
    print(json.dumps({"mapped": mapped, "huge": huge, "faults": faults}))


ACTIVATIONS = 4 * (2048 * 1024) * 4  # bytes of GELU's inputs alone, in 4 layers


def memory_of_steps(data: Path, run: Path, **variables: str) -> dict[str, list[int]]:
    code = f"import tests.test_step_costs as t; t.print_memory_of_steps({str(data)!r}, {str(run)!r})"
    done = command("-c", code, env=environment() | variables)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="a setting of glibc")


@glibc
@pytest.mark.skipif(huge_pages() == "never", reason="this kernel has no huge pages to give")
def test_large_tensors_are_in_huge_pages(data_dir: Path, tmp_path: Path) -> None:
    assert memory_of_steps(data_dir, tmp_path / "run")["huge"][0] > ACTIVATIONS


@glibc
@pytest.mark.skipif(huge_pages() == "always", reason="counts pages of 4 KiB")
def test_freed_memory_is_kept_from_the_second_step_on(data_dir: Path, tmp_path: Path) -> None:
    """In the first step large blocks have mappings of their own, so that what it leaves for good does not lie between."""
    found = memory_of_steps(data_dir, tmp_path / "run", THP_MEM_ALLOC_ENABLE="0")
    assert found["huge"] == [0, 0, 0]  # one's own setting holds
    assert found["mapped"][0] > 2 * ACTIVATIONS
    # What stays mapped are the libraries' own buffers of the first step.
    assert found["mapped"][1] == found["mapped"][2] < ACTIVATIONS
    assert found["faults"][0] > 2 * ACTIVATIONS / 4096
    assert found["faults"][2] < found["faults"][0] / 16


# What only CUDA shows: that it is asked for


def test_fp32_products_on_cuda_use_tensor_cores() -> None:
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        configure_torch(torch.device("cuda"), deterministic=False)
        assert [backend.allow_tf32 for backend in backends] == [True, True]
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def test_adamw_on_cuda_is_fused() -> None:
    model = GPT2(DEMO.model, seed=1)
    optimizer = build_optimizer(model, OptimizerConfig(), device_type="cuda")
    assert all(group["fused"] for group in optimizer.param_groups)


def test_batches_are_pinned_for_cuda_and_copied_without_waiting(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    real = trainer_module.training_loader

    def spy(*args: Any, pin_memory: bool, **kwargs: Any) -> Any:
        asked.append(pin_memory)
        return real(*args, pin_memory=False, **kwargs)  # pinning needs a device

    monkeypatch.setattr(trainer_module, "training_loader", spy)
    with Trainer(tiny) as trainer:
        trainer.resume()
        assert trainer.accelerator.non_blocking
        assert next(trainer.batches)["input_ids"].shape == (2, 32)
        monkeypatch.setattr(trainer, "device", torch.device("cuda"))
        trainer._start_loader()
        monkeypatch.setattr(trainer, "device", torch.device("cpu"))
    assert asked == [False, True]
