"""Updates and deletes that PostgreSQL does not log, for their tables have no replica identity: never a silent loss."""

from __future__ import annotations

from bridge import log
from bridge.config import Source, split_name
from bridge.errors import MissingIdentity
from bridge.source import lsn
from bridge.source.catalog import Relation


class Unlogged:
    """What is done about them: stop, or warn and count where the configuration accepts it, for all or for a table.

    counts: how many there were in this process, by table.
    """

    def __init__(self, source: Source) -> None:
        self._otherwise = source.on_missing_identity
        self._tables = {
            split_name(name): table.on_missing_identity
            for name, table in source.table.items()
            if table.on_missing_identity
        }
        self.counts: dict[str, int] = {}

    def met(self, relation: Relation, statement: str, end: int) -> None:
        """One was met, in the transaction whose commit record ends at `end`.

        Raises:
            MissingIdentity: the table's are not accepted.
        """
        name, article = relation.name, "an" if statement == "UPDATE" else "a"
        if self._tables.get(relation.root, self._otherwise) == "stop":
            raise MissingIdentity(
                f"{article} {statement} of {name} in the transaction that ends at {lsn.show(end)} is not in "
                "PostgreSQL's log: the table has no replica identity",
                f"ALTER TABLE {name} REPLICA IDENTITY FULL (or give it a primary key); to go on without that change, "
                'start once with [source] on_missing_identity = "warn", or have it always so for this table: '
                f'[source.table."{".".join(relation.root)}"] on_missing_identity = "warn"',
            )
        self.counts[name] = self.counts.get(name, 0) + 1
        if self.counts[name] == 1:
            log.get().warning("change not logged", table=name, statement=statement, next="REPLICA IDENTITY FULL")
