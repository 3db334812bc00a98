"""Logs: names that stay, levels that mean something, no storms."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from bridge import log, waiting
from bridge.errors import Unavailable
from bridge.waiting import Backoff
from tests.logged import events

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
_ROW = re.compile(r"^\| `([^`]+)` \| ([a-z, ]+) \|", re.MULTILINE)


def documented() -> dict[str, set[str]]:
    text = OPERATIONS.read_text().partition("| event | level | when |")[2].partition("\n\n")[0]
    return {name: set(levels.split(", ")) for name, levels in _ROW.findall(text)}


def test_every_event_is_documented_with_its_levels_and_none_that_is_not_there() -> None:
    assert documented() == events()


def test_an_event_is_a_few_plain_words() -> None:
    for name in events():
        assert re.fullmatch(r"[A-Za-z' -]{4,40}", name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set; pauses take none."""
    now = [1000.0]

    async def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("bridge.waiting.time.monotonic", lambda: now[0])
    monkeypatch.setattr("bridge.waiting.anyio.sleep", sleep)
    return now


@pytest.mark.anyio
async def test_an_outage_of_a_day_is_a_few_lines_whatever_the_reasons(clock: list[float]) -> None:
    with capture_logs() as said:
        backoff = Backoff("the server")
        begun, number = clock[0], 0
        while clock[0] < begun + 86_400:
            number += 1
            await backoff.wait(Unavailable(f"reason {number % 3 if number < 50 else number}", "waiting"))
        backoff.over()
        await backoff.wait(Unavailable("reason 1", "waiting"))
    names = [line["event"] for line in said]
    assert len(names) < 20
    assert names[:3] == ["waiting"] * 3
    assert names.count("waiting") == waiting.REASONS + 1  # the last one of the next outage
    assert names.count("still waiting") == 8  # after 10, 20, 40, … minutes
    assert names[-2:] == ["back", "waiting"]


def test_what_comes_a_thousand_times_is_said_some_times_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr("bridge.log.time.monotonic", lambda: now[0])
    seldom = log.Seldom(3)
    assert [seldom.admits() for _ in range(10)] == [0, 0, 0, *[None] * 7]
    now[0] += 61
    assert [seldom.admits() for _ in range(2)] == [7, 0]


@pytest.mark.parametrize(
    ("environment", "colored"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
    ],
)
def test_a_terminal_gets_colours_where_it_can_show_them_and_they_are_wanted(
    environment: dict[str, str], colored: bool
) -> None:
    said = "from bridge import log; log.configure(); log.get().warning('waiting', what='a server')"
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM")}
    parent, child = pty.openpty()
    try:
        subprocess.run([sys.executable, "-c", said], stderr=child, env=kept | environment, check=True, timeout=60)
        line = os.read(parent, 4096)
    finally:
        os.close(parent)
        os.close(child)
    assert b"a server" in line
    assert (b"\x1b[" in line) is colored
