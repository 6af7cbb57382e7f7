"""Products in autocast's data type: what they compute, and in which arithmetic, with and without instructions for bf16."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import exact_attention
from toolkit.config import GPT2Config
from toolkit.model import product
from toolkit.model.attention import attention
from toolkit.model.gpt2 import GPT2, KVCache
from toolkit.model.product import affine, multiply, operand

BF16_ROUNDING = 2.0**-8  # relative, of one number
TINY = GPT2Config(n_layer=2, n_head=2, n_embd=32, context_length=24, vocab_size=257)
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
AMX = "amx_bf16"
FUSED_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"  # and _backward


@pytest.fixture(params=[True, False], ids=["units", "no-units"])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A CPU with instructions for bf16 and one without."""
    monkeypatch.setattr(product, "cpu_has_bf16", lambda: request.param)
    return bool(request.param)


def autocast(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().bfloat16().double()


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor) -> None:
    """bf16's rounding of each number, and of the largest ones where a sum cancels."""
    assert torch.all((found.double() - exact).abs() <= BF16_ROUNDING * exact.abs() + 1e-4 * exact.abs().max())


@pytest.mark.usefixtures("has_bf16")
@pytest.mark.parametrize("with_bias", [True, False])
def test_operands_and_results_are_rounded_to_bf16_and_the_sums_are_not(with_bias: bool) -> None:
    rows = normal(2, 20, 300, seed=1).requires_grad_()
    weight, bias = normal(300, 70, seed=2).requires_grad_(), normal(70, seed=3).requires_grad_()
    with autocast():
        out = affine(rows, weight, bias if with_bias else None)
    assert out.dtype == torch.bfloat16
    assert_rounded_once(out, rounded(rows) @ rounded(weight) + (rounded(bias) if with_bias else 0))
    incoming = normal(2, 20, 70, seed=4)
    out.backward(incoming)
    assert rows.grad is not None
    assert weight.grad is not None
    assert {rows.grad.dtype, weight.grad.dtype} == {torch.float32}
    grad = rounded(incoming)
    assert_rounded_once(rows.grad, grad @ rounded(weight).t())
    assert_rounded_once(weight.grad, rounded(rows).flatten(0, 1).t() @ grad.flatten(0, 1))
    if with_bias:
        assert bias.grad is not None
        assert_rounded_once(bias.grad, grad.sum((0, 1)))


@pytest.mark.usefixtures("has_bf16")
def test_without_autocast_a_product_is_torchs_own() -> None:
    rows, weight, bias = normal(20, 30, seed=1), normal(30, 7, seed=2), normal(7, seed=3)
    assert torch.equal(affine(rows, weight, bias), torch.addmm(bias, rows, weight))
    assert torch.equal(multiply(operand(rows, torch.float32), weight, torch.float32), rows @ weight)


def test_what_is_kept_for_the_backward_pass_has_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "cpu_has_bf16", lambda: False)
    kept: list[torch.dtype] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.dtype)
        return tensor

    weight = normal(30, 7, seed=2).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast():
        out = affine(normal(20, 30, seed=1), weight).view(1, 4, 5, 7)
        attention(out, out, out, None, 0.0, True)
    assert set(kept) == {torch.bfloat16}


@pytest.mark.usefixtures("has_bf16")
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
def test_attention_in_bf16_is_near_the_exact_one_and_so_are_its_gradients(masked: bool) -> None:
    inputs = [normal(2, 3, 20, 16, seed=seed).bfloat16().requires_grad_() for seed in (1, 2, 3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    mask = torch.ones(20, 20, dtype=torch.bool).tril(4 if masked else 0)
    with autocast():
        out = attention(*inputs, mask if masked else None, 0.0, not masked)
    expected = exact_attention(*exact, mask)
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).norm() < 0.01 * expected.norm()
    incoming = normal(2, 3, 20, 16, seed=4).bfloat16()
    out.backward(incoming)
    expected.backward(incoming.double())
    for tensor, reference in zip(inputs, exact, strict=True):
        assert tensor.grad is not None
        assert reference.grad is not None
        assert (tensor.grad.double() - reference.grad).norm() < 0.01 * reference.grad.norm()


def test_dropout_in_attention_is_the_same_in_the_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    """With values of one and equal scores, out is the sum of what dropout let through, and so is value's gradient."""
    monkeypatch.setattr(product, "cpu_has_bf16", lambda: False)
    query = torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    value = torch.ones(1, 1, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    torch.manual_seed(3)
    with autocast():
        out = attention(query, query, value, None, 0.5, False)
    torch.rand(7)  # the generator goes on between the passes
    out.sum().backward()
    assert value.grad is not None
    assert 0 < out.sum() < 2 * out.numel()
    assert len(set(out[0, 0, :, 0].tolist())) > 1
    assert value.grad.sum().item() == pytest.approx(out.sum().item(), rel=0.01)


class ProductRows(TorchDispatchMode):
    """How many rows each product has that is made in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in PRODUCTS and out.dtype == torch.bfloat16:
            self.found.append(out.size(0))
        return out


@pytest.mark.parametrize(
    ("units", "threads", "rows", "width", "expected"),
    [
        (AMX, 2, 1024, 768, [512, 512]),
        (AMX, 2, 1023, 768, [512, 511]),
        (AMX, 1, 1024, 768, [1024]),
        (AMX, 4, 1024, 768, [1024]),
        (AMX, 2, 512, 768, [512]),  # oneDNN divides these by itself
        (AMX, 2, 2048, 768, [2048]),
        (AMX, 2, 1024, 1600, [1024]),
        ("avx512_bf16", 2, 1024, 768, [1024]),
    ],
)
def test_a_product_that_one_of_two_threads_would_make_alone_is_made_in_halves(
    monkeypatch: pytest.MonkeyPatch, units: str, threads: int, rows: int, width: int, expected: list[int]
) -> None:
    monkeypatch.setattr(product, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(product, "cpu_units", lambda: units)
    monkeypatch.setattr(product, "num_threads", lambda: threads)
    inputs, weight = normal(1, rows, 24, seed=1).requires_grad_(), normal(24, width, seed=2).requires_grad_()
    bias = normal(width, seed=3).requires_grad_()
    with ProductRows() as products, autocast():
        out = affine(inputs, weight, bias)
    assert products.found == expected
    assert_rounded_once(out, rounded(inputs) @ rounded(weight) + rounded(bias))
    incoming = normal(1, rows, width, seed=4)
    out.backward(incoming)
    assert weight.grad is not None
    assert_rounded_once(weight.grad, rounded(inputs).flatten(0, 1).t() @ rounded(incoming).flatten(0, 1))


class ProductTypes(TorchDispatchMode):
    """The data types in which matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        if name in PRODUCTS or name.startswith(FUSED_ATTENTION):
            self.found |= {arg.dtype for arg in args if isinstance(arg, torch.Tensor) and arg.ndim in (2, 4)}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunk", [16, 4096], ids=["chunks", "one-chunk"])
@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_no_matrix_is_multiplied_in_bf16_where_there_are_no_instructions_for_it(
    has_bf16: bool, chunk: int, checkpointing: str
) -> None:
    model = GPT2(TINY, seed=5, loss_chunk_tokens=chunk, activation_checkpointing=checkpointing)  # type: ignore[arg-type]
    batch = torch.arange(72).view(3, 24)
    with ProductTypes() as types, autocast():
        model(batch, batch).backward()
        model.token_losses(batch, batch)
        model.logits(batch).sum().backward()
        cache = KVCache(model, batch_size=3)
        for start, end in ((0, 8), (8, 9), (9, 14)):
            model.next_logits(batch[:, start:end], cache)
    assert types.found == {torch.bfloat16 if has_bf16 else torch.float32}


def test_both_ways_agree_on_loss_and_gradients_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.arange(72).view(3, 24)
    losses, gradients = [], []
    for units, compiled in ((True, False), (False, False), (False, True)):
        monkeypatch.setattr(product, "cpu_has_bf16", lambda units=units: units)
        model = GPT2(TINY, seed=5, loss_chunk_tokens=16)
        if compiled:
            torch._dynamo.reset()
            model.compile(backend="aot_eager_decomp_partition", fullgraph=True)
        with autocast():
            loss = model(batch, batch.flip(0))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))  # type: ignore[union-attr]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-4)
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 0.01 * gradients[0].norm()
