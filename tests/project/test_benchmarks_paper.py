"""The dispatchers on paper: counts that can be done in the head."""

from __future__ import annotations

import pytest

from benchmarks import paper_dispatch as paper
from benchmarks.gpu_problem import Shape

NETWORK = paper.Network(link=400e9, card=50e9, latency=0, per_node=8)


def shape(k, tokens=1000, dim=1000):
    return Shape(name="", tokens=tokens, n_experts=1024, k=k, dim=dim, inter=8)


@pytest.mark.parametrize(("ranks", "k", "sent"), [(2, 1, 0.5), (2, 2, 0.75), (4, 2, 0.4375), (8, 8, 0.6564)])
def test_alltoall_sends_a_token_once_to_each_rank_that_wants_it(ranks, k, sent):
    found = paper.alltoall(shape(k), ranks, NETWORK)
    assert found.near == pytest.approx(4 * 1000 * sent * (ranks - 1) * (2000 + 2 * k), rel=1e-4)
    assert found.far == 0 and found.messages == 4 * (ranks - 1)


def test_a_copy_a_route_sends_four_times_alltoalls_bytes_at_two_ranks_and_eight_routes():
    copies, once = (model(shape(8), 2, NETWORK).near for model in (paper.expanded, paper.alltoall))
    assert copies / once == pytest.approx(4 / (1 - 2**-8))


def test_allgather_sends_into_another_node_once_round_a_ring_and_straight_once_a_rank():
    found = paper.allgather(shape(8), 16, NETWORK)
    block = 1000 * (2000 + 16)
    assert found.near == block * (2 * 15 + 2 * 7) and found.far == block * 8 * (2 / 8 + 2)
    assert found.seconds(NETWORK) == pytest.approx(found.near / 400e9 + found.far / 50e9)


def test_alltoall_pays_from_two_ranks_on_with_one_route_and_from_four_on_with_eight():
    one, eight = (paper.crossover(shape(k), NETWORK) for k in (1, 8))
    assert (one, eight) == (2, 4)


def test_command_prints_a_table_of_each_shape(capsys):
    assert paper.main(["--shapes", "mixtral", "dsv3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| 1024 |") == 2 and "### Mixtral-8x7B" in printed
