"""Changes of busy tables, read by one regular expression a table instead of being decoded. Pure.

Most changes of a table look alike: all columns are there, in the table's order, and the key stays (`rows.Usual`). For
such a table a pattern is made of everything in wal2json's record that is always the same, from its columns on; what
matches has its values as groups, and gives the same bytes as `rows.change`. Whatever does not match is decoded.

A string is matched up to the next quotation mark, escaped or not. That is enough: what follows in a pattern has
quotation marks of its own or is the record's end, and inside a string both would look otherwise, for JSON escapes every
quotation mark there. What else is in a string is passed on as PostgreSQL's own `escape_json` wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

import msgspec

from bridge import event
from bridge.source.rows import Plan, Usual
from bridge.source.values import BOOL, INTEGERS, Wire

# Decoded changes of a table, under one plan, after which a pattern pays: making one costs as much as decoding hundreds.
BUSY = 500
WIDEST = 400

_ACTION = len(b'{"action":"')
_INSERT, _UPDATE = ord("I"), ord("U")
_LSN = b',"lsn":"'
_COLUMNS = b',"columns":['
_VALUE = rb'"[^"]*"|-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?|true|false|null'
# What a type's values usually are is tried first, each alternative known by its first character.
_INTEGER = rb'[1-9][0-9]*+|0|-[1-9][0-9]*+|"[^"]*"|null'
_BOOLEAN = rb'true|false|null|"[^"]*"'
_VALUES = {BOOL: _BOOLEAN, **dict.fromkeys(INTEGERS, _INTEGER)}

Match = Callable[[bytes, int], re.Match[bytes] | None]


class Form(msgspec.Struct, frozen=True, gc=False):
    """One kind of change: `match` gives the columns' values, `order` puts them as the event's `format` has them."""

    match: Match
    order: Callable[[Sequence[bytes]], tuple[bytes, ...]]
    converts: list[tuple[int, Wire]]
    format: bytes


class Pattern(msgspec.Struct, gc=False):
    """What is known of one table under one plan; without forms until it is busy."""

    name: tuple[str, str]
    plan: Plan
    seen: int = 0
    insert: Form | None = None
    update: Form | None = None


class Patterns:
    """The patterns of one stream's tables; `known` are the plans of today, by schema and table."""

    def __init__(self, known: Mapping[tuple[str, str], Plan | None]) -> None:
        self._known = known
        self._patterns: dict[bytes, Pattern] = {}

    def read(self, data: bytes, closing: bytes) -> tuple[Plan, bytes, bytes] | None:
        """The plan of a usual change, its LSN and its event; None for any other record.

        data: the record in UTF-8; closing: its transaction's. Raises what a value's conversion does.
        """
        start = data.find(_LSN, _ACTION) + len(_LSN)
        end = data.find(b'"', start)
        at = data.find(_COLUMNS, end)
        pattern = self._patterns.get(data[end:at])
        if pattern is None:
            return None
        action = data[_ACTION]
        form = pattern.insert if action == _INSERT else pattern.update if action == _UPDATE else None
        if form is None or self._known.get(pattern.name) is not pattern.plan:
            return None
        found = form.match(data, at)
        if found is None:
            return None
        values: Sequence[bytes] = found.groups()
        if form.converts:
            values = list(values)
            for place, convert in form.converts:
                values[place] = convert(values[place])
        lsn = data[start:end]
        return pattern.plan, lsn, form.format % (*form.order(values), lsn, closing)

    def learn(self, name: tuple[str, str], plan: Plan, data: bytes) -> None:
        """A change of the table `name` had to be decoded; it fitted `plan`."""
        start = data.find(_LSN, _ACTION) + len(_LSN)
        end = data.find(b'"', start)
        key = data[end : data.find(_COLUMNS, end)]
        pattern = self._patterns.get(key)
        if pattern is None or pattern.plan is not plan:
            pattern = self._patterns[key] = Pattern(name, plan)
        pattern.seen += 1
        if pattern.seen == BUSY and plan.usual is not None and len(plan.usual.names) <= WIDEST:
            pattern.insert, pattern.update = _forms(plan, plan.usual)


def _forms(plan: Plan, usual: Usual) -> tuple[Form | None, Form | None]:
    """How the table's inserts and updates are read; None where they are never usual."""
    if plan.dropped:
        return None, None
    places = [*usual.key, *(range(len(usual.names)) if usual.shown is None else usual.shown)]
    if len(places) < 2:
        return None, None
    openings = [
        re.escape(b'{"name":%b,"typeoid":%d' % (event.quote(name), oid))
        for name, oid in zip(usual.names, usual.oids, strict=True)
    ]
    groups = {place: b"?P<k%d>" % place for place in usual.key}
    columns = b",".join(
        [
            b'%b,"value":(%b%b)}' % (opening, groups.get(n, b""), _VALUES.get(usual.oids[n], _VALUE))
            for n, opening in enumerate(openings)
        ]
    )
    identity = b",".join([b'%b,"value":(?P=k%d)}' % (openings[n], n) for n in usual.key])
    keys = b",".join([b"%b}" % openings[n] for n in usual.key])
    if usual.pk is None:
        primary = rb'(?:,"pk":\[[^]]*\])?'
    elif keys:
        primary = rb',"pk":\[%b\]' % keys
    else:
        primary = rb'(?:,"pk":\[\])?'

    def form(middle: bytes, written: bytes) -> Form:
        expression = re.compile(rb',"columns":\[%b\]%b%b}' % (columns, middle, primary))
        return Form(expression.fullmatch, itemgetter(*places), usual.converts, written)

    update = form(rb',"identity":\[%b\]' % identity, usual.update) if identity and not plan.full else None
    return form(b"", usual.insert), update
