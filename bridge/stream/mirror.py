"""The values under a prefix of the state bucket, kept here and brought up to date by what was written since.

Where nothing was, that costs nothing, or one request; so a look each second costs the same with ten tables and with a
thousand. All comes from the bucket's leader, in order.

Source: ADR-8 (a key's messages); `$JS.API.STREAM.MSG.GET` with `next_by_subj`.
"""

from __future__ import annotations

import time
from typing import Generic, TypeVar

import msgspec

from bridge.stream.server import Broker, StreamState
from bridge.stream.state import REMOVED, State

T = TypeVar("T")

# After so many changes between two looks it is cheaper to read all of it.
MANY = 50
# What a purge removes leaves nothing to be noticed by.
AGAIN_AFTER = 60.0


class Mirror(Generic[T]):
    """The values of one kind under `prefix`, which ends with a dot."""

    def __init__(self, broker: Broker, bucket: str, prefix: str, kind: type[T]) -> None:
        self._broker = broker
        self._stream = f"KV_{bucket}"
        self._root = f"$KV.{bucket}."
        self._prefix = prefix
        self._kind = kind
        self._values: dict[str, T] = {}
        self._created = ""
        self._seq = 0
        self._read = 0.0

    async def values(self, state: State, bucket: StreamState) -> dict[str, T]:
        """The keys with their values, as the bucket has them at the least since it said `bucket` of itself."""
        known = bucket.created == self._created and bucket.last_seq >= self._seq
        if not known or time.monotonic() - self._read > AGAIN_AFTER or not await self._followed(bucket.last_seq):
            self._values = await state.values(self._prefix, self._kind)
            self._created, self._seq, self._read = bucket.created, bucket.last_seq, time.monotonic()
        return dict(self._values)

    async def _followed(self, upto: int) -> bool:
        """Whether everything up to a sequence is here now."""
        for _ in range(MANY):
            if self._seq >= upto:
                return True
            wanted = {"next_by_subj": f"{self._root}{self._prefix}>", "seq": self._seq + 1}
            found = await self._broker.message(self._stream, **wanted)
            if found is None:
                self._seq = upto
                return True
            key = found.subject.removeprefix(self._root)
            if REMOVED & found.headers.keys():
                self._values.pop(key, None)
            else:
                self._values[key] = msgspec.json.decode(found.data, type=self._kind)
            self._seq = found.seq
        return False
