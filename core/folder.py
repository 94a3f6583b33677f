"""A Hugging Face folder: its config.json, and which safetensors file holds which tensor with which shape and dtype.

Only headers are read here, never tensor data, so that a checkpoint is judged before anything is allocated. The format
is the safetensors specification: eight bytes of header length (little endian), a JSON header, then the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from moebius.core.errors import CheckpointError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# The limit of the safetensors library; a longer "header" is some other kind of file.
_HEADER_LIMIT = 100_000_000
# safetensors' name -> (ours, bytes per element). Packed types narrower than a byte have no row and are named as found.
DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
# What a file that is not safetensors starts with, in words, and what to do about it.
_FOREIGN = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself", "fetch the file: git lfs pull"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes", "convert it: model.save_pretrained writes safetensors"),
    (b"\x80", "a pickle, which can run code when read", "convert it: model.save_pretrained writes safetensors"),
    (b"<!DOCTYPE", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """One tensor on disk: its name, file, shape, and dtype in our words (or the file's where DTYPES has no row)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """A checkpoint folder.

    Attributes:
        path: of the folder. config: what config.json holds.
        files: tensor name -> the file that is said to hold it.
    """

    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, Path]

    def stored(self, names: Iterable[str]) -> dict[str, Stored]:
        """What the headers say of these tensors; a name that its file does not hold is left out.

        Raises:
            CheckpointError: a file that should hold one of them is missing, damaged or of another kind.
        """
        names = [name for name in names if name in self.files]
        needed = sorted({self.files[name] for name in names})
        absent = [file.name for file in needed if not file.is_file()]
        if absent:
            raise CheckpointError(
                f"the files that {INDEX} names in {self.path}",
                f"missing: {listed(absent)}",
                "download the missing files, or the whole checkpoint again",
            )
        headers = {file: header(file) for file in needed}
        return {name: headers[self.files[name]][name] for name in names if name in headers[self.files[name]]}


def read_folder(path: Any) -> Folder:
    """Read a folder's config.json and its list of tensors.

    Args:
        path: a folder as `save_pretrained` writes it: config.json and model.safetensors, or
            model.safetensors.index.json with its shards.
    Raises:
        CheckpointError: no such folder, a file is missing or damaged, or the weights are not safetensors.
    """
    path = Path(path).expanduser()
    asked = f"a checkpoint in {path}"
    if not path.is_dir():
        raise CheckpointError(
            asked,
            "a file" if path.exists() else "no such folder",
            f"pass a folder with {CONFIG} and safetensors; a model of the Hugging Face Hub has to be downloaded first",
        )
    if not (path / CONFIG).is_file():
        raise CheckpointError(asked, f"no {CONFIG} in it", "pass the folder that save_pretrained wrote")
    return Folder(path=path, config=_json(path / CONFIG), files=_files(path, asked))


def header(file: Path) -> dict[str, Stored]:
    """The tensors that a safetensors file holds, checked against its size.

    Raises:
        CheckpointError: the file is truncated, damaged or not safetensors.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(64)
        length = int.from_bytes(start[:8], "little")
        if length > min(_HEADER_LIMIT, size - 8) or start[8:9] != b"{":
            raise _no_safetensors(file, size, length, start)
        stream.seek(8)
        entries = _parsed(stream.read(length), file)
    entries.pop("__metadata__", None)
    stored, end = {}, 0
    for name, entry in entries.items():
        stored[name], stop = _entry(name, entry, file)
        end = max(end, stop)
    if end != size - 8 - length:
        raise CheckpointError(
            f"{end} bytes of tensors in {file}, as its header says",
            f"{size - 8 - length} bytes",
            "the file is truncated or damaged: download it again",
        )
    return stored


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names in one line; the rest is counted.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    names = list(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _files(path: Path, asked: str) -> dict[str, Path]:
    if (path / SINGLE).is_file():
        return dict.fromkeys(header(path / SINGLE), path / SINGLE)
    if (path / INDEX).is_file():
        names = _json(path / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
            raise CheckpointError(
                f"tensor names and their files in {path / INDEX}", "no weight_map", "download it again"
            )
        outside = sorted({shard for shard in names.values() if Path(shard).name != shard})
        if outside:
            raise CheckpointError(f"files beside {path / INDEX}", listed(outside), "name files in the same folder")
        return {name: path / shard for name, shard in names.items()}
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
    others = sorted(file.name for file in path.glob("*.safetensors"))
    if pickles:
        raise CheckpointError(
            asked,
            f"no safetensors, but pickles, which can run code when read: {listed(pickles)}",
            "convert it: load it with transformers and call save_pretrained",
        )
    raise CheckpointError(
        asked,
        f"neither {SINGLE} nor {INDEX}" + (f", but {listed(others)}" if others else ""),
        "pass the folder that save_pretrained wrote",
    )


def _no_safetensors(file: Path, size: int, length: int, start: bytes) -> CheckpointError:
    """Why a file whose first bytes announce no readable header is none, as exactly as can be said."""
    asked = f"safetensors in {file}"
    for magic, found, do in _FOREIGN:
        if start.startswith(magic):
            return CheckpointError(asked, found, do)
    found = f"{size} bytes that start like no safetensors file"
    if 8 <= size and length <= _HEADER_LIMIT:
        found = f"{size} bytes, and a header of {length} announced"
    return CheckpointError(asked, found, "the file is truncated or of another kind: download it again")


def _json(file: Path) -> dict[str, Any]:
    return _parsed(file.read_bytes(), file)


def _parsed(text: bytes, file: Path) -> dict[str, Any]:
    """A JSON object; a key that stands twice is an error, since readers disagree on which one counts."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
        return dict(pairs)

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} where an object is due")
    except (ValueError, RecursionError) as error:
        kind = "JSON" if file.suffix == ".json" else "a JSON header"
        raise CheckpointError(f"{kind} in {file}", str(error), "the file is damaged: download it again") from error
    return value


def _entry(name: str, entry: Any, file: Path) -> tuple[Stored, int]:
    """(the tensor, where its data ends)."""
    try:
        kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, start, stop)
        sound = isinstance(kind, str) and all(type(n) is int and n >= 0 for n in numbers) and start <= stop
    except (TypeError, KeyError, ValueError):
        sound = False
    if sound and kind in DTYPES:
        sound = prod(shape) * DTYPES[kind][1] == stop - start
    if not sound:
        raise CheckpointError(
            f"dtype, shape and place of {name} in {file}", str(entry)[:200], "the file is damaged: download it again"
        )
    return Stored(name=name, file=file, dtype=DTYPES.get(kind, (kind, 0))[0], shape=shape), stop
