"""A GPU benchmark's JSON as runs of measured.toml: `python -m moebius.core.measured_json F >> core/measured.toml`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moebius.core.config import EXPERT_BACKENDS
from moebius.core.errors import ConfigError

_PASSES = ("forward", "both")
_REPLAYED = ("forward_graph", "both_graph")  # from CUDA graphs
_CAPABILITY = "compute capability"
_SIZES = {"E": "n_experts", "K": "k", "D": "dim", "I": "inter", "T": "tokens"}


def runs(figures: Mapping[str, Any], *, date: str, command: str, capability: str | None = None) -> str:
    """One run for each frontend and dtype, of rows that are a backend and nothing else, where both passes were timed.

    Args:
        figures: what benchmarks/gpu_all.py or another of them wrote. date: ISO. command: that measured.
        capability: of the device, such as "9.0", where the figures do not say it.
    Raises:
        ConfigError: neither says it.
    """
    machine = {name: str(value) for name, value in figures["machine"].items()}
    found = machine.pop(_CAPABILITY, None) or capability
    if found is None:
        do = "give --capability, such as 9.0"
        raise ConfigError("runs of measured.toml", f"figures that do not say the device's {_CAPABILITY}", do)
    head = {
        "device": machine.pop("GPU", "no GPU"),
        "capability": found,
        "versions": ", ".join(f"{name} {value}" for name, value in machine.items()),
        "command": command,
    }
    dtypes = dict.fromkeys(_dtype(shape) for shape in figures["shapes"].values())
    each = [(frontend, dtype) for dtype in dtypes for frontend in ("torch", "jax")]
    return "".join(_run(frontend, date, head | {"dtype": dtype}, figures) for frontend, dtype in each)


def _dtype(shape: Mapping[str, Any]) -> str:
    return str(shape.get("dtype", "bfloat16"))


def _run(frontend: str, date: str, head: Mapping[str, str], figures: Mapping[str, Any]) -> str:
    points = list(_points(frontend, head["dtype"], figures))
    if not points:
        return ""
    # A string of TOML is one of JSON, of characters that both write alike.
    stated = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in head.items()]
    lines = ["", "[[run]]", f'frontend = "{frontend}"', f"date = {date}", *stated, "points = [", *points, "]"]
    return "\n".join(lines) + "\n"


def _points(frontend: str, dtype: str, figures: Mapping[str, Any]) -> Iterator[str]:
    of_dtype = {key: shape for key, shape in figures["shapes"].items() if _dtype(shape) == dtype}
    for key, shape in of_dtype.items():
        found = {
            name: _figures(result)
            for result in figures["results"]
            if result["shape"] == key and all(each in result for each in _PASSES)
            if (name := _backend(figures["rows"][result["row"]], frontend)) is not None
        }
        if found:
            sizes = [f"layer = {json.dumps(shape['name'])}", *(f"{name} = {shape[of]}" for name, of in _SIZES.items())]
            cells = ", ".join([*sizes, *(f"{name} = {both}" for name, both in found.items())])
            yield f"    {{ {cells} }},"


def _figures(result: Mapping[str, Any]) -> list[float]:
    """Rounded; of graphs too where both passes were replayed."""
    passes = _PASSES + (_REPLAYED if all(each in result for each in _REPLAYED) else ())
    return [float(f"{result[each]['tflops']:.4g}") for each in passes]


def _backend(title: str, frontend: str) -> str | None:
    """The backend of a row's title, such as "moebius triton" or "Flax tokamax"; None for anything else."""
    first, _, name = title.partition(" ")
    own = {"torch": ("moebius", "PyTorch"), "jax": ("Flax",)}[frontend]
    return name if first in own and name in EXPERT_BACKENDS else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the runs of the files."""
    parser = argparse.ArgumentParser(prog="python -m moebius.core.measured_json", description=__doc__)
    parser.add_argument("file", nargs="+", type=Path, help="that a GPU benchmark's --json wrote")
    parser.add_argument("--capability", help="compute capability of the device, for figures that do not say it")
    parser.add_argument("--date", help="of the run, ISO; by default that of the file")
    parser.add_argument("--command", help="that measured; by default what the figures say")
    options = parser.parse_args(arguments)
    for file in options.file:
        written = datetime.fromtimestamp(file.stat().st_mtime, tz=UTC).date().isoformat()
        figures = json.loads(file.read_text())
        command = options.command or figures.get("options", {}).get("command", "benchmarks/run_gpu")
        told = {"capability": options.capability, "date": options.date or written, "command": command}
        print(runs(figures, **told), end="")


if __name__ == "__main__":
    main()
