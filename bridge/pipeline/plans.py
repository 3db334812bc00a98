"""The plans of the tables that the stream meets, kept in step with the catalogue and recorded in the state bucket."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection

import msgspec

from bridge import log
from bridge.config import Config, split_name
from bridge.errors import Unavailable
from bridge.pipeline import compactable
from bridge.pipeline.belonging import Now, Then, withheld
from bridge.pipeline.guarded import doubtful, elsewhere, exchanged, renamed, still_there, strangers, unnamed
from bridge.pipeline.layout import young
from bridge.pipeline.past import Past, layouts
from bridge.pipeline.recorded import Recorded
from bridge.pipeline.shapes import Shapes
from bridge.source import catalog
from bridge.source.altering import Snapshot
from bridge.source.catalog import Catalog, Relation
from bridge.source.leaving import Leaving, chosen_of, leaving
from bridge.source.rows import Plan, plan
from bridge.source.values import Codec
from bridge.source.wal2json import Record
from bridge.stream import subjects
from bridge.stream.state import State, TableRecord
from bridge.waiting import until

VISIBLE_WITHIN = 30.0
PUBLISHED_KINDS = ("r", "p")


class Plans:
    """Plans by (schema, table) as wal2json names them; None for a table that is not published."""

    def __init__(self, config: Config, catalog: Catalog, state: State, shapes: Shapes) -> None:
        self._config = config
        self._catalog = catalog
        self.recorded = Recorded(state, config.source.name)
        self.known: dict[tuple[str, str], Plan | None] = {}
        self.exact_numbers = False
        self.on_new: Callable[[Relation], Awaitable[None]] | None = None
        self._seen: Snapshot | None = None
        self._compared = ""
        self._warned: set[tuple[str, str]] = set()
        self._leaving: dict[tuple[str, str], Leaving] = {}
        # The catalogue that each plan was made by, and those of tables as they were.
        self._today: dict[tuple[str, str], Relation] = {}
        self._placed: set[tuple[str, str]] = set()
        self._sections = [split_name(name) for name in config.source.table]
        self.past = Past(catalog, shapes, self._sections)

    def advance(self, end: int) -> None:
        """The stream brings a transaction that ends there: plans of tables as they were are forgotten where that may be
        over by then."""
        for name in self.past.over(end):
            self.known.pop(name, None)

    def stale(self, xid: int) -> bool:
        """Whether a transaction that may have altered tables has done so since the plans were compared with the
        catalogue."""
        return self._seen is None or not self._seen.has(xid)

    async def compare(self, xid: int) -> None:
        """Forget the plans that the catalogue contradicts, once it shows what the transaction `xid` did.

        Most of what is altered shows in the changes that follow. What does not is found here: a partition attached or
        detached, another kind of relation or another table under the name, another replica identity.

        Raises:
            Unavailable: the transaction is in the log, but not to be seen for half a minute.
        """
        now = ""

        async def shown() -> bool:
            nonlocal now
            self._seen, now = await self._catalog.version(self.past.oids.values())
            return self._seen.has(xid)

        # The commit record is read before the transaction is taken off PostgreSQL's list of running ones, and long
        # before that where a synchronous standby is away.
        if not await until(shown, seconds=VISIBLE_WITHIN):
            raise Unavailable(
                f"transaction {xid}, which may have altered tables, is committed in PostgreSQL's log but not visible",
                "waiting; does it wait for a synchronous standby?",
            )
        if now == self._compared:
            return
        today = {(found.schema, found.table): found for found in await self._catalog.all()}
        self.past.meet(today.values(), (await self._catalog.bounds())[1])
        for name, kept in list(self.known.items()):
            found = today.get(name)
            if found is not None and self._contradicts(found, kept, name):
                del self.known[name]
                log.get().info("table altered", table=found.name, root=".".join(found.root), identity=found.identity)
        self._compared = now

    def _contradicts(self, found: Relation, kept: Plan | None, name: tuple[str, str]) -> bool:
        if kept is None:
            return self._is_published(found)
        known = self._today.get(name, kept.relation)
        if (found.oid, found.kind, found.root, found.identity, found.key) != (
            known.oid, known.kind, known.root, known.identity, known.key,
        ):  # fmt: skip
            return True
        # A length or a precision shows in no change.
        types = [{c.name: (c.number, c.oid, c.type) for c in one.columns} for one in (found, known)]
        return types[0] != types[1]

    def _is_published(self, relation: Relation) -> bool:
        # Between a partitioned table's root and its partitions there is nothing to publish: a truncate names them all.
        between = relation.kind == "p" and relation.is_partition
        return relation.kind in PUBLISHED_KINDS and not between and self._catalog.filter.matches(*relation.root)

    def forget(self, root: tuple[str, str], but: int | None = None) -> None:
        """Forget the plans of a table, with those of its partitions; not that of the one with the oid `but`."""
        for name, kept in list(self.known.items()):
            if kept is not None and kept.relation.root == root and kept.relation.oid != but:
                del self.known[name]

    async def type_name(self, oid: int) -> str:
        """A type's name as PostgreSQL prints it."""
        return await self._catalog.type_name(oid)

    async def origin(self, number: int) -> str:
        """The name of a replication origin, which wal2json calls by its number."""
        return await self._catalog.origin(number)

    def subject(self, root: tuple[str, str]) -> str:
        """Where the events of a table go."""
        return subjects.table_subject(self._config.stream.prefix, self._config.source.name, *root)

    async def load(self, schema: str, table: str, record: Record | None = None, at: str = "") -> Plan | None:
        """The plan of a table that is met for the first time, or that has changed, from the catalogue as it is now.

        Args:
            record: the change with which it was met, at the position `at`.
        """
        name, both = (schema, table), await self._catalog.family(schema, table)
        now = Now(*both) if both is not None else None
        today = now.relation if now is not None else None
        then = await self.past.belonged(name, now, record, at, self.recorded.of)
        beside: Collection[tuple[str, str]] = then.beside if then is not None else ()
        root: Relation | None
        if then is None and now is not None:
            relation, root = now
        elif then is None or then.now is None:
            relation, root = await self._gone(schema, table, then.root if then is not None else name, record), None
        else:
            relation, root = await self._former(name, then, then.now, today, record)
        if not relation.oid:
            beside = self._sections
        found = None
        if self._is_published(relation):
            instead = then.instead if then is not None else None
            found = await self.of(relation, record, at, root=root, beside=beside, instead=instead)
            self._today[schema, table] = today or relation
        if today is not None and relation.oid == today.oid and self.on_new is not None:
            await self.on_new(relation)
        self.known[schema, table] = found
        return found

    async def _former(
        self, name: tuple[str, str], then: Then, now: Now, today: Relation | None, record: Record | None
    ) -> tuple[Relation, Relation | None]:
        """A table, or partition, with its root, that was under a name, and has another one or another root by now."""
        renamed = today is None or now.relation.oid != today.oid
        if renamed and self.leaving(then.root).guarded:
            # One of which not all may leave goes by the names of its columns alone.
            return await self._gone(*name, then.root, record), None
        relation = msgspec.structs.replace(now.relation, schema=name[0], table=name[1], root=then.root)
        if then.root == name:
            return relation, relation
        return relation, now.top if now.relation.root == then.root else None

    async def of(
        self,
        relation: Relation,
        record: Record | None = None,
        at: str = "",
        *,
        whole: bool = False,
        root: Relation | None = None,
        beside: Collection[tuple[str, str]] = (),
        instead: Relation | None = None,
    ) -> Plan:
        """The plan of a relation of the catalogue; records the table's columns and key.

        A column that is new while an excluded one is missing may be that one under another name: the plan is without
        it, so that a change which has it comes to `refit`. So it is without columns that no change has shown yet: the
        catalogue may be ahead of the log. `whole`: the table is read as it is now; `root`: what it belongs to, where
        both were read at once; `beside`, `instead`: what else the change may be of (`Then`).

        Raises:
            ConfigError: a column of the key is excluded. Contradiction: `whole`, and there is such a new column; it
            belonged to another table, of which not everything may leave; or a compacted log cannot hold it.
        """
        # Tables are read beside the stream: of two who record the same, one would meet the other's note.
        async with self.recorded.recording:
            return await self._of(relation, record, at, beside, instead, whole=whole, root=root)

    async def _of(
        self,
        relation: Relation,
        record: Record | None,
        at: str,
        beside: Collection[tuple[str, str]],
        instead: Relation | None,
        *,
        whole: bool,
        root: Relation | None,
    ) -> Plan:
        await self._still_of(relation)
        kept = await self.recorded.read(relation.root)
        known = kept[0] if kept is not None else None
        chosen, today = self.leaving(relation.root), {c.name for c in relation.columns}
        exclude, theirs = chosen.hidden(today), await self._withheld(relation, known, record, beside, instead)
        if not relation.oid and (exclude | theirs).intersection(relation.key):
            relation = msgspec.structs.replace(relation, key=())
        if self._config.stream.compact:
            compactable.check(relation, exclude, known)
        vanished = chosen.guarded - today if relation.oid else set()
        before = _columns(known) if known is not None else _names(record) if record is not None else None
        unsure = set()
        if vanished and before is not None:
            unsure = doubtful(relation, vanished, today - exclude - chosen.guarded - before, known)
        if unsure and whole:
            raise renamed(relation, vanished, unsure)
        if known is not None:
            still_there(relation, chosen, known)
        self._warn(relation, "excluded column missing", vanished)
        # What was excluded once and is gone may still be in the log that is not read yet.
        hidden = exclude | theirs | (set(known.hidden) - today if known is not None else set())
        root, was, told, strange = await self.past.root(relation, root, at), None, known, set[str]()
        if root is not None and not whole:
            told = await self.recorded.told(root, known)
            was = await self.past.was(relation, root, told, record, at, chosen.masks)
            if was is not None:
                strange = strangers(root, was, chosen, told, record, today | (before or set()))
                if hidden.union(chosen.masks, strange) & {*was.key, *was.relation.key}:
                    was, strange = None, set()  # no column of a key may be withheld: what says so is a wrong guess
        now = was.relation if was is not None else relation
        (self._placed.add if was is not None else self._placed.discard)((relation.schema, relation.table))
        new = set() if whole or was is not None else young(relation, known, exclude, record, at)
        self._warn(relation, "unknown column not published", strange)
        found = plan(
            now,
            self._config.source.name,
            self.subject(relation.root),
            await self.codecs([c.oid for c in now.columns]),
            hidden | strange,
            unsure=unsure | new,
            root_key=was.key if was is not None else root.key if root is not None else None,
            exact_numbers=self.exact_numbers,
            chosen=chosen,
        )
        if root is not None:
            found.numbers = was.numbers if was is not None else {c.name: c.number for c in root.columns}
        # Where nothing is known of what the unread log has, the first change must come before today's columns.
        if relation.oid and (whole or not vanished or before is not None):
            shown = dict.fromkeys(_names(record), at) if record is not None and at and not whole else {}
            past = layouts(root, known, was, new, at if record is not None else "", whole=whole)
            await self.recorded.note(found, kept, sorted(exclude), new, shown, past, at, placed=was is not None)
            await self._place(relation, chosen, known)
        elif not relation.oid and known is None and record is not None:
            # Another one that comes and goes under this name may have other columns.
            await self.recorded.note(found, None, sorted(exclude), new, {}, [], at, placed=False)
        return found

    async def _place(self, relation: Relation, chosen: Leaving, known: TableRecord | None) -> None:
        """Record where the columns are that may not leave."""
        last = await self.recorded.place(relation, chosen)
        if relation.is_partition and last != known:
            # What one partition's change has told of the table's columns counts for the others' too.
            self.forget(relation.root, but=relation.oid)

    async def _withheld(
        self,
        relation: Relation,
        kept: TableRecord | None,
        record: Record | None,
        beside: Collection[tuple[str, str]],
        instead: Relation | None,
    ) -> set[str]:
        """The columns that may not leave of what a change may be of beside the table that it is taken for; and of a
        table that is gone, those in whose places excluded ones were."""
        if record is None:
            return set()
        key = {column.name for column in record.pk} or (set(relation.key) if relation.oid else set())
        others = [root for root in beside if root != relation.root and chosen_of(self._config.source, root)]
        found = withheld([(self.leaving(root), await self.recorded.of(root)) for root in others], record, key)
        if not relation.oid:
            last = kept.layouts[-1:] if kept is not None and not relation.is_partition else []
            orders = [layout.columns for layout in last]
            if instead is not None:
                orders.append({column.name: column.number for column in instead.columns})
            found = found.union(*(exchanged(record, order, self.leaving(relation.root)) for order in orders)) - key
        self._warn(relation, "unknown column not published", found)
        return found

    async def _still_of(self, relation: Relation) -> None:
        """Return where a table, or partition, did not belong to another one before, of which not everything may leave.

        Raises:
            Contradiction: it did, and nothing is chosen of the one that it belongs to now.
        """
        source = self._config.source
        if not relation.oid or not source.table or chosen_of(source, relation.root):
            return
        owner = await self.recorded.owner(relation)
        if owner != relation.root and self.leaving(owner).named:
            raise elsewhere(relation, owner)

    def _warn(self, relation: Relation, what: str, names: set[str]) -> None:
        table = ".".join(relation.root)
        if names and (table, what) not in self._warned:
            self._warned.add((table, what))
            log.get().warning(
                "columns to check", table=table, columns=sorted(names), meaning=what,
                next=f'check exclude and mask of [source.table."{table}"]',
            )  # fmt: skip

    def leaving(self, root: tuple[str, str]) -> Leaving:
        """What of a table may be published."""
        if root not in self._leaving:
            self._leaving[root] = leaving(self._config.source, root)
        return self._leaving[root]

    def refuse(self, relations: list[Relation]) -> None:
        """Raises ConfigError where a column of a table's key may not be published as it is, or a compacted log cannot
        hold the table."""
        for relation in relations:
            self.leaving(relation.root).refuse(relation.root, relation.key)
        if self._config.stream.compact:
            hidden = {r.root: self.leaving(r.root).hidden(c.name for c in r.columns) for r in relations}
            compactable.refuse(relations, hidden)

    def refuse_unnamed(self, found: Plan, record: Record, where: str) -> None:
        """Raises Contradiction where a change tells its row by columns that may not leave as they are."""
        names = {cell.name for cell in record.identity} & (found.hidden | found.masks.keys())
        # A whole old row has every column, and is told by its key.
        if names and not found.full:
            raise unnamed(found.relation, where, names)

    def refuse_empty(self, tables: list[Relation], every: list[Relation]) -> None:
        """Raises ConfigError where a column of the key of a partitioned table may not be published as it is, that has
        no partition yet which would tell that."""
        known = {relation.root for relation in tables}
        for relation in every:
            if relation.kind == "p" and relation.root not in known and self._catalog.filter.matches(*relation.root):
                self.leaving(relation.root).refuse(relation.root, relation.key)

    async def codecs(self, oids: list[int]) -> dict[int, Codec]:
        """The codecs of these types."""
        return {oid: await self._catalog.codec(oid) for oid in oids}

    async def refit(self, record: Record, at: str) -> Plan | None:
        """The plan that a change needs which fits neither the known plan nor, read again, the catalogue."""
        name = (record.schema, record.table)
        before, today = self.known.get(name), await self.load(*name, record, at)
        if today is None:
            return None
        today = await self._guarded(today, record)
        codecs = await self.codecs([c.typeoid for c in (*record.columns, *record.identity)])
        found = today.adapted(record, codecs, before, placed=name in self._placed)
        await self.past.keyed(name, found, today)
        log.get().info("table altered", table=today.name, columns=len(found.fields))
        if today.relation.is_partition and not today.relation.oid:
            self.forget(today.relation.root)  # its siblings are as it is
        self.known[name] = found
        return found

    async def _guarded(self, today: Plan, record: Record) -> Plan:
        """`today` without what a change shows beside the excluded columns and nobody has seen before.

        Raises:
            Contradiction: it may be an excluded column under another name.
        """
        relation = today.relation
        chosen, shown = self.leaving(relation.root), _names(record)
        if not chosen.named:
            return today
        today = msgspec.structs.replace(today, hidden=today.hidden | chosen.hidden(shown))
        if not chosen.guarded:
            return today
        kept = await self.recorded.read(relation.root)
        new = shown - today.fields.keys() - today.hidden - (_columns(kept[0]) if kept else set())
        new -= {column.name for column in record.pk}
        if not new:
            return today
        names = {c.name for c in relation.columns}
        vanished = chosen.guarded - names - shown
        doubt = doubtful(relation, vanished, new & names, kept[0] if kept else None) if relation.oid else set()
        if doubt:
            raise renamed(relation, vanished, doubt)
        if relation.oid and new <= names:
            return today
        self._warn(relation, "unknown column not published", new - names if relation.oid else new)
        return msgspec.structs.replace(today, hidden=today.hidden | (new - names if relation.oid else new))

    async def _gone(self, schema: str, table: str, root: tuple[str, str], record: Record | None) -> Relation:
        """A table, or partition, that was dropped or renamed since, from what was recorded of it and from the change
        itself."""
        kept = await self.recorded.read(root)
        # What the log was told last of its columns is as near as can be.
        last = (kept[0].logged[-1].columns if kept[0].logged else kept[0].columns) if kept else []
        columns = {c.name: c.oid for c in last}
        names = [*(record.columns or record.identity)] if record else []
        key = tuple(kept[0].key) if kept else tuple(c.name for c in record.pk or record.identity) if record else ()
        if not columns:
            columns = {c.name: c.typeoid for c in names}
        large = await self._catalog.varying(columns.values())
        return Relation(
            oid=0,
            schema=schema,
            table=table,
            kind="r",
            root=root,
            identity="d",
            key=key,
            # What an update of such a table leaves out can only be a TOASTed column.
            columns=tuple(
                catalog.Column(n, oid, "", toast=kept is not None and large.get(oid, True), virtual=False)
                for n, oid in columns.items()
            ),
        )


def _columns(record: TableRecord) -> set[str]:
    """Every column that a table is known to have had, the hidden ones included."""
    shapes = [record.columns, *(shape.columns for shape in record.history)]
    return {column.name for columns in shapes for column in columns} | set(record.hidden)


def _names(record: Record) -> set[str]:
    return {cell.name for cell in (*record.columns, *record.identity)}
