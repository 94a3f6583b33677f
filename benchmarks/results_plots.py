"""The plots of RESULTS.md: one function a plot, from the figures of one suite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_all import FLAX_TRITON, TRITON
from benchmarks.gpu_few_bench import GRAPH
from benchmarks.gpu_growth import SERIES, series
from benchmarks.gpu_tables import GIB, PASSES, Figures, best, over

# (rows in the order in which they are drawn; the colour stays a row's own)
SHOWN = (
    TRITON,
    FLAX_TRITON,
    "grouped_mm",
    "te",
    "compiled",
    "te_layers_compiled",
    "transformers",
    "automodel",
    "liger",
    "jax_te_gathers",
)


def draw(figures: Mapping[str, Figures], folder: Path) -> dict[str, str]:
    """Write each plot whose suite was measured as SVG; file name -> what it shows."""
    import matplotlib

    # The same figures give the same file: no random ids, no date, text as text.
    with matplotlib.rc_context({"svg.hashsalt": "moebius", "svg.fonttype": "none", "font.size": 9}):
        folder.mkdir(parents=True, exist_ok=True)
        for name, suite in _drawable(figures).items():
            figure = _figure(*SIZES.get(name, (10.0, 4.0)))
            PLOTS[name][1](figure, figures[suite])
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return titles(figures)


def titles(suites: Iterable[str]) -> dict[str, str]:
    """File name -> what it shows, of the plots that these suites have."""
    return {f"{name}.svg": PLOTS[name][0] for name in _drawable(suites)}


def _drawable(suites: Iterable[str]) -> dict[str, str]:
    """A plot's name -> the suite that it begins with."""
    found = {name: next((suite for suite in suites if name.startswith(f"{suite}_")), None) for name in PLOTS}
    return {name: suite for name, suite in found.items() if suite is not None}


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _legend(figure: Any, axes: Any) -> None:
    """Above all panels, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=7)


def _bars(axes: Any, figures: Figures, value: Callable[[dict[str, Any], dict[str, Any]], float | None]) -> None:
    """A group of bars a shape, a bar a row; `value` takes a result and its shape."""
    rows = [row for row in SHOWN if row in figures["rows"]]
    width = 0.84 / max(len(rows), 1)
    for at, row in enumerate(rows):
        there = {r["shape"]: r for r in figures["results"] if r["row"] == row}
        heights = [value(there.get(key, {}), shape) or 0.0 for key, shape in figures["shapes"].items()]
        places = [n - 0.42 + (at + 0.5) * width for n in range(len(heights))]
        axes.bar(places, heights, width, label=figures["rows"][row], color=f"C{SHOWN.index(row)}")
    axes.set_xticks(range(len(figures["shapes"])), [shape["name"] for shape in figures["shapes"].values()])
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _speed(figure: Any, figures: Figures) -> None:
    axes = figure.subplots(2, 1, sharex=True)
    for ax, name, title in zip(axes, PASSES, ("forward", "forward+backward"), strict=True):
        _bars(ax, figures, lambda result, shape, name=name: result.get(name, {}).get("tflops"))
        floors = [shape["floors"][name]["kernel_tflops"] for shape in figures["shapes"].values()]
        for at, floor in enumerate(floors):
            ax.hlines(floor, at - 0.45, at + 0.45, colors="black", linestyles="dashed", linewidth=1)
        ax.set_ylabel(f"TFLOP/s, {title}")
    _legend(figure, axes[0])


def _share(figure: Any, figures: Figures) -> None:
    axes = figure.subplots(2, 1, sharex=True)
    for ax, name, title in zip(axes, PASSES, ("forward", "forward+backward"), strict=True):
        _bars(
            ax,
            figures,
            lambda result, shape, name=name: over(shape["floors"][name]["kernel_ms"], result.get(name, {}).get("ms")),
        )
        ax.set_ylim(0, 1)
        ax.set_ylabel(f"share of the floor, {title}")
    _legend(figure, axes[0])


def _memory(figure: Any, figures: Figures) -> None:
    def work(result: dict[str, Any], shape: dict[str, Any]) -> float | None:
        peak = result.get("memory", {}).get("both")
        return None if peak is None else (peak - shape["result_bytes"]) / GIB

    ax = figure.subplots()
    _bars(ax, figures, work)
    for at, shape in enumerate(figures["shapes"].values()):
        bar = shape["work_bytes"] / GIB
        ax.hlines(bar, at - 0.45, at + 0.45, colors="black", linestyles="dashed", linewidth=1)
    ax.set_ylabel("GiB above inputs and results, forward+backward")
    _legend(figure, ax)


def _few(figure: Any, figures: Figures) -> None:
    bases = list(dict.fromkeys(s["base"] for s in figures["shapes"].values() if "base" in s))
    axes = figure.subplots(2, len(bases), sharex=True, squeeze=False)
    for column, base in enumerate(bases):
        shapes = {key: s for key, s in figures["shapes"].items() if s.get("base") == base}
        for row, kind in enumerate(("", GRAPH)):
            ax = axes[row][column]
            for who, style in (("ours", "o-"), ("peer", "s--")):
                points = [(s["tokens"], best(figures["results"], key, who, f"both{kind}")) for key, s in shapes.items()]
                there = [(t, r[f"both{kind}"]["ms"]) for t, r in points if r is not None]
                ax.loglog(
                    *zip(*there, strict=True) if there else ([], []),
                    style,
                    label=f"best of {who}" if who == "ours" else "best peer",
                )
            ax.loglog(
                [s["tokens"] for s in shapes.values()],
                [s["few_ms"]["both"] for s in shapes.values()],
                "k:",
                label="limit",
            )
            ax.set_title(f"{next(iter(shapes.values()))['name']}, {'graph' if kind else 'eager'}", fontsize=8)
            ax.set_xticks([s["tokens"] for s in shapes.values()], [str(s["tokens"]) for s in shapes.values()])
            ax.minorticks_off()
            low, high = ax.get_ylim()
            places = [unit * 10**power for power in range(-3, 4) for unit in (1, 2, 5)]
            ticks = [place for place in places if low <= place <= high]
            ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            ax.grid(alpha=0.3)
        axes[1][column].set_xlabel("T")
    for row in axes:
        row[0].set_ylabel("ms, forward+backward")
    _legend(figure, axes[0][0])


def _growth(name: str) -> Callable[[Any, Figures], None]:
    """TFLOP/s against the size that varies in a series."""

    def plot(figure: Any, figures: Figures) -> None:
        heading, varies, _ = SERIES[name]
        points = series(figures, name)
        axes = figure.subplots(1, 2, sharey=True)
        for ax, one, title in zip(axes, PASSES, ("forward", "forward+backward"), strict=True):
            for row, words in figures["rows"].items():
                there = {r["shape"]: r[one]["tflops"] for r in figures["results"] if r["row"] == row and one in r}
                drawn = [(points[key][varies], there[key]) for key in points if key in there]
                if drawn:
                    ax.plot(*zip(*drawn, strict=True), "o-", label=words)
            floors = [(shape[varies], shape["floors"][one]["kernel_tflops"]) for shape in points.values()]
            ax.plot(*zip(*floors, strict=True), "k--", linewidth=1, label="floor of separate kernels")
            ax.set_xscale("log", base=2)
            ax.set_xticks([shape[varies] for shape in points.values()], [str(s[varies]) for s in points.values()])
            ax.set_xlabel("tokens T" if varies == "tokens" else "experts E")
            ax.set_title(f"{title}, {heading}", fontsize=9)
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
        axes[0].set_ylabel("TFLOP/s")
        _legend(figure, axes[0])

    return plot


# Name, which begins with its suite's -> what it shows, and what draws it.
PLOTS: dict[str, tuple[str, Callable[[Any, Figures], None]]] = {
    "gpu_all_speed": ("TFLOP/s by shape; dashed: the floor of separate kernels", _speed),
    "gpu_all_share": ("Share of the floor of separate kernels, by shape", _share),
    "gpu_all_memory": ("Memory above inputs and results, by shape; dashed: the bar", _memory),
    "gpu_few_both": ("Time of both passes against the number of tokens", _few),
    "gpu_growth_tokens": ("TFLOP/s against the number of tokens", _growth("tokens")),
    "gpu_growth_experts": ("TFLOP/s against the number of experts", _growth("experts")),
}
SIZES = {"gpu_all_speed": (11.0, 7.0), "gpu_all_share": (11.0, 7.0), "gpu_few_both": (12.0, 6.0)}
