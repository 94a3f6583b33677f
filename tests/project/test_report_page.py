"""A report as a page of HTML: well-formed, self-contained, escaped, complete."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import reports

from moebius.compare import sheet
from moebius.compare.page import fragment, page

ALL = {
    "passing": reports.passing,
    "failing": reports.failing,
    "four sides": reports.of_four_sides,
    "six layers": reports.of_six_layers,
}
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Holds that every tag is closed in turn; keeps tags, attributes and text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open += [tag] if tag not in VOID else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(autouse=True)
def instant_figure(monkeypatch):
    """Drawing is slow, and tested where figures are."""
    monkeypatch.setattr("moebius.compare.page.image", lambda *_: b"\x89PNG\r\n\x1a\n")


@pytest.fixture(params=ALL)
def shown(request):
    report = ALL[request.param]()
    html = page(report)
    return report, html, Reader(html)


def test_page_has_the_figure_and_loads_nothing(shown):
    _, html, reader = shown
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link", re.sub(r'base64,[^"]*', "", html))
    attributes = dict(reader.attributes)
    assert attributes["src"].startswith("data:image/png;base64,iVBOR") and attributes["alt"]


def test_page_shows_every_row_of_every_layer(shown):
    report, html, _ = shown
    for layer in report.layers:
        for row in layer.rows:
            assert html.count(f">{sheet.row_name(row.name)}</td>") == len(report.layers)


def test_page_shows_every_fault_the_verdict_and_versions(shown):
    report, _, reader = shown
    for layer in report.layers:
        for fault in layer.faults:
            assert sheet.fault_text(fault) in reader.text
    assert reader.text.count(sheet.MARKS[report.verdict]) and "torch 2.13.0+cpu" in reader.text
    assert "one correct rounding gives 0.74" in reader.text


def test_page_shows_the_worst_elements(shown):
    report, html, _ = shown
    assert html.count("-1.2345678e-05") == sum(len(layer.worst) for layer in report.layers)


def test_page_table_rows_have_as_many_cells_as_their_head(shown):
    _, html, _ = shown
    for table in re.findall(r"<table>.*?</table>", html, re.S):
        widths = set()
        for row in re.findall(r"<tr>.*?</tr>", table, re.S):
            spans = [int(n) for n in re.findall(r'colspan="(\d+)"', row)]
            widths.add(sum(spans) + len(re.findall(r"<t[hd]\b(?![^>]*colspan)", row)))
        assert len(widths) == 1


def test_page_escapes_what_it_is_given():
    found = reports.layer()
    hostile = "<script>alert('1')</script>&amp;\"\x00"
    report = reports.report(
        replace(found, notes=(hostile,)),
        checkpoint=hostile,
        text=hostile,
        versions={hostile: hostile},
        settings=(hostile,),
        devices={hostile: hostile},
    )
    for html in (page(report), fragment(report)):
        reader = Reader(html)
        assert "script" not in reader.tags and "\x00" not in html
        assert "<script>alert('1')</script>&amp;\"" in reader.text


def test_page_colours_verdicts():
    html = page(reports.failing())
    assert '<td class="first fail">3e+04</td>' in html and '<b class="warn">warn</b>' in html
    assert 'class="first fail"' not in page(reports.passing())


def test_page_takes_many_layers_folded():
    report = reports.of_six_layers()
    assert Reader(page(report)).tags.count("details") == len(report.layers)
    assert Reader(page(reports.passing())).tags.count("details") == 0


def test_page_of_a_layer_without_rows_says_that_nothing_was_compared():
    bare = replace(reports.layer(), rows=(), routing={}, load={}, worst=())
    assert "nothing was compared" in Reader(page(reports.report(bare))).text


@pytest.mark.parametrize("name", ALL)
def test_fragment_has_verdict_and_tables_without_the_figure(name):
    report = ALL[name]()
    html = fragment(report)
    reader = Reader(html)
    assert "img" not in reader.tags and "html" not in reader.tags and "table" in reader.tags
    assert reader.text.startswith(f"{report.checkpoint} {sheet.MARKS[report.verdict]}")
    assert all(sheet.fault_text(fault) in reader.text for layer in report.layers for fault in layer.faults)


def test_fragment_needs_no_matplotlib(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "<table>" in fragment(reports.passing())
