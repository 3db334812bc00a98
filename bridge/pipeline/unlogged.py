"""Updates and deletes that PostgreSQL does not log, for their tables have no replica identity: never a silent loss."""

from __future__ import annotations

from collections.abc import Mapping

from bridge import log
from bridge.config import Source, join_name, split_name
from bridge.errors import MissingIdentity
from bridge.source import lsn
from bridge.source.catalog import Relation
from bridge.stream.state import Missed


class Unlogged:
    """What is done about them: stop, or warn and count where the configuration accepts it, for all or for a table.

    Args:
        known: those that the checkpoint has, by table; it tells of everything up to the LSN `since`.
    """

    def __init__(self, source: Source, known: Mapping[str, Missed], since: int) -> None:
        self._otherwise = source.on_missing_identity
        self._tables = {
            split_name(name): table.on_missing_identity
            for name, table in source.table.items()
            if table.on_missing_identity
        }
        self._known = dict(known)
        self._since = since
        self._pending: list[tuple[int, str, int]] = []
        self._said: set[str] = set()

    def met(self, relation: Relation, statement: str, end: int, seq: int) -> None:
        """One was met, in the transaction whose commit record ends at `end`, before the stream's sequence `seq`.

        Raises:
            MissingIdentity: the table's are not accepted.
        """
        name, article = relation.name, "an" if statement == "UPDATE" else "a"
        if self._tables.get(relation.root, self._otherwise) == "stop":
            raise MissingIdentity(
                f"{article} {statement} of {name} in the transaction that ends at {lsn.show(end)} is not in "
                "PostgreSQL's log: the table has no replica identity",
                _remedy(relation),
            )
        if end > self._since:
            self._pending.append((end, join_name(*relation.root), seq))
        if name not in self._said:
            self._said.add(name)
            log.get().warning("change not logged", table=name, statement=statement, next="REPLICA IDENTITY FULL")

    def upto(self, reached: int) -> dict[str, Missed]:
        """How many there were in transactions up to an LSN, by table, with the sequence before which the last was."""
        later = []
        for end, name, seq in self._pending:
            if end > reached:
                later.append((end, name, seq))
            else:
                before = self._known.get(name)
                self._known[name] = Missed((before.changes if before is not None else 0) + 1, seq)
        self._pending = later
        return dict(self._known)


def _remedy(relation: Relation) -> str:
    root = ".".join(relation.root)
    later = f"for changes to come: ALTER TABLE {relation.name} ADD PRIMARY KEY (…), or REPLICA IDENTITY FULL"
    if relation.key or relation.identity == "f":
        later = "it has one by now"
    return (
        f'{later}; to go on without that change, start once with [source] on_missing_identity = "warn", or have it'
        f' always so for this table: [source.table."{root}"] on_missing_identity = "warn"; then, where it has a key:'
        f" bridge snapshot {root}"
    )
