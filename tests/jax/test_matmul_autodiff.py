"""Steps 5 and 7: derivatives of every mode, order and transformation, for every backend of the registry."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from moebius.core import MoEConfig, reference
from moebius.core.registry import Problem
from moebius.jax_frontend import matmul_loop
from moebius.jax_frontend.dispatch import Local
from moebius.jax_frontend.experts import steps
from moebius.jax_frontend.matmul import BACKENDS, Kernels, grouped_matmul, linear

DTYPES = ("float64", "float32", "bfloat16", "float16")
R, E, D, F = 11, 3, 4, 5
SIZES = (3, 0, 6)  # an empty expert, two rows of padding
HERE = Problem(device="cpu", dtype="float64", dim=D, inter_dim=F, n_experts=E)
NAMES = [name for name, state in BACKENDS.explain(HERE) if state in ("chosen", "available", "available when named")]
backends = pytest.mark.parametrize("backend", NAMES)


@pytest.fixture
def double():
    """64-bit numbers on."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def operands(draws):
    """operands(dtype, seed): rows, weight, and a tangent of each."""

    def of(dtype="float64", seed=0):
        draw = draws(seed)
        return [jnp.asarray(draw(shape), dtype) for shape in ((R, D), (E, D, F), (R, D), (E, D, F))]

    return of


def curved(backend):
    """(rows, weight) -> [R, F], with a second derivative that is not constant."""
    return lambda rows, weight: jnp.sin(grouped_matmul(rows, weight, jnp.array(SIZES, jnp.int32), backend=backend))


@pytest.fixture
def register(monkeypatch):
    """register(name, kernels): one more backend."""

    def add(name, kernels):
        for table in ("_rows", "_loaded"):
            monkeypatch.setattr(BACKENDS, table, dict(getattr(BACKENDS, table)))
        BACKENDS.add(name=name, load=lambda: kernels)

    return add


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_matmul_forward_mode_agrees_with_reference(agree, wide, draws, cast, backend, dtype):
    draw, sizes = draws(0), np.array(SIZES)
    primals, tangents = ([draw((R, D), dtype), draw((E, D, F), dtype)] for _ in range(2))

    def run(arithmetic):
        of = partial(reference.grouped_matmul, group_sizes_e=sizes, arithmetic=arithmetic)
        (rows, weight), (drows, dweight) = primals, tangents
        return {"tangent": arithmetic.store(of(drows, weight) + of(rows, dweight))}

    with wide(dtype):
        call = partial(grouped_matmul, group_sizes_e=jnp.array(SIZES, jnp.int32), backend=backend)
        out, tangent = jax.jit(partial(jax.jvp, call))(cast(dtype, *primals), cast(dtype, *tangents))
        assert out.dtype == tangent.dtype == dtype
        agree({"tangent": tangent}, run, dtype)
    assert not np.asarray(tangent)[sum(SIZES) :].any()


@backends
def test_grouped_matmul_linearized_is_linear_and_its_transpose_is_the_gradient(operands, double, backend):
    rows, weight, *tangents = operands()
    others = operands(seed=1)[2:]
    _, push = jax.linearize(curved(backend), rows, weight)
    out, pull = jax.vjp(curved(backend), rows, weight)
    summed = push(*jax.tree.map(lambda a, b: 2 * a - 3 * b, tangents, others))
    np.testing.assert_allclose(summed, 2 * push(*tangents) - 3 * push(*others), rtol=1e-12, atol=1e-12)
    dout = jnp.cos(out)
    found = sum(jnp.vdot(grad, tangent) for grad, tangent in zip(pull(dout), tangents, strict=True))
    np.testing.assert_allclose(found, jnp.vdot(dout, push(*tangents)), rtol=1e-12)


@backends
def test_grouped_matmul_twice_in_any_modes_agrees_with_finite_differences(operands, double, backend):
    rows, weight, *_ = operands()
    check_grads(curved(backend), (rows, weight), order=2, modes=("fwd", "rev"))


@backends
def test_grouped_matmul_hessian_is_the_closed_form_in_every_order_of_modes(operands, double, backend):
    """Of |rows W|^2 / 2: for a row W_e W_e^T of its expert, for a matrix X_e^T X_e of its rows."""
    rows, weight, *_ = operands()
    owner = np.repeat(np.arange(E), SIZES)
    energy = lambda r, w: (grouped_matmul(r, w, jnp.array(SIZES, jnp.int32), backend=backend) ** 2).sum() / 2  # noqa: E731
    of_rows, of_weight = np.zeros((R, D, R, D)), np.zeros((E, D, F, E, D, F))
    for r, e in enumerate(owner):
        of_rows[r, :, r] = weight[e] @ weight[e].T
        for f in range(F):
            of_weight[e, :, f, e, :, f] += np.outer(rows[r], rows[r])
    for outer, inner in ((jax.jacfwd, jax.jacrev), (jax.jacrev, jax.jacfwd), (jax.jacfwd, jax.jacfwd)):
        (found_rows, cross), (crossed, found_weight) = jax.jit(outer(inner(energy, (0, 1)), (0, 1)))(rows, weight)
        np.testing.assert_allclose(found_rows, of_rows, atol=1e-12)
        np.testing.assert_allclose(found_weight, of_weight, atol=1e-12)
        np.testing.assert_allclose(cross, jnp.transpose(crossed, (3, 4, 0, 1, 2)), atol=1e-12)


@pytest.mark.parametrize(
    "derivative, wanted",
    [
        (lambda f: lambda r, w: jax.grad(f)(r, w), {"product": 1, "transposed": 1}),
        (lambda f: lambda r, w: jax.grad(f, 1)(r, w), {"product": 1, "weight_gradient": 1}),
        (lambda f: lambda r, w: jax.grad(f, (0, 1))(r, w), {"product": 1, "transposed": 1, "weight_gradient": 1}),
        (lambda f: lambda r, w: jax.jvp(lambda r: f(r, w), (r,), (r,)), {"product": 2}),
        (lambda f: lambda r, w: jax.jvp(lambda w: f(r, w), (w,), (w,)), {"product": 2}),
        (lambda f: lambda r, w: jax.jvp(f, (r, w), (r, w)), {"product": 3}),
    ],
    ids=["grad_rows", "grad_weight", "grad_both", "jvp_rows", "jvp_weight", "jvp_both"],
)
def test_grouped_matmul_derivative_computes_nothing_that_is_not_asked_for(equations, derivative, wanted):
    rows, weight, sizes = jnp.ones((R, D)), jnp.ones((E, D, F)), jnp.array(SIZES, jnp.int32)
    found = dict.fromkeys(wanted, 0)
    for e in equations(derivative(lambda r, w: jnp.sin(grouped_matmul(r, w, sizes)).sum()), rows, weight):
        if e.primitive.name.startswith("grouped_"):
            name = "transposed" if e.params.get("transposed") else e.primitive.name.removeprefix("grouped_")
            found[name] = found.get(name, 0) + 1
    assert found == wanted


def test_grouped_matmul_whose_result_gets_no_gradient_has_none():
    @jax.custom_vjp
    def cut(value):
        return value

    cut.defvjp(lambda value: (value, None), lambda _, dout: (None,))
    rows, weight, sizes = jnp.ones((R, D)), jnp.ones((E, D, F)), jnp.array(SIZES, jnp.int32)
    run = lambda r, w: cut(grouped_matmul(r, w, sizes)).sum() + r.sum()  # noqa: E731
    drows, dweight = jax.grad(run, (0, 1))(rows, weight)
    assert (drows == 1).all() and not dweight.any() and dweight.shape == weight.shape


def test_grouped_matmul_group_sizes_have_the_tangents_of_integers():
    args = jnp.ones((R, D)), jnp.ones((E, D, F)), jnp.array(SIZES, jnp.int32)
    none = np.zeros(E, jax.dtypes.float0)
    _, tangent = jax.jvp(grouped_matmul, args, (*args[:2], none))
    np.testing.assert_array_equal(tangent[: sum(SIZES)], 2 * D)
    out, pull = jax.vjp(grouped_matmul, *args)
    assert pull(out)[2].dtype == jax.dtypes.float0


@backends
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (4, 0, 4, 5)], ids=["no_rows", "no_experts"])
def test_grouped_matmul_derivatives_of_nothing_are_zero(backend, shape):
    r, e, d, f = shape
    rows, weight, sizes = jnp.ones((r, d)), jnp.ones((e, d, f)), jnp.zeros(e, jnp.int32)
    run = lambda rows, weight: grouped_matmul(rows, weight, sizes, backend=backend)  # noqa: E731
    tangent = jax.jvp(run, (rows, weight), (rows, weight))[1]
    drows, dweight = jax.jacfwd(jax.grad(lambda *args: (run(*args) ** 2).sum(), (0, 1)))(rows, weight)
    assert tangent.shape == (r, f) and drows.shape == (r, d, r, d) and dweight.shape == (e, d, f, r, d)
    assert not any(value.any() for value in (tangent, drows, dweight))


BATCH = 3
MAPPED = [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (1, None, 0), (-1, 2, 1)]


@pytest.fixture
def batch(draws):
    """batch(axes): arguments of which some are BATCH along their axis, and those of each call alone."""

    def of(axes):
        draw = draws(2)
        full = draw((BATCH, R, D)), draw((BATCH, E, D, F)), np.array([[3, 0, 6], [11, 0, 0], [0, 2, 1]])
        args = [
            value[0] if axis is None else np.moveaxis(value, 0, axis) for value, axis in zip(full, axes, strict=True)
        ]
        each = [[v[0 if axis is None else i] for v, axis in zip(full, axes, strict=True)] for i in range(BATCH)]
        typed = lambda values: [jnp.asarray(v, "int32" if v.dtype.kind == "i" else "float64") for v in values]  # noqa: E731
        return typed(args), [typed(values) for values in each]

    return of


def together(rows, weight, sizes, backend=None):
    """A value, its gradient, and the tangent of both."""

    def run(rows, weight):
        return (jnp.sin(grouped_matmul(rows, weight, sizes, backend=backend)) ** 2).sum()

    both = jax.value_and_grad(run, (0, 1))
    return jax.jvp(both, (rows, weight), (jnp.cos(rows), jnp.cos(weight)))


@pytest.mark.parametrize("axes", MAPPED, ids=str)
def test_grouped_matmul_derivatives_under_vmap_are_those_of_each_call(batch, double, axes):
    args, each = batch(axes)
    found = jax.jit(jax.vmap(together, axes))(*args)
    single = jax.jit(together)
    wanted = [single(*alone) for alone in each]
    jax.tree.map(
        lambda value, *parts: np.testing.assert_allclose(value, np.stack(parts), rtol=1e-12, atol=1e-12), found, *wanted
    )


@pytest.mark.parametrize("axes", MAPPED, ids=str)
def test_grouped_matmul_gradient_of_vmap_is_the_sum_of_each_calls(batch, double, axes):
    args, each = batch(axes)
    run = lambda r, w, s: (jnp.sin(grouped_matmul(r, w, s)) ** 2).sum()  # noqa: E731
    found = jax.jit(jax.grad(lambda *args: jax.vmap(run, axes)(*args).sum(), (0, 1)))(*args)
    single = jax.jit(jax.grad(run, (0, 1)))
    for value, axis, *parts in zip(found, axes, *[single(*alone) for alone in each], strict=False):
        wanted = np.sum(parts, 0) if axis is None else np.stack(parts, axis)
        np.testing.assert_allclose(value, wanted, rtol=1e-12, atol=1e-12)


def test_grouped_matmul_under_two_vmaps_is_the_table_of_calls(batch, double):
    (rows, weight, sizes), _ = batch((0, 0, 0))
    found = jax.vmap(jax.vmap(grouped_matmul, (None, 0, None)), (0, None, 0))(rows, weight, sizes)
    for i in range(BATCH):
        for j in range(BATCH):
            np.testing.assert_array_equal(found[i, j], grouped_matmul(rows[i], weight[j], sizes[i]))


def test_grouped_matmul_forward_mode_through_scan_and_remat_is_that_of_the_sum(operands, double):
    rows, weight, drows, dweight = operands()
    sizes = jnp.array([SIZES, (0, 11, 0)], jnp.int32)
    term = lambda r, w, s: (jnp.sin(grouped_matmul(r, w, s)) ** 2).sum()  # noqa: E731

    def scanned(rows, weight):
        body = lambda total, s: (total + jax.checkpoint(term)(rows, weight, s), None)  # noqa: E731
        return jax.lax.scan(body, jnp.zeros(()), sizes)[0]

    def product(run):
        return jax.jit(lambda *args: jax.jvp(jax.grad(run, (0, 1)), args, (drows, dweight))[1])(rows, weight)

    found, wanted = product(scanned), product(lambda r, w: term(r, w, sizes[0]) + term(r, w, sizes[1]))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), found, wanted)


def test_grouped_matmul_forward_mode_of_other_sizes_traces_once(traces, operands):
    arrays = operands("float32")
    run, seen = traces(lambda r, w, dr, dw, s: jax.jvp(lambda r, w: grouped_matmul(r, w, s), (r, w), (dr, dw)))
    for sizes in (SIZES, (11, 0, 0), (0, 0, 0)):
        run(*arrays, jnp.array(sizes, jnp.int32))
    assert len(seen) == 1


def test_grouped_matmul_outside_jit_traces_its_kernels_once(register, operands):
    """Each eager call would otherwise build, trace and compile its loops anew: half a second each."""
    seen = []

    def noted(kernel):
        return lambda *args: seen.append(kernel) or kernel(*args)

    register("noted", Kernels(noted(matmul_loop.product), noted(matmul_loop.weight_gradient)))
    rows, weight, *_ = operands("float32")
    counts = []
    for sizes in (SIZES, (11, 0, 0), (0, 0, 0)):
        call = partial(grouped_matmul, group_sizes_e=jnp.array(sizes, jnp.int32), backend="noted")
        out, pull = jax.vjp(call, rows, weight)
        pull(out)
        counts.append(len(seen))
    assert counts[0] >= 3 and counts == counts[:1] * 3


def sealed(kernel):
    """The kernel behind a primitive that JAX can neither differentiate nor map, as a call of a vendor's library is."""
    primitive = Primitive("sealed")
    primitive.def_abstract_eval(lambda *types, kernel: jax.make_jaxpr(kernel)(*types).out_avals[0])
    mlir.register_lowering(primitive, mlir.lower_fun(lambda *args, kernel: kernel(*args), multiple_results=False))
    return partial(primitive.bind, kernel=kernel)


def test_grouped_matmul_of_kernels_that_jax_cannot_transform_has_every_derivative(register, batch, double):
    transposable = lambda r, w, s, t: sealed(partial(matmul_loop.product, transposed=t))(r, w, s)  # noqa: E731
    register("vendor", Kernels(transposable, sealed(matmul_loop.weight_gradient)))
    args, _ = batch((0, 0, 0))
    found, wanted = (jax.jit(jax.vmap(partial(together, backend=name)))(*args) for name in ("vendor", "loop"))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_grouped_matmul_kernel_chooses_by_the_platform_it_is_lowered_for(register):
    def product(rows, weight, group_sizes, transposed=False):
        plain = partial(matmul_loop.product, transposed=transposed)
        marked = lambda *args: jnp.cos(plain(*args))  # noqa: E731
        return jax.lax.platform_dependent(rows, weight, group_sizes, cuda=marked, default=plain)

    register("by_platform", Kernels(product, matmul_loop.weight_gradient))
    args = jnp.ones((R, D)), jnp.ones((E, D, F)), jnp.array(SIZES, jnp.int32)
    run = jax.jit(partial(grouped_matmul, backend="by_platform"))
    texts = [jax.export.export(run, platforms=[name])(*args).mlir_module() for name in ("cpu", "cuda")]
    assert ["cosine" in text for text in texts] == [False, True]


@pytest.mark.parametrize("devices", [False, True])
def test_grouped_matmul_lowered_without_devices_is_refused_only_to_kernels_that_need_them(register, devices):
    register(f"devices_{devices}", Kernels(matmul_loop.product, matmul_loop.weight_gradient, devices=devices))
    everywhere = NamedSharding(AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec())
    shapes = ((R, D), "float32"), ((E, D, F), "float32"), ((E,), "int32")
    args = [jax.ShapeDtypeStruct(*each, sharding=everywhere) for each in shapes]
    traced = jax.jit(partial(grouped_matmul, backend=f"devices_{devices}")).trace(*args)
    with pytest.raises(ValueError, match="require devices") if devices else nullcontext():
        assert "dot_general" in traced.lower(lowering_platforms=("cuda",)).as_text()


PARTITIONED = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from moebius.jax_frontend import grouped_matmul, matmul_loop
from moebius.jax_frontend.matmul import BACKENDS, Kernels

@custom_partitioning
def twice(value):
    return 2 * value

def partition(mesh, args, result):
    return mesh, lambda value: 2 * value, args[0].sharding, (args[0].sharding,)

twice.def_partition(partition, sharding_rule="i j -> i j")
product = lambda *args: twice(matmul_loop.product(*args))
BACKENDS.add(name="vendor", load=lambda: Kernels(product, matmul_loop.weight_gradient, devices=True))
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
put = lambda value: jax.device_put(value, NamedSharding(mesh, P()))
rows, weight, sizes = put(jnp.ones((8, 4))), put(jnp.ones((3, 4, 5))), put(jnp.array([3, 0, 5], jnp.int32))
run = lambda rows, weight: grouped_matmul(rows, weight, sizes, backend="vendor")
np.testing.assert_array_equal(jax.jit(run)(rows, weight), 8)
np.testing.assert_array_equal(jax.jit(jax.grad(lambda *args: run(*args).sum()))(rows, weight), 10)
"""


def test_grouped_matmul_of_a_kernel_with_a_partitioning_of_its_own_runs_on_several_devices(run_alone):
    run_alone(PARTITIONED, XLA_FLAGS="--xla_force_host_platform_device_count=2")


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_forward_mode_agrees_with_reference(agree, wide, draws, cast, dtype):
    draw = draws(3)
    primals, tangents = ([draw((2, 3, D), dtype), draw((F, D), dtype), draw((F,), dtype)] for _ in range(2))

    def run(arithmetic):
        (x, weight, _), (dx, dweight, dbias) = (
            [a.reshape(-1, a.shape[-1]) for a in arrays] for arrays in (primals, tangents)
        )
        moved = arithmetic.dot(dx, weight.T) + arithmetic.dot(x, dweight.T) + dbias
        return {"tangent": arithmetic.store(moved).reshape(2, 3, F)}

    with wide(dtype):
        tangent = jax.jit(partial(jax.jvp, linear))(cast(dtype, *primals), cast(dtype, *tangents))[1]
        assert tangent.dtype == dtype
        agree({"tangent": tangent}, run, dtype)


@pytest.mark.parametrize(
    "axes, shapes",
    [
        (None, ((2, 3, D), (F, D))),
        ((0, None), ((2, 3, D), (F, D))),
        ((None, 1), ((3, D), (F, 2, D))),
        ((2, 0), ((3, D, 2), (2, F, D))),
    ],
    ids=["alone", "rows_mapped", "weight_mapped", "both_mapped"],
)
def test_linear_twice_in_any_modes_agrees_with_finite_differences(draws, double, axes, shapes):
    x, weight = map(jnp.asarray, map(draws(4), shapes))
    run = lambda x, weight: jnp.sin(linear(x, weight))  # noqa: E731
    check_grads(run if axes is None else jax.vmap(run, axes), (x, weight), order=2, modes=("fwd", "rev"))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import AxisType, PartitionSpec as P
from moebius.jax_frontend import grouped_matmul
jax.config.update("jax_enable_x64", True)
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
rows, weight, drows, dweight = (jnp.asarray(rng.normal(size=shape)) for shape in ((8, 4), (3, 4, 5)) * 2)
sizes = jnp.array([[1, 0, 2], [0, 3, 1]], jnp.int32)

def here(rows, weight, sizes):
    return jnp.sin(grouped_matmul(rows, weight, sizes[0]))

def whole(rows, weight):
    return jnp.concatenate([here(rows[:4], weight, sizes[:1]), here(rows[4:], weight, sizes[1:])])

def derivatives(run):
    scalar = lambda *args: (run(*args) ** 2).sum()
    pair = (rows, weight), (drows, dweight)
    return jax.jvp(run, *pair), jax.grad(scalar, (0, 1))(*pair[0]), jax.jvp(jax.grad(scalar, (0, 1)), *pair)

wanted = jax.jit(lambda: derivatives(whole))()
for check_vma in (True, False):
    specs = {"in_specs": (P("data"), P(), P("data")), "out_specs": P("data"), "check_vma": check_vma}
    sharded = jax.shard_map(here, mesh=mesh, **specs)
    found = jax.jit(lambda: derivatives(lambda rows, weight: sharded(rows, weight, sizes)))()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), found, wanted)
    np.testing.assert_allclose(sharded(rows, weight, sizes), whole(rows, weight), rtol=1e-12)  # without jit
"""


def test_grouped_matmul_inside_shard_map_has_the_derivatives_of_the_whole_with_and_without_check_vma(run_alone):
    run_alone(SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=2")


@pytest.mark.parametrize("after", [False, True], ids=["weights_before", "weights_after"])
def test_steps_forward_mode_agrees_with_central_differences_and_reverse_mode(draws, double, after):
    config = MoEConfig(
        n_routed_experts=4,
        n_activated_experts=2,
        dim=6,
        moe_inter_dim=5,
        dtype="float64",
        expert_bias=True,
        apply_router_weight_after_down=after,
    )
    draw, rng = draws(5), np.random.default_rng(5)
    shapes = {
        "gate_and_up_projs": (4, 6, 10),
        "down_projs": (4, 5, 6),
        "gate_up_proj_bias": (4, 10),
        "down_proj_bias": (4, 6),
    }
    primals, tangents = (
        (
            {name: jnp.asarray(draw(shape)) for name, shape in shapes.items()},
            *map(jnp.asarray, (draw((7, 6)), draw((7, 2)))),
        )
        for _ in range(2)
    )
    ids, mask = jnp.asarray(np.argsort(rng.random((7, 4)), -1)[:, :2], jnp.int32), jnp.arange(7) != 3

    @jax.jit
    def run(parameters, x, weights):
        sent, _ = Local().dispatch(x, weights, ids, mask, 4)
        return steps(parameters, sent, config)

    push = jax.jit(partial(jax.jvp, run))
    leaves, tree = jax.tree.flatten(tangents)
    for i in range(len(leaves)):  # x, the weights and each parameter alone
        only = jax.tree.unflatten(tree, [leaf if i == j else 0 * leaf for j, leaf in enumerate(leaves)])
        tangent = push(primals, only)[1]
        ahead, behind = (run(*jax.tree.map(lambda p, t, h=h: p + h * t, primals, only)) for h in (1e-5, -1e-5))
        assert np.abs(tangent).max() > 1e-3
        np.testing.assert_allclose(tangent, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-8)
    out, tangent = push(primals, tangents)
    pulled = jax.jit(lambda primals, dout: jax.vjp(run, *primals)[1](dout))(primals, jnp.cos(out))
    found = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(pulled), leaves, strict=True))
    np.testing.assert_allclose(found, jnp.vdot(jnp.cos(out), tangent), rtol=1e-12)
