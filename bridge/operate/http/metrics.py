"""A status as metrics for Prometheus: every figure of it, under names with units, and the delays of this process. Pure.

What is not known has no sample; a rate has none either, for `rate()` of a counter is one. A table has figures of its
own only up to `most` tables, those that are being read first: `bridge_tables_without_metrics` counts the rest.

Source: Prometheus, "Metric and label naming"; the text format by prometheus-client.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import accumulate
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from bridge import __version__, delays
from bridge.delays import BOUNDS, Delays
from bridge.operate.status.parts import NATS, POSTGRES, Index, Running, Slot, Status, Stream, Table
from bridge.source import lsn

WAL_STATUS = ("reserved", "extended", "unreserved", "lost")
TABLE_STATES = ("waiting", "running", "done", "incomplete", "failed")

Samples = Iterable[tuple[Sequence[str], float | None]]


def collected(found: Status | None, age: float, reasons: list[str], *, most: int) -> Iterator[Metric]:
    """All metrics of the bridge.

    Args:
        found: the newest look; None before the first.
        age: how long ago it was, in seconds.
        reasons: why it is not ready; empty where it is.
        most: how many tables have figures of their own.
    """
    yield from _looks(found, age, reasons)
    yield _histogram("bridge_commit_to_ack_seconds", COMMIT_TO_ACK, (), {"": delays.acked})
    if found is None:
        return
    yield from _process(found)
    yield from _slot(found)
    yield from _checkpoint(found)
    yield from _stream(found.stream)
    yield from _tables(found.tables, most)
    yield from _indexes(found.indexes)


def collected_of_indexes(found: Status | None, age: float, reasons: list[str], names: list[str]) -> Iterator[Metric]:
    """The metrics of a process that feeds indexes."""
    yield from _looks(found, age, reasons)
    known = {name: delays.indexed.get(name) or Delays() for name in names}
    yield _histogram("bridge_commit_to_index_seconds", COMMIT_TO_INDEX, ("index",), known)
    if found is not None:
        yield from _indexes([index for index in found.indexes if index.name in names])


COMMIT_TO_ACK = (
    "Time from a transaction's commit in PostgreSQL until the stream has acked it, by the clocks of both machines: of "
    "each batch, the transaction that was committed first."
)
COMMIT_TO_INDEX = (
    "Time from a change's commit in PostgreSQL until the search engine has it, by the clocks of both machines: of each "
    "batch of the reader, the change that was committed first."
)


def _gauge(name: str, what: str, samples: Samples | float | bool | None, labels: Sequence[str] = ()) -> Metric:
    family = GaugeMetricFamily(name, what, labels=labels)
    for values, value in [((), samples)] if isinstance(samples, float | int | None) else samples:
        if value is not None:
            family.add_metric(values, float(value))
    return family


def _counter(name: str, what: str, value: float | None) -> Metric:
    family = CounterMetricFamily(name, what)
    if value is not None:
        family.add_metric((), value)
    return family


def _histogram(name: str, what: str, labels: Sequence[str], known: dict[str, Delays]) -> Metric:
    family = HistogramMetricFamily(name, what, labels=labels)
    bounds = [*(str(bound) for bound in BOUNDS), "+Inf"]
    for value, one in known.items():
        buckets = list(zip(bounds, map(float, accumulate(one.counts)), strict=True))
        family.add_metric([value] if labels else [], buckets, one.sum)
    return family


def _answers(index: Index) -> bool | None:
    return not index.engine.away if index.engine is not None else None


def _astray(index: Index) -> bool | None:
    return index.astray is not None if _answers(index) else None


def _time(text: str) -> float | None:
    return datetime.fromisoformat(text).timestamp() if text else None


def _one_of(current: str, states: Iterable[str]) -> Samples:
    return [((state,), float(state == current)) for state in states]


def _looks(found: Status | None, age: float, reasons: list[str]) -> Iterator[Metric]:
    build = GaugeMetricFamily("bridge_build_info", "Version of bridge, always 1.", labels=["version"])
    build.add_metric([__version__], 1)
    yield build
    yield _gauge("bridge_ready", "Whether everything is in step: 1 where /readyz answers 200.", not reasons)
    yield _gauge("bridge_status_age_seconds", "Age of the look that these figures are of.", age if found else None)
    if found is None:
        return
    yield _counter("bridge_looks_total", "How often the servers have been looked at.", found.number)
    yield _gauge("bridge_in_step", "Whether no problem was found, as `bridge status` says it.", found.in_step)
    levels = [finding.level for finding in found.findings]
    yield _gauge(
        "bridge_findings", "What was found, by its level (problem, note).",
        [((level,), levels.count(level)) for level in ("problem", "note")], ["level"],
    )  # fmt: skip
    servers = {POSTGRES, NATS} | found.away.keys()
    yield _gauge(
        "bridge_server_up", "Whether a server answers.",
        [((name,), name not in found.away) for name in sorted(servers)], ["server"],
    )  # fmt: skip


def _process(found: Status) -> Iterator[Metric]:
    process = found.process

    def known(figure: int) -> int | None:
        return None if NATS in found.away else figure

    yield _gauge(
        "bridge_process_state", "What the bridge does (1): streaming reads the slot.",
        _one_of(process.state, get_args(Running)), ["state"],
    )  # fmt: skip
    yield _gauge("bridge_epoch", "The number of the bridge that writes; each takeover counts on.", known(process.epoch))
    yield _gauge("bridge_lease_start_time_seconds", "When the bridge took its lease.", _time(process.since))
    yield _gauge(
        "bridge_standbys", "Bridges that would take over, and could.", known(sum(not s.why for s in process.standby))
    )
    lag = found.lag
    yield _gauge("bridge_lag_bytes", "WAL by which the checkpoint is behind PostgreSQL.", lag.bytes if lag else None)
    yield _gauge("bridge_lag_seconds", "Time by which the stream is behind PostgreSQL.", lag.seconds if lag else None)


def _slot(found: Status) -> Iterator[Metric]:
    slot: Slot | None = found.slot
    if slot is None:
        return
    yield _gauge("bridge_slot_exists", "Whether PostgreSQL has the replication slot.", slot.exists)
    yield _counter(
        "bridge_postgresql_flushed_wal_bytes_total", "WAL that PostgreSQL has flushed, of all databases: its LSN.",
        lsn.parse(slot.flushed) if slot.flushed else None,
    )  # fmt: skip
    if not slot.exists:
        return
    yield _gauge("bridge_slot_active", "Whether the slot is being read.", slot.active)
    yield _gauge(
        "bridge_slot_wal_status", "PostgreSQL's wal_status of the slot (1).",
        _one_of(slot.wal_status, WAL_STATUS), ["status"],
    )  # fmt: skip
    yield _gauge("bridge_slot_retained_wal_bytes", "WAL that PostgreSQL keeps for the slot.", slot.retained)
    yield _gauge("bridge_slot_limit_bytes", "max_slot_wal_keep_size; no sample: no limit.", slot.limit)
    yield _gauge("bridge_slot_safe_wal_bytes", "WAL that may be written before the slot is in danger.", slot.safe)
    yield _gauge(
        "bridge_slot_lost_in_seconds", "Time until the slot is lost if nothing is confirmed meanwhile.", slot.lost_in
    )
    yield _gauge("bridge_slot_idle_timeout_seconds", "idle_replication_slot_timeout; 0: off.", slot.idle_timeout)
    for name, text in (("confirmed_flush", slot.confirmed_flush), ("restart", slot.restart)):
        what = f"{name}_lsn of the slot as a number of bytes."
        yield _gauge(f"bridge_slot_{name}_lsn_bytes", what, lsn.parse(text) if text else None)


def _checkpoint(found: Status) -> Iterator[Metric]:
    kept = found.checkpoint
    if kept is None:
        return
    yield _gauge("bridge_checkpoint_age_seconds", "Age of the checkpoint.", kept.age)
    yield _gauge("bridge_checkpoint_lsn_bytes", "LSN of the checkpoint as a number of bytes.", lsn.parse(kept.lsn))
    yield _gauge("bridge_checkpoint_sequence", "Sequence of the stream at the checkpoint.", kept.stream_seq)
    missed = sum(one.changes for one in kept.missed.values())
    yield _counter("bridge_unlogged_changes_total", "Changes that PostgreSQL has not logged: no identity.", missed)


def _stream(stream: Stream | None) -> Iterator[Metric]:
    if stream is None:
        return
    yield _gauge("bridge_stream_exists", "Whether the stream is there.", stream.exists)
    if not stream.exists:
        return
    yield _counter("bridge_stream_events_total", "Events ever stored: the stream's last sequence.", stream.last_seq)
    for name, what, value in (
        ("messages", "Messages in the stream.", stream.messages),
        ("size_bytes", "Size of the stream.", stream.bytes),
        ("first_sequence", "First sequence that the stream still has.", stream.first_seq),
        ("first_timestamp_seconds", "When its first message was stored.", _time(stream.first_at)),
        ("last_timestamp_seconds", "When its last message was stored.", _time(stream.last_at)),
        ("replicas", "Replicas of the stream.", stream.replicas),
        ("replicas_behind", "Replicas that are offline or not current.", len(stream.behind)),
        ("has_leader", "Whether the stream has a leader.", stream.replicas == 1 or bool(stream.leader)),
        ("limit_bytes", "max_bytes of the stream; 0: no limit.", stream.max_bytes),
        ("limit_messages", "max_msgs of the stream; 0: no limit.", stream.max_msgs),
        ("limit_age_seconds", "max_age of the stream; 0: no limit.", stream.max_age),
    ):
        yield _gauge(f"bridge_stream_{name}", what, value)
    yield _gauge("bridge_account_used_bytes", "Storage that the NATS account uses.", stream.used)
    yield _gauge("bridge_account_limit_bytes", "Storage that the NATS account may use; 0: no limit.", stream.allowed)


def _tables(tables: list[Table], most: int) -> Iterator[Metric]:
    states = [one.state for one in tables]
    yield _gauge(
        "bridge_tables", "Tables, by the state of their snapshot.",
        [((state,), states.count(state)) for state in TABLE_STATES], ["state"],
    )  # fmt: skip
    again = [one.again.state for one in tables if one.again is not None]
    yield _gauge(
        "bridge_tables_read_again", "Tables that are read once more while the stream flows, by state.",
        [((state,), again.count(state)) for state in ("requested", "running", "waiting", "paused", "failed")],
        ["state"],
    )  # fmt: skip
    rebuildable = sum(1 for one in tables if one.rebuild_from)
    yield _gauge("bridge_tables_rebuildable", "Tables that the stream holds whole.", rebuildable)
    chosen = sorted(tables, key=lambda one: (one.state == "done" and one.again is None, one.name))[:most]
    yield _gauge("bridge_tables_without_metrics", "Tables without figures of their own.", len(tables) - len(chosen))
    for name, what, figures in (
        ("rows", "Rows of the table's snapshot that are in the stream.", [one.rows for one in chosen]),
        ("estimated_rows", "Rows that the table is thought to have.", [one.estimate for one in chosen]),
        ("rebuild_from_sequence", "From where the stream holds it whole; 0: no.", [one.rebuild_from for one in chosen]),
        ("eta_seconds", "Time until its snapshot is done.", [one.eta for one in chosen]),
        ("again_rows", "Rows read in its latest reading.", [one.again.rows if one.again else None for one in chosen]),
        ("again_eta_seconds", "Time left of that.", [one.again.eta if one.again else None for one in chosen]),
    ):
        samples = [((one.name,), value) for one, value in zip(chosen, figures, strict=True)]
        yield _gauge(f"bridge_table_{name}", what, samples, ["table"])


def _indexes(indexes: list[Index]) -> Iterator[Metric]:
    for name, what, value in (
        ("generation", "Number of the generation that searches see.", [one.generation for one in indexes]),
        ("reader_up", "Whether a process feeds the index.", [bool(one.reader) for one in indexes]),
        ("reader_start_time_seconds", "When it took its lease.", [_time(one.reader_since) for one in indexes]),
        ("standbys", "Readers that would take over.", [len(one.standby) for one in indexes]),
        ("rebuilding", "Whether a process rebuilds the index.", [bool(one.builder) for one in indexes]),
        ("engine_up", "Whether its search engine answers.", [_answers(one) for one in indexes]),
        (
            "alias_astray",
            "Whether searches see something else than the live generation.",
            [_astray(o) for o in indexes],
        ),
        ("dead_letters", "Documents that it has refused.", [one.dead for one in indexes]),
        ("changed_keys", "Keys of its configuration that wait for a rebuild.", [len(one.changed) for one in indexes]),
        ("past", "Indexes that were built for a point of the log.", [len(one.past) for one in indexes]),
    ):
        samples = [((one.name,), value) for one, value in zip(indexes, value, strict=True)]
        yield _gauge(f"bridge_index_{name}", what, samples, ["index"])
    of = [(index, one) for index in indexes for one in index.generations]
    for name, what, figures in (
        ("consumer_up", "Whether the generation's consumer is there.", [one.behind is not None for _, one in of]),
        ("behind_events", "Events that it does not have yet.", [one.behind for _, one in of]),
        ("behind_seconds", "Age of the oldest of them.", [one.behind_seconds for _, one in of]),
        ("sequence", "Sequence of the stream up to which it is.", [one.seq for _, one in of]),
        ("done_ratio", "While it is built: the part of the log that it has, 0 to 1.", [one.done for _, one in of]),
        ("eta_seconds", "Time until it has caught up.", [one.eta for _, one in of]),
    ):
        rows = [((index.name, one.physical, one.state), v) for (index, one), v in zip(of, figures, strict=True)]
        yield _gauge(f"bridge_index_{name}", what, rows, ["index", "physical", "state"])
