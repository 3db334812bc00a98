"""What PostgreSQL sends: frames, records of wal2json by both ways of reading them, values, lines of COPY."""

from __future__ import annotations

import contextlib
import re

import msgspec

from bridge import event
from bridge.errors import BadRecord
from bridge.event import Position
from bridge.source import frames, lsn, pattern, rows, unreadable, values, wal2json
from bridge.source.catalog import Column, Relation
from bridge.source.copied import Column as Copied
from bridge.source.copied import Lines
from bridge.source.pattern import Patterns
from bridge.source.place import Place
from bridge.source.rows import Plan, Stale
from bridge.source.values import Type
from tests.fuzz.fuzzing import Target, outcome

INT, TEXT, STAMP, BYTEA, NUMERIC, JSON, BOOL, FLOAT, DATE = 23, 25, 1184, 17, 1700, 114, 16, 701, 1082
INTS, TEXTS, JSONS, BOXES, DOMAIN, NESTED = 1007, 1009, 199, 1020, 9001, 9005
TYPES = {
    found.oid: found
    for found in [
        Type(INT, "int4"), Type(TEXT, "text"), Type(INTS, "_int4", element=INT), Type(TEXTS, "_text", element=TEXT),
        Type(JSONS, "_json", element=JSON), Type(603, "box", delimiter=";"), Type(BOXES, "_box", 603, 0, ";"),
        Type(DOMAIN, "price", base=NUMERIC), Type(9004, "tags", base=TEXTS), Type(NESTED, "_tags", element=9004),
    ]
}  # fmt: skip
CODECS = {
    oid: values.codec(oid, TYPES)
    for oid in (
        INT, TEXT, STAMP, BYTEA, NUMERIC, JSON, BOOL, FLOAT, DATE, INTS, TEXTS, JSONS, BOXES, DOMAIN, NESTED,
    )
}  # fmt: skip
COLUMNS = {
    "id": INT, "body": TEXT, "at": STAMP, "blob": BYTEA, "price": NUMERIC, "doc": JSON, "yes": BOOL, "tags": TEXTS,
    'we"ird ]% \\': TEXT,
}  # fmt: skip
NAME = ("public", "t")
CLOSING = event.transaction("0/200", 7, "2026-01-01T00:00:00.000000Z")
is_json = msgspec.json.Decoder(msgspec.Raw).decode

# A string as PostgreSQL's `escape_json` writes it: what is matched by a pattern is taken for one.
_WRITTEN = re.compile(rb'(?:[^"]|"(?:[^"\\\x00-\x1f]|\\(?:["\\bfnrt]|u[0-9a-f]{4}))*+")*+')


def _plan(*, exact: bool) -> Plan:
    columns = tuple(Column(name, oid, "", toast=oid == TEXT, virtual=False) for name, oid in COLUMNS.items())
    relation = Relation(1, *NAME, "r", NAME, "d", ("id",), columns)
    return rows.plan(relation, "main", "cdc.main", CODECS, ("yes",), exact_numbers=exact)


def _trained(plan: Plan) -> Patterns:
    found = Patterns({NAME: plan})
    for _ in range(pattern.BUSY):
        found.learn(NAME, plan, RECORDS[1])
    return found


VALUES: dict[str, bytes] = {
    "id": b"1", "body": b'"b \\n \\"quoted\\""', "at": b'"2026-01-01 00:00:00.5+00"', "blob": b'"00ff"',
    "price": b"1.10", "doc": b'"{\\"a\\": [1]}"', "yes": b"true", "tags": b'"{a,NULL,\\"b c\\"}"',
    'we"ird ]% \\': b'"plain"',
}  # fmt: skip


def _cells(**other: bytes) -> bytes:
    found = {**VALUES, **other}
    return b",".join(
        b'{"name":%b,"typeoid":%d,"value":%b}' % (event.quote(name), oid, found[name]) for name, oid in COLUMNS.items()
    )


def _record(action: str, rest: bytes) -> bytes:
    return (
        b'{"action":"%b","xid":7,"timestamp":"2026-01-01 00:00:00.123456+00","lsn":"0/1AB","schema":"public",'
        b'"table":"t"%b}' % (action.encode(), rest)
    )


_PK = b',"pk":[{"name":"id","typeoid":23}]'
_KEY = b',"identity":[{"name":"id","typeoid":23,"value":1}]'
RECORDS = [
    b'{"action":"B","xid":725,"timestamp":"2026-01-01 00:00:00.5+00","lsn":"0/1526B30","nextlsn":"0/1526B60"}',
    b'{"action":"B","xid":725,"timestamp":"2026-01-01 00:00:00.5+00","origin":0,'
    b'"lsn":"0/1526B30","nextlsn":"0/1526B60"}',
    _record("I", b',"columns":[%b]%b' % (_cells(), _PK)),
    _record("I", b',"columns":[%b]%b' % (_cells(body=b"null", at=b'"infinity"', price=b'"NaN"', doc=b"null"), _PK)),
    _record("I", b',"columns":[%b]%b' % (_cells(body=b'"plain"', id=b"-5"), _PK)),
    _record("U", b',"columns":[%b]%b%b' % (_cells(), _KEY, _PK)),
    _record("U", b',"columns":[%b]%b%b' % (_cells(body=b'"plain"'), _KEY, _PK)),
    _record("U", b',"columns":[%b]%b%b' % (_cells(), _KEY.replace(b":1}", b":2}"), _PK)),
    _record("U", b',"columns":[%b]%b%b' % (_cells()[_cells().index(b",{") :][1:], _KEY, _PK)),
    _record("D", _KEY + _PK),
    _record("T", b""),
    b'{"action":"M","xid":7,"lsn":"0/1","transactional":true,"prefix":"app","content":"c \\" d"}',
    b'{"action":"C","xid":725,"timestamp":"2026-01-01 00:00:00+00","lsn":"0/1526B30","nextlsn":"0/1526B60"}',
]
PLANS = [_plan(exact=exact) for exact in (False, True)]
TRAINED = [_trained(plan) for plan in PLANS]


def record(data: bytes) -> str:
    """A record is refused, or its event is the same by pattern and by decoding, and is JSON."""
    return " ".join(_read(data, plan, patterns) for plan, patterns in zip(PLANS, TRAINED, strict=True))


def _read(data: bytes, plan: Plan, patterns: Patterns) -> str:
    quick = None
    if _is_text(data):  # the bridge asks for nothing else to be matched
        with contextlib.suppress(*unreadable.ERRORS):
            quick = patterns.read(data, CLOSING)
    try:
        found = wal2json.decode(data)
    except BadRecord as error:
        assert quick is None or not _WRITTEN.fullmatch(data), "the pattern takes what is no record"
        assert wal2json.begin(data) is None, "it is taken for a begin, and is no record"
        return f"{error.what[-40:]}"
    lsn.parse(found.lsn)
    Place().count(found.lsn.encode())
    closing = event.transaction("0/1", found.xid, wal2json.timestamp(found.timestamp))
    is_json(b"{" + closing[1:])
    begun = wal2json.begin(data)
    if begun is not None:
        assert found.action == "B", "it is taken for a begin, and is none"
        assert not found.origin, "it is from elsewhere"
        expected = (lsn.parse(found.lsn), lsn.parse(found.nextlsn), wal2json.timestamp(found.timestamp))
        assert (begun.start, begun.end, begun.committed_at) == expected, "the begin differs"
        whole = event.transaction(found.nextlsn, found.xid, begun.committed_at)
        assert (begun.xid, begun.closing) == (found.xid, whole), "the begin's closing differs"
    if found.action in "BCM":
        return found.action
    try:
        payload = _change(plan, found)
    except (Stale, BadRecord) as error:
        assert quick is None, "the pattern takes what does not fit"
        return type(error).__name__
    if plan.exact_numbers and not _numeric(found):
        return "no number"
    if quick is not None:
        assert quick[1:] == (found.lsn.encode(), payload), "pattern and decoding disagree"
    return f"{found.action} {quick is not None} {_shape(payload)}"


def _change(plan: Plan, found: wal2json.Record) -> bytes:
    """As streaming makes it."""
    try:
        payload = rows.change(plan, found, CLOSING)
        payload.decode()
    except unreadable.ERRORS:
        return unreadable.change(plan, found, CLOSING, "here")
    return payload


def _numeric(found: wal2json.Record) -> bool:
    """Whether all numbers are: no cast and no client can make PostgreSQL print anything else for their types."""
    cells = [cell for cell in (*found.columns, *found.identity) if cell.typeoid in values.NUMBERS]
    return all(
        re.fullmatch(rb'"?(NaN|-?Infinity|-?(0|[1-9]\d*)(\.\d+)?(e[+-]\d+)?)"?|null', bytes(c.value)) for c in cells
    )


def _shape(payload: bytes) -> str:
    with contextlib.suppress(RecursionError):
        is_json(payload)
        told = event.decode(payload)
        return f"{bool(bytes(told.before))} {len(told.unchanged)}"
    return "deep"


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def value(data: bytes) -> str:
    """A value of any type is JSON, or refused; of its two ways from wal2json, and from COPY, each gives the same."""
    text = data.decode(errors="replace").replace("\0", "")
    return " ".join(_value(oid, text) for oid in CODECS)


_FORMS = {
    NUMERIC: r"NaN|-?Infinity|-?\d+(\.\d+)?",
    FLOAT: r"NaN|-?Infinity|-?\d+(\.\d+)?(e[+-]\d+)?",
    INT: r"-?\d+",
    DOMAIN: r"NaN|-?Infinity|-?\d+(\.\d+)?",
    BOOL: r"[tf]",
    STAMP: r"-?infinity|\d{4,6}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d{1,6})?\+00( BC)?",
    DATE: r"-?infinity|\d{4,7}-\d\d-\d\d( BC)?",
    INTS: r'\{[^"a-z]*\}',
}
"""What PostgreSQL prints of types that nobody can cast other bytes into; zeros before a number's digits aside."""


def _value(oid: int, text: str) -> str:
    codec = CODECS[oid]
    if oid in _FORMS and not re.fullmatch(_FORMS[oid], text, re.ASCII):
        return "-"
    if oid in (NUMERIC, FLOAT, INT, DOMAIN, INTS) and re.search(
        r"(?<![\d.e+-])-?0\d|\{-?[,}]|,-?[,}]|--|\d-|[{}]\d*\{", text
    ):
        return "-"
    allowed = unreadable.ERRORS
    quoted = msgspec.json.encode(text)
    found: list[bytes] = []

    def convert() -> bytes:
        made = codec.convert(text)
        with contextlib.suppress(RecursionError):
            is_json(made)
        found.append(made)
        return made

    became = outcome(convert, *allowed)
    wired = outcome(lambda: found.append(codec.wire(quoted)), *allowed)
    if codec.convert in values.CELLS and "\\" not in text:
        found.append(values.CELLS[codec.convert](text.encode()))
    assert len(set(found)) <= 1 or oid == BYTEA, "ways of the same value disagree"
    # How deep a decoder goes depends on how deep it is called itself.
    deep = text.count("[") + text.count("{") > 200
    assert deep or (became == "bytes") == (wired == "NoneType"), "one way refuses what the other takes"
    return became


LINES = [
    Lines(
        [Copied(b"," + event.quote(name) + b":", oid, CODECS[oid].convert) for name, oid in columns],
        key,
        b'{"op":"read"',
        CLOSING,
    )
    for columns, key in [
        (list(COLUMNS.items()), [0]),
        ([("a", TEXT), ("b", TEXT), ("c", JSON)], [1, 0]),
        ([("a", TEXT)], []),
    ]
]


def copied(data: bytes) -> str:
    """A line is the same event by the quick way and by the careful one, or refused."""
    line = data.replace(b"\n", b"") + b"\n"
    return " ".join(_line(reader, line) for reader in LINES)


def _line(reader: Lines, line: bytes) -> str:
    quick = careful = b""
    with contextlib.suppress(*unreadable.ERRORS):
        quick = reader._quick(line)
    with contextlib.suppress(*unreadable.ERRORS):
        careful = reader._careful(line)
    assert not quick or not _printed(line) or quick == careful, "the quick way gives something else"
    became = outcome(lambda: reader.payload(line), *unreadable.ERRORS)
    if became == "bytes" and _printed(line):
        with contextlib.suppress(RecursionError):
            is_json(reader.payload(line))
        reader.texts(line)
        reader.key(reader.payload(line))
    return f"{became} {bool(quick)}"


def _printed(line: bytes) -> bool:
    """Whether COPY can have printed the line: with nothing but its own escapes, and numbers where they belong."""
    cells = line[:-1].split(b"\t")
    plain = all(re.fullmatch(rb"(?:[^\\\x08\x0b\x0c\r]|\\[bfnrtv\\])*|\\N", cell, re.DOTALL) for cell in cells)
    if not plain or len(cells) != len(COLUMNS):
        return plain
    forms = {0: _FORMS[INT], 2: _FORMS[STAMP], 4: _FORMS[NUMERIC], 6: _FORMS[BOOL]}
    return all(
        cells[place] == b"\\N" or re.fullmatch(rf"(?!-?0\d)(?:{form})", cells[place].decode(errors="replace"), re.ASCII)
        for place, form in forms.items()
    )


def frame(data: bytes) -> str:
    """A message of the replication stream is one of two kinds, or refused."""
    return outcome(lambda: frames.parse(memoryview(data)), BadRecord)


def place(data: bytes) -> str:
    """LSNs and positions: what is one is written back as it was read."""
    text = data.decode(errors="replace")
    said = []
    for parse, write in ((lsn.parse, lsn.show), (Position.parse, str)):
        try:
            found = parse(text)
        except ValueError:
            said.append("no")
            continue
        again = write(found)  # type: ignore[arg-type]
        assert parse(again) == found
        said.append("yes")
    return " ".join(said)


WORDS = [
    b'"action":"U"', b'"typeoid":25', b'"value":', b'"name":"id"', b'"lsn":"0/2"', b'"columns":[', b'"identity":[',
    b'"pk":[', b'"prefix":"app"', b'"content":', b'"nextlsn":"F/FFFFFFFF"', b'"timestamp":"', b"\\u0022", b'\\"}',
    b'"xid":null', b'"schema":"public"', b"\\\\", b'"table":"t"',
]  # fmt: skip
TEXT_SAMPLES = [
    b"1", b"-1.50", b"NaN", b"-Infinity", b"1e+20", b"t", b"f", b'{"a": [1, null]}', b"\\x00ff", b"\\x", b"infinity",
    b"2026-01-01 00:00:00.5+00", b"0044-03-15 12:00:00+00 BC", b"12026-01-01", b"0001-01-01 BC", b"{}", b"{1,2,NULL}",
    b'{{1,2},{3,4}}', b'{a,"b \\"c\\"",NULL,"NULL"}', b"[2:3]={a,b}", b'{"{\\"a\\": 1}",NULL}', b"{(1,1),(0,0);(2,2)}",
    b'{"{a,b}","{}"}', b"plain text", "é😀".encode(), b"",
]  # fmt: skip
COPY_SAMPLES = [
    b"1\tbody\t2026-01-01 00:00:00+00\t\\\\x00ff\t1.10\t{}\tt\t{a,b}\tx\n",
    b'2\t\\N\t\\N\t\\N\tNaN\t{"a": "\\\\"b"}\tf\t\\N\t"\n',
    b'a\tb "quoted"\t{"c": 1}\n',
    b"\\N\tb\\tc\\\\d\\n\tnull\n",
    b"one cell\\v\n",
    b"\\N\n",
]
FRAMES = [
    b"w" + bytes(24) + b'{"action":"C"}',
    b"w" + b"\xff" * 24,
    b"k" + bytes(17),
    b"k" + b"\xff" * 17,
    b"",
    b"r" + bytes(33),
]
PLACES = [b"16/B374D848", b"0/0", b"FFFFFFFF/FFFFFFFF", str(Position(1, 2**63, 5, 6, 7)).encode(), b"0/-1"]
TARGETS = [
    Target("record", record, RECORDS, WORDS),
    Target(
        "value", value, TEXT_SAMPLES, [b"{", b"}", b'"', b"\\", b",", b";", b"NULL", b" BC", b"+00", b"e+5", b"[0:1]="]
    ),
    Target("copy", copied, COPY_SAMPLES, [b"\t", b"\\N", b"\\t", b"\\\\", b"\\v", b'"', b"\x01", b"\\", b"\xc3\xa9"]),
    Target("frame", frame, FRAMES, [b"w", b"k", bytes(8)]),
    Target("place", place, PLACES, [b"/", b"-", b"0x", b"_", b"\xc2\xb2", b"+"]),
]
