"""The configuration: one frozen tree, read from TOML and the environment, checked once, every finding at once.

Every plain key is also an environment variable, `BRIDGE_SOURCE__DSN` for `[source] dsn`, which wins over the file;
lists are comma-separated there. Secrets never show in a repr.
"""

from __future__ import annotations

import contextlib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import msgspec

from bridge.errors import ConfigError
from bridge.index import naming
from bridge.index.mapping import HIDDEN

ENVIRONMENT = "BRIDGE_"
_NOT_YET = {
    "source.on_rewrite": "warn",
    "source.messages": [],
    "source.only_local": False,
}
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZES = {"": 1, "B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}
PAST = re.compile(r"(.+)-until-(\d+)")


class Secret(str):
    """A string that repr hides."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'" if self else "''"


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[source.table."schema.table"]`: what of one table may leave the database."""

    exclude: list[str] = []


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[source]`: the PostgreSQL database. An empty dsn means libpq's own environment, service and pass files."""

    name: str = "main"
    dsn: Secret = Secret("")
    slot: str = ""
    tables: list[str] = msgspec.field(default_factory=lambda: ["public.*"])
    on_missing_identity: Literal["stop", "warn"] = "stop"
    on_gap: Literal["stop", "resnapshot"] = "stop"
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
    token: Secret = Secret("")
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
    """`[snapshot]`: how the rows that exist at the start get into the log."""

    mode: Literal["initial", "never"] = "initial"
    workers: int = 2


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
        names = [field.name for field in msgspec.structs.fields(Part)]
        return Part(**{n: getattr(self, n) if getattr(own, n) is None else getattr(own, n) for n in names})


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole tree; names that follow from others are filled in by `load`."""

    source: Source = Source()
    stream: Stream = Stream()
    state: State = State()
    snapshot: Snapshot = Snapshot()
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


def hide(url: str) -> str:
    """`url` without the user and password that it may hold."""
    return re.sub(r"//[^/@]*@", "//***@", url)


def load(path: Path | None, environment: Mapping[str, str] = os.environ) -> Config:
    """The configuration from `path` (None: the environment alone) and `environment`.

    Raises:
        ConfigError: names every wrong, unknown, missing or impossible key at once.
    """
    data = _read(path) if path is not None else {}
    findings: list[str] = []
    _overlay(data, environment, findings)
    for key, only in _NOT_YET.items():
        section, _, name = key.partition(".")
        found = data.get(section)
        if isinstance(found, dict) and name in found:
            value = found.pop(name)
            if value != only and value != str(only).lower():
                findings.append(f"{key} = {value!r}: not available yet, only {only!r} is")
    config: Config = _complete(_build(Config, data, "", findings), path, findings)
    if findings:
        where = str(path) if path is not None else "the environment"
        raise ConfigError(
            f"{len(findings)} finding{'s'[: len(findings) != 1]} in {where}:\n"
            + "\n".join(f"  - {f}" for f in findings),
            "correct the keys named above; bridge.example.toml lists every key with its default",
        )
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", "correct that line") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not valid UTF-8", "save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "name the file with --config FILE") from None


def _overlay(data: dict[str, Any], environment: Mapping[str, str], findings: list[str]) -> None:
    for variable in sorted(environment):
        if not variable.startswith(ENVIRONMENT) or "__" not in variable:
            continue
        path = variable.removeprefix(ENVIRONMENT).lower().split("__")
        kind = _type_at(path)
        if kind is None:
            findings.append(f"{variable}: no such key")
            continue
        text = environment[variable]
        value: Any = text
        if kind in (int, float, bool):
            try:
                value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
            except (ValueError, KeyError):
                findings.append(f"{variable}: expected {'true or false' if kind is bool else 'a number'}")
                continue
        elif "list" in str(kind) and text != "embedded":
            value = [part.strip() for part in text.split(",") if part.strip()]
        here = data
        for name in path[:-1]:
            here = here.setdefault(name, {})
            if not isinstance(here, dict):
                findings.append(f"{variable}: {name} is no section in the file")
                break
        else:
            here[path[-1]] = value


def _type_at(path: list[str]) -> Any:
    """The type of a plain key, None where there is no such key."""
    if len(path) == 3 and path[0] == "index":
        kind: Any = get_type_hints(Index).get(path[2])
    elif path[:-1] == ["stream", "tls"] or (len(path) == 4 and path[::2] == ["index", "tls"]):
        kind = get_type_hints(Tls).get(path[-1])
    elif len(path) == 2 and path[0] != "index":
        section = get_type_hints(Config).get(path[0])
        if ".".join(path) in _NOT_YET:
            return type(_NOT_YET[".".join(path)])
        kind = get_type_hints(section).get(path[1]) if isinstance(section, type) else None
    else:
        return None
    if kind is Tls or "dict" in str(kind):
        return None
    return kind


def _hook(kind: type[Any], value: Any) -> Any:
    if kind is Secret and isinstance(value, str):
        return Secret(value)
    raise TypeError(f"Expected `{kind.__name__}`")


def _build(kind: type[Any], data: Any, path: str, findings: list[str]) -> Any:
    """A struct of `kind` from `data`; each wrong key becomes a finding and has its default, so that the others are
    checked as well."""
    if not isinstance(data, dict):
        findings.append(f"{path}: expected a table")
        return None
    values: dict[str, Any] = {}
    hints = get_type_hints(kind)
    known = {field.name: field for field in msgspec.structs.fields(kind)}
    for name in data.keys() - known.keys():
        close = [k for k in known if k.startswith(name[:3])]
        findings.append(f"{_join(path, name)}: no such key" + (f" (is it {close[0]}?)" if close else ""))
    for name in known:
        where = _join(path, name)
        if name not in data:
            continue
        value = _value(hints[name], data[name], where, findings)
        if value is not None:
            values[name] = value
    return kind(**values)


def _value(hint: Any, value: Any, where: str, findings: list[str]) -> Any:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return _build(hint, value, where, findings)
    inner = get_args(hint)[-1] if "dict" in str(hint) else None
    if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
        if not isinstance(value, dict):
            findings.append(f"{where}: expected a table")
            return None
        built = {name: _build(inner, part, f'{where}."{name}"', findings) for name, part in value.items()}
        return {name: part for name, part in built.items() if part is not None}
    if hint == list[str] and isinstance(value, str) and where.endswith(".url"):
        value = [value]
    if "embedded" in str(hint) and isinstance(value, str) and value != "embedded":
        value = [value]
    try:
        return msgspec.convert(value, hint, dec_hook=_hook)
    except msgspec.ValidationError as error:
        findings.append(f"{where}: {str(error).split(' - at')[0]}")
        return None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _complete(config: Config, path: Path | None, findings: list[str]) -> Config:
    """`config` with the names that follow from others, its relative files found beside the configuration file."""
    base = path.parent if path is not None else Path()
    source, stream = config.source, config.stream
    plain = re.sub(r"[^a-z0-9_]", "_", source.name.lower())
    source = msgspec.structs.replace(source, slot=source.slot or f"bridge_{plain}"[:63])
    stream = msgspec.structs.replace(
        stream,
        name=stream.name or "cdc_" + re.sub(r"[^A-Za-z0-9_-]", "_", source.name),
        sync=stream.sync or ("always" if stream.embedded else "2m"),
        store_dir=str(base / stream.store_dir),
        **{k: str(base / v) for k in ("credentials", "nkey_seed_file") if (v := getattr(stream, k))},
        tls=_beside(base, stream.tls),
    )
    indexes = {}
    for name, index in config.index.items():
        changes: dict[str, Any] = {"alias": index.alias or name, "tls": _beside(base, index.tls)}
        if index.mapping:
            changes["mapping"] = str(base / index.mapping)
        for kind in ("password", "api_key"):
            file = getattr(index, f"{kind}_file")
            if file:
                changes[kind] = _secret_file(base / file, f"index.{name}.{kind}_file", findings)
        indexes[name] = msgspec.structs.replace(index, **changes)
    config = msgspec.structs.replace(config, source=source, stream=stream, index=indexes)
    _check(config, findings)
    return config


def _beside(base: Path, tls: Tls) -> Tls:
    return Tls(**{k: str(base / v) for k in ("ca", "cert", "key") if (v := getattr(tls, k))})


def _secret_file(path: Path, where: str, findings: list[str]) -> Secret:
    try:
        return Secret(path.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        findings.append(f"{where}: {path} cannot be read")
        return Secret("")


def _check(config: Config, findings: list[str]) -> None:
    source, stream = config.source, config.stream

    def must(good: object, where: str, what: str) -> None:
        if not good:
            findings.append(f"{where}: {what}")

    def parses(parse: Callable[[str], object], text: str, where: str) -> None:
        try:
            parse(text)
        except ValueError as error:
            findings.append(f"{where}: {error}")

    must(source.name.strip(), "source.name", "must not be empty")
    must(
        re.fullmatch(r"[a-z0-9_]{1,63}", source.slot),
        "source.slot",
        "only a-z, 0-9 and _, at most 63 characters",
    )
    must(any(not t.startswith("!") for t in source.tables), "source.tables", "names no table")
    for table in [*source.tables, *source.table]:
        parses(split_name, table.removeprefix("!"), f"table {table!r}")
    must(stream.embedded or stream.servers, "stream.servers", "names no server")
    must(
        re.fullmatch(r"[A-Za-z0-9_-]{1,200}", stream.name),
        "stream.name",
        "only letters, digits, _ and -",
    )
    must(
        re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", stream.prefix),
        "stream.prefix",
        "tokens of letters, digits, _ and -, joined with dots",
    )
    must(stream.replicas in (1, 3, 5), "stream.replicas", "1, 3 or 5")
    must(
        not (stream.publish == "chain" and stream.replicas > 1),
        "stream.publish",
        '"chain" is for a stream without replicas',
    )
    must(not (stream.embedded and stream.replicas > 1), "stream.replicas", "the embedded server is one node")
    if stream.sync not in ("always", "replicated"):
        parses(duration, stream.sync, "stream.sync")
    must(
        stream.sync != "replicated" or stream.replicas >= 3 or any(f.startswith("stream.replicas:") for f in findings),
        "stream.sync",
        '"replicated" needs replicas = 3 or 5',
    )
    parses(duration, stream.tombstone_ttl, "stream.tombstone_ttl")
    if stream.compact:
        _check_compact(stream, must)
    if stream.max_age:
        parses(duration, stream.max_age, "stream.max_age")
    if stream.max_bytes:
        parses(size, stream.max_bytes, "stream.max_bytes")
    logins = [k for k in ("user", "token", "credentials", "nkey_seed_file") if getattr(stream, k)]
    must(len(logins) <= 1, "stream", f"more than one way to log in: {', '.join(logins)}")
    must(re.fullmatch(r"[A-Za-z0-9_-]+", config.state.bucket), "state.bucket", "only letters, digits, _ and -")
    must(
        source.on_gap == "stop" or config.snapshot.mode == "initial",
        "source.on_gap",
        '"resnapshot" reads every table again, which snapshot.mode = "never" forbids',
    )
    must(1 <= config.snapshot.workers <= 64, "snapshot.workers", "1 to 64")
    for name, index in config.index.items():
        where = f"index.{name}"
        must(
            re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,199}", name),
            where,
            "the name takes a-z, 0-9, _ and -, and starts with a letter or digit",
        )
        must(not (index.user and index.api_key), where, "user and api_key exclude each other")
        must(index.url, f"{where}.url", "names no server")
        for url in index.url:
            must(re.match(r"https?://[^/]+", url), f"{where}.url", "must look like http://host:9200")
        _check_tls(index, where, must)
        must(0 <= index.reject_limit <= 1, f"{where}.reject_limit", "a share: 0 to 1 (1: never pause)")
        _check_tables(where, index, must)
        _check_fields(where, index, must)
    _check_names(config.index, must)


def past_name(name: str, seq: int) -> str:
    """The name of an index as the log had it at a sequence; that of its alias, too."""
    return f"{name}-until-{seq}"


def _check_names(indexes: dict[str, Index], must: Callable[[object, str, str], None]) -> None:
    """What indexes make in the engine must not have the same names: one would take or delete what is another's."""
    for name, index in indexes.items():
        made = re.compile(rf"{re.escape(name)}-(\d{{6}}(-w)?|until-\d+(-\d{{6}}(-w)?)?)")
        must(not made.fullmatch(index.alias), f"index.{name}.alias", "is what a generation of this index is called")
        # Whether or not an index of that name is in this file: its record would be the same one.
        must(
            not PAST.fullmatch(name),
            f"index.{name}",
            "names that end with -until- and a number are those of indexes of the past (`bridge reindex … --until`)",
        )
        for other, another in indexes.items():
            if other == name:
                continue
            for taken in {other, another.alias}:
                must(
                    not made.fullmatch(taken),
                    f"index.{other}",
                    f"{taken} is what a generation of index {name} is called",
                )
            if other > name:
                must(index.alias != another.alias, f"index.{other}.alias", f"is that of index {name}, too")


def _check_tables(where: str, index: Index, must: Callable[[object, str, str], None]) -> None:
    """What an index is built from, and whether its rows' ids can collide."""
    must(index.table or index.tables, f"{where}.table", "is missing")
    must(not (index.table and index.tables), where, "table and tables exclude each other")
    must(len(set(index.tables)) == len(index.tables), f"{where}.tables", "names a table twice")
    if not any(index.holds):
        return
    for table in index.of.keys() - index.holds:
        must(False, f'{where}.of."{table}"', "is not among the index's tables")
    openings: list[str] = []
    for table in index.holds:
        part = index.part(table)
        at = f'{where}.of."{table}"' if table in index.of else where
        must(not (part.columns and part.exclude), at, "columns and exclude exclude each other")
        must(HIDDEN not in (part.constants or {}), f"{at}.constants", f"{HIDDEN} is the bridge's own")
        must(
            not part.transform or re.fullmatch(r"[\w.]+:\w+", part.transform),
            f"{at}.transform",
            'must look like "module:function"',
        )
        try:
            openings.append(naming.opening(part.id or "", *split_name(table)))
        except ValueError as error:
            must(False, f"{at}.id" if part.id else where, str(error))
    if len(index.holds) > 1:
        shared = [a for n, a in enumerate(openings) for m, b in enumerate(openings) if n != m and b.startswith(a)]
        must(
            not shared,
            f"{where}.id",
            "rows of several tables could have the same id: begin each table's template with another text",
        )


def _check_tls(index: Index, where: str, must: Callable[[object, str, str], None]) -> None:
    tls = index.tls
    for kind in ("ca", "cert", "key"):
        file = getattr(tls, kind)
        must(
            not file or (Path(file).is_file() and os.access(file, os.R_OK)),
            f"{where}.tls.{kind}",
            f"{file} cannot be read",
        )
    must(not tls.key or tls.cert, f"{where}.tls.key", "is of no use without cert")
    secure = all(url.startswith("https://") for url in index.url)
    must(not (tls.ca or tls.cert) or secure, f"{where}.tls", "is for urls that begin with https://")


def _check_fields(where: str, index: Index, must: Callable[[object, str, str], None]) -> None:
    """What decides the fields of an index."""
    scaled = re.fullmatch(r"scaled_float:(\d+(?:\.\d+)?)", index.numeric)
    must(
        index.numeric in ("exact", "double") or (scaled and float(scaled[1]) > 0),
        f"{where}.numeric",
        '"exact", "double" or "scaled_float:100" (100 keeps two decimals)',
    )
    for key, default in (("numeric", "exact"), ("json", "stored"), ("fields", {})):
        changed = getattr(index, key) != default
        must(not (index.mapping and changed), f"{where}.{key}", "the file of `mapping` names every field: say it there")
    for name, field in index.fields.items():
        key = f"{where}.fields.{name}"
        must(isinstance(field.get("type"), str), key, 'names no type: { type = "keyword" }')
        must(name != "_bridge", key, "that field is the bridge's own")
        must(name not in index.exclude, key, "exclude leaves that column out")
        new = index.rename.get(name)
        must(new is None or name in index.rename.values(), key, f"rename calls that column {new} in the document")


def _check_compact(stream: Stream, must: Callable[[object, str, str], None]) -> None:
    """What a compacted log cannot do: its rows' last events must stay, however old and many they are."""
    for key in ("max_age", "max_bytes"):
        why = 'a compacted log keeps every row; leave this empty, or choose mode = "log"'
        must(not getattr(stream, key), f"stream.{key}", why)
    must(stream.discard == "old", "stream.discard", 'a compacted log replaces old events; only "old" is possible')
    must(
        stream.publish in ("auto", "batch"),
        "stream.publish",
        'a compacted log needs atomic batches: "auto" or "batch"',
    )
    with contextlib.suppress(ValueError):
        must(duration(stream.tombstone_ttl) >= 1, "stream.tombstone_ttl", "must be at least 1s")


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
