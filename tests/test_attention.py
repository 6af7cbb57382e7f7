"""Compiled attention on a CPU, in rows and tiles: its numbers, what is kept for the backward pass, and where it is not used."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from tests.support import exact_attention
from toolkit.config import GPT2Config
from toolkit.model import product
from toolkit.model.attention import (
    LONGEST_IN_ROWS,
    MOST_TILED_ROWS,
    attention,
    attention_gradients,
    attention_in_rows,
)
from toolkit.model.gpt2 import GPT2

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@pytest.fixture(autouse=True)
def _units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with instructions for bf16, or one that makes up for them."""
    monkeypatch.setattr(product, "cpu_has_bf16", lambda: True)


def inputs(
    batch: int, heads: int, length: int, head_size: int, dtype: torch.dtype, *, scale: float = 1.0
) -> list[Tensor]:
    """Query, key, value as parts of one projection, and the output's gradient; scores are about `scale` ** 2."""
    generator = torch.Generator().manual_seed(length)
    parts = torch.randn(4, batch, length, heads, head_size, generator=generator)
    parts[:2] *= scale
    return [part.to(dtype).transpose(1, 2) for part in parts]


def exact_gradients(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    wide = [part.double().requires_grad_() for part in (query, key, value)]
    mask = torch.ones(query.size(2), query.size(2), dtype=torch.bool).tril()
    return torch.autograd.grad(exact_attention(*wide, mask), wide, grad.double())


def errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """Relative in the norm."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


@pytest.fixture(params=["amx_bf16", "avx512_bf16", ""], ids=["amx", "avx512", "others"])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the CPU multiplies with, as far as attention looks."""
    monkeypatch.setattr("toolkit.model.attention.cpu_units", lambda: request.param)
    return str(request.param)


in_tiles = pytest.mark.parametrize(
    ("shape", "num_tiles"),
    [
        ((2, 3, 64, 16), 1),
        ((2, 3, 64, 16), 2),
        ((1, 2, 96, 8), 3),
        ((3, 1, 120, 16), 4),
        ((1, 1, 35, 4), 5),
        ((1, 2, 2, 8), 1),
    ],
)


@in_tiles
def test_attention_in_rows_is_attention_to_fp32s_rounding(shape: tuple[int, ...], num_tiles: int) -> None:
    query, key, value, _ = inputs(*shape, torch.float32)  # type: ignore[misc]
    out, log_sums = attention_in_rows(query, key, value, num_tiles=num_tiles)
    wide = [part.double() for part in (query, key, value)]
    causal = torch.ones(shape[2], shape[2], dtype=torch.bool).tril()
    scores = (wide[0] @ wide[1].mT / shape[3] ** 0.5).masked_fill(~causal, -torch.inf)
    assert out.shape == torch.Size(shape)
    assert max(errors((out,), (exact_attention(*wide, causal),))) < 1e-6
    assert max(errors((log_sums,), (scores.logsumexp(-1),))) < 1e-6


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0, 10.0], ids=["even", "usual", "sharp", "sharpest"])
def test_the_error_of_rows_in_bf16_is_near_that_of_torchs_kernel_however_sharp_attention_is(scale: float) -> None:
    query, key, value, _ = inputs(1, 4, 512, 64, torch.bfloat16, scale=scale)
    causal = torch.ones(512, 512, dtype=torch.bool).tril()
    exact = exact_attention(query.double(), key.double(), value.double(), causal)
    of_torch = errors((FUSED(query, key, value, is_causal=True)[0],), (exact,))[0]
    assert errors((attention_in_rows(query, key, value, num_tiles=4)[0],), (exact,))[0] < 2 * of_torch


@in_tiles
def test_gradients_in_tiles_are_those_of_attention_to_fp32s_rounding(
    units: str, shape: tuple[int, ...], num_tiles: int
) -> None:
    *parts, grad = inputs(*shape, torch.float32)  # type: ignore[misc]
    out, log_sums = FUSED(*parts, is_causal=True)
    found = attention_gradients(grad, *parts, out, log_sums, num_tiles=num_tiles)
    assert [part.shape for part in found] == [torch.Size(shape)] * 3
    assert max(errors(found, exact_gradients(*parts, grad))) < 1e-5


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0], ids=["even", "usual", "sharp"])
def test_the_error_in_bf16_is_that_of_torchs_kernel_however_sharp_attention_is(units: str, scale: float) -> None:
    *parts, grad = inputs(1, 4, 512, 64, torch.bfloat16, scale=scale)
    out, log_sums = FUSED(*parts, is_causal=True)
    exact = exact_gradients(*parts, grad)
    of_torch = max(errors(FUSED_BACKWARD(grad, *parts, out, log_sums, 0.0, True), exact))
    for num_tiles in (2, 4):
        found = attention_gradients(grad, *parts, out, log_sums, num_tiles=num_tiles)
        assert max(errors(found, exact)) < 1.5 * of_torch


class Graphs:
    """torch.compile with the partitioner in use, which notes the operations and the outputs of both passes."""

    def __init__(self) -> None:
        self.operations: dict[str, set[object]] = {"forward": set(), "backward": set()}
        self.forward_bytes = 0

    def backend(self) -> Callable[..., object]:
        def note(name: str) -> Callable[[fx.GraphModule, list[Tensor]], fx.GraphModule]:
            def compiler(graph: fx.GraphModule, _: list[Tensor]) -> fx.GraphModule:
                self.operations[name] |= {node.target for node in graph.graph.nodes if node.op == "call_function"}
                if name == "forward":
                    outputs = {node for node in graph.graph.output_node().args[0] if isinstance(node, fx.Node)}  # type: ignore[union-attr]
                    self.forward_bytes += sum(node.meta["val"].nbytes for node in outputs if node.op == "call_function")
                return graph

            return compiler

        made: Callable[..., object] = aot_autograd(
            fw_compiler=note("forward"), bw_compiler=note("backward"), partition_fn=min_cut_rematerialization_partition
        )
        return made


def compiled_gradients(
    graphs: Graphs, parts: list[Tensor], grad: Tensor, *, dropout: float = 0.0
) -> tuple[Tensor, ...]:
    torch._dynamo.reset()
    leaves = [part.clone().requires_grad_() for part in parts]
    compiled = torch.compile(attention, backend=graphs.backend(), fullgraph=True, dynamic=False)
    return torch.autograd.grad(compiled(*leaves, None, dropout, True), leaves, grad)


@pytest.mark.parametrize("length", [1, 64, 96, 100, 512, 1024])
def test_a_compiled_backward_pass_is_computed_in_tiles_and_keeps_what_the_fused_one_keeps(
    units: str, length: int
) -> None:
    *parts, grad = inputs(2, 2, length, 16, torch.bfloat16)
    graphs = Graphs()
    found = compiled_gradients(graphs, parts, grad)
    if length > 1:  # else the gradients of query and key are zero
        assert max(errors(found, exact_gradients(*parts, grad))) < 0.01
    bmm = torch.ops.aten.bmm.default
    assert bmm in graphs.operations["backward"]
    assert FUSED_BACKWARD not in graphs.operations["backward"]
    in_rows = units == "avx512_bf16" and length <= LONGEST_IN_ROWS
    assert (bmm in graphs.operations["forward"]) == in_rows
    assert (FUSED.default in graphs.operations["forward"]) == (not in_rows)
    log_sums_bytes = 2 * 2 * length * 4  # batch, heads, positions, fp32
    assert graphs.forward_bytes == parts[0].nbytes + log_sums_bytes


@pytest.mark.parametrize(
    ("shape", "dtype", "dropout"),
    [
        ((1, 2, 521, 8), torch.bfloat16, 0.0),  # a prime number
        ((2, MOST_TILED_ROWS // 64, 64, 2), torch.bfloat16, 0.0),  # too many rows
        ((2, 2, 64, 16), torch.float32, 0.0),
        ((2, 2, 64, 16), torch.bfloat16, 0.1),
    ],
)
def test_where_tiles_do_not_fit_or_gain_the_fused_kernel_is_left_alone(
    shape: tuple[int, ...], dtype: torch.dtype, dropout: float
) -> None:
    *parts, grad = inputs(*shape, dtype)  # type: ignore[misc]
    graphs = Graphs()
    compiled_gradients(graphs, parts, grad, dropout=dropout)
    if dropout == 0.0:  # with dropout torch has no fused one on a CPU
        assert FUSED_BACKWARD in graphs.operations["backward"]
        assert torch.ops.aten.bmm.default not in graphs.operations["backward"]
    assert torch.ops.aten.exp.default not in graphs.operations["backward"]


@pytest.mark.parametrize(
    ("units", "checkpointing"), [("amx_bf16", "none"), ("amx_bf16", "block"), ("avx512_bf16", "none")]
)
def test_a_compiled_model_has_the_loss_and_the_gradients_of_the_uncompiled_one(
    monkeypatch: pytest.MonkeyPatch, units: str, checkpointing: str
) -> None:
    monkeypatch.setattr("toolkit.model.attention.cpu_units", lambda: units)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=33 * 2, context_length=128, vocab_size=257)
    batch = torch.randint(257, (2, 128), generator=torch.Generator().manual_seed(1))
    losses, gradients = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = GPT2(config, seed=5, activation_checkpointing=checkpointing)  # type: ignore[arg-type]
        if compiled:
            model.compile(fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, batch.flip(0))
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for found, reference in zip(gradients[1], gradients[0], strict=True):
        assert found is not None
        assert reference is not None
        assert (found - reference).norm() <= 0.02 * reference.norm() + 1e-6
