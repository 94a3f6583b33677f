"""What a comparison found: the verdict, and every way to look at it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moebius.compare.verdict import FAIL, Element, Layer, worst_of
from moebius.core.config import MoEConfig
from moebius.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Report:
    """What `report` found; shows itself in a notebook.

    Attributes:
        checkpoint, family, recipe: what was read. moe_layers: all MoE layers of the model. config: of the blocks.
        dtype, tokens, text, seed: of the run. versions: of the packages. devices: side -> where it ran.
        settings: precision switches in force, in words.
        layers: one entry for each layer that was compared.
        seconds: part -> time, over all layers.
    """

    checkpoint: str
    family: str
    recipe: str
    moe_layers: tuple[int, ...]
    config: MoEConfig
    dtype: str
    tokens: int
    text: str
    seed: int
    versions: Mapping[str, str]
    devices: Mapping[str, str]
    settings: tuple[str, ...]
    layers: tuple[Layer, ...]
    seconds: Mapping[str, float]

    @property
    def verdict(self) -> str:
        """ "pass", "warn" or "fail": the severest of the layers'; "fail" without any."""
        return worst_of([layer.verdict for layer in self.layers]) if self.layers else FAIL

    @property
    def passed(self) -> bool:
        """Whether nothing that counts failed."""
        return self.verdict != FAIL

    @property
    def faults(self) -> list[str]:
        """Every warning and failure that counts, in words."""
        many = len(self.layers) > 1
        return [f"layer {one.index}, {fault}" if many else fault for one in self.layers for fault in one.faults]

    def worst(
        self, n: int = 10, *, row: str | None = None, column: str | None = None, step: bool | None = None
    ) -> list[Element]:
        """The elements that are farthest off, in predicted deviations; at most 20 of each tensor and column are kept.

        Args:
            n: how many. row: of this tensor alone, e.g. "activation" or "grad.experts.down_projs".
            column: of this side or pair alone. step: fed with the side's own inputs, or not; None for either.
        Raises:
            ConfigError: no such row or column, or n is negative.
        """
        if n < 0:
            raise ConfigError(f"the worst {n} elements", "a negative number", "ask for 0 or more")
        for what, name, known in (
            ("row", row, {r.name for layer in self.layers for r in layer.rows}),
            ("column", column, {c for layer in self.layers for c in layer.columns}),
        ):
            if name is not None and name not in known:
                raise ConfigError(f"{what} {name!r}", f"the {what}s {', '.join(sorted(known))}", "name one of them")
        found = [
            element
            for layer in self.layers
            for element in layer.worst
            if row in (None, element.row) and column in (None, element.column) and step in (None, element.step)
        ]
        return sorted(found, key=lambda element: -abs(element.z))[:n]

    def table(self, color: bool = False) -> str:
        """The report as text of at most 100 columns, with terminal colours if asked."""
        from moebius.compare.table import table

        return table(self, color)

    def plot(self, axes: Any = None) -> Any:
        """One figure of four panels; returns its matplotlib Axes, an array of four. `axes`: to draw into."""
        from moebius.compare.plot import plot

        return plot(self, axes)

    def html(self) -> str:
        """One self-contained page with figure and tables."""
        from moebius.compare.page import page

        return page(self)

    def to_json(self) -> str:
        """The report as JSON, verdicts included; numbers that are not finite become null."""
        body = {**asdict(self), "verdict": self.verdict, "passed": self.passed, "faults": self.faults}
        for found, layer in zip(body["layers"], self.layers, strict=True):
            found |= {"verdict": layer.verdict, "faults": layer.faults}
            found["routing"] = {name: {**asdict(a), "verdict": a.verdict} for name, a in layer.routing.items()}
            for body_row, row in zip(found["rows"], layer.rows, strict=True):
                body_row["verdict"] = row.verdict
                for kind, scores in (("whole", row.whole), ("step", row.step)):
                    body_row[kind] = {name: {**asdict(s), "verdict": s.verdict} for name, s in scores.items()}
        return json.dumps(_finite(body), indent=2, allow_nan=False)

    def require_passed(self) -> None:
        """For tests of yours: nothing where the report passed.

        Raises:
            AssertionError: it did not; says the first faults and the element that is farthest off.
        """
        if not self.passed:
            counted = [element for element in self.worst(sys.maxsize) if self._counts(element)]
            lines = [*self.faults[:3], *(f"farthest off: {element}" for element in counted[:1])]
            raise AssertionError("\n".join(lines) or "nothing was compared")

    def _counts(self, element: Element) -> bool:
        """Whether an element is of a column that counts."""
        return any(
            row.whole[element.column].counts
            for layer in self.layers
            for row in layer.rows
            if (layer.index, row.name) == (element.layer, element.row) and element.column in row.whole
        )

    def __repr__(self) -> str:
        layers = f"{len(self.layers)} layers" if len(self.layers) != 1 else f"layer {self.layers[0].index}"
        return f"<Report of {self.checkpoint}, {layers}, {self.dtype}, {self.tokens} tokens: {self.verdict}>"

    def _repr_html_(self) -> str:
        from moebius.compare.page import fragment

        return fragment(self)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
