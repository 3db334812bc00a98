"""What `bridge check` makes of the facts, also of those that cannot be provoked on the servers of the tests."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from bridge.config import Config, Index, Source, Stream
from bridge.errors import ServerRefused
from bridge.index.dialect import Product
from bridge.index.generation import Generation, IndexRecord
from bridge.operate.checks import clocks, engines, jetstream, postgres, tables
from bridge.operate.checks.catalogue import CATALOGUE, page
from bridge.operate.checks.engines import Disk, State
from bridge.operate.checks.finding import Finding
from bridge.operate.checks.jetstream import Broker, Denied, Trace
from bridge.operate.checks.postgres import Database, Plugin, SlotRow
from bridge.operate.checks.tables import Tables
from bridge.source import connection
from bridge.source.connection import POOLER
from bridge.source.slot import Server, refusals
from bridge.stream.drift import Drift

ROOT = Path(__file__).parents[2]
TODAY = date(2026, 11, 28)
SERVER = Server(150018, "logical", "UTF8", "app", "bridge", may_replicate=True, in_recovery=False, plugins=None)
SLOT = SlotRow("wal2json", "app", active=True, wal_status="reserved", retained=1000)
GOOD = Database(
    server=SERVER, version="15.18", backend=7, greeted=7, slots=10, slots_used=1, senders=10, senders_used=1,
    keep=50 << 30, slot=SLOT,
)  # fmt: skip
STREAM = {
    "created": "c",
    "state": {"messages": 10, "first_seq": 1, "last_seq": 10, "bytes": 100},
    "config": {
        "name": "cdc_main", "subjects": ["cdc.main.>"], "retention": "limits", "storage": "file", "allow_atomic": True,
        "allow_direct": True, "max_age": 0, "max_bytes": -1, "max_msgs": -1, "discard": "old", "num_replicas": 1,
        "duplicate_window": 100_000_000,
    },
}  # fmt: skip
NATS = Broker(where="nats://n", version=(2, 15), max_payload=8 << 20, clustered=False, account={}, stream=STREAM)
CONFIG = Config(source=Source(slot="bridge_main"), stream=Stream(servers=["nats://n"], name="cdc_main", sync="always"))


def found(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(one.id, one.level) for one in findings if one.level != "ok"]


def of_server(**changes: Any) -> Database:
    return msgspec.structs.replace(GOOD, server=msgspec.structs.replace(SERVER, **changes))


def of_slot(**changes: Any) -> Database:
    return msgspec.structs.replace(GOOD, slot=msgspec.structs.replace(SLOT, **changes))


def database(**changes: Any) -> Database:
    return msgspec.structs.replace(GOOD, **changes)


@pytest.mark.parametrize(
    ("facts", "finding", "remedy"),
    [
        (of_server(version=110005), ("postgres.version", "error"), "upgrade"),
        (of_server(version=130020), ("postgres.version", "warning"), "upgrade"),
        (of_server(in_recovery=True), ("postgres.recovery", "error"), "primary"),
        (of_server(wal_level="replica"), ("postgres.wal_level", "error"), "ALTER SYSTEM SET wal_level = logical"),
        (of_server(may_replicate=False), ("postgres.role", "error"), "ALTER ROLE bridge REPLICATION"),
        (of_server(encoding="SQL_ASCII"), ("postgres.encoding", "error"), "UTF8"),
        (of_server(plugins="pgoutput"), ("postgres.plugin_libraries", "error"), "pgoutput, test_decoding, wal2json;"),
        (database(greeted=8), ("postgres.proxy", "error"), "[source] dsn"),
        (database(slot=None, slots_used=10), ("postgres.slots", "error"), "max_replication_slots = 15"),
        (of_slot(active=False), None, ""),
        (database(senders_used=10, slot=None), ("postgres.senders", "error"), "max_wal_senders = 15"),
        (database(senders_used=10), None, ""),
        (of_slot(wal_status="lost"), ("postgres.slot", "error"), "bridge drop --stream --state"),
        (of_slot(reason="idle_timeout"), ("postgres.slot", "error"), "bridge drop --stream --state"),
        (of_slot(wal_status="unreserved"), ("postgres.slot", "error"), "max_slot_wal_keep_size = '1024MB'"),
        (of_slot(safe=10, retained=100 << 20), ("postgres.slot", "warning"), "max_slot_wal_keep_size = '200MB'"),
        (of_slot(safe=100 << 20), None, ""),
        (of_slot(plugin="pgoutput"), ("postgres.slot", "error"), "pg_drop_replication_slot('bridge_main')"),
        (of_slot(database="other"), ("postgres.slot", "error"), "another [source] slot"),
        (of_slot(logical=False), ("postgres.slot", "error"), "another [source] slot"),
        (database(keep=-1), ("postgres.wal_keep", "warning"), "max_slot_wal_keep_size = '50GB'"),
        (database(keep=64 << 20), ("postgres.wal_keep", "warning"), "max_slot_wal_keep_size = '50GB'"),
        (database(keep=None), None, ""),
        (database(idle=3600.0), ("postgres.idle_slot_timeout", "warning"), "idle_replication_slot_timeout = 0"),
        (database(leftover=["bridge_check_1"]), ("postgres.leftover", "warning"), "pg_drop_replication_slot"),
    ],
)  # fmt: skip
def test_what_is_found_of_a_server(facts: Database, finding: tuple[str, str] | None, remedy: str) -> None:
    judged = postgres.judge(facts, "bridge_main", TODAY)
    assert found(judged) == ([finding] if finding else [])
    assert all(remedy in one.next and one.why for one in judged if one.level != "ok")


def test_every_setting_that_will_not_do_is_said_at_once() -> None:
    wrong = of_server(wal_level="minimal", may_replicate=False, encoding="SQL_ASCII", plugins="pgoutput")
    kinds = ["wal_level", "role", "encoding", "plugin_libraries"]
    assert [one.kind for one in refusals(wrong.server)] == kinds
    assert found(postgres.judge(wrong, "s", TODAY)) == [(f"postgres.{kind}", "error") for kind in kinds]


NEWER = msgspec.structs.replace(SERVER, version=170002)


def of_failover(*, failover: bool | None, **changes: Any) -> Database:
    """A server that knows failover slots, and whether the bridge's is one; None where there is none yet."""
    slot = msgspec.structs.replace(SLOT, failover=failover) if failover is not None else None
    return database(server=NEWER, slot=slot, **{"waits_for": "", **changes})


def test_a_standby_wants_a_failover_slot_where_there_are_such() -> None:
    facts = of_failover(failover=False, standbys=1)
    judged = postgres.judge(facts, "bridge_main", TODAY)
    assert found(judged) == [("postgres.failover", "warning")]
    assert "failover = true in [source]" in judged[-1].next
    for fine in (msgspec.structs.replace(facts, standbys=0), database(standbys=1)):
        assert found(postgres.judge(fine, "bridge_main", TODAY)) == []
    assert found(postgres.judge(facts, "bridge_main", TODAY, failover=False)) == [], "nobody wants one"


@pytest.mark.parametrize(
    ("is_one", "wanted", "changes", "ids"),
    [
        (True, None, {"physical": {"s": True}, "waits_for": "s", "synchronized": True}, []),
        (None, True, {"physical": {"s": True}, "waits_for": '"s"', "synchronized": True}, []),
        (False, True, {"physical": {"s": True}, "waits_for": "s", "synchronized": True}, ["failover"]),
        (True, False, {}, ["failover"]),
        (True, True, {}, ["synchronized_standbys", "slot_sync"]),
        (None, False, {}, []),
        (None, None, {"standbys": 2}, []),
    ],
)  # fmt: skip
def test_a_failover_slot_wants_the_settings_that_go_with_it(
    is_one: bool | None, wanted: bool | None, changes: dict[str, Any], ids: list[str]
) -> None:
    judged = found(postgres.judge(of_failover(failover=is_one, **changes), "bridge_main", TODAY, failover=wanted))
    assert judged == [(f"postgres.{id}", "warning") for id in ids]


def test_a_standby_that_the_bridge_waits_for_in_vain_is_an_error() -> None:
    facts = of_failover(failover=True, waits_for="s, t", physical={"t": False}, synchronized=True)
    judged = [one for one in postgres.judge(facts, "bridge_main", TODAY) if one.level != "ok"]
    assert found(judged) == [("postgres.synchronized_standbys", "error")] * 2
    assert "pg_create_physical_replication_slot('s')" in judged[0].next
    assert "primary_slot_name = 't'" in judged[1].next


def test_failover_slots_are_refused_where_there_are_none() -> None:
    assert [one.kind for one in refusals(SERVER, failover=True)] == ["failover"]
    assert refusals(SERVER, failover=False) == refusals(NEWER, failover=True) == []
    assert found(postgres.judge(GOOD, "bridge_main", TODAY, failover=True)) == [("postgres.failover", "error")]


def test_what_trying_the_plugin_says() -> None:
    assert found(postgres.judge_plugin(Plugin(exact=False, sender_timeout=600.0), "app", "bridge")) == []
    assert found(postgres.judge_plugin(Plugin(why="open transactions"), "app", "bridge")) == [
        ("postgres.wal2json", "warning")
    ]
    refused = Plugin(refused="not installed", remedy="install wal2json")
    assert found(postgres.judge_plugin(refused, "app", "bridge")) == [("postgres.wal2json", "error")]
    short = Plugin(exact=True, sender_timeout=60.0)
    assert found(postgres.judge_plugin(short, "app", "bridge")) == [("postgres.wal_sender_timeout", "warning")]
    assert found(postgres.judge_plugin(Plugin(exact=True, sender_timeout=0.0), "app", "bridge")) == []


def test_a_table_that_is_named_twice_is_said_once_for_both_sections() -> None:
    config = msgspec.structs.replace(CONFIG, source=Source(table={"public.t": {}, 'public."t"': {}}))  # type: ignore[dict-item]
    judged = tables.judge(config, Tables(chosen=[]), "bridge", exact=True)
    twice = [one for one in judged if one.level == "error"]
    assert [one.about for one in twice] == ["public.t"]
    assert "only the first counts" in twice[0].what


def test_a_pooler_that_refuses_the_connection_is_named() -> None:
    words = 'connection to server at "127.0.0.1", port 6432 failed: FATAL:  unsupported startup parameter: options'
    error = connection.refusal(psycopg.OperationalError(words), "connecting")
    assert isinstance(error, ServerRefused)
    assert POOLER in error.what
    assert "give its own host and port in [source] dsn" in error.remedy


def test_a_slow_answer_is_no_other_clock() -> None:
    assert clocks.read_at(100.0, 105.0, 110.0).ahead == 0.0
    assert clocks.read_at(100.0, 120.0, 110.0).ahead == 10.0
    assert clocks.read_at(100.0, 90.0, 110.0).ahead == -10.0
    # Told in whole seconds: 99 may have been 99.9.
    assert clocks.read_at(100.2, 99.0, 100.3, coarse=1.0).ahead == pytest.approx(-0.2)
    assert clocks.judge("nats", "n", clocks.Reading(2.9)).level == "ok"
    ahead, behind = (clocks.judge("nats", "n", clocks.Reading(by)) for by in (90.0, -90.0))
    assert (ahead.id, ahead.level, behind.level) == ("clocks.nats", "warning", "warning")
    assert ("ahead of" in ahead.what, "behind" in behind.what) == (True, True)


def broker(**changes: Any) -> Broker:
    return msgspec.structs.replace(NATS, **changes)


def stream(**changes: Any) -> dict[str, Any]:
    return {**STREAM, "config": {**STREAM["config"], **changes}}  # type: ignore[dict-item]


def cluster(**changes: Any) -> dict[str, Any]:
    peers = [{"name": "n2", "current": True}, {"name": "n3", "current": True}]
    return {**stream(num_replicas=3), "cluster": {"leader": "n1", "replicas": peers, **changes}}


THREE = msgspec.structs.replace(CONFIG, stream=msgspec.structs.replace(CONFIG.stream, replicas=3))


@pytest.mark.parametrize(
    ("config", "facts", "findings"),
    [
        (CONFIG, NATS, []),
        (CONFIG, broker(stream=None), []),
        (CONFIG, broker(version=(2, 12)), [("jetstream.version", "warning")]),
        (CONFIG, broker(max_payload=64 << 10), [("jetstream.max_payload", "warning")]),
        (CONFIG, broker(account={"limits": {"max_storage": 0}}), [("jetstream.account", "error")]),
        (CONFIG, broker(account={"storage": 95, "limits": {"max_storage": 100}}), [("jetstream.account", "warning")]),
        (CONFIG, broker(account={"limits": {"max_bytes_required": True}}), [("jetstream.account", "error")]),
        (CONFIG, broker(account={"limits": {"storage_max_stream_bytes": 1 << 30}}), [("jetstream.account", "warning")]),
        (CONFIG, broker(stream=stream(subjects=["other.>"])), [("jetstream.stream", "error")]),
        (CONFIG, broker(stream=stream(allow_atomic=False)), [("jetstream.stream", "error"), ("jetstream.sync", "ok")]),
        (CONFIG, broker(stream=stream(retention="workqueue")), [("jetstream.stream", "error")]),
        (CONFIG, broker(stream=stream(max_age=10**9, discard="new")), [("jetstream.drift", "warning")] * 2),
        (CONFIG, broker(foreign=[Trace(7, "cdc.main.x")]), [("jetstream.writers", "error")]),
        (CONFIG, broker(denied=[Denied("$KV.b.x", "keeps")]), [("jetstream.permissions", "error")]),
        (CONFIG, broker(clustered=True), [("jetstream.replicas", "warning")]),
        (THREE, broker(), [("jetstream.drift", "warning"), ("jetstream.replicas", "error")]),
        (THREE, broker(clustered=True, stream=cluster()), []),
        (THREE, broker(clustered=True, stream=cluster(leader="")), [("jetstream.replicas", "error")]),
        (
            THREE,
            broker(clustered=True, stream=cluster(replicas=[{"name": "n2", "offline": True}])),
            [("jetstream.replicas", "warning")],
        ),
    ],
)
def test_what_is_found_of_nats(config: Config, facts: Broker, findings: list[tuple[str, str]]) -> None:
    judged = jetstream.judge(config, facts)
    assert found(judged) == [one for one in findings if one[1] != "ok"]
    assert all(one.next and one.why for one in judged if one.level != "ok")


def test_a_bucket_that_forgets_is_an_error_and_can_be_mended() -> None:
    info = {
        "state": {"messages": 3, "bytes": 10},
        "config": {
            "name": "KV_bridge",
            "storage": "memory",
            "max_age": 10**9,
            "max_bytes": 100,
            "max_msgs_per_subject": 1,
        },
    }
    judged = [one for one in jetstream.judge(CONFIG, broker(bucket=info)) if one.id == "jetstream.bucket"]
    assert [one.level for one in judged] == ["error", "error", "warning", "warning"]
    fields: dict[str, Any] = {}
    for one in judged:
        fields |= one.fix.fields if one.fix is not None else {}
    assert fields == {"max_age": 0, "max_bytes": -1, "max_msgs_per_subject": 8}


@pytest.mark.parametrize(
    ("drift", "harmless"),
    [
        (Drift("max_age", 10, 0, ""), True),
        (Drift("max_age", 0, 10, ""), False),
        (Drift("max_age", 10, 20, ""), True),
        (Drift("max_bytes", 20, 10, ""), False),
        (Drift("max_bytes", -1, 10, ""), False),
        (Drift("max_bytes", 10, -1, ""), True),
        (Drift("discard", "old", "new", ""), True),
        (Drift("discard", "new", "old", ""), False),
        (Drift("num_replicas", 1, 3, ""), True),
        (Drift("num_replicas", 3, 1, ""), False),
        (Drift("duplicate_window", 5, 1, ""), True),
        (Drift("deny_delete", True, False, ""), False),
    ],
)
def test_only_what_takes_nothing_away_is_set_back(drift: Drift, harmless: bool) -> None:
    assert jetstream.lossless(drift) is harmless


INDEX = Index(table="public.t", alias="posts", url=["http://e"])
LIVE = IndexRecord().of(
    [
        Generation(
            number=1, physical="posts-000001", consumer="c", state="live", shapes={}, settings={}, mapping={},
            origin={}, stream="cdc_main", stream_created="c", first=1, seq=1, alias="posts",
        )
    ]
)  # fmt: skip


@pytest.mark.parametrize(
    ("state", "record", "finding"),
    [
        (State(), None, None),
        (State(aliases={"posts-000001": ["posts"]}), LIVE, None),
        (State(aliases={"posts-000001": ["posts"], "old": ["posts"]}), LIVE, ("engine.alias", "error")),
        (State(aliases={"posts-000001": []}), LIVE, ("engine.alias", "error")),
        (State(aliases={}), LIVE, ("engine.alias", "error")),
        (State(aliases={"posts": []}), None, ("engine.alias", "error")),
        (State(denied=["GET /posts-*/_alias"]), LIVE, ("engine.privileges", "error")),
        (State(lacking=["manage on posts-*"]), None, ("engine.privileges", "error")),
        (State(health={"posts-000001": "red"}), None, ("engine.health", "error")),
        (State(health={"posts-000001": "yellow"}), None, ("engine.health", "warning")),
        (State(settings={"p": {"index.blocks.read_only_allow_delete": "true"}}), None, ("engine.block", "error")),
        (State(settings={"p": {"index.blocks.write": "false"}}), None, None),
    ],
)  # fmt: skip
def test_what_is_found_of_an_index(state: State, record: IndexRecord | None, finding: tuple[str, str] | None) -> None:
    judged = engines.judge_index("posts", INDEX, state, record, [], "")
    assert found(judged) == ([finding] if finding else [])
    assert all(one.next and one.why for one in judged if one.level != "ok")


def test_a_configuration_that_waits_and_a_transform_that_is_not_there_are_warnings() -> None:
    judged = engines.judge_index("posts", INDEX, State(), None, ["fields"], "the transform x:y cannot be loaded")
    assert found(judged) == [("engine.transform", "warning"), ("engine.config", "warning")]
    assert "bridge reindex posts" in judged[-2].next


@pytest.mark.parametrize(
    ("product", "percent", "findings"),
    [
        (Product("opensearch", (2, 19)), 84, []),
        (Product("elasticsearch", (6, 8)), 10, [("engine.product", "error")]),
        (Product(), 10, [("engine.product", "warning")]),
        (Product("elasticsearch", (9, 1)), 85, [("engine.disk", "warning")]),
        (Product("elasticsearch", (9, 1)), 96, [("engine.disk", "error")]),
    ],
)
def test_what_is_found_of_an_engine(product: Product, percent: int, findings: list[tuple[str, str]]) -> None:
    engine = engines.Engine(where="http://e", product=product, disks=[Disk("n", percent)])
    assert found(engines.judge_engine(engine)) == findings


def test_every_id_that_is_said_is_in_the_catalogue_and_every_one_there_is_said() -> None:
    modules = [*(ROOT / "bridge/operate/checks").glob("*.py"), ROOT / "bridge/operate/check.py"]
    text = "".join(file.read_text() for file in modules if file.name != "catalogue.py")
    kinds = "|".join(sorted({id.split(".")[0] for id in CATALOGUE}))
    said = set(re.findall(rf'"((?:{kinds})\.[a-z_0-9]+)"', text))
    wrong = msgspec.structs.replace(
        SERVER, version=1, wal_level="", encoding="SQL_ASCII", may_replicate=False, in_recovery=True, plugins=""
    )
    said |= {f"postgres.{one.kind}" for one in refusals(wrong)}
    said |= {f"{kind}.reachable" for kind in ("postgres", "jetstream", "engine")}
    said |= {f"clocks.{kind}" for kind in ("postgres", "nats", "engine")}
    assert said - CATALOGUE.keys() == set()
    assert CATALOGUE.keys() - said == set()


def test_the_page_lists_every_finding_as_it_is() -> None:
    """`python -m bridge.operate.checks.catalogue` prints what must stand there."""
    assert page() in (ROOT / "docs/operations.md").read_text()
