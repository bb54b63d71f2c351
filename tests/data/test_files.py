"""Directories that appear complete or not at all: whose they are, and where none can be made."""

import os
from pathlib import Path

import pytest

from cla_jax.data.files import check_free, staged_directory


@pytest.mark.parametrize("keep_theirs", [True, False])
def test_what_another_process_made_meanwhile_is_never_called_ours(tmp_path, keep_theirs):
    final = tmp_path / "final"

    def write():
        with staged_directory(final, keep_theirs=keep_theirs) as staging:
            (staging / "file").write_text("ours")
            final.mkdir()
            (final / "file").write_text("theirs")

    if keep_theirs:
        write()
    else:
        with pytest.raises(OSError, match="final"):
            write()
    assert (final / "file").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("place", ["new", "a/new/one", "empty", "link", "link/new", "up/../new"])
def test_free_places(tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    check_free(tmp_path / place)
    with staged_directory(tmp_path / place) as staging:
        (staging / "file").write_text("ours")
    assert (tmp_path / place).resolve().joinpath("file").read_text() == "ours"
    assert (tmp_path / "link").is_symlink()
    assert not list(tmp_path.glob("**/.*"))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (".", "^. is the working directory: name a new directory in it"),
        ("full", "full exists already; nothing in it was touched"),
        ("to-full", "to-full exists already"),
        ("full/file", "full/file exists already"),
        ("full/file/x/y", r"full/file/x/y cannot be made: .*full/file is a file"),
        ("dangling", "dangling is a link to nothing, which is not there"),
        ("dangling/x", "dangling is a link to nothing, which is not there"),
        ("loop", "loop is a link to loop, which is not there"),
    ],
)
def test_places_that_are_not_free(tmp_path, monkeypatch, place, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("theirs")
    (tmp_path / "to-full").symlink_to("full")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here" if place == "." else tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        check_free(Path(place))
    assert sorted(tmp_path.rglob("*")) == before


def test_mount_points_and_places_without_permission_are_refused(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: path.name == "disk")
        with pytest.raises(ValueError, match="disk is a mount point: name a new directory in it"):
            check_free(tmp_path / "disk")
        check_free(tmp_path / "disk/new")
    # Root may write anywhere: the question is put, not the answer.
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path.resolve())
    with pytest.raises(ValueError, match=r"a/b cannot be made: .* may not be written to"):
        check_free(tmp_path / "a/b")
    check_free(tmp_path / "disk/new")
