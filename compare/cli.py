"""The commands of `moebius`. Importing this needs typer and rich; `entry` asks before it does."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moebius import __version__
from moebius.core.errors import MoEError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class DType(StrEnum):
    """What --dtype takes."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _version(asked: bool) -> None:
    if asked:
        print(f"moebius {__version__}")
        raise typer.Exit


@app.callback()
def moebius(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Version.")] = False,
) -> None:
    """Mixture-of-experts layers for PyTorch and Flax from one core."""


@app.command()
def compare(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with config.json and safetensors.", show_default=False)],
    layer: Annotated[int | None, typer.Option(help="Layer; the first MoE layer if left out.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text file; this project's documents if left out.")] = None,
    dtype: Annotated[DType, typer.Option(help="Dtype of parameters and input.")] = DType.float32,
    tokens: Annotated[int, typer.Option(help="At most this many tokens of the text.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the upstream gradient.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Run one MoE block of a checkpoint through PyTorch, Flax and the float64 reference.

    Exit code 0: inside the computed bounds; 1: outside; 2: bad input.
    """
    from moebius.compare.numerics import report

    status = Console(stderr=True)
    try:
        with status.status("reading the checkpoint") as spinner:
            found = report(
                checkpoint, layer=layer, text=text, dtype=dtype.value, tokens=tokens, seed=seed, say=spinner.update
            )
    except MoEError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    print(found.to_json() if as_json else found.table(color=sys.stdout.isatty()))
    raise typer.Exit(0 if found.passed else 1)
