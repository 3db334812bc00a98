"""Objects in a JetStream object store, as `nats object` and every client library know them.

An object is a run of chunks on a subject of its own and, written after them, one message that describes it. `put` gives
a name to an object only when the server has acked every chunk; `get` gives back an object's bytes only when their
number and digest are right. Nothing is held twice, and one chunk at a time is on its way.

Source: ADR-20, "JetStream based Object Stores": stream `OBJ_{bucket}`, subjects `$O.{bucket}.C.{nuid}` for chunks and
`$O.{bucket}.M.{name in URL-safe base64}` for descriptions.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime

import anyio.to_thread
import msgspec

from bridge import log
from bridge.errors import Unavailable
from bridge.stream import answer
from bridge.stream.reader import read
from bridge.stream.server import NOT_FOUND_STREAM, ApiError, Broker

CHUNK = 512 << 10
ROOM_FOR_HEADERS = 1 << 10
STORE_TIMEOUT = 10.0


class Options(msgspec.Struct, frozen=True):
    """How an object is stored: the largest chunk, in bytes."""

    max_chunk_size: int = CHUNK


class Info(msgspec.Struct, frozen=True, omit_defaults=True):
    """An object's description, in ADR-20's own fields. `headers` are free for whoever writes it; `seq` is the sequence
    at which the description itself is stored, and not part of it."""

    name: str
    bucket: str
    nuid: str = ""
    size: int = 0
    chunks: int = 0
    digest: str = ""
    mtime: str = ""
    deleted: bool = False
    description: str = ""
    headers: dict[str, list[str]] = {}
    options: Options | None = None
    seq: int = 0


def stream_of(bucket: str) -> str:
    """The stream that holds a bucket."""
    return f"OBJ_{bucket}"


def description_subject(bucket: str, name: str) -> str:
    """Where an object's description is stored; the name "" and `>` stand for all of them."""
    return f"$O.{bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode() if name else '>'}"


def name_in(subject: str) -> str:
    """The name in a description's subject."""
    return base64.urlsafe_b64decode(subject.rpartition(".")[2]).decode()


def chunk_subject(bucket: str, nuid: str) -> str:
    """Where an object's chunks are stored."""
    return f"$O.{bucket}.C.{nuid}"


async def digest_of(data: bytes) -> str:
    """SHA-256 as descriptions hold it; worked out beside the event loop, as it takes long for a long row."""
    found = await anyio.to_thread.run_sync(lambda: hashlib.sha256(data).digest())
    return "SHA-256=" + base64.urlsafe_b64encode(found).decode()


async def ensure(broker: Broker, bucket: str, replicas: int, description: str) -> None:
    """Make the bucket if it is not there. It has no limits of its own."""
    if await broker.stream(stream_of(bucket)) is not None:
        return
    wanted = {
        "name": stream_of(bucket),
        "description": description,
        "subjects": [chunk_subject(bucket, ">"), description_subject(bucket, "")],
        "retention": "limits",
        "storage": "file",
        "discard": "new",
        "max_msgs": -1,
        "max_bytes": -1,
        "max_age": 0,
        "max_consumers": -1,
        "num_replicas": replicas,
        "allow_rollup_hdrs": True,
        "allow_direct": True,
        "metadata": {"bridge": "1"},
    }
    try:
        await broker.api(f"STREAM.CREATE.{stream_of(bucket)}", wanted, seconds=STORE_TIMEOUT)
        log.get().info("object store created", bucket=bucket, replicas=replicas)
    except ApiError:
        if await broker.stream(stream_of(bucket)) is None:
            raise


def described(data: bytes) -> Info | None:
    """A description that the store holds; None for what is none."""
    try:
        return msgspec.json.decode(data, type=Info)
    except answer.UNREADABLE:
        return None


async def find(broker: Broker, bucket: str, name: str) -> Info | None:
    """An object's description; None where there is no such object, or no such bucket, or it is no description."""
    try:
        found = await broker.message(stream_of(bucket), last_by_subj=description_subject(bucket, name))
    except ApiError as error:
        if error.code == NOT_FOUND_STREAM:
            return None
        raise
    if found is None:
        return None
    info = described(found.data)
    return None if info is None else msgspec.structs.replace(info, seq=found.seq)


async def put(
    broker: Broker, info: Info, data: bytes, *, replaces: int = 0, headers: dict[str, list[str]] | None = None
) -> Info:
    """Store an object under `info`'s bucket, name, nuid and digest; the whole description.

    Args:
        replaces: the sequence of the description that is there now, 0 for none: somebody else's newer one stays.

    Raises:
        Unavailable: the server does not take it (now).
    """
    size = min(CHUNK, broker.max_payload - ROOM_FOR_HEADERS)
    starts = range(0, len(data), size)
    for start in starts:
        await _store(broker, chunk_subject(info.bucket, info.nuid), data[start : start + size])
    whole = msgspec.structs.replace(
        info,
        size=len(data),
        chunks=len(starts),
        mtime=datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        headers=headers or {},
        options=Options(size),
        seq=0,
    )
    seq = await _store(
        broker,
        description_subject(info.bucket, info.name),
        msgspec.json.encode(whole),
        {"Nats-Rollup": "sub", "Nats-Expected-Last-Subject-Sequence": str(replaces)},
    )
    return msgspec.structs.replace(whole, seq=seq)


async def _store(broker: Broker, subject: str, data: bytes, headers: dict[str, str] | None = None) -> int:
    """Publish one message and return its sequence once the server has acked it."""
    ack = answer.ack((await broker.request(subject, data, seconds=STORE_TIMEOUT, headers=headers)).data)
    error = ack.error or {}
    if error or not ack.seq:
        raise Unavailable(
            f"the object store takes nothing on {subject}: {error.get('description', 'no leader')} "
            f"(code {error.get('err_code', 0)})",
            "trying again until it is accepted",
        )
    return ack.seq


async def get(broker: Broker, info: Info) -> bytes | None:
    """An object's bytes; None where chunks are missing or their size or digest is wrong."""
    parts: list[bytes] = []
    size = 0
    if not info.size:
        return None
    batches = read(broker, stream_of(info.bucket), subjects=[chunk_subject(info.bucket, info.nuid)])
    async with aclosing(batches):
        async for batch in batches:
            parts += [message.data for message in batch]
            size += sum(len(message.data) for message in batch)
            if size > info.size:
                return None
    if size != info.size:
        return None
    data = b"".join(parts)
    return data if await digest_of(data) == info.digest else None


async def counted(broker: Broker, bucket: str, subject: str) -> dict[str, int]:
    """How many messages the bucket has on each of the subjects that match."""
    return await broker.subjects(stream_of(bucket), subject)


async def oldest(broker: Broker, bucket: str) -> AsyncGenerator[tuple[str, int], None]:
    """The objects' names, and where each one's description is stored, in the order in which that was written."""
    seq = 0
    while True:
        found = await broker.message(stream_of(bucket), seq=seq + 1, next_by_subj=description_subject(bucket, ""))
        if found is None:
            return
        seq = found.seq
        yield name_in(found.subject), seq


async def purge(broker: Broker, bucket: str, subject: str) -> None:
    """Remove every message on the subjects that match."""
    await broker.api(f"STREAM.PURGE.{stream_of(bucket)}", {"filter": subject}, seconds=STORE_TIMEOUT)
