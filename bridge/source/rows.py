"""Changes and snapshot rows as the bytes of events. Pure.

A `Plan` holds what all events of one table share, worked out once: the columns' names as JSON, how each type is
written, which columns are the key. `Stale` says that a change does not fit the plan, because the table was altered: the
caller reads the catalogue again, and where that does not fit either (the change is older), `Plan.adapted` takes what
the change itself says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from bridge import event
from bridge.source.catalog import Relation, quote_name
from bridge.source.copied import Column, Lines
from bridge.source.leaving import Leaving, Mask
from bridge.source.values import NUMBERS, Codec, Convert, Wire
from bridge.source.wal2json import Cell, Record

NO_KEY = NULL = b"null"
EVERYTHING = Leaving()


class Stale(Exception):
    """A change has other columns than the plan."""


class Field(NamedTuple):
    """One column: `label` is `,"name":`; `convert` is None where wal2json's value is right as it is, `text` takes what
    COPY prints."""

    label: bytes
    oid: int
    convert: Wire | None
    text: Convert
    shown: bool
    key: bool


class Usual(NamedTuple):
    """What most changes of a table look like: every column is there, in the table's order, and the key stays.

    insert, update: the event with places for the key's values, the shown columns', the LSN and the closing.
    converts: the columns, by their place, whose values cannot pass as they are; shown: the places of what may be
    published, None where that is all; key: the places of the key's columns.
    """

    names: list[str]
    oids: list[int]
    converts: list[tuple[int, Wire]]
    shown: list[int] | None
    key: list[int]
    key_names: list[str]
    pk: list[str] | None
    insert: bytes
    update: bytes


class Plan(msgspec.Struct):
    """How one table's events are written. `subject` is where they go, `name` what errors call the table; `hidden` is
    what may not be published, whether or not the table has such columns today; `root_key` the key of the whole table;
    `ordered` whether a row has to have its columns in the order of `fields`; `numbers` PostgreSQL's of the columns of
    the whole table, by the names that they have here, where that is known; of `masks` and `dropped` see `Leaving`;
    `usual` follows from the others."""

    relation: Relation
    name: str
    subject: bytes
    source: str
    heads: dict[str, bytes]
    closing: bytes
    fields: dict[str, Field]
    key: tuple[str, ...]
    toast: frozenset[str]
    full: bool
    by_primary_key: bool
    root_key: tuple[str, ...] = ()
    ordered: bool = False
    numbers: Mapping[str, int] = {}
    exact_numbers: bool = False
    hidden: frozenset[str] = frozenset()
    masks: Mapping[str, Mask] = {}
    dropped: frozenset[str] = frozenset()
    usual: Usual | None = None

    def __post_init__(self) -> None:
        self.usual = _usual(self)

    def adapted(
        self, record: Record, codecs: Mapping[int, Codec], before: Plan | None, *, placed: bool = False
    ) -> Plan:
        """This plan with a change's own columns and key, for a change older than what the catalogue says.

        `before` is the plan that fitted until now: what it knows of TOASTed columns goes on, unless this plan has the
        table as it was then (`placed`).
        """
        known = before or self
        large = self if placed else known
        hidden = self.hidden | {name for name, found in self.fields.items() if not found.shown}
        primary = tuple(column.name for column in record.pk)
        if set(primary) == set(self.key):
            primary = self.key
        key = primary if self.by_primary_key else self.key
        full = self.full or was_full(record, (self.key, known.key))
        if record.identity and not full:
            key = tuple(cell.name for cell in record.identity)
            key = self.key if set(key) == set(self.key) else key
        elif not self.full and full:
            key = primary
        # An insert has every column, an update all but TOASTed ones that did not change, a delete only the old key.
        whole, shown = full and was_full(record, (key,)), {cell.name for cell in record.columns}
        fields = {
            name: found
            for name, found in large.fields.items()
            if record.action == "D" or (record.action == "U" and name in large.toast and not whole)
        }
        cells = [*record.columns, *(record.identity if whole or not record.columns else ())]
        for cell in {cell.name: cell for cell in cells}.values():
            fields[cell.name] = field(
                cell.name, cell.typeoid, codecs[cell.typeoid], cell.name in key, exact_numbers=self.exact_numbers,
                mask=self.masks.get(cell.name),
            )  # fmt: skip
        by_primary_key = (self.by_primary_key or full) and key == primary
        key = key if all(name in fields and name not in hidden and name not in self.masks for name in key) else ()
        return msgspec.structs.replace(
            self,
            fields={name: found._replace(shown=name not in hidden) for name, found in fields.items()},
            key=key,
            root_key=key if set(self.root_key) == set(self.key) else self.root_key,
            toast=large.toast | ({cell.name for cell in record.identity} - shown if whole and shown else set()),
            full=full,
            by_primary_key=by_primary_key,
            ordered=False,
            numbers={},
        )


def was_full(record: Record, keys: Iterable[Sequence[str]]) -> bool:
    """Whether a change was written while the table's replica identity was FULL: its old row has more than the key.

    Args:
        keys: those that the table is known to have, or have had.
    """
    old, primary = {cell.name for cell in record.identity}, {column.name for column in record.pk}
    known = [set(key) for key in keys]
    if not old or old in known:
        return False
    return old > primary if primary else any(key and old > key for key in known)


def _usual(plan: Plan) -> Usual | None:
    """The plan's usual changes; None where there is no telling them apart by columns alone."""
    fields = list(plan.fields.items())
    places = {name: place for place, (name, _) in enumerate(fields)}
    if not fields or any(name not in places for name in plan.key):
        return None
    shown = [place for place, (_, found) in enumerate(fields) if found.shown]

    def row(names: Iterable[str]) -> bytes:
        return b"{%b}" % b"".join(plan.fields[name].label.replace(b"%", b"%%") + b"%b" for name in names)[1:]

    key = row(plan.key) if plan.key else b"null"
    rest = b',"key":%b,"after":%b%b,"lsn":"%%b"%%b' % (
        key, row(name for name, found in fields if found.shown), plan.closing.replace(b"%", b"%%")
    )  # fmt: skip
    return Usual(
        names=[name for name, _ in fields],
        oids=[found.oid for _, found in fields],
        converts=[(place, found.convert) for place, (_, found) in enumerate(fields) if found.convert is not None],
        shown=None if len(shown) == len(fields) else shown,
        key=[places[name] for name in plan.key],
        key_names=list(plan.key),
        pk=list(plan.key) if plan.by_primary_key else None,
        insert=plan.heads["insert"].replace(b"%", b"%%") + rest,
        update=plan.heads["update"].replace(b"%", b"%%") + rest,
    )


def field(
    name: str, oid: int, codec: Codec, key: bool, *, exact_numbers: bool = False, mask: Mask | None = None
) -> Field:
    """The field for a column; with `exact_numbers` the plugin sends numbers as strings."""
    raw = codec.raw and not (exact_numbers and oid in NUMBERS)
    label = b"," + event.quote(name) + b":"
    if mask is not None:
        wire: Wire = bytes if raw else codec.wire
        return Field(label, oid, lambda value: mask(wire(value)), lambda text: mask(codec.convert(text)), True, key)
    return Field(label, oid, None if raw else codec.wire, codec.convert, True, key)


def plan(
    relation: Relation,
    source: str,
    subject: str,
    codecs: Mapping[int, Codec],
    exclude: Iterable[str] = (),
    *,
    unsure: Iterable[str] = (),
    root_key: Sequence[str] | None = None,
    exact_numbers: bool = False,
    chosen: Leaving = EVERYTHING,
) -> Plan:
    """The plan for a table as the catalogue has it; a change that has one of the columns `unsure` does not fit it.

    Args:
        exclude: what is not published beside what is not `chosen`. root_key: the key of the whole table, where it is a
            partition.

    Raises:
        ConfigError: a column of the key is left out or masked.
    """
    hidden = chosen.hidden(c.name for c in relation.columns).union(exclude)
    chosen._replace(exclude=chosen.exclude.union(exclude)).refuse(relation.root, relation.key)
    schema, table = relation.root
    fields = {
        c.name: field(
            c.name,
            c.oid,
            codecs[c.oid],
            c.name in relation.key,
            exact_numbers=exact_numbers,
            mask=chosen.masks.get(c.name),
        )._replace(shown=c.name not in hidden and not c.virtual)
        for c in relation.columns
        if c.name not in unsure
    }
    partition = f"{_bare(relation.schema)}.{_bare(relation.table)}" if relation.is_partition else None
    return Plan(
        relation=relation,
        name=relation.name,
        subject=subject.encode(),
        source=source,
        heads={
            op: event.head(op, source, schema, table)
            for op in ("insert", "update", "delete", "truncate", "read", "snapshot")
        },
        closing=event.tail(partition),
        fields=fields,
        key=relation.key,
        toast=frozenset(c.name for c in relation.columns if c.toast and not c.virtual),
        full=relation.identity == "f",
        by_primary_key=relation.identity in ("d", "f"),
        root_key=relation.key if root_key is None else tuple(root_key),
        # Where names are exchanged, and maybe exchanged back, nothing else tells that.
        ordered=relation.oid > 0,
        exact_numbers=exact_numbers,
        hidden=frozenset(hidden),
        masks=chosen.masks,
        dropped=chosen.dropped,
    )


def _bare(name: str) -> str:
    return name if re.fullmatch(r"[a-z_][a-z0-9_$]*", name) else quote_name(name)


def change(plan: Plan, record: Record, closing: bytes) -> bytes:
    """The event for an insert, update, delete or truncate; `closing` is its transaction's.

    Raises:
        Stale: the record has columns that the plan does not know, or lacks some that must be there.
    """
    return _quick(plan, record, closing) or _careful(plan, record, closing)


def _quick(plan: Plan, record: Record, closing: bytes) -> bytes:
    """The event of a usual insert or update, most of it prepared; empty for any other change."""
    usual, columns = plan.usual, record.columns
    if usual is None or not columns or [c.name for c in columns] != usual.names:
        return b""
    if [c.typeoid for c in columns] != usual.oids or (usual.pk is not None and [c.name for c in record.pk] != usual.pk):
        return b""
    values: list[bytes | msgspec.Raw] = [c.value for c in columns]
    if record.action == "I":
        form = usual.insert
    elif plan.full or [c.name for c in record.identity] != usual.key_names:
        return b""
    else:
        for cell, place in zip(record.identity, usual.key, strict=True):
            if cell.value != values[place]:
                return b""
        form = usual.update
    for place, convert in usual.converts:
        values[place] = convert(columns[place].value)
    shown = values if usual.shown is None else [values[place] for place in usual.shown]
    return form % (*[values[place] for place in usual.key], *shown, record.lsn.encode(), closing)


def _careful(plan: Plan, record: Record, closing: bytes) -> bytes:
    """The event of any change."""
    lsn = b',"lsn":"%s"' % record.lsn.encode()
    if plan.by_primary_key and record.action != "T":
        # The key may have changed without any column: the record tells what it was.
        if len(record.pk) != len(plan.key):
            raise Stale
        for column in record.pk:
            if column.name not in plan.key:
                raise Stale
    if plan.ordered and record.columns:
        names = iter(plan.fields)
        if not all(cell.name in names for cell in record.columns):
            raise Stale
    if record.action == "I":
        after, values = _cells(plan, record.columns)
        if len(values) != len(plan.fields):
            raise Stale
        return b'%s,"key":%s,"after":%s%s%s%s' % (
            plan.heads["insert"], _key(plan, values), after, plan.closing, lsn, closing,
        )  # fmt: skip
    if record.action == "D":
        before, values = _identity(plan, record)
        old = b',"before":' + before if plan.full else b""
        return b'%s,"key":%s%s%s%s%s' % (
            plan.heads["delete"], _key(plan, values), old, plan.closing, lsn, closing,
        )  # fmt: skip
    if record.action == "T":
        return b'%s,"key":null%s%s%s' % (plan.heads["truncate"], plan.closing, lsn, closing)
    return _update(plan, record, lsn + closing)


def _update(plan: Plan, record: Record, closing: bytes) -> bytes:
    before, old = _identity(plan, record)
    after, new = _cells(plan, record.columns)
    unchanged = b""
    if len(new) != len(plan.fields):
        missing = [name for name in plan.fields if name not in new]
        if not plan.toast.issuperset(missing):
            raise Stale
        if plan.full and was_full(record, (plan.key,)) and not {c.name for c in record.identity}.issuperset(missing):
            # What a whole old row lacks was NULL, and then the new row has it: there is no such column any more.
            raise Stale
        after, left = _fill(plan, after, missing, old if plan.full else {})
        new = old | new
        shown = [name for name in left if plan.fields[name].shown]
        if shown:
            unchanged = b',"unchanged":' + msgspec.json.encode(shown)
    key, old_key = _key(plan, new), _key(plan, old)
    if plan.full:
        past = b',"before":' + before
    elif old_key not in (key, NO_KEY):
        past = b',"before":' + old_key
    else:
        past = b""
    return b'%s,"key":%s%s,"after":%s%s%s%s' % (
        plan.heads["update"], key, past, after, unchanged, plan.closing, closing,
    )  # fmt: skip


def _fill(
    plan: Plan, after: bytes, missing: list[str], old: Mapping[str, bytes | msgspec.Raw]
) -> tuple[bytes, list[str]]:
    """The new row with what the old row knows of its missing columns, and the names that stay unknown."""
    found = [name for name in missing if name in old and plan.fields[name].shown]
    parts = b"".join(b"%s%s" % (plan.fields[name].label, bytes(old[name])) for name in found)
    if parts:
        after = after[:-1] + (parts if after != b"{}" else parts[1:]) + b"}"
    return after, [name for name in missing if name not in old]


def _identity(plan: Plan, record: Record) -> tuple[bytes, dict[str, bytes | msgspec.Raw]]:
    """The old key, or with FULL identity the old row.

    wal2json leaves columns that are NULL out of an old row. Where only the key is there it may as well be that: the
    identity was FULL before the table was altered.
    """
    cells = record.identity
    if not plan.full:
        if len(cells) != len(plan.key):
            raise Stale
        return _cells(plan, cells)
    before, values = _cells(plan, cells)
    if len(cells) != len(plan.fields) and plan.key and values.keys() == set(plan.key):
        if plan.relation.identity != "f":
            raise Stale
        return before, values
    if len(cells) == len(plan.fields):
        return before, values
    values = {name: values.get(name, NULL) for name in plan.fields}
    parts = [b"%s%s" % (plan.fields[n].label, bytes(v)) for n, v in values.items() if plan.fields[n].shown]
    return b"{%s}" % b"".join(parts)[1:], values


def _cells(plan: Plan, cells: list[Cell]) -> tuple[bytes, dict[str, bytes | msgspec.Raw]]:
    """A row as a JSON object, and every column's JSON value by name."""
    parts: list[bytes | msgspec.Raw] = []
    values: dict[str, bytes | msgspec.Raw] = {}
    fields = plan.fields
    for cell in cells:
        found = fields.get(cell.name)
        if found is None or found.oid != cell.typeoid:
            raise Stale
        value = cell.value if found.convert is None else found.convert(cell.value)
        values[cell.name] = value
        if found.shown:
            parts.append(found.label)
            parts.append(value)
    return b"{%s}" % b"".join(parts)[1:], values


def _key(plan: Plan, values: Mapping[str, bytes | msgspec.Raw]) -> bytes:
    if not plan.key:
        return NO_KEY
    try:
        return b"{%s}" % b"".join([b"%s%s" % (plan.fields[n].label, bytes(values[n])) for n in plan.key])[1:]
    except KeyError:
        raise Stale from None


class Reader(Lines):
    """Rows of one table's COPY (text format) as the payloads of `read` events; `columns` are what it is to read."""

    def __init__(self, plan: Plan, closing: bytes) -> None:
        shown = {name: found for name, found in plan.fields.items() if found.shown}
        names = list(shown)
        self.columns = ", ".join(quote_name(name) for name in names)
        super().__init__(
            # What is masked is none of the types whose text can pass as it is.
            [Column(found.label, 0 if n in plan.masks else found.oid, found.text) for n, found in shown.items()],
            [names.index(name) for name in plan.key],
            plan.heads["read"],
            plan.closing + closing,
        )


def marker(plan: Plan, phase: str, closing: bytes) -> bytes:
    """The event that opens or closes a complete read of a table."""
    return b'%s,"key":null,"phase":"%s"%s' % (plan.heads["snapshot"], phase.encode(), closing)
