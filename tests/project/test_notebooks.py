"""Every notebook runs from top to bottom, ends in assertions of its own, and is committed with what it printed."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
EXECUTE = "python notebooks/execute.py"

# /home/..., C:\..., file://...: of the machine that ran it. Not /, a/b or a web address.
_PATH = re.compile(r"(?<![\w.:/<-])/(?:[\w.+-]+/)+[\w.+-]*|\b[A-Za-z]:\\|file:/")
_TIME = re.compile(r"\d ?(?:s|ms|µs|seconds)\b")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# Jupyter's own warnings; those inside a notebook are seen by its kernel.
runs_a_kernel = pytest.mark.filterwarnings("default")


@cache
def _execute():
    spec = spec_from_file_location("notebooks_execute", FOLDER / "execute.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _read(path):
    return nbformat.read(path, as_version=4)


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _outputs(notebook):
    return [output for cell in _code(notebook) for output in cell.outputs]


def _texts(output):
    """Everything in words that an output shows."""
    data = output.get("data", {})
    shown = [value for kind, value in data.items() if kind.startswith("text/") or kind.endswith("xml")]
    return [output.get("text", ""), *shown]


def _imports(source):
    """Names of the packages that a cell imports, in order."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.partition(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, node.module.partition(".")[0]))
    return [name for _, name in sorted(found, key=lambda pair: pair[0])]


def _kinds(notebook):
    """What each cell shows, without its values."""
    return [
        [(output.output_type, output.get("name"), *sorted(output.get("data", {}))) for output in cell.outputs]
        for cell in _code(notebook)
    ]


def test_there_are_three_notebooks() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03"]


@runs_a_kernel
@each
def test_a_notebook_runs_from_a_clean_kernel_and_shows_what_is_committed(path) -> None:
    assert _kinds(_execute().executed(path)) == _kinds(_read(path)), f"run {EXECUTE} {path.stem}"


@each
def test_a_notebook_is_committed_as_the_script_writes_it(path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == _execute().as_text(_execute().cleaned(nbformat.reads(text, as_version=4))), f"run {EXECUTE}"


@each
def test_a_notebook_is_committed_with_the_outputs_of_one_run(path) -> None:
    cells = _code(_read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), f"run {EXECUTE}"
    assert any("image/png" in output.get("data", {}) for output in _outputs(_read(path)))


@each
def test_a_notebook_was_committed_without_error_or_warning(path) -> None:
    kinds = {(output.output_type, output.get("name")) for output in _outputs(_read(path))}
    assert ("error", None) not in kinds
    assert ("stream", "stderr") not in kinds


@each
def test_a_notebook_shows_neither_a_path_of_a_machine_nor_a_time(path) -> None:
    for text in (text for output in _outputs(_read(path)) for text in _texts(output)):
        assert not _PATH.search(text), _PATH.search(text)
        assert not _TIME.search(text), _TIME.search(text)


@each
def test_a_notebook_ends_in_assertions(path) -> None:
    last = ast.parse(_code(_read(path))[-1].source)
    asserted = [node.test for node in ast.walk(last) if isinstance(node, ast.Assert)]
    assert len(asserted) >= 5
    assert not [node for node in asserted if isinstance(node, ast.Constant)]


@each
def test_a_notebook_sets_the_environment_before_it_imports_a_framework(path) -> None:
    statements = ast.parse(_code(_read(path))[0].source).body
    texts = [ast.unparse(node) for node in statements]
    imports = [i for i, node in enumerate(statements) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert texts[imports[0]] == "import os"
    for name in ("HF_HUB_OFFLINE", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        assert any(text.startswith(f"os.environ['{name}'] = ") for text in texts[: imports[1]])


@each
def test_a_notebook_imports_torch_before_jax(path) -> None:
    order = [name for cell in _code(_read(path)) for name in _imports(cell.source)]
    assert "jax" not in order or order.index("torch") < order.index("jax")


@each
def test_a_notebook_that_shows_the_model_of_the_first_shows_the_same(path) -> None:
    first = next(cell.source for cell in _code(_read(NOTEBOOKS[0])) if "class Block(" in cell.source)
    own = [cell.source for cell in _code(_read(path)) if "class Block(" in cell.source]
    assert all(source[source.index("class Block(") :] == first[first.index("class Block(") :] for source in own)


def test_execute_of_an_unknown_name_says_which_there_are(capsys) -> None:
    assert _execute().main(["04_unwritten"]) == 2
    message = capsys.readouterr().err
    assert "04_unwritten" in message and NOTEBOOKS[0].stem in message


@runs_a_kernel
def test_execute_of_a_notebook_that_raises_leaves_it_as_it_was(tmp_path, monkeypatch) -> None:
    path = tmp_path / "raises.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    monkeypatch.setattr(_execute(), "FOLDER", tmp_path)
    assert _execute().main([]) == 1
    assert path.read_bytes() == before
