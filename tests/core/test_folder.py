"""folder.py: what is read of a checkpoint's folder and of the headers of its files, and what is refused."""

import json
import pathlib
import tempfile

import numpy as np
import pytest
from folders import QWEN, draw, qwen_tensors, safetensors_bytes, write
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.core.errors import CheckpointError
from moebius.core.folder import header, read_folder


def test_read_folder_that_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        read_folder(tmp_path / "nothing")


def test_read_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="found: a file"):
        read_folder(tmp_path / "file")


def test_read_folder_without_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_folder(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1, "a": 2}', "\xff", "[" * 100_000])
def test_read_folder_with_a_config_that_is_no_json_object(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_folder(tmp_path)


def test_read_folder_with_pickles_alone_refuses_them(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=r"pickles.*pytorch_model\.bin"):
        read_folder(tmp_path)


def test_read_folder_without_weights_names_what_is_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "git-lfs pointer"),
        (b"PK\x03\x04" + bytes(100), "zip archive"),
        (b"\x80\x02}q\x00" + bytes(100), "pickle"),
        (b"<!DOCTYPE html>", "web page"),
        (b"garbage, and more of it than a header has", "like no safetensors"),
        (b"", "like no safetensors"),
        ((100).to_bytes(8, "little") + b"{}", "a header of 100 announced"),
        ((2).to_bytes(8, "little") + b"[]", "a header of 2 announced"),
        ((2).to_bytes(8, "little") + b"{{", "Expecting"),
    ],
    ids=["lfs", "zip", "pickle", "html", "garbage", "empty", "cut header", "list", "no json"],
)
def test_header_of_another_kind_of_file(tmp_path, content, found):
    folder = write(tmp_path, QWEN, qwen_tensors())
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_folder(folder)
    assert found in caught.value.found and "model.safetensors" in caught.value.asked


@pytest.mark.parametrize("first_byte", [0x80, 0x50, 0x3C, 0x76])
def test_header_whose_length_starts_like_another_kind_of_file(tmp_path, first_byte):
    """A header of 0x..80 bytes is no pickle: safetensors files begin with any byte."""
    raw = safetensors_bytes({"a": draw((2,))})
    head = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    head += b" " * ((first_byte - len(head)) % 256)
    (tmp_path / "x.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + raw[-8:])
    assert header(tmp_path / "x.safetensors")["a"].shape == (2,)


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_header_of_a_truncated_file(tmp_path, cut):
    folder = write(tmp_path, QWEN, qwen_tensors())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match="truncated"):
        read_folder(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": 7, "shape": [1], "data_offsets": [0, 4]},
        {"shape": [1], "data_offsets": [0, 4]},
        [],
    ],
)
def test_header_with_an_entry_that_contradicts_itself(tmp_path, entry):
    head = json.dumps({"a": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(4))
    with pytest.raises(CheckpointError, match="damaged"):
        header(tmp_path / "x.safetensors")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_header_of_any_damage_is_a_checkpoint_error_or_harmless(data):
    """Flip a byte or cut the file: a CheckpointError, or tensors that lie inside the file."""
    raw = bytearray(safetensors_bytes({"a": draw((2, 3)), "b": draw((4,))}))
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "model.safetensors"
        file.write_bytes(bytes(raw))
        try:
            stored = header(file)
        except CheckpointError:
            return
        sizes = {"float32": 4, "float64": 8, "float16": 2}
        assert sum(int(np.prod(s.shape)) * sizes.get(s.dtype, 1) for s in stored.values()) <= len(raw)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_read_folder_with_a_damaged_index(tmp_path, index):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map"):
        read_folder(tmp_path)


def test_read_folder_index_that_leaves_the_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(CheckpointError, match="same folder"):
        read_folder(tmp_path)
