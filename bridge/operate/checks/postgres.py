"""What the PostgreSQL server, its settings and the slot mean for the bridge. Pure.

Source: PostgreSQL documentation, "Replication", "pg_replication_slots", "Versioning Policy" (ends of life).
"""

from __future__ import annotations

from datetime import date

import msgspec

from bridge.operate.checks.finding import Finding, Fix, warning, well, wrong
from bridge.operate.status.health import size, span
from bridge.source import slot
from bridge.source.catalog import quote_name
from bridge.source.slot import Server

# Last day of each major version's maintenance.
ENDS = {
    12: date(2024, 11, 21),
    13: date(2025, 11, 13),
    14: date(2026, 11, 12),
    15: date(2027, 11, 11),
    16: date(2028, 11, 9),
    17: date(2029, 11, 8),
    18: date(2030, 11, 14),
}
SMALL_KEEP = 1 << 30
SOON = 0.25
LONG = 300.0
MB = 1 << 20


class SlotRow(msgspec.Struct, frozen=True):
    """The bridge's slot; bytes where PostgreSQL tells them, failover None before version 17."""

    plugin: str
    database: str
    active: bool
    wal_status: str
    retained: int = 0
    safe: int | None = None
    failover: bool | None = None
    reason: str = ""
    logical: bool = True


class Database(msgspec.Struct, frozen=True, kw_only=True):
    """What the SQL side says.

    backend: the process that answers queries; greeted: the one that the connection's beginning named. keep: bytes of
    max_slot_wal_keep_size, negative where it is unlimited, None where the server has no such setting; idle: seconds of
    idle_replication_slot_timeout, 0 where it is off. standbys: walsenders that read no logical slot; physical: their
    slots, and whether somebody reads there; waits_for: synchronized_standby_slots, None before PostgreSQL 17;
    synchronized: a standby's worker that synchronizes slots is connected. leftover: slots of a check, with nobody at
    them.
    """

    server: Server
    version: str
    superuser: bool = False
    backend: int = 0
    greeted: int = 0
    slots: int = 0
    slots_used: int = 0
    senders: int = 0
    senders_used: int = 0
    keep: int | None = None
    idle: float = 0.0
    slot: SlotRow | None = None
    standbys: int = 0
    physical: dict[str, bool] = {}
    waits_for: str | None = None
    synchronized: bool = False
    leftover: list[str] = []


class Plugin(msgspec.Struct, frozen=True):
    """What trying out wal2json has shown. exact: whether it tells NaN and infinities; None where it could not be tried,
    and `why` says why not. sender_timeout: as the replication connection has it, in seconds. refused: the server's own
    words where it will not load it, with the remedy."""

    exact: bool | None = None
    why: str = ""
    sender_timeout: float | None = None
    refused: str = ""
    remedy: str = ""


def judge(found: Database, name: str, today: date, *, failover: bool | None = None) -> list[Finding]:
    """Everything but the plugin.

    Args:
        name: the bridge's slot.
        today: tells whose maintenance has ended.
        failover: what the configuration says of it.
    """
    about = found.server.database
    refused = {one.kind: one for one in slot.refusals(found.server, failover=bool(failover))}
    out = [wrong(f"postgres.{kind}", about, one.what, one.remedy) for kind, one in refused.items()]
    good = {
        "recovery": "a primary",
        "wal_level": "wal_level is logical",
        "role": _role(found),
        "encoding": f"the encoding is {found.server.encoding}",
    }
    if found.server.plugins is not None:
        good["plugin_libraries"] = f"output_plugin_libraries is {found.server.plugins}"
    out += [well(f"postgres.{kind}", about, what) for kind, what in good.items() if kind not in refused]
    out += [] if "version" in refused else [_version(found, about, today)]
    return [
        *out,
        _proxy(found, about),
        _slots(found, about, name),
        _senders(found, about),
        _slot(found, name),
        *_kept(found, about, name),
        *_failover(found, name, failover),
        *_leftover(found),
    ]


def _role(found: Database) -> str:
    who = found.server.role
    if found.superuser:
        return f"the role {who} is a superuser; LOGIN, REPLICATION and SELECT on the tables would do"
    return f"the role {who} may replicate"


def _version(found: Database, about: str, today: date) -> Finding:
    major = found.server.version // 10000
    end = ENDS.get(major)
    if end is not None and end < today:
        return warning(
            "postgres.version",
            about,
            f"PostgreSQL {found.version}: version {major} has had no fixes since {end}",
            f"upgrade to a maintained version (the newest here is {max(ENDS)}); docs/recovery.md says what a new"
            " cluster means for the slot",
        )
    until = f", maintained until {end}" if end is not None else ""
    return well("postgres.version", about, f"PostgreSQL {found.version}{until}")


def _proxy(found: Database, about: str) -> Finding:
    if found.backend != found.greeted:
        return wrong(
            "postgres.proxy",
            about,
            f"the connection began with backend {found.greeted}, and backend {found.backend} answers: a pooler is in"
            " between",
            "give the server's own host and port in [source] dsn",
        )
    return well("postgres.proxy", about, "no pooler in between")


def _slots(found: Database, about: str, name: str) -> Finding:
    free = found.slots - found.slots_used
    what = f"{found.slots_used} of {found.slots} replication slots are in use"
    remedy = (
        f"drop one that nobody needs (SELECT slot_name, active FROM pg_replication_slots), or ALTER SYSTEM SET"
        f" max_replication_slots = {found.slots + 5}; then restart PostgreSQL"
    )
    if found.slot is None and free < 1:
        return wrong("postgres.slots", about, f"{what}: none is left for {name}", remedy)
    return well("postgres.slots", about, what)


def _senders(found: Database, about: str) -> Finding:
    free = found.senders - found.senders_used
    what = f"{found.senders_used} of {found.senders} WAL senders are in use"
    remedy = f"ALTER SYSTEM SET max_wal_senders = {found.senders + 5}; then restart PostgreSQL"
    if free < 1 and not (found.slot is not None and found.slot.active):
        return wrong("postgres.senders", about, f"{what}: none is left for the bridge", remedy)
    return well("postgres.senders", about, what)


def _slot(found: Database, name: str) -> Finding:
    row = found.slot
    other = f"give the bridge another [source] slot, or drop that one: SELECT pg_drop_replication_slot('{name}')"
    if row is None:
        return well("postgres.slot", name, "not there yet: `bridge run` makes it")
    if not row.logical or row.plugin != slot.PLUGIN:
        kind = f"of the plugin {row.plugin}" if row.logical else "a physical one"
        return wrong("postgres.slot", name, f"the slot {name} is {kind}", other)
    if row.database != found.server.database:
        what = f"the slot {name} belongs to the database {row.database}, the dsn leads to {found.server.database}"
        return wrong("postgres.slot", name, what, other)
    if row.wal_status == "lost" or row.reason:
        reason = f" ({row.reason})" if row.reason else ""
        lost = slot.lost(name)
        return wrong("postgres.slot", name, f"{lost.what}{reason}", lost.remedy)
    kept = f"PostgreSQL keeps {size(row.retained)} of WAL for it"
    if row.wal_status == "unreserved":
        return wrong(
            "postgres.slot",
            name,
            f"PostgreSQL is about to remove WAL that the slot {name} needs ({size(row.retained)})",
            f"get the bridge going at once, or: ALTER SYSTEM SET max_slot_wal_keep_size ="
            f" '{2 * row.retained // MB + 1024}MB'; SELECT pg_reload_conf()",
        )
    if row.safe is not None and row.safe < SOON * (row.safe + row.retained):
        return warning(
            "postgres.slot",
            name,
            f"{kept}, and after {size(row.safe)} more it is lost (max_slot_wal_keep_size)",
            f"get the bridge going, or: ALTER SYSTEM SET max_slot_wal_keep_size ="
            f" '{2 * (row.safe + row.retained) // MB}MB'; SELECT pg_reload_conf()",
        )
    return well("postgres.slot", name, f"{'being read' if row.active else 'nobody reads it now'}, {kept}")


def _kept(found: Database, about: str, name: str) -> list[Finding]:
    """How long PostgreSQL waits for a bridge that is away."""
    out = []
    if found.keep is not None and found.keep < 0:
        out.append(
            warning(
                "postgres.wal_keep",
                about,
                "max_slot_wal_keep_size is unlimited",
                "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf() (what the disk can spare; a"
                f" slot that reaches it is lost). If the bridge stays away for good: bridge drop gives {name} back",
                why="while a bridge is stopped PostgreSQL keeps all WAL from there on, until its disk is full",
            )
        )
    elif found.keep is not None and found.keep < SMALL_KEEP:
        out.append(
            warning(
                "postgres.wal_keep",
                about,
                f"max_slot_wal_keep_size is {size(found.keep)}",
                "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf() (what the disk can spare)",
                why="that much is written soon: a bridge that is away for a moment loses its slot, and everything is"
                " read again",
            )
        )
    elif found.keep is not None:
        out.append(well("postgres.wal_keep", about, f"max_slot_wal_keep_size is {size(found.keep)}"))
    if found.idle:
        out.append(
            warning(
                "postgres.idle_slot_timeout",
                about,
                f"idle_replication_slot_timeout is {span(found.idle)}",
                "ALTER SYSTEM SET idle_replication_slot_timeout = 0; SELECT pg_reload_conf(); or longer than the bridge"
                " is ever away",
            )
        )
    return out


def _failover(found: Database, name: str, wanted: bool | None) -> list[Finding]:
    """Whether a standby that is promoted has the slot, as far as can be seen from the primary."""
    row = found.slot
    is_one = row is not None and bool(row.failover)
    if found.server.version < slot.FAILOVER_SINCE or (row is not None and row.failover is None):
        return []
    if row is not None and wanted is not None and is_one is not wanted:
        what = f"the slot {name} is {'a' if is_one else 'no'} failover slot, and [source] failover says otherwise"
        restart = "stop the bridge and start it again: it alters the slot before it reads from it"
        out = [warning("postgres.failover", name, what, restart)]
    elif is_one or wanted:
        made = "a failover slot" if is_one else "it will be a failover slot"
        out = [well("postgres.failover", name, f"{made}: standbys that synchronize slots have it, too")]
    elif row is not None and found.standbys and wanted is None:
        many = f"{found.standbys} standby{'s' * (found.standbys != 1)} may read from here"
        what = f"{many}, and the slot {name} is no failover slot"
        out = [warning("postgres.failover", name, what, "failover = true in [source], then start the bridge again")]
    else:
        return []
    return [*out, *_held_back(found), _copied(found)] if wanted or (wanted is None and is_one) else out


def _held_back(found: Database) -> list[Finding]:
    """Whether the bridge reads only what the standbys have; nothing is read while one of them has no slot."""
    id, about = "postgres.synchronized_standbys", found.server.database
    named = [one.strip(' "') for one in (found.waits_for or "").split(",") if one.strip(' "')]
    if not named:
        slots = ", ".join(found.physical) or "standby_1"
        remedy = (
            f"ALTER SYSTEM SET synchronized_standby_slots = '{slots}'; SELECT pg_reload_conf() (the physical slots of"
            " the standbys that may be promoted)"
        )
        why = (
            "the bridge may read a change before a standby has it; once that is promoted, the log holds what the"
            " database never had, and everything is read again"
        )
        return [warning(id, about, "synchronized_standby_slots is empty", remedy, why=why)]
    out = []
    for one in named:
        if one not in found.physical:
            what = f"synchronized_standby_slots names {one}, which is no physical slot: the bridge is sent nothing"
            remedy = (
                f"SELECT pg_create_physical_replication_slot('{one}'), or take it out of synchronized_standby_slots"
            )
            out.append(wrong(id, about, what, remedy))
        elif not found.physical[one]:
            what = f"no standby reads from the slot {one} of synchronized_standby_slots: the bridge is sent nothing"
            remedy = f"get that standby going, with primary_slot_name = '{one}'; or take it out of the setting"
            out.append(wrong(id, about, what, remedy))
    return out or [well(id, about, f"the bridge reads what {', '.join(named)} has got")]


def _copied(found: Database) -> Finding:
    id, about = "postgres.slot_sync", found.server.database
    if found.synchronized:
        return well(id, about, "a standby synchronizes slots")
    return warning(
        id,
        about,
        "no standby is connected that synchronizes slots",
        "on the standby sync_replication_slots = on, hot_standby_feedback = on, primary_slot_name = 'its physical slot"
        f" here', and dbname={about} in primary_conninfo; SELECT pg_reload_conf()",
    )


def _leftover(found: Database) -> list[Finding]:
    drop = [f"SELECT pg_drop_replication_slot('{one}')" for one in found.leftover]
    return [
        warning("postgres.leftover", one, f"nobody uses the slot {one} any more", statement, fix=Fix([statement]))
        for one, statement in zip(found.leftover, drop, strict=True)
    ]


def judge_plugin(found: Plugin, database: str, role: str) -> list[Finding]:
    """What trying out wal2json says of it, and of the connection that it was tried on."""
    out = []
    if found.refused:
        out.append(wrong("postgres.wal2json", database, found.refused, found.remedy))
    elif found.exact is None:
        out.append(
            warning(
                "postgres.wal2json",
                database,
                f"wal2json could not be tried: {found.why}",
                "end the transactions that are open, or free a slot and a WAL sender, and check again",
            )
        )
    else:
        version = "2.6 or newer" if found.exact else "older than 2.6: NaN and infinities arrive as null"
        out.append(well("postgres.wal2json", database, f"wal2json is installed, {version}"))
    timeout = found.sender_timeout
    if timeout and timeout < LONG:
        out.append(
            warning(
                "postgres.wal_sender_timeout",
                database,
                f"wal_sender_timeout is {span(timeout)} on the bridge's connection, which asks for 10 min",
                f"ALTER ROLE {quote_name(role)} SET wal_sender_timeout = '10min'; and see what drops the options that"
                " the bridge gives its connection: a proxy?",
            )
        )
    elif timeout is not None:
        long = "off" if not timeout else span(timeout)
        out.append(well("postgres.wal_sender_timeout", database, f"{long} on the bridge's connection"))
    return out
