"""What follows from a status, and the page that shows it."""

from __future__ import annotations

import io
import json
from typing import Any

import msgspec
import pytest
from rich.console import Console

from bridge.operate.show import status as show
from bridge.operate.show import watch
from bridge.operate.status import health
from bridge.operate.status.health import judge, size, span
from bridge.operate.status.parts import (
    Checkpoint,
    Finding,
    Generation,
    Index,
    Lag,
    Process,
    Settings,
    Silent,
    Slot,
    Status,
    Stream,
    Table,
)
from bridge.stream.state import Again, SnapshotStatus

SETTINGS = Settings("auto", "always", "log", 0.0)
SLOT = Slot(
    "bridge_main", exists=True, active=True, wal_status="reserved", confirmed_flush="0/90", restart="0/80",
    retained=4096, flushed="0/A0",
)  # fmt: skip
STREAM = Stream(
    "cdc_main", exists=True, created="c", messages=100, bytes=50_000, first_seq=1, first_at="2026-01-31T10:00:00Z",
    last_seq=100, last_at="2026-01-31T11:00:00.123456789Z", leader="n1",
)  # fmt: skip
CHECKPOINT = Checkpoint("0/A0", 100, "stream", "2026-01-31T11:00:01Z", 1.0, "c")
DONE = SnapshotStatus(state="done", first_seq=3, complete_from=3)
GOOD = Status(
    source="main",
    at="2026-01-31T11:00:02Z",
    settings=SETTINGS,
    process=Process("streaming", "process 7 on host", 3),
    slot=SLOT,
    checkpoint=CHECKPOINT,
    stream=STREAM,
    lag=Lag(0, 0.0),
    tables=[Table("public.t", "done", 10, 10, 3)],
    indexes=[Index("t", "t", "live", 1, "process 8 on host", [Generation(1, "t-000001", "live", 100, 0)])],
)


def with_(part: str, **changes: Any) -> Status:
    """The good status with one part changed."""
    return msgspec.structs.replace(GOOD, **{part: msgspec.structs.replace(getattr(GOOD, part), **changes)})


def test_what_is_good_is_in_step() -> None:
    found = judge(GOOD)
    assert found.findings == []
    assert found.in_step
    assert (found.publishing, found.rebuild) == ("batch", "possible for every table (1)")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (msgspec.structs.replace(GOOD, process=Process("stopped")), "no bridge is running"),
        (msgspec.structs.replace(GOOD, process=Process("running", "process 7")), "does not read the slot"),
        (msgspec.structs.replace(GOOD, away={"NATS": "gone"}), "NATS cannot be asked: gone"),
        (with_("slot", exists=False), "no slot bridge_main"),
        (with_("slot", wal_status="lost"), "removed WAL"),
        (with_("slot", wal_status="unreserved"), "about to remove WAL"),
        (with_("slot", confirmed_flush="0/B0"), "confirmed up to 0/B0, the checkpoint is at 0/A0"),
        (with_("stream", exists=False), "no stream cdc_main"),
        (with_("stream", created="other"), "made again"),
        (with_("stream", last_seq=90, messages=90), "at sequence 100, the stream ends at 90"),
        (with_("stream", messages=98), "2 messages are missing"),
        (with_("stream", replicas=3, leader=""), "no leader"),
        (with_("stream", replicas=3, behind=["n2"]), "n2"),
        (with_("stream", discard="new", max_bytes=51_000), "the stream is full"),
        (with_("stream", discard="new", max_msgs=101), "the stream is full"),
        (with_("stream", used=96, allowed=100), "account is full"),
        (msgspec.structs.replace(GOOD, lag=Lag(64 << 20, 99.0)), "64.0 MB and 99 s behind"),
        (msgspec.structs.replace(GOOD, tables=[Table("public.t", "failed", 0, 0, 0, "x")]), "has failed"),
        (msgspec.structs.replace(GOOD, tables=[Table("public.t", "running", 0, 0, 0, "x")]), "is running"),
        (msgspec.structs.replace(GOOD, indexes=[Index("t", "t", "none", 0, "")]), "not been built"),
        (msgspec.structs.replace(GOOD, indexes=[Index("t", "t", "live", 1, "")]), "no reader feeds index t"),
        (
            msgspec.structs.replace(GOOD, indexes=[Index("t", "t", "live", 1, "", silent=Silent("process 7", 42.0))]),
            "the reader of index t (process 7) has not been heard of for 42.0 s",
        ),
        (
            msgspec.structs.replace(
                GOOD, indexes=[Index("t", "t", "live", 1, "p", [Generation(1, "t-000001", "live", 1, 20_000)])]
            ),
            "20,000 events behind",
        ),
        (
            msgspec.structs.replace(GOOD, indexes=[Index("t", "t", "live", 1, "p", [Generation(1, "x", "live", 1)])]),
            "consumer of x is gone",
        ),
        (
            msgspec.structs.replace(
                with_("stream", atomic=False), settings=msgspec.structs.replace(SETTINGS, publish="batch")
            ),
            "does not allow atomic batches",
        ),
    ],
)
def test_each_thing_that_is_wrong_is_one_problem(status: Status, words: str) -> None:
    found = judge(status)
    assert not found.in_step
    assert [words in finding.what for finding in found.findings].count(True) == 1, found.findings


@pytest.mark.parametrize(
    "status",
    [
        msgspec.structs.replace(GOOD, lag=Lag(64 << 20, 2.0)),
        msgspec.structs.replace(GOOD, lag=Lag(1000, 99.0)),
        with_("stream", max_bytes=50_000),
        with_("stream", messages=51, first_seq=50),
        msgspec.structs.replace(GOOD, tables=[Table("public.t", "incomplete", 0, 0, 0, "rows are missing")]),
        msgspec.structs.replace(GOOD, indexes=[msgspec.structs.replace(GOOD.indexes[0], changed=["columns"])]),
    ],
)
def test_what_is_as_its_operator_wants_it_is_no_problem(status: Status) -> None:
    assert judge(status).in_step


@pytest.mark.parametrize(
    ("kept", "first_seq", "start", "why"),
    [
        (DONE, 1, 3, ""),
        (DONE, 3, 3, ""),
        (DONE, 4, 0, "begins at sequence 4"),
        (SnapshotStatus(state="incomplete"), 1, 0, "are not in the log"),
        (SnapshotStatus(state="incomplete", again=Again(state="requested")), 1, 0, "is being read"),
        (msgspec.structs.replace(DONE, state="incomplete", error="x", again=Again(state="running")), 1, 3, ""),
        (msgspec.structs.replace(DONE, state="incomplete", error="x"), 3, 3, ""),
        (msgspec.structs.replace(DONE, state="incomplete", error="x"), 4, 0, "begins at sequence 4"),
        (SnapshotStatus(state="failed"), 1, 0, "failed"),
        (SnapshotStatus(state="running"), 1, 0, "not complete yet"),
    ],
)
def test_a_table_can_be_rebuilt_from_where_the_stream_has_all_of_it(
    kept: SnapshotStatus, first_seq: int, start: int, why: str
) -> None:
    found = health.table("public.t", kept, msgspec.structs.replace(STREAM, first_seq=first_seq))
    assert found.rebuild_from == start
    assert why in found.why
    assert bool(found.why) == (start == 0)


@pytest.mark.parametrize(
    ("again", "level", "following"),
    [
        (None, "problem", "bridge snapshot public.t"),
        (Again(state="requested"), "note", "it is being read again"),
        (Again(state="paused"), "note", ""),
        (Again(state="failed", where="x"), "problem", "bridge snapshot public.t"),
    ],
)
def test_a_table_whose_rows_ddl_has_changed_is_named(again: Again | None, level: str, following: str) -> None:
    kept = msgspec.structs.replace(DONE, state="incomplete", error="column x renamed", again=again)
    found = judge(msgspec.structs.replace(GOOD, tables=[health.table("public.t", kept, STREAM)]))
    named = [(one.level, one.next) for one in found.findings if "column x renamed" in one.what]
    assert named == [(level, following)]
    assert "public.t: incomplete, column x renamed" in page(found)


@pytest.mark.parametrize(
    ("again", "level", "command"),
    [
        (Again(state="failed", why="no right"), "problem", "`bridge snapshot public.t --resume`, or --cancel"),
        (Again(state="failed", why="no column x", where="x"), "note", "`bridge snapshot public.t --cancel` ends it"),
        (Again(state="waiting", why="a lock"), "problem", "it goes on by itself"),
        (Again(state="waiting", why="a lock", where="x"), "note", "it goes on by itself"),
        (Again(state="paused"), "note", "--cancel"),
    ],
)
def test_a_reading_that_rests_is_no_problem_where_it_is_of_a_part_alone(again: Again, level: str, command: str) -> None:
    kept = msgspec.structs.replace(DONE, again=again)
    found = judge(msgspec.structs.replace(GOOD, tables=[health.table("public.t", kept, STREAM)]))
    [one] = found.findings
    assert (one.level, found.in_step) == (level, level == "note")
    assert again.why in one.what
    assert command in one.next


def test_no_line_of_an_output_ends_with_blanks() -> None:
    text = page(msgspec.structs.replace(GOOD, away={"NATS": "gone"}))
    assert text.count("\n") > 10
    assert [line for line in text.split("\n") if line.endswith(" ")] == []


def test_a_compacted_stream_may_begin_behind_the_last_complete_picture() -> None:
    found = health.table("public.t", DONE, msgspec.structs.replace(STREAM, first_seq=4, compacted=True))
    assert (found.rebuild_from, found.why) == (3, "")


def test_a_table_that_cannot_be_rebuilt_is_named_with_the_reason() -> None:
    tables = [Table("public.t", "done", 1, 1, 3), Table("public.u", "done", 1, 1, 0, "the stream begins at 9")]
    found = judge(msgspec.structs.replace(GOOD, tables=tables))
    assert found.rebuild == "possible for 1 of 2 tables, not for public.u: the stream begins at 9"
    assert [(f.level, "public.u" in f.what) for f in found.findings] == [("note", True)]


@pytest.mark.parametrize(
    ("sync", "held", "words"),
    [("always", 0.0, "syncs before it acks"), ("replicated", 0.0, "majority"), ("2m", 120.0, "120 s")],
)
def test_what_sync_means_is_said(sync: str, held: float, words: str) -> None:
    assert words in judge(msgspec.structs.replace(GOOD, settings=Settings("auto", sync, "log", held))).durability


def page(found: Status) -> str:
    out = io.StringIO()
    show.page(found, out)
    return out.getvalue()


def test_the_page_has_every_part_and_fits_a_terminal_of_a_hundred_lines() -> None:
    text = page(judge(GOOD))
    for words in (
        "bridge main: in step",
        "running, reading the slot, process 7 on host, epoch 3",
        "bridge_main: active, WAL reserved",
        "keeps 4.0 KB of WAL",
        "0/A0 at sequence 100, 1.0 s ago",
        "100 messages, 48.8 KB, no limits",
        "reaches back to sequence 1 of 2026-01-31 10:00:00",
        "ends at sequence 100 of 2026-01-31 11:00:00",
        "1 of 1 complete",
        "t-000001: live, at sequence 100, 0 events behind",
    ):
        assert words in text
    assert len(text.splitlines()) < 25


def test_the_page_shows_what_is_known_where_everything_is_away() -> None:
    away = Status(
        source="main", at="2026-01-31T11:00:02Z", settings=SETTINGS, away={"PostgreSQL": "gone", "NATS": "gone, too"}
    )
    text = page(judge(away))
    assert "needs a look" in text
    assert text.count("unknown") >= 4
    assert "✗ NATS cannot be asked: gone, too" in text


def test_the_page_shows_limits_replicas_and_a_snapshot_on_its_way() -> None:
    stream = msgspec.structs.replace(
        STREAM, replicas=3, behind=["n3"], max_bytes=1 << 30, max_age=90_000.0, discard="new", messages=0
    )
    tables = [Table("public.t", "running", 1000, 5000, 0, "not yet"), Table("public.u", "done", 1, 1, 1)]
    text = page(judge(msgspec.structs.replace(GOOD, stream=stream, tables=tables, slot=None, checkpoint=None)))
    for words in ("max_bytes 1.0 GB", "max_age 1 d 1 h", "discard new", "3 replicas, leader n1, behind: n3"):
        assert words in text
    assert "public.t: running, 1,000 rows of about 5,000" in text
    assert "empty; 100 messages were removed" in text


def test_json_has_everything() -> None:
    found = judge(GOOD)
    shown = json.loads(show.as_json(found))
    assert shown["in_step"] is True
    assert shown["slot"]["retained"] == 4096
    assert shown["indexes"][0]["generations"][0]["behind"] == 0
    assert msgspec.convert({k: v for k, v in shown.items() if k != "in_step"}, Status) == found


@pytest.mark.parametrize("lost", [{"wal_status": "lost"}, {"reason": "wal_removed"}])
def test_a_lost_slot_comes_first_and_nothing_beside_it_says_to_start_a_bridge(lost: dict[str, str]) -> None:
    slot = msgspec.structs.replace(SLOT, active=False, **lost)
    away = {"search engine at e": "gone"}
    found = judge(msgspec.structs.replace(GOOD, process=Process("stopped"), slot=slot, away=away))
    assert found.findings[0].what.startswith("PostgreSQL removed WAL")
    assert [one.next for one in found.findings if "bridge run" in one.next] == [found.findings[0].next]
    assert "no bridge is running" in [one.what for one in found.findings]


def test_problems_come_before_notes() -> None:
    tables = [Table("public.t", "incomplete", 0, 0, 0, "x"), Table("public.u", "failed", 0, 0, 0, "y")]
    found = judge(msgspec.structs.replace(GOOD, tables=tables)).findings
    assert [finding.level for finding in found] == ["problem", "note"]
    assert all(isinstance(finding, Finding) for finding in found)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KB"), (5 << 30, "5.0 GB"), (3 << 40, "3.0 TB")]
)
def test_sizes_are_for_people(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0.4 s"), (61, "1 min 1 s"), (3600, "1 h"), (90_061, "1 d 1 h"), (7290, "2 h 1 min")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_no_name_is_a_command_to_a_terminal_and_an_encoding_that_lacks_a_letter_gets_an_escape() -> None:
    found = judge(msgspec.structs.replace(GOOD, tables=[Table("public.\x1b[2Jgröße\n", "incomplete", 0, 0)]))
    assert r"public.\x1b[2Jgröße\n: incomplete" in page(found)
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show.page(found, ascii_only)
    ascii_only.seek(0)
    text = ascii_only.read()
    assert r"public.\x1b[2Jgr\xf6\xdfe\n: incomplete" in text
    assert "\nx public." in text
    assert "\n  -> bridge snapshot" in text


def fitted(found: Status, columns: int, rows: int) -> list[str]:
    """What a terminal of that size shows."""
    out = io.StringIO()
    console = Console(file=out, width=columns, height=rows, color_system=None)
    console.print(watch._fitted(judge(found), console, show.Signs("✗", "·", "→")), end="")
    return [line.rstrip() for line in out.getvalue().split("\n")]


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (GOOD, ["in step", "lag none", "1 of 1 tables complete", "index t live, 0 events behind"]),
        (with_("process", state="stopped"), ["needs a look", "lag none", "✗ no bridge is running", "→ start it"]),
        (
            msgspec.structs.replace(
                GOOD, process=Process("stopped"), lag=Lag(100 << 20, 120.0), away={"search engine": "refused"},
                indexes=[msgspec.structs.replace(GOOD.indexes[0], reader=""), GOOD.indexes[0]],
            ),
            ["lag 100.0 MB", "2 of 2 indexes live", "engine cannot be asked", "no bridge", "120 s", "no reader feeds"],
        ),
    ],
)  # fmt: skip
def test_a_terminal_of_40_columns_and_12_lines_shows_what_matters(found: Status, wanted: list[str]) -> None:
    page = fitted(found, 40, 12)
    assert len(page) == 12
    assert max(map(len, page)) <= 40
    assert [one for one in wanted if one not in " ".join(page)] == []
    assert "more lines" in page[-1]
    assert "more lines" not in fitted(found, 100, 100)[-1]
