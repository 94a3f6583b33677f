"""The Flax modules with the documented names, and Transformer Engine's permute and route, on an NVIDIA GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import on_gpu
import pytest
from sides import Side, cached_problem, expected, rounded

from moebius.core import BackendConfig, MoEConfig, reference
from moebius.core.precision import EXACT
from moebius.core.tolerance import bounds, within

pytestmark = on_gpu.MARKS
SMALL = {"tokens": 40, "dim": 24, "inter": 16, "n_experts": 4, "k": 2, "dtype": "bfloat16", "expert_bias": True}
SIDE = Side("jax", "te", "cuda")
KINDS = {
    "experts-tokamax": ("GroupedExperts", "tokamax"),
    "deepep-tokamax": ("GroupedExpertsDeepEP", "tokamax"),
    "deepep-loop": ("GroupedExpertsDeepEP", "loop"),
    "te": ("GroupedExpertsTE", None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_modules_on_a_gpu_agree_with_reference(kind: str) -> None:
    import jax
    from flax import nnx

    from moebius import jax_frontend

    name, backend = KINDS[kind]
    on_gpu.require(backend or "te")
    p = cached_problem(**SMALL)
    module: Any = getattr(jax_frontend, name)(
        p.config, BackendConfig(experts=backend), kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0)
    )
    assert module.backend_name == (backend or "te")
    if name != "GroupedExperts":
        module.init_token_dispatcher(jax.make_mesh((1,), ("ep",)))
    jax_frontend.load_parameters(module, {name: SIDE.array(value, p.dtype) for name, value in p.parameters.items()})
    graph, parameters, rest = nnx.split(module, nnx.Param, ...)

    @jax.jit
    def run(parameters: Any, x: Any, weights: Any, dy: Any, mask: Any, ids: Any) -> Any:
        forward = lambda own, x, w: nnx.merge(graph, own, rest, copy=True)(x, mask, w, ids)  # noqa: E731
        y, pull = jax.vjp(forward, parameters, x, weights)
        return y, pull(dy)

    x, dy = SIDE.array(p.x, p.dtype), SIDE.array(p.dy, p.dtype)
    weights, mask, ids = SIDE.array(p.weights, p.weights_dtype), SIDE.array(p.token_mask), SIDE.array(p.ids)
    y, (dparameters, dx, dweights) = run(parameters, x, weights, dy, mask, ids)
    grads = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(dparameters)}
    exact, limits = expected(p)
    found = {"y": y, "dx": dx, "dweights": dweights, **grads}
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert within(SIDE.numpy(value), exact[name], limits[name]), name


# -------------------------------------------------------------------------------------------------------------- permute
T, K, E, D = 300, 3, 8, 64


def tokens_of(dtype: str) -> tuple[Any, ...]:
    """x, weights, ids, mask: some masked, some slots without a route, one weight zero, one masked token not finite."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((T, E)), axis=-1)[:, :K]
    ids[5, 1], ids[6], ids[7, 0] = -1, E + 3, -1
    x, weights, mask = rounded(rng.normal(size=(T, D)), dtype), rng.random((T, K)) + 0.1, rng.random(T) < 0.8
    mask[:3] = True, True, False
    weights = rounded(weights, "float32")
    weights[0, 1], weights[2] = 0.0, np.nan
    return x, weights, ids, mask


def sent(x: Any, weights: Any, ids: np.ndarray, mask: np.ndarray) -> Any:
    from moebius.jax_frontend import Local

    return Local().dispatch(x, weights, SIDE.array(ids, "int32"), SIDE.array(mask), E)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_permute_te_on_a_gpu_agrees_with_reference(dtype: str) -> None:
    import jax

    from moebius.jax_frontend import permute
    from moebius.jax_frontend.permute import PERMUTERS

    on_gpu.require_step(PERMUTERS, "te")
    x, weights, ids, mask = tokens_of(dtype)
    wanted = reference.permute(x, weights, ids, mask, E)
    n = len(wanted.rows_RD)
    rng = np.random.default_rng(1)
    drows, dweights = rounded(rng.normal(size=(T * K, D)), dtype), rounded(rng.normal(size=T * K), "float32")
    drows[n:], dweights[n:] = np.nan, np.nan

    @jax.jit
    def run(x: Any, weights: Any, drows: Any, dweights: Any) -> Any:
        def forward(x: Any, weights: Any) -> Any:
            found = permute(sent(x, weights, ids, mask), E, backend="te")
            return (found.rows_RD, found.row_weights_R), (found.group_sizes_e, found.row_experts_R)

        values, pull, counts = jax.vjp(forward, x, weights, has_aux=True)
        return values, counts, pull((drows, dweights))

    given = (
        SIDE.array(x, dtype),
        SIDE.array(weights, "float32"),
        SIDE.array(drows, dtype),
        SIDE.array(dweights, "float32"),
    )
    (rows, row_weights), (sizes, owners), (dx, dweights_TK) = jax.tree.map(SIDE.numpy, run(*given))
    np.testing.assert_array_equal(rows[:n], wanted.rows_RD)
    np.testing.assert_array_equal(row_weights[:n], wanted.row_weights_R)
    assert not rows[n:].any() and not row_weights[n:].any()
    np.testing.assert_array_equal(sizes, wanted.group_sizes_e)
    np.testing.assert_array_equal(
        owners, np.append(np.repeat(np.arange(E), wanted.group_sizes_e), np.full(T * K - n, E))
    )

    def exact(arithmetic: Any) -> dict[str, np.ndarray]:
        slopes = reference.permute_vjp(wanted, drows[:n], dweights[:n], arithmetic)
        return dict(zip(("dx", "dweights"), slopes, strict=True))

    due = exact(EXACT)
    limits = bounds(exact, due, dtype)
    for name, value in {"dx": dx, "dweights": dweights_TK}.items():
        assert within(value, due[name], limits[name]), name


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unpermute_te_on_a_gpu_agrees_with_reference(dtype: str, weighted: bool) -> None:
    import jax

    from moebius.jax_frontend import permute, unpermute
    from moebius.jax_frontend.permute import PERMUTERS

    on_gpu.require_step(PERMUTERS, "te")
    x, weights, ids, mask = tokens_of(dtype)
    state = reference.permute(x, weights, ids, mask, E)
    n = len(state.rows_RD)
    rng = np.random.default_rng(2)
    out, dy = rounded(rng.normal(size=(T * K, D)), dtype), rounded(rng.normal(size=(T, D)), dtype)
    by = rounded(rng.random(T * K), "float32")
    out[n:], by[n:] = 0, 0

    @jax.jit
    def run(x: Any, weights: Any, out: Any, by: Any, dy: Any) -> Any:
        kept = permute(sent(x, weights, ids, mask), E, backend="te").state
        y, pull = jax.vjp(lambda out, by: unpermute(out, kept, by if weighted else None), out, by)
        return y, pull(dy)

    given = [
        SIDE.array(value, name) for value, name in ((x, dtype), (weights, "float32"), (out, dtype), (by, "float32"))
    ]
    y, (dout, dby) = jax.tree.map(SIDE.numpy, run(*given, SIDE.array(dy, dtype)))
    assert not dout[n:].any()

    def exact(arithmetic: Any) -> dict[str, np.ndarray]:
        scale = by[:n] if weighted else None
        slopes = reference.unpermute_vjp(out[:n], state, dy, scale, arithmetic)
        value = {"y": reference.unpermute(out[:n], state, scale, arithmetic), "dout": slopes[0]}
        return value | ({"dby": slopes[1]} if weighted else {})

    due = exact(EXACT)
    limits = bounds(exact, due, dtype)
    for name, value in {"y": y, "dout": dout[:n], "dby": dby[:n]}.items():
        assert name not in due or within(value, due[name], limits[name]), name


# ---------------------------------------------------------------------------------------------------------------- route
RULES: dict[str, tuple[dict[str, Any], bool]] = {
    "softmax": ({}, False),
    "before_normalised": ({"softmax_before_topk": True, "norm_topk_prob": True}, False),
    "deepseek": (
        {"score_func": "sigmoid_with_bias", "norm_topk_prob": True, "n_expert_groups": 4, "n_limited_groups": 2},
        True,
    ),
    "sqrtsoftplus": ({"score_func": "sqrtsoftplus", "norm_topk_prob": True}, True),
}


@pytest.mark.parametrize("rule", RULES)
def test_route_te_on_a_gpu_agrees_with_reference(rule: str) -> None:
    import jax

    from moebius.jax_frontend import route
    from moebius.jax_frontend.route import ROUTERS

    on_gpu.require_step(ROUTERS, "te")
    settings, biased = RULES[rule]
    sizes = {"n_routed_experts": 16, "n_activated_experts": 4, "dim": 8, "moe_inter_dim": 4, "route_scale": 2.5}
    config, rng = MoEConfig(**sizes, **settings), np.random.default_rng(0)
    logits, dweights = rounded(rng.normal(size=(200, 16)) * 2, "float32"), rounded(rng.normal(size=(200, 4)), "float32")
    bias = rounded(rng.normal(size=16) * 0.1, "float32") if biased else None

    @jax.jit
    def run(logits: Any, dweights: Any) -> Any:
        def forward(logits: Any) -> Any:
            b = None if bias is None else SIDE.array(bias, "float32")
            routing = route(logits, config, correction_bias_E=b, backend="te")
            return routing.weights_TK, routing.ids_TK

        weights, pull, ids = jax.vjp(forward, logits, has_aux=True)
        return weights, ids, pull(dweights)[0]

    found = run(SIDE.array(logits, "float32"), SIDE.array(dweights, "float32"))
    weights, ids, dlogits = map(SIDE.numpy, found)
    wanted = reference.route(logits, config, correction_bias_E=bias)
    np.testing.assert_array_equal(np.sort(ids, axis=-1), np.sort(wanted.ids_TK, axis=-1))

    def exact(arithmetic: Any) -> dict[str, np.ndarray]:
        routing = reference.route(logits, config, correction_bias_E=bias, ids_TK=ids, arithmetic=arithmetic)
        more = {"correction_bias_E": bias, "arithmetic": arithmetic}
        slope = reference.route_vjp(logits, config, ids, dweights, np.zeros_like(logits), **more)
        return {"weights": routing.weights_TK, "dlogits": slope}

    due = exact(EXACT)
    limits = bounds(exact, due, "float32")
    for name, value in {"weights": weights, "dlogits": dlogits}.items():
        assert within(value, due[name], limits[name]), name
