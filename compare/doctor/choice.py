"""Which backends None means for one layer, and why: the answers of `registries.explain` in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moebius.core.dispatchers import share
from moebius.core.errors import ConfigError

SIZES = "E,K,D,I,T[,RANKS]"
_TITLES = {"torch": "PyTorch", "jax": "Flax"}


def sizes(text: str) -> tuple[int, int, int, int, int, int]:
    """(E, K, D, I, T, ranks) of "128,8,2048,768,16384" or with ranks as a sixth.

    Raises:
        ConfigError: something else, or sizes that make no layer.
    """
    asked, example = f"doctor --explain {text}", "as in --explain 128,8,2048,768,16384,8"
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(asked, f"not {SIZES} in whole numbers", example) from None
    if len(found) not in (5, 6) or min(found) < 1:
        raise ConfigError(asked, f"{len(found)} numbers; {SIZES}, each 1 or more, are wanted", example)
    e, k, dim, inter, tokens, ranks = (*found, 1)[:6]
    if k > e or e % ranks:
        wrong = f"{k} of {e} experts a token" if k > e else f"{e} experts over {ranks} ranks, {e % ranks} left over"
        raise ConfigError(asked, wrong, "K is at most E, and the ranks divide E")
    return e, k, dim, inter, tokens, ranks


def lines(layer: Sequence[int], answers: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """For a terminal.

    Args:
        layer: of `sizes`. answers: of registries.explain, by frontend.
    """
    e, k, _, _, tokens, ranks = layer
    yield f"{tokens} tokens, each to {k} of {e} experts: {tokens * k / e:.4g} rows an expert, where routing is even"
    if ranks > 1:
        there = f"{share(ranks, k):.0%} of a rank's tokens have a route to a given other one"
        yield f"{ranks} ranks, {e // ranks} experts each; {there}"
    for frontend, answer in answers.items():
        yield f"\n{_TITLES[frontend]}, {answer['device']}"
        yield from _matmul(answer)
        yield from _step("tokens to their experts' ranks", answer["dispatch"])
        for elsewhere in answer["elsewhere"]:
            yield f"\n{_TITLES[frontend]}, {elsewhere['device']}, with every package"
            yield from _matmul(elsewhere)


def _matmul(answer: Mapping[str, Any]) -> Iterator[str]:
    yield from _step("the grouped matmul", answer["grouped_matmul"])
    yield from (f"    {line}" for line in answer["figures"])


def _step(title: str, states: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield f"  {title}"
    rows = sorted(states, key=lambda row: not row[1].startswith("chosen"))
    width = max(len(name) for name, _ in rows)
    yield from (f"    {name:{width}}  {state}" for name, state in rows)
