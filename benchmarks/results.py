"""The measured figures as one document: RESULTS.md and its plots, made anew from the JSON files that are kept.

`python -m benchmarks results FILE.json ...` keeps the figures of these runs under benchmarks/figures/, small and under
the files' own names, then writes RESULTS.md and plots/ from everything there. A suite that ran in several files,
each with other shapes, is one set of tables. Without files it only writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from benchmarks import results_files, results_plots
from benchmarks.gpu_problem import SHAPES
from benchmarks.gpu_tables import Figures

HERE = Path(__file__).parent
# In the order of the document: part -> title. A part is a suite, or a run of it that is shown apart.
TITLES = {
    "gpu_all": "Both frontends and their peers",
    "gpu_all_beside_sonic": "Beside SonicMoE, which needs minutes to compile",
    "gpu_few": "Few tokens",
    "gpu_gptoss": "GPT-OSS' own layer",
    "gpu_growth": "Growth",
    "gpu_portable": "Portable kernels",
}
HEAD = """# Results on a GPU

Written by `python -m benchmarks results` from the figures in `figures/`, and by nothing else.
[README.md](README.md) says what a row is, how it is timed and checked, and what the limits are.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep what was named, then write the document and its plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks results", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="figures of runs, as --json wrote them")
    for path in parser.parse_args(arguments).files:
        print(f"kept {results_files.store(path, TITLES).name}")
    kept = results_files.parts()
    drawn = results_plots.draw({part: results_files.joined(runs) for part, runs in kept.items()}, HERE / "plots")
    (HERE / "RESULTS.md").write_text(document(kept, drawn))
    print(f"wrote benchmarks/RESULTS.md and {len(drawn)} plots")
    return 0


def document(kept: Mapping[str, Sequence[Figures]], drawn: Mapping[str, str]) -> str:
    """RESULTS.md.

    Args:
        kept: part -> its runs. drawn: a plot's file name -> its title, as results_plots.draw returns them.
    """
    written = [HEAD.rstrip()]
    for part, title in TITLES.items():
        if part in kept:
            figures = results_files.joined(kept[part])
            tables = import_module(f"benchmarks.{figures['options']['suite']}").tables(figures)
            plots = [f"![{words}](plots/{name})" for name, words in drawn.items() if name.startswith(f"{part}_")]
            written += [f"## {title}", *(_run(run) for run in kept[part]), tables, *plots]
    if len(written) == 1:
        written.append("Nothing is kept yet.")
    return "\n\n".join(written) + "\n"


def _run(figures: Figures) -> str:
    """The machine, the versions, the ceilings and the command of a run."""
    machine = ", ".join(f"{name} {version}" for name, version in figures["machine"].items())
    ceilings = "; ".join(
        f"{c['flops'] / 1e12:.0f} TFLOP/s and {c['bytes'] / 1e9:.0f} GB/s" for c in figures["ceilings"]
    )
    options = figures["options"]
    rounds = f", {options['rounds']} rounds of {options['rep']:g} ms"
    seconds = f" {figures['seconds']:.0f} s in all." if "seconds" in figures else ""
    said = f"`{options['command']}`\n\n{machine}{rounds}. Ceilings, before and after: {ceilings}.{seconds}"
    return " ".join([said, *_left_out(figures)])


def _left_out(figures: Figures) -> Iterator[str]:
    """Which rows were not asked for, and which shapes the run's time did not suffice for."""
    rows = import_module(f"benchmarks.{figures['options']['suite']}").ROWS
    absent = [row.title for name, row in rows.items() if name not in figures["rows"]]
    if absent:
        yield f"Rows not asked for: {'; '.join(absent)}."
    if set(figures["shapes"]) <= set(SHAPES):
        known = {*figures["shapes"], *figures["not_reached"]}
        elsewhere = [key for key in figures["options"]["shapes"] or SHAPES if key not in known]
        if elsewhere:
            yield f"Shapes of this run that are not kept: {', '.join(elsewhere)}."
    if figures["not_reached"]:
        yield f"Shapes not reached in the run's time: {', '.join(figures['not_reached'])}."


if __name__ == "__main__":
    raise SystemExit(main())
