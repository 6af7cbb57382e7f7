"""How processes that a launcher has started again find each other in a store that dead ones have written to."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore

from tests.support import command
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


def test_a_settled_group_holds_no_tensor_of_its_last_collective(tmp_path: Path) -> None:
    """Its threads let go of them late and with Python's lock: destroyed before that, the group waits for ever."""
    script = tmp_path / "collectives.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "from toolkit.training.processes import Processes\n"
        "dist.init_process_group('gloo')\n"
        "processes = Processes(torch.device('cpu'))\n"
        "held = 0\n"
        "def count_held():\n"
        "    processes.settle()\n"
        "    return sum(view() is not None for view in processes._lent)\n"
        "for number in range(100):\n"
        "    assert processes.all_texts('here') == ['here', 'here']\n"
        "    held += count_held()\n"
        "    assert processes.sum(torch.ones(3)).tolist() == [2, 2, 2]\n"
        "    held += count_held()\n"
        "    mine = {'w': torch.full((2,), 3.0)} if processes.is_main else None\n"
        "    assert processes.share_tensors(mine)['w'].tolist() == [3, 3]\n"
        "    held += count_held()\n"
        "    assert processes.share([number]) == [number]\n"
        "    held += count_held()\n"
        "assert processes._lent\n"
        "assert held == 0, f'{held} tensors held'\n"
        "dist.destroy_process_group()\n"
    )
    done = command("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
    assert done.returncode == 0, done.stderr  # each process checks for itself: on one pipe their lines would mix


def test_a_group_that_lost_a_process_is_not_waited_for(tmp_path: Path) -> None:
    """The error of the collective holds its tensors for as long as anyone looks at it."""
    script = tmp_path / "lost.py"
    script.write_text(
        "import os, torch, torch.distributed as dist\n"
        "from toolkit.training.processes import Processes\n"
        "dist.init_process_group('gloo')\n"
        "processes = Processes(torch.device('cpu'))\n"
        "processes.sum(torch.ones(2))\n"
        "if processes.index == 1:\n"
        "    os._exit(0)\n"
        "try:\n"
        "    while True:\n"
        "        processes.sum(torch.ones(2))\n"
        "except RuntimeError as error:\n"
        "    print('lent', len([view for view in processes._lent if view() is not None]), flush=True)\n"
        "os._exit(0)\n"
    )
    done = command("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
    assert done.returncode == 0, done.stderr
    assert "lent 0" in done.stdout
