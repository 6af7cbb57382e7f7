"""How processes that a launcher has started again find each other in a store that dead ones have written to."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from toolkit.errors import UserError
from toolkit.training.processes import _agree_on_attempt


def agree(store: HashStore, *ranks: int, seconds: float = 30) -> list[str]:
    """The names on which these of three processes agree, starting together."""
    with ThreadPoolExecutor(3) as pool:
        started = [pool.submit(_agree_on_attempt, store, rank, 3, timeout=timedelta(seconds=seconds)) for rank in ranks]
        return [process.result() for process in started]


def test_each_attempt_agrees_on_a_name_of_its_own_whatever_the_ones_before_have_left() -> None:
    store = HashStore()
    names = []
    for _ in range(3):
        found = agree(store, 2, 0, 1)
        assert len(set(found)) == 1
        names.append(found[0])
    assert len(set(names)) == 3
    # An attempt that lost a process before all had agreed leaves the most misleading traces.
    with pytest.raises(UserError, match="waited"):
        agree(store, 0, 2, seconds=0.3)
    found = agree(store, 1, 2, 0)
    assert len(set(found)) == 1
    assert found[0] not in names
