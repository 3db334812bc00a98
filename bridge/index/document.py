"""One event → the operation that an index needs. Pure, but for calling the user's transform.

Row values stay the bytes that PostgreSQL gave wherever nothing has to look into them, so numbers keep every digit and
a plain row is copied, not parsed. Operations carry external versions: what a newer epoch wrote wins over an older one,
and within an epoch the later sequence wins, whatever order or repetition they arrive in.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import msgspec

from bridge.errors import ConfigError
from bridge.event import Event, decode
from bridge.index.mapping import HIDDEN

LONGEST_ID = 512
EPOCH_BITS = 42
DEEPEST = 500
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
_WORDS = frozenset({"true", "false", "null"})
_PREFIXED = ("'", "[", "{", "#")
_TEXT = rb'"(?:[^"\\]|\\.)*+"'
_SCALAR = rb"(?:%s|[-+.0-9eE]+|true|false|null)" % _TEXT
_OPENING = re.compile(
    rb'\{"op":"(\w+)","source":%(t)s,"schema":%(t)s,"table":%(t)s(?:,"key":(\{%(t)s: ?%(s)s(?:, ?%(t)s: ?%(s)s)*\}))?'
    % {b"t": _TEXT, b"s": _SCALAR}
)
_BRACKET = re.compile(rb"%s|([\[{])|([\]}])" % _TEXT)
NO_KEY = msgspec.Raw(b"null")

Row = dict[str, msgspec.Raw]
Transform = Callable[[dict[str, Any]], Any]

_row = msgspec.json.Decoder(Row)
_plain = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal)
_encoder = msgspec.json.Encoder(decimal_format="number")


class Rejected(Exception):
    """This event cannot become a document; the reason holds no row value. It goes to the dead letters."""


class Put(msgspec.Struct):
    """Write a document; `again` also over the same version (after that version was reserved by a delete)."""

    id: str
    version: int
    doc: bytes
    again: bool = False

    def line(self) -> bytes:
        """The operation as bulk lines."""
        kind = b"external_gte" if self.again else b"external"
        return b'{"index":{"_id":%s,"version":%d,"version_type":"%s"}}\n%s\n' % (
            msgspec.json.encode(self.id),
            self.version,
            kind,
            self.doc,
        )


class Remove(msgspec.Struct):
    """Delete a document unless a newer one is there; `again` also reserves a version that was deleted already."""

    id: str
    version: int
    again: bool = False

    def line(self) -> bytes:
        """The operation as a bulk line."""
        kind = b"external_gte" if self.again else b"external"
        return b'{"delete":{"_id":%s,"version":%d,"version_type":"%s"}}\n' % (
            msgspec.json.encode(self.id),
            self.version,
            kind,
        )


Operation = Put | Remove


class Shape(msgspec.Struct, frozen=True):
    """What of a row gets into the document, and how: `columns` or `exclude`, then `rename`, then `transform`."""

    columns: list[str] = []
    exclude: list[str] = []
    rename: dict[str, str] = {}
    transform: str = ""

    @property
    def plain(self) -> bool:
        """Whether the document is the row itself."""
        return not (self.columns or self.exclude or self.rename or self.transform)


def version(epoch: int, seq: int) -> int:
    """The external version of what an event at `seq` of a writer's `epoch` wrote."""
    return epoch << EPOCH_BITS | seq


def row(data: bytes | msgspec.Raw) -> Row:
    """The columns of a raw JSON object, each value as raw JSON."""
    return _row.decode(data)


def identify(key: Mapping[str, msgspec.Raw]) -> str:
    """The document id of a key; different keys never give the same one.

    One value stands as it is (`42`, `alice`), several are joined with `|`. A string that would read like something else
    gets an apostrophe in front, `\\` and `|` are escaped, and ids over 512 bytes become `#` and a SHA-256.
    """
    found = "|".join([_part(bytes(value)) for value in key.values()])
    if len(found) > LONGEST_ID // 4 and len(found.encode()) > LONGEST_ID:
        return "#" + hashlib.sha256(found.encode()).hexdigest()
    return found


def _part(value: bytes) -> str:
    if value[:1] != b'"':
        found = value.decode()
    else:
        found = msgspec.json.decode(value)
        if not found or found.startswith(_PREFIXED) or found in _WORDS or _NUMBER.fullmatch(found):
            found = "'" + found
    if "\\" in found or "|" in found:
        found = found.replace("\\", "\\\\").replace("|", "\\|")
    return found


def read(data: bytes) -> Event:
    """The event in a message.

    Raises:
        Rejected: it is none, or nested so deeply that a document made of it could not be read again.
    """
    if data.count(b"[") + data.count(b"{") > DEEPEST and _depth(data) > DEEPEST:
        raise Rejected(f"nested more than {DEEPEST} deep")
    try:
        found = decode(data)
    except msgspec.ValidationError:
        raise Rejected("no event of this format") from None
    except msgspec.DecodeError as error:
        # Names the place and kind of what is wrong, never a value.
        raise Rejected(f"no event of this format ({error})") from None
    except ValueError as error:
        raise Rejected(f"no event of this format ({type(error).__name__})") from None
    if found.ref is not None:
        raise Rejected(f"its row, the object {found.ref.name} in the store {found.ref.bucket}, is missing")
    return found


def _depth(data: bytes) -> int:
    depth = deepest = 0
    for found in _BRACKET.finditer(data):
        if found.lastindex == 1:
            depth += 1
            deepest = max(deepest, depth)
        elif found.lastindex == 2:
            depth -= 1
    return deepest


def outline(data: bytes) -> tuple[str, msgspec.Raw, str]:
    """Kind, key and document id of an event that cannot be read whole, as far as its opening tells; else empty."""
    found = _OPENING.match(data)
    if found is None:
        return "", NO_KEY, ""
    op = found[1].decode()
    if found[2] is None:
        return op, NO_KEY, ""
    try:
        return op, msgspec.Raw(found[2]), identify(row(found[2]))
    except (msgspec.DecodeError, ValueError):
        return op, NO_KEY, ""


def keyless(event: Event) -> bool:
    """Whether an event of a row does not say which row: the table had no key when it was written."""
    return not event.key or bytes(event.key) == b"null"


def keyed(event: Event, names: Sequence[str]) -> Event:
    """A keyless event with the key that its table has now, taken from its row.

    Raises:
        Rejected: the row lacks a column of that key, or has no value there.
    """
    columns = row(event.after or event.before or b"{}")
    missing = [name for name in names if name not in columns or bytes(columns[name]) == b"null"]
    if missing or not names:
        raise Rejected(f"it has no key, and its row has no value for today's key ({', '.join(missing)})")
    key = msgspec.Raw(msgspec.json.encode({name: columns[name] for name in names}))
    return msgspec.structs.replace(event, key=key)


def identity(event: Event) -> tuple[str, str | None]:
    """The document id of the event's row, and the one that it had before where its key changed.

    Raises:
        Rejected: the event has no key, so its row cannot be told from others.
    """
    if keyless(event):
        raise Rejected("it has no key")
    key = row(event.key)
    found = identify(key)
    if not event.before or event.op == "delete":
        return found, None
    before = row(event.before)
    if not before.keys() >= key.keys():
        return found, None
    old = identify({name: before[name] for name in key})
    return found, old if old != found else None


def load(name: str) -> Transform:
    """The function that "module:function" names; the working directory is searched, too.

    Raises:
        ConfigError: there is no such module or function.
    """
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.append("")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # noqa: BLE001 - whatever a user's module raises when it is imported
        raise ConfigError(
            f"the transform {name} cannot be loaded ({type(error).__name__})",
            'transform = "module:function" names an importable function; check PYTHONPATH',
        ) from None
    if not callable(found):
        raise ConfigError(f"the transform {name} is no function", 'transform = "module:function"')
    return found  # type: ignore[no-any-return]


class Builder:
    """Makes documents in one shape.

    Args:
        table: the table's name as documents carry it.
        toastable: says whether values of a column may be left out of events (None: any may).
    """

    def __init__(self, shape: Shape, table: str, toastable: Callable[[str], bool]) -> None:
        self.shape = shape
        self._table = msgspec.json.encode(table)
        self._keep = set(shape.columns)
        self._exclude = set(shape.exclude)
        self._rename = shape.rename
        self._transform = load(shape.transform) if shape.transform else None
        self._toastable = toastable

    def kept(self, names: Iterable[str]) -> list[str]:
        """Those of `names` whose values matter to the document."""
        return [n for n in names if n not in self._exclude and (not self._keep or n in self._keep)]

    def base(self, source: bytes | msgspec.Raw) -> Row:
        """The columns that a written document still knows, as they stood in its row."""
        found = row(source)
        if self._transform is not None:
            ours = row(found[HIDDEN]) if HIDDEN in found else {}
            return row(ours["raw"]) if "raw" in ours else {}
        back = {new: old for old, new in self._rename.items()}
        return {back.get(name, name): value for name, value in found.items() if name != HIDDEN}

    async def build(self, event: Event, doc_id: str, at: int, base: Row | None) -> Operation:
        """The operation for an insert, update or read.

        Args:
            at: the event's version.
            base: the columns that the event names as unchanged, where it does.

        Raises:
            Rejected: the transform failed, or the base lacks a column.
        """
        if self.shape.plain and not event.unchanged:
            after = bytes(event.after)
            opening = after[:-1] if len(after) == 2 else after[:-1] + b","
            return Put(doc_id, at, b'%s"%s":%s}' % (opening, HIDDEN.encode(), self._hidden(event, at, None)))
        columns = row(event.after)
        for name in self.kept(event.unchanged):
            if base is None or name not in base:
                raise Rejected(f"the unchanged column {name} is not known")
            columns[name] = base[name]
        columns = {name: columns[name] for name in self.kept(columns)}
        if self._transform is None:
            document: dict[str, Any] = {self._rename.get(name, name): value for name, value in columns.items()}
            document[HIDDEN] = msgspec.Raw(self._hidden(event, at, None))
            return Put(doc_id, at, _encoder.encode(document))
        return await self._transformed(event, doc_id, at, columns)

    async def _transformed(self, event: Event, doc_id: str, at: int, columns: Row) -> Operation:
        assert self._transform is not None
        given = _plain.decode(_encoder.encode({self._rename.get(n, n): v for n, v in columns.items()}))
        try:
            made = self._transform(given)
            if inspect.isawaitable(made):
                made = await _awaited(made)
        except Exception as error:  # noqa: BLE001 - whatever a user's function raises ends this one document only
            raise Rejected(f"the transform raised {type(error).__name__}") from None
        if made is None:
            return Remove(doc_id, at)
        if isinstance(made, list):
            raise ConfigError(
                f"the transform {self.shape.transform} returned a list: several documents a row are not available yet",
                "return one dict, or None for a row that is not to be found",
            )
        if not isinstance(made, dict):
            raise Rejected(f"the transform returned {type(made).__name__}, not a dict")
        raw = {name: value for name, value in columns.items() if self._toastable(name)}
        document = {**made, HIDDEN: msgspec.Raw(self._hidden(event, at, raw))}
        try:
            return Put(doc_id, at, _encoder.encode(document))
        except (TypeError, ValueError, OverflowError) as error:
            raise Rejected(f"the transform's document is no JSON ({type(error).__name__})") from None

    def _hidden(self, event: Event, at: int, raw: Row | None) -> bytes:
        partition = b"" if event.partition is None else b',"partition":' + msgspec.json.encode(event.partition)
        values = b"" if raw is None else b',"raw":' + msgspec.json.encode(raw)
        return b'{"version":%d,"table":%s,"key":%s%s%s}' % (at, self._table, bytes(event.key), partition, values)


async def _awaited(made: Awaitable[Any]) -> Any:
    return await made
