"""What the documents say is there, is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = {
    name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
}
ROWS = [line for line in (ROOT / "docs/deviations.md").read_text().splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("row", [row for row in ROWS if not row.startswith("| case")])
def test_every_deviation_names_a_test_that_exists(row: str) -> None:
    (name,) = re.findall(r"`(test_\w+)`", row)
    assert name in TESTS


def test_documents_link_to_files_that_exist() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
