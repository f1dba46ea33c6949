"""What a user gets: the source distribution, the wheel that is built from it, and that one in an environment of its own."""

from __future__ import annotations

import configparser
import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(300)]

READY_S = 30.0
EXIT_S = 10.0


def _run(
    *command: str | Path,
    cwd: Path,
    env: dict[str, str] | None = None,
    timeout_s: float = 60.0,
) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        timeout=timeout_s,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _git(*arguments: str) -> list[str]:
    if shutil.which("git") is None:
        return []
    done = subprocess.run(
        ["git", "ls-files", "-z", *arguments],
        cwd=ROOT,
        timeout=30,
        capture_output=True,
        text=True,
        check=False,
    )
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def _unpacked() -> list[str]:
    """Return the files of a source distribution that somebody has unpacked, which no git knows."""
    made = [".git"] + [
        line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line and line[0] != "#"
    ]
    return [
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*")
        if path.is_file()
        and not any(fnmatch.fnmatch(part, one) for part in path.relative_to(ROOT).parts for one in made)
    ]


#: the files of the project; and those besides that stand where the project's do and are not committed yet
TRACKED = frozenset(_git("--cached") or _unpacked())
SOURCES = TRACKED | frozenset(_git("--others", "--exclude-standard"))


@dataclass(frozen=True)
class Built:
    """What `python -m build` makes: the wheel from the source distribution, not from the checkout."""

    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built from a copy, so that no stale build/ leaks in and none is left behind."""
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "source"
    for name in SOURCES:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    _run(
        *(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, copy),
        cwd=folder,
        timeout_s=120,
    )
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="module")
def wheel(built: Built) -> Path:
    return built.wheel


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel and only what its metadata asks for."""
    folder = tmp_path_factory.mktemp("installed")
    # the pins without the hashes: pip cannot check a hash for the wheel that was just built
    pins = re.findall(r"^(\S+==\S+(?: ;[^\\\n]*)?)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert pins
    (folder / "pins.txt").write_text("\n".join(pins) + "\n")
    _run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    _run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
        *("--constraint", folder / "pins.txt", f"{wheel}[tools]"),
        cwd=folder,
        timeout_s=240,
    )
    return python.parent


@pytest.fixture
def away(tmp_path: Path) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "away"
    folder.mkdir()
    return folder


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """Nothing of the caller's: a PYTHONPATH or a profile would hide what is missing."""
    home = tmp_path / "home"
    home.mkdir()
    return {"PATH": os.defpath, "HOME": str(home), "LANG": "C.UTF-8"}


@pytest.fixture
def state_dir(scripts: Path, away: Path, env: dict[str, str], tmp_path: Path) -> Iterator[Path]:
    """The state directory of a broker that is ready; ended by one SIGINT, which must do."""
    folder = tmp_path / "state"
    command = scripts / "mcp-broker"
    log = tmp_path / "start.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [command, "start", "--state-dir", folder],
            cwd=away,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + READY_S
        while True:
            status = subprocess.run(
                [command, "status", "--json", "--state-dir", folder],
                cwd=away,
                env=env,
                timeout=READY_S,
                capture_output=True,
                text=True,
                check=False,
            )
            if status.returncode == 0:
                break
            assert process.poll() is None, f"start ended\n{log.read_text()}"
            assert time.monotonic() < deadline, f"not ready\n{status.stdout}{status.stderr}{log.read_text()}"
            time.sleep(0.1)
        yield folder
        process.send_signal(signal.SIGINT)
        assert process.wait(EXIT_S) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _installed(names: Iterable[str]) -> set[str]:
    """Return what files of the packages are called where they are installed."""
    return {name for name in names if name.startswith("mcp_broker/")} | {
        f"mcp_broker_{name}" for name in names if name.startswith("workers/")
    }


def test_wheel_holds_the_packages_their_data_and_nothing_else(wheel: Path) -> None:
    entries = zipfile.ZipFile(wheel).namelist()
    tops = {entry.split("/")[0] for entry in entries if ".dist-info/" not in entry}
    assert tops == {"mcp_broker", "mcp_broker_workers"}
    assert "mcp_broker/py.typed" in entries
    held = {entry for entry in entries if ".dist-info/" not in entry}
    wanted = _installed(TRACKED)
    assert {"mcp_broker/demo_data/penguins.csv", "mcp_broker_workers/py.typed"} <= wanted
    assert sorted(wanted - held) == [], "what is no Python goes into package_data in setup.cfg"
    assert sorted(held - _installed(SOURCES)) == []


def test_source_distribution_is_the_checkout(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        entries = {entry.name.partition("/")[2] for entry in archive if entry.isfile()}
    assert {
        "SECURITY.md",
        "Makefile",
        "docs/protocol.md",
        "tests/conftest.py",
        "configs/default.toml",
    } <= TRACKED
    assert sorted(TRACKED - entries) == [], "what is missing goes into MANIFEST.in"
    made = {"PKG-INFO"} | {entry for entry in entries if entry.startswith("mcp_broker.egg-info/")}
    assert sorted(entries - SOURCES - made) == []


def test_command_runs_away_from_the_checkout(scripts: Path, away: Path, env: dict[str, str]) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    command = scripts / "mcp-broker"
    assert config["metadata"]["version"] in _run(command, "--version", cwd=away, env=env)
    assert "tools" in _run(command, "tools", "--help", cwd=away, env=env)
    assert list(away.iterdir()) == []


def test_installed_broker_answers_a_call(
    scripts: Path,
    state_dir: Path,
    away: Path,
    env: dict[str, str],
) -> None:
    output = _run(
        *(scripts / "mcp-broker", "call", "--profile", state_dir / "clients" / "default.toml"),
        *("text.word_count", json.dumps({"text": "a b a"})),
        cwd=away,
        env=env,
    )
    assert re.search(r'"a"\s*:\s*2', output), output
    assert re.search(r'"b"\s*:\s*1', output), output
