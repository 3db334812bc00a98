"""How a source's stream is made, and whether one that is there is such a stream. What is there is never changed."""

from __future__ import annotations

from typing import Any

from bridge import log
from bridge.config import Stream, duration, size
from bridge.errors import OtherStream, Unavailable
from bridge.stream.server import ApiError, Broker, StreamState

DUPLICATE_WINDOW = 0.1  # seconds; the shortest that servers take
NO_PEERS = 10005


async def ensure_stream(broker: Broker, config: Stream, subjects: str) -> StreamState:
    """The source's stream, made if it is not there; an existing one is never changed, only checked.

    Raises:
        OtherStream: a stream of that name holds other subjects, may not do atomic batches, or is of the other mode.
    """
    found = await broker.stream(config.name)
    if found is None:
        await _create(broker, config, subjects)
        found = await broker.stream(config.name)
        if found is None:
            raise Unavailable(f"the stream {config.name} was made and is gone", "waiting for JetStream")
        log.get().info("stream created", stream=config.name, subjects=subjects, replicas=config.replicas)
        return found
    for wrong in unfit(found, config, subjects):
        raise wrong
    return found


def unfit(found: StreamState, config: Stream, subjects: str) -> list[OtherStream]:
    """Everything for which an existing stream cannot be this source's."""
    wrong = []
    if found.config.get("subjects") != [subjects]:
        wrong.append(
            OtherStream(
                f"the stream {config.name} holds {found.config.get('subjects')}, not {subjects}",
                "choose another [stream] name, or remove that stream with `nats stream rm`",
            )
        )
    if not found.config.get("allow_atomic"):
        wrong.append(
            OtherStream(
                f"the stream {config.name} does not allow atomic batches",
                f"allow them: nats stream edit {config.name} --allow-batch",
            )
        )
    try:
        check_mode(found, config)
    except OtherStream as error:
        wrong.append(error)
    return wrong


def check_mode(state: StreamState, config: Stream) -> None:
    """Return where a stream is of the mode that the configuration names.

    Raises:
        OtherStream: it is of the other one, or a compacted one that would lose rows.
    """
    if state.compacted != config.compact:
        mode = "compact" if state.compacted else "log"
        raise OtherStream(
            f'the stream {state.name} was made with [stream] mode = "{mode}"; the configuration says "{config.mode}"',
            f'set mode = "{mode}"; or choose another [stream] name, or start anew: `bridge drop --stream --state`',
        )
    limits = [name for name in ("max_age", "max_bytes", "max_msgs") if state.config.get(name, 0) > 0]
    if state.compacted and limits:
        raise OtherStream(
            f"the compacted stream {state.name} removes rows by {', '.join(limits)}",
            f"mend it: nats stream edit {state.name} --max-age=0 --max-bytes=-1 --max-msgs=-1",
        )


async def _create(broker: Broker, config: Stream, subjects: str) -> None:
    try:
        await broker.api(f"STREAM.CREATE.{config.name}", wanted(config, subjects), seconds=10)
    except ApiError as error:
        if error.code != NO_PEERS:
            raise
        raise Unavailable(
            f"too few NATS servers are up for {config.replicas} copies of {config.name}: {error.description}",
            "waiting for the others; or set a lower [stream] replicas",
        ) from None


def wanted(config: Stream, subjects: str) -> dict[str, Any]:
    """The stream configuration that `config` asks for, in the API's own fields (durations in nanoseconds)."""
    return {
        "name": config.name,
        "subjects": [subjects],
        "retention": "limits",
        "storage": "file",
        "discard": config.discard,
        "max_age": int(duration(config.max_age) * 1e9) if config.max_age else 0,
        "max_bytes": size(config.max_bytes) if config.max_bytes else -1,
        "max_msgs": -1,
        "max_consumers": -1,
        "num_replicas": config.replicas,
        # The server keeps every message id that long; nothing here relies on it.
        "duplicate_window": int(DUPLICATE_WINDOW * 1e9),
        "allow_direct": True,
        "allow_atomic": True,
        "metadata": {"bridge": "1"},
        **({"max_msgs_per_subject": 1, "allow_msg_ttl": True} if config.compact else {}),
    }
