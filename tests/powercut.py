"""What a power failure does to a JetStream server that does not sync each write: the end of its files is gone.

Made on the files of a stopped server. A block is a row of records, each led by its length (whose top bit says that it
has headers), sequence and time: little-endian, 22 bytes with the subject's length (nats-server, filestore.go).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

HEADER = struct.Struct("<IQqH")
LENGTH, ERASED = (1 << 31) - 1, (1 << 63) | (1 << 62)


class Record(NamedTuple):
    """One message's place in a block: `time` is when it was stored, in seconds since 1970."""

    block: Path
    offset: int
    size: int
    seq: int
    time: float


def folder(store: Path, stream: str) -> Path:
    """Where a stream's messages are."""
    return store / "jetstream" / "$G" / "streams" / stream / "msgs"


def records(store: Path, stream: str) -> Iterator[Record]:
    """Every record of a stream, in order."""
    for block in sorted(folder(store, stream).glob("*.blk"), key=lambda path: int(path.stem)):
        data = block.read_bytes()
        offset = 0
        while offset + HEADER.size <= len(data):
            length, seq, stored, _ = HEADER.unpack_from(data, offset)
            yield Record(block, offset, length & LENGTH, seq & ~ERASED, stored / 1e9)
            offset += length & LENGTH


def cut(store: Path, stream: str, stays: Callable[[Record], bool], *, into: int = 0) -> int:
    """Removes everything from the first record on for which `stays` is false; how many are gone.

    Args:
        into: bytes of that record that stay, as where a write was torn.
    """
    found = list(records(store, stream))
    gone = next((index for index, record in enumerate(found) if not stays(record)), None)
    if gone is None:
        return 0
    first = found[gone]
    with first.block.open("r+b") as file:
        file.truncate(first.offset + min(into, first.size - 1))
    for block in {record.block for record in found[gone:]} - {first.block}:
        block.unlink()
    forget(store, stream)
    return len(found) - gone


def damage(store: Path, stream: str, seq: int) -> None:
    """Overwrites the record of one message with zeros, as a bad sector would."""
    record = next(record for record in records(store, stream) if record.seq == seq)
    with record.block.open("r+b") as file:
        file.seek(record.offset)
        file.write(bytes(record.size))
    forget(store, stream)


def forget(store: Path, stream: str) -> None:
    """Removes the server's own index, which is written now and then only."""
    (folder(store, stream) / "index.db").unlink(missing_ok=True)
