"""A stand-in for Transformer Engine 2.20 in JAX: grouped GEMM, also in FP8, token permutation, fused router.

What the C++ side checks at run time is checked here at run time, on the host: sizes that add up (V1), a cuBLASLt that
has V2, rows at multiples of 16 bytes. What it leaves unwritten holds NaN here. Inside shard_map no result is marked to
vary over a mesh axis; jax.pure_callback, which most are of, does not mark its own either.
"""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fakes import install

CALLS: list[dict[str, Any]] = []  # of every function, while it is traced
RAN: list[str] = []  # grouped GEMMs, as they run
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
STATE = SimpleNamespace(cublaslt=130100, capability=90, recipe=None)


# -------------------------------------------------------------------------------------------------------- grouped GEMM
@dataclass
class GroupedNoScaleTensor:
    """An operand, ragged along its first axis where it has `first_dims`."""

    data: Array
    amax: Any
    first_dims: Array | None
    last_dims: Array | None
    original_shape: tuple[int, ...]


def grouped_gemm(
    lhs: GroupedNoScaleTensor,
    rhs: GroupedNoScaleTensor,
    contracting_dims: tuple[tuple[int], tuple[int]] = ((1,), (2,)),
    bias: Any = None,
    precision: Any = None,
    preferred_element_type: Any = None,
    group_offset: Any = None,
    quantizer_set: Any = None,
    use_async_d2h_group_sizes: bool = False,
) -> Array:
    """Rows times matrices, or rows times rows of each group: what moebius asks for of the package's function."""
    assert bias is precision is preferred_element_type is group_offset is quantizer_set is None
    assert not use_async_d2h_group_sizes and lhs.amax is rhs.amax is lhs.last_dims is rhs.last_dims is None
    assert lhs.data.dtype == rhs.data.dtype, f"Mismatched output dtypes: {lhs.data.dtype} vs {rhs.data.dtype}"
    assert lhs.original_shape == lhs.data.shape and rhs.original_shape == rhs.data.shape
    sizes = lhs.first_dims
    assert sizes is not None and sizes.dtype == jnp.int32
    weighted = rhs.first_dims is None
    assert contracting_dims in ([((1,), (1,)), ((1,), (2,))] if weighted else [((0,), (0,))])
    if weighted:
        kept = 3 - contracting_dims[1][0]
        shape = (lhs.data.shape[0], rhs.data.shape[kept])
    else:
        shape = (sizes.shape[0], lhs.data.shape[1], rhs.data.shape[1])
    module = sys.modules["transformer_engine.jax.cpp_extensions.gemm"]
    v2 = module._v2_grouped_gemm_available and STATE.capability >= 90 and lhs.data.dtype == jnp.bfloat16
    CALLS.append({"path": "V2" if v2 else "V1", "contracting": contracting_dims, "dtype": str(lhs.data.dtype)})
    host = _V2 if v2 else _V1
    out = jax.ShapeDtypeStruct(shape, lhs.data.dtype)
    run = lambda *operands: host(*map(np.asarray, operands), contracting_dims, out)  # noqa: E731
    return jax.pure_callback(run, out, lhs.data, rhs.data, sizes)


def _V1(lhs: Any, rhs: Any, sizes: Any, contracting: Any, out: Any) -> Any:
    RAN.append("V1")
    assert sizes.sum() == len(lhs), f"Unexpected group_sizes! M = {len(lhs)}, got sum(group_sizes)={sizes.sum()}"
    return _products(lhs, rhs, sizes, contracting, out)


def _V2(lhs: Any, rhs: Any, sizes: Any, contracting: Any, out: Any) -> Any:
    RAN.append("V2")
    assert STATE.cublaslt >= 130400, "nvte_grouped_gemm requires cuBLAS 13.4+ on Hopper"
    result = _products(lhs, rhs, sizes, contracting, out)
    if contracting == ((0,), (0,)):
        result[sizes == 0] = np.nan  # a cuBLAS that leaves them unwritten
    return result


def _products(lhs: Any, rhs: Any, sizes: Any, contracting: Any, out: Any) -> Any:
    for operand in (lhs, rhs):
        assert operand.shape[-1] * operand.itemsize % 16 == 0, "rows have to lie at multiples of 16 bytes"
    wide = np.float64
    result = np.full(out.shape, np.nan, wide)
    with np.errstate(invalid="ignore", over="ignore"):
        for expert, (end, size) in enumerate(zip(np.cumsum(sizes), sizes, strict=True)):
            part = slice(end - size, end)
            if contracting == ((0,), (0,)):
                result[expert] = lhs[part].astype(wide).T @ rhs[part].astype(wide)
            else:
                matrix = rhs[expert].astype(wide)
                result[part] = lhs[part].astype(wide) @ (matrix.T if contracting[1] == (2,) else matrix)
        return result.astype(np.float32).astype(out.dtype)


# ----------------------------------------------------------------------------------------------------------------- FP8
@dataclass
class Float8CurrentScaling:
    """One scale a tensor."""

    fp8_format: tuple[Any, Any] = (E4M3, E5M2)

    def float8_current_scaling(self) -> bool:
        """Which kind it is, as the package's recipes say it."""
        return type(self) is Float8CurrentScaling


class DelayedScaling(Float8CurrentScaling):
    """Refused by the backend under test."""


class QuantizeMeta:
    """Nothing kept."""


@dataclass
class QuantizeMetaSet:
    """Of three operands."""

    x: QuantizeMeta
    kernel: QuantizeMeta
    grad: QuantizeMeta


class QuantizerFactory:
    """Makes sets of quantizers."""

    @staticmethod
    def create_set(*, fp8_recipe: Any, quantize_meta_set: QuantizeMetaSet, n_groups: int) -> tuple[Any, int]:
        """Formats of the forward and of the backward pass, and for how many experts."""
        assert isinstance(quantize_meta_set, QuantizeMetaSet)
        return fp8_recipe.fp8_format, n_groups


def grouped_dense(x: Array, kernel: Array, group_sizes: Array, *, quantizer_set: tuple[Any, int]) -> Array:
    """[M, N], whose gradients are products of quantised operands too."""
    formats, n_groups = quantizer_set
    assert x.dtype == kernel.dtype and n_groups == kernel.shape[0] == group_sizes.shape[0]

    @jax.custom_vjp
    def dense(x: Array, kernel: Array) -> Array:
        return host("fprop", (x.shape[0], kernel.shape[2]), x, kernel)

    def host(name: str, shape: tuple[int, ...], a: Array, b: Array) -> Array:
        out = jax.ShapeDtypeStruct(shape, x.dtype)
        run = lambda *operands: _quantised(name, formats, out, *map(np.asarray, operands))  # noqa: E731
        return jax.pure_callback(run, out, a, b, group_sizes)

    def backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
        x, kernel = saved
        return host("dgrad", x.shape, grad, kernel), host("wgrad", kernel.shape, x, grad)

    dense.defvjp(lambda *operands: (dense(*operands), operands), backward)
    return dense(x, kernel)


def _quantised(name: str, formats: tuple[Any, Any], out: Any, a: Any, b: Any, sizes: Any) -> Any:
    RAN.append(name)
    assert not (sizes % 16).any() and not any(width % 16 for width in (*a.shape[1:], *b.shape[1:]))
    assert sizes.sum() == len(a), f"Unexpected group_sizes! M = {len(a)}, got sum(group_sizes)={sizes.sum()}"
    first, second = {"fprop": (0, 0), "dgrad": (1, 0), "wgrad": (0, 1)}[name]
    ends, wide = np.cumsum(sizes), [operand.astype(np.float32) for operand in (a, b)]
    for values, kind in zip(wide, (formats[first], formats[second]), strict=True):
        for expert, end in enumerate(ends):
            part = slice(end - sizes[expert], end) if values.ndim == 2 else expert
            values[part] = fp8(values[part], kind)
    contracting = {"fprop": ((1,), (1,)), "dgrad": ((1,), (2,)), "wgrad": ((0,), (0,))}[name]
    return _products(*wide, sizes, contracting, out)


def fp8(values: Any, kind: Any) -> Any:
    """What stays of a tensor under one scale, float32."""
    largest = np.abs(values).max(initial=0)
    scale = float(jnp.finfo(kind).max) / largest if largest > 0 else 1.0
    with np.errstate(invalid="ignore"):
        return (values * np.float32(scale)).astype(kind).astype(np.float32) / np.float32(scale)


# --------------------------------------------------------------------------------------------------------- permutation
@jax.custom_vjp
def _gather(inp: Array, row_id_map: Array, rows: Array) -> Array:
    """[M, D]: each token's row wherever the map says; what it names nowhere is NaN."""
    tokens, _ = _entries(row_id_map)
    out = jnp.full((rows.shape[0], inp.shape[1]), jnp.nan, inp.dtype)
    return _unmarked(out.at[row_id_map[:, : tokens.shape[1]]].set(inp[:, None], mode="drop"))


@jax.custom_vjp
def _sum(rows: Array, row_id_map: Array) -> Array:
    """[T, D]: each token's rows, in float32, rounded once."""
    here, _ = _entries(row_id_map)
    taken = rows.at[row_id_map[:, : here.shape[1]]].get(mode="fill", fill_value=0)
    return _unmarked(jnp.where(here[..., None], taken.astype(jnp.float32), 0).sum(1).astype(rows.dtype))


_gather.defvjp(
    lambda inp, row_id_map, rows: (_gather(inp, row_id_map, rows), row_id_map),
    lambda row_id_map, grad: (_sum(grad, row_id_map), None, None),
)
_sum.defvjp(
    lambda rows, row_id_map: (_sum(rows, row_id_map), (row_id_map, rows[:, 0])),
    lambda saved, grad: (_gather(grad, saved[0], saved[1]), None),
)


def _unmarked(out: Array) -> Array:
    if not jax.typeof(out).manual_axis_type.varying:
        return out
    return jax.pure_callback(lambda value: value, jax.ShapeDtypeStruct(out.shape, out.dtype), out)


def _entries(row_id_map: Array) -> tuple[Array, Array]:
    """Which of a token's first E entries say where a row is, and of which expert."""
    n_experts = (row_id_map.shape[1] - 1) // 2
    here = jnp.arange(n_experts) < row_id_map[:, -1:]
    return here, row_id_map[:, n_experts:-1]


def token_dispatch(
    inp: Array, routing_map: Array, num_out_tokens: int, probs: Array | None = None, align_size: int | None = None
) -> tuple[Array, Array | None, Array, None, Array]:
    """Each token's rows by expert and token; a row whose probability is 0 is zero, as in the package's kernel."""
    assert isinstance(num_out_tokens, int) and num_out_tokens > 0 and align_size is None
    assert inp.shape[0] == routing_map.shape[0] and inp.ndim == routing_map.ndim == 2
    CALLS.append({"dispatch": num_out_tokens, "dtype": str(inp.dtype)})
    chosen = routing_map != 0
    T, E = chosen.shape
    by_expert = jnp.cumsum(chosen.T.reshape(-1).astype(jnp.int32)).reshape(E, T).T - 1
    row_TE = jnp.where(chosen, by_expert, -1)
    order_TE = jnp.argsort(-row_TE, axis=1)  # the last expert first
    counts_T = chosen.sum(1, dtype=jnp.int32)
    rows_TE = jnp.take_along_axis(row_TE, order_TE, axis=1)
    rows_TE = jnp.where(rows_TE < 0, jnp.iinfo(jnp.int32).max, rows_TE)  # unwritten in the package
    row_id_map = _unmarked(jnp.concatenate([rows_TE, order_TE.astype(jnp.int32), counts_T[:, None]], axis=1))
    slots = jnp.zeros(num_out_tokens, inp.dtype)
    out, permuted = _gather(inp, row_id_map, slots), None
    if probs is not None:
        permuted = jnp.full(num_out_tokens, jnp.nan, probs.dtype)
        permuted = _unmarked(permuted.at[jnp.where(chosen, row_TE, num_out_tokens)].set(probs, mode="drop"))
        out = jnp.where((permuted == 0)[:, None], jax.lax.stop_gradient(jnp.zeros_like(out)), out)
    return out, permuted, row_id_map, None, chosen.sum(0, dtype=jnp.int32)


def token_combine(
    inp: Array, row_id_map: Array, merging_probs: Array | None = None, pad_offsets: Array | None = None
) -> Array:
    """The sum of each token's rows."""
    assert merging_probs is pad_offsets is None
    CALLS.append({"combine": inp.shape[0], "dtype": str(inp.dtype)})
    return _sum(inp, row_id_map)


# -------------------------------------------------------------------------------------------------------------- router
class ScoreFunction(enum.IntEnum):
    """As the package's; names in lower case serve too."""

    SIGMOID = 0
    SOFTMAX = 1
    SQRTSOFTPLUS = 2


def fused_topk_with_score_function(
    logits: Array,
    topk: int,
    use_pre_softmax: bool = False,
    num_groups: int = -1,
    group_topk: int = -1,
    scaling_factor: float = 1.0,
    score_function: str = "softmax",
    expert_bias: Array | None = None,
    compute_aux_scores: bool = False,
    routing_map_format: int = 0,
) -> tuple[Array, Array]:
    """(probabilities [T, E], 0 where not chosen; map [T, E]) by the package's rules; of equals the last is chosen."""
    function = ScoreFunction[score_function.upper()]
    assert logits.dtype == jnp.float32 and isinstance(scaling_factor, float) and not compute_aux_scores
    assert expert_bias is None or (function != ScoreFunction.SOFTMAX and expert_bias.dtype == jnp.float32)
    if group_topk > 0:
        assert topk % group_topk == 0 and logits.shape[1] % num_groups == 0
        assert topk // group_topk <= logits.shape[1] // num_groups and group_topk <= num_groups
    CALLS.append({"router": function.name, "pre": use_pre_softmax, "groups": (num_groups, group_topk)})
    scores = _scores(logits, function, use_pre_softmax)
    choice = jax.lax.stop_gradient(scores if expert_bias is None else scores + expert_bias)
    chosen = _choose(choice, topk, num_groups, group_topk)
    if expert_bias is not None:  # taken off again, with what that rounds
        scores = scores + jax.lax.stop_gradient(choice - expert_bias - scores)
    kept = jnp.where(chosen, scores, 0)
    if function == ScoreFunction.SOFTMAX and not use_pre_softmax:
        kept = jnp.where(chosen, jax.nn.softmax(jnp.where(chosen, logits, -jnp.inf), axis=1), 0)
    if function != ScoreFunction.SOFTMAX and topk > 1:
        kept = kept / (kept.sum(1, keepdims=True) + 1e-20)
    return _unmarked(kept * scaling_factor), _unmarked(chosen)


def _scores(logits: Array, function: ScoreFunction, pre: bool) -> Array:
    if function == ScoreFunction.SOFTMAX:
        return jax.nn.softmax(logits, axis=1) if pre else logits
    return jax.nn.sigmoid(logits) if function == ScoreFunction.SIGMOID else jnp.sqrt(jax.nn.softplus(logits))


def _choose(choice: Array, topk: int, num_groups: int, group_topk: int) -> Array:
    if group_topk > 0:
        grouped = choice.reshape(len(choice), num_groups, -1)
        best = jax.lax.top_k(grouped, topk // group_topk)[0].sum(-1)
        kept = _map(best, group_topk)
        choice = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)
    return _map(choice, topk)


def _map(choice: Array, k: int) -> Array:
    ids = choice.shape[1] - 1 - jax.lax.top_k(choice[:, ::-1], k)[1]
    return jnp.zeros(choice.shape, bool).at[jnp.arange(len(choice))[:, None], ids].set(True)


# ----------------------------------------------------------------------------------------------------------- installed
def fake(
    monkeypatch: Any, version: str = "2.20.2", *, cublaslt: int = 130100, built: bool = True, **changes: Any
) -> list[dict[str, Any]]:
    """Install it, on a Hopper; `built`: with V2. Returns the list of calls."""
    CALLS.clear()
    RAN.clear()
    for name, value in {"cublaslt": cublaslt, "capability": 90, "recipe": None, **changes}.items():
        monkeypatch.setattr(STATE, name, value)
    home = "transformer_engine.jax"
    install(
        monkeypatch,
        {
            "transformer_engine_jax": {
                "get_cublasLt_version": lambda: STATE.cublaslt,
                "get_device_compute_capability": lambda device: STATE.capability,
            },
            "transformer_engine": {"__version__": version},
            home: {},
            f"{home}.cpp_extensions": {"grouped_gemm": grouped_gemm},
            f"{home}.cpp_extensions.gemm": {"_v2_grouped_gemm_available": built},
            f"{home}.quantize": {
                "GroupedNoScaleTensor": GroupedNoScaleTensor,
                "QuantizeMeta": QuantizeMeta,
                "QuantizeMetaSet": QuantizeMetaSet,
                "QuantizerFactory": QuantizerFactory,
                "get_global_quantize_recipe": lambda: STATE.recipe,
            },
            f"{home}.dense": {"grouped_dense": grouped_dense},
            f"{home}.triton_extensions": {},
            f"{home}.permutation": {"token_dispatch": token_dispatch, "token_combine": token_combine},
            f"{home}.router": {"fused_topk_with_score_function": fused_topk_with_score_function},
        },
    )
    return CALLS
