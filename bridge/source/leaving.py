"""What of a table may leave the database, by the configuration. Pure.

Columns that are left out or masked never get further than the decoding of the record or row that has them. A mask takes
a value as an event would have it, so that stream and snapshot give the same: NULL stays NULL, a constant takes the
place of all else, and a keyed hash (HMAC-SHA-256, RFC 2104, in hexadecimal) is the same for the same value in every
table, so that what is masked can still be counted, compared and joined.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec

from bridge.config import Source, Table, join_name, split_name
from bridge.errors import ConfigError
from bridge.source.catalog import Filter, Relation

Mask = Callable[[bytes], bytes]

LETTERS = {"insert": "I", "update": "U", "delete": "D", "truncate": "T"}
CONSTANT = "constant:"
_text = msgspec.json.Decoder(str).decode


class Leaving(NamedTuple):
    """What is chosen of one table.

    columns: all that may leave, empty where that is every column; exclude: those that may not; masks: what is made of a
    column's JSON value, by its name; dropped: wal2json's letters of the changes that are not published.
    """

    columns: frozenset[str] = frozenset()
    exclude: frozenset[str] = frozenset()
    masks: Mapping[str, Mask] = {}
    dropped: frozenset[str] = frozenset()

    @property
    def guarded(self) -> set[str]:
        """The columns that would leave as they are if they had another name; none where only named ones may leave."""
        return set() if self.columns else {*self.exclude, *self.masks}

    @property
    def named(self) -> set[str]:
        """Every column that the configuration names."""
        return {*self.columns, *self.exclude, *self.masks}

    def hidden(self, names: Iterable[str]) -> set[str]:
        """Those that may not leave: what is excluded, and of `names` what is not chosen."""
        return set(self.exclude) | ({name for name in names if name not in self.columns} if self.columns else set())

    def refuse(self, root: tuple[str, str], key: Iterable[str]) -> None:
        """Raises ConfigError where a column of the table's key may not leave as it is."""
        columns = set(key)
        for option, wrong, remedy in (
            ("exclude names", columns & self.exclude, "take it out of exclude"),
            ("columns leaves out", columns - self.columns if self.columns else set(), "add it to columns"),
            ("mask names", columns & self.masks.keys(), "take it out of mask"),
        ):
            if wrong:
                raise ConfigError(
                    f'[source.table."{join_name(*root)}"] {option} {", ".join(sorted(wrong))}, part of its key', remedy
                )


def section(source: Source, root: tuple[str, str]) -> Table:
    """The configuration's section of a table; its defaults where there is none."""
    return _section(source, root) or Table()


def leaving(source: Source, root: tuple[str, str]) -> Leaving:
    """What the configuration chooses of a table."""
    chosen = section(source, root)
    return Leaving(
        frozenset(chosen.columns),
        frozenset(chosen.exclude),
        {name: mask(how, source.mask_key) for name, how in chosen.mask.items()},
        frozenset(LETTERS[op] for op in LETTERS if chosen.operations and op not in chosen.operations),
    )


def chosen_of(source: Source, root: tuple[str, str]) -> bool:
    """Whether the configuration has a section of a table."""
    return _section(source, root) is not None


def _section(source: Source, root: tuple[str, str]) -> Table | None:
    return next((table for name, table in source.table.items() if split_name(name) == root), None)


def published(source: Source, tables: Iterable[Relation], roots: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """The names of what is published, and of partitioned tables that will be and have no partition yet.

    Args:
        tables: those that are chosen.
        roots: the names of all that there are.
    """
    chosen = Filter(source.tables)
    return {table.root for table in tables}.union(root for root in roots if chosen.matches(*root))


def astray(source: Source, tables: Iterable[Relation], roots: Iterable[tuple[str, str]]) -> list[str]:
    """The sections of tables that are none of the `published` ones."""
    known = published(source, tables, roots)
    return [name for name in source.table if split_name(name) not in known]


def mask(how: str, key: str) -> Mask:
    """The mask that a configuration names: "hash", or "constant:" and the text to give."""
    if how.startswith(CONSTANT):
        constant = msgspec.json.encode(how.removeprefix(CONSTANT))
        return lambda value: value if value == b"null" else constant
    secret = key.encode()

    def hashed(value: bytes) -> bytes:
        if value == b"null":
            return value
        text = _text(value).encode() if value[:1] == b'"' else value
        return b'"%b"' % hmac.digest(secret, text, "sha256").hex().encode()

    return hashed
