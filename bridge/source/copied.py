"""Lines of COPY's text format as JSON. Pure.

What COPY prints of a text is nearly what JSON has between its quotation marks: backslash, newline, tab, carriage
return, backspace and form feed are escaped by both in the same way, and all else stands for itself. Only a quotation
mark has to be escaped as well. So most lines are put into a form that was prepared, cell by cell, as they are; those
with a vertical tab, or with a control character that COPY leaves as it is, are decoded.

Source: PostgreSQL documentation, COPY, "Text Format"; RFC 8259, section 7.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple

from bridge.source.values import CELLS, INTEGERS, Convert, text

FORMS = 256  # of one table, for as many choices of columns that are NULL

_NULL = b"\\N"
# Two characters take longer to look for than one, which most lines do not have.
_BACKSLASH, _QUOTE, _SPECIAL = ord("\\"), ord('"'), re.compile(rb"\\[Nv]").search
# Control characters become what no UTF-8 has, but for what COPY puts between cells and lines.
_SEEN = bytes([c if c >= 0x20 or c in b"\t\n" else 0xFF for c in range(256)])
_ESCAPES = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}


class Column(NamedTuple):
    """One column: `label` is `,"name":`, `convert` makes JSON of PostgreSQL's text.

    A cell is what COPY prints of a value, where a quotation mark may be escaped as well.
    """

    label: bytes
    oid: int
    convert: Convert

    @property
    def plain(self) -> bool:
        """Whether its cells are JSON already, but for the quotation marks around a text."""
        return self.convert is text or self.oid in INTEGERS

    @property
    def cell(self) -> Callable[[bytes], bytes]:
        """What makes JSON of a cell that is not NULL."""
        convert = self.convert
        return CELLS.get(convert) or (lambda cell: convert(_unescape(cell).decode()))


class Form(NamedTuple):
    """What those lines have in common that are NULL in the same columns: `order` picks the cells for the places of
    `format`, converts: those, by their place, that are not JSON as they are."""

    format: bytes
    order: Callable[[Sequence[bytes]], tuple[bytes, ...]]
    converts: list[tuple[int, Callable[[bytes], bytes]]]


class Lines:
    """The events of lines that have these columns.

    Args:
        key: the places of the key's columns; none where there is no key.
        head, closing: what stands before and behind the key and the row.
    """

    def __init__(self, columns: Sequence[Column], key: Sequence[int], head: bytes, closing: bytes) -> None:
        self._columns = columns
        self._key = key
        self._head = head
        self._closing = closing
        self._start = len(head) + len(b',"key":')
        self._forms: dict[tuple[int, ...], Form] = {(): self._form(())}

    def payload(self, line: bytes) -> bytes:
        """The event for one line, its newline included.

        Raises:
            ValueError: it is no UTF-8, has another number of cells, or a cell is not of its column's type.
        """
        return self._quick(line) or self._careful(line)

    def key(self, payload: bytes) -> bytes:
        """The key of a `payload` as JSON."""
        return payload[self._start : payload.index(b',"after":{', self._start)]

    def texts(self, line: bytes) -> list[str]:
        """The key's values in a line, each as PostgreSQL reads it."""
        cells = line[:-1].split(b"\t")
        return [_unescape(cells[place]).decode() for place in self._key]

    def _quick(self, line: bytes) -> bytes:
        """The event of most lines; empty for one that has to be decoded."""
        try:
            line.translate(_SEEN).decode()
        except UnicodeDecodeError:
            return b""
        special = _BACKSLASH in line and _SPECIAL(line)
        if special and b"\\v" in line:
            return b""
        if _QUOTE in line:
            line = line.replace(b'"', b'\\"')
        cells = line[:-1].split(b"\t")
        if len(cells) != len(self._columns):
            return b""
        nulls = tuple([place for place, cell in enumerate(cells) if cell == _NULL]) if special else ()
        form = self._forms.get(nulls)
        if form is None:
            if len(self._forms) >= FORMS:
                return b""
            form = self._forms[nulls] = self._form(nulls)
        for place, convert in form.converts:
            cells[place] = convert(cells[place])
        return form.format % form.order(cells)

    def _form(self, nulls: tuple[int, ...]) -> Form:
        columns = self._columns

        def member(place: int) -> bytes:
            value = b"null" if place in nulls else b'"%b"' if columns[place].convert is text else b"%b"
            return columns[place].label.replace(b"%", b"%%") + value

        def object_(places: Sequence[int]) -> bytes:
            return b"{%b}" % b"".join([member(place) for place in places])[1:]

        every = range(len(columns))
        places = [place for place in (*self._key, *every) if place not in nulls]
        return Form(
            b'%b,"key":%b,"after":%b%b' % (
                self._head.replace(b"%", b"%%"),
                object_(self._key) if self._key else b"null",
                object_(every),
                self._closing.replace(b"%", b"%%"),
            ),
            itemgetter(*places) if len(places) > 1 else lambda cells: tuple([cells[place] for place in places]),
            [(place, columns[place].cell) for place in every if place not in nulls and not columns[place].plain],
        )  # fmt: skip

    def _careful(self, line: bytes) -> bytes:
        """The event of any line."""
        cells = line[:-1].split(b"\t") if self._columns else []
        members = [
            column.label + (b"null" if cell == _NULL else column.convert(_unescape(cell).decode()))
            for cell, column in zip(cells, self._columns, strict=True)
        ]
        key = b"{%b}" % b"".join([members[place] for place in self._key])[1:] if self._key else b"null"
        return b'%b,"key":%b,"after":{%b}%b' % (self._head, key, b"".join(members)[1:], self._closing)


def _unescape(cell: bytes) -> bytes:
    if _BACKSLASH not in cell:
        return cell
    return re.sub(rb"\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), cell, flags=re.DOTALL)
