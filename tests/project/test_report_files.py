"""Files appear whole or not at all, and what cannot be written is said before anything is computed."""

from __future__ import annotations

import os
import stat

import pytest

from moebius.compare import files
from moebius.core.errors import ConfigError


def test_write_whole_writes_text_and_bytes_as_they_are(tmp_path):
    files.write_whole(tmp_path / "words", "é\n\r\n")
    files.write_whole(str(tmp_path / "bytes"), b"\x00\xff")
    assert (tmp_path / "words").read_bytes() == "é\n\r\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert len(list(tmp_path.iterdir())) == 2


def test_write_whole_takes_text_from_an_undecodable_file_name(tmp_path):
    files.write_whole(tmp_path / "page.html", os.fsdecode(b"model-\xff"))
    assert (tmp_path / "page.html").read_text() == "model-\\udcff"


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_write_whole_that_fails_midway_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step, error):
    target = tmp_path / "page.html"
    target.write_text("old")

    def fail(*_):
        raise error

    monkeypatch.setattr(files, "check_writable", lambda path: path)
    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(ConfigError if isinstance(error, OSError) else KeyboardInterrupt):
        files.write_whole(target, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"] and target.read_text() == "old"


def test_write_whole_never_shows_a_part_under_the_name(tmp_path, monkeypatch):
    target, seen = tmp_path / "page.html", []
    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda *paths: (seen.append(target.exists()), replace(*paths)))
    files.write_whole(target, "whole")
    assert seen == [False] and target.read_text() == "whole"


def test_write_whole_gives_the_rights_of_any_new_file_and_keeps_those_of_an_old_one(tmp_path):
    (tmp_path / "plain").touch()
    files.write_whole(tmp_path / "new", "")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").chmod(0o640)
    files.write_whole(tmp_path / "plain", "")
    assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == 0o640


def test_write_whole_through_a_link_writes_the_file_and_keeps_the_link(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    files.write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


def test_check_writable_leaves_no_trace(tmp_path):
    (tmp_path / "old").write_text("old")
    assert files.check_writable(tmp_path / "new") == (tmp_path / "new").resolve()
    files.check_writable(tmp_path / "old")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "old")]


def test_check_writable_expands_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.check_writable("~/page.html").parent == tmp_path.resolve()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("nothing/page.html", "no folder"),
        ("file/page.html", "no folder"),
        ("", "the name of a folder"),
        ("folder", "the name of a folder"),
        ("new/", "the name of a folder"),
        ("pipe", "no plain file"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null byte"),
    ],
)
@pytest.mark.parametrize("ask", [files.check_writable, lambda path: files.write_whole(path, "new")])
def test_what_cannot_be_written_is_refused_with_the_reason(tmp_path, name, found, ask):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as refused:
        ask(f"{tmp_path}/{name}")
    assert found in refused.value.found and refused.value.do
    assert sorted(tmp_path.rglob("*")) == before


def test_check_writable_of_a_device_is_refused():
    """As root a rename would put a plain file in its place."""
    with pytest.raises(ConfigError, match="no plain file"):
        files.check_writable(os.devnull)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_check_writable_asks_the_file_system(tmp_path, monkeypatch):
    """Rights alone do not tell: a file system may be read-only, and root may do anything."""

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(ConfigError, match="Permission denied"):
        files.check_writable(tmp_path / "page.html")


def test_check_writable_of_a_read_only_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="read-only"):
        files.check_writable(tmp_path / "file")


@pytest.mark.parametrize(("name", "kind"), [("a.png", "png"), ("a.b.SVG", "svg"), ("~/a.pdf", "pdf")])
def test_figure_format_is_the_suffix(name, kind):
    assert files.figure_format(name) == kind
