"""Activations as data: one row each, played by the reference, both frontends and the kernels.

    gate, up   = halves of hidden (or even and odd columns), for a gated row
    gate       = min(gate, limit);  up = clamp(up, -limit, limit)        where the row has a limit
    act        = curve(gate) * (up + up_offset) * row_weight
    curve      = silu:      g * sigmoid(alpha * g)
                 gelu_tanh: 0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3)))
                 relu2:     max(g, 0)^2

At a clamp's boundary the gradient is 1 (the value passes), outside it is 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from moebius.core.errors import ConfigError

Curve = Literal["silu", "gelu_tanh", "relu2"]
CURVES: tuple[Curve, ...] = ("silu", "gelu_tanh", "relu2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Activation:
    """One activation: what it computes and where it comes from.

    Attributes:
        name: key in ACTIVATIONS.
        curve: the nonlinear function of the gate.
        gated: the first projection holds a gate and an up half.
        interleaved: gate in the even, up in the odd columns; otherwise gate in the first half, up in the second.
        alpha: factor inside the sigmoid of `silu`.
        limit: clamp of gate (above) and up (both sides); None for no clamp.
        up_offset: added to up before the product.
        alpha_field, limit_field: config attribute that overrides alpha or limit.
        zero_limit_clamps: a configured limit <= 0 clamps to 0 (True) or turns the clamp off (False).
        source: the paper or model that the row restates.
    """

    name: str
    curve: Curve
    gated: bool
    source: str
    interleaved: bool = False
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0
    alpha_field: str | None = None
    limit_field: str | None = None
    zero_limit_clamps: bool = False

    def __post_init__(self) -> None:
        if self.curve not in CURVES:
            raise ConfigError(f"activation curve {self.curve!r}", f"the curves {CURVES}", "name one of them")
        if self.interleaved and not self.gated:
            raise ConfigError(
                f"activation {self.name!r}, interleaved and not gated", "one half only", "set interleaved=False"
            )

        if self.limit is not None and self.limit < 0:
            raise ConfigError(
                f"activation {self.name!r} with limit={self.limit}", "bounds that cross", "use a limit of 0 or more"
            )

    def up_width(self, inter_dim: int) -> int:
        """Width U of the first projection for hidden width `inter_dim` (I)."""
        return 2 * inter_dim if self.gated else inter_dim


_ROWS = (
    Activation(name="swiglu", curve="silu", gated=True, source="Shazeer, GLU Variants, arXiv:2002.05202; Qwen3-MoE"),
    Activation(
        name="swiglu_clamped",
        curve="silu",
        gated=True,
        limit=7.0,
        limit_field="swiglu_limit",
        source="DeepSeek-V4: SwiGLU with gate and up clamped in float32",
    ),
    Activation(
        name="swigluoai",
        curve="silu",
        gated=True,
        alpha=1.702,
        limit=7.0,
        up_offset=1.0,
        alpha_field="activation_alpha",
        limit_field="activation_limit",
        source="GPT-OSS, arXiv:2508.10925, on concatenated halves; MiniMax-M3",
    ),
    Activation(
        name="quick_geglu",
        curve="silu",
        gated=True,
        interleaved=True,
        alpha=1.702,
        limit=7.0,
        up_offset=1.0,
        alpha_field="activation_alpha",
        limit_field="activation_limit",
        zero_limit_clamps=True,
        source="GPT-OSS, arXiv:2508.10925, on its interleaved columns",
    ),
    Activation(name="geglu", curve="gelu_tanh", gated=True, source="arXiv:2002.05202 with tanh GELU; Gemma"),
    Activation(name="relu2", curve="relu2", gated=False, source="So et al., Primer, arXiv:2109.08668; Nemotron"),
)

ACTIVATIONS: dict[str, Activation] = {row.name: row for row in _ROWS}

# What a config may name; swiglu_clamped is what "swiglu" becomes with swiglu_limit > 0.
CONFIG_ACTIVATIONS = tuple(name for name in ACTIVATIONS if name != "swiglu_clamped")


def is_gated(name: object) -> bool:
    """Whether `name` is an activation with a gate and an up half; unknown names are not."""
    return isinstance(name, str) and name in CONFIG_ACTIVATIONS and ACTIVATIONS[name].gated


def resolve(name: str, settings: Any) -> Activation:
    """The row that `name` means under a config's settings, with its alpha and limit filled in.

    Args:
        name: one of CONFIG_ACTIVATIONS.
        settings: object whose `activation_alpha`, `activation_limit`, `swiglu_limit` (each optional) apply.
    Raises:
        ConfigError: no such activation.
    """
    if name not in CONFIG_ACTIVATIONS:
        raise ConfigError(f"activation {name!r}", f"the activations {CONFIG_ACTIVATIONS}", "name one of them")
    if name == "swiglu" and (getattr(settings, "swiglu_limit", 0.0) or 0.0) > 0:
        name = "swiglu_clamped"
    row = ACTIVATIONS[name]
    if row.alpha_field is not None:
        row = replace(row, alpha=float(getattr(settings, row.alpha_field, row.alpha)))
    if row.limit_field is not None and row.limit is not None:
        limit = float(getattr(settings, row.limit_field, row.limit))
        clamps = limit > 0 or row.zero_limit_clamps
        row = replace(row, limit=limit if clamps else None)
    return row
