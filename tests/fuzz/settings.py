"""The configuration: a file of TOML, and variables of the environment."""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bridge import configfile
from bridge.config import duration, hide, join_name, size, split_name
from bridge.errors import ConfigError
from tests.fuzz.fuzzing import Target, outcome

EXAMPLE = (Path(__file__).parents[2] / "bridge.example.toml").read_bytes()
PLANTED = "planted-word"
SETTINGS = b"""[source]
dsn = "postgresql://bridge:planted-word@127.0.0.1/app"
tables = ["public.*", "!public.secret"]
[source.table."public.users"]
mask = { email = "hash", phone = "constant:***" }
[stream]
servers = ["nats://127.0.0.1:4222"]
sync = "2m"
max_age = "7d"
max_bytes = "10GB"
password = "planted-word"
[index.messages]
table = "public.messages"
url = "http://127.0.0.1:9200"
rename = { body = "text" }
fields.body = { type = "text" }
password = "planted-word"
[index.all]
tables = ["public.a", "public.b"]
[index.all.of."public.a"]
id = "a-{id}"
"""
VARIABLES = [
    b"BRIDGE_SOURCE__NAME=main\nBRIDGE_STREAM__SERVERS=nats://a:1,nats://b:2\nBRIDGE_INDEX__MESSAGES__TABLE=public.m",
    b"BRIDGE_STREAM__REPLICAS=3\nBRIDGE_STREAM__TLS__CA=/nowhere\nBRIDGE_SOURCE__ONLY_LOCAL=true",
    b"BRIDGE_SNAPSHOT__WORKERS=2\nBRIDGE_STREAM__SYNC=always\nBRIDGE_STREAM__PASSWORD=planted-word",
    b"BRIDGE_SOURCE__DSN=host=/tmp password=planted-word\nBRIDGE_STREAM__SERVERS=embedded\nBRIDGE_INDEX__A__B__C__D=1",
]


def _file() -> Path:
    handle, name = tempfile.mkstemp(prefix="bridge-fuzz-", suffix=".toml")
    os.close(handle)
    atexit.register(lambda: Path(name).unlink(missing_ok=True))
    return Path(name)


FILE = _file()


def toml(data: bytes) -> str:
    """A file is a configuration whose secrets nobody sees, or refused with every finding."""
    FILE.write_bytes(data)
    return _loaded(FILE, {}, data)


def environment(data: bytes) -> str:
    """Variables, the same; those of other programs say nothing."""
    pairs = [line.partition("=") for line in data.decode(errors="replace").replace("\0", "").split("\n")]
    return _loaded(None, {name: value for name, _, value in pairs}, data)


def _loaded(file: Path | None, variables: dict[str, str], data: bytes) -> str:
    try:
        found = configfile.load(file, variables)
    except ConfigError as error:
        return f"refused {sorted({line.split(':')[0] for line in str(error).splitlines()})[:3]}"
    if data.count(PLANTED.encode()) == SETTINGS.count(PLANTED.encode()):
        assert PLANTED not in repr(found), "a secret is in a repr"
    return f"taken {len(found.index)} {found.stream.mode}"


READERS: list[Callable[[str], object]] = [duration, size, split_name]


def notation(data: bytes) -> str:
    """Durations, sizes, names of tables, urls: read or refused; a name comes back as it was."""
    text = data.decode(errors="replace")
    said = [outcome(partial(read, text), ValueError) for read in READERS]
    if said[2] == "tuple":
        assert split_name(join_name(*split_name(text))) == split_name(text)
    hide(text)
    return " ".join(said)


WORDS = [
    b"[index.a]", b"[source]", b"[stream]", b"tables = ", b"= [", b"= {", b'"', b"true", b"2026-01-01", b"inf", b"nan",
    b"= 5", b"[[index]]", b"__TABLE=", b"BRIDGE_INDEX__", b"BRIDGE_STREAM__TLS__", b"=", b"\n", b"mask = ", b"tls = 5",
    b'mode = "compact"', b"of = 1", b"BRIDGE_STREAM=x", b"BRIDGE_STREAM__TLS=x",
]  # fmt: skip
NOTATIONS = [
    b"2m",
    b"1.5h",
    b"500ms",
    b"10GB",
    b"public.users",
    b'public."a.b"',
    b"nats://u:p@h:4222",
    b"*.*",
    b"9" * 400,
]
TARGETS = [
    Target("toml", toml, [SETTINGS, EXAMPLE, b""], WORDS),
    Target("env", environment, VARIABLES, WORDS),
    Target("notation", notation, NOTATIONS, [b"ms", b"d", b"KB", b".", b'"', b"//", b"@", b"\xc2\xb2"]),
]
