"""On paper: what each dispatcher sends, in how many messages, and how long that takes, from 2 to 1024 ranks.

Each rank has T tokens of D numbers in 16 bits, each with K routes, spread evenly over all ranks; a share
1 - (1 - 1/R)^K of them has a route to a given rank. Four transfers make a step: tokens out and outputs home, and both
again in the backward pass. Ranks come in nodes; inside one a transfer runs at the link's rate, between nodes at the
network card's, one after the other, and each message costs its latency. Ids and weights, K numbers of 8 bytes a token
that travels, are in the bytes. Nothing here is measured: put in the rates that you measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.gpu_problem import SHAPES, Shape
from moebius.core.dispatchers import share

RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """Rates in bytes/s and a direction: of the link within a node, of a rank's card; latency of a message in s."""

    link: float
    card: float
    latency: float
    per_node: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of one rank and one step.

    Attributes:
        near, far: bytes that leave it for its own node and for others. messages: that it sends.
    """

    near: float
    far: float
    messages: int

    def seconds(self, network: Network) -> float:
        """One kind of transfer after the other."""
        return self.near / network.link + self.far / network.card + self.messages * network.latency


def allgather(shape: Shape, ranks: int, network: Network) -> Cost:
    """Every token to every rank, round a ring; outputs home straight: each rank has a part of every token."""
    return _cost(shape, ranks, network, sent=1.0, rings=2)


def alltoall(shape: Shape, ranks: int, network: Network) -> Cost:
    """A token once to each rank that wants it."""
    return _cost(shape, ranks, network, sent=share(ranks, shape.k), rings=0)


def expanded(shape: Shape, ranks: int, network: Network) -> Cost:
    """A token once for each of its routes, as without a word of the rank: what moebius does not do."""
    return _cost(shape, ranks, network, sent=shape.k / ranks, rings=0)


MODELS: dict[str, Callable[[Shape, int, Network], Cost]] = {
    "allgather": allgather,
    "alltoall": alltoall,
    "a copy a route": expanded,
}


def _cost(shape: Shape, ranks: int, network: Network, sent: float, rings: int) -> Cost:
    """Four transfers, of which `rings` pass blocks from neighbour to neighbour and the others go straight.

    Round a ring a block enters each node once, over one of its cards; straight it enters it once for each rank there.
    """
    token = 2 * shape.dim + 8 * shape.k / 4  # ids and weights go once in four transfers
    here = min(ranks, network.per_node)
    near, far = here - 1, ranks - here
    block = shape.tokens * sent * token
    return Cost(
        near=block * (rings * (ranks - 1) + (4 - rings) * near),
        far=block * far * (rings / here + (4 - rings)),
        messages=4 * (ranks - 1),
    )


def crossover(shape: Shape, network: Network) -> int | None:
    """The first number of ranks at which alltoall takes less than nine tenths of allgather's time."""
    for ranks in RANKS:
        if alltoall(shape, ranks, network).seconds(network) < 0.9 * allgather(shape, ranks, network).seconds(network):
            return ranks
    return None


def table(shape: Shape, network: Network) -> Iterator[str]:
    """Markdown."""
    yield f"### {shape.name}: T = {shape.tokens} a rank, K = {shape.k}, D = {shape.dim}\n"
    yield "| ranks | " + " | ".join(f"{name}: GB sent, messages, ms" for name in MODELS) + " |"
    yield "|---" * (1 + len(MODELS)) + "|"
    for ranks in RANKS:
        cells = []
        for model in MODELS.values():
            cost = model(shape, ranks, network)
            gigabytes, ms = (cost.near + cost.far) / 1e9, 1e3 * cost.seconds(network)
            cells.append(f"{gigabytes:.3g}, {cost.messages}, {ms:.3g}")
        yield f"| {ranks} | {' | '.join(cells)} |"
    found = crossover(shape, network)
    yield f"\nalltoall takes less than 0.9 of allgather's time from {found} ranks on\n" if found else "\nnowhere\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks paper_dispatch", description=__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="which; all by default")
    add("--tokens", type=int, default=4096, help="of a rank (default 4096)")
    add("--link", type=float, default=450, help="GB/s a direction within a node (450: NVLink 4, on paper)")
    add("--card", type=float, default=50, help="GB/s a direction of a rank's network card (50: 400 Gb/s, on paper)")
    add("--latency", type=float, default=5, help="us of a message (5, an assumption)")
    add("--per-node", type=int, default=8, help="ranks of a node (default 8)")
    asked = parser.parse_args(arguments)
    network = Network(
        link=1e9 * asked.link, card=1e9 * asked.card, latency=1e-6 * asked.latency, per_node=asked.per_node
    )
    for key in asked.shapes:
        s = SHAPES[key]
        shape = Shape(name=s.name, tokens=asked.tokens, n_experts=s.n_experts, k=s.k, dim=s.dim, inter=s.inter)
        print("\n".join(table(shape, network)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
