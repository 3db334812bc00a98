"""What is served of a status: readiness, the page's view, metrics; and whose requests are answered."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from prometheus_client.core import Metric

from bridge import delays
from bridge.config import Config, Source, address
from bridge.delays import BOUNDS, Delays
from bridge.index.sight import Astray
from bridge.operate.http import metrics, ready, view
from bridge.operate.http.recent import Recent
from bridge.operate.http.site import owned
from bridge.operate.status.health import judge
from bridge.operate.status.history import History, sample
from bridge.operate.status.live import Live
from bridge.operate.status.parts import Engine, Generation, Index, Lag, Process, Silent, Standby, Status, Table
from bridge.stream.state import Again
from tests.unit.test_health import GOOD, with_

PLANTED = "planted-key-value"
AGAIN = Again(
    state="running",
    key=["id"],
    after=[PLANTED],
    moved=[f'["{PLANTED}"]'],
    where=f"id > '{PLANTED}'",
    rows=5,
    estimate=10,
)


def index(**changes: Any) -> Index:
    live = Generation(1, "t-000001", "live", 100, 0, 0.0)
    return Index("t", "t", "live", 1, "process 8 on host", [msgspec.structs.replace(live, **changes)])


def status(**changes: Any) -> Status:
    return judge(msgspec.structs.replace(GOOD, **{"indexes": [index()], **changes}))


@pytest.mark.parametrize(
    ("found", "age", "why"),
    [
        (status(), 0.5, ""),
        (None, 0.0, "nothing has been looked at yet"),
        (status(), 31.0, "the newest look is 31.0 s old"),
        (status(lag=None), 0.5, "it is not known how far the stream is behind"),
        (status(lag=Lag(100, None)), 0.5, "it is not known for how long the stream has been behind"),
        (status(lag=Lag(100, 29.0)), 0.5, ""),
        (status(lag=Lag(100, 31.0)), 0.5, "the stream is 31.0 s behind PostgreSQL; 30.0 s are in step"),
        (status(process=Process("unknown"), away={"NATS": "gone"}), 0.5, "NATS cannot be asked: gone"),
        (status(indexes=[index(behind=5, behind_seconds=29.0)]), 0.5, ""),
        (status(indexes=[index(behind=5, behind_seconds=31.0)]), 0.5, "t-000001 is 31.0 s behind"),
        (status(indexes=[index(behind=5, behind_seconds=None)]), 0.5, "not known for how long t-000001 has been 5"),
        (status(indexes=[index(behind=None)]), 0.5, "t-000001 has no consumer"),
        (status(indexes=[index(state="building")]), 0.5, "index t has no live generation"),
        (with_("process", state="running", who="x"), 0.5, "the slot is not being read: the bridge is running"),
    ],
)
def test_ready_is_only_what_is_known_to_be_in_step(found: Status | None, age: float, why: str) -> None:
    reasons = ready.reasons(found, age, 30.0)
    assert bool(reasons) == bool(why)
    assert any(why in one for one in reasons) or not why


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"away": {"NATS": "gone"}}, "NATS cannot be asked: gone"),
        ({"away": {"PostgreSQL": "gone"}}, ""),
        ({"indexes": [msgspec.structs.replace(index(), reader="")]}, "no reader feeds index t"),
        (
            {"indexes": [msgspec.structs.replace(index(), reader="", silent=Silent("process 7", 42.0))]},
            "the reader of index t (process 7) has not been heard of for 42.0 s",
        ),
        (
            {"indexes": [msgspec.structs.replace(index(), engine=Engine("http://e", "refused"))]},
            "the search engine of t cannot be asked: refused",
        ),
        (
            {"indexes": [msgspec.structs.replace(index(), astray=Astray("no index has the alias t", ""))]},
            "no index has the alias t",
        ),
        ({"indexes": [index(behind=3, behind_seconds=100.0)]}, "t-000001 is 1 min 40 s behind"),
    ],
)
def test_a_reader_is_ready_when_its_indexes_are(changes: dict[str, Any], why: str) -> None:
    reasons = ready.of_indexes(status(**changes), 0.5, 30.0, ["t"])
    assert reasons == [one for one in reasons if why and why in one]
    assert bool(reasons) == bool(why)
    assert ready.of_indexes(status(**changes), 0.5, 30.0, []) == [one for one in reasons if "NATS" in one]


def test_the_page_sees_neither_keys_nor_conditions() -> None:
    found = status(tables=[Table("public.t", "done", 10, 10, 3, again=AGAIN), Table("public.a", "done", 1, 1, 1)])
    past = History()
    past.add(sample(found, 1.0))
    shown = [view.state(found, past.last, actions=False, jobs=[]), view.tables(found), view.history(past)]
    assert PLANTED not in msgspec.json.encode(shown).decode()
    tables = view.tables(found)
    assert [one["name"] for one in tables] == ["public.t", "public.a"]
    assert tables[0]["again"]["rows"] == 5
    assert tables[0]["again"]["part_of_rows"]


@pytest.mark.parametrize(
    ("subject", "shown"),
    [
        ("cdc.main.public.users", "cdc.main.public.users"),
        ("cdc.main.public.users.planted=2Dkey,5", "cdc.main.public.users"),
        ("cdc.main.public.days.public=2Edays_1.2026-01-31,5", "cdc.main.public.days"),
        ("cdc.main.@message.app.orders", "cdc.main.@message.app.orders"),
        ("other.subject", "another's subject"),
    ],
)
def test_a_subject_is_shown_without_the_rows_key(subject: str, shown: str) -> None:
    config = Config(source=Source(name="main"))
    assert Recent(config, [], Live(config, [])).subject(subject) == shown


def samples(found: Status | None, most: int = 100) -> dict[str, Any]:
    """Every sample as name and labels: value."""
    families: list[Metric] = list(metrics.collected(found, 0.5, [], most=most))
    out: dict[str, Any] = {}
    for family in families:
        assert family.name not in out
        for one in family.samples:
            labels = ",".join(one.labels.values())
            out[f"{one.name}{{{labels}}}" if labels else one.name] = one.value
    return out


def test_so_many_tables_have_figures_of_their_own_those_being_read_first() -> None:
    many = [Table(f"public.t{n:03}", "done", n, n, 1) for n in range(50)]
    reading = Table("public.z", "done", 5, 10, 3, again=AGAIN)
    found = samples(status(tables=[*many, reading]), most=3)
    assert [name for name in found if name.startswith("bridge_table_rows")] == [
        "bridge_table_rows{public.z}", "bridge_table_rows{public.t000}", "bridge_table_rows{public.t001}",
    ]  # fmt: skip
    assert found["bridge_tables_without_metrics"] == 48
    assert found["bridge_tables{done}"] == 51
    assert found["bridge_tables_read_again{running}"] == 1
    assert found["bridge_table_again_rows{public.z}"] == 5
    none = samples(status(tables=many), most=0)
    assert not [name for name in none if name.startswith("bridge_table_")]
    assert PLANTED not in str(found)


def test_a_standby_that_could_not_take_over_is_none() -> None:
    able, unable = Standby("process 9 on host", "", ""), Standby("process 10 on host", "", "", "PostgreSQL refuses")
    found = status(process=Process("streaming", "process 7 on host", 3, "", [able, unable]))
    assert samples(found)["bridge_standbys"] == 1
    assert [one.what for one in found.findings] == [
        "the standby (process 10 on host) could not take over: PostgreSQL refuses"
    ]
    assert not found.in_step


def test_an_alias_that_somebody_moved_is_counted_where_the_engine_answers() -> None:
    def figure(away: str = "", astray: Astray | None = None) -> float | None:
        one = msgspec.structs.replace(index(), engine=Engine("http://e", away), astray=astray)
        return samples(status(indexes=[one])).get("bridge_index_alias_astray{t}")

    assert (figure(), figure(astray=Astray("moved", "")), figure("refused")) == (0.0, 1.0, None)


def test_what_is_not_known_has_no_sample() -> None:
    found = samples(status(slot=None, checkpoint=None, stream=None, lag=None, away={"NATS": "gone"}))
    assert found["bridge_server_up{NATS}"] == 0
    assert found["bridge_server_up{PostgreSQL}"] == 1
    assert not [name for name in found if name.startswith(("bridge_slot", "bridge_stream", "bridge_lag"))]
    assert samples(None)["bridge_ready"] == 1
    assert "bridge_in_step" not in samples(None)


def test_delays_are_counted_into_what_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Delays()
    for seconds in (-5.0, 0.001, 0.0011, 7200.0):
        counted.add(seconds)
    counted.since("2026-01-31T11:00:00.000000Z", 1769857200.5)
    counted.since("no time", 1.0)
    assert sum(counted.counts) == 5
    assert (counted.counts[0], counted.counts[1], counted.counts[-1]) == (2, 1, 1)
    assert counted.counts[BOUNDS.index(0.5)] == 1
    monkeypatch.setattr(delays, "acked", counted)
    found = samples(None)
    assert found["bridge_commit_to_ack_seconds_bucket{+Inf}"] == found["bridge_commit_to_ack_seconds_count"] == 5
    assert found["bridge_commit_to_ack_seconds_bucket{0.001}"] == 2
    assert found["bridge_commit_to_ack_seconds_sum"] == pytest.approx(7200.5021)


@pytest.mark.parametrize(
    ("host", "good"),
    [
        ("localhost", True), ("localhost:9300", True), ("LocalHost.", True), ("127.0.0.1:1", True), ("[::1]:93", True),
        ("10.0.0.7", True), ("bridge:9300", True), ("evil.example", False), ("localhost.evil.example", False),
        ("127.0.0.1.nip.io", False), ("2130706433", False), ("", False), ("localhost:9300:1", False),
        ("[::1", False), ("[evil.example]", False), ("localhost/", False), ("a@localhost", False), ("0x7f.1", False),
    ],
)  # fmt: skip
def test_a_host_is_called_by_a_name_that_only_its_owner_can_give(host: str, good: bool) -> None:
    assert owned(host, {"localhost", "bridge"}) == good


@pytest.mark.parametrize("text", ["", "9300", ":9300", "127.0.0.1", "127.0.0.1:", "a:0", "a:65536", "::1:80", "a b:80"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an address"):
        address(text)


def test_addresses_are_read() -> None:
    assert address("127.0.0.1:9300") == ("127.0.0.1", 9300)
    assert address("[::1]:80") == ("::1", 80)
    assert address("localhost:65535") == ("localhost", 65535)
