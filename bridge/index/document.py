"""One event → the operations that an index needs. Pure, but for calling the user's transform.

Row values stay the bytes that PostgreSQL gave wherever nothing has to look into them, so numbers keep every digit and
a plain row is copied, not parsed. Operations carry external versions: what a newer epoch wrote wins over an older one,
and within an epoch the later sequence wins, whatever order or repetition they arrive in.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import sys
from collections.abc import Awaitable, Callable, Iterable
from decimal import Decimal
from typing import Any

import msgspec

from bridge.errors import ConfigError
from bridge.event import Event, decode
from bridge.index import convert as fields
from bridge.index.convert import Convert, fit
from bridge.index.mapping import HIDDEN
from bridge.index.naming import ROUTED, Naming, Rejected, Row, Unknown, parts, row, sibling

EPOCH_BITS = 42
DEEPEST = 500
_TEXT = rb'"(?:[^"\\]|\\.)*+"'
_BRACKET = re.compile(rb"%s|([\[{])|([\]}])" % _TEXT)
_OURS = b'"%b":{"version":' % HIDDEN.encode()
_NOT_DELETED = (b"null", b"false")

Transform = Callable[[dict[str, Any]], Any]

_plain = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal)
_encoder = msgspec.json.Encoder(decimal_format="number")
_quote = msgspec.json.Encoder().encode


class Put(msgspec.Struct):
    """Write a document; `again` also over the same version (after that version was reserved by a delete).

    `id` is an address (`naming`), here and in `Remove`.
    """

    id: str
    version: int
    doc: bytes
    again: bool = False

    def line(self) -> bytes:
        """The operation as bulk lines."""
        if self.again or ROUTED in self.id:
            return b'{"index":{%s}}\n%s\n' % (_target(self), self.doc)
        return b'{"index":{"_id":%s,"version":%d,"version_type":"external"}}\n%s\n' % (
            _quote(self.id), self.version, self.doc
        )  # fmt: skip


class Remove(msgspec.Struct):
    """Delete a document unless a newer one is there; `again` also reserves a version that was deleted already."""

    id: str
    version: int
    again: bool = False

    def line(self) -> bytes:
        """The operation as a bulk line."""
        return b'{"delete":{%s}}\n' % _target(self)


Operation = Put | Remove


def _target(op: Operation) -> bytes:
    doc_id, routing = parts(op.id)
    where = b',"routing":' + msgspec.json.encode(routing) if routing else b""
    kind = b"external_gte" if op.again else b"external"
    return b'"_id":%s%s,"version":%d,"version_type":"%s"' % (msgspec.json.encode(doc_id), where, op.version, kind)


class Shape(msgspec.Struct, frozen=True):
    """What of a table's row gets into its document, and how.

    `columns` or `exclude`, then `rename`, then `transform`, then `constants`; a row whose `soft_delete` column holds
    neither null nor false has no document; `id` is a template, `routing` a column.
    """

    columns: list[str] = []
    exclude: list[str] = []
    rename: dict[str, str] = {}
    transform: str = ""
    constants: dict[str, Any] = {}
    id: str = ""
    routing: str = ""
    soft_delete: str = ""

    @property
    def plain(self) -> bool:
        """Whether the document is the row itself."""
        return not (self.columns or self.exclude or self.rename or self.transform or self.constants or self.soft_delete)


def version(epoch: int, seq: int) -> int:
    """The external version of what an event at `seq` of a writer's `epoch` wrote."""
    return epoch << EPOCH_BITS | seq


def read(data: bytes) -> Event:
    """The event in a message.

    Raises:
        Rejected: it is none, or nested so deeply that a document made of it could not be read again.
    """
    if len(data) > 2 * DEEPEST and data.count(b"[") + data.count(b"{") > DEEPEST and _depth(data) > DEEPEST:
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


def load(name: str) -> Transform:
    """The function that "module:function" names; the working directory is searched, too.

    Raises:
        ConfigError: there is no such module or function, or none that takes a row and returns.
    """
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.append("")
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a user's module raises when it is imported
        raise ConfigError(
            f"the transform {name} cannot be loaded ({type(error).__name__})",
            'transform = "module:function" names an importable function; check PYTHONPATH',
        ) from None
    if not callable(found):
        raise ConfigError(f"the transform {name} is no function", 'transform = "module:function"')
    if inspect.isgeneratorfunction(found) or inspect.isasyncgenfunction(found):
        raise ConfigError(f"the transform {name} is a generator", "return a list of documents instead of yielding them")
    with contextlib.suppress(ValueError):  # not every function written in C can be asked
        try:
            inspect.signature(found).bind({})
        except TypeError:
            raise ConfigError(
                f"the transform {name} cannot be called with one row", "define it with one parameter: the row, a dict"
            ) from None
    return found  # type: ignore[no-any-return]


class Builder:
    """Makes the documents of one table in one shape.

    Args:
        table: the table's name as documents carry it.
        naming: the addresses of its rows.
        toastable: says whether values of a column may be left out of events.
        fits: says whether the index can have a field of that name.

    `converters` hold, for columns whose field takes another JSON than the event has, what makes it.
    """

    def __init__(
        self,
        shape: Shape,
        table: str,
        naming: Naming,
        toastable: Callable[[str], bool],
        fits: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self.shape = shape
        self.naming = naming
        self.converters: dict[str, Convert] = {}
        self._plain = shape.plain
        self.table = table
        self._table = msgspec.json.encode(table)
        self._keep = set(shape.columns)
        self._exclude = set(shape.exclude)
        self._rename = shape.rename
        self._constants = {name: msgspec.Raw(_encoder.encode(value)) for name, value in shape.constants.items()}
        self._transform = load(shape.transform) if shape.transform else None
        self._toastable = toastable
        self._fits = fits
        self._left_out: set[str] = set()
        self._beside = {name for name in (shape.routing, shape.soft_delete) if name}

    def kept(self, names: Iterable[str]) -> list[str]:
        """Those of `names` whose values matter to the document."""
        return [name for name in names if name in self._beside or self._shown(name)]

    def omissible(self, columns: Row) -> Row:
        """The columns that matter to the document and whose values an event may leave out."""
        return {name: columns[name] for name in self.kept(columns) if self._toastable(name)}

    def needs(self, event: Event) -> bool:
        """Whether an event that writes a row leaves out values that its document needs."""
        return bool(event.unchanged) and bool(self.kept(event.unchanged)) and not self._deleted(row(event.after))

    def leaves(self, event: Event) -> bool:
        """Whether an event that takes a row's document away leaves out values that a later one may bring back."""
        return bool(event.unchanged) and bool(self.kept(event.unchanged)) and self._deleted(row(event.after))

    def _shown(self, name: str) -> bool:
        return (
            name not in self._exclude
            and name not in self._left_out
            and (not self._keep or name in self._keep)
            and self._rename.get(name, name) not in self._constants
        )

    def _deleted(self, columns: Row) -> bool:
        name = self.shape.soft_delete
        return bool(name) and bytes(columns.get(name, b"null")) not in _NOT_DELETED

    def base(self, source: bytes | msgspec.Raw) -> Row:
        """The columns that a written document still knows, as they stood in its row."""
        found = row(source)
        ours = row(found[HIDDEN]) if HIDDEN in found else {}
        raw = row(ours["raw"]) if "raw" in ours else {}
        if self._transform is not None:
            return raw
        back = {new: old for old, new in self._rename.items()}
        columns = {back.get(n, n): value for n, value in found.items() if n != HIDDEN and n not in self._constants}
        # A converted value stands in for its column's: converters give their own results back unchanged.
        return columns | raw

    @property
    def plain(self) -> bool:
        """Whether a row's document is the row itself."""
        return self._plain and not self.converters and not self._left_out

    def look(self, columns: Iterable[str]) -> None:
        """Leave out from now on what the index cannot have: one such field would cost the whole document."""
        if self._transform is None:
            names = [name for name in columns if self._shown(name)]
            self._left_out |= {name for name in names if not self._fits(self._rename.get(name, name))}

    def copied(self, event: Event, address: str, at: int) -> Put:
        """The operation for a row whose document is the row itself, with nothing unchanged: its bytes are copied."""
        partition = b"" if event.partition is None else b',"partition":' + _quote(event.partition)
        after = bytes(event.after)
        doc = b'%b%b"_bridge":{"version":%d,"table":%b,"key":%b%b}}' % (
            after[:-1], b"" if len(after) == 2 else b",", at, self._table, bytes(event.key), partition
        )  # fmt: skip
        return Put(address, at, fit(doc))

    async def build(self, event: Event, address: str, at: int, base: Row | None, had: int = 1) -> list[Operation]:
        """The operations for an insert, update or read; the first is of the row's own address.

        Args:
            at: the event's version.
            base: the columns that the event names as unchanged, where it does.
            had: how many documents the row may have had before, or more.

        Raises:
            Rejected: the transform failed. Unknown: the base lacks a column.
        """
        if not event.unchanged and had == 1 and self.plain:
            return [self.copied(event, address, at)]
        columns = row(event.after)
        if self._deleted(columns):
            return self.gone(address, at, had)
        for name in self.kept(event.unchanged):
            if base is None or name not in base:
                raise Unknown(f"the unchanged column {name} is not known")
            columns[name] = base[name]
        if self._deleted(columns):
            return self.gone(address, at, had)
        if HIDDEN in columns:
            self.look([HIDDEN])
        columns = {name: columns[name] for name in self.kept(columns)}
        raw = {name: value for name, value in columns.items() if self._hides(name)}
        documents = await self._documents({name: value for name, value in columns.items() if self._shown(name)})
        if not documents:
            return self.gone(address, at, had)
        count = max(len(documents), had)
        made: list[Operation] = []
        for number, document in enumerate(documents):
            hidden = self._hidden(event, at, {} if number else raw, 1 if number else count)
            try:
                doc = _encoder.encode({**document, **self._constants, HIDDEN: msgspec.Raw(hidden)})
            except (TypeError, ValueError, OverflowError) as error:
                raise Rejected(f"the transform's document is no JSON ({type(error).__name__})") from None
            made.append(Put(sibling(address, number) if number else address, at, fit(doc)))
        made += [Remove(sibling(address, number), at) for number in range(len(documents), had)]
        return made

    def converted(self, doc: bytes) -> bytes:
        """A document of this table with the fields converted that have become known since it was built, and without
        those that the index cannot have."""
        if self._transform is not None:
            return doc
        found, back = row(doc), {new: old for old, new in self._rename.items()}
        # A copied row may have had our own name, too, which a JSON object holds once.
        ours = doc.rfind(_OURS)
        copied = row(doc[:ours].rstrip(b",") + b"}") if ours > 0 else {}
        self.look([back.get(name, name) for name in found if name != HIDDEN or name in copied])
        gone = {self._rename.get(name, name) for name in self._left_out}
        if gone:
            doc = _encoder.encode({name: value for name, value in found.items() if name == HIDDEN or name not in gone})
        return fields.document(doc, {self._rename.get(n, n): convert for n, convert in self.converters.items()})

    def gone(self, address: str, at: int, had: int = 1) -> list[Operation]:
        """The operations for a row that has no document any more; the first is of the row's own address."""
        return [Remove(address, at), *(Remove(sibling(address, number), at) for number in range(1, had))]

    def _hides(self, name: str) -> bool:
        """Whether a column's value is kept in the hidden field because the document itself does not tell it."""
        told = self._transform is None and self._shown(name)
        return not told and self._toastable(name)

    async def _documents(self, columns: Row) -> list[dict[str, Any]]:
        if self._transform is None:
            made: dict[str, Any] = {}
            for name, value in columns.items():
                convert = self.converters.get(name)
                made[self._rename.get(name, name)] = msgspec.Raw(convert(bytes(value))) if convert else value
            return [made]
        given = _plain.decode(_encoder.encode({self._rename.get(n, n): v for n, v in columns.items()}))
        try:
            found = self._transform(given)
            if inspect.isawaitable(found):
                found = await _awaited(found)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it raises ends this one document only
            raise Rejected(f"the transform raised {type(error).__name__}") from None
        documents = [] if found is None else found if isinstance(found, list) else [found]
        for document in documents:
            if not isinstance(document, dict):
                raise Rejected(f"the transform returned {type(document).__name__}, not a dict, a list of them, or None")
        return documents

    def _hidden(self, event: Event, at: int, raw: Row, count: int) -> bytes:
        partition = b"" if event.partition is None else b',"partition":' + msgspec.json.encode(event.partition)
        values = b',"raw":' + msgspec.json.encode(raw) if raw else b""
        several = b',"count":%d' % count if count > 1 else b""
        return b'{"version":%d,"table":%s,"key":%s%s%s%s}' % (
            at, self._table, bytes(event.key), partition, values, several
        )  # fmt: skip


class Hidden(msgspec.Struct, frozen=True):
    """What the hidden field says of a document's row."""

    count: int = 1


class _Source(msgspec.Struct):
    hidden: Hidden = msgspec.field(name=HIDDEN, default=Hidden())


_source = msgspec.json.Decoder(_Source)


def count_of(source: bytes | msgspec.Raw) -> int:
    """How many documents a row may have, by the document at its own address."""
    return _source.decode(source).hidden.count


async def _awaited(made: Awaitable[Any]) -> Any:
    return await made
