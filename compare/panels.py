"""The panels of a report's figure: each draws the answer to one question on one Axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moebius.compare import verdict as v
from moebius.compare.look import EXPLAINED, GREY, SMALL, WARNED, Look, handle, patch, points, span
from moebius.compare.sheet import head, is_gradient, row_name
from moebius.core.stages import OUTPUT

_AGREED = {"same experts": ("#9ECAE9", ""), "ties": ("#F0E442", "//"), "unexplained": ("#000000", "")}
_NORM = "relative error, ‖found − exact‖₂ / ‖exact‖₂"
_REFERENCE, _BAR = "reference", "#CCCCCC"
Looks = Mapping[str, Look]


def one_rounding(z: Any) -> np.ndarray:
    """Share of elements with |z| of at most `z` where each value was rounded once and correctly.

    The error is uniform within half a unit in the last place, z is measured in u |x| / sqrt(3), and the mantissa m in
    [1, 2) is log-uniform: |z| is uniform up to sqrt(3) / m. Its root mean square is `verdict.THEORY`.
    """
    top = math.sqrt(3.0)
    z = np.clip(np.asarray(z, np.float64), 0.0, top)
    low, high = np.minimum(z, top / 2), np.maximum(z, top / 2)
    return (low + top * np.log(2 * high / top) - (high - top / 2)) / (top * math.log(2.0))


def many_roundings(z: Any) -> np.ndarray:
    """The same where many such roundings add up: half a normal distribution of that root mean square."""
    z = np.asarray(z, np.float64)
    return np.array([math.erf(value / (v.THEORY * math.sqrt(2.0))) for value in z.ravel()]).reshape(z.shape)


def stage_errors(ax: Any, layer: v.Layer, looks: Looks) -> None:
    """Relative error per stage, between what rounding explains and where it fails."""
    rows = [row for row in layer.rows if not is_gradient(row)]
    low, high = _error_span([row.whole for row in rows], looks)
    drawn: list[float] = []
    for side, look in looks.items():
        found = [(i + look.shift, row.whole[side]) for i, row in enumerate(rows) if side in row.whole]
        for place, score in found:
            predicted, failing = score.predicted, v.FAIL_RMS * score.predicted
            if predicted > 0:
                ax.bar(place, predicted - low, look.width, bottom=low, color=EXPLAINED)
                ax.bar(place, failing - predicted, look.width, bottom=predicted, color=WARNED)
                ax.plot([place - look.width / 2, place + look.width / 2], [failing] * 2, color="black", lw=1.5)
        drawn += (errors := [_error(score) for _, score in found])
        points(ax, [place for place, _ in found], errors, look)
    ax.set_xticks(range(len(rows)), [row.name for row in rows], rotation=30, ha="right", rotation_mode="anchor")
    ax.set_xlim(-0.5, max(len(rows), 1) - 0.5)
    ax.set_title("error of each stage, from the layer's input on")
    _finish_errors(ax, low, high, drawn)


def depth_errors(ax: Any, layers: Sequence[v.Layer], looks: Looks) -> None:
    """Relative error of the output per layer, between what rounding explains and where it fails."""
    rows = [(layer.index, row.whole) for layer in layers for row in layer.rows if row.name == OUTPUT]
    low, high = _error_span([whole for _, whole in rows], looks)
    drawn: list[float] = []
    indices = np.array([index for index, _ in rows])
    predicted = np.array([max((whole[s].predicted for s in looks if s in whole), default=0.0) for _, whole in rows])
    if len(rows):
        ax.fill_between(indices, low, predicted, color=EXPLAINED, lw=0)
        ax.fill_between(indices, predicted, v.FAIL_RMS * predicted, color=WARNED, lw=0)
        ax.plot(indices, v.FAIL_RMS * predicted, color="black", lw=1.5)
    for side, look in looks.items():
        found = [(index, whole[side]) for index, whole in rows if side in whole]
        drawn += (errors := [_error(score) for _, score in found])
        points(ax, [index for index, _ in found], errors, look, ls="-", lw=1)
    ax.set_xlabel("layer")
    _whole_numbers(ax)
    ax.set_title("error of the output against depth")
    _finish_errors(ax, low, high, drawn)


def histogram(ax: Any, layers: Sequence[v.Layer], looks: Looks) -> None:
    """How |z| is distributed over the forward pass, beside what rounding gives in theory."""
    edges = np.array([*v.Z_EDGES[:-1], 2 * v.Z_EDGES[-2] - v.Z_EDGES[-3]])
    centres = (edges[:-1] + edges[1:]) / 2
    rows = [row for layer in layers for row in layer.rows if not is_gradient(row)]
    lowest = 1e-4
    for side, look in looks.items():
        whole, step = _shares([row.whole.get(side) for row in rows]), _shares([row.step.get(side) for row in rows])
        if whole is not None:
            ax.stairs(whole, edges, baseline=1e-12, color=look.color, lw=1.6, alpha=0.8)
        if step is not None:
            places = centres + 0.25 * look.shift
            ax.plot(places[step > 0], step[step > 0], look.marker, color=look.color, ms=4, mfc="none")
        lowest = min([lowest, *(s[s > 0].min() for s in (whole, step) if s is not None)])
    for theory, style in ((one_rounding, "--"), (many_roundings, ":")):
        ax.stairs(np.diff(theory(edges[:-1])), edges[:-1], baseline=1e-12, color="black", ls=style, lw=1.3)
    ax.axvline(v.FAIL_MAX, color="black", lw=1.5)
    ax.set_yscale("log")
    ax.set_ylim(lowest / 3, 3.0)
    ax.set_xlim(0.0, edges[-1])
    ax.set_xticks(range(int(v.FAIL_MAX) + 1))
    ax.set_xlabel("|z|: error over what rounding explains (last bin open)")
    ax.set_ylabel("share of the elements")
    ax.set_title("z of the forward pass" + _of_all(layers))
    handles = [
        handle(color=GREY, lw=1.6, label="from the layer's input on"),
        handle(color=GREY, marker="o", mfc="none", ms=4, ls="", label="each step alone"),
        handle(color="black", ls="--", lw=1.3, label="theory: one rounding"),
        handle(color="black", ls=":", lw=1.3, label="theory: many roundings"),
        handle(color="black", lw=1.5, label=f"fails above {v.FAIL_MAX:g}"),
    ]
    ax.legend(handles=handles, fontsize=SMALL, loc="upper right", bbox_to_anchor=(0.93, 1.0))


def agreement(ax: Any, layers: Sequence[v.Layer]) -> None:
    """Per column, the share of tokens with the same experts, with a tie, and that nothing explains."""
    columns = tuple(dict.fromkeys(column for layer in layers for column in layer.columns if column in layer.routing))
    for i, column in enumerate(columns):
        found = [layer.routing[column] for layer in layers if column in layer.routing]
        values = (sum(a.equal for a in found), sum(a.ties for a in found), sum(a.unexplained for a in found))
        tokens, left = max(sum(a.tokens for a in found), 1), 0.0
        for value, (color, hatch) in zip(values, _AGREED.values(), strict=True):
            ax.barh(i, value / tokens, left=left, height=0.75, color=color, hatch=hatch, edgecolor="black", lw=0.3)
            left += value / tokens
        # Names stand on the bars: those of pairs are long, and beside them little would be left for the bars.
        how: dict[str, Any] = {"va": "center", "fontsize": SMALL - 1, "transform": ax.get_yaxis_transform()}
        on_white = {"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.85}
        name = next(head(layer, column) for layer in layers if column in layer.routing)
        ax.text(0.01, i, name, bbox=on_white, parse_math=False, **how)
        ax.text(1.01, i, " + ".join(map(str, values)), **how)
    ax.set_yticks([])
    n = max(len(columns), 1)
    ax.set_ylim(1.3 * n - 0.5, -0.5)  # room for the legend below the bars
    ax.set_xlim(0.0, 1.0)
    ax.set_xlabel("share of the tokens", fontsize=SMALL)
    ax.tick_params(axis="x", labelsize=SMALL)
    ax.set_title("routing: same experts + ties + unexplained" + _of_all(layers))
    edge = {"edgecolor": "black", "lw": 0.3}
    patches = [patch(facecolor=c, hatch=h, label=name, **edge) for name, (c, h) in _AGREED.items()]
    ax.legend(handles=patches, fontsize=SMALL, ncols=3, loc="lower left")


def load(ax: Any, layer: v.Layer, looks: Looks) -> None:
    """Tokens per expert: the reference's as bars, a side's as markers where they differ."""
    exact = layer.load.get(_REFERENCE, ())
    ax.bar(range(len(exact)), exact, color=_BAR, width=0.9)
    for side, look in looks.items():
        other = [(e, n) for e, n in enumerate(layer.load.get(side, ())) if e >= len(exact) or n != exact[e]]
        if other:
            places, numbers = [e + look.shift for e, _ in other], [n for _, n in other]
            ax.plot(places, numbers, look.marker, color=look.color, ms=4)
    ax.set_ylim(0.0, 1.3 * ax.get_ylim()[1])
    _small(ax, "expert", "tokens per expert")
    handles = [
        patch(facecolor=_BAR, label=_REFERENCE),
        handle(color=GREY, marker="o", ls="", ms=4, label="a side, where it differs"),
    ]
    ax.legend(handles=handles, fontsize=SMALL, ncols=2, loc="upper left")


def strays(ax: Any, layers: Sequence[v.Layer], looks: Looks) -> None:
    """Per layer, the share of tokens that a side routes otherwise than the reference."""
    highest = 0.01
    for side, look in looks.items():
        found = [(layer.index, layer.routing[side]) for layer in layers if side in layer.routing]
        shares = [1 - a.equal / a.tokens if a.tokens else math.nan for _, a in found]
        ax.plot([i for i, _ in found], shares, look.marker, color=look.color, ls="-", lw=1, ms=4)
        highest = max([highest, *(share for share in shares if math.isfinite(share))])
    ax.set_ylim(0.0, 1.15 * highest)
    _small(ax, "layer", "tokens with other experts")


def gradients(ax: Any, layers: Sequence[v.Layer], looks: Looks) -> None:
    """z_rms and z_max of every gradient with their limits; of many layers the worst."""
    rows = [row for layer in layers for row in layer.rows if is_gradient(row)]
    names = tuple(dict.fromkeys(row.name for row in rows))
    drawn = [v.FAIL_MAX]
    for side, look in looks.items():
        scores = [[row.whole[side] for row in rows if row.name == name and side in row.whole] for name in names]
        kept = [(i + look.shift, found) for i, found in enumerate(scores) if found]
        places = [place for place, _ in kept]
        for largest, face in ((False, look.color), (True, "white")):
            z = [max(_z(score, largest) for score in found) for _, found in kept]
            points(ax, places, z, look, mfc=face, sideways=True)
            drawn += z
    for limit, style in ((v.THEORY, ":"), (v.WARN_RMS, "--"), (v.FAIL_RMS, "-"), (v.FAIL_MAX, "-.")):
        ax.axvline(limit, color="black", ls=style, lw=1.2, zorder=1)
    ax.set_xscale("log")
    low, high = span(drawn, (0.4, 16.0))
    ax.set_xlim(low, high)
    if high < 100:
        ax.set_xticks([tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= tick <= high])
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    ax.set_yticks(range(len(names)), [row_name(name).removeprefix("gradient of ") for name in names], fontsize=SMALL)
    ax.grid(axis="y", color="#EEEEEE", zorder=0)
    ax.set_axisbelow(True)
    ax.set_ylim(max(len(names), 1) - 0.5, -0.5)
    ax.set_xlabel("z: error over what rounding explains")
    ax.set_ylabel("gradient of")
    ax.set_title("z of the gradients" + (", worst of all layers" if len(layers) > 1 else ""))
    handles = [
        handle(color=GREY, marker="o", ls="", ms=5, label="z_rms"),
        handle(color=GREY, marker="o", ls="", ms=5, mfc="white", label="z_max"),
        handle(color="black", ls=":", lw=1.2, label=f"one rounding: z_rms {v.THEORY:.2f}"),
        handle(color="black", ls="--", lw=1.2, label=f"warns above z_rms {v.WARN_RMS:g}"),
        handle(color="black", ls="-", lw=1.2, label=f"fails above z_rms {v.FAIL_RMS:g}"),
        handle(color="black", ls="-.", lw=1.2, label=f"fails above z_max {v.FAIL_MAX:g}"),
    ]
    handles += _edges(drawn)
    ax.legend(handles=handles, fontsize=SMALL, loc="upper center", bbox_to_anchor=(0.4, -0.15), ncols=3)


def _error_span(wholes: Sequence[Mapping[str, v.Score]], looks: Looks) -> tuple[float, float]:
    """Limits of the axis of relative errors: room for what is predicted, and above for the legend."""
    scores = [whole[side] for whole in wholes for side in looks if side in whole]
    low, high = span(
        [x for s in scores for x in (s.relative, s.predicted / 2, v.FAIL_RMS * s.predicted)], (math.inf, 0.0)
    )
    low, high = (low, high) if high > 0 else (1e-8, 1.0)
    return low, high * (high / low) ** 0.4


def _finish_errors(ax: Any, low: float, high: float, values: Sequence[float]) -> None:
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ax.set_ylabel(_NORM)
    handles = [
        patch(facecolor=EXPLAINED, label="explained by rounding"),
        patch(facecolor=WARNED, label="larger than it should be"),
        handle(color="black", lw=1.5, label=f"{v.FAIL_RMS:g} times the explained: about where it fails"),
    ]
    ax.legend(handles=handles + _edges(values), fontsize=SMALL, loc="upper left")


def _edges(values: Sequence[float]) -> list[Any]:
    """What the legend says of markers on the edges of a logarithmic axis."""
    zero = handle(color=GREY, marker="o", mfc="white", ls="", label="on the edge: exactly zero")
    off = handle(color=GREY, marker="X", ms=9, ls="", label="not finite")
    return [zero] * any(value == 0 for value in values) + [off] * (not all(map(math.isfinite, values)))


def _shares(scores: Sequence[v.Score | None]) -> np.ndarray | None:
    """Share of elements per bin of z, over all scores but the exact ones: those have no rounding to look at."""
    found = [
        s.histogram for s in scores if s is not None and s.predicted > 0 and len(s.histogram) == len(v.Z_EDGES) - 1
    ]
    total = np.sum(found, axis=0) if found else np.zeros(1)
    return total / total.sum() if total.sum() else None


def _error(score: v.Score) -> float:
    return math.nan if score.bad else score.relative


def _z(score: v.Score, largest: bool) -> float:
    z = score.z_max if largest else score.z_rms
    return math.inf if score.bad or math.isnan(z) else z


def _of_all(layers: Sequence[v.Layer]) -> str:
    return f", {len(layers)} layers" if len(layers) > 1 else ""


def _small(ax: Any, x: str, y: str) -> None:
    ax.set_xlabel(x, fontsize=SMALL)
    ax.set_ylabel(y, fontsize=SMALL)
    ax.tick_params(labelsize=SMALL)
    _whole_numbers(ax)


def _whole_numbers(ax: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
