"""The failpoints: each listed one is somewhere in the package, and nothing happens where none is armed."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bridge import failpoints
from bridge.errors import ConfigError

PACKAGE = Path(__file__).parents[2] / "bridge"


def reached() -> Counter[str]:
    """The names that the package's calls of `reach` give, which must be plain text."""
    found: Counter[str] = Counter()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "reach":
                [name] = node.args
                assert isinstance(name, ast.Constant), f"{file}:{node.lineno}"
                found[str(name.value)] += 1
    return found


def test_every_listed_failpoint_stands_on_one_line_of_the_package_and_no_other_is_named() -> None:
    assert reached() == Counter(failpoints.POINTS.keys())


@pytest.mark.parametrize(
    "setting",
    ["nowhere:kill", "slot.created", "slot.created:explode", "slot.created:kill:0", "slot.created:kill:x", "a:b:c:d"],
)
def test_what_names_no_failpoint_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError) as refused:
        failpoints.armed(setting)
    assert setting in str(refused.value)
    assert "slot.created" in str(refused.value)


def test_a_bridge_with_an_unknown_failpoint_ends_with_a_usage_error() -> None:
    program = [sys.executable, "-m", "bridge"]
    found = subprocess.run(
        program, env={failpoints.VARIABLE: "nowhere:kill"}, capture_output=True, text=True, check=False, timeout=60
    )
    assert found.returncode == 2
    assert "nowhere:kill names no failpoint" in found.stderr
    assert "Traceback" not in found.stderr


def test_only_the_nth_time_at_the_armed_point_kills() -> None:
    program = "import sys; from bridge.failpoints import reach\nfor name in sys.argv[1:]: reach(name); print(name)"
    command = [sys.executable, "-c", program, *["batch.acked", "batch.written"] * 4]
    found = subprocess.run(
        command, env={failpoints.VARIABLE: "batch.written:kill:3"}, capture_output=True, check=False, timeout=60
    )
    assert found.returncode == -signal.SIGKILL
    assert found.stderr == b"failpoint batch.written: kill\n"
    quiet = subprocess.run(command, env={}, capture_output=True, text=True, check=False, timeout=60)
    assert quiet.returncode == 0
    assert quiet.stdout.split() == command[3:]


def test_without_the_variable_reaching_a_point_does_nothing() -> None:
    assert failpoints.armed("") is failpoints.reach
