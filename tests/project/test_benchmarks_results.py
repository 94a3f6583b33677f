"""The document of measured figures: what is kept, how runs are joined, and that RESULTS.md is what they give."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks is no part of the package

pytest.importorskip("matplotlib")

from benchmarks import gpu_few, results, results_files, results_plots

HERE = Path(results.__file__).parent


def _run(tmp_path: Path, name: str, tokens: int, shape: str = "qwen3") -> Path:
    path = tmp_path / f"{name}.json"
    given = ["--dry", "--shapes", shape, "--rounds", "2", "--tokens", str(tokens), "--json", str(path)]
    assert gpu_few.main([*given, "--only", "composite", "grouped_mm"]) == 0
    return path


def _titles(tables: str) -> list[tuple[str, int]]:
    """Of each line its title and how many cells hold a figure."""
    lines = [line.split(" | ") for line in tables.splitlines()]
    return [(title, sum(any(c.isdigit() for c in cell) for cell in cells)) for title, *cells in lines]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One suite's figures in two parts."""
    folder = tmp_path_factory.mktemp("runs")
    return [_run(folder, "gpu_few_1", 1), _run(folder, "gpu_few_2", 4)]


def test_results_md_is_what_the_kept_figures_give() -> None:
    kept = results_files.parts()
    drawn = results_plots.titles(kept)
    assert (HERE / "RESULTS.md").read_text() == results.document(kept, drawn)
    assert all((HERE / "plots" / name).exists() for name in drawn)


def test_store_keeps_what_tables_show(parts: list[Path], tmp_path: Path) -> None:
    kept = results_files.store(parts[0], results.TITLES, tmp_path)
    before, after = json.loads(parts[0].read_text()), json.loads(kept.read_text())
    assert kept.name == "gpu_few_1.json" and kept.stat().st_size < parts[0].stat().st_size
    assert _titles(gpu_few.tables(after)) == _titles(gpu_few.tables(before))
    assert results_files.small(after) == after and str(parts[0].parent) not in kept.read_text()


def test_small_drops_tracebacks_and_digits() -> None:
    found = results_files.small(
        {"ms": 1.23456789, "n": 123456789, "traceback": "long", "in": [{"low_ms": 1.0, "a": "b"}]}
    )
    assert found == {"ms": 1.2346, "n": 123456789, "in": [{"a": "b"}]}


def test_document_of_a_suite_in_parts_is_one_set_of_tables(parts: list[Path], tmp_path: Path) -> None:
    for path in parts:
        results_files.store(path, results.TITLES, tmp_path)
    kept = results_files.parts(tmp_path)
    found = results.document(kept, {"gpu_few_both.svg": "what it shows"})
    assert "| Qwen3-30B-A3B, eager, us: forward / forward+backward | T = 1 | T = 4 |" in found
    assert found.count("| Qwen3-30B-A3B, eager") == 1
    assert found.count("`python -m benchmarks gpu_few --dry") == 2 and "--json" not in found
    assert "![what it shows](plots/gpu_few_both.svg)" in found


def test_document_names_the_shapes_that_no_row_was_timed_for_and_the_rows_not_asked_for(
    parts: list[Path], tmp_path: Path
) -> None:
    figures = json.loads(parts[0].read_text())
    (key,) = figures["shapes"]
    figures["shapes"]["later-1"] = figures["shapes"][key]
    figures["results"] += [{**r, "shape": "later-1", "reason": "TimeoutError: over"} for r in figures["results"]]
    (tmp_path / "gpu_few_1.json").write_text(json.dumps(figures))
    kept = results_files.parts(tmp_path)
    assert [*kept["gpu_few"][0]["shapes"]] == [key]
    found = results.document(kept, {})
    assert "Shapes not reached in the run's time: later-1." in found and "TimeoutError" not in found
    assert "Rows not asked for: moebius triton; PyTorch composite, compiled;" in found


def test_store_of_a_suite_without_a_place_is_refused(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds figures of gpu_few, which has no place in the document"):
        results_files.store(parts[0], {"gpu_all"}, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_run_shown_apart_has_tables_of_its_own(parts: list[Path], tmp_path: Path) -> None:
    for name in ("gpu_few", "gpu_few_apart_1"):
        (tmp_path / f"{name}.json").write_text(parts[0].read_text())
    kept = results_files.parts(tmp_path)
    assert [*kept] == ["gpu_few", "gpu_few_apart"] and [len(runs) for runs in kept.values()] == [1, 1]


def test_store_under_a_name_that_is_no_part_is_refused(parts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "few.json").write_text(parts[0].read_text())
    with pytest.raises(ValueError, match=r"holds figures of gpu_few: name it gpu_few.json, or gpu_few_1.json"):
        results_files.store(tmp_path / "few.json", results.TITLES, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_parts_with_a_shape_twice_are_refused(parts: list[Path], tmp_path: Path) -> None:
    results_files.store(parts[0], results.TITLES, tmp_path)
    (tmp_path / "gpu_few_9.json").write_text((tmp_path / "gpu_few_1.json").read_text())
    with pytest.raises(ValueError, match=r"holds qwen3-1 of gpu_few, as another file does: remove one"):
        results_files.parts(tmp_path)


def test_draw_writes_the_plots_of_what_was_measured(parts: list[Path], tmp_path: Path) -> None:
    figures = {"gpu_few": results_files.joined([json.loads(path.read_text()) for path in parts])}
    drawn = results_plots.draw(figures, tmp_path)
    assert drawn == results_plots.titles(figures) and set(drawn) == {"gpu_few_both.svg"}
    first = (tmp_path / "gpu_few_both.svg").read_text()
    assert "Qwen3-30B-A3B, eager" in first and "best peer" in first
    results_plots.draw(figures, tmp_path)
    assert (tmp_path / "gpu_few_both.svg").read_text() == first


def test_main_without_files_writes_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "HERE", tmp_path)
    monkeypatch.setattr(results_files, "FOLDER", tmp_path / "figures")
    assert results.main([str(parts[0])]) == 0
    assert "kept " in capsys.readouterr().out
    written = (tmp_path / "RESULTS.md").read_text()
    assert results.main([]) == 0
    assert (tmp_path / "RESULTS.md").read_text() == written and "## Few tokens" in written


def test_document_of_nothing_says_so() -> None:
    found: Any = results.document({}, {})
    assert found.rstrip().endswith("Nothing is kept yet.")
