"""How a report is shown as text: nothing wider than 100 columns, nothing left out, every number whole."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
import reports

from moebius.compare import sheet
from moebius.compare import verdict as v
from moebius.compare.table import table, worst_table
from moebius.core.errors import BackendUnavailable

ALL = {
    "passing": reports.passing,
    "failing": reports.failing,
    "four sides": reports.of_four_sides,
    "six layers": reports.of_six_layers,
}


@pytest.fixture(params=ALL)
def report(request):
    return ALL[request.param]()


def words(text):
    """The text with its lines joined, as if nothing had been wrapped."""
    return " ".join(text.split())


def row_of(text, name):
    """The lines that start with a name."""
    return [line for line in text.splitlines() if re.match(rf"{re.escape(name)}  ", line)]


# --------------------------------------------------------------------------------------------------------- every report
def test_table_of_any_report_is_at_most_100_columns_wide(report):
    lines = table(report).splitlines()
    assert max(map(len, lines)) <= 100 and not any("…" in line for line in lines)


def test_table_in_colour_says_the_same(report):
    coloured = table(report, color=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured).split() == table(report).split()


def test_table_shows_every_fault_and_the_verdict(report):
    text = words(table(report))
    for layer in report.layers:
        for fault in layer.faults:
            assert words(sheet.fault_text(fault)) in text
    assert f"verdict {sheet.MARKS[report.verdict]}: " in text


def test_table_explains_z_with_its_limits(report):
    text = words(table(report))
    assert "one correct rounding gives 0.74; fails above z_rms 2 or z_max 8, warns above z_rms 1" in text


def test_table_of_a_report_with_hostile_names_prints_them_as_they_are():
    found = replace(reports.passing(), checkpoint="a[red]b[/] \x1b[31m" + "c" * 200, text="[bold]\n")
    text = table(found)
    assert "a[red]b[/]" in text and "[bold]" in text and "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100 and "c" * 200 in "".join(text.split())


def test_table_without_rich_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(BackendUnavailable, match=re.escape("pip install '.[compare]'")):
        table(reports.passing())


# ------------------------------------------------------------------------------------------------------------ one layer
def test_table_of_one_layer_has_a_row_per_stage_with_all_its_numbers():
    found = reports.passing()
    text = table(found)
    for row in found.layers[0].rows:
        [line] = row_of(text, sheet.row_name(row.name))
        numbers = line.removeprefix(sheet.row_name(row.name)).split()
        due = []
        for side in ("torch", "flax"):
            whole = row.whole[side]
            due += [sheet.number(whole.z_rms), sheet.number(whole.z_max), sheet.number(row.step[side].z_rms)]
        info, pair = row.whole.get("transformers"), row.whole["torch~flax"]
        due += [sheet.number(info.z_rms), sheet.number(info.z_max)] if info else ["-", "-"]
        due += [sheet.number(pair.z_rms), sheet.share(pair.equal), row.verdict]
        assert numbers == due


def test_table_marks_rows_by_their_verdict():
    found = reports.failing()
    text = table(found)
    marks = {row.name: row_of(text, sheet.row_name(row.name))[0].split()[-1] for row in found.layers[0].rows}
    assert marks == {row.name: sheet.MARKS[row.verdict] for row in found.layers[0].rows}
    assert {"pass", "warn", "FAIL"} == set(marks.values())


def test_table_shows_numbers_that_are_not_finite_and_bad_elements():
    text = table(reports.failing())
    assert " inf " in row_of(text, "rows")[0]
    assert row_of(text, "gradient of gate.weight")[0].split().count("bad") == 2
    assert "3e+04 8e+05" in row_of(text, "down")[0]


def test_table_marks_a_side_that_does_not_count_and_says_why():
    text = table(reports.passing())
    assert "transformers*" in text and "torch*" not in text
    assert "* transformers: information only, no part of the verdict" in words(text)
    assert "information only" not in table(reports.of_four_sides())


def test_table_routing_has_a_line_per_column():
    text = table(reports.failing())
    assert row_of(text, "torch")[0].split() == ["torch", "256", "255", "1", "0", "pass"]
    assert row_of(text, "flax")[0].split() == ["flax", "256", "200", "3", "53", "FAIL"]
    assert row_of(text, "transformers*")[0].split() == ["transformers*", "256", "255", "1", "0"]


def test_table_of_many_columns_is_split_and_keeps_every_column():
    found = reports.of_four_sides()
    layer, text = found.layers[0], table(found)
    lines = row_of(text, "gradient of gate_and_up_projs")
    assert len(lines) > 1
    row = layer.row("grad.experts.gate_and_up_projs")
    # Of the last words of each line: the verdict.
    numbers = [word for line in lines for word in line.removeprefix("gradient of gate_and_up_projs").split()[:-1]]
    due = []
    for column in layer.columns:
        score = row.whole[column]
        if column in layer.sides:
            due += [sheet.number(score.z_rms), sheet.number(score.z_max), sheet.number(row.step[column].z_rms)]
        else:
            due += [sheet.number(score.z_rms), sheet.share(score.equal)]
    assert numbers == due


def test_table_says_how_much_was_clamped_and_what_to_know():
    text = words(table(reports.passing()))
    assert "clamped 4.0% of the pre-activations, by the limit 7; 2 within" in text
    assert "note transformers computes the gate in float32." in text
    bare = replace(reports.layer(), clamped=None, notes=())
    assert "clamped" not in table(reports.report(bare))


def test_table_of_a_layer_without_rows_says_that_nothing_was_compared():
    bare = replace(reports.layer(), rows=(), routing={}, load={})
    assert "nothing was compared" in table(reports.report(bare))


# ---------------------------------------------------------------------------------------------------------- many layers
def test_table_of_many_layers_has_a_line_per_layer():
    found = reports.of_six_layers()
    text = table(found)
    for layer in found.layers:
        line = re.search(rf"^ *{layer.index} (pass|warn|FAIL)  .*$", text, re.M)
        assert line and line[1] == sheet.MARKS[layer.verdict]
        for side in layer.sides:
            assert f"{layer.row('output').whole[side].relative:.1e}" in line[0]


def test_table_of_many_layers_shows_the_worst_of_each_pass_and_the_first_fault():
    found = reports.of_six_layers()
    [line] = [line for line in table(found).splitlines() if re.match(r" *3 FAIL  .*100%", line)]
    assert " 4.00 " in line
    assert "up, flax: fail, z_rms 4" in words(table(found))
    assert "layer 3: gradient of x, torch: fail" in words(table(found))


def test_table_of_many_layers_names_the_layers_of_a_note():
    found = reports.of_six_layers()
    layers = [replace(layer, notes=("odd",) if layer.index in (1, 2, 4) else ()) for layer in found.layers]
    assert "note layer 1-2, 4: odd" in words(table(replace(found, layers=tuple(layers))))


# ------------------------------------------------------------------------------------------------------------- elements
def test_worst_table_shows_every_element_whole():
    elements = reports.failing().layers[0].worst
    text = worst_table(elements)
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("-1.2345678e-05 -1.23456e-05") == len(elements) == text.count("2.1e-12")
    for part in ("(1012, 95)   253      7", "(31, 127, 191)     -      7", "gate_and_up_projs"):
        assert part in text


def test_worst_table_of_no_elements_is_a_head_alone():
    assert worst_table([]).split()[:3] == ["element", "of", "z"]


# -------------------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize(
    "value", [0.0, 1e-9, 0.994, 0.996, 9.994, 9.996, 99.94, 99.96, 998.9, 999.6, 1e99, float("nan")]
)
def test_number_takes_at_most_five_characters(value):
    assert len(sheet.number(value)) <= 5


@pytest.mark.parametrize(("value", "text"), [(0.9999999, "99.9%"), (1.0, "100%"), (1e-9, "<0.1%"), (0.0, "0%")])
def test_share_rounds_neither_to_all_nor_to_none(value, text):
    assert sheet.share(value) == text


def test_limits_that_one_number_breaks_blame_that_number_alone():
    layer = reports.broken(reports.layer(), "up", "flax", z_max=9.0)
    [block] = [block for block in sheet.stage_sheet(layer).blocks if block.head == "flax"]
    cells = block.rows[[row.name for row in layer.rows].index("up")]
    assert [cell.verdict for cell in cells] == [v.PASS, v.FAIL, v.PASS]


def test_table_inside_a_jupyter_kernel_is_text_as_elsewhere(monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert "verdict" in table(reports.passing())


def test_worst_table_of_several_layers_names_the_layer_of_each_element():
    element = reports.failing().layers[0].worst[0]
    text = worst_table([replace(element, layer=3), replace(element, layer=7)])
    assert "layer 3, " in text and "layer 7, " in text
    assert "layer" not in worst_table([replace(element, layer=3)])
