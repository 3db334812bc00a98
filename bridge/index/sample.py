"""A few hundred documents of a rebuild, remembered as they are sent, and compared with what the index then holds. Pure.

Remembered are versions and digests, not the rows. Every operation on a chosen id is seen, deletes too, so a document
that the engine has lost shows as well as one that it holds in another state. An id about which the engine's answer left
a doubt (refused, or something newer stood there) is no longer compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from bridge.index.document import Operation, Put

MOST = 200


class Held(Protocol):
    """A document as the engine gives it."""

    @property
    def version(self) -> int: ...
    @property
    def source(self) -> bytes | msgspec.Raw: ...


class Expected(NamedTuple):
    """The last operation on an id: its version, and the document's digest (None: deleted)."""

    version: int
    digest: bytes | None


class Sample:
    """Up to `most` ids, spread evenly over all that is sent: each time it is full, every second one goes."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._stride = 1
        self._until_next = 0
        self._ids: dict[str, Expected] = {}

    @property
    def ids(self) -> list[str]:
        """The ids to compare."""
        return list(self._ids)

    def sent(self, ops: Sequence[Operation]) -> None:
        """Take operations that are about to be sent; those on one id come in order."""
        known = self._ids
        for op in ops:
            if op.id in known:
                self._note(op)
        while self._until_next < len(ops):
            self._note(ops[self._until_next])
            self._until_next += self._stride
            if len(known) > self._most:
                for dropped in list(known)[1::2]:
                    del known[dropped]
                self._stride *= 2
        self._until_next -= len(ops)

    def _note(self, op: Operation) -> None:
        before = self._ids.get(op.id)
        if before is not None and before.version > op.version:
            return
        try:
            self._ids[op.id] = Expected(op.version, digest(op.doc) if isinstance(op, Put) else None)
        except (msgspec.DecodeError, ValueError, RecursionError):
            self._ids.pop(op.id, None)

    def changed(self, op: Operation) -> None:
        """Take a document in place of the one that was sent with that version and not taken."""
        if op.id in self._ids and self._ids[op.id].version == op.version:
            self._note(op)

    def doubt(self, ops: Iterable[Operation]) -> None:
        """Forget ids whose operation has not become what stands in the index."""
        for op in ops:
            if op.id in self._ids and self._ids[op.id].version <= op.version:
                del self._ids[op.id]

    def differing(self, found: Mapping[str, Held], *, verbatim: bool) -> list[str]:
        """The ids that are missing, there although deleted, or not as they were sent.

        Args:
            found: the documents of these ids that the index holds.
            verbatim: whether the engine gives documents back as they were sent.
        """
        return [doc_id for doc_id, sent in self._ids.items() if not _same(sent, found.get(doc_id), verbatim)]


def _same(sent: Expected, held: Held | None, verbatim: bool) -> bool:
    if held is None or sent.digest is None:
        return held is None and sent.digest is None
    return held.version == sent.version and (not verbatim or digest(held.source) == sent.digest)


def digest(document: bytes | msgspec.Raw) -> bytes:
    """A document's digest; spaces, the order of fields and the spelling of numbers do not count.

    Raises:
        DecodeError, ValueError, RecursionError: it is no JSON that can be read.
    """
    plain = msgspec.json.encode(msgspec.json.decode(document), order="deterministic")
    return hashlib.blake2b(plain, digest_size=16).digest()
