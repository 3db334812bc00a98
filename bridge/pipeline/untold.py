"""Changes that do not tell the key of their row, though their table has one. Pure.

Of a table that another session alters while a change of it is decoded, wal2json leaves out primary key and replica
identity, once in some hundred thousand changes. Read again from the slot it has both; what then has none is from a time
without a key. An update or delete is never: PostgreSQL logs none without an identity.
"""

from __future__ import annotations

from bridge.errors import BadRecord, Unavailable
from bridge.source.rows import Plan
from bridge.source.wal2json import Record


def doubt(plan: Plan, record: Record, at: str, doubted: set[str]) -> None:
    """Return where a change at a position tells its table's key, or can be believed that there was none.

    Args:
        plan: what it fits. doubted: of one process: the positions that are read again, and the tables that really had
            no key for a time, which are believed from then on.

    Raises:
        Unavailable: it does not, for the first time. BadRecord: nor does an update or delete when it is read again.
    """
    untold = record.action in ("I", "U", "D") and not record.pk and (plan.full or not record.identity)
    if plan.key or not untold or not plan.relation.key:
        return
    table = f"{record.schema}.{record.table}"
    never = record.action != "I" and not plan.full
    what = f"a change of {table} at {at} does not tell its row, though the table has a key"
    if at not in doubted and (never or table not in doubted):
        doubted.add(at)
        raise Unavailable(what, "reading it again")
    if never:
        raise unfit(what)
    doubted.add(table)


def unfit(what: str) -> BadRecord:
    """The error for a change that no event can be made of."""
    return BadRecord(
        what,
        "report the statements that altered the table; to go on without that change: `bridge drop --yes`, then a start"
        ' with on_gap = "resnapshot", which reads everything anew',
    )
