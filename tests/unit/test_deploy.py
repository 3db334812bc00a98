"""deploy/: what is in there is what the tool of that place takes, and fits the bridge."""

from __future__ import annotations

import configparser
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from bridge import errors
from bridge.cli import app
from bridge.notify import notify

UNITS = sorted((Path(__file__).parents[2] / "deploy" / "systemd").glob("*.service"))
NAMES = [unit.name for unit in UNITS]


def read(unit: Path) -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None)
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read(unit)
    return found


def test_there_is_a_unit_for_the_bridge_and_one_for_each_index() -> None:
    assert NAMES == ["bridge-index@.service", "bridge.service"]


@pytest.mark.parametrize("unit", UNITS, ids=NAMES)
def test_a_unit_runs_a_command_that_there_is_and_stops_it_gently(unit: Path) -> None:
    service = read(unit)["Service"]
    words = service["ExecStart"].split()
    assert words[0] == "/opt/bridge/bin/bridge"
    command = words[words.index("json") + 1]
    assert command in list(app)
    assert service["Type"] == "notify"
    assert int(service["TimeoutStopSec"].removesuffix("s")) >= 30
    never = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert never == {errors.EXIT_USAGE, errors.EXIT_CONTRADICTION}


@pytest.mark.parametrize("unit", UNITS, ids=NAMES)
def test_a_unit_gives_away_no_more_than_it_needs(unit: Path) -> None:
    service = read(unit)["Service"]
    assert service["User"] not in ("root", "0", "")
    assert service["CapabilityBoundingSet"] == ""
    assert service["ProtectSystem"] == "strict"
    assert service["StateDirectory"] == "bridge"
    for key in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "PrivateDevices", "RestrictSUIDSGID"):
        assert service[key] == "true"


@pytest.mark.parametrize("unit", UNITS, ids=NAMES)
def test_systemd_itself_takes_the_unit(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    name = unit.name.replace("@.", "@messages.")
    # As installed here: the program and the user of another machine are none of its business.
    text = unit.read_text().replace("/opt/bridge/bin/bridge", shutil.which("true") or "/bin/true")
    text = "".join(line for line in text.splitlines(True) if not line.startswith(("User=", "Group=")))
    (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / name], capture_output=True, encoding="utf-8", check=False,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )  # fmt: skip
    assert [line for line in done.stderr.splitlines() if name in line] == []
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("abstract", [False, True])
def test_a_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        where = f"@bridge-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
        manager.bind(f"\0{where[1:]}" if abstract else where)
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", where)
        notify("READY=1", "STATUS=x")
        assert manager.recv(100) == b"READY=1\nSTATUS=x"


def test_nobody_has_to_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("", "nonsense", str(tmp_path / "gone")):
        monkeypatch.setenv("NOTIFY_SOCKET", where)
        notify("READY=1")
