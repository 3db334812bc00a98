"""A rebuild's progress: a bar on a terminal, a few log lines elsewhere."""

from __future__ import annotations

import pytest

from bridge import log
from bridge.index.rebuild import Progress
from bridge.operate import progress as shown
from bridge.operate.agreement import Compared
from bridge.operate.progress import rebuild_progress, verify_progress
from tests.terminal import terminal


def steps() -> list[Progress]:
    return [Progress("replaying", n * 100, 1000, 50.0) for n in range(10)] + [Progress("done", 1000, 1000, 50.0)]


def test_without_a_terminal_there_is_one_line_for_each_phase(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure()
    with rebuild_progress("messages") as progress:
        for step in steps():
            progress(step)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "phase=replaying" in line] == [lines[0]]
    assert "phase=done" in lines[1]
    assert len(lines) == 2
    assert "of=1000" in lines[0]
    assert "seconds_left=20" in lines[0]


def test_on_a_terminal_there_is_a_bar_with_rate_and_time_left_and_logs_stand_above_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with terminal(monkeypatch, 100) as everything, rebuild_progress("messages") as progress:
        progress(Progress("replaying", 200, 1000, 50.0))
        log.get().info("columns added")
    shown = everything()
    assert "messages: replaying" in shown
    assert "200/1000" in shown
    assert "50/s, 16 s left" in shown
    assert shown.index("columns added") < shown.rindex("200/1000")


def test_a_comparison_says_now_and_then_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log.configure()
    with verify_progress() as show:
        show(Compared("public.a", "replaying", 1, 10))
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(shown, "SAY_EVERY", 0.0)
        show(Compared("public.a", "comparing", 5, 10))
    line = capsys.readouterr().err
    assert "comparing" in line
    assert "done=5" in line
    assert "of=10" in line
    assert "table=public.a" in line


def test_on_a_terminal_a_comparison_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, 100) as everything, verify_progress() as show:
        show(Compared("public.a", "comparing", 200, 1000))
    shown = everything()
    assert "public.a: comparing" in shown
    assert "200/1000" in shown
