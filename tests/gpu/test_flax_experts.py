"""The Flax experts on an NVIDIA GPU with the vendors' backends: every gradient and mode, layers, transformations.

tests/gpu/test_experts.py has the backends that need no package.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import on_gpu
import problems
import pytest
from sides import Problem, Side, assert_correct, cached_problem, expected

from moebius.compare.judge import judge
from moebius.compare.sides import parse
from moebius.compare.sides import run as run_side
from moebius.compare.sides.answer import Answer, Desk
from moebius.compare.sides.flax_side import build, on
from moebius.compare.verdict import PASS
from moebius.core import Unsupported, reference
from moebius.core.activations import CONFIG_ACTIVATIONS
from moebius.core.config import REMATS
from moebius.core.precision import EXACT
from moebius.core.tolerance import bounds, within

pytestmark = on_gpu.MARKS
vendors = pytest.mark.parametrize("backend", on_gpu.VENDORS)
# Widths that Hopper's TMA takes: multiples of 64. SIZES, the default of `cached_problem`, are not.
WIDE = {"tokens": 200, "dim": 128, "inter": 64, "n_experts": 8, "k": 2, "dtype": "bfloat16", "expert_bias": True}
SMALL = {"tokens": 40, "dim": 24, "inter": 16, "n_experts": 4, "k": 2, "dtype": "bfloat16", "expert_bias": True}
NAMES = ("y", "dx", "dweights")
Arrays = dict[str, np.ndarray]


def side_of(backend: str, dtype: str = "bfloat16") -> Side:
    on_gpu.require(backend, dtype)
    return Side("jax", backend, "cuda")


def arrays(side: Side, p: Problem) -> tuple[Any, ...]:
    """parameters, x, weights, mask, ids, dy."""
    parameters = {name: side.array(value, p.dtype) for name, value in p.parameters.items()}
    wide = side.array(p.x, p.dtype), side.array(p.weights, p.weights_dtype)
    return parameters, *wide, side.array(p.token_mask), side.array(p.ids), side.array(p.dy, p.dtype)


@cache
def program(config: Any, backend: str, remat: str = "act", double_backward: bool = False) -> Any:
    """(parameters, x, weights, mask, ids, dy) -> y and its gradients, jitted."""
    import jax

    from moebius.jax_frontend import experts

    def run(parameters: Any, x: Any, weights: Any, mask: Any, ids: Any, dy: Any) -> Any:
        how = {"config": config, "backend": backend, "remat": remat, "double_backward": double_backward}
        forward = lambda p, x, w: experts(p, x, mask, w, ids, **how)  # noqa: E731
        y, pull = jax.vjp(forward, parameters, x, weights)
        return y, pull(dy)

    return jax.jit(run)


def named(side: Side, found: Any) -> Arrays:
    y, (dparameters, dx, dweights) = found
    values = dict(zip(NAMES, (y, dx, dweights), strict=True)) | dparameters
    return {name: side.numpy(value) for name, value in values.items()}


def assert_near_reference(p: Problem, found: Arrays) -> None:
    exact, limits = expected(p)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert within(value, exact[name], limits[name]), name


# ------------------------------------------------------------------------------------------------------------ gradients
@vendors
@pytest.mark.parametrize("activation", CONFIG_ACTIVATIONS)
def test_experts_on_a_gpu_agree_with_reference(backend: str, activation: str) -> None:
    assert_correct(side_of(backend), cached_problem(expert_activation=activation, **SMALL))


@pytest.mark.parametrize(("backend", "dtype"), [("tokamax", "float32"), ("tokamax", "float16"), ("te", "float16")])
def test_experts_on_a_gpu_in_other_dtypes_agree_with_reference(backend: str, dtype: str) -> None:
    assert_correct(side_of(backend, dtype), cached_problem(**{**SMALL, "dtype": dtype}))


@vendors
@pytest.mark.parametrize("after", [False, True], ids=["before_down", "after_down"])
def test_experts_on_a_gpu_of_wide_rows_agree_with_reference(backend: str, after: bool) -> None:
    assert_correct(side_of(backend), cached_problem(apply_router_weight_after_down=after, **WIDE))


@vendors
@pytest.mark.parametrize("tokens", [0, 1])
def test_experts_on_a_gpu_of_few_tokens_agree_with_reference(backend: str, tokens: int) -> None:
    assert_correct(side_of(backend), cached_problem(**{**SMALL, "tokens": tokens}))


@vendors
def test_experts_on_a_gpu_keep_poison_in_masked_tokens_to_themselves(backend: str) -> None:
    side, p = side_of(backend), cached_problem(**SMALL)
    mask = p.token_mask.copy()
    mask[3] = False
    clean, x, weights = p.but(token_mask=mask), p.x.copy(), p.weights.copy()
    x[3], weights[3] = np.nan, np.inf
    found, wanted = side.experts(clean.but(x=x, weights=weights)), side.experts(clean)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@vendors
@pytest.mark.parametrize(
    ("remat", "double_backward"), [*((remat, False) for remat in REMATS if remat != "act"), ("act", True)], ids=str
)
def test_experts_on_a_gpu_in_every_mode_agree_with_reference(backend: str, remat: str, double_backward: bool) -> None:
    side, p = side_of(backend), cached_problem(**SMALL)
    assert_near_reference(p, named(side, program(p.config, backend, remat, double_backward)(*arrays(side, p))))


def test_experts_on_a_gpu_have_forward_mode_with_double_backward_alone() -> None:
    import jax

    from moebius.jax_frontend import experts

    side, p = side_of("tokamax"), cached_problem(**SMALL)
    parameters, x, weights, mask, ids, dy = arrays(side, p)

    def along(double: bool) -> Any:
        how = {"config": p.config, "backend": "tokamax", "double_backward": double}
        forward = lambda x: experts(parameters, x, mask, weights, ids, **how)  # noqa: E731
        return jax.jit(lambda x, dx: jax.jvp(forward, (x,), (dx,)))(x, dy)

    y, dy_dx = along(True)
    exact, limits = expected(p)
    assert within(side.numpy(y), exact["y"], limits["y"])
    # <dy, J dx> = <J^T dy, dx>, with the reference's J^T dy.
    left = float(np.vdot(p.dy, side.numpy(dy_dx)))
    room = limits["dx"].norm * float(np.linalg.norm(p.dy)) + limits["y"].norm * float(np.linalg.norm(p.dy))
    assert abs(left - float(np.vdot(exact["dx"], p.dy))) <= room
    with pytest.raises(Unsupported):
        along(False)


# --------------------------------------------------------------------------------------------------------------- layers
def test_layers_on_a_gpu_pass_at_every_stage() -> None:
    names = [f"flax:{backend}@gpu" for backend in on_gpu.VENDORS if on_gpu.served(backend)]
    if not names:
        pytest.skip("neither tokamax nor Transformer Engine is there")
    p = problems.problem("gpt_oss", "bfloat16")
    with Desk() as desk:
        answers = {side.name: run_side(p, side, desk) for side in parse([*names, "torch:grouped_mm@cuda"])}
        layer = judge(p, answers)
    assert layer.verdict == PASS, layer.faults


@vendors
def test_layers_on_a_gpu_as_users_call_them_pass(backend: str) -> None:
    """Output and every gradient, the experts one operator; the stages of the test above run one by one."""
    import jax
    from flax import nnx

    on_gpu.require(backend)
    p, device = problems.problem("deepseek", "bfloat16"), on("gpu")
    layer = build(p, device, backend)
    x, dy = (jax.device_put(value, device).astype("bfloat16") for value in (p.x_TD, p.dy_TD))
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def run(parameters: Any, rest: Any, x: Any, dy: Any) -> Any:
        forward = lambda parameters, x: nnx.merge(graph, parameters, rest, copy=True)(x)  # noqa: E731
        y, pull = jax.vjp(forward, parameters, x)
        return y, pull(dy)

    y, (dparameters, dx) = run(parameters, rest, x, dy)
    leaves = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(dparameters)}
    found = {"output": y, "grad.x": dx, **{f"grad.{name}": value for name, value in leaves.items()}}
    _, ids, _ = layer.gate(x, jax.numpy.ones(len(x), bool))
    tensors = {name: np.asarray(value, np.float32) for name, value in found.items()}
    verdict = judge(p, {"as called": Answer(ids_TK=np.sort(np.asarray(ids, np.int64), axis=-1), tensors=tensors)})
    assert verdict.verdict == PASS, verdict.faults


# ------------------------------------------------------------------------------------------------------ transformations
def two_layers(p: Problem, arithmetic: Any) -> Arrays:
    """The reference of the experts applied twice, with the same routing."""
    args = p.token_mask, p.weights, p.ids, p.parameters, p.config, arithmetic
    first = reference.experts(p.x, *args)
    second = reference.experts(first.y_TD, *args)
    dmiddle, dw2, grads2 = reference.experts_vjp(second, p.parameters, p.config, p.dy, arithmetic)
    dx, dw1, grads1 = reference.experts_vjp(first, p.parameters, p.config, dmiddle, arithmetic)
    layers = {name: np.stack([grads1[name], grads2[name]]) for name in grads1}
    return {"y": second.y_TD, "dx": dx, "dweights": np.stack([dw1, dw2]), **layers}


@vendors
def test_experts_on_a_gpu_in_checkpointed_layers_under_scan_agree_with_reference(backend: str) -> None:
    import jax
    import jax.numpy as jnp

    from moebius.jax_frontend import experts

    side, p = side_of(backend), cached_problem(**SMALL)
    parameters, x, weights, mask, ids, dy = arrays(side, p)

    def layer(x: Any, own: Any) -> Any:
        return experts(own[0], x, mask, own[1], ids, config=p.config, backend=backend), None

    @jax.jit
    def run(stacked: Any, x: Any, weights: Any) -> Any:
        forward = lambda stacked, x, weights: jax.lax.scan(jax.checkpoint(layer), x, (stacked, weights))[0]  # noqa: E731
        y, pull = jax.vjp(forward, stacked, x, weights)
        return y, pull(dy)

    twice = {name: jnp.stack([value, value]) for name, value in parameters.items()}
    found = named(side, run(twice, x, jnp.stack([weights, weights])))
    exact = two_layers(p, EXACT)
    limits = bounds(lambda arithmetic: two_layers(p, arithmetic), exact, p.dtype)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert within(value, exact[name], limits[name]), name


@vendors
def test_experts_on_a_gpu_with_a_donated_input_give_the_same_bits(backend: str) -> None:
    import jax

    from moebius.jax_frontend import experts

    side, p = side_of(backend), cached_problem(**SMALL)
    parameters, x, weights, mask, ids, _ = arrays(side, p)
    forward = lambda x: experts(parameters, x, mask, weights, ids, config=p.config, backend=backend)  # noqa: E731
    wanted = np.asarray(jax.jit(forward)(x), np.float32)
    found = np.asarray(jax.jit(forward, donate_argnums=0)(x), np.float32)
    assert x.is_deleted()
    np.testing.assert_array_equal(found, wanted)


@vendors
def test_experts_on_a_gpu_compile_once_for_all_routings(backend: str) -> None:
    side, p = side_of(backend), cached_problem(**SMALL)
    run, given = program(p.config, backend, "full"), arrays(side, p)
    run(*given)
    before = run._cache_size()
    for ids in (np.zeros_like(p.ids), np.full_like(p.ids, -1), p.ids[::-1].copy()):
        changed = p.but(ids=ids)
        assert_near_reference(changed, named(side, run(*arrays(side, changed))))
    assert run._cache_size() == before
