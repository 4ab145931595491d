"""The processes of the tests themselves: results, failures, and runs beside each other."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from .processes import needs_gloo, returned, run_cases, run_ranks

pytestmark = needs_gloo


def summed(rank: int, value: float) -> float:
    tensor = torch.tensor(value * (rank + 1))
    dist.all_reduce(tensor)
    return tensor.item()


def failing(rank: int) -> None:
    print("a word before")
    if rank:
        raise ValueError("of rank 1")
    dist.barrier()  # waits for the one that failed


def dying(rank: int) -> None:
    if rank:
        os._exit(3)
    dist.barrier()


def test_ranks_talk_to_each_other() -> None:
    assert run_ranks(summed, 2.0, ranks=3) == [12.0] * 3


@pytest.mark.long
def test_runs_beside_each_other_do_not_meet() -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run_ranks, summed, value) for value in (1.0, 2.0)]
        assert [run.result() for run in runs] == [[3.0] * 2, [6.0] * 2]


def test_failure_of_one_rank_is_shown_and_ends_all() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1: .*ValueError: of rank 1.*a word before"):
        run_ranks(failing)


def test_death_of_one_rank_is_shown() -> None:
    with pytest.raises(AssertionError, match="rank 1: ended without a result"):
        run_ranks(dying)


def test_case_that_fails_leaves_the_others_alone() -> None:
    results = [run_cases({"good": lambda rank: rank, "bad": lambda rank: 1 // rank}, 0)]
    assert returned(results, "good") == [0]
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        returned(results, "bad")
