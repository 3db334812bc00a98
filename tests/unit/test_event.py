"""Events that stand for larger ones."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from bridge import event
from bridge.event import Ref

REF = Ref("cdc_main_large", "00000001-x", 9, "SHA-256=x")
DEEP = b'{"id":1,"x":' + b"[" * 3000 + b"]" * 3000 + b"}"
KEYS = [b"null", b'{"id":1}', b'{"a\\"b,{":"}]","id":1}', b'{"id":{"before":{"id":7},"after":[{}]}}']
BEFORES = [b"", b'{"id":1}', b'{"id":2}', b'{"id":2,"a\\"b,{":"}]","x":"\\"after\\":{,"}', DEEP]
AFTERS = [b'{"a":1,"ref":{"bucket":2},"after":{"before":[1,{"lsn":"x"}]}}', b"{}", DEEP]
UNCHANGED = [b"", b',"unchanged":["a,b","c}"]']


def wire(key: bytes, before: bytes, after: bytes, unchanged: bytes) -> bytes:
    past = b',"before":' + before if before else b""
    end = event.tail("public.t_1") + b',"lsn":"0/1"' + event.transaction("0/2", 7, None)
    return event.head("update", "main", "public", "t") + b',"key":%s%s,"after":%s%s%s' % (
        key, past, after, unchanged, end,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "before", "after", "unchanged"), list(itertools.product(KEYS, BEFORES, AFTERS, UNCHANGED))
)
def test_a_claim_check_takes_the_place_of_the_row_and_leaves_the_rest(
    key: bytes, before: bytes, after: bytes, unchanged: bytes
) -> None:
    payload = wire(key, before, after, unchanged)
    short = event.referred(payload, REF)
    found = event.decode(short)
    assert found.ref == event.ref_of(short) == REF
    assert (bytes(found.key), bytes(found.after)) == (key, b"")
    assert found.unchanged == (("a,b", "c}") if unchanged else ())
    assert (found.partition, found.lsn, found.commit_lsn, found.txid) == ("public.t_1", "0/1", "0/2", 7)
    if before and key == b'{"id":1}' and before != b'{"id":1}' and before != DEEP:
        assert msgspec.json.decode(found.before) == {"id": 2}
    elif before and key == KEYS[2] and before.startswith(b'{"id":2'):
        assert msgspec.json.decode(found.before) == {'a"b,{': "}]", "id": 2}
    elif key != KEYS[3]:
        assert bytes(found.before) == b""
    claim = b',"ref":' + msgspec.json.encode(REF)
    assert event._without_row(payload, claim) == short


def test_a_row_that_only_looks_like_a_claim_check_is_none() -> None:
    for after in AFTERS:
        assert event.ref_of(wire(b"null", b"", after.replace(b'"bucket":2', b'"bucket":"b","name":"n"'), b"")) is None
