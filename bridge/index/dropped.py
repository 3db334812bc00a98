"""What is remembered of rows that have no document: the values that a later update may leave out. Pure.

A row that a transform drops, that is soft-deleted, or that was refused has no document to take unchanged columns from.
The log has them, but asking it means reading it; so the newest of them are kept here, as many as fit.
"""

from __future__ import annotations

from bridge.index.naming import Row

ROOM = 64 << 20
_EACH = 200


class Dropped:
    """The TOASTable columns of rows without a document, by address; the ones kept longest ago go first.

    Args:
        room: bytes.
    """

    def __init__(self, room: int = ROOM) -> None:
        self._room = room
        self._used = 0
        self._rows: dict[str, tuple[int, Row]] = {}

    def get(self, address: str) -> tuple[int, Row] | None:
        """The version of the row's last event, and its columns."""
        return self._rows.get(address)

    def keep(self, address: str, version: int, columns: Row) -> None:
        """Remember a row's columns as its event at `version` left them."""
        if self.forget(address, version):
            self._rows[address] = version, columns
            self._used += _size(address, columns)
            while self._used > self._room:
                oldest = next(iter(self._rows))
                self._used -= _size(oldest, self._rows.pop(oldest)[1])

    def forget(self, address: str, version: int) -> bool:
        """A row has a document now, or is gone; whether nothing newer is remembered of it."""
        found = self._rows.get(address)
        if found is None:
            return True
        if found[0] > version:
            return False
        self._used -= _size(address, self._rows.pop(address)[1])
        return True

    def clear(self) -> None:
        """Forget everything: whole tables have changed."""
        self._rows.clear()
        self._used = 0


def _size(address: str, columns: Row) -> int:
    return _EACH + len(address) + sum(len(name) + len(bytes(value)) + _EACH for name, value in columns.items())
