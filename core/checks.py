"""Shape and dtype checks of both frontends, in one place so that both say the same.

They read `.shape` and `.dtype` alone, so any framework's array, or a tracer of one, will do. Value checks need the
values and live with the frontends, behind `BackendConfig.checks`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from moebius.core.errors import ConfigError, DTypeError, ShapeError
from moebius.core.precision import dtype_name

FLOATS = ("float64", "float32", "bfloat16", "float16")
INDICES = ("int32", "int64")
MODES = ("off", "full")


def environment() -> str:
    """MOEBIUS_CHECKS: "full" for value checks, "off" by default.

    Raises:
        ConfigError: it holds another word.
    """
    mode = os.environ.get("MOEBIUS_CHECKS", "off")
    if mode not in MODES:
        raise ConfigError(f"the environment's MOEBIUS_CHECKS={mode!r}", f"the choices {MODES}", "use one of them")
    return mode


def dtype_text(array: Any) -> str:
    """The dtype's plain name: "float32" for torch.float32 and for numpy.dtype("float32")."""
    return str(array.dtype).rsplit(".", 1)[-1]


def tokens(x: Any, width: int, what: str = "x") -> None:
    """`x` is a floating [T, width].

    Raises:
        ShapeError, DTypeError: it is not.
    """
    if len(x.shape) != 2 or x.shape[1] != width:
        raise ShapeError(f"{what} of shape [tokens, {width}]", f"shape {tuple(x.shape)}", _reshape_hint(x, width))
    floating(x, what)


def floating(x: Any, what: str) -> None:
    """`x` holds one of the four floating dtypes.

    Raises:
        DTypeError: it does not.
    """
    if dtype_text(x) not in FLOATS:
        raise DTypeError(f"{what} of a dtype among {FLOATS}", f"{dtype_text(x)}", f"cast {what} first")


def token_mask(mask: Any, n_tokens: int, what: str = "token_mask") -> None:
    """`mask` is a bool [n_tokens].

    Raises:
        ShapeError, DTypeError: it is not.
    """
    if dtype_text(mask) != "bool":
        raise DTypeError(f"{what} of dtype bool", dtype_text(mask), "compare to make it bool, e.g. mask != 0")
    if tuple(mask.shape) != (n_tokens,):
        raise ShapeError(f"{what} of shape [{n_tokens}]", f"shape {tuple(mask.shape)}", "give one entry per token")


def routes(weights: Any, indices: Any, n_tokens: int) -> None:
    """`weights` [T, K] is floating, `indices` [T, K] int32 or int64.

    Raises:
        ShapeError, DTypeError: they are not.
    """
    if dtype_text(indices) not in INDICES:
        raise DTypeError("indices of dtype int32 or int64", dtype_text(indices), "cast the expert ids to int32")
    floating(weights, "weights")
    if len(indices.shape) != 2 or indices.shape[0] != n_tokens:
        raise ShapeError(f"indices of shape [{n_tokens}, K]", f"shape {tuple(indices.shape)}", "give K ids per token")
    if tuple(weights.shape) != tuple(indices.shape):
        raise ShapeError(
            f"weights of the shape of indices {tuple(indices.shape)}",
            f"shape {tuple(weights.shape)}",
            "give one weight per chosen expert",
        )


def upstream(dy: Any, shape: Iterable[int], dtype: Any) -> None:
    """`dy` is a gradient of an output of this shape and dtype.

    Raises:
        ShapeError, DTypeError: it is not.
    """
    due = tuple(shape)
    if tuple(dy.shape) != due:
        raise ShapeError(
            f"dy_TD of the output's shape {due}", f"shape {tuple(dy.shape)}", "give one gradient per element"
        )
    name = dtype_name(dtype)
    if dtype_text(dy) != name:
        raise DTypeError(f"dy_TD of the output's dtype {name}", dtype_text(dy), "cast dy_TD")


def logits(value: Any, n_experts: int) -> None:
    """`value` is a floating [T, n_experts].

    Raises:
        ShapeError, DTypeError: it is not.
    """
    tokens(value, n_experts, "logits")


def hidden(value: Any, row_weights: Any, gated: bool) -> None:
    """`value` is a floating [R, U], U even where the activation is gated; `row_weights` is [R] or None.

    Raises:
        ShapeError, DTypeError: they are not.
    """
    if len(value.shape) != 2 or (gated and value.shape[1] % 2):
        asked = "hidden of shape [rows, 2 I] for a gated activation" if gated else "hidden of shape [rows, I]"
        raise ShapeError(asked, f"shape {tuple(value.shape)}", "pass the first projection's output")
    floating(value, "hidden")
    _row_weights(row_weights, value.shape[0])


def bias(out: Any, value: Any, row_experts: Any, row_weights: Any) -> None:
    """`out` is [R, F], the bias [e, F], `row_experts` [R], `row_weights` [R] or None.

    Raises:
        ShapeError: they are not.
    """
    if len(out.shape) != 2 or len(value.shape) != 2 or value.shape[1] != out.shape[1]:
        asked = "a bias of shape [experts, F] for an output of shape [rows, F]"
        raise ShapeError(asked, f"shapes {tuple(value.shape)} and {tuple(out.shape)}", "pass one row per expert")
    if tuple(row_experts.shape) != (out.shape[0],):
        asked = f"row_experts of shape [{out.shape[0]}]"
        raise ShapeError(asked, f"shape {tuple(row_experts.shape)}", "give one expert per row")
    _row_weights(row_weights, out.shape[0])


def _row_weights(value: Any, n_rows: int) -> None:
    if value is not None and tuple(value.shape) != (n_rows,):
        asked = f"row_weights of shape [{n_rows}]"
        raise ShapeError(asked, f"shape {tuple(value.shape)}", "give one weight per row")


def grouped_matmul(rows: Any, weight: Any, group_sizes: Any) -> None:
    """rows [R, D], weight [e, D, F], group_sizes [e] int32, rows and weight of one floating dtype.

    Raises:
        ShapeError, DTypeError: they are not.
    """
    if len(weight.shape) != 3:
        raise ShapeError("weight of shape [e, D, F]", f"shape {tuple(weight.shape)}", "stack one matrix per expert")
    tokens(rows, weight.shape[1], "rows")
    if dtype_text(weight) != dtype_text(rows):
        raise DTypeError(f"weight of rows' dtype {dtype_text(rows)}", dtype_text(weight), "cast one of them")
    if dtype_text(group_sizes) not in INDICES:
        raise DTypeError("group_sizes of dtype int32", dtype_text(group_sizes), "count rows as int32")
    if tuple(group_sizes.shape) != (weight.shape[0],):
        raise ShapeError(
            f"group_sizes of shape [{weight.shape[0]}]",
            f"shape {tuple(group_sizes.shape)}",
            "give one size per expert",
        )


def parameters(given: Mapping[str, Any], rows: Iterable[Any]) -> None:
    """`given` holds every parameter of `rows` (core.layout.Parameter), each in its shape.

    Raises:
        ShapeError: names are missing (lists all), or a shape differs.
    """
    rows = tuple(rows)
    missing = [row.name for row in rows if row.name not in given]
    if missing:
        asked = f"parameters {', '.join(row.name for row in rows)}"
        raise ShapeError(asked, f"no {', '.join(missing)}", "pass all of them, or change the config")
    for row in rows:
        parameter(row.name, given[row.name], row.shape)


def parameter(name: str, array: Any, shape: tuple[int, ...]) -> None:
    """`array` has the shape that the layout gives to `name`.

    Raises:
        ShapeError: it has not.
    """
    if tuple(array.shape) != shape:
        raise ShapeError(
            f"{name} of shape {list(shape)}",
            f"shape {list(array.shape)}",
            "pass the input-major layout [experts, in, out] of moebius.core.layout",
        )


def _reshape_hint(x: Any, width: int) -> str:
    if len(x.shape) > 2 and x.shape[-1] == width:
        return f"flatten the leading axes: x.reshape(-1, {width}); MoE takes any leading axes"
    return f"pass two axes, tokens and width {width}"
