"""A report as one figure: errors against their bounds, z against theory, routing, gradients."""

from __future__ import annotations

from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from moebius.compare import panels
from moebius.compare.files import check_writable, figure_format, write_whole
from moebius.compare.look import SMALL, handle, looks
from moebius.compare.sheet import MARKS, all_sides, plain
from moebius.core.errors import BackendUnavailable, ConfigError

if TYPE_CHECKING:
    from moebius.compare.result import Report

_INCHES, _DPI = (12.0, 9.0), 100


def plot(report: Report, axes: Any = None) -> np.ndarray:
    """Draw the report in four panels; `axes[0].figure` is the figure, which a notebook shows.

    The panels, in order: (a) relative error per stage, or of the output against depth where there are many layers;
    (b) distribution of z over the forward pass; (c) agreement in routing; (d) z of the gradients.

    Args:
        axes: four Axes to draw on, in any shape; None for a figure of their own, which no window system and no state
            of pyplot takes part in. That figure also has, below (c), the load per expert or, of many layers, the share
            of tokens that are routed otherwise.
    Returns:
        The four Axes, one-dimensional.
    Raises:
        BackendUnavailable: matplotlib is not installed. ConfigError: not four axes.
    """
    if find_spec("matplotlib") is None:
        raise BackendUnavailable("a figure", "matplotlib is not installed", "pip install '.[compare]' in a clone")
    own = axes is None
    *found, below = _new_axes() if own else (*np.asarray(axes, dtype=object).ravel(), None)
    if len(found) != 4:
        raise ConfigError("a figure on axes of the caller", f"{len(found)} axes", "pass four")
    layers, drawn = report.layers, looks(report.layers, all_sides(report.layers))
    one = layers[0] if len(layers) == 1 else None
    if one is None:
        panels.depth_errors(found[0], layers, drawn)
    else:
        panels.stage_errors(found[0], one, drawn)
    panels.histogram(found[1], layers, drawn)
    panels.agreement(found[2], layers)
    panels.gradients(found[3], layers, drawn)
    if below is not None:
        panels.strays(below, layers, drawn) if one is None else panels.load(below, one, drawn)
    for letter, ax in zip("abcd", found, strict=True):
        ax.set_title(f"({letter}) {ax.get_title()}", loc="left", fontsize=11)
        ax.set_title("")
    sides = [handle(color=look.color, marker=look.marker, ls="", label=look.label) for look in drawn.values()]
    if own:
        _name(found[0].figure, report, sides)
    else:
        ruled = found[0].get_legend().legend_handles
        found[0].legend(handles=[*sides, *ruled], fontsize=SMALL, loc="upper left", ncols=2)
    return np.array(found, dtype=object)


def image(report: Report, kind: str = "png", dpi: int = _DPI) -> bytes:
    """The figure as a file's content: "png" (1200 by 900 pixels at the default), "svg" or "pdf".

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    return _image(plot(report)[0].figure, kind, dpi)


def save(report: Report, path: Any) -> None:
    """Write the figure to a file whose suffix names its format; it appears when it is whole.

    Raises:
        ConfigError: an unknown suffix, or the file cannot be written. BackendUnavailable: no matplotlib.
    """
    kind = figure_format(path)
    check_writable(path)
    write_whole(path, image(report, kind))


def _new_axes() -> list[Any]:
    """Five Axes on a figure that pyplot does not know."""
    from functools import partial

    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    # A notebook shows a figure by itself only once pyplot was imported; this shows it always.
    vars(figure)["_repr_png_"] = partial(_image, figure, "png", _DPI)
    # Rows of their own: the long names in the second would narrow the panel above them.
    rows = figure.add_gridspec(2, 1)
    above, below = rows[0].subgridspec(1, 2), rows[1].subgridspec(1, 2)
    routing = below[0].subgridspec(2, 1)
    places = (above[0], above[1], routing[0], below[1], routing[1])
    return [figure.add_subplot(place) for place in places]


def _name(figure: Any, report: Report, sides: list[Any]) -> None:
    """Title above and the legend of the sides below all panels."""
    layers = report.layers
    where = f"layer {layers[0].index}" if len(layers) == 1 else f"{len(layers)} layers"
    checkpoint = plain(report.checkpoint).rstrip("/").rsplit("/", 1)[-1]
    short = checkpoint if len(checkpoint) <= 50 else f"{checkpoint[:49]}…"
    title = f"{short}, {where}, {report.dtype}, {report.tokens} tokens: {MARKS[report.verdict]}"
    # parse_math: a "$" in a file's name is no formula.
    figure.suptitle(title, fontsize=13, parse_math=False)
    if sides:
        figure.legend(handles=sides, loc="outside lower center", ncols=min(len(sides), 5), frameon=False)


def _image(figure: Any, kind: str, dpi: int) -> bytes:
    out = BytesIO()
    figure.savefig(out, format=kind, dpi=dpi)
    return out.getvalue()
