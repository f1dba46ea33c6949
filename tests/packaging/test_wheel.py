"""What a user gets: the wheel, in an environment that holds nothing else, away from the checkout."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no stale build/ leaks in and none is left behind."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("mcp_broker", "workers"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    _run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, copy),
        cwd=folder,
        timeout_s=120,
    )
    (built,) = folder.glob("*.whl")
    return built


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


def test_wheel_holds_the_packages_their_data_and_nothing_else(wheel: Path) -> None:
    entries = zipfile.ZipFile(wheel).namelist()
    tops = {entry.split("/")[0] for entry in entries if ".dist-info/" not in entry}
    assert tops == {"mcp_broker", "mcp_broker_workers"}
    assert "mcp_broker/py.typed" in entries
    data = [path for path in (ROOT / "workers").rglob("*") if path.suffix in {".csv", ".fasta", ".md"}]
    wanted = {f"mcp_broker_workers/{path.relative_to(ROOT / 'workers')}" for path in data}
    wanted |= {
        str(path.relative_to(ROOT)) for path in (ROOT / "mcp_broker/demo_data").glob("*") if path.is_file()
    }
    assert wanted <= set(entries)


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
