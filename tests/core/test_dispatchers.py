"""Which dispatcher is tried first, by ranks and routes."""

from __future__ import annotations

import numpy as np
import pytest

from moebius.core.config import DISPATCHERS
from moebius.core.dispatchers import order, routed_share, share

ALL = ("local", "allgather", "alltoall", "ragged_all_to_all", "deepep", "te")


def names(ranks: int, k: int, available: tuple[str, ...] = ALL) -> list[str]:
    return [choice.name for choice in order(ranks, k, available=available)]


def test_order_of_one_rank_is_local_alone() -> None:
    assert names(1, 8) == ["local"]
    assert names(1, 8, ("allgather",)) == []


@pytest.mark.parametrize("ranks, k", [(2, 4), (2, 8), (4, 9)])
def test_order_where_most_tokens_go_everywhere_starts_with_allgather(ranks: int, k: int) -> None:
    assert names(ranks, k) == ["allgather", "deepep", "alltoall"]


@pytest.mark.parametrize("ranks, k", [(2, 2), (8, 2), (8, 8), (64, 8)])
def test_order_where_fewer_tokens_go_to_a_rank_ends_with_allgather(ranks: int, k: int) -> None:
    assert names(ranks, k) == ["deepep", "alltoall", "allgather"]


def test_order_names_what_is_available_alone_in_its_own_order() -> None:
    assert names(8, 2, ("allgather", "alltoall")) == ["alltoall", "allgather"]
    assert names(8, 2, ("te", "mok", "local")) == []
    assert set(names(8, 2)) < set(DISPATCHERS)


def test_order_says_why_with_the_share_of_tokens() -> None:
    first, *_, last = order(8, 2, available=ALL)
    assert first.why == "23% of the tokens have a route to a given one of 8 ranks: only those travel"
    assert "nothing that sends those alone" in last.why
    assert "nobody has to count them" in order(2, 8, available=ALL)[0].why


@pytest.mark.parametrize("ranks, k", [(1, 3), (2, 1), (4, 2), (8, 8)])
def test_share_is_that_of_independent_draws(ranks: int, k: int) -> None:
    drawn = np.random.default_rng(0).integers(0, ranks, (20000, k))
    assert abs((drawn == 0).any(1).mean() - share(ranks, k)) < 0.015


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_routed_share_is_what_even_routing_gives(ranks):
    tokens, n_experts, k = 4096, 128, 8
    rng = np.random.default_rng(0)
    ids_TK = np.argsort(rng.random((tokens, n_experts)), axis=1)[:, :k]
    here_TK = ids_TK < n_experts // ranks
    routes, wanted = here_TK.sum(), here_TK.any(1).sum()
    found = {"tokens": tokens * k, "wanted": wanted * k, "routes": routes}
    for arrives, slots in found.items():
        assert slots * routed_share(arrives, ranks, k) == pytest.approx(routes, rel=0.1)
