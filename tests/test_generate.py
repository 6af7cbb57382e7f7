"""Generation: what is drawn, where it stops, and what it depends on."""

import itertools

import pytest
import torch

from toolkit.config import GPT2Config
from toolkit.errors import UserError
from toolkit.evaluation.generate import draw, generate
from toolkit.model.gpt2 import GPT2

CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=32, context_length=16, vocab_size=50, dropout=0.3)


@pytest.fixture(scope="module")
def model() -> GPT2:
    """Weights ten times as large as at the start, so that its distributions are far from uniform."""
    model = GPT2(CONFIG, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model


def tokens(model: GPT2, prompt: list[int], **settings: object) -> list[int]:
    return [token for _, token in generate(model, prompt, **({"max_new_tokens": 12} | settings))]  # type: ignore[arg-type]


def greedy_without_cache(model: GPT2, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.eval().logits(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


# --- one draw ---------------------------------------------------------------------------------------------------------


def frequencies(logits: list[float], *, draws: int = 2000, **settings: object) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    arguments = {"temperature": 1.0, "top_k": None, "top_p": None} | settings
    drawn = [draw(torch.tensor(logits), generator=generator, **arguments) for _ in range(draws)]  # type: ignore[arg-type]
    return [drawn.count(token) / draws for token in range(len(logits))]


LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 99}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),  # 0.4 + 0.3 reach it
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.01}, [0, 1, 0, 0]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),  # of 4/9, 3/9, 2/9: the first two reach it
    ],
)
def test_draws_follow_the_filtered_distribution(settings: dict[str, object], expected: list[float]) -> None:
    drawn = frequencies(LOGITS, **settings)
    assert drawn == pytest.approx(expected, abs=0.035)
    assert [value == 0 for value in drawn] == [value == 0 for value in expected]


def test_ties_are_broken_by_the_lower_id() -> None:
    drawn = frequencies([1.0] + [2.0] * 999, draws=20, top_k=3)  # many: short lists are sorted by a stable algorithm
    assert sum(drawn[1:4]) == 1


def test_broken_weights_are_an_error_not_a_text() -> None:
    with pytest.raises(UserError, match="not finite"):
        frequencies([0.0, float("nan")], draws=1)


# --- whole samples ----------------------------------------------------------------------------------------------------


def test_greedy_generation_with_the_cache_equals_generation_without(model: GPT2) -> None:
    assert tokens(model, [3, 4, 5], temperature=0.0) == greedy_without_cache(model, [3, 4, 5], 12)


def test_a_seed_gives_the_same_tokens_whatever_the_number_of_samples(model: GPT2) -> None:
    def samples(count: int, seed: int = 9) -> list[list[int]]:
        pairs = list(generate(model, [3], max_new_tokens=12, seed=seed, num_samples=count))
        assert [sample for sample, _ in pairs] == sorted(sample for sample, _ in pairs)
        return [[token for sample, token in pairs if sample == index] for index in range(count)]

    torch.manual_seed(1)
    three = samples(3)
    torch.manual_seed(2)
    assert samples(3) == three
    assert samples(2) == three[:2]
    assert three[0] != three[1] != three[2] != three[0]
    assert samples(1, seed=10)[0] not in three
    assert all(len(sample) == 12 for sample in three)


def test_a_sample_ends_at_end_of_text(model: GPT2) -> None:
    whole = tokens(model, [3, 4, 5], temperature=0.0)
    stop = whole[5]
    assert tokens(model, [3, 4, 5], temperature=0.0, eot_id=stop) == whole[: whole.index(stop)]


def test_an_empty_prompt_is_the_start_of_a_document(model: GPT2) -> None:
    assert tokens(model, [], eot_id=7, seed=3) == tokens(model, [7], eot_id=7, seed=3)
    with pytest.raises(UserError, match="the prompt is empty"):
        tokens(model, [])


def test_text_beyond_the_context_continues_from_its_end(model: GPT2) -> None:
    prompt = list(range(10))
    generated = tokens(model, prompt, temperature=0.0, max_new_tokens=40)
    assert len(generated) == 40
    text = prompt + generated
    # The context of 16 is full once 16 tokens are in it; then its last 8 are encoded anew, and again every 8 tokens.
    assert generated[:7] == greedy_without_cache(model, prompt, 7)
    assert generated[7:16] == greedy_without_cache(model, text[9:17], 9)
    assert generated[16:25] == greedy_without_cache(model, text[18:26], 9)


def test_a_prompt_longer_than_the_context_is_cut_at_its_front(model: GPT2) -> None:
    prompt = [token % 50 for token in range(100)]
    assert tokens(model, prompt, temperature=0.0) == tokens(model, prompt[-16:], temperature=0.0)


def test_dropout_is_off_and_the_caller_may_train_between_tokens(model: GPT2) -> None:
    model.train()
    stream = generate(model, [3, 4, 5], max_new_tokens=12, temperature=0.0)
    assert model.training
    first = list(itertools.islice(stream, 4))
    assert model.training
    assert torch.is_grad_enabled()
    assert [token for _, token in first] == greedy_without_cache(model, [3, 4, 5], 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be at least 0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(
    model: GPT2, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, [1], **({"max_new_tokens": 1} | settings))  # type: ignore[arg-type]


def test_a_prompt_of_another_tokenizer_is_refused(model: GPT2) -> None:
    with pytest.raises(UserError, match="prompt id 50 is not below the model's vocab_size=50"):
        generate(model, [1, 50], max_new_tokens=1)
