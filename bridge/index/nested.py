"""JSON values within the limits that field types set. Pure; numbers keep every digit.

Engines refuse a whole document for one name that is there twice or too long, for objects in objects in objects …, and
(flat_object) for a long string: what is over a limit is left out or becomes text, and the rest stays.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_encode = msgspec.json.encode


class Rules(NamedTuple):
    """What a field type takes.

    Args:
        deepest: objects and arrays below this many become their JSON text.
        longest: strings of more bytes are left out.
        path: members whose path is of more bytes are left out.
        nulls: whether members may be null; else they are left out.
        dotted: whether a dot in a name is part of the name; else it separates names, none of which may be empty.
    """

    deepest: int = 20
    longest: int | None = None
    path: int = 8_000
    nulls: bool = True
    dotted: bool = True


STORED = Rules(deepest=1_000_000, path=1_000_000_000)
RULES = {
    "flattened": Rules(),
    # Its terms are "path=value" of at most 32,766 bytes, whatever their length in characters.
    "flat_object": Rules(longest=24_000, nulls=False),
    "object": Rules(dotted=False),
    "nested": Rules(dotted=False),
}


def wrapped(raw: bytes, rules: Rules) -> bytes:
    """A JSON value as the object, or list of objects, that a field of objects takes; null stays null."""
    opening = raw[:1]
    plain = opening == b"{" or (opening == b"[" and all(bytes(item)[:1] == b"{" for item in _items(raw)))
    if not plain and raw != b"null":
        raw = b'{"value":%b}' % raw
    return ruled(raw, rules)


def ruled(raw: bytes, rules: Rules) -> bytes:
    """A JSON value within the rules; of a name that is there twice the last one counts."""
    return _ruled(raw, rules, 0, 0) or b"null"


def _ruled(raw: bytes, rules: Rules, depth: int, path: int) -> bytes:
    """Empty where the value is to be left out. One frame a level: events nest up to 500 deep."""
    opening = raw[:1]
    if opening == b"{" or opening == b"[":
        if depth >= rules.deepest:
            raw = _encode(raw.decode())
        elif opening == b"[":
            items = []
            for item in _items(raw):
                found = _ruled(bytes(item), rules, depth + 1, path)
                if found:
                    items.append(found)
            return b"[%b]" % b",".join(items)
        else:
            members = []
            for name, value in _members(raw).items():
                key = _encode(name)
                found = b""
                if path + len(key) <= rules.path and _named(name, rules):
                    found = _ruled(bytes(value), rules, depth + 1, path + len(key))
                if found:
                    members.append(key + b":" + found)
            return b"{%b}" % b",".join(members)
    if raw[:1] == b'"':
        return raw if rules.longest is None or len(raw) <= rules.longest else b""
    return b"" if raw == b"null" and not rules.nulls else raw


def _named(name: str, rules: Rules) -> bool:
    if rules is STORED:
        return True
    return "\0" not in name and (rules.dotted or all(part.strip() for part in name.split(".")))
