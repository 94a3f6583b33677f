"""What is tallied of a comparison: a column for each side, and one for each pair of sides."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moebius.compare.noise.permute import Routes
from moebius.compare.score import Tally
from moebius.compare.sides.answer import Answer
from moebius.core.config import MoEConfig


@dataclass(eq=False, kw_only=True)
class Column:
    """One column: row -> tally, from the layer's input on (`whole`) and of each step alone (`step`)."""

    name: str
    whole: dict[str, Tally] = field(default_factory=dict)
    step: dict[str, Tally] = field(default_factory=dict)


@dataclass(eq=False, kw_only=True)
class Side(Column):
    """One side: its answer, the experts of each token, ascending, and the config that its reference takes."""

    answer: Answer
    ids_TK: np.ndarray
    config: MoEConfig
    routes: Routes

    @property
    def reference(self) -> tuple[bytes, bool]:
        """Sides that share this share a reference."""
        return self.ids_TK.tobytes(), self.config.apply_router_weight_after_down


@dataclass(eq=False, kw_only=True)
class Pair(Column):
    """Two sides that are held against each other."""

    one: Side
    other: Side
