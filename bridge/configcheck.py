"""What is wrong in a configuration that could be read: keys that contradict each other, names that cannot be had."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path

from bridge.config import PAST, Config, Index, Operate, Stream, Table, address, duration, size, split_name
from bridge.index import naming
from bridge.index.mapping import HIDDEN

_ALIAS = re.compile(r"(?![-_+])[^\\/*?\"<>|#:,\s]+")


MASK_KEY = 16
TOKEN = 16
MASKS = re.compile("hash|constant:.*", re.DOTALL)


def check(config: Config, findings: list[str]) -> None:
    """Add a line for each finding."""
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
    for named in [*source.tables, *source.table]:
        parses(split_name, named.removeprefix("!"), f"table {named!r}")
    for name, table in source.table.items():
        _check_leaving(f"source.table.{name}", table, config, must)
    must(
        not source.mask_key or len(source.mask_key) >= MASK_KEY,
        "source.mask_key_file",
        f"the key is shorter than {MASK_KEY} characters: it could be guessed",
    )
    must(not any(m in ("", "!") for m in source.messages), "source.messages", "an empty pattern chooses no message")
    must(
        not (source.messages and stream.compact),
        "source.messages",
        'a compacted log keeps one message a subject: logical messages need stream.mode = "log"',
    )
    must(stream.embedded or stream.servers, "stream.servers", "names no server")
    for host in difflib.get_close_matches("embedded", () if stream.embedded else stream.servers, cutoff=0.8):
        must(False, "stream.servers", f'"{host}" is taken for a host (is it servers = "embedded"?)')
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
        source.on_gap == "stop" or config.snapshot.mode != "never",
        "source.on_gap",
        '"resnapshot" reads every table again, which snapshot.mode = "never" forbids',
    )
    must(1 <= config.snapshot.workers <= 64, "snapshot.workers", "1 to 64")
    _check_operate(config.operate, must, parses)
    for name, index in config.index.items():
        where = f"index.{name}"
        must(
            re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,199}", name),
            where,
            "the name takes a-z, 0-9, _ and -, and starts with a letter or digit",
        )
        must(not (index.user and index.api_key), where, "user and api_key exclude each other")
        must(
            _ALIAS.fullmatch(index.alias) and index.alias not in (".", "..") and len(index.alias.encode()) <= 255,
            f"{where}.alias",
            'takes no spaces, commas or any of \\ / * ? " < > | # :, and does not start with -, _ or +',
        )
        must(index.url, f"{where}.url", "names no server")
        for url in index.url:
            must(re.match(r"https?://[^/]+", url), f"{where}.url", "must look like http://host:9200")
        _check_tls(index, where, must)
        must(0 <= index.reject_limit <= 1, f"{where}.reject_limit", "a share: 0 to 1 (1: never pause)")
        _check_tables(where, index, must)
        _check_fields(where, index, must)
    _check_names(config.index, must)


def _check_operate(
    operate: Operate,
    must: Callable[[object, str, str], None],
    parses: Callable[[Callable[[str], object], str, str], None],
) -> None:
    """What the bridge serves over HTTP."""
    if operate.http not in ("", "auto"):
        parses(address, operate.http, "operate.http")
    if operate.index_http:
        parses(address, operate.index_http, "operate.index_http")
        must(operate.index_http != operate.http, "operate.index_http", "is the address of operate.http, too")
    for name in operate.hosts:
        must(
            re.fullmatch(r"[A-Za-z0-9.-]+", name),
            "operate.hosts",
            f"{name!r} is no host name (without scheme and port)",
        )
    parses(duration, operate.ready_within, "operate.ready_within")
    must(0 <= operate.table_metrics <= 10_000, "operate.table_metrics", "0 to 10,000")
    must(
        not operate.token or (len(operate.token) >= TOKEN and operate.token.isascii() and operate.token.isprintable()),
        "operate.token_file" if operate.token_file else "operate.token",
        f"needs at least {TOKEN} printable characters of ASCII: it could be guessed, or not be sent",
    )


def _check_names(indexes: dict[str, Index], must: Callable[[object, str, str], None]) -> None:
    """What indexes make in the engine must not have the same names: one would take or delete what is another's."""
    for name, index in indexes.items():
        made = re.compile(rf"{re.escape(name)}-(\d{{6}}(-w\d*)?|until-\d+(-\d{{6}}(-w\d*)?)?)")
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
    tables = list(dict.fromkeys(index.holds))
    for table in tables:
        part = index.part(table)
        at = f'{where}.of."{table}"' if table in index.of else where
        must("*" not in table, at, f"{table} is a pattern: an index names each of its tables")
        must(not (part.columns and part.exclude), at, "columns and exclude exclude each other")
        for name in part.rename or {}:
            left_out = (part.columns and name not in part.columns) or name in (part.exclude or ())
            why = f"names {name}, which {'columns' if part.columns else 'exclude'} leaves out"
            must(not left_out, f"{at}.rename", why)
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
    if len(tables) > 1:
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


def _check_leaving(where: str, table: Table, config: Config, must: Callable[[object, str, str], None]) -> None:
    """What of one table may leave."""
    both = sorted(set(table.columns) & set(table.exclude))
    must(not both, where, f"columns and exclude both name {', '.join(both)}")
    for name, how in table.mask.items():
        at = f"{where}.mask.{name}"
        must(MASKS.fullmatch(how), at, f'{how!r} is neither "hash" nor "constant:" and a text')
        left_out = name in table.exclude or (table.columns and name not in table.columns)
        must(not left_out, at, "the column is left out")
        must(how != "hash" or config.source.mask_key, at, '"hash" needs [source] mask_key_file')
    everything = set(table.operations) in (set(), {"insert", "update", "delete", "truncate"})
    must(
        everything or not config.stream.compact,
        f"{where}.operations",
        'a compacted log holds rows as they are: choosing among operations needs stream.mode = "log"',
    )
