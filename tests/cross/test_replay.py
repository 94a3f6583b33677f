"""Recording and replaying the choice of experts, in both frontends: the choice is repeated, all else is live."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from sides import Side

from moebius.core import ConfigError, DTypeError, MoEConfig, RoutingError, ShapeError, layout, reference

frontends = pytest.mark.parametrize("side", (Side("torch", "loop"), Side("jax", "loop")), ids=lambda s: s.framework)
SIZES = {"n_routed_experts": 6, "n_activated_experts": 2, "dim": 8, "moe_inter_dim": 4, "dtype": "float32"}
TOPK_FIRST = MoEConfig(**SIZES, enable_routing_replay=True)
NORMED = MoEConfig(**SIZES, enable_routing_replay=True, score_func="sigmoid", norm_topk_prob=True, route_scale=2.5)
X = np.random.default_rng(0).normal(size=(2, 5, 8))


def values(config: MoEConfig, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {row.name: rng.normal(size=row.shape).astype(np.float32).astype(np.float64) for row in layout.moe(config)}


def functions(side: Side) -> Any:
    return importlib.import_module(f"moebius.{side.framework}_frontend.replay")


def logits(parameters: dict[str, np.ndarray]) -> np.ndarray:
    return X.astype(np.float32).reshape(-1, 8).astype(np.float64) @ parameters["gate.weight"].T


@frontends
@pytest.mark.parametrize("config", [TOPK_FIRST, NORMED], ids=["topk_first", "normed"])
def test_replay_repeats_the_recorded_choice_and_weighs_it_by_live_scores(side: Side, config: MoEConfig) -> None:
    """What one layer chose, another one with a router of its own repeats, as the reference with forced experts."""
    f, before, after = functions(side), values(config, 1), values(config, 2)
    first, second = side.layer(config, before), side.layer(config, after)
    x = side.array(X, "float32")
    with f.record(first):
        first(x)
    (ids,) = f.collect(first)
    assert str(ids.dtype).endswith("int32")
    np.testing.assert_array_equal(side.numpy(ids), reference.route(logits(before), config).ids_TK)
    assert (side.numpy(ids) != reference.route(logits(after), config).ids_TK).any()

    with f.replay(second, [ids]):
        y = side.numpy(second(x))
    mask, flat = np.ones(10, bool), X.astype(np.float32).astype(np.float64).reshape(-1, 8)
    wanted = reference.moe(flat, mask, after, config, ids_TK=side.numpy(ids).astype(np.int64))
    np.testing.assert_allclose(y.reshape(-1, 8), wanted.y_TD, rtol=1e-4, atol=1e-4)


@frontends
def test_replay_of_its_own_record_changes_no_bit_and_ends_with_its_context(side: Side) -> None:
    f, layer = functions(side), side.layer(TOPK_FIRST, values(TOPK_FIRST, 1))
    x, other = side.array(X, "float32"), side.array(-X, "float32")
    with f.record(layer):
        wanted = side.numpy(layer(x))
    recorded = f.collect(layer)
    elsewhere = side.numpy(layer(other))
    with f.replay(layer, recorded):
        np.testing.assert_array_equal(side.numpy(layer(x)), wanted)
        assert (side.numpy(layer(other)) != elsewhere).any()
    np.testing.assert_array_equal(side.numpy(layer(other)), elsewhere)
    np.testing.assert_array_equal(side.numpy(f.collect(layer)[0]), side.numpy(recorded[0]))


@frontends
def test_replay_counts_the_replayed_experts(side: Side) -> None:
    layer = side.layer(TOPK_FIRST, values(TOPK_FIRST, 1))
    layer.gate.track_load = True
    with functions(side).replay(layer, [side.array(np.tile([[5, 1]], (10, 1)), "int32")]):
        layer(side.array(X, "float32"))
    assert side.numpy(layer.gate.last_load[...]).tolist() == [0, 10, 0, 0, 0, 10]


@frontends
def test_replay_of_int64_ids_is_that_of_int32(side: Side) -> None:
    layer, ids = side.layer(TOPK_FIRST, values(TOPK_FIRST, 1)), np.tile([[5, 1]], (10, 1))
    wide = side.array(ids, "int64") if side.framework == "torch" else ids
    found = []
    for given in (wide, side.array(ids, "int32")):
        with functions(side).replay(layer, [given]):
            found.append(side.numpy(layer(side.array(X, "float32"))))
    np.testing.assert_array_equal(*found)


@frontends
def test_handles_of_two_layers_are_their_own(side: Side) -> None:
    """No handle is the process's: a model that records or replays leaves another one alone."""
    f = functions(side)
    one, other = (side.layer(TOPK_FIRST, values(TOPK_FIRST, 1)) for _ in range(2))
    x = side.array(X, "float32")
    with f.record(one), f.replay(other, [side.array(np.tile([[5, 1]], (10, 1)), "int32")]):
        one(x), other(x)
    np.testing.assert_array_equal(
        side.numpy(f.collect(one)[0]), reference.route(logits(values(TOPK_FIRST, 1)), TOPK_FIRST).ids_TK
    )
    with pytest.raises(RoutingError):
        f.collect(other)


@frontends
def test_collect_without_a_record_says_so(side: Side) -> None:
    f, layer = functions(side), side.layer(TOPK_FIRST, values(TOPK_FIRST, 1))
    layer(side.array(X, "float32"))
    with pytest.raises(RoutingError, match=r"asked: the recorded experts of 1 gates\nfound: none of the gates \[0\]"):
        f.collect(layer)
    with f.record(layer):
        layer(side.array(X, "float32"))
    with f.record(layer):
        pass
    with pytest.raises(RoutingError):
        f.collect(layer)


@frontends
def test_replay_without_a_target_says_so(side: Side) -> None:
    f, layer = functions(side), side.layer(TOPK_FIRST, values(TOPK_FIRST, 1))
    layer.gate.replay.mode = f.REPLAY
    with pytest.raises(RoutingError, match=r"asked: the experts to replay\nfound: no target\ndo: .+"):
        layer(side.array(X, "float32"))


@frontends
@pytest.mark.parametrize("shape", [(9, 2), (10, 3), (20,), (2, 5, 2)], ids=str)
def test_replay_of_another_shape_says_what_fits(side: Side, shape) -> None:
    layer = side.layer(TOPK_FIRST, values(TOPK_FIRST, 1))
    with (
        functions(side).replay(layer, [side.array(np.zeros(shape), "int32")]),
        pytest.raises(ShapeError, match=r"asked: experts to replay of shape \[10, 2\]\nfound: shape .+\ndo: .+"),
    ):
        layer(side.array(X, "float32"))


@frontends
@pytest.mark.parametrize("entries", [0, 2])
def test_replay_of_another_number_of_gates_is_refused(side: Side, entries: int) -> None:
    layer = side.layer(TOPK_FIRST, values(TOPK_FIRST, 1))
    ids = [side.array(np.zeros((10, 2)), "int32")] * entries
    with (
        pytest.raises(ConfigError, match=rf"asked: .+ for 1 gates\nfound: {entries} entries\ndo: pass one per gate"),
        functions(side).replay(layer, ids),
    ):
        raise AssertionError("entered")


@frontends
@pytest.mark.parametrize("ids", [[[0, 1]], "float32"], ids=["list", "float"])
def test_replay_of_what_is_no_array_of_integers_is_refused(side: Side, ids) -> None:
    layer = side.layer(TOPK_FIRST, values(TOPK_FIRST, 1))
    given = side.array(np.zeros((10, 2)), ids) if isinstance(ids, str) else ids
    with pytest.raises(DTypeError, match="experts to replay, int32 or int64"), functions(side).replay(layer, [given]):
        raise AssertionError("entered")


@frontends
@pytest.mark.parametrize("outlier", [-1, 6])
def test_replay_of_ids_out_of_range_is_refused_where_values_are_checked(side: Side, outlier: int, monkeypatch) -> None:
    monkeypatch.setenv("MOEBIUS_CHECKS", "full")
    layer, ids = side.layer(TOPK_FIRST, values(TOPK_FIRST, 1)), np.zeros((10, 2), np.int32)
    ids[3, 1] = outlier
    with (
        pytest.raises(RoutingError, match=r"asked: experts to replay in \[0, 6\)\nfound: .+\ndo: .+"),
        functions(side).replay(layer, [side.array(ids, "int32")]),
    ):
        raise AssertionError("entered")


@frontends
@pytest.mark.parametrize("name", ["handles", "collect", "record"])
def test_a_model_without_handles_is_refused(side: Side, name: str) -> None:
    plain = MoEConfig(**SIZES)
    f, layer = functions(side), side.layer(plain, values(plain, 1))
    assert layer.gate.replay is None
    with pytest.raises(ConfigError, match=r"found: no gate with a replay handle\ndo: set config.enable_routing"):
        found = getattr(f, name)(layer)
        with found:
            raise AssertionError("entered")


@frontends
def test_an_error_inside_of_a_context_ends_it(side: Side) -> None:
    f, layer = functions(side), side.layer(TOPK_FIRST, values(TOPK_FIRST, 1))
    with pytest.raises(ZeroDivisionError), f.replay(layer, [side.array(np.zeros((10, 2)), "int32")]):
        raise ZeroDivisionError
    (handle,) = f.handles(layer)
    assert handle.mode is None and (handle.target is None or handle.target[...].size == 0)
