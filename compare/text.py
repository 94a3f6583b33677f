"""Words for a model to read: a file of the user's, or this project's own documents."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

from moebius.core.errors import ConfigError

_DOCUMENTED = ("core", "core.precision", "core.activations", "core.routing", "core.layout", "core.registry")


def read(file: Any) -> str:
    """The text of a file.

    Raises:
        ConfigError: it is missing, empty or no UTF-8.
    """
    asked = f"text from {file}"
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(asked, f"{type(error).__name__}: {error}", "pass a text file in UTF-8") from error
    if not text.strip():
        raise ConfigError(asked, "nothing but white space", "pass a file with words in it")
    return text


def own() -> tuple[str, str]:
    """(text, where it is from): README and docs of a checkout, or the package's docstrings where it is installed."""
    root = Path(inspect.getfile(import_module("moebius.core"))).resolve().parents[1]
    files = [file for file in (root / "README.md", *sorted(root.glob("docs/*.md"))) if file.is_file()]
    if (root / "pyproject.toml").is_file() and files:
        text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
        if text.strip():
            return text, ", ".join(str(file.relative_to(root)) for file in files)
    modules = [import_module(f"moebius.{name}") for name in _DOCUMENTED]
    return "\n\n".join(inspect.getdoc(module) or "" for module in modules), "docstrings of moebius.core"
