"""Whether a comparison fits into memory: asked before anything is allocated, and answered with how many tokens do."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
from problems import answer, problem

from moebius.compare import memory
from moebius.compare.judge import judge
from moebius.compare.sides.answer import Desk
from moebius.core import MoEConfig
from moebius.core.errors import ConfigError

CONFIG = MoEConfig(n_routed_experts=8, n_activated_experts=2, dim=64, moe_inter_dim=32, dtype="float32")
GIB = 2**30


def fit(free, *, dtype="float32", n_sides=2, heads=0):
    """How many tokens the refusal of far too many says that fit."""
    with pytest.raises(ConfigError) as caught:
        memory.require(CONFIG, dtype, 10**12, n_sides, heads=heads, free=free)
    assert "1000000000000 tokens" in caught.value.asked and "GiB of memory available" in caught.value.found
    return int(caught.value.do.split("at most ")[1].split()[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_sides", [1, 4])
@pytest.mark.parametrize("heads", [0, 16])
def test_require_says_how_many_tokens_fit_and_that_many_do(dtype, n_sides, heads):
    most = fit(3 * GIB, dtype=dtype, n_sides=n_sides, heads=heads)
    assert most > 100
    memory.require(CONFIG, dtype, most, n_sides, heads=heads, free=3 * GIB)
    with pytest.raises(ConfigError):
        memory.require(CONFIG, dtype, most + 1, n_sides, heads=heads, free=3 * GIB)


def test_require_takes_what_else_is_needed_off_first():
    assert fit(4 * GIB) > 1.9 * fit(3 * GIB)  # two gibibytes are the interpreter's
    assert fit(3 * GIB, n_sides=8) < fit(3 * GIB, n_sides=1)
    assert fit(3 * GIB, dtype="bfloat16") >= fit(3 * GIB, dtype="float32")


def test_require_counts_the_attentions_scores_by_the_square():
    one, four = (fit(6 * GIB, heads=heads) for heads in (1024, 4096))
    assert fit(6 * GIB) > 10 * one
    assert one == pytest.approx(2 * four, rel=0.01)


@pytest.mark.parametrize("free", [0, GIB, 2 * GIB])
def test_require_where_not_one_token_fits_says_so(free):
    with pytest.raises(ConfigError, match="not even one token fits"):
        memory.require(CONFIG, "float32", 1, 2, free=free)


def test_require_refuses_nothing_where_no_one_knows(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: None)
    memory.require(CONFIG, "float32", 10**12, 2)


def test_require_asks_the_machine(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 3 * GIB)
    most = fit(None)
    assert most == fit(3 * GIB)


def test_row_bytes_are_no_fewer_than_a_comparison_takes():
    """Measured: everything that NumPy holds at its peak, the answers' tensors included."""
    p = problem("gpt_oss", tokens=1200, n_routed_experts=8, dim=64, moe_inter_dim=48)
    with Desk() as desk:
        given = {side: answer(p, side, desk) for side in ("torch", "torch:loop")}
        held = sum(value.nbytes for found in given.values() for value in found.tensors.values())
        gc.collect()
        tracemalloc.start()
        try:
            judge(p, given)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    due = p.tokens * memory.row_bytes(p.config, len(given))
    assert due / 4 < held + peak < due


def test_heads_of_a_config():
    assert memory.heads({"num_attention_heads": 32}) == 32
    assert [memory.heads({"num_attention_heads": value}) for value in (None, "four", 0, -1, True)] == [0] * 5
    assert memory.heads({}) == 0


# ------------------------------------------------------------------------------------------------ what a container says
LAYOUTS = [(limits[1], limits[2], limits[3]) for limits in memory._LIMITS]


@pytest.fixture
def container(tmp_path, monkeypatch):
    """Writes a container's files in one of the two layouts, on a machine with 10 GiB left."""
    monkeypatch.setattr(memory, "_machine", lambda: 10 * GIB)

    def write(layout, limit, current, cache=0):
        names, (first, *others) = layout[:2], layout[2]
        monkeypatch.setattr(memory, "_LIMITS", ((str(tmp_path), *layout),))
        for name, value in zip(names, (limit, current), strict=True):
            (tmp_path / name).write_text(f"{value}\n")
        stat = {"anon": 5, first: cache, **dict.fromkeys(others, 0)}
        (tmp_path / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))

    return write


@pytest.mark.parametrize("layout", LAYOUTS)
def test_available_is_within_the_containers_limit(container, layout):
    container(layout, 4 * GIB, GIB)
    assert memory.available() == 3 * GIB


@pytest.mark.parametrize("layout", LAYOUTS)
def test_available_does_not_count_cached_files_as_taken(container, layout):
    """After a large checkpoint was read, almost all of a container's memory is in use by the cache."""
    container(layout, 4 * GIB, 4 * GIB - 1, cache=3 * GIB)
    assert memory.available() == 3 * GIB + 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("limit", ["max", 2**63 - 4096])
def test_available_without_a_limit_is_the_machines(container, layout, limit):
    container(layout, limit, GIB)
    assert memory.available() == 10 * GIB


def test_available_without_a_container_is_the_machines(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_LIMITS", ((str(tmp_path / "nothing"), "a", "b", ("c",)),))
    monkeypatch.setattr(memory, "_machine", lambda: GIB)
    assert memory.available() == GIB
    monkeypatch.setattr(memory, "_machine", lambda: None)
    assert memory.available() is None


def test_available_here_is_a_number_or_nothing():
    found = memory.available()
    assert found is None or 2**20 < found < 2**50
