"""The plans of the tables that the stream meets, kept in step with the catalogue and recorded in the state bucket."""

from __future__ import annotations

from bridge import log
from bridge.config import Config, split_name
from bridge.source import catalog
from bridge.source.catalog import Catalog, Relation
from bridge.source.rows import Plan, plan
from bridge.source.values import Codec
from bridge.source.wal2json import Record
from bridge.stream import subjects
from bridge.stream.state import Column, State, TableRecord, TableShape

PUBLISHED_KINDS = ("r", "p")


class Plans:
    """Plans by (schema, table) as wal2json names them; None for a table that is not published."""

    def __init__(self, config: Config, catalog: Catalog, state: State) -> None:
        self._config = config
        self._catalog = catalog
        self._state = state
        self.known: dict[tuple[str, str], Plan | None] = {}
        self.exact_numbers = False

    def subject(self, root: tuple[str, str]) -> str:
        """Where the events of a table go."""
        return subjects.table_subject(self._config.stream.prefix, self._config.source.name, *root)

    async def load(self, schema: str, table: str, record: Record | None = None) -> Plan | None:
        """The plan of a table that is met for the first time, or that has changed, from the catalogue as it is now."""
        relation = await self._catalog.relation(schema, table)
        if relation is None:
            relation = await self._gone(schema, table, record)
        found = None
        # Between a partitioned table's root and its partitions there is nothing to publish: a truncate names them all.
        between = relation.kind == "p" and relation.is_partition
        if relation.kind in PUBLISHED_KINDS and not between and self._catalog.filter.matches(*relation.root):
            found = await self.of(relation)
        self.known[schema, table] = found
        return found

    async def of(self, relation: Relation) -> Plan:
        """The plan of a relation of the catalogue; records the table's columns and key."""
        found = plan(
            relation,
            self._config.source.name,
            self.subject(relation.root),
            await self.codecs([c.oid for c in relation.columns]),
            self._exclude(relation.root),
            exact_numbers=self.exact_numbers,
        )
        await self._record(found)
        return found

    def _exclude(self, root: tuple[str, str]) -> list[str]:
        return [c for name, t in self._config.source.table.items() if split_name(name) == root for c in t.exclude]

    async def codecs(self, oids: list[int]) -> dict[int, Codec]:
        """The codecs of these types."""
        return {oid: await self._catalog.codec(oid) for oid in oids}

    async def refit(self, record: Record) -> Plan | None:
        """The plan that a change needs which fits neither the known plan nor, read again, the catalogue."""
        before = self.known.get((record.schema, record.table))
        today = await self.load(record.schema, record.table, record)
        if today is None:
            return None
        cells = [*record.columns, *record.identity]
        found = today.adapted(record, await self.codecs([c.typeoid for c in cells]), before)
        log.get().info("table altered", table=today.name, columns=len(found.fields))
        self.known[record.schema, record.table] = found
        return found

    async def _gone(self, schema: str, table: str, record: Record | None) -> Relation:
        """A table that was dropped or renamed since, from what was recorded of it and from the change itself."""
        kept = await self._state.get(subjects.table_key(self._config.source.name, schema, table), TableRecord)
        columns = {c.name: c.oid for c in kept[0].columns} if kept else {}
        names = [*(record.columns or record.identity)] if record else []
        key = tuple(kept[0].key) if kept else tuple(c.name for c in record.identity) if record else ()
        if not columns:
            columns = {c.name: c.typeoid for c in names}
        return Relation(
            oid=0,
            schema=schema,
            table=table,
            kind="r",
            root=(schema, table),
            identity="d",
            key=key,
            # What an update of such a table leaves out can only be a TOASTed column.
            columns=tuple(catalog.Column(n, oid, "", toast=bool(kept), virtual=False) for n, oid in columns.items()),
        )

    async def _record(self, found: Plan) -> None:
        relation = found.relation
        if not relation.oid:
            return
        shape = TableShape(
            [Column(c.name, c.type, c.oid) for c in relation.columns if found.fields[c.name].shown],
            list(relation.key),
        )
        key = subjects.table_key(self._config.source.name, *relation.root)
        kept = await self._state.get(key, TableRecord)
        if kept is None:
            await self._state.put(key, TableRecord(shape.columns, shape.key))
        elif not relation.is_partition and (kept[0].columns, kept[0].key) != (shape.columns, shape.key):
            past = [*kept[0].history, TableShape(kept[0].columns, kept[0].key)]
            await self._state.put(key, TableRecord(shape.columns, shape.key, past[-50:]), kept[1])
