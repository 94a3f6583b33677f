"""Backend "te" of permute on a stand-in for Transformer Engine, which leaves NaN where the package writes nothing."""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import transformer_engine_jax as te

from moebius.core import BackendUnavailable, ConfigError, MoEConfig, Unsupported, reference
from moebius.core.registry import Problem
from moebius.jax_frontend import Local, permute, unpermute
from moebius.jax_frontend.experts import steps
from moebius.jax_frontend.permute import PERMUTERS, PermuteState

T, K, E, D = 7, 3, 4, 8
MASK = np.arange(T) != 2
IDS = np.array([[1, 0, 3], [0, 2, 1], [0, 1, 2], [3, -1, 1], [4, 9, -5], [3, 1, 0], [1, 3, 0]])
TWICE = np.array([[1, 1, 3], [0, 0, 0], [0, 1, 2], [3, -1, 3], [4, 9, -5], [3, 1, 0], [1, 3, 1]])


@pytest.fixture
def calls(monkeypatch):
    """A backend "te" that serves a CPU; the calls of the stand-in."""
    found = te.fake(monkeypatch)
    row = replace(PERMUTERS["te"], supports=lambda problem: None, needs=("transformer_engine",))
    monkeypatch.setitem(PERMUTERS._rows, "te", row)
    monkeypatch.setattr(PERMUTERS, "_loaded", {})
    return found


def sent(x, weights, ids=IDS, mask=MASK):
    return Local().dispatch(x, weights, jnp.asarray(ids, jnp.int32), jnp.asarray(mask), E)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_permute_te_and_its_gradients_agree_with_reference(calls, agree, cast, draws, dtype):
    draw = draws(0)
    x, weights, drows, dweights = draw((T, D), dtype), draw((T, K)), draw((T * K, D), dtype), draw((T * K,))
    weights[0, 1] = 0.0  # of expert 0, a row that stays and whose weight has a gradient
    weights[2] = np.nan  # of a masked token
    wanted = reference.permute(x, weights, IDS, MASK, E)
    n = len(wanted.rows_RD)
    dweights[n:] = np.nan

    def run(x, weights):
        found = permute(sent(x, weights), E, backend="te")
        return (found.rows_RD, found.row_weights_R), found

    args = *cast(dtype, x), *cast("float32", weights)
    (rows, row_weights), pull, found = jax.vjp(run, *args, has_aux=True)
    drows[n:] = np.nan
    dx, dweights_TK = pull((*cast(dtype, drows), *cast("float32", dweights)))
    np.testing.assert_array_equal(rows[:n], wanted.rows_RD)
    np.testing.assert_array_equal(row_weights[:n], wanted.row_weights_R)
    assert not np.asarray(rows[n:]).any() and not row_weights[n:].any()
    np.testing.assert_array_equal(found.group_sizes_e, wanted.group_sizes_e)
    np.testing.assert_array_equal(found.row_experts_R[:n], np.repeat(np.arange(E), wanted.group_sizes_e))
    assert (found.row_experts_R[n:] == E).all()
    assert {str(a.dtype) for a in (*found.state, found.group_sizes_e, found.row_experts_R)} == {"int32"}

    def exact(arithmetic):
        names = ("dx", "dweights")
        return dict(zip(names, reference.permute_vjp(wanted, drows[:n], dweights[:n], arithmetic), strict=True))

    agree({"dx": dx, "dweights": dweights_TK}, exact, dtype)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unpermute_te_and_its_gradients_agree_with_reference(calls, agree, cast, draws, dtype, weighted):
    draw = draws(1)
    out, dy, weights = draw((T * K, D), dtype), draw((T, D), dtype), draw((T * K,))
    exact_state = reference.permute(np.zeros((T, D)), np.zeros((T, K)), IDS, MASK, E)
    n = len(exact_state.rows_RD)
    out[n:], weights[n:] = 0, 0
    state = permute(sent(*cast(dtype, np.zeros((T, D)), np.zeros((T, K)))), E, backend="te").state
    args = *cast(dtype, out), *(cast("float32", weights) if weighted else ())
    y, pull = jax.vjp(lambda out, *weights: unpermute(out, state, *weights), *args)
    dout, *dweights = pull(*cast(dtype, dy))
    assert y.dtype == dout.dtype == dtype and not np.asarray(dout[n:]).any()
    given = weights[:n] if weighted else None

    def exact(arithmetic):
        value = reference.unpermute(out[:n], exact_state, given, arithmetic)
        slopes = reference.unpermute_vjp(out[:n], exact_state, dy, given, arithmetic)
        return {"y": value, "dout": slopes[0]} | ({"dweights": slopes[1]} if weighted else {})

    found = {"y": y, "dout": dout[:n]} | ({"dweights": dweights[0][:n]} if weighted else {})
    agree(found, exact, dtype)


def test_unpermute_te_of_a_part_is_not_rounded(calls, cast):
    (out,) = cast("bfloat16", np.full((T * K, D), 1 + 2.0**-7))
    state = permute(sent(*cast("bfloat16", np.zeros((T, D)), np.zeros((T, K)))), E, backend="te").state
    part = unpermute(out, state, partial=True)
    assert part.dtype == jnp.float32 and part[0, 0] == 3 + 3 * 2.0**-7
    assert unpermute(out, state).dtype == jnp.bfloat16


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("ids", [IDS, TWICE], ids=["distinct", "named_twice"])
def test_steps_with_permute_te_agree_with_those_with_moebius_own(calls, draws, after, ids):
    config = MoEConfig(
        n_routed_experts=E,
        n_activated_experts=K,
        dim=D,
        moe_inter_dim=16,
        expert_bias=True,
        apply_router_weight_after_down=after,
    )
    draw = draws(2)
    shapes = {"gate_and_up_projs": (E, D, 32), "down_projs": (E, 16, D), "gate_up_proj_bias": (E, 32)}
    p = {name: jnp.float32(draw(shape)) for name, shape in (shapes | {"down_proj_bias": (E, D)}).items()}
    given = p, jnp.float32(draw((T, D))), jnp.float32(draw((T, K)))

    def run(backend):
        def total(p, x, weights):
            return (steps(p, sent(x, weights, ids), config, permute_backend=backend) ** 2).sum()

        return jax.value_and_grad(total, (0, 1, 2))(*given)

    assert_close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())  # noqa: E731
    jax.tree.map(assert_close, run("te"), jax.tree.map(np.asarray, run(None)))
    assert [sorted(call) for call in calls].count(["dispatch", "dtype"]) == 1


def in_shard_map(run, check_vma):
    """`run` of tokens that vary over a mesh of one device, and of what all devices have."""
    mesh, spec = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec
    specs = {"in_specs": (spec("data"), spec()), "out_specs": spec("data")}
    return jax.jit(jax.shard_map(run, mesh=mesh, check_vma=check_vma, **specs))


def test_permute_te_inside_shard_map_is_refused_where_it_is_checked_and_the_same_where_it_is_not(calls, draws):
    draw = draws(3)
    x, weights = jnp.float32(draw((T, D))), jnp.float32(draw((T, K)))

    def run(x, weights):
        found = permute(sent(x, weights), E, backend="te")
        return unpermute(found.rows_RD, found.state, found.row_weights_R)

    words = r"permute backend 'te' inside shard_map with check_vma=True\nfound: .*left out\ndo: pass check_vma=False"
    with pytest.raises(Unsupported, match=words):
        in_shard_map(run, True)(x, weights)
    assert not calls
    np.testing.assert_allclose(in_shard_map(run, False)(x, weights), run(x, weights), rtol=1e-6, atol=1e-6)


def test_unpermute_te_of_rows_that_vary_where_the_tokens_do_not_is_refused(calls, draws):
    out = jnp.float32(draws(4)((T * K, D)))
    state = permute(sent(jnp.ones((T, D)), jnp.ones((T, K))), E, backend="te").state
    with pytest.raises(Unsupported, match="permute backend 'te' inside shard_map with check_vma=True"):
        in_shard_map(lambda out, _: unpermute(out, state), True)(out, jnp.ones(1))


@pytest.mark.parametrize("shape", [(0, 2), (3, 0)], ids=["no_tokens", "no_slots"])
def test_permute_te_of_nothing_is_zero_and_calls_nothing(calls, shape):
    tokens = sent(jnp.ones((shape[0], D)), jnp.ones(shape), np.zeros(shape), np.ones(shape[0], bool))
    found = permute(tokens, E, backend="te")
    assert found.rows_RD.shape == (0, D) and unpermute(found.rows_RD, found.state).shape == (shape[0], D)
    assert not calls


def test_permuters_default_is_moebius_own():
    tokens = sent(jnp.ones((T, D)), jnp.ones((T, K)))
    assert all(isinstance(permute(tokens, E, backend=name).state, PermuteState) for name in (None, "xla"))
    assert PERMUTERS["te"].only_when_named


def test_permute_te_says_what_it_does_not_serve():
    usual = Problem(device="cuda", dtype="bfloat16", dim=2048, inter_dim=768, n_experts=128, capability=(9, 0))
    assert PERMUTERS["te"].supports(usual) is None
    assert "float32" in PERMUTERS["te"].supports(replace(usual, dtype="float64"))
    assert "on CUDA, not on cpu" in PERMUTERS["te"].supports(replace(usual, device="cpu"))


def test_permute_te_without_the_package_or_a_gpu_is_refused(monkeypatch):
    tokens = sent(jnp.ones((T, D)), jnp.ones((T, K)))
    with pytest.raises(ConfigError, match="permute backend 'fast'"):
        permute(tokens, E, backend="fast")
    monkeypatch.setattr("moebius.core.registry._absent", lambda package: package == "transformer_engine")
    with pytest.raises(BackendUnavailable, match=r"not installed: transformer_engine; and .* not on cpu"):
        permute(tokens, E, backend="te")
    monkeypatch.setattr("moebius.core.registry._absent", lambda package: False)
    with pytest.raises(Unsupported, match="permutes on CUDA, not on cpu"):
        permute(tokens, E, backend="te")


def test_permute_te_of_a_package_whose_kernels_do_not_load_says_so(calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine.jax.triton_extensions", None)
    with pytest.raises(BackendUnavailable, match=r"permute backend 'te'.*\nfound: does not load: Module"):
        permute(sent(jnp.ones((T, D)), jnp.ones((T, K))), E, backend="te")
