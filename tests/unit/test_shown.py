"""What is printed for people: tables may be called anything, and terminals be narrow."""

from __future__ import annotations

import ast
import io

import pytest

from bridge import console, log
from bridge.operate.show import snapshot
from bridge.stream.state import Again, SnapshotStatus
from tests.terminal import terminal

# Markup of rich's that does not close anything, and what clears a terminal or turns the direction of writing.
HOSTILE = ["t[/x]", "[red]", "clear\x1b[2J", "turn\u202eed"]


class Tty(io.StringIO):
    """A terminal that keeps what it is shown."""

    def isatty(self) -> bool:
        return True


def shown(found: snapshot.Tables, columns: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name, value in {"TERM": "xterm", "COLUMNS": str(columns), "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    out = Tty()
    snapshot.told(found, out, asked=False, running=True)
    return [line.rstrip() for line in out.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()]


def a_table(**changes: object) -> SnapshotStatus:
    return SnapshotStatus(state="done", rows=1_234_567, complete_from=42, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bar_says_a_tables_name_as_it_is_and_a_terminal_takes_none_for_a_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal(monkeypatch, 200) as everything, snapshot.initial() as show:
        assert show is not None
        show({("public", name): SnapshotStatus(state="running", rows=1, estimate=2)})
    told = everything()
    assert "1/2" in told
    assert f"public.{name.encode('unicode_escape').decode()}" in told
    assert "\x1b[2J" not in told
    assert "\u202e" not in told


@pytest.mark.parametrize("name", HOSTILE)
def test_a_log_line_and_a_message_are_one_text_without_commands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, 200) as everything:
        log.get().info("table", table=name)
        console.say(name)
    told = everything()
    assert "\x1b" not in told
    assert "\u202e" not in told
    [line] = [line.partition("table=")[2].rstrip() for line in told.splitlines() if "table=" in line]
    assert name == (ast.literal_eval(line) if line.startswith("'") else line)


def test_what_is_told_of_tables_keeps_their_names_whole_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "public.x has no key by which its rows could be read in parts"
    found = {
        ("sales", "customer_orders"): a_table(again=Again(state="running", rows=5, estimate=100, eta=61.0)),
        ("public", "messages"): a_table(),
        ("public", "\u9577\u3044\u540d\u524d"): a_table(again=Again(state="failed", why=why)),
        ("public", "clear\x1b[2J"): a_table(),
    }
    wide, narrow = shown(found, 200, monkeypatch), shown(found, 40, monkeypatch)
    assert len(wide) == 1 + len(found)
    assert wide[0].split("  ")[0] == "table"
    for lines, width in ((wide, 200), (narrow, 40)):
        assert all(len(line) <= width for line in lines)
        text = "\n".join(lines)
        for name in ("sales.customer_orders", "public.messages", "\u9577\u3044\u540d\u524d", r"clear\x1b[2J"):
            assert name in text
        assert "1,234,567" in text
        assert " ".join(text.split()).count("has no key by which its rows could be read in parts") == 1
        assert "\x1b" not in text
    assert "public.messages" in narrow
    assert "  done, 1,234,567 rows, from sequence 42" in narrow
