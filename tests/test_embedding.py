"""The tied embedding: one gradient for both uses of the weight, without a dense one for the lookup, the same bits each time."""

import pytest
import torch
import torch.nn.functional as F

from tests.test_step_costs import Operations
from toolkit.config import GPT2Config
from toolkit.model.embedding import embed_tied
from toolkit.model.gpt2 import GPT2

TINY = GPT2Config(n_layer=1, n_head=2, n_embd=64, context_length=256, vocab_size=257)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("with_head", [True, False])
def test_values_and_gradients_are_those_of_a_lookup_and_a_product(with_head: bool) -> None:
    ids = torch.tensor([[3, 1, 3, 3], [0, 9, 1, 3]])  # rows that occur often, once and never
    gradients = []
    for tied in (True, False):
        weight = torch.randn(10, 6, generator=generator(1)).requires_grad_()
        embedded, head = embed_tied(ids, weight) if tied else (F.embedding(ids, weight), weight)
        assert torch.equal(embedded, weight[ids])
        scores = embedded.square() @ head.t() if with_head else embedded.square()
        scores.square().sum().backward()
        assert weight.grad is not None
        gradients.append(weight.grad)
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-5)


def test_gradients_of_several_micro_batches_add_up() -> None:
    batches = torch.randint(0, 257, (3, 2, 20), generator=generator(2))
    together, apart = GPT2(TINY, seed=4), GPT2(TINY, seed=4)
    torch.stack([together(batch, batch) for batch in batches]).sum().backward()
    for batch in batches:
        apart(batch, batch).backward()
    expected = together.wte.weight.grad
    assert expected is not None
    assert apart.wte.weight.grad is not None
    assert (apart.wte.weight.grad - expected).norm() < 1e-6 * expected.norm()


def test_no_dense_gradient_is_made_for_the_lookup() -> None:
    model = GPT2(TINY, seed=4)
    batch = torch.arange(40).view(2, 20)
    with Operations() as operations:
        model(batch, batch).backward()
    assert "aten.embedding.default" in operations.seen
    assert "aten.embedding_dense_backward.default" not in operations.seen


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_two_threads_add_the_same_bits_each_time(compiled: bool) -> None:
    """Few different tokens: many rows are added to each row of the gradient, in whatever order the threads take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch._dynamo.reset()
        model = GPT2(TINY, seed=4)
        if compiled:
            model.compile()
        ids, targets = torch.randint(0, 5, (2, 16, 256), generator=generator(3))
        gradients = []
        for _ in range(12):
            model.zero_grad()
            model(ids, targets).backward()
            gradients.append(model.wte.weight.grad)
        assert all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)
