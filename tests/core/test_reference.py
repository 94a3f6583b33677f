"""The routed experts of the reference in the situations that implementations get wrong, on one rank and on several."""

import numpy as np
import pytest

from moebius.core import MoEConfig, layout, reference
from moebius.core.precision import Noise
from moebius.core.reference import Tokens

E, K, D, T = 4, 2, 6, 7


class Layer:
    """Routed experts with everything that one call takes, and both directions in one call."""

    def __init__(self, seed=0, tokens=T, **config):
        rng = np.random.default_rng(seed)
        sizes = {"n_routed_experts": E, "n_activated_experts": K, "dim": D, "moe_inter_dim": 5, "expert_bias": True}
        self.config = MoEConfig(**{**sizes, **config}, dtype="float64")
        k, n = self.config.n_activated_experts, self.config.n_routed_experts
        self.parameters = {row.name: rng.normal(size=row.shape) for row in layout.experts(self.config)}
        self.x, self.dy = rng.normal(size=(tokens, D)), rng.normal(size=(tokens, D))
        self.weights = rng.random((tokens, k)) + 0.1
        self.ids = np.argsort(rng.random((tokens, n)), axis=-1)[:, :k]
        self.mask = np.ones(tokens, bool)

    def run(self, **changes):
        given = {"x": self.x, "mask": self.mask, "weights": self.weights, "ids": self.ids, "dy": self.dy} | changes
        trace = reference.experts(
            given["x"], given["mask"], given["weights"], given["ids"], self.parameters, self.config
        )
        dx, dweights, grads = reference.experts_vjp(trace, self.parameters, self.config, given["dy"])
        return {"y": trace.y_TD, "dx": dx, "dweights": dweights, **grads}

    def one_by_one(self):
        """y by the plainest reading: for each route one expert on one token, weighted, added up."""
        y = np.zeros_like(self.x)
        for t, (row, weights) in enumerate(zip(self.ids, self.weights, strict=True)):
            for expert, weight in zip(row, weights, strict=True):
                if self.mask[t] and 0 <= expert < self.config.n_routed_experts:
                    one = {name: value[expert] for name, value in self.parameters.items()}
                    hidden = self.x[t] @ one["gate_and_up_projs"] + one.get("gate_up_proj_bias", 0.0)
                    act = reference.activate(hidden[None], None, self.config.activation)[0]
                    y[t] += weight * (act @ one["down_projs"] + one.get("down_proj_bias", 0.0))
        return y


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-12, err_msg=name)


def nothing(result):
    return all(not value.any() for value in result.values())


after = pytest.mark.parametrize("after", [False, True], ids=["before_down", "after_down"])

# ---------------------------------------------------------------------------------------------------------- experts


@after
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["swiglu", "swigluoai", "quick_geglu", "geglu", "relu2"])
def test_experts_of_every_activation_are_the_sum_over_routes(name, bias, after):
    layer = Layer(expert_activation=name, expert_bias=bias, apply_router_weight_after_down=after)
    np.testing.assert_allclose(layer.run()["y"], layer.one_by_one(), rtol=1e-12)


@after
def test_experts_of_no_token_return_nothing_and_zero_gradients(after):
    result = Layer(tokens=0, apply_router_weight_after_down=after).run()
    assert result["y"].shape == result["dx"].shape == (0, D) and result["dweights"].shape == (0, K)
    assert result["gate_and_up_projs"].shape == (E, D, 10) and nothing(result)


@after
def test_experts_of_one_token_are_the_sum_over_its_routes(after):
    layer = Layer(tokens=1, apply_router_weight_after_down=after)
    np.testing.assert_allclose(layer.run()["y"], layer.one_by_one(), rtol=1e-12)


@after
def test_experts_of_masked_tokens_alone_give_zero_everywhere(after):
    layer = Layer(apply_router_weight_after_down=after)
    assert nothing(layer.run(mask=np.zeros(T, bool)))


@pytest.mark.parametrize("missing", [-1, E, -7, 10**6])
def test_experts_of_ids_outside_the_experts_give_zero_everywhere(missing):
    layer = Layer()
    assert nothing(layer.run(ids=np.full_like(layer.ids, missing)))


@pytest.mark.parametrize("missing", [-1, E, -E, 2**40])
def test_experts_with_one_id_out_of_range_are_those_with_its_weight_zero(missing):
    layer = Layer()
    ids, weights = layer.ids.copy(), layer.weights.copy()
    ids[2, 0], weights[2, 0] = missing, 0.0
    found, wanted = layer.run(ids=ids), layer.run(weights=weights)
    # Only the route of weight zero has a gradient of its weight; neither has any other effect.
    assert found["dweights"][2, 0] == 0 and wanted["dweights"][2, 0] != 0
    wanted["dweights"][2, 0] = 0
    assert_equal(found, wanted)


def test_experts_with_all_tokens_to_one_leave_the_others_without_gradient():
    layer = Layer()
    result = layer.run(ids=np.full_like(layer.ids, 2))
    layer.ids = np.full_like(layer.ids, 2)
    np.testing.assert_allclose(result["y"], layer.one_by_one(), rtol=1e-12)
    for name in layer.parameters:
        assert not np.delete(result[name], 2, axis=0).any() and result[name][2].any()


@pytest.mark.parametrize("k", [1, E])
def test_experts_with_k_at_its_ends_are_the_sum_over_routes(k):
    layer = Layer(n_activated_experts=k)
    np.testing.assert_allclose(layer.run()["y"], layer.one_by_one(), rtol=1e-12)


def test_experts_of_a_single_expert_are_one_mlp():
    layer = Layer(n_routed_experts=1, n_activated_experts=1)
    np.testing.assert_allclose(layer.run()["y"], layer.one_by_one(), rtol=1e-12)


@after
def test_experts_with_duplicate_ids_add_their_weights(after):
    """One route with both weights is the same output; each slot has its own gradient."""
    layer = Layer(apply_router_weight_after_down=after)
    ids, weights = layer.ids.copy(), layer.weights.copy()
    ids[:, 1] = ids[:, 0]
    twice = layer.run(ids=ids)
    weights[:, 0] += weights[:, 1]
    ids_once = ids.copy()
    ids_once[:, 1] = -1
    once = layer.run(ids=ids_once, weights=weights)
    np.testing.assert_allclose(twice["dweights"][:, 0], once["dweights"][:, 0], rtol=1e-11)
    np.testing.assert_allclose(twice["dweights"][:, 1], once["dweights"][:, 0], rtol=1e-11)
    for name in twice.keys() - {"dweights"}:
        np.testing.assert_allclose(twice[name], once[name], rtol=1e-11, atol=1e-12, err_msg=name)


@after
def test_experts_with_zero_weights_give_zero_output_and_still_a_gradient_of_the_weights(after):
    layer = Layer(apply_router_weight_after_down=after)
    result = layer.run(weights=np.zeros_like(layer.weights))
    assert not result["y"].any() and not result["dx"].any() and not result["down_projs"].any()
    np.testing.assert_allclose(result["dweights"], layer.run()["dweights"], rtol=1e-11)


@after
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_experts_with_poison_in_a_masked_row_are_unchanged(poison, after):
    layer = Layer(apply_router_weight_after_down=after)
    layer.mask[3] = False
    clean = layer.run()
    x, weights, dy = layer.x.copy(), layer.weights.copy(), layer.dy.copy()
    x[3], weights[3], dy[3] = poison, poison, poison
    for name, value in layer.run(x=x, weights=weights, dy=dy).items():
        np.testing.assert_array_equal(value, clean[name], err_msg=name)


def test_experts_with_nan_in_one_expert_keep_it_to_its_tokens():
    layer = Layer()
    layer.parameters["gate_and_up_projs"][1] = np.nan
    result, touched = layer.run(), (layer.ids == 1).any(-1)
    assert touched.any() and not touched.all()
    assert np.isnan(result["y"][touched]).all() and np.isfinite(result["y"][~touched]).all()
    assert all(np.isfinite(np.delete(result[name], 1, axis=0)).all() for name in layer.parameters)


@after
def test_experts_of_both_weight_placements_are_equal_in_exact_arithmetic(after):
    one, other = Layer(), Layer(apply_router_weight_after_down=after)
    assert_equal(other.run(), one.run())


def test_experts_take_ids_of_int32_and_leave_their_inputs_alone():
    layer = Layer()
    before = [value.copy() for value in (layer.x, layer.weights, layer.ids, layer.mask, *layer.parameters.values())]
    assert_equal(layer.run(ids=layer.ids.astype(np.int32)), layer.run())
    now = (layer.x, layer.weights, layer.ids, layer.mask, *layer.parameters.values())
    assert all((a == b).all() for a, b in zip(before, now, strict=True))


def test_experts_of_permuted_tokens_are_permuted():
    layer, order = Layer(), np.random.default_rng(1).permutation(T)
    moved = layer.run(x=layer.x[order], weights=layer.weights[order], ids=layer.ids[order], dy=layer.dy[order])
    wanted = {n: v[order] if n in ("y", "dx", "dweights") else v for n, v in layer.run().items()}
    assert_equal(moved, wanted)


# ------------------------------------------------------------------------------------------------------------- ranks


def over_ranks(layer, counts):
    """The layer's result with its tokens on len(counts) ranks that hold E / len(counts) experts each."""
    n, held = len(counts), E // len(counts)
    cuts = np.cumsum(counts)[:-1]
    split = {name: np.split(getattr(layer, name), cuts) for name in ("x", "weights", "ids", "mask", "dy")}
    ranks = [
        Tokens(x_TD=x, weights_TK=w, ids_TK=i, token_mask_T=m)
        for x, w, i, m in zip(split["x"], split["weights"], split["ids"], split["mask"], strict=True)
    ]
    config = MoEConfig(n_routed_experts=held, n_activated_experts=1, dim=D, moe_inter_dim=5, expert_bias=True)
    parts = [{k: v[r * held : (r + 1) * held] for k, v in layer.parameters.items()} for r in range(n)]
    traces = [
        reference.experts(sent.x_TD, sent.token_mask_T, sent.weights_TK, sent.ids_TK, part, config, partial=True)
        for sent, part in zip(reference.dispatch(ranks, E), parts, strict=True)
    ]
    y = reference.combine(counts, [trace.y_TD for trace in traces])
    backward = [
        reference.experts_vjp(trace, part, config, dy)
        for trace, part, dy in zip(traces, parts, reference.combine_vjp(split["dy"]), strict=True)
    ]
    gathered = reference.dispatch_vjp(counts, [b[0] for b in backward], [b[1] for b in backward])
    return {
        "y": np.concatenate(y),
        "dx": np.concatenate([dx for dx, _ in gathered]),
        "dweights": np.concatenate([dweights for _, dweights in gathered]),
    } | {name: np.concatenate([b[2][name] for b in backward]) for name in layer.parameters}


@pytest.mark.parametrize(
    "counts",
    [[7], [4, 3], [7, 0], [0, 7], [2, 2, 2, 1], [0, 5, 0, 2], [7, 0, 0, 0], [0, 0, 0, 0]],
    ids=lambda counts: "_".join(map(str, counts)),
)
def test_dispatch_and_combine_over_ranks_equal_a_single_rank(counts):
    layer = Layer(tokens=sum(counts))
    if sum(counts):
        layer.mask[1] = False
        layer.ids[0], layer.ids[2, 1], layer.ids[3] = [-1, E], E + 1, [2, 2]
    assert_equal(over_ranks(layer, counts), layer.run())


@pytest.mark.parametrize(
    "wire, least, most", [(None, 0.9, 1.8), ("bfloat16", 0.9, 1.8), ("float32", 0, 0.01)], ids=["x", "x named", "wide"]
)
def test_combine_rounds_each_ranks_part_once_on_the_wire_and_their_sum_once(wire, least, most):
    """Parts that cancel: what is left of the error is that of the wire, and the sum's own rounding next to nothing."""
    rng = np.random.default_rng(0)
    part = rng.normal(size=(1000, 4))
    y = [part, 1e-3 - part]
    found = np.concatenate(reference.combine([600, 400], y, Noise("bfloat16", 0), wire))
    roundoff = 2.0**-8 * np.sqrt(2 / 3) * np.sqrt(np.mean(part**2))  # of two roundings, each uniform
    assert least < np.std(found - 1e-3) / roundoff < most
    assert np.allclose(np.concatenate(reference.combine([600, 400], y, wire=wire)), 1e-3)


def test_dispatch_of_ids_out_of_range_reaches_no_rank():
    """An id past the last expert, or below zero, must not become a neighbour's after the shift."""
    tokens = Tokens(
        x_TD=np.ones((1, 1)),
        weights_TK=np.ones((1, 4)),
        ids_TK=np.array([[-1, 4, -2, 5]]),
        token_mask_T=np.array([True]),
    )
    empty = Tokens(
        x_TD=np.ones((0, 1)), weights_TK=np.ones((0, 4)), ids_TK=np.zeros((0, 4), int), token_mask_T=np.zeros(0, bool)
    )
    for sent in reference.dispatch([tokens, empty], 4):
        assert sent.ids_TK.tolist() == [[2, 2, 2, 2]]
