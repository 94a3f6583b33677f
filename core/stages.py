"""The stages of one pass through an MoE layer, by name: what a trace holds and what a comparison walks through.

A layer's `tap` is called with each stage's name and value and returns the value to go on with: `untapped` by default;
`trace` of either frontend puts one there that records. A gradient's name is "grad." and then the stage's, the
parameter's or "x".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moebius.core.config import MoEConfig

# (name of the stage, value) -> the value to go on with.
Tap = Callable[[str, Any], Any]
GRADIENT = "grad."
INPUT, OUTPUT = "x", "output"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage.

    Attributes:
        name: key in a trace. axes: one letter each, from the legend in `moebius.core`.
        what: the value, in words.
        differentiable: its gradient is a stage of the backward pass.
    """

    name: str
    axes: str
    what: str
    differentiable: bool = True


STAGES: tuple[Stage, ...] = (
    Stage(name="logits", axes="TE", what="the router's projection, bias included"),
    Stage(name="weights", axes="TK", what="routing weights, in the dtype that the gate returns"),
    Stage(name="ids", axes="TK", what="the experts of each token", differentiable=False),
    Stage(name="latent", axes="TD", what="what the experts read, where a latent projection makes it"),
    Stage(name="rows", axes="RD", what="one row per route, sorted by expert, then token, then slot"),
    Stage(name="up", axes="RU", what="first projection, bias included"),
    Stage(name="activation", axes="RI", what="activation, times the routing weight where that comes before down"),
    Stage(name="down", axes="RD", what="second projection, bias included"),
    Stage(name="combine", axes="TD", what="each token's rows summed: the routed experts' output"),
    Stage(name="shared", axes="TD", what="the shared experts' output, times their gate", differentiable=False),
    Stage(name=OUTPUT, axes="TD", what="the layer's output", differentiable=False),
)


def untapped(name: str, value: Any) -> Any:
    """The tap that changes and records nothing."""
    return value


def of(config: MoEConfig) -> tuple[Stage, ...]:
    """The stages that a layer of this config has, in order."""
    absent = set()
    if config.moe_latent_size is None:
        absent.add("latent")
    if not config.n_shared_experts:
        absent.add("shared")
    return tuple(stage for stage in STAGES if stage.name not in absent)
