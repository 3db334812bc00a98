"""What bridge and index have got through so far, from their public state: the stream, the KV bucket, the consumer, the
engine. The demo knows nothing that an operator could not see."""

from __future__ import annotations

import time

import anyio

from bridge.config import Config
from bridge.demo.board import Board, Phase
from bridge.demo.children import INDEX, TABLES
from bridge.index.engine import Engine
from bridge.index.generation import Generation, IndexRecord
from bridge.stream.server import ApiError, Broker
from bridge.stream.state import SnapshotStatus, State
from bridge.stream.subjects import index_key, snapshot_key
from bridge.waiting import until

POLL = 0.1
RATE_OVER = 2.0


class Watch:
    """Reads from the servers that the demo has started."""

    def __init__(self, config: Config, broker: Broker, state: State, engine: Engine, board: Board) -> None:
        self._config = config
        self._broker = broker
        self._state = state
        self._board = board
        self.engine = engine

    async def snapshot(self, phase: Phase, rows: int, seconds: float) -> bool:
        """Wait until the initial snapshot is done; whether it was within `seconds`."""
        phase.total = rows
        keys = [snapshot_key(self._config.source.name, "public", table) for table in TABLES]

        async def done() -> bool:
            found = [await self._state.get(key, SnapshotStatus) for key in keys]
            statuses = [status for status, _ in filter(None, found)]
            stream = await self._broker.stream(self._config.stream.name)
            # The state bucket is written once a second; what the stream has is known at any time.
            phase.done = min(stream.messages if stream is not None else 0, rows)
            self._board.rows = sum(status.rows for status in statuses)
            if [status.state for status in statuses] == ["done"] * len(keys):
                phase.done = phase.total = self._board.rows
                return True
            return False

        return await until(done, seconds=seconds, every=POLL)

    async def record(self) -> IndexRecord:
        """The index's record; an empty one while there is none."""
        found = await self._state.get(index_key(self._config.source.name, INDEX), IndexRecord)
        return found[0] if found is not None else IndexRecord()

    async def live(self) -> Generation | None:
        """The generation that searches see; None while there is none."""
        record = await self.record()
        return record.get(record.generation)

    async def building(self, phase: Phase, rows: int) -> None:
        """Keep a phase's progress by what the generation under construction holds, until cancelled."""
        phase.total = rows
        while True:
            record = await self.record()
            for generation in record.having("building", "switching"):
                if await self.engine.exists(generation.physical):
                    phase.done = min(await self.engine.count(generation.physical), phase.total)
            await anyio.sleep(POLL)

    async def built(self, seconds: float) -> bool:
        """Wait until searches see a first generation; whether they did within `seconds`."""

        async def shown() -> bool:
            generation = await self.live()
            self._board.generation = generation.physical if generation is not None else ""
            return generation is not None

        return await until(shown, seconds=seconds, every=POLL)

    async def stream(self) -> None:
        """Keep the board's number and rate of events up to date until cancelled."""
        seen: list[tuple[float, int]] = []
        while True:
            found = await self._broker.stream(self._config.stream.name)
            if found is not None:
                now = time.monotonic()
                seen = [entry for entry in seen if now - entry[0] <= RATE_OVER] + [(now, found.last_seq)]
                self._board.events = found.last_seq
                span = now - seen[0][0]
                self._board.rate = (found.last_seq - seen[0][1]) / span if span else 0.0
            await anyio.sleep(POLL * 2)

    async def caught_up(self, seconds: float) -> bool:
        """Wait until the index's consumer has nothing left to read or to answer; whether that was so in time.

        Only meaningful once the last change is known to be in the stream.
        """

        async def idle() -> bool:
            generation = await self.live()
            if generation is None:
                return False
            try:
                info = await self._broker.api(f"CONSUMER.INFO.{generation.stream}.{generation.consumer}")
            except ApiError:
                return False
            return not info["num_pending"] and not info["num_ack_pending"]

        return await until(idle, seconds=seconds, every=POLL)
