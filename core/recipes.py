"""How stored tensors fill an MoE layer's parameters and state, as data that reads both ways.

A recipe is a list of pieces; a piece says that a stored tensor is, transposed or with its columns in another order,
one region of a canonical tensor (`moebius.core.layout`). Stacking experts is a region per expert, concatenating halves
a region per half, de-interleaving an order of columns, renaming the pair of names. A map from tensors to regions reads
both ways, so loading and exporting are one definition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UP, DOWN = "experts.gate_and_up_projs", "experts.down_projs"
UP_BIAS, DOWN_BIAS = "experts.gate_up_proj_bias", "experts.down_proj_bias"


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One stored tensor, or one per expert where the name has {expert}.

    Attributes:
        source: name after the block's prefix. target: the parameter or state tensor that it is part of.
        half: 0 or 1 for the first or second half of the last axis, None for all of it.
        transposed: the last two axes are stored in the other order.
        alternating: the even columns as stored are the region's first half, the odd ones its second.
    """

    source: str
    target: str
    half: int | None = None
    transposed: bool = False
    alternating: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One way in which a family's experts are stored, or are wanted.

    Attributes:
        pieces: of the experts.
        changes: MoEConfig fields that hold for what it makes, so that no tensor is rearranged without its meaning.
        on_request: only where a caller names it; the others are told by the names of the tensors.
    """

    pieces: tuple[Piece, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    on_request: bool = False


def per_expert(gate: str, up: str, down: str) -> Recipe:
    """One tensor per expert and projection, output-major, under these names of the projections."""
    return Recipe(
        pieces=(
            Piece(source=f"experts.{{expert}}.{gate}.weight", target=UP, half=0, transposed=True),
            Piece(source=f"experts.{{expert}}.{up}.weight", target=UP, half=1, transposed=True),
            Piece(source=f"experts.{{expert}}.{down}.weight", target=DOWN, transposed=True),
        )
    )


def gpt_oss(*, alternating: bool) -> tuple[Piece, ...]:
    """The experts of GPT-OSS, input-major with biases: columns as stored, or gate and up columns told apart."""
    return (
        Piece(source="experts.gate_up_proj", target=UP, alternating=alternating),
        Piece(source="experts.down_proj", target=DOWN),
        Piece(source="experts.gate_up_proj_bias", target=UP_BIAS, alternating=alternating),
        Piece(source="experts.down_proj_bias", target=DOWN_BIAS),
    )


def shared(name: str) -> tuple[Piece, ...]:
    """The shared experts' MLP, stored under `name`."""
    projections = ("gate_proj", "up_proj", "down_proj")
    return tuple(Piece(source=f"{name}.{p}.weight", target=f"shared_experts.{p}.weight") for p in projections)


ROUTER = (Piece(source="gate.weight", target="gate.weight"),)
CORRECTION = (Piece(source="gate.e_score_correction_bias", target="gate.e_score_correction_bias"),)
FUSED = Recipe(
    pieces=(
        Piece(source="experts.gate_up_proj", target=UP, transposed=True),
        Piece(source="experts.down_proj", target=DOWN, transposed=True),
    )
)
