"""How the rows of a table are called in an index: document ids and routing. Pure.

Different rows of an index never have the same id. An address is an id, and where documents are routed the routing
value behind a zero byte, which no value of PostgreSQL holds: with routing an id stands for one document per value.

    42   alice   2026|7          the key's values (see `identify`)
    public.posts|42              … in an index of several tables
    post-42                      … by a template, `id = "post-{id}"`
    42||1   42||2                further documents that a transform made of row 42
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Mapping, Sequence

import msgspec

from bridge.event import Event

LONGEST_ID = 512
NO_KEY = msgspec.Raw(b"null")
ROUTED = "\0"
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
_WORDS = frozenset({"true", "false", "null"})
_PREFIXED = ("'", "[", "{", "#")
_TEXT = rb'"(?:[^"\\]|\\.)*+"'
_SCALAR = rb"(?:%s|[-+.0-9eE]+|true|false|null)" % _TEXT
_OPENING = re.compile(
    rb'\{"op":"(\w+)","source":%(t)s,"schema":(%(t)s),"table":(%(t)s)'
    rb'(?:,"key":(\{%(t)s: ?%(s)s(?:, ?%(t)s: ?%(s)s)*\}))?' % {b"t": _TEXT, b"s": _SCALAR}
)
_ONE_NUMBER = re.compile(rb'\{"[^"\\]*": ?(-?\d{1,100})\}')
_ALWAYS_ESCAPED = frozenset("%|")

# What reading somebody's JSON can raise: that one event or document is then the trouble, and nothing else.
UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)

Row = dict[str, msgspec.Raw]

_row = msgspec.json.Decoder(Row)


class Rejected(Exception):
    """This event cannot become a document; the reason holds no row value. It goes to the dead letters."""


class Unknown(Rejected):
    """Columns that an event leaves out are not known."""


class Outline(msgspec.Struct, frozen=True):
    """What the opening of an event tells that cannot be read whole; empty where it does not even tell that."""

    op: str = ""
    schema: str = ""
    table: str = ""
    key: msgspec.Raw = NO_KEY


def row(data: bytes | msgspec.Raw) -> Row:
    """The columns of a raw JSON object, each value as raw JSON."""
    return _row.decode(data)


def identify(key: Mapping[str, msgspec.Raw], prefix: str = "") -> str:
    """The document id of a key; different keys never give the same one.

    One value stands as it is (`42`, `alice`), several are joined with `|`. A string that would read like something else
    gets an apostrophe in front, `\\` and `|` are escaped, and ids over 512 bytes become `#` and a SHA-256.
    """
    return _short(prefix + "|".join([_part(bytes(value)) for value in key.values()]))


def _short(found: str) -> str:
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
    return _escaped(found)


def _escaped(text: str) -> str:
    if "\\" in text or "|" in text:
        return text.replace("\\", "\\\\").replace("|", "\\|")
    return text


def text_of(value: bytes | msgspec.Raw) -> str:
    """A raw JSON value as text: a string without its quotes, anything else as it is written."""
    raw = bytes(value)
    return str(msgspec.json.decode(raw)) if raw[:1] == b'"' else raw.decode()


def sibling(address: str, number: int) -> str:
    """The address of a row's further document; `||` stands in no id of a row."""
    doc_id, zero, routing = address.partition(ROUTED)
    return f"{_short(f'{doc_id}||{number}')}{zero}{routing}"


def parts(address: str) -> tuple[str, str]:
    """Id and routing value, empty where there is none, of an address."""
    doc_id, _, routing = address.partition(ROUTED)
    return doc_id, routing


def address(doc_id: str, routing: str) -> str:
    """The address of a document."""
    return f"{doc_id}{ROUTED}{routing}" if routing else doc_id


class Template:
    """`"post-{id}"`: literal text and columns of the key.

    With several columns a value's characters that also stand in the literal text are written as %XX, so that different
    keys still give different ids.

    Raises:
        ValueError: no columns, columns with nothing between them, or `|` in the text.
    """

    def __init__(self, text: str) -> None:
        self.opening = ""
        self.columns: list[str] = []
        self._texts: list[str] = []
        for literal, column, spec, conversion in string.Formatter().parse(text):
            if "|" in literal:
                raise ValueError("the template of an id cannot hold |")
            if not self._texts:
                self.opening = literal
            self._texts.append(literal)
            if column is None:
                continue
            if not column or spec or conversion:
                raise ValueError(f"the template {text!r} must name columns plainly: post-{{id}}")
            if self.columns and not literal:
                raise ValueError(f"the template {text!r} needs text between its columns: {{a}}-{{b}}")
            self.columns.append(column)
        if not self.columns:
            raise ValueError(f"the template {text!r} names no column: post-{{id}}")
        literals = frozenset("".join(self._texts)) if len(self.columns) > 1 else frozenset()
        self._escaped = literals | _ALWAYS_ESCAPED

    def id(self, key: Mapping[str, msgspec.Raw]) -> str:
        """The id of a key; Rejected where that lacks a column."""
        found = []
        for number, literal in enumerate(self._texts):
            found.append(literal)
            if number < len(self.columns):
                column = self.columns[number]
                if column not in key:
                    raise Rejected(f"its key has no column {column}, which the index's id is made of")
                found.append(self._value(text_of(key[column])))
        return _short("".join(found) or "'")

    def _value(self, text: str) -> str:
        if self._escaped.isdisjoint(text):
            return text
        return "".join(
            "".join(f"%{byte:02X}" for byte in letter.encode()) if letter in self._escaped else letter
            for letter in text
        )


def quoted(schema: str, table: str) -> str:
    """`schema.table`, a part in double quotes where a dot or quote in it would read as something else."""
    return ".".join('"' + p.replace('"', '""') + '"' if "." in p or '"' in p else p for p in (schema, table))


def opening(template: str, schema: str, table: str) -> str:
    """With what the ids of a table begin in an index of several tables."""
    return Template(template).opening if template else f"{_escaped(quoted(schema, table))}|"


class Naming:
    """The addresses of one table's rows.

    Args:
        template: of ids; empty for the key's values.
        prefix: in front of ids that no template makes.
        routing: the column that documents are routed by; empty for none.
    """

    def __init__(self, template: str = "", prefix: str = "", routing: str = "") -> None:
        self._template = Template(template) if template else None
        self._prefix = prefix
        self._routing = routing
        self._short = not template and not routing and len(prefix) < LONGEST_ID // 4

    def id(self, key: Mapping[str, msgspec.Raw]) -> str:
        """The document id of a row with that key."""
        return self._template.id(key) if self._template is not None else identify(key, self._prefix)

    def identity(self, event: Event) -> tuple[str, str | None]:
        """The address of the event's row, and the one that it had before where that changed.

        Raises:
            Rejected: the event does not say which row it changes, or where that is routed to.
        """
        raw = bytes(event.key)
        if self._short and not event.before:
            # One whole number, as most keys are.
            number = _ONE_NUMBER.fullmatch(raw)
            if number is not None:
                return self._prefix + number[1].decode(), None
        if not raw or raw == b"null":
            raise Rejected("it has no key")
        key = row(raw)
        found = self.id(key)
        if self._routing:
            return self._routed(event, key, found)
        if not event.before or event.op == "delete":
            return found, None
        before = row(event.before)
        if not before.keys() >= key.keys():
            return found, None
        old = self.id({name: before[name] for name in key})
        return found, old if old != found else None

    def _routed(self, event: Event, key: Row, doc_id: str) -> tuple[str, str | None]:
        before = row(event.before) if event.before else {}
        after = row(event.after) if event.after else {}
        if event.op == "delete":
            return address(doc_id, self._value(key, before)), None
        if event.op != "update":
            return address(doc_id, self._value(key, after)), None
        old_key = {name: before.get(name, value) for name, value in key.items()}
        old = address(self.id(old_key), self._value(old_key, before))
        found = address(doc_id, self._value(key, after, before if self._routing in event.unchanged else {}))
        return found, old if old != found else None

    def _value(self, *rows: Mapping[str, msgspec.Raw]) -> str:
        for columns in rows:
            if self._routing in columns:
                value = bytes(columns[self._routing])
                return "" if value == b"null" else text_of(value)
        raise Rejected(
            f"it does not say where its row is routed to: {self._routing} is not in its key, and without REPLICA "
            "IDENTITY FULL the old value is not in the log"
        )


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


def outline(data: bytes) -> Outline:
    """Kind, table and key of an event that cannot be read whole, as far as its opening tells."""
    found = _OPENING.match(data)
    if found is None:
        return Outline()
    try:
        schema, table = (msgspec.json.decode(name, type=str) for name in found.group(2, 3))
        if found[4] is not None:
            row(found[4])
    except (msgspec.DecodeError, ValueError):
        return Outline(found[1].decode())
    return Outline(found[1].decode(), schema, table, msgspec.Raw(found[4]) if found[4] is not None else NO_KEY)
