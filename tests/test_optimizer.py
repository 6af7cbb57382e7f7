"""AdamW and Muon: groups, rates, the update against a reference, state by name, and resuming to the bit."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch

from toolkit.config import GPT2Config, OptimizerConfig
from toolkit.errors import UserError
from toolkit.model.gpt2 import GPT2
from toolkit.training.muon import orthogonalize
from toolkit.training.optimizer import (
    allocate_state,
    build_optimizer,
    load_optimizer,
    optimizer_scalars,
    optimizer_tensors,
    set_learning_rate,
    total_norm,
)

TINY = GPT2Config(n_layer=2, n_head=2, n_embd=32, context_length=16, vocab_size=50)  # 14 rows of padding
NUM_STEPS = 8
OVERFLOWS = (2, 5)  # steps whose gradients hold an infinity when a GradScaler is there to skip them


def build(name="adamw", seed=1, **fields):
    model = GPT2(TINY, seed=seed)
    return model, build_optimizer(model, OptimizerConfig(name=name, **fields), device_type="cpu")


def backward(model, step, scaler=None):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, TINY.vocab_size, (4, 17), generator=generator)
    loss = model(ids[:, :-1], ids[:, 1:])
    (scaler.scale(loss) if scaler else loss).backward()
    return loss.item()


def train(model, optimizer, steps, scaler):
    """The losses, in hex, of these steps as the trainer takes them: scale, unscale, clip, step, update."""
    losses = []
    for step in steps:
        set_learning_rate(optimizer, (step + 1) / NUM_STEPS)
        losses.append(backward(model, step, scaler).hex())
        if scaler.is_enabled() and step in OVERFLOWS:
            model.wpe.weight.grad[0, 0] = math.inf
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return losses


def grad_scaler(enabled):
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3, enabled=enabled)


def save(model, optimizer):
    """Copies of the state, the JSON part as a file would give it back."""
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, model).items()}
    return tensors, json.loads(json.dumps(optimizer_scalars(optimizer), allow_nan=False))


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal_tensors(ours, theirs):
    assert list(ours) == list(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_the_total_norm_is_right_to_a_millionth_for_large_tensors_too():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((3000, 4000), (7,), (), (5, 40))]
    tensors[0] = tensors[0].t()  # not in one piece
    exact = torch.cat([tensor.double().flatten() for tensor in tensors]).norm().item()
    assert total_norm(tensors).item() == pytest.approx(exact, rel=2e-6)
    assert total_norm(iter([])).item() == 0
    halves = [tensor.bfloat16() for tensor in tensors[1:]]
    assert total_norm(halves) == torch.nn.utils.get_total_norm(halves)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_the_total_norm_is_finite_if_every_number_is(number):
    assert total_norm([torch.ones(9), torch.zeros(3)]).item() == 3
    assert not total_norm([torch.ones(9), torch.tensor([0.0, number])]).isfinite()


# Groups and rates


def test_decay_groups_of_gpt2_124m_have_the_published_sizes():
    with torch.device("meta"):
        model = GPT2(GPT2Config())
    groups = build_optimizer(model, OptimizerConfig(), device_type="cpu").param_groups
    sizes = {g["name"]: (len(g["params"]), sum(p.numel() for p in g["params"]), g["weight_decay"]) for g in groups}
    assert sizes == {"decay": (50, 124_354_560, 0.1), "no_decay": (98, 121_344, 0.0)}


def test_settings_reach_the_optimizer():
    _, optimizer = build(learning_rate=3e-4, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)
    for group in optimizer.param_groups:
        assert (group["peak_learning_rate"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.9), 1e-6)
        assert group["fused"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_learning_rate_multiplies_each_groups_own_peak():
    _, optimizer = build("muon", learning_rate=0.004, muon_learning_rate=0.02)
    assert set_learning_rate(optimizer, 0.25) == 0.001
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"muon": 0.005, "muon_qkv": 0.005, "decay": 0.001, "no_decay": 0.001}
    set_learning_rate(optimizer, 1.0)  # not compounded
    assert {group["lr"] for group in optimizer.param_groups} == {0.02, 0.004}


def test_muon_takes_the_blocks_matrices_and_adamw_everything_else():
    model, optimizer = build("muon")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = {group["name"]: [names[id(p)] for p in group["params"]] for group in optimizer.param_groups}
    blocks = [f"h.{layer}." for layer in range(TINY.n_layer)]
    single = ("attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    assert members["muon"] == [block + name for block in blocks for name in single]
    assert members["muon_qkv"] == [block + "attn.c_attn.weight" for block in blocks]
    assert members["decay"] == ["wte.weight", "wpe.weight"]
    assert sum(map(len, members.values())) == len(names)
    assert all(
        names[id(p)].endswith(("bias", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
        for g in optimizer.param_groups
        if g["name"] == "no_decay"
        for p in g["params"]
    )


def test_muon_on_a_model_without_matrices_is_refused():
    with pytest.raises(UserError, match=r"optimizer.name=muon needs matrices .* use --optimizer.name adamw"):
        build_optimizer(torch.nn.LayerNorm(4), OptimizerConfig(name="muon"), device_type="cpu")


# The update


def test_adamw_update_is_the_textbook_one():
    """Loshchilov & Hutter 2019, algorithm 2, in float64; decay on the matrices alone."""
    model, optimizer = build(learning_rate=1e-2, weight_decay=0.5)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(1, 4):
        set_learning_rate(optimizer, 1 / step)
        backward(model, step)
        for name, parameter in model.named_parameters():
            rate, gradient = 1e-2 / step, parameter.grad.double()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            decayed = expected[name] * (1 - rate * (0.5 if parameter.ndim == 2 else 0.0))
            root = (second[name] / (1 - 0.95**step)).sqrt() + 1e-8
            expected[name] = decayed - rate * first[name] / (1 - 0.9**step) / root
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "factor"), [("attn.c_attn", 1), ("attn.c_proj", 1), ("mlp.c_fc", 2), ("mlp.c_proj", 1)]
)
def test_muon_update_is_orthogonal_with_the_rate_factor_of_the_out_in_layout(name, factor):
    """Singular values of an update are rate * sqrt(max(1, out/in)) * about 1, for query, key and value each."""
    model, optimizer = build("muon", muon_learning_rate=1.0, muon_weight_decay=0.0)
    parameter = model.get_parameter(f"h.0.{name}.weight")
    before = parameter.detach().clone()
    backward(model, 0)
    gradient = parameter.grad.clone()
    optimizer.step()
    update = before - parameter.detach()
    parts = 3 if name == "attn.c_attn" else 1
    for part, part_gradient in zip(update.chunk(parts, dim=1), gradient.chunk(parts, dim=1), strict=True):
        values = torch.linalg.svdvals(part)[:-4] / factor  # five steps leave the smallest singular values behind
        assert 0.4 < values.min() < values.max() < 1.3
        left, _, right = torch.linalg.svd(part_gradient, full_matrices=False)
        # Jordan et al. 2024: the update points where the nearest semi-orthogonal matrix does.
        assert torch.nn.functional.cosine_similarity(part.flatten(), (left @ right).flatten(), dim=0) > 0.9


def test_muon_equals_torchs_own_on_transposed_copies():
    """Two steps with momentum and decay of torch.optim.Muon on (out, in) leaves, and of our optimizer on (in, out)."""
    model, optimizer = build("muon", muon_learning_rate=0.05, muon_momentum=0.8, muon_weight_decay=0.1)
    projection = model.h[1].mlp.c_fc.weight
    qkv = model.h[1].attn.c_attn.weight
    leaves = [torch.nn.Parameter(t.T.clone()) for t in (projection.detach(), *qkv.detach().chunk(3, dim=1))]
    reference = torch.optim.Muon(leaves, lr=0.05, momentum=0.8, weight_decay=0.1)
    for step in range(2):
        backward(model, step)
        for leaf, gradient in zip(leaves, (projection.grad, *qkv.grad.chunk(3, dim=1)), strict=True):
            leaf.grad = gradient.T.clone()
        reference.step()
        optimizer.step()
        optimizer.zero_grad()
    # Not bitwise: torch iterates in bf16, we in fp32 on a CPU.
    torch.testing.assert_close(projection, leaves[0].T, rtol=0, atol=3e-3)
    torch.testing.assert_close(qkv, torch.cat([leaf.T for leaf in leaves[1:]], dim=1), rtol=0, atol=3e-3)


@pytest.mark.parametrize("shape", [(2, 24, 24), (2, 24, 96), (2, 96, 24)], ids=["square", "wide", "tall"])
@pytest.mark.parametrize("rank", [24, 2])
def test_newton_and_schulz_apply_the_published_polynomial_to_the_singular_values(shape, rank):
    """Against x <- a x + b x^3 + c x^5 of the singular values in float64; the scale of a matrix does not matter."""
    generator = torch.Generator().manual_seed(1)
    count, rows, columns = shape
    matrices = torch.randn((count, rows, rank), generator=generator) @ torch.randn((rank, columns), generator=generator)
    matrices[1] *= 1e-4
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    values = values / values.norm(dim=1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = left @ torch.diag_embed(values) @ right
    result = orthogonalize(matrices, coefficients=(3.4445, -4.7750, 2.0315), steps=5, eps=1e-7)
    for one, exact in zip(result.double(), expected, strict=True):
        assert (one - exact).norm() < 1e-4 * exact.norm()


def test_muon_updates_the_same_in_batches_of_any_size(monkeypatch):
    def updated():
        model, optimizer = build("muon")
        for step in range(2):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        return weights(model)

    together = updated()
    monkeypatch.setattr("toolkit.training.muon._BATCH_ELEMENTS", 1)  # one matrix after the other
    for name, alone in updated().items():
        torch.testing.assert_close(alone, together[name], rtol=1e-5, atol=1e-6)


def test_muon_leaves_a_matrix_without_gradient_as_it_is():
    model, optimizer = build("muon")
    backward(model, 0)
    kept = model.h[0].mlp.c_fc.weight
    kept.grad = None
    before = weights(model)
    optimizer.step()
    changed = [name for name, weight in weights(model).items() if not torch.equal(weight, before[name])]
    assert set(before) - set(changed) == {"h.0.mlp.c_fc.weight"}
    assert kept not in optimizer.state


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_lowers_the_loss_and_leaves_the_padding_at_zero(name):
    model, optimizer = build(name, learning_rate=1e-2)
    losses = []
    for _ in range(25):
        losses.append(backward(model, 0))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    assert model.wte.weight.shape[0] == 64
    assert not model.wte.weight[TINY.vocab_size :].any()


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, str(Path(sys.argv[1]).parent))
from test_optimizer import TINY, build, grad_scaler

rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2)
model, optimizer = build("muon")
wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
for step in range(3):
    ids = torch.randint(0, TINY.vocab_size, (4, 17), generator=torch.Generator().manual_seed(step)).chunk(2)[rank]
    wrapped(ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()
flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
both = [torch.empty_like(flat) for _ in range(2)]
dist.all_gather(both, flat)
assert torch.equal(*both), "the processes have drifted apart"
alone, optimizer = build("muon")
for step in range(3):
    ids = torch.randint(0, TINY.vocab_size, (4, 17), generator=torch.Generator().manual_seed(step))
    alone(ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()
expected = torch.cat([parameter.detach().flatten() for parameter in alone.parameters()])
print("difference", float((flat - expected).norm() / expected.norm()), flush=True)
dist.destroy_process_group()
"""


def test_muon_under_ddp_is_muon_on_the_whole_batch(tmp_path):
    """Both processes end with equal bits, close to one process's: averaging rounds otherwise."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, __file__, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert float(output.split()[-1]) < 1e-5  # 2e-6 seen; 0.07 where both see the same half of the batch


# State by name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_is_named_after_the_parameters_and_cut_to_the_vocabulary(name):
    model, optimizer = build(name)
    assert optimizer_tensors(optimizer, model) == {}  # nothing before the first update
    backward(model, 0)
    optimizer.step()
    tensors = optimizer_tensors(optimizer, model)
    expected = {}
    for parameter_name, parameter in model.named_parameters():
        shape = (TINY.vocab_size, TINY.n_embd) if parameter_name == "wte.weight" else tuple(parameter.shape)
        if name == "muon" and parameter_name.startswith("h.") and parameter.ndim == 2:
            expected[f"{parameter_name}|momentum_buffer"] = shape
        else:
            expected |= {f"{parameter_name}|{key}": shape for key in ("exp_avg", "exp_avg_sq")}
            expected[f"{parameter_name}|step"] = ()
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert {tensor.item() for key, tensor in tensors.items() if key.endswith("|step")} == {1.0}
    scalars = optimizer_scalars(optimizer)
    assert json.loads(json.dumps(scalars, allow_nan=False)) == scalars


@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "grad-scaler"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(name, scaled):
    model, optimizer = build(name)
    losses = train(model, optimizer, range(NUM_STEPS), grad_scaler(scaled))
    final_state, final_scalars = save(model, optimizer)
    for cut_at in (0, 1, 3, 6, NUM_STEPS):  # 3 and 6: right after a skipped step
        model_a, optimizer_a = build(name)
        scaler_a = grad_scaler(scaled)
        before = train(model_a, optimizer_a, range(cut_at), scaler_a)
        tensors, scalars = save(model_a, optimizer_a)

        model_b, optimizer_b = build(name, seed=99)
        model_b.load_state_dict(weights(model_a))
        optimizer_b.load_state_dict(optimizer_b.state_dict())  # as Accelerate's prepare does
        load_optimizer(optimizer_b, model_b, tensors, scalars)
        scaler_b = grad_scaler(scaled)
        scaler_b.load_state_dict(scaler_a.state_dict())
        assert before + train(model_b, optimizer_b, range(cut_at, NUM_STEPS), scaler_b) == losses
        assert_equal_tensors(weights(model_b), weights(model))
        assert_equal_tensors(optimizer_tensors(optimizer_b, model_b), final_state)
        assert optimizer_scalars(optimizer_b) == final_scalars


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_with_an_infinity_changes_nothing_under_a_grad_scaler(name):
    model, optimizer = build(name)
    scaler = grad_scaler(True)
    train(model, optimizer, range(2), scaler)
    before, (state, _), scale = weights(model), save(model, optimizer), scaler.get_scale()
    train(model, optimizer, [2], scaler)
    assert_equal_tensors(weights(model), before)
    assert_equal_tensors(optimizer_tensors(optimizer, model), state)
    assert scaler.get_scale() == scale / 2
    train(model, optimizer, [3], scaler)
    assert all(not torch.equal(value, before[key]) for key, value in weights(model).items())


def test_gradients_are_unscaled_once():
    """A GradScaler's factor leaves no trace in the weights: exact for a power of two."""
    for name in ("adamw", "muon"):
        plain, scaled = build(name), build(name)
        train(*plain, range(2), torch.amp.GradScaler("cpu", enabled=False))
        train(*scaled, range(2), torch.amp.GradScaler("cpu", init_scale=2.0**4))
        assert_equal_tensors(weights(scaled[0]), weights(plain[0]))


def test_state_dict_holds_both_algorithms_and_comes_back():
    model, optimizer = build("muon")
    train(model, optimizer, range(2), grad_scaler(False))
    model_b, optimizer_b = build("muon")
    model_b.load_state_dict(weights(model))
    optimizer_b.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in ((model, optimizer), (model_b, optimizer_b)):
        train(*pair, range(2, 4), grad_scaler(False))
    assert_equal_tensors(weights(model_b), weights(model))


def test_an_optimizer_in_use_is_loaded_too():
    """Going back to a checkpoint within one process."""
    model, optimizer = build()
    train(model, optimizer, range(2), grad_scaler(False))
    (tensors, scalars), values = save(model, optimizer), weights(model)
    losses = train(model, optimizer, range(2, 5), grad_scaler(False))
    model.load_state_dict(values)
    load_optimizer(optimizer, model, tensors, scalars)
    assert train(model, optimizer, range(2, 5), grad_scaler(False)) == losses


# What is refused


def drop(tensors, scalars):
    del tensors["h.1.mlp.c_fc.bias|exp_avg_sq"]


def add(tensors, scalars):
    tensors["module.wte.weight|exp_avg"] = torch.zeros(50, 32)


def reshape(tensors, scalars):
    tensors["wpe.weight|exp_avg"] = tensors["wpe.weight|exp_avg"].T.contiguous()


def halve(tensors, scalars):
    tensors["ln_f.bias|exp_avg"] = tensors["ln_f.bias|exp_avg"].half()


def leave_padding(tensors, scalars):
    tensors["wte.weight|exp_avg"] = torch.zeros(64, 32)


def count_badly(tensors, scalars):
    tensors["wte.weight|step"] = torch.tensor(float("nan"))


def change_beta(tensors, scalars):
    scalars["groups"]["decay"]["betas"] = [0.9, 0.999]


def lose_group(tensors, scalars):
    del scalars["groups"]["no_decay"]


def empty_scalars(tensors, scalars):
    scalars.clear()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"h\.1\.mlp\.c_fc\.bias\|exp_avg_sq is missing"),
        (add, r"module\.wte\.weight\|exp_avg is not expected"),
        (reshape, r"wpe\.weight\|exp_avg is torch\.float32 \(32, 16\), expected torch\.float32 \(16, 32\)"),
        (halve, r"ln_f\.bias\|exp_avg is torch\.float16"),
        (leave_padding, r"wte\.weight\|exp_avg is torch\.float32 \(64, 32\), expected torch\.float32 \(50, 32\)"),
        (count_badly, r"wte\.weight\|step=nan is not a number of updates"),
        (change_beta, r"group decay was trained with betas=\[0\.9, 0\.999\], not \[0\.9, 0\.95\]"),
        (lose_group, r"parameter groups \['decay'\], expected \['decay', 'no_decay'\]"),
        (empty_scalars, r"parameter groups None"),
    ],
)
def test_state_that_does_not_fit_is_refused_before_anything_changes(damage, message):
    model, optimizer = build()
    train(model, optimizer, range(2), grad_scaler(False))
    tensors, scalars = save(model, optimizer)
    damage(tensors, scalars)
    model_b, optimizer_b = build()
    train(model_b, optimizer_b, range(1), grad_scaler(False))
    state, _ = save(model_b, optimizer_b)
    with pytest.raises(UserError, match=message) as error:
        load_optimizer(optimizer_b, model_b, tensors, scalars)
    assert "\n" not in str(error.value)
    assert_equal_tensors(optimizer_tensors(optimizer_b, model_b), state)


def test_state_of_the_other_optimizer_is_refused():
    model, optimizer = build("muon")
    train(model, optimizer, range(1), grad_scaler(False))
    tensors, scalars = save(model, optimizer)
    model_b, optimizer_b = build("adamw")
    with pytest.raises(UserError, match=r"another --optimizer\.name"):
        load_optimizer(optimizer_b, model_b, tensors, scalars)


def test_another_peak_learning_rate_is_no_hindrance():
    """A branch of a run may anneal from another rate; the state means the same."""
    model, optimizer = build()
    train(model, optimizer, range(1), grad_scaler(False))
    model_b, optimizer_b = build(learning_rate=1e-4)
    load_optimizer(optimizer_b, model_b, *save(model, optimizer))
    assert set_learning_rate(optimizer_b, 1.0) == 1e-4


def test_state_from_before_the_first_update_empties_an_optimizer_in_use():
    model, optimizer = build()
    fresh = save(model, optimizer)
    train(model, optimizer, range(1), grad_scaler(False))
    load_optimizer(optimizer, model, *fresh)
    assert optimizer_tensors(optimizer, model) == {}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_made_before_the_first_step_is_the_state_that_the_step_makes(name):
    model, optimizer = build(name)
    losses = train(model, optimizer, range(3), grad_scaler(False))
    early_model, early = build(name)
    allocate_state(early)
    made = {key: tensor.data_ptr() for key, tensor in optimizer_tensors(early, early_model).items()}
    assert not any(tensor.any() for tensor in optimizer_tensors(early, early_model).values())
    assert train(early_model, early, range(3), grad_scaler(False)) == losses
    allocate_state(early)  # again: changes nothing
    assert {key: tensor.data_ptr() for key, tensor in optimizer_tensors(early, early_model).items()} == made
    assert_equal_tensors(optimizer_tensors(early, early_model), optimizer_tensors(optimizer, model))
    assert_equal_tensors(weights(early_model), weights(model))
    for parameter, twin in zip(early_model.parameters(), model.parameters(), strict=True):
        for key, tensor in optimizer.state[twin].items():
            ours = early.state[parameter][key]
            assert (ours.dtype, ours.shape, ours.device) == (tensor.dtype, tensor.shape, tensor.device), key


def test_a_parameter_that_no_step_has_moved_is_saved_and_resumed():
    model, optimizer = build()
    allocate_state(optimizer)
    backward(model, 0)
    model.wpe.weight.grad = None
    optimizer.step()
    other, resumed = build(seed=99)
    load_optimizer(resumed, other, *save(model, optimizer))
    assert_equal_tensors(optimizer_tensors(resumed, other), optimizer_tensors(optimizer, model))


def test_state_of_an_optimizer_of_ones_own_is_left_to_it():
    model = GPT2(TINY, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    allocate_state(optimizer)
    assert not optimizer.state


OWN_OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),  # two scalars and two moments
}


@pytest.mark.parametrize("name", OWN_OPTIMIZERS)
def test_an_optimizer_of_ones_own_is_scheduled_saved_and_resumed_to_the_bit(name):
    def start(seed=1):
        model = GPT2(TINY, seed=seed)
        return model, OWN_OPTIMIZERS[name](model.parameters())

    model, optimizer = start()
    losses = train(model, optimizer, range(6), grad_scaler(False))
    assert optimizer.param_groups[0]["lr"] == 6 / NUM_STEPS * (0.01 if name == "nadam" else 0.1)
    model_a, optimizer_a = start()
    before = train(model_a, optimizer_a, range(3), grad_scaler(False))
    model_b, optimizer_b = start(seed=99)
    model_b.load_state_dict(weights(model_a))
    load_optimizer(optimizer_b, model_b, *save(model_a, optimizer_a))
    assert before + train(model_b, optimizer_b, range(3, 6), grad_scaler(False)) == losses
    assert_equal_tensors(weights(model_b), weights(model))


def test_state_that_has_no_place_in_a_checkpoint_is_refused_by_name():
    model = GPT2(TINY, seed=1)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)  # row and column statistics
    train(model, optimizer, range(1), grad_scaler(False))
    with pytest.raises(UserError, match=r"Adafactor keeps 'row_var' for wte\.weight, which is neither"):
        optimizer_tensors(optimizer, model)
