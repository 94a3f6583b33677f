"""The `moebius` command's first step: standard library alone, so that it answers wherever the package is installed."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

_NEEDS = ("typer", "rich", "torch", "jax", "flax", "transformers", "safetensors", "threadpoolctl")
_HELP = """usage: moebius compare CHECKPOINT [options]
       moebius doctor [options]

compare  runs one MoE block of a checkpoint through PyTorch, Flax and a float64 reference, and says where they differ.
doctor   says what is installed and works here, what does not and why, and what would spoil a comparison.

  moebius compare --help   all options
  moebius doctor --help    all options
  moebius --version        the version
"""


def main() -> int:
    """Run the command line; returns the exit code: 0 all is well, 1 it is not, 2 bad input."""
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        from moebius import __version__

        print(f"moebius {__version__}")
        return 0
    if arguments[:1] == ["doctor"]:
        # Before anything is asked for: it has to answer where the rest is missing or broken.
        from moebius.compare.doctor.command import main as doctor

        return doctor(arguments[1:])
    missing = [package for package in _NEEDS if find_spec(package) is None]
    if missing:
        if arguments in ([], ["--help"]):
            print(_HELP)
            print(f"Not installed: {', '.join(missing)}. pip install '.[compare]' in a clone of moebius brings them.")
            return 0
        print(
            f"asked: moebius {' '.join(arguments)}\n"
            f"found: not installed: {', '.join(missing)}\n"
            "do: pip install '.[compare]' in a clone of moebius",
            file=sys.stderr,
        )
        return 2
    # Before the frameworks are imported: JAX would take three quarters of a GPU, transformers look for a network.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from moebius.compare.cli import app

    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:  # a terminal that knows no lines shows question marks, not a traceback
        reconfigure(errors="replace")

    app(prog_name="moebius")
    return 0


if __name__ == "__main__":
    sys.exit(main())
