"""What a layer computes on the way: every stage of one pass, and the gradient that reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moebius.core import checks, layout, stages
from moebius.core.stages import GRADIENT, INPUT, Tap
from moebius.jax_frontend.checks import check_arrays
from moebius.jax_frontend.moe import MoE

if TYPE_CHECKING:
    from jaxtyping import Float


@contextmanager
def tapped(layer: nnx.Module, tap: Tap) -> Iterator[None]:
    """In this context `layer` and every module inside that has a `tap` call this one.

    Under a transformation: of the module that was merged inside it.
    """
    modules: list[Any] = [module for _, module in nnx.iter_modules(layer) if hasattr(module, "tap")]
    before = [module.tap for module in modules]
    try:
        for module in modules:
            module.tap = tap
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.tap = own


def trace(layer: MoE, x_TD: Float[Array, "T D"], dy_TD: Float[Array, "T D"] | None = None) -> dict[str, Array]:
    """Every stage of a pass through `layer` and, with an upstream gradient, every gradient; one jit.

    The layer runs as it would without, in its own mode, and is left as it was: no recorded load, its own `tap` out of
    the way. On a CPU its output is that of the layer under jit, bit for bit, and so are its gradients where
    `double_backward` is set; else the layer sums some of them in another order. A gradient of "weights" is what the
    experts send back; the auxiliary loss adds to it inside the gate.

    Args:
        layer: MoE. Layers of one config share a compilation.
        x_TD: [T, dim].
        dy_TD: gradient of the output, in its shape and dtype; None to run forward alone.
    Returns:
        By name, in the dtypes of the layer at that place: the stages that it has, in the order of
        moebius.core.stages; with `dy_TD` then "grad." before the name of each differentiable stage, "x" and each
        parameter by its dotted name. A gate that the config does not train has no entry, a parameter that does not
        matter has zeros.
    Raises:
        ShapeError, DTypeError: an input does not fit.
    """
    check_arrays(x_TD=x_TD, **({} if dy_TD is None else {"dy_TD": dy_TD}))
    x_TD, dy_TD = jnp.asarray(x_TD), None if dy_TD is None else jnp.asarray(dy_TD)
    checks.tokens(x_TD, layer.config.dim, "x_TD")
    if dy_TD is not None:
        checks.upstream(dy_TD, x_TD.shape, layer.dtype or x_TD.dtype)
    graph, parameters, *rest = nnx.split(layer, nnx.Param, ...)
    seen, gradients = _run(graph, parameters, rest, x_TD, dy_TD)
    found = {stage.name: seen[stage.name] for stage in stages.STAGES if stage.name in seen}
    if gradients is None:
        return found
    of_parameters, of_x_TD, of_stages = gradients
    named = {name: of_stages[name] for name in found if name in of_stages} | {INPUT: of_x_TD}
    leaves = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(of_parameters)}
    trained = {name for name in leaves if layer.config.train_gate or not name.startswith("gate.")}
    named |= {row.name: leaves[row.name] for row in layout.moe(layer.config) if row.name in trained}
    return found | {GRADIENT + name: value for name, value in named.items()}


@partial(jax.jit, static_argnames="graph")
def _run(graph: Any, parameters: Any, rest: Any, x_TD: Array, dy_TD: Array | None) -> tuple[dict[str, Array], Any]:
    """(stages, (gradients of the parameters, of x, of the stages), or None without dy)."""

    def forward(parameters: Any, x_TD: Array, probes: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        seen: dict[str, Array] = {}

        def record(name: str, value: Array) -> Array:
            seen[name] = _probed(value, probes[name]) if name in probes else value
            return seen[name]

        layer = nnx.merge(graph, parameters, *rest, copy=True)
        with tapped(layer, record):
            y_TD = layer(x_TD)
        return y_TD, seen

    if dy_TD is None:
        return forward(parameters, x_TD, {})[1], None
    shapes = jax.eval_shape(forward, parameters, x_TD, {})[1]
    differentiable = [stage.name for stage in stages.STAGES if stage.differentiable and stage.name in shapes]
    probes = {name: jnp.zeros(shapes[name].shape, shapes[name].dtype) for name in differentiable}
    _, pullback, seen = jax.vjp(forward, parameters, x_TD, probes, has_aux=True)
    return seen, pullback(dy_TD)


# Not a sum with zero: that would turn -0 into +0.
@jax.custom_vjp
def _probed(value: Array, probe: Array) -> Array:
    """`value` itself; in backward `probe` receives its gradient."""
    return value


_probed.defvjp(lambda value, probe: (value, None), lambda saved, dvalue: (dvalue, dvalue))
