"""Every finding of `bridge check` by its id: what is looked at, and why it matters. Pure.

docs/operations.md shows it; a test compares.
"""

from __future__ import annotations

import sys
from typing import NamedTuple


class Entry(NamedTuple):
    """What is looked at, which levels it can have besides ok (e: error, w: warning), and why it matters."""

    looks: str
    levels: str
    why: str


CATALOGUE: dict[str, Entry] = {
    "postgres.reachable": Entry(
        "PostgreSQL lets the bridge in and answers",
        "e",
        "nothing can be read; what is away is waited for, what is refused is not",
    ),
    "postgres.version": Entry(
        "the server's major version is 12 or newer, and still maintained",
        "ew",
        "older ones lack what the bridge needs; one without updates keeps the bugs that lose changes or break slots",
    ),
    "postgres.proxy": Entry(
        "the dsn leads to the server itself, not to a pooler",
        "e",
        "locks, exported snapshots and settings belong to a session, and a pooler hands sessions around",
    ),
    "postgres.recovery": Entry(
        "the server is a primary",
        "e",
        "a standby lags behind, and what the bridge writes to WAL cannot be written there",
    ),
    "postgres.wal_level": Entry("`wal_level` is logical", "e", "WAL of another level does not have the rows"),
    "postgres.role": Entry("the role may replicate", "e", "without REPLICATION no slot can be made or read"),
    "postgres.encoding": Entry(
        "the database's encoding is not SQL_ASCII", "e", "its bytes could be any text: events would not be readable"
    ),
    "postgres.plugin_libraries": Entry(
        "`output_plugin_libraries`, where the server has it, lists wal2json",
        "e",
        "newer minor releases load only plugins that are listed",
    ),
    "postgres.wal2json": Entry(
        "wal2json is installed, tried out on a temporary slot, and which options it takes",
        "ew",
        "it is what turns WAL into changes",
    ),
    "postgres.slots": Entry(
        "a replication slot is free, where the bridge has none yet", "ew", "without one there is no stream"
    ),
    "postgres.senders": Entry(
        "a WAL sender is free, where none reads for the bridge", "ew", "each reader of a slot takes one"
    ),
    "postgres.slot": Entry(
        "the bridge's slot: whether it is there, whose it is, and whether PostgreSQL still has its WAL",
        "ew",
        "changes whose WAL is gone are in no log any more",
    ),
    "postgres.wal_keep": Entry(
        "`max_slot_wal_keep_size`: how much WAL is kept for a bridge that is away",
        "w",
        "without a limit a stopped bridge fills PostgreSQL's disk; with a small one the slot is lost soon",
    ),
    "postgres.idle_slot_timeout": Entry(
        "`idle_replication_slot_timeout` (PostgreSQL 18) is off",
        "w",
        "PostgreSQL invalidates the slot of a bridge that is stopped for longer; then everything is read again",
    ),
    "postgres.wal_sender_timeout": Entry(
        "the bridge's own `wal_sender_timeout` counts on its connection",
        "w",
        "wal2json answers nobody while it works through a large transaction: a short one ends the connection for ever",
    ),
    "postgres.failover": Entry(
        "with standbys of PostgreSQL 17 or newer, or `[source] failover`, the slot is a failover slot",
        "ew",
        "a promoted standby has no slot otherwise, and what was written before a new one is made is missing",
    ),
    "postgres.synchronized_standbys": Entry(
        "for a failover slot: `synchronized_standby_slots` names slots that standbys read from",
        "ew",
        "what is read before a standby has it is no part of the database once that is promoted; and PostgreSQL sends"
        " nothing while one that is named is away",
    ),
    "postgres.slot_sync": Entry(
        "for a failover slot: a standby that synchronizes slots is connected",
        "w",
        "only such a standby has the slot once it is promoted",
    ),
    "postgres.leftover": Entry(
        "no slot of an earlier check is left", "w", "each slot makes PostgreSQL keep WAL for it"
    ),
    "tables.published": Entry("`[source] tables` chooses tables", "ew", "nothing else gets into the log"),
    "tables.pattern": Entry(
        "every pattern of `[source] tables` matches a table", "w", "one that matches none may be mistyped"
    ),
    "tables.section": Entry(
        '`[source.table."…"]` is of a published table, and only one section is of each',
        "ew",
        "what a section chooses counts for its table alone: what may not leave does, if it is meant for another name",
    ),
    "tables.columns": Entry(
        '`[source.table."…"]` names columns that are there, and leaves the key alone',
        "ew",
        "one that was renamed is published under its new name; without its key nobody could tell a row",
    ),
    "tables.identity": Entry(
        "every table has a replica identity", "ew", "PostgreSQL does not log updates and deletes of one that has none"
    ),
    "tables.unlogged": Entry(
        "no table that a pattern chooses is UNLOGGED", "w", "neither its rows nor its changes are published"
    ),
    "tables.exact": Entry(
        "wal2json can tell NaN and infinities of the published columns",
        "w",
        "wal2json before 2.6 gives them as null; rows that a snapshot reads have them",
    ),
    "tables.compact": Entry(
        "in compact mode: every table has a key, and its updates leave no TOASTed value out",
        "e",
        "only the last event of a row stays: it must say which row it is, and all of it",
    ),
    "tables.schema": Entry("the role has USAGE on the schemas", "e", "rows of tables in there cannot be read"),
    "tables.select": Entry(
        "the role has SELECT on each published table", "e", "changes come without it, a snapshot does not"
    ),
    "tables.row_security": Entry(
        "no row security hides rows from the role", "e", "a snapshot stops there, rather than leave rows out"
    ),
    "tables.index": Entry(
        "every table of every index is published", "e", "the index waits for rows that never get into the log"
    ),
    "jetstream.reachable": Entry(
        "NATS lets the bridge in, is new enough, and JetStream answers", "e", "the log lives there"
    ),
    "jetstream.version": Entry(
        "the server's version, and what it lacks (atomic batches: 2.12, consumer reset: 2.14)",
        "w",
        "the bridge works around what it lacks, where it can",
    ),
    "jetstream.account": Entry(
        "the account's limits leave room for the log, its streams and its consumers",
        "ew",
        "a full account takes no events: the bridge waits, and PostgreSQL keeps the WAL meanwhile",
    ),
    "jetstream.max_payload": Entry(
        "`max_payload` is 1 MB or more",
        "w",
        "larger rows go through an object store, which is slower to write and read",
    ),
    "jetstream.stream": Entry(
        "the stream is a log: its subjects, limits and mode", "e", "another one would lose events, or hold others' ones"
    ),
    "jetstream.drift": Entry(
        "the stream's configuration is the configured one",
        "w",
        "how far the log reaches back, or who may cut it, differs",
    ),
    "jetstream.bucket": Entry(
        "the state bucket keeps what it is given",
        "ew",
        "checkpoints, leases and index generations are in there; without them nobody knows where to go on",
    ),
    "jetstream.objects": Entry(
        "the object store of large rows keeps what it is given", "ew", "events refer to it: a row that is gone is lost"
    ),
    "jetstream.writers": Entry(
        "nobody but bridges has published to the stream's subjects",
        "e",
        "the bridge stops when it meets such a message, and readers may take it for a change",
    ),
    "jetstream.replicas": Entry(
        "copies of the stream: how many, and whether they are there and in step",
        "ew",
        "what has one copy ends with its disk; a replica that is behind does not count when another one fails",
    ),
    "jetstream.sync": Entry(
        "what an ack stands for, by `[stream] sync`", "e", "PostgreSQL may forget what is durable, and nothing else"
    ),
    "jetstream.permissions": Entry(
        "the user may publish and ask what the bridge must",
        "e",
        "the server drops what a user may not send, and answers nothing",
    ),
    "bridge.lease": Entry("who runs now", "", ""),
    "embedded.store": Entry(
        "the embedded server's folder can be written to and has room", "ew", "a full disk stops JetStream as a whole"
    ),
    "engine.reachable": Entry(
        "an Elasticsearch or OpenSearch answers, and lets the index's reader in",
        "e",
        "the index falls behind until it does",
    ),
    "engine.product": Entry(
        "which engine and version it is", "ew", "types and settings of indexes are chosen by it; older ones lack some"
    ),
    "engine.privileges": Entry(
        "the role may do what a reader and a rebuild must",
        "e",
        "the first request that it may not make ends the reader",
    ),
    "engine.disk": Entry(
        "the engine's disks are below its watermarks", "ew", "above the last one the engine blocks every write"
    ),
    "engine.health": Entry("the index's shards", "ew", "red: a part of it can be neither read nor written"),
    "engine.leftover": Entry(
        "every index that is named as a generation is one that the state bucket knows",
        "w",
        "it takes room, and nothing keeps it up to date",
    ),
    "engine.block": Entry("no setting blocks the index", "e", "writes are refused until it is lifted"),
    "engine.alias": Entry(
        "the alias is on the generation that the record says, and no index has its name",
        "e",
        "searches see something else than what is fed",
    ),
    "engine.config": Entry(
        "the index was built with today's configuration", "w", "what was changed counts from the next rebuild on"
    ),
    "engine.transform": Entry("the transform can be called", "w", "without it no document can be made"),
    "clocks.postgres": Entry(
        "this clock and PostgreSQL's agree",
        "w",
        "the age of leases and lag are told by clocks: who looks may take a living bridge for gone",
    ),
    "clocks.nats": Entry("this clock and the NATS server's agree", "w", "max_age, tombstones and ages go by its clock"),
    "clocks.engine": Entry("this clock and the engine's agree", "w", "times in logs cannot be compared"),
}

LETTERS = {"e": "error", "w": "warning"}


def page() -> str:
    """All of it as the table of docs/operations.md."""
    rows = [
        f"| `{id}` | {one.looks} | {', '.join(LETTERS[letter] for letter in one.levels) or '-'} | {one.why or '-'} |\n"
        for id, one in CATALOGUE.items()
    ]
    return "| id | looked at | can be | why it matters |\n|---|---|---|---|\n" + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(page())
