"""What is installed runs outside of the checkout: a wheel in an environment of its own, against real servers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_bytes
from pathlib import Path

import anyio
import pytest

from bridge import __version__
from bridge.embedded import NatsServer, until
from tests.running import execute, source, toml

ROOT = Path(__file__).parents[2]
SITE = sysconfig.get_path("purelib")


def run(*command: str | Path, cwd: Path, seconds: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command that knows nothing of the checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PG", "BRIDGE_"))}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env={**kept, **env}, input="", capture_output=True, encoding="utf-8", timeout=seconds, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel, built from a copy: the build leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "nats-server.conf"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "bridge", copy / "bridge", ignore=shutil.ignore_patterns("__pycache__"))
    done = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, copy, cwd=folder)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a new environment with the wheel; what it depends on is borrowed from ours."""
    home = tmp_path_factory.mktemp("env") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    done = run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=home)
    assert done.returncode == 0, done.stderr
    (site,) = (home / "lib").glob("python*/site-packages")
    # A folder that is named so is searched, but its own .pth files, such as that of an editable install, are not read.
    (site / "borrowed.pth").write_text(f"{SITE}\n")
    return home / "bin"


def test_everything_that_is_read_at_run_time_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        found = message_from_bytes(archive.read(metadata))
    data = {
        f"bridge/{file.relative_to(ROOT / 'bridge')}"
        for file in (ROOT / "bridge").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert data | {"bridge/nats-server.conf", "bridge/py.typed", "bridge/events.schema.json"} <= names
    assert not [name for name in names if name.startswith(("tests/", "bench/"))]
    assert found["Version"] == __version__
    assert "Typing :: Typed" in found.get_all("Classifier", [])
    assert {"embedded", "demo", "dev"} <= set(found.get_all("Provides-Extra", []))


def test_the_installed_command_knows_its_version_and_helps(installed: Path, tmp_path: Path) -> None:
    version = run(installed / "bridge", "--version", cwd=tmp_path)
    assert (version.returncode, version.stdout.strip()) == (0, __version__)
    where = run(installed / "python", "-c", "import bridge; print(bridge.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(installed.parent))
    helped = run(installed / "bridge", "--help", cwd=tmp_path)
    assert "reindex" in helped.stdout
    mistaken = run(installed / "bridge", "statsu", cwd=tmp_path)
    assert "did you mean status?" in mistaken.stderr


@pytest.mark.anyio
async def test_the_installed_bridge_streams_a_database(
    installed: Path, pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    (tmp_path / "bridge.toml").write_text(toml(config))
    checked = await anyio.to_thread.run_sync(lambda: run(installed / "bridge", "check", cwd=tmp_path))
    assert checked.returncode in (0, 1), checked.stderr
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PG", "BRIDGE_"))}
    output = tmp_path / "output"
    with output.open("wb") as file:
        process = await anyio.open_process([installed / "bridge"], cwd=tmp_path, env=kept, stdout=file, stderr=file)
    try:
        await until(lambda: "streaming " in output.read_text(), 60, "the bridge streams")
        replayed = await anyio.to_thread.run_sync(lambda: run(installed / "bridge", "replay", cwd=tmp_path))
        assert '"key":{"id":1}' in replayed.stdout
    finally:
        process.terminate()
        with anyio.fail_after(60):
            assert await process.wait() == 0


def test_the_installed_embedded_server_finds_its_configuration(installed: Path, tmp_path: Path) -> None:
    done = run(
        installed / "bridge", "replay", cwd=tmp_path, BRIDGE_STREAM__SERVERS="embedded",
        PATH=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
    )  # fmt: skip
    assert "there is no stream cdc_main" in done.stderr or "cdc_main" in done.stderr
    assert done.returncode == 4


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_the_shell_can_read(installed: Path, shell: str, tmp_path: Path) -> None:
    done = run(installed / "bridge", "completion", shell, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("reindex", "--drop-old", "snapshot"):
        assert word.removeprefix("--") in done.stdout
    script = tmp_path / "script"
    script.write_text(done.stdout)
    if shutil.which(shell):
        read = run(shell, "-n", script, cwd=tmp_path)
        assert (read.returncode, read.stderr) == (0, "")


def test_bash_completes_commands_and_options(installed: Path, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(run(installed / "bridge", "completion", "bash", cwd=tmp_path).stdout)
    asking = """
        source ./script; name=$(complete -p bridge | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        complete_() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
                      "$name" bridge "${!#}" ""; echo "${COMPREPLY[@]}"; }
        complete_ bridge re; complete_ bridge reindex --d
    """
    done = run("bash", "-c", asking, cwd=tmp_path)
    commands, options = done.stdout.splitlines()
    assert {"reindex", "replay"} <= set(commands.split()), done.stderr
    assert {"--drop-old", "--dry-run"} <= set(options.split())
