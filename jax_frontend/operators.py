"""Operators that are linear in each of two operands, with rules of our own for their gradients, as JAX primitives.

jax.custom_vjp says the same in fewer words, but forward mode (jvp, linearize, jacfwd, hessian) is closed to it, and it
cannot leave out the gradient that nobody asked for. A primitive is differentiated in every mode and order; what it
computes stays opaque to transformations until it is lowered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from string import ascii_letters
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from moebius.core.errors import Unsupported
from moebius.jax_frontend.dtypes import accumulate_dtype

# (operands, their mapped axes or None, params) -> (result, its mapped axis), as JAX asks of a rule for vmap.
Batched = Callable[..., tuple[Array, int]]
# One letter for each axis of the first operand, of the second and of the result.
Axes = tuple[str, str, str]


def bilinear(
    name: str,
    compute: Callable[..., Array],
    gradients: tuple[Callable[..., Array], Callable[..., Array]],
    *,
    static: Sequence[str],
    others: int = 0,
    batched: Batched | None = None,
    devices: bool = False,
) -> Primitive:
    """A primitive that is linear in its first operand and in its second; see `call`.

    Args:
        name: as it stands in a jaxpr.
        compute: (first, second, *others, **params) -> result. Any function that JAX can trace; compiled at eager
            calls, and traced for its result's type.
        gradients: of the first operand, (dout, second, *others, **params), and of the second, (dout, first, *others,
            **params); each made of `call`s again, so that they have derivatives too.
        static: names of the params.
        others: operands without a gradient.
        batched: how it maps, by default one element of the batch after the other.
        devices: whether `compute` can only be lowered for devices that are present, as JAX's custom_partitioning.
    """
    operator, compiled = Primitive(name), jax.jit(compute, static_argnames=tuple(static))
    operator.def_impl(compiled)
    # Traced, not declared: mesh axes that the result varies over and its sharding are those of what computes it.
    operator.def_abstract_eval(lambda *types, **params: _result(compiled, types, params))
    mlir.register_lowering(operator, mlir.lower_fun(compiled, multiple_results=False))
    if devices:
        # No public name says it, and JAX, which cannot look inside the operator, would lower it without.
        from jax._src.dispatch import prim_requires_devices_during_lowering

        prim_requires_devices_during_lowering.add(operator)
    ad.defjvp(
        operator,
        lambda tangent, first, second, *rest, **params: call(operator, tangent, second, *rest, **params),
        lambda tangent, first, second, *rest, **params: call(operator, first, tangent, *rest, **params),
        *[None] * others,
    )

    def transpose(dout: Any, first: Any, second: Any, *rest: Array, **params: Any) -> list[Array | None]:
        found: list[Array | None] = [None] * (2 + others)
        if type(dout) is not ad.Zero:
            wanted = 0 if ad.is_undefined_primal(first) else 1
            found[wanted] = gradients[wanted](dout, (second, first)[wanted], *rest, **params)
        return found

    ad.primitive_transposes[operator] = transpose
    batching.primitive_batchers[operator] = batched or _in_turn(operator)
    return operator


def opaque(name: str, compute: Callable[..., list[Array]], *, static: Sequence[str]) -> Primitive:
    """A primitive without derivatives that returns a list; under vmap one element of the batch after the other.

    Its tangents are made where a derivative passes by, and refused where one is evaluated or transposed.

    XLA cannot split what it cannot look into: where arrays lie on several devices it would gather them on each, and
    compute all of it there. So outside of a shard_map it is refused for more than one device.

    Args:
        name, compute, static: as of `bilinear`.
    """
    operator, compiled = Primitive(name), jax.jit(compute, static_argnames=tuple(static))
    operator.multiple_results = True

    def run(*operands: Any, **params: Any) -> list[Array]:
        _require_one_device(name, max(len(each.devices()) if isinstance(each, Array) else 1 for each in operands))
        return compiled(*operands, **params)

    lower = mlir.lower_fun(compiled, multiple_results=True)

    def lower_here(context: mlir.LoweringRuleContext, *operands: Any, **params: Any) -> Any:
        _require_one_device(name, _devices(context))
        return lower(context, *operands, **params)

    operator.def_impl(run)
    operator.def_abstract_eval(lambda *types, **params: _results(compiled, types, params))
    mlir.register_lowering(operator, lower_here)

    def one_after_the_other(
        operands: Sequence[Array], axes: Sequence[int | None], **params: Any
    ) -> tuple[list[Array], list[int]]:
        found = _each(lambda *here: operator.bind(*here, **params), operands, axes)
        return found, [0] * len(found)

    batching.primitive_batchers[operator] = one_after_the_other
    refuse = partial(_refuse_derivative, name)
    tangents_of = _refused_tangents(name, refuse)

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[list[Array], list[Array]]:
        found = operator.bind(*primals, **params)
        types = tuple(jax.typeof(result).to_tangent_aval() for result in found)
        if not all(jnp.issubdtype(each.dtype, jnp.floating) for each in types):
            refuse()  # integers have no tangents: behind a scratch of them the derivative would be zero, in silence
        return found, tangents_of.bind(*(each for each in tangents if type(each) is not ad.Zero), types=types)

    ad.primitive_jvps[operator] = jvp
    return operator


def call(operator: Primitive, *operands: Array, **params: Any) -> Array:
    """The operator's result; `params` are static and hashable."""
    out: Array = operator.bind(*alike(*operands), **params)
    return out


def alike(*arrays: Array) -> list[Array]:
    """Inside shard_map: arrays that vary over the same mesh axes; elsewhere the arrays as they are.

    A derivative rule must return each gradient as its argument varies. Made alike before the rule, a replicated
    weight gets the sum of its gradients from the transpose of this step.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    axes: frozenset[Any] = frozenset().union(*varying)
    return [
        lax.pcast(array, tuple(axes - own), to="varying") if axes - own else array
        for array, own in zip(arrays, varying, strict=True)
    ]


def varying_like(out: Array, like: Array) -> Array:
    """Inside shard_map: `out` marked to vary over the mesh axes that `like` does, where a package did not mark it."""
    axes = jax.typeof(like).manual_axis_type.varying - jax.typeof(out).manual_axis_type.varying
    return lax.pcast(out, tuple(axes), to="varying") if axes else out


def contract(first: Array, second: Array, axes: Axes) -> Array:
    """The einsum of two arrays of one dtype, accumulated in promote_types(dtype, float32) and not yet rounded.

    Args:
        axes: such as ("td", "fd", "tf").
    """
    return call(_CONTRACT, first, second, axes=axes)


def _devices(context: mlir.LoweringRuleContext) -> int:
    """How many devices what is lowered here is split over by XLA: 1 inside of a shard_map over all axes of a mesh."""
    where: Any = context.module_context.axis_context
    if hasattr(where, "manual_axes"):
        return prod(size for axis, size in where.mesh.shape.items() if axis not in where.manual_axes)
    return getattr(where, "num_devices", None) or 1


def _require_one_device(name: str, devices: int) -> None:
    if devices > 1:
        asked = f"a {name.replace('_', ' ')} over {devices} devices, outside of a shard_map over them"
        found = "XLA cannot split a kernel: in silence it would gather all operands on each device, and compute all"
        do = "call the layer in jax.shard_map over all axes of the mesh, or give it its mesh; or name another backend"
        raise Unsupported(asked, found, do)


def _refuse_derivative(name: str, *_: Any, **__: Any) -> NoReturn:
    asked = f"a derivative of a {name.replace('_', ' ')}, as the gradient of a gradient of the experts asks for"
    found = "a kernel, which has none: the experts by kernels are differentiable once, in reverse mode"
    raise Unsupported(asked, found, "set BackendConfig(double_backward=True)")


def _refused_tangents(name: str, refuse: Callable[..., NoReturn]) -> Primitive:
    """The tangents of an opaque primitive's results, of `types`: whoever evaluates or transposes them is refused.

    Not in the primitive's rule: there JAX asks for all tangents, also for those that jax.lax.stop_gradient then drops.
    """
    operator = Primitive(f"{name}_tangents")
    operator.multiple_results = True

    def batched(operands: Sequence[Any], axes: Sequence[int | None], *, types: Any) -> tuple[list[Array], list[int]]:
        pairs = zip(operands, axes, strict=True)
        size = next(operand.shape[axis] for operand, axis in pairs if axis is not None)
        found = operator.bind(*operands, types=tuple(each.update(shape=(size, *each.shape)) for each in types))
        return found, [0] * len(found)

    operator.def_impl(refuse)
    operator.def_abstract_eval(lambda *_, types: list(types))
    mlir.register_lowering(operator, refuse)
    ad.primitive_transposes[operator] = refuse
    batching.primitive_batchers[operator] = batched
    return operator


def _result(compiled: Callable[..., Array], types: Sequence[Any], params: dict[str, Any]) -> Any:
    (found,) = _results(compiled, types, params)
    return found


def _results(compiled: Callable[..., Any], types: Sequence[Any], params: dict[str, Any]) -> Any:
    return jax.make_jaxpr(lambda *operands: compiled(*operands, **params))(*types).out_avals


def _in_turn(operator: Primitive) -> Batched:
    def one_after_the_other(operands: Sequence[Array], axes: Sequence[int | None], **params: Any) -> tuple[Array, int]:
        found: Array = _each(lambda *here: call(operator, *here, **params), operands, axes)
        return found, 0

    return one_after_the_other


def _each(function: Callable[..., Any], operands: Sequence[Array], axes: Sequence[int | None]) -> Any:
    """The function of each element of the batch, whose results are stacked along their first axis."""
    mapped = {
        i: jnp.moveaxis(operand, axis, 0)
        for i, (operand, axis) in enumerate(zip(operands, axes, strict=True))
        if axis is not None
    }

    def one(here: dict[int, Array]) -> Any:
        return function(*[here.get(i, operand) for i, operand in enumerate(operands)])

    return lax.map(one, mapped)


def _run_contract(first: Array, second: Array, *, axes: Axes) -> Array:
    one, other, out = axes
    kept, summed = ([i for i in one if i in other and (i in out) == stays] for stays in (True, False))
    at = lambda letters: ([one.index(i) for i in letters], [other.index(i) for i in letters])  # noqa: E731
    accumulate = accumulate_dtype(first.dtype)
    result = lax.dot_general(
        first, second, (at(summed), at(kept)), precision="highest", preferred_element_type=accumulate
    )
    # dot_general's order of the result's axes.
    found = [*kept, *(i for i in one if i not in other), *(i for i in other if i not in one)]
    return lax.transpose(result, [found.index(i) for i in out])


# JAX's own rule would multiply float32 gradients by 16-bit operands, which a GPU does in float32.
def _contract_dfirst(dout: Array, second: Array, *, axes: Axes) -> Array:
    return contract(dout.astype(second.dtype), second, (axes[2], axes[1], axes[0])).astype(second.dtype)


def _contract_dsecond(dout: Array, first: Array, *, axes: Axes) -> Array:
    return contract(dout.astype(first.dtype), first, (axes[2], axes[0], axes[1])).astype(first.dtype)


def _contract_batched(operands: Sequence[Array], mapped: Sequence[int | None], *, axes: Axes) -> tuple[Array, int]:
    """The batch is one more axis of the operands that have it, and of the result."""
    new = next(letter for letter in ascii_letters if letter not in "".join(axes))
    pairs = list(zip(operands, mapped, axes[:2], strict=True))
    first, second = (array if axis is None else jnp.moveaxis(array, axis, 0) for array, axis, _ in pairs)
    own, other = (letters if axis is None else new + letters for _, axis, letters in pairs)
    return contract(first, second, (own, other, new + axes[2])), 0


_CONTRACT = bilinear(
    "contract", _run_contract, (_contract_dfirst, _contract_dsecond), static=["axes"], batched=_contract_batched
)
