"""Evaluation: the numbers by hand, and the same bits for any number of processes."""

import math
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch

from toolkit.config import GPT2Config
from toolkit.errors import UserError
from toolkit.evaluation.loss import EvaluationResult, evaluate
from toolkit.model.gpt2 import GPT2

CONFIG = GPT2Config(n_layer=1, n_head=2, n_embd=16, context_length=8, vocab_size=11, dropout=0.5)
TOKEN_BYTES = np.array([1, 2, 3, 1, 1, 4, 1, 1, 1, 1, 0])


def batches(count: int = 5, *, last: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for index in range(count):
        windows = torch.randint(0, 11, (last if index == count - 1 else 3, 9), generator=generator)
        made.append({"input_ids": windows[:, :-1], "targets": windows[:, 1:].clone()})
    made[0]["targets"][0, :4] = -100
    return made


def trained_model() -> GPT2:
    """Not at its initial weights, where all losses are nearly equal and an order of summation would not matter."""
    model = GPT2(CONFIG, seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    for _ in range(5):
        for batch in batches():
            optimizer.zero_grad()
            model(batch["input_ids"], batch["targets"]).backward()
            optimizer.step()
    return model


def on_processes(model: GPT2, data: list[dict[str, torch.Tensor]], num_processes: int) -> list[EvaluationResult]:
    """What each of `num_processes` gets: a first pass collects every process's sums, a second one adds them."""
    collected: list[torch.Tensor] = []

    def collect(sums: torch.Tensor) -> torch.Tensor:
        collected.append(sums.clone())
        return sums

    def add(_: torch.Tensor) -> torch.Tensor:
        total = collected[-1].clone()
        for sums in collected[:-1]:  # another order than any one process would take
            total = total + sums
        return total

    for reduce in (collect, add):
        results = [
            evaluate(model, data, TOKEN_BYTES, process_index=index, num_processes=num_processes, reduce=reduce)
            for index in range(num_processes)
        ]
    return results


def test_loss_perplexity_and_bits_per_byte_by_hand() -> None:
    # A model of zeros finds all 11 ids equally likely.
    data = [{"input_ids": torch.tensor([[0, 1, 5, 10]]), "targets": torch.tensor([[1, 5, 10, -100]])}]
    result = evaluate(GPT2(CONFIG), data, TOKEN_BYTES)
    assert result.tokens == 3
    assert result.utf8_bytes == 2 + 4 + 0  # end-of-text (10) counts no bytes, but its nats count
    assert result.loss == pytest.approx(math.log(11), rel=1e-6)
    assert result.perplexity == pytest.approx(11, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(3 * math.log2(11) / 6, rel=1e-6)


def test_the_mean_is_over_targets_not_over_batches() -> None:
    model = trained_model()
    model.eval()
    losses = [model.token_losses(batch["input_ids"], batch["targets"]).double() for batch in batches()]
    tokens = 5 * 24 - 8 - 4
    result = evaluate(model, batches(), TOKEN_BYTES)
    assert result.tokens == tokens
    assert result.loss == pytest.approx(sum(loss.sum().item() for loss in losses) / tokens, rel=1e-12)
    targets = torch.cat([batch["targets"].flatten() for batch in batches()])
    assert result.utf8_bytes == TOKEN_BYTES[targets[targets >= 0].numpy()].sum()


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5, 7])
def test_any_number_of_processes_gets_the_same_bits(num_processes: int) -> None:
    model = trained_model()
    assert on_processes(model, batches(), num_processes) == [evaluate(model, batches(), TOKEN_BYTES)] * num_processes


def test_dropout_is_off_and_the_mode_is_left_as_it_was() -> None:
    model = trained_model()
    assert model.training
    first = evaluate(model, batches(), TOKEN_BYTES)
    assert first == evaluate(model, batches(), TOKEN_BYTES)
    assert model.training
    assert evaluate(model.eval(), batches(), TOKEN_BYTES) == first
    assert not model.training
    model.train()
    with pytest.raises(KeyError):
        evaluate(model, [{"input_ids": torch.zeros(1, 8, dtype=torch.int64)}], TOKEN_BYTES)
    assert model.training


def test_the_autocast_context_is_entered_for_every_batch() -> None:
    entered = []

    def autocast() -> AbstractContextManager[object]:
        entered.append(True)
        return torch.autocast("cpu", dtype=torch.bfloat16)

    model = trained_model()
    result = evaluate(model, batches(), TOKEN_BYTES, autocast=autocast)
    assert len(entered) == 5
    full = evaluate(model, batches(), TOKEN_BYTES)
    assert result.loss != full.loss
    assert result.loss == pytest.approx(full.loss, rel=0.02)


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(UserError, match="no windows to evaluate"):
        evaluate(GPT2(CONFIG), [], TOKEN_BYTES)
