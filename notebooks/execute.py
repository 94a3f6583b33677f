"""Run notebooks from a clean kernel and write them back with their outputs.

    python notebooks/execute.py                          all of them
    python notebooks/execute.py 03_compare_numerics      those that are named

A notebook runs in its own folder, as in Jupyter. It is written when all of its cells ran, and only then.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from moebius.compare.files import write_whole

FOLDER = Path(__file__).resolve().parent
_SECONDS = 300  # that one cell may take
# All that is kept of a notebook's metadata: the rest tells of one machine or one run.
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(path: Path) -> NotebookNode:
    """The notebook with the outputs of a run from its first cell to its last, in a kernel of its own.

    Raises:
        CellExecutionError: a cell raised.
    """
    notebook = without_outputs(nbformat.read(path, as_version=4))
    where = {"metadata": {"path": str(path.parent)}}
    options = {"timeout": _SECONDS, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources=where, **options).execute()
    return cleaned(notebook)


def without_outputs(notebook: NotebookNode) -> NotebookNode:
    """The notebook as it is before it runs."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what tells of the machine, the editor or the hour; cells are numbered by their place."""
    notebook.metadata = nbformat.from_dict(_METADATA)
    for place, cell in enumerate(notebook.cells, 1):
        cell.metadata, cell.id = nbformat.from_dict({}), f"{cell.cell_type}-{place:02}"
    return notebook


def as_text(notebook: NotebookNode) -> str:
    """The notebook as the text of its file."""
    return nbformat.writes(notebook, version=4) + "\n"


def main(names: list[str]) -> int:
    """Execute and write; returns the exit code: 0 done, 1 a cell raised, 2 no such notebook."""
    paths = [FOLDER / f"{Path(name).stem}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb"))
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        found = ", ".join(path.stem for path in sorted(FOLDER.glob("*.ipynb"))) or "none"
        print(f"asked: {', '.join(missing) or 'notebooks'}; found: {found}; do: name one of them", file=sys.stderr)
        return 2
    for path in paths:
        print(f"{path.name}: running", flush=True)
        try:
            notebook = executed(path)
        except CellExecutionError as error:
            print(f"{path.name}: not written\n{error}", file=sys.stderr)
            return 1
        write_whole(path, as_text(notebook))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
