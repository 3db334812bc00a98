"""Asks NATS what `bridge check` wants to know. Nothing is made and nothing stored there.

Whether the user may publish is tried out with messages that no stream takes: they name a stream that they are not for,
or a request that does not fit its subject. What a user may not send, the server names before it answers the next ping.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
import nats.errors

from bridge import structured
from bridge.config import Config
from bridge.errors import BridgeError
from bridge.index.generation import IndexRecord
from bridge.operate.checks.clocks import Reading, read_at
from bridge.operate.checks.jetstream import Broker, Denied, Trace
from bridge.stream import lease, server, subjects
from bridge.stream.claims import bucket_of
from bridge.stream.lease import Lease
from bridge.stream.objects import stream_of
from bridge.stream.server import NOT_FOUND_STREAM, REQUEST_TIMEOUT, ApiError, Servers
from bridge.stream.tail import tail_of

NOBODYS = "bridge-check"
EXPECTED_STREAM = "Nats-Expected-Stream"
MOST_SUBJECTS = 200


class Answer(NamedTuple):
    """All that NATS has said; `records` are those of the configured indexes."""

    broker: Broker
    records: dict[str, IndexRecord]
    clock: Reading | None


async def ask(config: Config, servers: Servers) -> Answer:
    """What NATS says.

    Raises:
        Unavailable: it is away. ServerRefused: login, version, or no JetStream.
    """
    async with server.connect(config.stream, servers, name=f"bridge {config.source.name} check") as broker:
        denied = await _denied(config, broker)
        unasked = {one.subject for one in denied}
        infos: dict[str, dict[str, Any] | None] = {}
        account = await broker.look("INFO") if f"{server.API}.INFO" not in unasked else {}
        names = (config.stream.name, f"KV_{config.state.bucket}", stream_of(bucket_of(config.stream.name)))
        for name in names:
            allowed = f"{server.API}.STREAM.INFO.{name}" not in unasked
            infos[name] = await _info(broker, name) if allowed else None
        stream, bucket, objects = (infos[name] for name in names)
        reads = f"{server.API}.STREAM.MSG.GET.{config.stream.name}" not in unasked
        return Answer(
            Broker(
                where=broker.where,
                version=broker.version,
                max_payload=broker.max_payload,
                clustered=bool(broker.nc._server_info.get("cluster")),
                account=account,
                stream=stream,
                bucket=bucket,
                objects=objects,
                foreign=await _foreign(config, broker) if stream is not None and reads else [],
                denied=denied,
                holder=await _holder(config, broker) if bucket is not None and reads else "",
            ),
            await _records(config, broker) if bucket is not None and reads else {},
            await _clock(broker, next((name for name, info in infos.items() if info is not None), "")),
        )


async def _info(broker: server.Broker, name: str) -> dict[str, Any] | None:
    try:
        return dict(await broker.look(f"STREAM.INFO.{name}"))
    except ApiError as error:
        if error.code == NOT_FOUND_STREAM:
            return None
        raise


async def _denied(config: Config, broker: server.Broker) -> list[Denied]:
    """What the user may not publish to, of all that the bridge must."""
    stream, source, bucket = config.stream.name, subjects.token(config.source.name), config.state.bucket
    large = bucket_of(stream)
    bound = f"NATS/1.0\r\n{EXPECTED_STREAM}: {NOBODYS}\r\n\r\n".encode()
    unfit = msgspec.json.encode({"name": NOBODYS, "stream_name": NOBODYS})
    both = (stream, f"KV_{bucket}")
    tries = [
        (f"{config.stream.prefix}.{source}.@check", bound, b"", "publishes events"),
        (f"$KV.{bucket}.{NOBODYS}", bound, b"", "keeps its checkpoint and its lease"),
        (f"$O.{large}.M.{NOBODYS}", bound, b"", "stores rows that are larger than max_payload"),
        (f"{server.API}.INFO", b"", b"", "asks for limits"),
        *((f"{server.API}.STREAM.INFO.{name}", b"", b"", "learns where the log ends") for name in both),
        *((f"{server.API}.STREAM.CREATE.{name}", b"", unfit, "makes it") for name in both),
        *((f"{server.API}.STREAM.MSG.GET.{name}", b"", b"{}", "reads what it has noted") for name in both),
        (f"{server.API}.CONSUMER.CREATE.{stream}.{NOBODYS}", b"", unfit, "reads the log"),
    ]
    found = []
    for subject, headers, body, use in tries:
        if not await _may(broker, subject, headers, body):
            found.append(Denied(subject, use))
    return found


async def _may(broker: server.Broker, subject: str, headers: bytes, body: bytes) -> bool:
    """Whether the user may publish there.

    The client's own publish leaves a message in its buffer, and its ping goes out before it.
    """
    broker.violation = ""
    # To an inbox that nobody has: the answers are of no interest.
    to = f"{subject} {broker.nc.new_inbox()}"
    head = f"HPUB {to} {len(headers)} {len(headers) + len(body)}" if headers else f"PUB {to} {len(body)}"
    broker.write(b"%b\r\n%b%b\r\n" % (head.encode(), headers, body))
    try:
        await broker.nc.flush(int(REQUEST_TIMEOUT))
    except (nats.errors.Error, TimeoutError, OSError, RuntimeError):
        raise broker.lost() from None
    denied = subject.lower() in broker.violation.lower()
    broker.violation = ""
    return not denied


async def _foreign(config: Config, broker: server.Broker) -> list[Trace]:
    """Messages without a bridge's marks, among the last ones: of the stream, and in a log of each of its subjects."""
    name = config.stream.name
    every = subjects.source_subjects(config.stream.prefix, config.source.name)
    asked = [every]
    if not config.stream.compact:
        asked += list(await broker.subjects(name, every))[:MOST_SUBJECTS]
    found: dict[int, Trace] = {}

    async def look(subject: str) -> None:
        last = await broker.message(name, last_by_subj=subject)
        if last is not None and not tail_of(last, last.seq).position:
            found[last.seq] = Trace(last.seq, last.subject)

    async with structured.group() as tasks:
        for subject in asked:
            tasks.start_soon(look, subject)
    return [found[seq] for seq in sorted(found)]


async def _value(config: Config, broker: server.Broker, key: str, kind: Any) -> Any:
    """What the state bucket has under a key; None where it has nothing."""
    bucket = config.state.bucket
    found = await broker.message(f"KV_{bucket}", last_by_subj=f"$KV.{bucket}.{key}")
    return msgspec.json.decode(found.data, type=kind) if found is not None and found.data else None


async def _holder(config: Config, broker: server.Broker) -> str:
    held = await _value(config, broker, lease.lease_key("bridge", config.source.name), Lease)
    return f"{lease.whose(held)} runs" if held is not None and lease.alive(held) else ""


async def _records(config: Config, broker: server.Broker) -> dict[str, IndexRecord]:
    found = {}
    for name in config.index:
        record = await _value(config, broker, subjects.index_key(config.source.name, name), IndexRecord)
        if record is not None:
            found[name] = record
    return found


async def _clock(broker: server.Broker, stream: str) -> Reading | None:
    """The server's clock, as it tells who asks for a stream, or for himself; None where he may not.

    Args:
        stream: one that is there and may be asked for; empty where there is none.
    """
    began = time.time()
    try:
        if stream:
            told = (await broker.api(f"STREAM.INFO.{stream}"))["ts"]
        else:
            answer = await broker.request("$SYS.REQ.USER.INFO", seconds=1.0)
            told = msgspec.json.decode(answer.data)["server"]["time"]
        return read_at(began, datetime.fromisoformat(told).timestamp(), time.time())
    except (BridgeError, msgspec.DecodeError, KeyError, TypeError, ValueError):
        return None
    finally:
        broker.violation = ""
