"""The commands of `moebius`. Importing this needs typer and rich; `entry` asks before it does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moebius import __version__
from moebius.core.errors import BackendUnavailable, ConfigError, MoEError

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
    layer: Annotated[str | None, typer.Option(help="Layer, or 'all'; the first MoE layer if left out.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text file; this project's documents if left out.")] = None,
    hidden: Annotated[Path | None, typer.Option(help="Hidden states [tokens, dim], safetensors, not a text.")] = None,
    dtype: Annotated[DType, typer.Option(help="Dtype of parameters and input.")] = DType.float32,
    tokens: Annotated[int, typer.Option(help="At most this many tokens.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the upstream gradient.")] = 0,
    side: Annotated[
        list[str] | None,
        typer.Option(help="kind[:backend][@device], repeated; torch, flax, transformers if left out."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="How the experts are read, of the family's recipes.")] = None,
    worst: Annotated[int, typer.Option(min=0, help="Also print this many elements that differ most.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write a figure: .png, .svg or .pdf.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with figure and tables.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Compare MoE blocks of a checkpoint, stage by stage: PyTorch, Flax, transformers and the float64 reference.

    Exit code 0: rounding explains every difference, or all but a warning; 1: it does not; 2: bad input.
    """
    from moebius.compare.numerics import report

    with _refusing():
        _check_targets(plot, html)
        with _watched(as_json) as (say, progress):
            found = report(
                checkpoint,
                layer=layer,
                text=text,
                hidden=hidden,
                dtype=dtype.value,
                tokens=tokens,
                seed=seed,
                sides=side or None,
                recipe=recipe,
                say=say,
                progress=progress,
            )
    print(found.to_json() if as_json else _shown(found, worst), flush=True)
    with _refusing():  # after the report: a full disk is not to cost it
        _write(found, plot, html)
    raise typer.Exit(0 if found.passed else 1)


@contextmanager
def _refusing() -> Iterator[None]:
    """Exit with code 2 where the input cannot be used, saying why on standard error."""
    try:
        yield
    except MoEError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None


def _write(found: Any, plot: Path | None, html: Path | None) -> None:
    from moebius.compare import files

    if plot is not None:
        from moebius.compare.plot import save

        save(found, plot)
    if html is not None:
        files.write_whole(html, found.html())


def _check_targets(plot: Path | None, html: Path | None) -> None:
    """Refuse files that could not be written after all the work."""
    from moebius.compare import files

    for path in (plot, html):
        if path is not None:
            files.check_writable(path)
    if plot is not None:
        files.figure_format(plot)
        if html is not None and plot.absolute() == html.absolute():
            raise ConfigError(f"figure and page in {plot}", "one file for both", "name two files")
    if (plot or html) is not None and find_spec("matplotlib") is None:
        raise BackendUnavailable("a figure", "matplotlib is not installed", "pip install '.[compare]' in a clone")


def _shown(found: Any, worst: int) -> str:
    from moebius.compare.table import worst_table

    color = sys.stdout.isatty()
    parts = [found.table(color=color)]
    if worst > 0:
        parts.append(worst_table(found.worst(worst), color=color))
    return "\n\n".join(parts)


@contextmanager
def _watched(silent: bool) -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """(say, progress) on standard error: what is being done, and with several layers a bar."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=silent) as bar:
        task = bar.add_task("reading the checkpoint", total=1)
        yield (
            lambda line: bar.update(task, description=line),
            lambda done, total: bar.update(task, completed=done, total=total),
        )


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
def doctor(context: typer.Context) -> None:
    """Say what is installed and works here, what does not and why, and what would spoil a comparison."""
    from moebius.compare.doctor.command import main

    raise typer.Exit(main(context.args))
