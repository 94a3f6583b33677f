"""The `moebius compare` command as a test calls it, and checkpoints that a test may damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from moebius.compare.cli import app


def run(*arguments: Any) -> Any:
    """What the command does: exit_code, stdout, stderr."""
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def refused(*arguments: Any) -> str:
    """What the command says to bad input: three lines on standard error, nothing on standard output, code 2."""
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    lines = [line.split(": ")[0] for line in done.stderr.splitlines()]
    assert [word for word in lines if word in ("asked", "found", "do")] == ["asked", "found", "do"], done.stderr
    assert "Traceback" not in done.stderr
    return str(done.stderr)


def passed(*arguments: Any) -> dict[str, Any]:
    """The JSON of a run that exits with 0."""
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def edit_config(folder: Path, **changes: Any) -> None:
    """Write other values into a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Store a folder's tensors again, after `change` did something to them."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
