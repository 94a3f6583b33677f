"""One way to call both frontends from a test: NumPy float64 in, NumPy float64 out.

A side is a frontend with a backend. Inputs are first rounded to the dtype under test, so the reference sees exactly
what the side sees.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from moebius.core import BackendConfig, MoEConfig, layout, reference
from moebius.core.precision import EXACT, Arithmetic
from moebius.core.tolerance import Bound, bounds, within

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Problem:
    """Inputs of one call of `experts`, in float64 and exact in `dtype`. Compared and hashed by identity."""

    config: MoEConfig
    x: np.ndarray
    token_mask: np.ndarray
    weights: np.ndarray
    ids: np.ndarray
    parameters: Mapping[str, np.ndarray]
    dy: np.ndarray
    dtype: str = "float32"
    weights_dtype: str = "float32"
    param_dtype: str | None = None

    def but(self, **changes: Any) -> Problem:
        """The problem with some inputs replaced."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Side:
    """A frontend ("torch" or "jax") with the grouped matmul's backend.

    `device` is torch's; JAX puts arrays on its default device, a GPU where it sees one.
    """

    framework: str
    backend: str
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.framework}-{self.backend}" + ("" if self.device == "cpu" else f"-{self.device}")

    @property
    def module(self) -> Any:
        """The frontend."""
        return importlib.import_module(f"moebius.{self.framework}_frontend")

    def array(self, value: Any, dtype: str | None = None) -> Any:
        """`value` as this framework's array."""
        if self.framework == "torch":
            return _torch_array(np.asarray(value), dtype).to(self.device)
        return jax_array(value, dtype)

    def numpy(self, value: Any) -> np.ndarray:
        """This framework's array as float64, or as it is for integers and bool."""
        if self.framework == "torch":
            value = value.detach().cpu()
            return (value.double() if value.is_floating_point() else value).numpy()
        array = np.asarray(value)
        return array if array.dtype.kind in "iub" else array.astype(np.float64)

    def context(self, dtype: str) -> Any:
        """Where float64 needs a switch, the context that has it on."""
        if self.framework == "jax" and dtype == "float64":
            import jax

            return jax.enable_x64(True)
        return nullcontext()

    def serves(self, dtype: str) -> bool:
        """Whether the backend takes this dtype on a CPU."""
        return not (dtype == "float64" and self.backend == "grouped_mm")

    def experts(self, p: Problem) -> Arrays:
        """y, dx, dweights and each parameter's gradient under its name."""
        with self.context(p.dtype):
            return (_torch_experts if self.framework == "torch" else _jax_experts)(self, p)

    def layer(self, config: MoEConfig, values: Mapping[str, np.ndarray], **backend: Any) -> Any:
        """An MoE of this frontend that holds `values`, parameters and state, in the dtypes of its own."""
        backend_config = BackendConfig(experts=self.backend, **backend)
        if self.framework == "torch":
            layer = self.module.MoE(config, backend_config, device=self.device)
        else:
            from flax import nnx

            # Their draws, which are replaced, would compile a generator for each shape.
            layer = self.module.MoE(config, backend_config, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
        arrays = {name: self.array(value, "float32") for name, value in values.items()}
        state = {name: arrays.pop(name) for name in self.module.state(layer) if name in arrays}
        self.module.load_parameters(layer, arrays)
        self.module.load_state(layer, state)
        return layer

    def moe(self, layer: Any, x: np.ndarray, padding: np.ndarray | None, dy: np.ndarray, dtype: str) -> Arrays:
        """y, dx and each parameter's gradient under its dotted name, of a layer made by `layer`."""
        pad = None if padding is None else self.array(padding)
        with self.context(dtype):
            run = _torch_moe if self.framework == "torch" else _jax_moe
            return run(self, layer, self.array(x, dtype), pad, self.array(dy, dtype))


SIDES = (Side("torch", "loop"), Side("torch", "grouped_mm"), Side("jax", "loop"), Side("jax", "ragged_dot"))
DTYPES = ("float64", "float32", "bfloat16", "float16")


def rounded(value: np.ndarray, dtype: str) -> np.ndarray:
    """`value` rounded to `dtype`, as float64."""
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return np.asarray(value).astype(kind).astype(np.float64)


def problem(
    *,
    tokens: int = 12,
    dim: int = 16,
    inter: int = 8,
    n_experts: int = 4,
    k: int = 2,
    dtype: str = "float32",
    seed: int = 0,
    **config: Any,
) -> Problem:
    """A random problem: about a fifth of the tokens masked, some ids without a route, normal values."""
    rng = np.random.default_rng(seed)
    c = MoEConfig(
        n_routed_experts=n_experts,
        n_activated_experts=k,
        dim=dim,
        moe_inter_dim=inter,
        dtype=dtype,
        **{"activation_limit": 1.0, **config},
    )
    ids = np.argsort(rng.random((tokens, n_experts)), axis=-1)[:, :k].astype(np.int64)
    parameters = {
        row.name: rounded(rng.normal(size=row.shape) * (0.5 if row.zeros else 1 / np.sqrt(row.shape[1])), dtype)
        for row in layout.experts(c)
    }
    return Problem(
        config=c,
        x=rounded(rng.normal(size=(tokens, dim)), dtype),
        token_mask=rng.random(tokens) < 0.8,
        weights=rounded(rng.random((tokens, k)) + 0.1, "float32"),
        ids=ids,
        parameters=parameters,
        dy=rounded(rng.normal(size=(tokens, dim)), dtype),
        dtype=dtype,
        weights_dtype="float64" if dtype == "float64" else "float32",
    )


def reference_experts(p: Problem, arithmetic: Arithmetic = EXACT) -> Arrays:
    """The float64 reference's answer to the same problem."""
    trace = reference.experts(p.x, p.token_mask, p.weights, p.ids, p.parameters, p.config, arithmetic)
    dx, dweights, grads = reference.experts_vjp(trace, p.parameters, p.config, p.dy, arithmetic)
    return {"y": trace.y_TD, "dx": dx, "dweights": dweights, **grads}


def reference_over_ranks(
    p: Problem, lengths: tuple[int, ...], arithmetic: Arithmetic = EXACT, wire: str | None = None
) -> Arrays:
    """What the reference's list of ranks returns, one after the other; `wire` as BackendConfig.combine_dtype."""
    n, E = len(lengths), p.config.n_routed_experts
    cuts, e = np.cumsum(lengths)[:-1], E // n
    columns = (np.split(column, cuts) for column in (p.x, p.weights, p.ids, p.token_mask))
    own = [
        reference.Tokens(x_TD=x, weights_TK=weights, ids_TK=ids, token_mask_T=mask)
        for x, weights, ids, mask in zip(*columns, strict=True)
    ]
    config = replace(p.config, n_routed_experts=e, n_activated_experts=min(e, p.ids.shape[1]))
    held = [{name: value[r * e : (r + 1) * e] for name, value in p.parameters.items()} for r in range(n)]
    traces = [
        reference.experts(t.x_TD, t.token_mask_T, t.weights_TK, t.ids_TK, held[rank], config, arithmetic, partial=True)
        for rank, t in enumerate(reference.dispatch(own, E))
    ]
    y = reference.combine(list(lengths), [trace.y_TD for trace in traces], arithmetic, wire)
    dy = reference.combine_vjp(np.split(p.dy, cuts))
    back = [reference.experts_vjp(traces[r], held[r], config, dy[r], arithmetic) for r in range(n)]
    dx, dweights, grads = zip(*back, strict=True)
    sent = reference.dispatch_vjp(list(lengths), list(dx), list(dweights), arithmetic)
    found = {"y": np.concatenate(y), "dx": np.concatenate([r[0] for r in sent])}
    found["dweights"] = np.concatenate([r[1] for r in sent])
    return found | {name: np.concatenate([g[name] for g in grads]) for name in p.parameters}


@cache
def expected(p: Problem) -> tuple[Arrays, dict[str, Bound]]:
    """The reference's answer with its bounds; kept, since every side asks for the same."""
    exact = reference_experts(p)
    return exact, bounds(lambda arithmetic: reference_experts(p, arithmetic), exact, p.dtype)


@cache
def cached_problem(**settings: Any) -> Problem:
    """`problem`, the same object for the same settings."""
    return problem(**settings)


def assert_correct(side: Side, p: Problem) -> Arrays:
    """Run `side` on `p` and hold the output and every gradient against the reference; returns what it computed."""
    exact, limits = expected(p)
    found = side.experts(p)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        assert within(value, exact[name], limits[name]), _miss(side, name, value, exact[name], limits[name])
    return found


def _miss(side: Side, name: str, value: np.ndarray, exact: np.ndarray, bound: Bound) -> str:
    difference = np.abs(value - exact)
    norm, largest = np.linalg.norm(difference), difference.max()
    return f"{side} {name}: norm {norm:.3g} of {bound.norm:.3g}, largest {largest:.3g} of {bound.largest:.3g}"


def _torch_array(value: np.ndarray, dtype: str | None) -> Any:
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(value))
    return tensor if dtype is None else tensor.to(getattr(torch, dtype))


def jax_array(value: Any, dtype: str | None = None) -> Any:
    """`value` as JAX's array, cast by NumPy: JAX would compile a program for each shape."""
    import jax

    value = np.asarray(value)
    if dtype is None and value.dtype == np.int64:
        dtype = "int32"
    return jax.device_put(value.astype(dtype or value.dtype))


def _torch_experts(side: Side, p: Problem) -> Arrays:
    parameters = {n: side.array(v, p.param_dtype or p.dtype).requires_grad_() for n, v in p.parameters.items()}
    x = side.array(p.x, p.dtype).requires_grad_()
    weights = side.array(p.weights, p.weights_dtype).requires_grad_()
    ids, mask = side.array(p.ids), side.array(p.token_mask)
    y = side.module.experts(parameters, x, mask, weights, ids, config=p.config, backend=side.backend)
    y.backward(side.array(p.dy, p.dtype))
    grads = {name: value.grad for name, value in parameters.items()}
    return {n: side.numpy(v) for n, v in {"y": y, "dx": x.grad, "dweights": weights.grad, **grads}.items()}


def _jax_experts(side: Side, p: Problem) -> Arrays:
    parameters = {n: side.array(v, p.param_dtype or p.dtype) for n, v in p.parameters.items()}
    x, weights = side.array(p.x, p.dtype), side.array(p.weights, p.weights_dtype)
    ids, mask, dy = side.array(p.ids), side.array(p.token_mask), side.array(p.dy, p.dtype)
    y, (grads, dx, dweights) = _jitted_experts(p.config, side.backend)(parameters, x, weights, mask, ids, dy)
    return {n: side.numpy(v) for n, v in {"y": y, "dx": dx, "dweights": dweights, **grads}.items()}


@cache
def _jitted_experts(config: MoEConfig, backend: str) -> Any:
    """Compiled once per config: op by op, each new shape would compile dozens of small programs."""
    import jax

    from moebius.jax_frontend import experts

    def run(parameters: Any, x: Any, weights: Any, mask: Any, ids: Any, dy: Any) -> Any:
        def forward(parameters: Any, x: Any, weights: Any) -> Any:
            return experts(parameters, x, mask, weights, ids, config=config, backend=backend)

        y, pullback = jax.vjp(forward, parameters, x, weights)
        return y, pullback(dy)

    return jax.jit(run)


def _torch_moe(side: Side, layer: Any, x: Any, padding: Any, dy: Any) -> Arrays:
    x.requires_grad_()
    layer.zero_grad()
    y = layer(x, padding)
    y.backward(dy)
    grads = {name: value.grad for name, value in layer.named_parameters()}
    return {name: side.numpy(value) for name, value in {"y": y, "dx": x.grad, **grads}.items()}


def _jax_moe(side: Side, layer: Any, x: Any, padding: Any, dy: Any) -> Arrays:
    from flax import nnx

    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)
    y, (dparameters, dx) = _jitted_moe(graph)(parameters, rest, x, padding, dy)
    grads = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(dparameters)}
    return {name: side.numpy(value) for name, value in {"y": y, "dx": dx, **grads}.items()}


@cache
def _jitted_moe(graph: Any) -> Any:
    """Compiled once for all layers that differ in values alone."""
    import jax
    from flax import nnx

    def run(parameters: Any, rest: Any, x: Any, padding: Any, dy: Any) -> Any:
        def forward(parameters: Any, x: Any) -> Any:
            return nnx.merge(graph, parameters, rest, copy=True)(x, padding)

        y, pullback = jax.vjp(forward, parameters, x)
        return y, pullback(dy)

    return jax.jit(run)
