"""What the NATS server, the account, the stream and its buckets mean for the log. Pure.

Source: JetStream API, the answers to `$JS.API.INFO` and `$JS.API.STREAM.INFO`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from bridge.config import Config
from bridge.errors import BridgeError, OtherStream
from bridge.operate.checks.finding import Finding, Fix, warning, well, wrong
from bridge.operate.status.health import durability, size
from bridge.stream import mode, subjects
from bridge.stream.claims import bucket_of
from bridge.stream.definition import unfit, wanted
from bridge.stream.drift import Drift, drift
from bridge.stream.objects import stream_of
from bridge.stream.server import StreamState
from bridge.stream.state import HISTORY

RESET_SINCE = (2, 14)
SMALL_PAYLOAD = 1 << 20
NEARLY = 0.9
Info = dict[str, Any]


class Trace(msgspec.Struct, frozen=True):
    """A message that no bridge has published."""

    seq: int
    subject: str


class Denied(msgspec.Struct, frozen=True):
    """A subject that the user may not publish to, and what for the bridge does."""

    subject: str
    use: str


class Broker(msgspec.Struct, frozen=True, kw_only=True):
    """What NATS says. account: the answer to INFO; stream, bucket, objects: those of STREAM.INFO, None where there is
    none; clustered: the server has others beside it."""

    where: str
    version: tuple[int, int]
    max_payload: int
    clustered: bool
    account: Info
    stream: Info | None = None
    bucket: Info | None = None
    objects: Info | None = None
    foreign: list[Trace] = []
    denied: list[Denied] = []
    holder: str = ""


def judge(config: Config, found: Broker) -> list[Finding]:
    """All findings of NATS."""
    return [
        well("jetstream.reachable", found.where, "JetStream answers"),
        _version(found),
        *_account(config, found),
        _payload(found),
        *_stream(config, found),
        *_bucket(config, found),
        *_objects(config, found),
        *_writers(config, found),
        *_replicas(config, found),
        _sync(config, found),
        *_permissions(found),
        well("bridge.lease", config.source.name, found.holder or "no bridge runs now"),
    ]


def _version(found: Broker) -> Finding:
    version = ".".join(map(str, found.version))
    if found.version < RESET_SINCE:
        return warning(
            "jetstream.version",
            found.where,
            f"nats-server {version} cannot set a consumer back",
            "upgrade nats-server to 2.14 or newer",
            why="a reader that takes over makes its consumer anew instead, from what it has noted",
        )
    return well("jetstream.version", found.where, f"nats-server {version}: atomic batches, consumer reset")


def _account(config: Config, found: Broker) -> list[Finding]:
    account, limits = found.account, found.account.get("limits", {})
    about, out = found.where, []
    used, most = account.get("storage", 0), limits.get("max_storage", -1)
    if most == 0:
        out.append(
            wrong(
                "jetstream.account",
                about,
                "the account has no storage on disk",
                "give it some: jetstream { max_file: 100G } of the account, or max_file_store of the server",
            )
        )
    elif most > 0 and used > most * NEARLY:
        out.append(
            warning(
                "jetstream.account",
                about,
                f"{size(used)} of the account's {size(most)} are in use",
                "raise the account's max_file (jetstream limits), or remove other streams, or set [stream] max_bytes",
            )
        )
    largest = limits.get("storage_max_stream_bytes", -1)
    if largest > 0 and not config.stream.max_bytes:
        out.append(
            warning(
                "jetstream.account",
                about,
                f"a stream of this account may have {size(largest)}, and [stream] max_bytes is not set",
                f'[stream] max_bytes = "{max(largest >> 20, 1)}MB"',
            )
        )
    if limits.get("max_bytes_required"):
        out.append(
            wrong(
                "jetstream.account",
                about,
                "the account makes no stream without max_bytes (max_bytes_required)",
                "switch max_bytes_required off for this account: the state bucket has no limit",
            )
        )
    out += _counts(config, found)
    room = f"{size(most - used)} of {size(most)} free" if most > 0 else "no limit of its own"
    return out or [well("jetstream.account", about, f"{size(used)} stored, {room}")]


def _counts(config: Config, found: Broker) -> list[Finding]:
    """Whether the streams and consumers that are still to be made may be made."""
    account, limits, out = found.account, found.account.get("limits", {}), []
    lacking = [
        name
        for name, info in (
            (config.stream.name, found.stream),
            (f"KV_{config.state.bucket}", found.bucket),
            (stream_of(bucket_of(config.stream.name)), found.objects),
        )
        if info is None
    ]
    most = limits.get("max_streams", -1)
    if most >= 0 and account.get("streams", 0) + len(lacking) > most:
        make = wrong if found.stream is None or found.bucket is None else warning
        out.append(
            make(
                "jetstream.account",
                found.where,
                f"the account has {account.get('streams', 0)} of {most} streams, and {', '.join(lacking)} are to come",
                f"raise max_streams of the account to {account.get('streams', 0) + len(lacking)} or more",
                why="the log, the state bucket and the object store of large rows are a stream each",
            )
        )
    most = limits.get("max_consumers", -1)
    needs = 2 * len(config.index) + 2
    if 0 <= most < account.get("consumers", 0) + needs:
        out.append(
            warning(
                "jetstream.account",
                found.where,
                f"the account has {account.get('consumers', 0)} of {most} consumers",
                f"raise max_consumers of the account to {account.get('consumers', 0) + needs} or more",
                why="each index needs one, a rebuild another one, and so does whoever reads the log",
            )
        )
    return out


def _payload(found: Broker) -> Finding:
    if found.max_payload < SMALL_PAYLOAD:
        return warning(
            "jetstream.max_payload",
            found.where,
            f"max_payload is {size(found.max_payload)}",
            "max_payload: 8MB in nats-server.conf, as in the shipped one; then `nats-server --signal reload`",
        )
    return well("jetstream.max_payload", found.where, f"max_payload is {size(found.max_payload)}")


def _stream(config: Config, found: Broker) -> list[Finding]:
    name, info = config.stream.name, found.stream
    if info is None:
        return [well("jetstream.stream", name, "not there yet: `bridge run` makes it")]
    state = info["state"]
    asked = subjects.source_subjects(config.stream.prefix, config.source.name)
    now = StreamState(name, info["created"], state["messages"], state["first_seq"], state["last_seq"], info["config"])
    refused: list[BridgeError] = list(unfit(now, config.stream, asked))
    differing: list[Drift] = []
    try:
        differing = drift(config.stream, asked, info["config"])
    except OtherStream as error:
        refused.append(error)
    out = [wrong("jetstream.stream", name, one.what, one.remedy) for one in refused]
    out = out or [well("jetstream.stream", name, f"a log of {state['messages']:,} messages, {size(state['bytes'])}")]
    # `max_bytes` and its like are named already where they make a compacted log lose rows.
    return out if refused else out + [_drifted(config, name, one) for one in differing]


def _drifted(config: Config, name: str, one: Drift) -> Finding:
    asked = wanted(config.stream, "").get(one.field, one.wanted)
    fix = Fix([one.command], stream=name, fields={one.field: asked}) if lossless(one) else None
    return warning(
        "jetstream.drift", name, f"{one.field} is {one.found}, configured is {one.wanted}", one.command, fix=fix
    )


def lossless(one: Drift) -> bool:
    """Whether setting a field back takes nothing away: neither messages nor copies of them."""
    found, asked = one.found or 0, one.wanted or 0
    if one.field in ("max_age", "max_bytes", "max_msgs", "max_msg_size"):
        return asked <= 0 or 0 < found <= asked
    if one.field == "num_replicas":
        return bool(asked > found)
    return (one.field == "discard" and asked == "new") or one.field in ("allow_direct", "duplicate_window")


def _bucket(config: Config, found: Broker) -> list[Finding]:
    name = config.state.bucket
    if found.bucket is None:
        return [well("jetstream.bucket", name, "not there yet: `bridge run` makes it")]
    return _kept(config, "jetstream.bucket", name, f"KV_{name}", found.bucket) or [
        well("jetstream.bucket", name, f"a KV bucket of {found.bucket['state']['messages']:,} values")
    ]


def _objects(config: Config, found: Broker) -> list[Finding]:
    name = bucket_of(config.stream.name)
    if found.objects is None:
        return []
    return _kept(config, "jetstream.objects", name, stream_of(name), found.objects) or [
        well("jetstream.objects", name, f"an object store of {size(found.objects['state']['bytes'])}")
    ]


_OPTIONS = {
    "max_age": ("--max-age=0s", "--ttl=0s"),
    "max_bytes": ("--max-bytes=-1", "--max-bucket-size=-1"),
    "max_msgs_per_subject": (f"--max-msgs-per-subject={HISTORY}", ""),
    "num_replicas": ("--replicas={}", "--replicas={}"),
}


def _edit(id: str, about: str, stream: str, field: str, value: int) -> tuple[str, Fix]:
    """How one field of a bucket's stream is set: as an operator does it, and as --fix does.

    `nats kv edit` refuses buckets whose keys may have a time to live, as this one's; `nats stream edit` asks first.
    """
    of_stream, of_store = _OPTIONS[field]
    command = (
        f"nats stream edit {stream} {of_stream}" if id == "jetstream.bucket" else f"nats object edit {about} {of_store}"
    ).format(value)
    return f"{command}; or bridge check --fix", Fix([command], stream=stream, fields={field: value})


def _kept(config: Config, id: str, about: str, stream: str, info: Info) -> list[Finding]:
    """Whether a bucket's stream keeps what it is given."""
    now, out = info["config"], []
    copies = config.stream.replicas
    if now.get("storage") != "file":
        next_ = (
            f'stop the bridge; nats backup stream {stream} DIR; in DIR/backup.json "storage": "file"; nats stream rm'
            f" {stream}; nats backup restore stream DIR"
        )
        out.append(wrong(id, about, f"{about} is in memory: it goes with the server", next_))
    if now.get("max_age", 0) > 0:
        next_, fix = _edit(id, about, stream, "max_age", 0)
        out.append(wrong(id, about, f"{about} forgets after {now['max_age'] / 1e9:g} s", next_, fix=fix))
    if now.get("max_bytes", -1) > 0:
        next_, fix = _edit(id, about, stream, "max_bytes", -1)
        what = f"{about} may have {size(now['max_bytes'])}, {size(info['state']['bytes'])} are in use"
        out.append(warning(id, about, what, next_, fix=fix))
    history = now.get("max_msgs_per_subject", 1)
    if id == "jetstream.bucket" and history < HISTORY:
        next_, fix = _edit(id, about, stream, "max_msgs_per_subject", HISTORY)
        why = "what a checkpoint was before (`nats kv history`) tells what went wrong"
        out.append(warning(id, about, f"{about} has a history of {history}, not {HISTORY}", next_, why=why, fix=fix))
    has = now.get("num_replicas", 1)
    if has < copies:
        next_, fix = _edit(id, about, stream, "num_replicas", copies)
        why = "it ends with fewer servers than the log does"
        what = f"{about} has {has} copies, [stream] replicas is {copies}"
        out.append(warning(id, about, what, next_, why=why, fix=fix))
    return out


def _writers(config: Config, found: Broker) -> list[Finding]:
    if found.stream is None:
        return []
    name = config.stream.name
    return [
        wrong(
            "jetstream.writers",
            one.subject,
            f"no bridge has published sequence {one.seq} of {name}",
            f"find and stop the publisher (nats stream get {name} {one.seq}), let only the bridge publish there"
            f" (permissions in nats-server.conf), then: nats stream rmm {name} {one.seq}",
        )
        for one in found.foreign
    ] or [well("jetstream.writers", name, "the last messages are a bridge's own")]


def _replicas(config: Config, found: Broker) -> list[Finding]:
    asked, about = config.stream.replicas, config.stream.name
    if asked > 1 and not found.clustered:
        return [
            wrong(
                "jetstream.replicas",
                about,
                f"[stream] replicas is {asked}, and the server at {found.where} is in no cluster",
                "[stream] replicas = 1, or set up a cluster of three servers",
            )
        ]
    out = []
    if asked == 1 and found.clustered:
        out.append(
            warning(
                "jetstream.replicas",
                about,
                "the server is in a cluster, and [stream] replicas is 1",
                f"[stream] replicas = 3, and: nats stream edit {about} --replicas=3",
            )
        )
    for info in (found.stream, found.bucket, found.objects):
        if info is not None:
            out += _peers(info)
    return out or [well("jetstream.replicas", about, "one copy, on one server" if asked == 1 else f"{asked} copies")]


def _peers(info: Info) -> list[Finding]:
    name, cluster = info["config"]["name"], info.get("cluster") or {}
    if info["config"].get("num_replicas", 1) == 1:
        return []
    if not cluster.get("leader"):
        return [
            wrong("jetstream.replicas", name, f"{name} has no leader", "bring its servers up: nats server report jsz")
        ]
    behind = [one["name"] for one in cluster.get("replicas") or [] if one.get("offline") or not one.get("current")]
    if not behind:
        return []
    return [
        warning(
            "jetstream.replicas",
            name,
            f"replicas of {name} are offline or behind: {', '.join(behind)}",
            "see to these servers (nats stream info, nats server report jsz)",
            why="another failure would stop the stream",
        )
    ]


def _sync(config: Config, found: Broker) -> Finding:
    stream, now = config.stream, (found.stream or {}).get("config", {})
    said = f'sync = "{stream.sync}": {durability(stream.sync, stream.hold_back)}'
    try:
        atomic = bool(now.get("allow_atomic", True))
        copies = int(now.get("num_replicas", stream.replicas))
        way, _ = mode.choose(stream.publish, stream.sync, stream.mode, atomic, replicas=copies)
    except BridgeError as error:
        return wrong("jetstream.sync", stream.name, error.what, error.remedy)
    return well("jetstream.sync", stream.name, f"{said}; published in {'batches' if way == 'batch' else 'a chain'}")


def _permissions(found: Broker) -> list[Finding]:
    return [
        wrong(
            "jetstream.permissions",
            one.subject,
            f"this user may not publish to {one.subject}",
            "grant it the permissions that nats-server.conf lists for `bridge`",
            why=f"that is how the bridge {one.use}",
        )
        for one in found.denied
    ] or [well("jetstream.permissions", found.where, "this user may publish and ask what the bridge must")]
