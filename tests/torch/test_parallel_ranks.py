"""The helper that runs a function on several ranks: what it returns, and that it never waits for ever."""

from __future__ import annotations

import os
import threading

import pytest
import ranks
import torch
import torch.distributed as dist


def _sum(value: torch.Tensor) -> tuple[int, torch.Tensor]:
    dist.all_reduce(value)
    return dist.get_rank(), value


def _raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("a rank says this")
    dist.barrier()


def _dies() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def _waits() -> None:
    if dist.get_rank() == 1:
        threading.Event().wait()
    dist.barrier()


def test_run_returns_each_ranks_answer_in_the_order_of_the_ranks() -> None:
    answers = ranks.run(_sum, 3, torch.ones(2))
    assert [(rank, value.tolist()) for rank, value in answers] == [(rank, [3.0, 3.0]) for rank in range(3)]


def test_run_shows_the_error_of_a_rank_and_where_it_stands() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1: Traceback.*in _raises.*a rank says this"):
        ranks.run(_raises, 2)


def test_run_of_a_rank_that_dies_says_so() -> None:
    with pytest.raises(AssertionError, match="rank 1: the process died"):
        ranks.run(_dies, 2)


def test_run_of_a_rank_that_never_comes_ends_and_shows_where_all_wait() -> None:
    with pytest.raises(AssertionError, match=r"(?s)did not answer within 5.0 s.*in _waits"):
        ranks.run(_waits, 2, timeout=5.0)
