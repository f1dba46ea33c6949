"""Where scratch folders and records of running processes are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mcp_broker.errors import ConfigError, SupervisionError
from mcp_broker.supervisor.runtime import VARIABLE, Runtime


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "state").mkdir()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "base"))
    return tmp_path / "base"


def test_others_may_pass_the_folder_and_not_list_it(base: Path, tmp_path: Path) -> None:
    runtime = Runtime(tmp_path / "state", "abc")
    assert runtime.folder == base / "abc"
    assert {folder.stat().st_mode & 0o777 for folder in (base, runtime.folder)} == {0o711}
    runtime.show()
    assert (tmp_path / "state" / "run").resolve() == runtime.folder


def test_an_empty_folder_goes_with_its_link_and_a_full_one_stays_in_sight(base: Path, tmp_path: Path) -> None:
    runtime = Runtime(tmp_path / "state", "abc")
    runtime.show()
    (runtime.folder / "left").touch()
    runtime.remove()
    assert (tmp_path / "state" / "run" / "left").exists()
    (runtime.folder / "left").unlink()
    runtime.remove()
    assert list(base.iterdir()) == []
    assert not (tmp_path / "state" / "run").is_symlink()


def test_the_folder_of_an_earlier_life_elsewhere_is_found(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Runtime(tmp_path / "state", "abc")
    first.show()
    first.release()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "other"))
    second = Runtime(tmp_path / "state", "abc")
    assert second.earlier == [first.folder]
    second.show()
    assert not first.folder.exists()
    assert (tmp_path / "state" / "run").resolve() == second.folder


def test_a_folder_that_a_living_one_uses_is_neither_shared_nor_left_over(base: Path, tmp_path: Path) -> None:
    first = Runtime(tmp_path / "state", "abc")
    first.show()
    (first.folder / "a-1").mkdir()
    with pytest.raises(SupervisionError, match=f"another mcp-broker uses the runtime folder {first.folder}"):
        Runtime(tmp_path / "state", "abc")
    shutil.copytree(tmp_path / "state", tmp_path / "copy", symlinks=True)
    second = Runtime(tmp_path / "copy", "def")
    assert second.earlier == []
    assert second.clear(lambda _folder: 1) == 1
    assert (first.folder / "a-1").is_dir()
    first.release()
    assert Runtime(tmp_path / "state", "abc").folder == first.folder


def test_the_folder_of_an_older_version_is_found_and_replaced(base: Path, tmp_path: Path) -> None:
    old = tmp_path / "state" / "run"
    old.mkdir()
    runtime = Runtime(tmp_path / "state", "abc")
    assert runtime.earlier == [old]
    runtime.show()
    assert old.resolve() == runtime.folder == base / "abc"


def test_a_place_that_is_not_ours_is_refused(base: Path, tmp_path: Path) -> None:
    base.symlink_to(tmp_path / "state")
    with pytest.raises(ConfigError, match=f"set {VARIABLE} to"):
        Runtime(tmp_path / "state", "abc")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_place_that_belongs_to_somebody_else_is_refused(base: Path, tmp_path: Path) -> None:
    base.mkdir()
    os.chown(base, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to uid 12345"):
        Runtime(tmp_path / "state", "abc")
