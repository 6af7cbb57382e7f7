"""The model: its shape, its initial weights, its loss and gradients against the plain ones, and its padding."""

import dataclasses
import math
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from toolkit.config import DataConfig, GPT2Config, TrainConfig, TrainingConfig, gpt2_config
from toolkit.errors import UserError
from toolkit.model import gpt2, product
from toolkit.model.gpt2 import (
    GPT2,
    KVCache,
    canonical_shapes,
    canonical_tensors,
    cut,
    flops_per_token,
    load_canonical,
    num_parameters,
    pad,
)
from toolkit.model.loss import cross_entropy, mean_cross_entropy
from toolkit.training.environment import configure_torch
from toolkit.training.plan import saved_activation_bytes

TINY = GPT2Config(n_layer=2, n_head=2, n_embd=32, context_length=24, vocab_size=257)  # padded to 320 rows


def ids(batch: int = 3, length: int = 24, *, seed: int = 0, vocab_size: int = 257) -> torch.Tensor:
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def some_targets() -> torch.Tensor:
    targets = ids(seed=1)
    targets[0, :3] = -100
    targets[2, 10] = -100
    return targets


def gradients(model: GPT2) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def worst_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert list(ours) == list(theirs)
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


def plain_gradients(config: GPT2Config = TINY) -> tuple[float, dict[str, torch.Tensor]]:
    model = GPT2(config, seed=5)
    loss = F.cross_entropy(model.logits(ids()).flatten(0, 1), some_targets().flatten())
    loss.backward()
    return loss.item(), gradients(model)


# --- shape ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("124M", 124_439_808), ("355M", 354_823_168), ("774M", 774_030_080), ("1558M", 1_557_611_200)],
)
def test_published_sizes(size: str, parameters: int) -> None:
    config = gpt2_config(size)
    assert num_parameters(config) == parameters
    with torch.device("meta"):
        model = GPT2(config)
    assert {name: tuple(tensor.shape) for name, tensor in canonical_tensors(model).items()} == canonical_shapes(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters + 47 * config.n_embd


def test_flops_of_a_token_are_nanogpts() -> None:
    # 6 * (124,439,808 - 786,432) + 12 * 12 * 12 * 64 * 1024
    assert flops_per_token(GPT2Config(), 1024) == 855_166_464
    assert flops_per_token(GPT2Config(), 512) == 798_543_360


def test_parameter_names_and_order_are_those_of_the_published_weights() -> None:
    names = list(canonical_tensors(GPT2(TINY)))
    assert names == list(canonical_shapes(TINY))
    assert names[:3] == ["wte.weight", "wpe.weight", "h.0.ln_1.weight"]
    assert canonical_shapes(TINY)["h.1.attn.c_attn.weight"] == (32, 96)  # (in, out)
    assert "lm_head.weight" not in names


def test_too_long_a_sequence_is_refused_with_both_lengths() -> None:
    with pytest.raises(UserError, match="25 tokens are more than the model's context_length=24"):
        GPT2(TINY, seed=0)(ids(length=25), ids(length=25))


# --- initial weights --------------------------------------------------------------------------------------------------


def test_initial_weights_follow_gpt2() -> None:
    config = GPT2Config(n_layer=8, n_head=2, n_embd=64, context_length=64, vocab_size=1000)
    tensors = canonical_tensors(GPT2(config, seed=1))
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif "ln_" in name:
            assert (tensor == 1).all(), name
        else:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # 1/sqrt(2 * 8 layers) = 1/4
            assert tensor.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(tensor.mean().item()) < 4 * expected / math.sqrt(tensor.numel()), name
    flat = torch.cat([tensors["h.0.attn.c_attn.weight"].flatten(), tensors["h.1.attn.c_attn.weight"].flatten()])
    assert flat.unique().numel() > 0.99 * flat.numel()  # no two tensors share their draws


def test_initial_loss_is_near_uniform() -> None:
    model = GPT2(TINY, seed=1)
    assert model(ids(), ids(seed=1)).item() == pytest.approx(math.log(257), abs=0.3)


def test_initial_weights_are_a_function_of_config_and_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first = canonical_tensors(GPT2(TINY, seed=7))
    torch.manual_seed(123)
    again = canonical_tensors(GPT2(TINY, seed=7))
    other = canonical_tensors(GPT2(TINY, seed=8))
    monkeypatch.setattr("toolkit.model.gpt2.VOCABULARY_MULTIPLE", 128)
    wider = GPT2(TINY, seed=7)
    assert wider.wte.weight.shape == (384, 32)
    for name in first:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], canonical_tensors(wider)[name])
    assert not torch.equal(first["wpe.weight"], other["wpe.weight"])
    assert (wider(ids(), some_targets()) - GPT2(TINY, seed=7)(ids(), some_targets())).abs() < 1e-6


def test_zero_initialised_residual_projections() -> None:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, context_length=24, vocab_size=257, zero_init_residual=True)
    zero, scaled = canonical_tensors(GPT2(config, seed=7)), canonical_tensors(GPT2(TINY, seed=7))
    for name in zero:
        if name.endswith("c_proj.weight"):
            assert not zero[name].any()
        else:
            assert torch.equal(zero[name], scaled[name])


# --- loss and gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 24, 71, 72, 4096])
def test_chunked_loss_and_gradients_are_the_plain_ones(chunk: int) -> None:
    plain_loss, plain = plain_gradients()
    model = GPT2(TINY, seed=5, loss_chunk_tokens=chunk)
    loss = model(ids(), some_targets())
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(plain_loss, rel=1e-6)
    assert worst_difference(gradients(model), plain) < 1e-6


def test_loss_without_gradients_and_token_losses_are_the_plain_ones() -> None:
    model = GPT2(TINY, seed=5, loss_chunk_tokens=7)
    targets = some_targets()
    plain = F.cross_entropy(model.logits(ids()).flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    losses = model.token_losses(ids(), targets)
    assert losses.dtype == torch.float32
    assert not losses.requires_grad
    assert torch.allclose(losses, plain, atol=1e-5)
    assert (losses[targets == -100] == 0).all()
    with torch.no_grad():
        assert model(ids(), targets).item() == pytest.approx((plain.sum() / (targets != -100).sum()).item(), rel=1e-6)


def test_the_incoming_gradient_scales_and_accumulates() -> None:
    _, plain = plain_gradients()
    model = GPT2(TINY, seed=5, loss_chunk_tokens=16)
    (model(ids(), some_targets()) * 3).backward()
    (model(ids(), some_targets()) / 2).backward()
    assert worst_difference(gradients(model), {name: gradient * 3.5 for name, gradient in plain.items()}) < 1e-6


def test_a_second_backward_pass_over_the_same_graph_gives_the_same_gradients() -> None:
    _, plain = plain_gradients()
    model = GPT2(TINY, seed=5, loss_chunk_tokens=16)
    loss = model(ids(), some_targets())
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    assert worst_difference(gradients(model), plain) < 1e-6


def test_all_targets_ignored_is_a_zero_loss_with_zero_gradients() -> None:
    model = GPT2(TINY, seed=5)
    loss = model(ids(), torch.full((3, 24), -100))
    loss.backward()
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("units", [True, False], ids=["units", "no-units"])
@pytest.mark.parametrize("chunk", [16, 4096])
def test_bf16_autocast_stays_close_to_fp32(chunk: int, units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "cpu_has_bf16", lambda: units)
    plain_loss, plain = plain_gradients()
    model = GPT2(TINY, seed=5, loss_chunk_tokens=chunk)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids(), some_targets())
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain_loss, rel=1e-3)
    ours = gradients(model)
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())
    assert worst_difference(ours, plain) < 0.02


def test_the_softmax_of_bf16_logits_is_computed_in_fp32() -> None:
    hidden, weight = torch.randn(40, 16).bfloat16(), torch.randn(64, 16).bfloat16()
    targets = ids(1, 40, vocab_size=60)[0]
    losses = cross_entropy(hidden, weight, targets, vocab_size=60, chunk_tokens=16)
    plain = F.cross_entropy((hidden @ weight.t())[:, :60].float(), targets, reduction="none")
    assert torch.allclose(losses, plain, atol=1e-5)


def test_fp16_gradients_under_a_grad_scaler_neither_vanish_nor_overflow() -> None:
    _, plain = plain_gradients()
    model = GPT2(TINY, seed=5, loss_chunk_tokens=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(ids(), some_targets())
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert worst_difference(gradients(model), plain) < 0.01


@pytest.mark.parametrize("gradients", [True, False])
def test_a_target_too_improbable_for_fp32_has_its_loss_all_the_same(gradients: bool) -> None:
    """Its probability, exp(-300), is 0 in fp32."""
    hidden = torch.tensor([[100.0, 0.0]], requires_grad=gradients)
    weight = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], requires_grad=gradients)
    loss = mean_cross_entropy(hidden, weight, torch.tensor([1]), vocab_size=2, chunk_tokens=16)
    assert loss.item() == 300.0
    if gradients:
        loss.backward()
        assert hidden.grad is not None
        assert hidden.grad.tolist() == [[3.0, 0.0]]


@pytest.mark.parametrize("recomputed_from", [72, 73], ids=["large", "small"])
def test_compiled_whole_model_has_the_plain_loss_and_gradients(
    recomputed_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_torch(torch.device("cpu"), deterministic=False)  # what is recomputed differs with it
    monkeypatch.setattr(gpt2, "RECOMPUTED_FROM", recomputed_from)
    # 72 positions: the last chunk is shorter. fullgraph: a graph break would be an error. One layer: it takes seconds.
    config = dataclasses.replace(TINY, n_layer=1)
    plain_loss, plain = plain_gradients(config)
    model = GPT2(config, seed=5, loss_chunk_tokens=64)
    model.compile(fullgraph=True)
    loss = model(ids(), some_targets())
    loss.backward()
    assert loss.item() == pytest.approx(plain_loss, rel=1e-6)
    compiled = gradients(model)
    assert worst_difference(compiled, plain) < 1e-6
    assert not compiled["wte.weight"][257:].any()
    assert list(canonical_tensors(model)) == list(canonical_shapes(config))  # no _orig_mod in the names
    with torch.no_grad():  # a program of its own, with another softmax
        assert model(ids(), some_targets()).item() == pytest.approx(plain_loss, rel=1e-6)


def test_gradients_are_the_plain_ones_under_ddp_with_no_sync(tmp_path: Path) -> None:
    _, plain = plain_gradients()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = GPT2(TINY, seed=5, loss_chunk_tokens=16)
        wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        with wrapped.no_sync():
            (wrapped(ids(), some_targets()) / 2).backward()
        (wrapped(ids(), some_targets()) / 2).backward()
        assert worst_difference(gradients(model), plain) < 1e-6
    finally:
        # gloo's threads need Python's lock to let go of the last reduction, and a group destroyed meanwhile waits for them
        # with the lock in its hands. `Processes.settle` is of no help here: it does not see DDP's own reductions.
        time.sleep(0.5)
        torch.distributed.destroy_process_group()


def test_dropout_is_drawn_in_training_only_and_checkpointing_repeats_it() -> None:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, context_length=24, vocab_size=257, dropout=0.2)
    results = []
    for mode in ("none", "block"):
        model = GPT2(config, seed=5, activation_checkpointing=mode)  # type: ignore[arg-type]
        torch.manual_seed(11)
        loss = model(ids(), some_targets())
        loss.backward()
        results.append((loss.item(), gradients(model)))
    (loss, plain), (checkpointed_loss, checkpointed) = results
    assert checkpointed_loss == loss
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)
    assert loss != pytest.approx(plain_gradients()[0], rel=1e-6)
    assert model.eval()(ids(), some_targets()).item() == pytest.approx(plain_gradients()[0], rel=1e-6)


def saved_bytes(model: GPT2) -> int:
    """What autograd keeps between forward and backward, parameters aside, each storage once."""
    kept: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids(8), ids(8, seed=1))
    del loss
    return sum(kept.values())


def test_checkpointing_and_chunking_lower_what_autograd_keeps() -> None:
    positions, width = 8 * 24, 32
    none = saved_bytes(GPT2(TINY, seed=5))
    block = saved_bytes(GPT2(TINY, seed=5, activation_checkpointing="block"))
    whole_logits = positions * 320 * 4
    weight_gradient = 320 * width * 4
    assert block < 0.4 * none
    # Each block's input, the two gradients that the loss has computed, and small change: no logits.
    assert block < (2 * 2 + 4) * positions * width * 4 + weight_gradient + whole_logits / 4


def saved_bytes_of_compiled(model: GPT2) -> int:
    """What a model whose forward and backward pass were parted as Inductor's are keeps between them, parameters aside."""
    torch._dynamo.reset()
    model.compile(backend="aot_eager_decomp_partition", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids(8), ids(8, seed=1))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    node = loss.grad_fn
    kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in node.saved_tensors}
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


def test_compilation_keeps_less_than_autograd_and_no_result_of_gelu_or_layer_norm() -> None:
    configure_torch(torch.device("cpu"), deterministic=False)
    positions, width, layers = 8 * 24, 32, 2
    compiled = saved_bytes_of_compiled(GPT2(TINY, seed=5, loss_chunk_tokens=64))
    # In a block, in bf16 elements: two inputs of LayerNorm in fp32 (4), query, key and value (3), the attention's result
    # (1), the GELU's input (4); beside it normalisers, mean and deviation in fp32. Then ln_f's input, the loss's two gradients.
    block = 12 * 2 * positions * width + positions * 4 * (2 + 2 * 2)
    rest = positions * (4 * width + 4 * width + 16) + 320 * width * 4 + 4096
    assert compiled < layers * block + rest
    recipe = TrainConfig(
        model=TINY,
        data=DataConfig(sequence_length=24),
        training=TrainingConfig(tokens_per_step=positions, micro_batch_size=8, loss_chunk_tokens=64),
    )
    assert compiled < 0.8 * saved_activation_bytes(recipe, "bf16", micro_batch_size=8)  # which plan reckons with
    assert saved_bytes_of_compiled(GPT2(TINY, seed=5, loss_chunk_tokens=16)) == compiled  # and nothing of a chunk


def test_of_a_large_micro_batch_compilation_keeps_every_second_input_of_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    configure_torch(torch.device("cpu"), deterministic=False)
    positions, width, layers = 8 * 24, 32, 2
    kept = []
    for recomputed_from in (positions + 1, positions):
        monkeypatch.setattr(gpt2, "RECOMPUTED_FROM", recomputed_from)
        kept.append(saved_bytes_of_compiled(GPT2(TINY, seed=5, loss_chunk_tokens=64)))
    assert kept[0] - kept[1] == layers // 2 * positions * 4 * width * 2


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak; under FakeTensorMode nothing is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.live = self.peak = 0

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result


def peak_bytes_of_a_step(make_model: Callable[[], torch.nn.Module], *, theirs: bool) -> int:
    """The most that is alive during forward and backward of 8 x 1024 tokens in bf16 autocast, two moments included."""
    with FakeTensorMode():
        model = make_model()
        batch = torch.zeros(8, 1024, dtype=torch.int64)
        with LiveBytes() as count:
            for parameter in model.parameters():
                count.add(parameter)
            weights = count.live
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(batch, labels=batch).loss if theirs else model(batch, batch)
            loss.backward()
        return count.peak + 2 * weights


def test_a_step_of_124m_takes_half_the_memory_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "cpu_has_bf16", lambda: True)  # as on a GPU, for which this CPU stands here
    settings = transformers.GPT2Config(
        embd_pdrop=0, attn_pdrop=0, resid_pdrop=0, use_cache=False, attn_implementation="sdpa"
    )
    theirs = peak_bytes_of_a_step(lambda: transformers.GPT2LMHeadModel(settings).train(), theirs=True)
    ours = peak_bytes_of_a_step(lambda: GPT2(GPT2Config()), theirs=False)
    checkpointed = peak_bytes_of_a_step(lambda: GPT2(GPT2Config(), activation_checkpointing="block"), theirs=False)
    assert ours < 0.45 * theirs
    assert checkpointed < 0.55 * ours


# --- padding ----------------------------------------------------------------------------------------------------------


def test_padding_stays_zero_through_training_and_takes_no_part_in_the_softmax() -> None:
    model = GPT2(TINY, seed=5, loss_chunk_tokens=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        model(ids(seed=seed), ids(seed=seed + 1)).backward()
        assert not model.wte.weight.grad[257:].any()
        optimizer.step()
    assert not model.wte.weight[257:].any()
    assert not optimizer.state[model.wte.weight]["exp_avg"][257:].any()
    assert model.logits(ids()).shape == (3, 24, 257)
    loss = model(ids(), some_targets()).item()
    with torch.no_grad():
        model.wte.weight[257:] = 3.0  # were it to take part, the loss would change
    assert model(ids(), some_targets()).item() == loss


def test_cut_and_pad_are_opposites_and_touch_the_embedding_only() -> None:
    moment = torch.randn(257, 32)
    padded = pad("wte.weight", moment, TINY)
    assert padded.shape == (320, 32)
    assert not padded[257:].any()
    assert torch.equal(cut("wte.weight", padded, TINY), moment)
    assert pad("wpe.weight", moment, TINY) is moment
    assert cut("wpe.weight", moment, TINY) is moment


def test_canonical_tensors_are_views_and_loading_them_restores_the_model() -> None:
    source, model = GPT2(TINY, seed=5), GPT2(TINY)
    with torch.no_grad():
        model.wte.weight.fill_(9.0)
    load_canonical(model, canonical_tensors(source))
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), model.parameters(), strict=True))
    canonical_tensors(model)["ln_f.bias"].fill_(2.0)
    assert (model.ln_f.bias == 2).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("ln_f.bias"), "missing ln_f.bias, unknown none"),
        (lambda t: t.update({"module.x": torch.zeros(1)}), "unknown module.x"),
        (
            lambda t: t.update({"ln_f.bias": torch.zeros(31)}),
            r"ln_f.bias is torch.float32 \(31,\) instead of .*\(32,\)",
        ),
        (lambda t: t.update({"ln_f.bias": torch.zeros(32).half()}), "ln_f.bias is torch.float16"),
        (lambda t: t.update({"wte.weight": torch.zeros(320, 32)}), r"wte.weight is torch.float32 \(320, 32\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_changes(change, message: str) -> None:  # type: ignore[no-untyped-def]
    model = GPT2(TINY, seed=5)
    before = {name: tensor.clone() for name, tensor in canonical_tensors(model).items()}
    tensors = {name: tensor + 1 for name, tensor in before.items()}
    change(tensors)
    with pytest.raises(UserError, match=message):
        load_canonical(model, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in canonical_tensors(model).items())


# --- key-value cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [(24,), (1,) * 24, (10, 1, 1, 5, 7), (1, 23)])
def test_cached_logits_equal_uncached_ones(pieces: tuple[int, ...]) -> None:
    model = GPT2(TINY, seed=5).eval()
    expected = model.logits(ids())
    cache = KVCache(model, batch_size=3)
    end = 0
    for piece in pieces:
        end += piece
        logits = model.next_logits(ids()[:, end - piece : end], cache)
        assert torch.allclose(logits, expected[:, end - 1], atol=1e-5)
    with pytest.raises(UserError, match="25 tokens are more"):
        model.next_logits(ids()[:, :1], cache)


def test_the_cache_works_under_autocast() -> None:
    model = GPT2(TINY, seed=5).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = KVCache(model, batch_size=3)
        model.next_logits(ids()[:, :20], cache)
        logits = model.next_logits(ids()[:, 20:], cache)
        assert cache.keys[0].dtype == torch.bfloat16
    assert torch.allclose(logits.float(), model.logits(ids())[:, -1], atol=0.02)


def test_a_gradient_of_the_loss_s_gradient_is_refused_rather_than_wrong() -> None:
    """The loss computes its gradient beforehand, as numbers: a penalty on it would train on nonsense."""
    model = GPT2(TINY, seed=1)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    gains = [model.ln_f.weight, model.ln_f.bias]
    with pytest.raises(UserError, match=r"compute the loss from model\.logits\(input_ids\) by torch's cross_entropy"):
        torch.autograd.grad(model(ids, ids.clone()), gains, create_graph=True)


@pytest.mark.parametrize("target", [-1, -7])
def test_a_negative_target_that_is_not_the_ignored_one_is_refused(target: int) -> None:
    """As in torch's cross_entropy; -1 is what some others ignore."""
    model = GPT2(TINY, seed=1)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    targets = torch.tensor([[0, target, 0, 0]])
    for losses in (model, model.token_losses):
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            losses(ids, targets)


def test_targets_of_another_shape_are_refused() -> None:
    model = GPT2(TINY, seed=1)
    ids, targets = torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int64)
    for losses in (model, model.token_losses):
        with pytest.raises(UserError, match=r"\(3, 8\) and targets of shape \(3, 5\); give one target for each input"):
            losses(ids, targets)
