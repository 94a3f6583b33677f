"""Steps 4 to 8 as one operator that keeps little: x, the pre-activation, the order of the rows and their weights.

The backward pass copies the rows and activates them again: two passes over memory instead of R * (D + I) elements
held. It runs the very kernels of `experts.steps`, so both agree bit for bit (shown on a CPU; on a GPU the routing
weights' gradient may differ in the last places where there are biases, or a backend fuses steps); but with
`apply_router_weight_after_down` the gradients are computed as if the weight came before, which is the same function
with other roundings.

Source: SonicMoE, arXiv:2512.14080: what to keep, and the routing weights' gradient without the output rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from moebius.core.activations import Activation
from moebius.core.config import MoEConfig
from moebius.core.errors import Unsupported
from moebius.core.registry import of_layer
from moebius.torch_frontend.activate import Fields, activate_rows, activate_rows_backward, fields, of_fields
from moebius.torch_frontend.bias import dot_rows, sum_rows
from moebius.torch_frontend.dispatch import Sent
from moebius.torch_frontend.dtypes import accumulate_dtype, on
from moebius.torch_frontend.few import Played, few
from moebius.torch_frontend.matmul import Fused, Kernels, Packed, in_context, kernels
from moebius.torch_frontend.operators import call, differentiate, unwatched
from moebius.torch_frontend.permute import scatter_rows, sort_routes, sum_dots, sum_slots

if TYPE_CHECKING:
    from jaxtyping import Float


class Weights(NamedTuple):
    """The experts' parameters in x's dtype."""

    up_eDU: Tensor
    down_eID: Tensor
    up_bias_eU: Tensor | None
    down_bias_eD: Tensor | None


class Kept(NamedTuple):
    """What the forward pass keeps for the backward pass; the pre-activation with its bias where steps are fused."""

    x_SD: Tensor
    hidden_RU: Tensor
    slot_of_row_R: Tensor
    row_of_slot_SK: Tensor
    group_sizes_e: Tensor
    row_weights_R: Tensor


class How(NamedTuple):
    """What the operator is told beside tensors; see `lean`."""

    activation: Fields
    after: bool
    partial: bool
    whole: bool
    backend: str


def lean(p: Mapping[str, Tensor], sent: Sent, config: MoEConfig, backend: str | None, partial: bool) -> Tensor:
    """`experts.steps` without taps: [S, D], each token's rows summed. Differentiable once.

    Args:
        p: parameters in x's dtype, of the experts held here. sent: what the dispatcher gave.
        partial: other ranks hold the rest of the sum: leave it in promote_types(dtype, float32).
    """
    weights = Weights(p["gate_and_up_projs"], p["down_projs"], p.get("gate_up_proj_bias"), p.get("down_proj_bias"))
    # Said once for both passes: what a hook of saved tensors hands back may lie otherwise.
    whole = weights.up_eDU.is_contiguous() and weights.down_eID.is_contiguous()
    placed = config.apply_router_weight_after_down
    told = (*fields(config.activation), placed, partial, whole, in_context(of_layer(backend, config)))
    given = (sent.x_SD, sent.weights_SK, sent.ids_SK, *weights)
    if not _eager(*given):
        y_SD: Tensor = call(_experts, *given, *told)[0]
    elif torch.is_grad_enabled():
        y_SD = _Eager.apply(*given, told)
    else:
        y_SD = _Eager.forward(None, *given, told)
    return y_SD


def forward(
    x_SD: Float[Tensor, "S D"], weights_SK: Tensor, ids_SK: Tensor, w: Weights, how: How
) -> tuple[Tensor, Kept, Any]:
    """(y_SD, what `backward` needs, what the backend made of the group sizes); a large tensor goes once it was read."""
    activation = of_fields(*how.activation)
    order = sort_routes(ids_SK, weights_SK, w.down_eID.shape[0])
    matmul, prepared = _matmul(how, x_SD, w, order.group_sizes_e, order.slot_of_row_R.shape[0])
    rows_RD = scatter_rows(x_SD, order.slot_of_row_R, order.row_of_slot_SK)
    before_R = None if how.after else order.row_weights_R
    fused = _fused(matmul, how, w)
    hidden_RU, act_RI = _up(matmul, fused, rows_RD, w, prepared, before_R, activation, order.row_experts_R)
    del rows_RD
    out_RD = _product(matmul, act_RI, w.down_eID, prepared)
    del act_RI
    y_SD = sum_slots(
        out_RD,
        order.row_of_slot_SK,
        bias_eD=w.down_bias_eD,
        row_experts_R=order.row_experts_R,
        row_weights_R=order.row_weights_R,
        after=how.after,
        dtype=accumulate_dtype(x_SD.dtype) if how.partial else x_SD.dtype,
    )
    slot_of_row_R, row_of_slot_SK, group_sizes_e, _, row_weights_R = order
    return y_SD, Kept(x_SD, hidden_RU, slot_of_row_R, row_of_slot_SK, group_sizes_e, row_weights_R), prepared


def backward(
    dy_SD: Float[Tensor, "S D"],
    kept: Kept,
    w: Weights,
    how: How,
    needs: list[bool],
    in_place: bool,
    prepared: Any = None,
) -> list[Tensor | None]:
    """Gradients of (x, weights, up, down, up_bias, down_bias), None where `needs` says no.

    Args:
        in_place: write the pre-activation's gradient over the pre-activation. prepared: of `forward`; None to make it
            again.
    """
    x_SD, hidden_RU, slot_of_row_R, row_of_slot_SK, group_sizes_e, row_weights_R = kept
    needs_x, needs_weights, needs_up, needs_down, needs_up_bias, needs_down_bias = needs
    activation = of_fields(*how.activation)
    matmul, prepared = _matmul(how, x_SD, w, group_sizes_e, slot_of_row_R.shape[0], prepared)
    row_experts_R = _row_experts(kept, w)
    dx_SD = dweights_SK = dup_eDU = dup_bias_eU = ddown_bias_eD = None

    dout_RD = scatter_rows(dy_SD.to(x_SD.dtype).contiguous(), slot_of_row_R, row_of_slot_SK)
    if needs_down_bias:
        ddown_bias_eD = sum_rows(dout_RD, group_sizes_e, row_weights_R)
    dhidden_RU, ddown_eID, dots_RB = _down_gradient(
        *(matmul, _fused(matmul, how, w), dout_RD, w, prepared, kept, activation, row_experts_R, needs_down, in_place)
    )
    if needs_weights:
        dweights_SK = sum_dots(dots_RB, row_of_slot_SK)
        if w.down_bias_eD is not None and row_experts_R is not None:
            more_R = dot_rows(dout_RD, w.down_bias_eD, row_experts_R)
            dweights_SK = dweights_SK + sum_dots(more_R[:, None], row_of_slot_SK)
    del dout_RD, dots_RB, hidden_RU
    if needs_up_bias:
        dup_bias_eU = sum_rows(dhidden_RU, group_sizes_e)
    if needs_up:
        rows_RD = scatter_rows(x_SD, slot_of_row_R, row_of_slot_SK)
        dup_eDU = _weight_gradient(matmul, rows_RD, dhidden_RU, prepared, w.up_eDU)
        del rows_RD
    if needs_x:
        drows_RD = _product(matmul, dhidden_RU, w.up_eDU.mT, prepared)
        del dhidden_RU
        dx_SD = sum_slots(drows_RD, row_of_slot_SK)
    return [dx_SD, dweights_SK, dup_eDU, ddown_eID, dup_bias_eU, ddown_bias_eD]


def _matmul(
    how: How, x_SD: Tensor, w: Weights, group_sizes_e: Tensor, n_rows: int, prepared: Any = None
) -> tuple[Kernels, Any]:
    matmul = kernels(how.backend, x_SD, w.up_eDU.shape, w.down_eID.shape, n_rows)
    if isinstance(prepared, Packed) and matmul.unpack is not None:
        prepared = matmul.unpack(group_sizes_e, prepared)
    return matmul, matmul.prepare(group_sizes_e) if prepared is None else prepared


def _up(
    matmul: Kernels,
    fused: Fused | None,
    rows_RD: Tensor,
    w: Weights,
    prepared: Any,
    row_weights_R: Tensor | None,
    activation: Activation,
    row_experts_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """(pre-activation, see Kept [R, U], its activation [R, I])."""
    if rows_RD.shape[0] and fused is not None:
        return fused.up(rows_RD, w.up_eDU.contiguous(), prepared, row_weights_R, activation, w.up_bias_eU)
    hidden_RU = _product(matmul, rows_RD, w.up_eDU, prepared)
    bias = {"bias_eU": w.up_bias_eU, "row_experts_R": row_experts_R}
    return hidden_RU, activate_rows(hidden_RU, row_weights_R, activation, **bias)


def _fused(matmul: Kernels, how: How, w: Weights) -> Fused | None:
    """What computes products together with the activation, in both passes; None where two steps have to."""
    fused = matmul.fused
    return fused if fused is not None and how.whole and fused.serves(w.down_eID) else None


def _down_gradient(
    matmul: Kernels,
    fused: Fused | None,
    dout_RD: Tensor,
    w: Weights,
    prepared: Any,
    kept: Kept,
    activation: Activation,
    row_experts_R: Tensor | None,
    needs_down: bool,
    in_place: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dhidden [R, U], ddown [e, I, D] or None, dots [R, B]: parts of the row weights' gradients but the bias')."""
    hidden_RU, row_weights_R, ddown_eID = kept.hidden_RU, kept.row_weights_R, None
    if dout_RD.shape[0] and fused is not None:
        given = hidden_RU, row_weights_R, activation, in_place
        dhidden_RU, act_RI, dots_RB = fused.down_gradient(dout_RD, w.down_eID.contiguous(), prepared, *given)
        if needs_down:
            ddown_eID = _weight_gradient(matmul, act_RI, dout_RD, prepared, w.down_eID)
        return dhidden_RU, ddown_eID, dots_RB
    bias = {"bias_eU": w.up_bias_eU, "row_experts_R": row_experts_R}
    if needs_down:
        act_RI = activate_rows(hidden_RU, row_weights_R, activation, **bias)
        ddown_eID = _weight_gradient(matmul, act_RI, dout_RD, prepared, w.down_eID)
        del act_RI
    dact_RI = _product(matmul, dout_RD, w.down_eID.mT, prepared)
    dhidden_RU, dots_R = activate_rows_backward(
        dact_RI, hidden_RU, row_weights_R, activation, **bias, in_place=in_place
    )
    assert dots_R is not None  # there are row weights
    return dhidden_RU, ddown_eID, dots_R[:, None]


def _product(matmul: Kernels, rows_RD: Tensor, weight_eDF: Tensor, prepared: Any) -> Tensor:
    if rows_RD.shape[0] == 0:
        return rows_RD.new_empty(0, weight_eDF.shape[2])
    return matmul.product(rows_RD, weight_eDF, prepared)


def _weight_gradient(matmul: Kernels, rows_RD: Tensor, dout_RF: Tensor, prepared: Any, like: Tensor) -> Tensor:
    if rows_RD.shape[0] == 0:
        return torch.zeros_like(like, memory_format=torch.contiguous_format)
    return matmul.weight_gradient(rows_RD, dout_RF, prepared)


def _row_experts(kept: Kept, w: Weights) -> Tensor | None:
    """[R] int32, e in the tail; None where no bias asks for it."""
    if w.up_bias_eU is None:
        return None
    rows_R = torch.arange(kept.slot_of_row_R.shape[0], dtype=torch.int32, device=kept.x_SD.device)
    ends_e = kept.group_sizes_e.cumsum(0, dtype=torch.int32)
    return torch.searchsorted(ends_e, rows_R, right=True, out_int32=True)


_WEIGHTS = "Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias"
_HOW = (
    "str curve, bool gated, bool interleaved, float alpha, float? limit, float up_offset, "
    "bool after, bool partial, bool whole, str backend"
)
_KEPT = "Tensor x, Tensor hidden, Tensor slot_of_row, Tensor row_of_slot, Tensor group_sizes, Tensor row_weights"
_N_TENSORS = 7  # x, weights, ids and Weights


@torch.library.custom_op(
    "moebius::experts",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weights, Tensor ids, {_WEIGHTS}, {_HOW}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _experts(x: Tensor, weights: Tensor, ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    with on(x.device):
        y, kept, _ = forward(x, weights, ids, Weights(*rest[:4]), _how(rest[4:]))
    return (y, *kept[1:])


@torch.library.custom_op(
    "moebius::experts_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {_KEPT}, {_WEIGHTS}, {_HOW}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _experts_backward(dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *how, needs = rest[10:]
    grads = backward(dy, Kept(*rest[:6]), Weights(*rest[6:10]), _how(how), needs, in_place=False)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.custom_op(
    "moebius::row_weights_of", mutates_args=(), schema="(Tensor row_weights, Tensor weights) -> Tensor"
)
def _of_weights(row_weights: Tensor, weights: Tensor) -> Tensor:
    """The rows' weights as a function of the routing weights: a second derivative by these is refused, and not zero."""
    return row_weights.clone()


@_of_weights.register_fake
def _(row_weights: Tensor, weights: Tensor) -> Tensor:
    return torch.empty_like(row_weights)


@_experts.register_fake
def _(x: Tensor, weights: Tensor, ids: Tensor, up: Tensor, down: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    how = _how(rest[2:])
    rows = ids.shape[0] * ids.shape[1]
    return (
        x.new_empty(x.shape, dtype=accumulate_dtype(x.dtype) if how.partial else x.dtype),
        x.new_empty(rows, up.shape[2]),
        ids.new_empty(rows, dtype=torch.int32),
        ids.new_empty(ids.shape, dtype=torch.int32),
        ids.new_empty(down.shape[0], dtype=torch.int32),
        weights.new_empty(rows),
    )


@_experts_backward.register_fake
def _(dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    kept, w, needs = Kept(*rest[:6]), Weights(*rest[6:10]), rest[-1]
    likes = (kept.x_SD, kept.row_weights_R.new_empty(kept.row_of_slot_SK.shape), *w)
    return tuple(
        dy.new_empty(0) if like is None or not needed else torch.empty_like(like, memory_format=torch.contiguous_format)
        for like, needed in zip(likes, needs, strict=True)
    )


class _Eager(Function):
    """The operator where nothing but autograd follows the call: on the host in half the time, of few rows in less."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        inputs, told = given[:_N_TENSORS], given[_N_TENSORS]  # as one: autograd looks at each argument
        y_SD: Tensor
        kept: Sequence[Any]
        with on(given[0].device):
            played = _FORWARD(inputs, (told, ctx is not None)) if _few(inputs[0], inputs[2].numel(), told) else None
            if played is None:
                y_SD, (_, *kept), prepared = _forward(inputs, told)
            else:
                (y_SD, *found), form = played  # type: ignore[assignment]
                kept, prepared = found[:_N_KEPT], Packed(tuple(found[_N_KEPT:]), form)  # type: ignore[arg-type]
        if ctx is not None:
            _save(ctx, (*inputs, *told), (y_SD, *kept))
            ctx.prepared = kept[_GROUP_SIZES], prepared
        return y_SD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (*_backward(ctx, *grads)[:_N_TENSORS], None)


def _forward(inputs: Sequence[Any], told: tuple[Any, ...]) -> tuple[Tensor, Kept, Any]:
    x, weights, ids, *parameters = inputs
    return forward(x, weights, ids, Weights(*parameters), _how(told))


def _few(x_SD: Tensor, n_rows: int, told: tuple[Any, ...]) -> bool:
    """Whether to play. Of several ranks the rows that arrive are another number each time: kinds without end."""
    return few(x_SD, n_rows) and not told[_PARTIAL]


def _of(x_SD: Tensor, weights: Sequence[Any], told: tuple[Any, ...], n_rows: int) -> Kernels:
    return kernels(_how(told).backend, x_SD, weights[0].shape, weights[1].shape, n_rows)


def _forward_few(inputs: Sequence[Any], told: tuple[Any, bool]) -> tuple[list[Any], tuple[Any, ...]]:
    """([y, Kept but x, Packed.tensors], Packed.form), told what forward is told and whether it has a backward pass."""
    how, differentiable = told
    y_SD, kept, prepared = _forward(inputs, how)
    if not differentiable:
        return [y_SD], ()
    pack = _of(inputs[0], inputs[3:5], how, inputs[2].numel()).pack
    assert pack is not None  # see _can_forward
    packed = pack(prepared)
    return [y_SD, *kept[1:], *packed.tensors], packed.form


def _backward_few(given: Sequence[Any], told: tuple[Any, ...]) -> tuple[list[Any], None]:
    """Of (dy, Kept, Weights, Packed.tensors), told (what forward was told, needs, Packed.form or None)."""
    told, needs, form = told
    dy, kept, w = given[0], Kept(*given[1:7]), Weights(*given[7:11])
    prepared = None if form is None else Packed(tuple(given[11:]), form)
    return backward(dy, kept, w, _how(told), list(needs), in_place=True, prepared=prepared), None


def _can_forward(inputs: Sequence[Any], told: tuple[Any, ...]) -> bool:
    return _of(inputs[0], inputs[3:5], told[0], inputs[2].numel()).pack is not None


def _can_backward(given: Sequence[Any], told: tuple[Any, ...]) -> bool:
    return _of(given[1], given[7:9], told[0], given[3].numel()).pack is not None


_N_KEPT = len(Kept._fields) - 1  # but x
_PARTIAL = How._fields.index("partial") - len(How._fields)  # of what is told, counted from its end
_GROUP_SIZES = Kept._fields.index("group_sizes_e") - 1
_ROW_WEIGHTS = Kept._fields.index("row_weights_R")
_FORWARD, _BACKWARD = Played(_forward_few, _can_forward), Played(_backward_few, _can_backward)


def _eager(*given: Any) -> bool:
    # Elsewhere the operator's fake says what comes out.
    return unwatched(*given) and given[0].device.type in ("cpu", "cuda")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights_SK, _, *weights = inputs[:_N_TENSORS]
    ctx.told = inputs[_N_TENSORS:]
    ctx.set_materialize_grads(False)  # nobody asks for the gradient of what is kept
    ctx.save_for_backward(x, *output[1:], *weights, weights_SK)


def _backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    asked = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], *ctx.needs_input_grad[3:_N_TENSORS])
    if dy is None:
        return (None,) * (_N_TENSORS + len(ctx.told))
    *tensors, weights_SK = ctx.saved_tensors
    grads: Sequence[Tensor | None]
    if _alone(dy):
        grads = _backward_alone(ctx, dy, tensors, asked)
    else:
        if torch.is_grad_enabled():  # of what is kept, these alone are not among the operator's inputs by themselves
            tensors[_ROW_WEIGHTS] = call(_of_weights, tensors[_ROW_WEIGHTS], weights_SK)
        found = call(_experts_backward, dy.contiguous(), *tensors, *ctx.told, list(asked))
        grads = [grad if needed else None for grad, needed in zip(found, asked, strict=True)]
    dx, dweights, *dparameters = grads
    return (dx, dweights, None, *dparameters, *(None for _ in ctx.told))


def _backward_alone(ctx: Any, dy: Tensor, tensors: Sequence[Any], needs: tuple[bool, ...]) -> Sequence[Tensor | None]:
    kept, w = Kept(*tensors[:6]), Weights(*tensors[6:])
    prepared = _prepared(ctx, kept.group_sizes_e)
    alike = prepared is None or isinstance(prepared, Packed)
    if alike and _few(kept.x_SD, kept.slot_of_row_R.shape[0], ctx.told):
        packed, form = prepared or ((), None)
        with on(dy.device):
            played = _BACKWARD((dy, *tensors, *packed), (ctx.told, needs, form))
        if played is not None:
            return played[0]
    del tensors
    return backward(dy, kept, w, _how(ctx.told), list(needs), in_place=True, prepared=prepared)


def _prepared(ctx: Any, group_sizes_e: Tensor) -> Any:
    """What the forward pass made of these very group sizes, this once; None for others, as after a checkpoint."""
    of, prepared = getattr(ctx, "prepared", (None, None))
    ctx.prepared = None, None
    return prepared if of is group_sizes_e else None


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise Unsupported(
        "the gradient of a gradient of the experts",
        "the lean operator, which is differentiable once",
        "set BackendConfig(double_backward=True)",
    )


def _alone(dy: Tensor) -> bool:
    """Whether this is an ordinary backward pass whose graph nobody reads again, so that kept tensors may be reused.

    The hooks of torch.autograd.graph.saved_tensors_hooks see the reuse, if they keep what they were handed. Not while
    something traces it, not with create_graph=True or retain_graph=True, and not under vmap, where one pass
    serves several gradients and `dy` has no storage.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if type(dy) is not Tensor or not torch._C._has_storage(dy) or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _how(told: Any) -> How:
    *activation, after, partial, whole, backend = told
    return How(tuple(activation), after, partial, whole, backend)


differentiate(_experts, _backward, _save)
differentiate(_experts_backward, _refuse)
differentiate(_of_weights, _refuse)
