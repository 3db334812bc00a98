"""What to do with a change or a row that is no valid text. Pure.

PostgreSQL checks what clients send, but not what a cast without a function or an extension makes of it: a text column
of a UTF8 database can hold any bytes, and wal2json passes them on. Nothing of that may reach the stream. Columns that
are not published do no harm; for the others the error names them, never what is in them.
"""

from __future__ import annotations

import msgspec

from bridge.errors import BadRecord
from bridge.source import rows
from bridge.source.rows import Plan
from bridge.source.wal2json import Cell, Record

# What reading such bytes raises: no UTF-8, no JSON, no number, date, array or hexadecimal digits.
ERRORS = (ValueError, msgspec.MsgspecError, RecursionError)


def change(plan: Plan, record: Record, closing: bytes, position: str) -> bytes:
    """The event of a change that `rows.change` could not read, if only columns are at fault that are not published.

    Raises:
        BadRecord: a published column is. Stale: as `rows.change`.
    """
    hidden = {name for name, field in plan.fields.items() if not field.shown}
    readable = msgspec.structs.replace(
        record, columns=_without(record.columns, hidden), identity=_without(record.identity, hidden)
    )
    try:
        payload = rows.change(plan, readable, closing)
        payload.decode()
    except ERRORS:
        cells = [*readable.columns, *readable.identity]
        bad = sorted({cell.name for cell in cells if not _valid(bytes(cell.value))})
        raise refused(plan, bad, f"a change at {position}") from None
    return payload


def row(plan: Plan, line: bytes) -> BadRecord:
    """The error for a line of COPY that could not be read."""
    shown = [name for name, field in plan.fields.items() if field.shown]
    cells = zip(shown, line.rstrip(b"\n").split(b"\t"), strict=False)
    return refused(plan, [name for name, cell in cells if not _valid(cell)], "a row")


def refused(plan: Plan, columns: list[str], what: str) -> BadRecord:
    """The error that names the table and, where they are known, the columns."""
    schema, table = plan.relation.root
    where = f"in {', '.join(columns)} " if columns else ""
    return BadRecord(
        f"{what} of {plan.name} holds {where}what is no valid text",
        f'write a valid value, or leave the column out: [source.table."{schema}.{table}"] exclude',
    )


def _without(cells: list[Cell], hidden: set[str]) -> list[Cell]:
    return [Cell(cell.name, cell.typeoid) if cell.name in hidden else cell for cell in cells]


def _valid(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
