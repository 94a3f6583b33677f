"""How much a step multiplies. XLA's own count takes a loop's body once, so the loops are counted as they run."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.extend.core import ClosedJaxpr, Literal
from sides import cached_problem, reference_experts

from moebius.core import reference
from moebius.jax_frontend import experts, grouped_matmul, matmul_loop

R, E, D, F = 96, 4, 6, 5
SIZES = {
    "even": (24, 24, 24, 24),
    "skewed": (70, 1, 0, 25),
    "one_takes_all": (0, 96, 0, 0),
    "one_row_each": (1, 1, 1, 1),
    "across_blocks": (33, 31, 32, 0),
    "empty": (0, 0, 0, 0),
}


class Multiplications:
    """Runs a traced function equation by equation, loops as often as they run, and counts what it multiplies.

    Attributes:
        flops: 2 for each multiplication of a matrix product.
    """

    def __init__(self) -> None:
        self.flops = 0

    def __call__(self, closed: Any, *args: Any) -> list[Any]:
        """The outputs of a closed jaxpr."""
        jaxpr = closed.jaxpr
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))
        read = lambda var: var.val if isinstance(var, Literal) else values[var]  # noqa: E731
        for equation in jaxpr.eqns:
            found = self._run(equation, *map(read, equation.invars))
            values |= zip(equation.outvars, found, strict=True)
        return [read(var) for var in jaxpr.outvars]

    def _run(self, equation: Any, *args: Any) -> list[Any]:
        name, params = equation.primitive.name, equation.params
        if name in ("while", "scan"):
            return getattr(self, f"_{name}")(equation, args)
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if inner is None and hasattr(equation.primitive.impl, "lower"):  # an operator of our own
            inner = jax.make_jaxpr(partial(equation.primitive.impl, **params))(*args)
        if inner is not None:
            return self(inner if hasattr(inner, "consts") else ClosedJaxpr(inner, ()), *args)
        assert name not in ("cond", "ragged_dot_general", "pallas_call"), f"{name} is not counted here"
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            self.flops += 2 * equation.outvars[0].aval.size * int(np.prod([args[0].shape[i] for i in contracted]))
        found = equation.primitive.bind(*args, **params)
        return list(found) if equation.primitive.multiple_results else [found]

    def _while(self, equation: Any, args: Any) -> list[Any]:
        params = equation.params
        n, m = params["cond_nconsts"], params["body_nconsts"]
        carried = list(args[n + m :])
        while self(params["cond_jaxpr"], *args[:n], *carried)[0]:
            carried = self(params["body_jaxpr"], *args[n : n + m], *carried)
        return carried

    def _scan(self, equation: Any, args: Any) -> list[Any]:
        body, rows = equation.params["jaxpr"], []
        assert not equation.params["reverse"]
        # Versions of JAX number the parts differently; what is mapped over has one axis more outside than inside.
        mapped = [value.ndim > aval.ndim for value, aval in zip(args, body.in_avals, strict=True)]
        both = zip(equation.outvars, body.out_avals, strict=True)
        m, end = sum(var.aval.ndim == aval.ndim for var, aval in both), mapped.count(False)
        carried = list(args[end - m : end])
        for i in range(equation.params["length"]):
            found = self(body, *args[: end - m], *carried, *(value[i] for value in args[end:]))
            carried, row = found[:m], found[m:]
            rows.append(row)
        return carried + [jnp.stack(column) for column in zip(*rows, strict=True)]


KERNELS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "forward": (matmul_loop.product, ((R, D), (E, D, F))),
    "input_gradient": (partial(matmul_loop.product, transposed=True), ((R, F), (E, D, F))),
    "weight_gradient": (matmul_loop.weight_gradient, ((R, D), (R, F))),
}


@cache
def traced(kernel: str) -> tuple[Any, list[Any]]:
    """(what JAX traces of a kernel, its two arrays)."""
    run, shapes = KERNELS[kernel]
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    return jax.make_jaxpr(run)(*arrays, jnp.zeros(E, jnp.int32)), arrays


def scheduled(kernel: str, sizes: Any, n_rows: int = R) -> int:
    """Rows that the blocks of the backend's own schedule hold; a weight's gradient has one for an empty expert too."""
    block = matmul_loop._block(n_rows, len(sizes))
    blocks_e = np.asarray(matmul_loop._blocks(*matmul_loop._ranges(jnp.asarray(sizes, jnp.int32)), block))
    return block * int(np.maximum(blocks_e, 1 if kernel == "weight_gradient" else 0).sum())


def multiplied(kernel: str, sizes: Any) -> float:
    """Rows that a kernel multiplies when it runs; its result must be the reference's."""
    closed, arrays = traced(kernel)
    count = Multiplications()
    (found,) = count(closed, *arrays, jnp.asarray(sizes, jnp.int32))
    first, second = (np.asarray(array, np.float64) for array in arrays)
    if kernel == "weight_gradient":
        wanted = reference.grouped_matmul_vjp(first, np.zeros((E, D, F)), np.asarray(sizes), second)[1]
    else:
        weight = second.swapaxes(1, 2) if kernel == "input_gradient" else second
        wanted = reference.grouped_matmul(first, weight, np.asarray(sizes))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    return count.flops / (2 * D * F)


@settings(max_examples=12)
@given(cuts=st.lists(st.integers(0, R), min_size=E, max_size=E))
@example(cuts=[0, 0, 0, 0])
@pytest.mark.parametrize("kernel", KERNELS)
def test_loop_multiplies_the_rows_and_less_than_a_block_for_each_expert_for_any_sizes(kernel, cuts):
    _assert_bounded(kernel, np.diff([0, *sorted(cuts)]))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_loop_multiplies_the_rows_and_less_than_a_block_for_each_expert(kernel, sizes):
    _assert_bounded(kernel, SIZES[sizes])


def _assert_bounded(kernel: str, sizes: Any) -> None:
    found, block = multiplied(kernel, sizes), matmul_loop._block(R, E)
    assert found == scheduled(kernel, sizes)
    empty = sum(size == 0 for size in sizes)
    most = sum(sizes) + (E - empty) * (block - 1) + (empty * block if kernel == "weight_gradient" else 0)
    assert sum(sizes) <= found <= most <= sum(sizes) + E * block


@pytest.mark.parametrize("kernel", KERNELS)
def test_loop_visits_as_many_blocks_when_compiled(monkeypatch, kernel):
    """The very kernel, compiled; each of its blocks says where it lies."""
    visited, place = [], matmul_loop._place

    def spied(start, end, block, n_rows):
        jax.debug.callback(lambda first: visited.append((int(first), block)), start)
        return place(start, end, block, n_rows)

    monkeypatch.setattr(matmul_loop, "_place", spied)
    name = "weight_gradient" if kernel == "weight_gradient" else "product"
    settings = {"transposed": True} if kernel == "input_gradient" else {}
    run = jax.jit(partial(getattr(matmul_loop, name).__wrapped__, **settings))
    for sizes in SIZES.values():
        visited.clear()
        jax.block_until_ready(run(*traced(kernel)[1], jnp.asarray(sizes, jnp.int32)))
        jax.effects_barrier()
        assert sum(block for _, block in visited) == scheduled(kernel, sizes)


@pytest.mark.parametrize("rows, e", [(1, 1), (7, 64), (96, 4), (4096, 8), (4096, 64), (100_000, 3)])
def test_loop_blocks_are_no_larger_than_twice_an_experts_rows_or_the_smallest(rows, e):
    block = matmul_loop._block(rows, e)
    assert 1 <= block <= rows and block <= max(16, 2 * rows / e) and block <= 128


# Products of the step: up and down projection, and for each the gradients of its input and of its weight.
@pytest.mark.parametrize(
    "settings, ups",
    [
        ({"remat": "none"}, 1),
        ({"remat": "act"}, 1),
        ({"remat": "full"}, 2),
        ({"double_backward": True}, 1),
    ],
    ids=["none", "act", "full", "double_backward"],
)
def test_experts_multiply_each_projection_three_times_and_masked_tokens_never(settings, ups):
    p = cached_problem(tokens=40, dim=8, inter=4, expert_bias=True)
    p = p.but(token_mask=(p.ids < 2).all(1))  # of the masked tokens' experts, two have no others
    args = {name: jnp.float32(value) for name, value in p.parameters.items()}, jnp.float32(p.x), jnp.float32(p.weights)

    def run(*floats):
        def call(parameters, x, weights):
            mask, ids = jnp.asarray(p.token_mask), jnp.asarray(p.ids, jnp.int32)
            return experts(parameters, x, mask, weights, ids, config=p.config, backend="loop", **settings)

        return jax.vjp(call, *floats)[1](jnp.float32(p.dy))

    count = Multiplications()
    grads, dx, dweights = jax.tree.unflatten(
        jax.tree.structure(jax.eval_shape(run, *args)), count(jax.make_jaxpr(run)(*args), *jax.tree.leaves(args))
    )
    exact = reference_experts(p)
    for name, value in {**grads, "dx": dx, "dweights": dweights}.items():
        np.testing.assert_allclose(value, exact[name], rtol=1e-3, atol=1e-4)
    valid, every = (np.bincount(ids.reshape(-1), minlength=4) for ids in (p.ids[p.token_mask], p.ids))
    rows, dweight_rows = (scheduled(kernel, valid, p.ids.size) for kernel in ("forward", "weight_gradient"))
    assert 2 * rows <= scheduled("forward", every, p.ids.size)
    up, down = 2 * 8 * 8, 2 * 4 * 8
    assert count.flops == rows * (ups * up + down) + (rows + dweight_rows) * (up + down)


# ------------------------------------------------------------------------------------------------- as XLA counts it


@cache
def excess(backend: str | None, gradients: bool, n_experts: int) -> float:
    """What XLA counts for the compiled product, or for its gradients, over that of one matrix for all rows."""
    rows, weight = jax.ShapeDtypeStruct((256, 32), jnp.float32), jax.ShapeDtypeStruct((n_experts, 32, 48), jnp.float32)
    run: Any = partial(grouped_matmul, backend=backend)
    if gradients:
        run = jax.grad(lambda r, w, s: (grouped_matmul(r, w, s, backend=backend) ** 2).sum(), (0, 1))
    counted = jax.jit(run).lower(rows, weight, jax.ShapeDtypeStruct((n_experts,), jnp.int32)).compile()
    return counted.cost_analysis()["flops"] / (2 * 256 * 32 * 48 * (3 if gradients else 1))


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
def test_default_backend_of_64_experts_is_nothing_that_multiplies_every_row_by_every_expert(gradients):
    assert excess(None, gradients, 64) < 1.5


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
def test_ragged_dot_on_a_cpu_multiplies_every_row_by_every_expert(gradients):
    assert excess("ragged_dot", gradients, 64) > 32
    np.testing.assert_allclose(excess("ragged_dot", gradients, 64) / excess("ragged_dot", gradients, 16), 4, rtol=0.1)
