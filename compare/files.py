"""Files that appear under their names only when they are whole."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from moebius.core.errors import ConfigError

# Suffix of a figure's file -> its format.
FIGURES = {".png": "png", ".svg": "svg", ".pdf": "pdf"}


def write_whole(path: Any, data: str | bytes) -> None:
    """Write a file that is either whole under its name or not there; an older file stays until then.

    Args:
        path: of the file; its folder exists. data: text, written in UTF-8, or bytes.
    Raises:
        ConfigError: as of `check_writable`, or writing failed.
    """
    target = check_writable(path)
    body = data.encode("utf-8", errors="backslashreplace") if isinstance(data, str) else data
    # In the same folder: a rename within a file system is one step, across two it is a copy.
    part = _part(target)
    try:
        _write(part, body)
        if target.exists():
            shutil.copymode(target, part)
        os.replace(part, target)
    except OSError as error:
        raise _unwritable(target, f"{type(error).__name__}: {error}") from error
    finally:
        _remove(part)


def check_writable(path: Any) -> Path:
    """The path that `write_whole` will write to, after trying: ask before a long computation.

    `~` is expanded, and a link is followed to the file it names.

    Raises:
        ConfigError: the folder is missing or cannot be written to, the name is that of a folder, or of something
            that is no plain file (replacing /dev/null would be a pity), or the file is read-only.
    """
    asked = Path(path).expanduser()
    try:
        return _checked(asked, folder=str(path).endswith(("/", os.sep)))
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise _unwritable(asked, f"{type(error).__name__}: {error}") from error


def figure_format(path: Any) -> str:
    """The format that a figure's file name asks for: one of FIGURES.

    >>> figure_format("numerics.PNG")
    'png'

    Raises:
        ConfigError: another suffix, or none.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FIGURES:
        raise ConfigError(f"a figure in {path}", f"the suffix {suffix!r}", f"end the name in {' or '.join(FIGURES)}")
    return FIGURES[suffix]


def _checked(asked: Path, folder: bool) -> Path:
    target = Path(os.path.realpath(asked))
    if folder or target.is_dir():
        raise _unwritable(asked, "the name of a folder", "add the name of a file")
    if not target.parent.is_dir():
        raise _unwritable(asked, f"no folder {target.parent}", "make the folder first, or name one that exists")
    if target.exists() and not target.is_file():
        raise _unwritable(asked, "something that is no plain file", "name a plain file")
    if target.exists() and not os.access(target, os.W_OK):
        raise _unwritable(asked, "a file that is read-only", "name another file, or make this one writable")
    part = _part(target)
    try:
        _write(part, b"")
    finally:
        _remove(part)
    return target


def _part(target: Path) -> Path:
    """A name in the target's folder that nobody else uses; short, so that it fits wherever the target's does."""
    return target.with_name(f".{secrets.token_hex(6)}.part")


def _write(path: Path, body: bytes) -> None:
    # os.open, not tempfile: the file gets the rights of any new file, not those of a secret.
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())


def _remove(part: Path) -> None:
    with contextlib.suppress(OSError):
        part.unlink()


def _unwritable(path: Path, found: str, do: str = "name a file in a folder that can be written to") -> ConfigError:
    return ConfigError(f"to write {path}", found, do)
