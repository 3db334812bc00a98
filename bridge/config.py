"""The configuration: one frozen tree. `configfile` reads it, `configcheck` says what is wrong in it.

Secrets never show in a repr.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
PAST = re.compile(r"(.+)-until-(\d+)")
_SIZES = {"": 1, "B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}


class Secret(str):
    """A string that repr hides."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'" if self else "''"


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[source.table."schema.table"]`: what of one table may leave the database, and what happens where PostgreSQL does
    not log a change of it."""

    columns: list[str] = []
    exclude: list[str] = []
    mask: dict[str, str] = {}
    operations: list[Literal["insert", "update", "delete", "truncate"]] = []
    on_missing_identity: Literal["stop", "warn", ""] = ""


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[source]`: the PostgreSQL database. An empty dsn means libpq's own environment, service and pass files."""

    name: str = "main"
    dsn: Secret = Secret("")
    dsn_file: str = ""
    slot: str = ""
    failover: bool | None = None
    tables: list[str] = msgspec.field(default_factory=lambda: ["public.*"])
    on_missing_identity: Literal["stop", "warn"] = "stop"
    on_gap: Literal["stop", "resnapshot"] = "stop"
    messages: list[str] = []
    only_local: bool = False
    mask_key: Secret = Secret("")
    mask_key_file: str = ""
    table: dict[str, Table] = {}


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`tls = {ca, cert, key}`: files in PEM form; `ca` alone verifies the server, `cert` may hold the key as well."""

    ca: str = ""
    cert: str = ""
    key: str = ""


class Stream(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[stream]`: the JetStream side. `servers = "embedded"` runs a nats-server of the bridge's own."""

    servers: list[str] | Literal["embedded"] = msgspec.field(default_factory=lambda: ["nats://127.0.0.1:4222"])
    store_dir: str = "bridge-data"
    name: str = ""
    prefix: str = "cdc"
    mode: Literal["log", "compact"] = "log"
    tombstone_ttl: str = "7d"
    replicas: int = 1
    sync: str = ""
    discard: Literal["old", "new"] = "old"
    max_age: str = ""
    max_bytes: str = ""
    publish: Literal["auto", "batch", "chain"] = "auto"
    user: str = ""
    password: Secret = Secret("")
    password_file: str = ""
    token: Secret = Secret("")
    token_file: str = ""
    credentials: str = ""
    nkey_seed_file: str = ""
    tls: Tls = Tls()

    @property
    def embedded(self) -> bool:
        """Whether the bridge runs its own nats-server."""
        return self.servers == "embedded"

    @property
    def compact(self) -> bool:
        """Whether the stream keeps one event a row."""
        return self.mode == "compact"

    @property
    def hold_back(self) -> float:
        """Seconds for which an acked message may still be lost by a power failure; 0 where an ack is durable."""
        return 0.0 if self.sync in ("always", "replicated") else duration(self.sync)


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[state]`: the KV bucket."""

    bucket: str = "bridge"


class Snapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[snapshot]`: how rows get into the log that no change brings: those that exist at the start, and those that
    DDL has rewritten."""

    mode: Literal["initial", "incremental", "never"] = "initial"
    workers: int = 2
    on_rewrite: Literal["snapshot", "warn"] = "snapshot"


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[index.NAME.of."schema.table"]`: what is different for one of its tables; the rest is the index's own."""

    columns: list[str] | None = None
    exclude: list[str] | None = None
    rename: dict[str, str] | None = None
    constants: dict[str, Any] | None = None
    id: str | None = None
    routing: str | None = None
    soft_delete: str | None = None
    transform: str | None = None


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[index.NAME]`: one search index, built from the events of one table or several."""

    table: str = ""
    tables: list[str] = []
    url: list[str] = msgspec.field(default_factory=lambda: ["http://127.0.0.1:9200"])
    user: str = ""
    password: Secret = Secret("")
    password_file: str = ""
    api_key: Secret = Secret("")
    api_key_file: str = ""
    tls: Tls = Tls()
    alias: str = ""
    columns: list[str] = []
    exclude: list[str] = []
    rename: dict[str, str] = {}
    constants: dict[str, Any] = {}
    id: str = ""
    routing: str = ""
    soft_delete: str = ""
    transform: str = ""
    numeric: str = "exact"
    json: Literal["stored", "flat", "object"] = "stored"
    fields: dict[str, dict[str, Any]] = {}
    settings: dict[str, Any] = {}
    mapping: str = ""
    reject_limit: float = 0.5
    of: dict[str, Part] = {}

    @property
    def holds(self) -> list[str]:
        """The tables that it is built from, as they are configured."""
        return self.tables or [self.table]

    def part(self, table: str) -> Part:
        """What counts for one of its tables."""
        own = self.of.get(table, Part())
        names = Part.__struct_fields__
        return Part(**{n: getattr(self, n) if getattr(own, n) is None else getattr(own, n) for n in names})


class Operate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[operate]`: how a running bridge is looked at and told what to do. http, index_http: "host:port", or empty for
    nothing; "auto" is 127.0.0.1:9300 as soon as nobody else has that port. service: answer requests over NATS."""

    service: bool = True
    http: str = "auto"
    index_http: str = ""
    hosts: list[str] = []
    ready_within: str = "30s"
    table_metrics: int = 100
    token: Secret = Secret("")
    token_file: str = ""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole tree; names that follow from others are filled in by `load`."""

    source: Source = Source()
    stream: Stream = Stream()
    state: State = State()
    snapshot: Snapshot = Snapshot()
    operate: Operate = Operate()
    index: dict[str, Index] = {}


def duration(text: str) -> float:
    """Seconds in "2m", "1.5h", "500ms", "7d"; ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration such as 500ms, 90s, 2m, 36h or 7d")
    return float(match[1]) * _UNITS[match[2]]


def size(text: str) -> int:
    """Bytes in "10GB", "512MB" (powers of 1,024); ValueError for anything else."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?B|)", text)
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 512MB or 10GB")
    return int(match[1]) * _SIZES[match[2]]


def address(text: str) -> tuple[str, int]:
    """(host, port) of "127.0.0.1:9300", "[::1]:9300", "localhost:9300"; ValueError for anything else."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/\[\]]+)):(\d{1,5})", text)
    if match is None or not 0 < int(match[3]) < 65536:
        raise ValueError(f"{text!r} is not an address such as 127.0.0.1:9300 or [::1]:9300")
    return match[1] or match[2], int(match[3])


def hide(url: str) -> str:
    """`url` without the user and password that it may hold."""
    return re.sub(r"//[^/@]*@", "//***@", url)


def split_name(text: str) -> tuple[str, str]:
    """(schema, table) of "schema.table", each part bare or in double quotes ("" is a quote within).

    Bare parts are taken as written: no case folding. Raises ValueError for anything else.
    """
    match = re.fullmatch(r'("(?:[^"]|"")+"|[^".]+)\.("(?:[^"]|"")+"|[^".]+)', text)
    if match is None:
        raise ValueError(
            f"{text!r} is not a table name such as public.users, or a pattern such as public.*; "
            'quote a name that holds a dot: public."a.b"'
        )
    schema, table = (part[1:-1].replace('""', '"') if part.startswith('"') else part for part in match.groups())
    return schema, table


def join_name(schema: str, table: str) -> str:
    """What `split_name` takes apart: "schema.table", a part that holds a dot or a quote in double quotes."""
    parts = [part if re.fullmatch('[^".]+', part) else '"' + part.replace('"', '""') + '"' for part in (schema, table)]
    return ".".join(parts)


def past_name(name: str, seq: int) -> str:
    """The name of an index as the log had it at a sequence; that of its alias, too."""
    return f"{name}-until-{seq}"
