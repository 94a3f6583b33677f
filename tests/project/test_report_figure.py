"""The figure of a report: labelled, whole, free of pyplot; and what theory it draws."""

from __future__ import annotations

import re
import subprocess
import sys
from base64 import b64decode
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reports

from moebius.compare import panels, plot
from moebius.compare import verdict as v
from moebius.compare.page import page
from moebius.core.errors import BackendUnavailable, ConfigError

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
ALL = {
    "passing": reports.passing,
    "failing": reports.failing,
    "four sides": reports.of_four_sides,
    "six layers": reports.of_six_layers,
}


@pytest.fixture(scope="module", params=ALL)
def drawn(request):
    """A report and its axes, laid out."""
    report = ALL[request.param]()
    axes = plot.plot(report)
    axes[0].figure.draw_without_rendering()
    return report, axes[0].figure.axes


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# --------------------------------------------------------------------------------------------------------- every report
def test_plot_axes_are_named_and_explained(drawn):
    _, axes = drawn
    assert [ax.get_title(loc="left")[:3] for ax in axes[:4]] == ["(a)", "(b)", "(c)", "(d)"]
    assert all(ax.get_xlabel() for ax in axes[1:])
    assert all(axes[i].get_ylabel() for i in (0, 1, 3, 4))
    assert all(legend(ax) for ax in axes[:4])
    assert "‖found − exact‖₂ / ‖exact‖₂" in axes[0].get_ylabel()


def test_plot_title_and_legend_name_checkpoint_verdict_and_every_side(drawn):
    report, axes = drawn
    figure = axes[0].figure
    title = figure.get_suptitle()
    assert "gpt-oss-20b" in title and title.endswith({"pass": "pass", "fail": "FAIL"}[report.verdict])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [name.split("*")[0] for name in names] == list(report.layers[0].sides)
    assert [name.endswith("(information only)") for name in names] == [
        s == "transformers" for s in report.layers[0].sides
    ]


def test_plot_panels_do_not_overlap(drawn):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    _, axes = drawn
    figure = axes[0].figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [ax.get_tightbbox(renderer) for ax in axes]
    for i, one in enumerate(boxes):
        assert one.x0 >= 0 and one.y0 >= 0 and one.x1 <= figure.bbox.x1 and one.y1 <= figure.bbox.y1
        for other in boxes[i + 1 :]:
            width = min(one.x1, other.x1) - max(one.x0, other.x0)
            height = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert width <= 1 or height <= 1


def test_image_is_1200_by_900_pixels():
    png = plot.image(reports.passing())
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(png[16:20]), int.from_bytes(png[20:24])) == (1200, 900)


# -------------------------------------------------------------------------------------------------------- what is where
def test_plot_has_every_stage_and_gradient():
    axes = plot.plot(reports.passing())
    assert [tick.get_text() for tick in axes[0].get_xticklabels()] == list(reports.STAGES)
    rows = [name.removeprefix("experts.") for name in (*reports.GRADIENTS, *reports.PARAMETERS)]
    assert [tick.get_text() for tick in axes[3].get_yticklabels()] == rows


def test_plot_stage_errors_are_those_of_the_report():
    report = reports.passing()
    axes = plot.plot(report)
    due = [row.whole["flax"].relative for row in report.layers[0].rows[: len(reports.STAGES)]]
    found = [line.get_ydata() for line in axes[0].lines if line.get_marker() == "s" and len(line.get_xdata()) > 1]
    # The exact stage lies on the lower edge and not among them.
    assert np.array_equal(found[0], [value for value in due if value > 0])


def test_plot_draws_what_has_no_place_on_the_axis():
    found = reports.broken(reports.layer(), "up", "torch", relative=float("inf"))
    [stages, *_] = plot.plot(reports.report(found))
    assert {"on the edge: exactly zero", "not finite"} <= set(legend(stages))
    crosses = [line for line in stages.lines if line.get_marker() == "X"]
    assert len(crosses) == 1 and list(crosses[0].get_ydata()) == [1.0]
    assert "not finite" in legend(plot.plot(reports.failing())[3])


def test_plot_of_many_layers_shows_error_against_depth():
    axes = plot.plot(reports.of_six_layers())[0].figure.axes
    assert axes[0].get_xlabel() == axes[4].get_xlabel() == "layer"
    assert [len(line.get_xdata()) for line in axes[0].lines if line.get_marker() == "s"] == [6]


def test_plot_marks_the_loads_that_differ_from_the_reference():
    report = reports.passing()
    load = plot.plot(report)[0].figure.axes[4]
    assert tuple(bar.get_height() for bar in load.patches) == report.layers[0].load["reference"]
    # Of the first two experts: one token went to the one and not to the other.
    [marks] = load.lines
    assert list(marks.get_ydata()) == list(report.layers[0].load["flax"][:2])


def test_plot_histogram_leaves_out_stages_without_rounding():
    """Their z are all zero, and would pass for elements that were rounded well."""
    report = reports.passing()
    everywhere = [row for row in report.layers[0].rows if row.name not in reports.EXACT]
    without = replace(report, layers=(replace(report.layers[0], rows=tuple(everywhere)),))
    ours, theirs = (plot.plot(r)[1].patches[0].get_data().values for r in (report, without))
    assert np.array_equal(ours, theirs) and np.isclose(ours.sum(), 1.0)


def test_plot_of_a_layer_without_rows_is_drawn():
    bare = replace(reports.layer(), rows=(), routing={}, load={})
    for layers in ((bare,), (bare, bare), ()):
        assert plot.plot(reports.report(*layers))[0].figure.draw_without_rendering() is None


# --------------------------------------------------------------------------------------------------------------- theory
def test_one_rounding_is_what_rounding_does():
    """Values of log-uniform mantissa, rounded to float16."""
    exact = 2.0 ** np.random.default_rng(0).uniform(0, 1, 200_000)
    z = np.abs(exact.astype(np.float16) - exact) / (2.0**-11 * exact / np.sqrt(3))
    edges = np.linspace(0.0, 2.0, 21)
    assert np.allclose(np.mean(z[:, None] <= edges, axis=0), panels.one_rounding(edges), atol=0.005)


@pytest.mark.parametrize("theory", [panels.one_rounding, panels.many_roundings])
def test_theory_has_the_root_mean_square_of_one_rounding(theory):
    edges = np.linspace(0.0, 12.0, 12001)
    share, middle = np.diff(theory(edges)), (edges[1:] + edges[:-1]) / 2
    assert np.isclose(share.sum(), 1.0) and np.isclose(np.sqrt(np.sum(share * middle**2)), v.THEORY, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- where it is drawn
def test_plot_draws_on_axes_of_the_caller():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9))
    given = figure.subplots(2, 2)
    axes = plot.plot(reports.passing(), axes=given)
    assert axes.shape == (4,) and all(ours is theirs for ours, theirs in zip(axes, given.ravel(), strict=True))
    assert legend(axes[0])[:2] == ["torch", "flax"] and figure.get_suptitle() == ""


def test_plot_on_three_axes_is_refused():
    from matplotlib.figure import Figure

    with pytest.raises(ConfigError, match="pass four"):
        plot.plot(reports.passing(), axes=Figure().subplots(1, 3))


def test_plot_shows_itself_in_a_notebook():
    figure = plot.plot(reports.passing())[0].figure
    assert figure._repr_png_()[:4] == b"\x89PNG"


def test_plot_leaves_pyplot_alone():
    code = (
        "import sys, reports; from moebius.compare import plot; assert 'matplotlib' not in sys.modules\n"
        "plot.image(reports.passing()); assert 'matplotlib.pyplot' not in sys.modules"
    )
    paths = f"import sys; sys.path[:0] = {[str(ROOT / 'tests' / 'support'), str(ROOT / 'src')]!r}\n"
    done = subprocess.run([sys.executable, "-c", paths + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_plot_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendUnavailable, match=re.escape("pip install '.[compare]'")):
        plot.plot(reports.passing())


def test_plot_takes_a_name_that_looks_like_a_formula():
    assert plot.image(replace(reports.passing(), checkpoint="models/$\\frac{$"))


# ---------------------------------------------------------------------------------------------------------------- saved
@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".SVG", b"<?xml"), (".pdf", b"%PDF")])
def test_save_writes_the_format_that_the_suffix_names(tmp_path, suffix, start):
    plot.save(reports.passing(), tmp_path / f"figure{suffix}")
    assert (tmp_path / f"figure{suffix}").read_bytes().startswith(start)


def test_page_holds_the_whole_figure():
    [figure] = re.findall(r'base64,([^"]*)', page(reports.passing()))
    content = b64decode(figure, validate=True)
    assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize("name", ["figure.jpg", "figure"])
def test_save_of_another_suffix_is_refused_with_the_list(tmp_path, name):
    with pytest.raises(ConfigError, match=r"\.png or \.svg or \.pdf"):
        plot.save(reports.passing(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
