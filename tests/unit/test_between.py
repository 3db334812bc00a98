"""Where events that are put between transactions stand."""

from __future__ import annotations

from typing import Any

import anyio
import anyio.lowlevel
import pytest

from bridge.event import Position
from bridge.pipeline.between import LAST_LSN, PIECE, Between, Piece
from bridge.pipeline.merge import Merge
from bridge.source.altering import Snapshot

pytestmark = pytest.mark.anyio
SUBJECT = b"cdc.main.public.t"
LARGE = 100


class Publisher:
    """What a publisher was given, from a sequence on."""

    full = False

    def __init__(self) -> None:
        self.next_seq = 11
        self.positions: list[str] = []
        self.payloads: list[bytes] = []

    def add(self, subject: bytes, op: bytes, position: bytes, payload: bytes) -> None:
        assert (subject, op) == (SUBJECT, b"read")
        self.next_seq += 1
        self.positions.append(position.decode())
        self.payloads.append(payload)

    def divide(self) -> None:
        pass

    def flush(self) -> None:
        pass


class Claims:
    """Takes what is larger than `LARGE`, under its position."""

    largest = LARGE

    async def put(self, subject: bytes, position: str, payload: bytes) -> bytes:
        assert subject == SUBJECT
        return b"%d at %b" % (len(payload), position.encode())


def rows(count: int, size: int = 5) -> Piece:
    merge = Merge()
    merge.open(("public", "t"))
    merge.fill(Snapshot.parse("10:10:"), {b"%d" % n: b"%0*d" % (size, n) for n in range(count)}, b"")
    return Piece(SUBJECT, 0, b"read", merge=merge)


def between(after: str = "") -> tuple[Between, Publisher]:
    publisher: Any = Publisher()
    claims: Any = Claims()
    unasked: Any = None  # no piece here has columns
    return Between(publisher, claims, lambda _: 3, after, unasked), publisher


async def test_rows_stand_behind_what_the_stream_has_passed_and_count_on() -> None:
    place, publisher = between()
    pieces = [rows(PIECE + 2), rows(3)]
    for piece in pieces:
        place.add(piece)
    while await place.some(0x500):
        pass
    assert publisher.positions == [str(Position(3, 0x500, LAST_LSN, 0, n)) for n in range(1, PIECE + 6)]
    assert publisher.payloads == [b"%05d" % n for n in [*range(PIECE + 2), *range(3)]]
    assert [(piece.first, piece.last) for piece in pieces] == [(11, 12 + PIECE), (13 + PIECE, 15 + PIECE)]


async def test_they_count_anew_behind_another_position() -> None:
    place, publisher = between()
    for reached in (0x500, 0x600):
        place.add(rows(2))
        await place.some(reached)
    assert publisher.positions == [str(Position(3, end, LAST_LSN, 0, n)) for end in (0x500, 0x600) for n in (1, 2)]


@pytest.mark.parametrize(
    ("last", "first"),
    [
        (Position(3, 0x500, LAST_LSN, 0, 7), 8),
        (Position(3, 0x500, 0x4F0, 0, 0), 1),
        (Position(2, 0x500, LAST_LSN, 0, 7), 1),
    ],
)
async def test_they_go_on_behind_the_streams_last_event(last: Position, first: int) -> None:
    place, publisher = between(str(last))
    place.add(rows(1))
    await place.some(0x500)
    assert publisher.positions == [str(Position(3, 0x500, LAST_LSN, 0, first))]
    assert publisher.positions[0] > str(last)


async def test_what_streams_gets_its_turn_between_two_pieces() -> None:
    place, publisher = between()
    place.add(rows(5 * PIECE))
    met: list[int] = []

    async def streams() -> None:
        while not met or met[-1] < 5 * PIECE:
            async with place.turn:
                met.append(len(publisher.positions))
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(streams)
        while place.queue:
            async with place.turn:
                await place.some(0x500)
    assert {PIECE * n for n in range(1, 5)} <= set(met)


async def test_a_large_row_goes_by_claim_check_under_its_position() -> None:
    place, publisher = between()
    place.add(rows(2, LARGE + 1))
    await place.some(0x500)
    assert publisher.payloads == [b"%d at %b" % (LARGE + 1, position.encode()) for position in publisher.positions]
