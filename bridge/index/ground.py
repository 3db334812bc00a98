"""What applying events needs from the stream's side, and the letters that it leaves there. Pure: types only."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any, Protocol

import msgspec

from bridge.index.bulk import Mark


class Incoming(Protocol):
    """A message of the stream."""

    @property
    def seq(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def position(self) -> str: ...
    @property
    def data(self) -> bytes: ...


class Letter(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter: which event an index could not take, and why, without the row's values (`key` finds the row)."""

    index: str
    generation: int
    table: str
    op: str
    seq: int
    epoch: int
    position: str
    id: str
    routing: str = ""
    key: msgspec.Raw
    reason: str
    at: str


class Label(msgspec.Struct, frozen=True):
    """Whose letters these are; `named` is what the index is called on a command line."""

    index: str
    generation: int
    named: str


class Ground(Protocol):
    """What the stream's side lends to the applier."""

    async def bury(self, letter: Letter) -> None:
        """Store a dead letter."""

    def history(self, upto: int) -> AsyncIterator[Sequence[Incoming]]:
        """The tables' messages from the generation's beginning up to and with a sequence."""

    async def learn(self, documents: list[dict[str, Any]]) -> bool:
        """Add the fields that the mapping lacks; whether there were any."""

    async def catch_up(self) -> None:
        """Know every field that the mapping has by now, also those that another task or process is about to add."""

    @property
    def write_alias(self) -> str:
        """What this one's writes go through."""

    def still_allowed(self) -> None:
        """Raise Lost where the lease that lets this one write has run out."""

    async def regain(self) -> bool:
        """Put back a write alias that is gone while its index is there; whether it is there now. Raises Unavailable
        where it is gone because another reader's has taken its place."""

    def known(self) -> Collection[str]:
        """The names of fields and columns, which reasons may show."""

    async def key(self, schema: str, table: str) -> Sequence[str]:
        """The columns of a table's key as they are recorded now; ServerRefused where it has none."""

    async def begun(self, table: str, at: int) -> None:
        """Remember the version of the begin marker of a table's complete read."""

    async def ended(self, table: str, at: int) -> None:
        """Remember the version of the end marker of a table's complete read, once its sweep is done."""

    def reads(self, table: str, seq: int) -> bool:
        """Whether a table is at a sequence before the end of its first complete read, or in the middle of a later one:
        each of its rows is still to come, or has come."""

    def beginning(self, table: str) -> int:
        """The version of a table's last begin marker; 0 where none was seen."""

    async def longest(self, documents: int) -> None:
        """Remember that a row may have so many documents, before the first such row is written."""

    async def reached(self, mark: Mark) -> None:
        """Everything up to here is in the index or among the dead letters."""
