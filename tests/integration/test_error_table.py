"""What a person sees who gets something wrong: one row for each mistake, provoked by the command itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import anyio
import pytest

from bridge.embedded import NatsServer, SearchEngine
from bridge.operate.rebuilds import Asked, Failed, Rebuilds

ROOT = Path(__file__).parents[2]
INDEX = '[index.a]\ntable = "public.a"\n'


class Mistake(NamedTuple):
    """arguments, file: what is run, with which bridge.toml; says: words of the message; then: words of what to do."""

    name: str
    arguments: str
    file: str | bytes = ""
    code: int = 2
    says: tuple[str, ...] = ()
    then: str = ""
    env: tuple[tuple[str, str], ...] = ()


TABLE = [
    Mistake("no such command", "indx", says=("indx", "did you mean index?"), then="bridge --help"),
    Mistake("no such word", "status extra", says=("extra",), then="bridge --help"),
    Mistake("no such option", "replay --form 3", says=("--form", "Did you mean --from?"), then="bridge replay --help"),
    Mistake("no such common option", "--confg x", says=("--confg", "did you mean --config?"), then="bridge --help"),
    Mistake("an argument that is missing", "reindex", says=("reindex", "NAME"), then="bridge reindex --help"),
    Mistake("a number that is none", "replay --limit x", says=("--limit", '"x"'), then="bridge replay --help"),
    Mistake("a format that is none", "--log-format yaml status", says=("yaml", "json"), then="bridge --help"),
    Mistake("a file that is not there", "--config nowhere.toml status", says=("nowhere.toml", "No such file"),
            then="--config FILE"),
    Mistake("a folder for a file", "--config . status", says=("Is a directory",), then="--config FILE"),
    Mistake("no TOML", "status", "[source\na = 1", says=("bridge.toml", "line 1, column 8"), then="correct that line"),
    Mistake("a byte order mark", "status", b"\xef\xbb\xbf[sorce]", says=("sorce: no such key",), then="example.toml"),
    Mistake("no UTF-8", "status", b"name = '\xff'", says=("bridge.toml", "UTF-8"), then="save it as UTF-8"),
    Mistake("no such section", "status", "[sorce]", says=("sorce: no such key (is it source?)",), then="example.toml"),
    Mistake("no such key", "status", "[source]\ndns = 'x'", says=("source.dns", "is it dsn?"), then="example.toml"),
    Mistake("another type", "status", "[source]\nonly_local = 'yes'\n[stream]\nreplicas = '3'",
            says=("only_local: expected true or false, got a text", "replicas: expected a whole number"), then="keys"),
    Mistake("almost embedded", "status", '[stream]\nservers = "embeded"', says=('is it servers = "embedded"?',),
            then="keys"),
    Mistake("another choice", "status", "[source]\non_gap = 'heal'", says=('"stop" or "resnapshot"',), then="keys"),
    Mistake("a type within", "status", "[source]\ntables = [5]", says=("source.tables: expected a text",), then="keys"),
    Mistake("no such variable", "status", env=(("BRIDGE_SOURCE__DNS", "x"),), says=("BRIDGE_SOURCE__DSN?",),
            then="keys"),
    Mistake("no number in a variable", "status", env=(("BRIDGE_STREAM__REPLICAS", "x"),), says=("a number",),
            then="keys"),
    Mistake("a secret that cannot be read", "status", '[source]\ndsn_file = "nowhere"', says=("dsn_file", "nowhere"),
            then="keys"),
    Mistake("a zero character", "status", '[source]\ndsn_file = "a\\u0000b"', says=("dsn_file: holds a zero",),
            then="keys"),
    Mistake("a secret twice", "status", '[stream]\npassword = "a"\npassword_file = "bridge.toml"',
            says=("password and password_file exclude each other",), then="keys"),
    Mistake("no such index", "reindex b", INDEX, says=("b",), then="a"),
    Mistake("an index whose file cannot be read", "index a --show-mapping", f'{INDEX}mapping = "nowhere.json"',
            says=("nowhere.json",), then="correct it"),
    Mistake("no index at all", "index", says=("no index is configured",), then="[index.NAME]"),
    Mistake("a dsn that is none", "drop --yes", '[source]\ndsn = "nonsense"', 4, ("dsn is not a connection string",),
            "host:"),
    Mistake("a dsn with a port that is none", "drop --yes", '[source]\ndsn = "postgresql://a@127.0.0.1:1x/b"', 4,
            ("dsn cannot be used", "1x"), "correct that option"),
    Mistake("a password with an @", "drop --yes", '[source]\ndsn = "postgresql://a:pl@nted@127.0.0.1/b"', 4,
            ("dsn cannot be used", "not one user"), "%40"),
    Mistake("a password with a slash", "drop --yes", '[source]\ndsn = "postgresql://a:planted/x@127.0.0.1/b"', 4,
            ("dsn cannot be used", "not one user"), "%2F"),
    Mistake("nobody to ask", "drop", code=2, says=("nobody to ask",), then="--yes"),
    Mistake("a folder that cannot be made", "run", '[stream]\nservers = "embedded"\nstore_dir = "/proc/bridge"', 4,
            ("/proc/bridge", "No such file"), "store_dir"),
    Mistake("a file for a folder", "run", '[stream]\nservers = "embedded"\nstore_dir = "bridge.toml/x"', 4,
            ("bridge.toml/x", "Not a directory"), "store_dir"),
    Mistake("a certificate that is none", "replay", '[stream]\ntls = { ca = "bridge.toml" }', 4, ("[stream] tls",),
            "ca"),
    Mistake("a TLS file that is not there", "replay", '[stream]\ntls = { ca = "bridge.toml", cert = "no.pem" }', 4,
            ("[stream] tls.cert", "no.pem", "No such file"), "tls.cert"),
    Mistake("a TLS key that is a folder", "replay", '[stream]\ntls = { cert = "bridge.toml", key = "." }', 4,
            ("[stream] tls.key", "Is a directory"), "tls.key"),
    Mistake("tables and all of them", "snapshot --all public.a", says=("TABLES and --all exclude each other",),
            then="public.a"),
    Mistake("neither tables nor all", "snapshot", says=("needs either tables or --all",), then="public.users"),
    Mistake("a key file that is not there", "replay", '[stream]\nnkey_seed_file = "no"', 4, ("no cannot be read",),
            "nkey"),
    Mistake("a time that is none", "replay --from yesterday", says=("yesterday",), then="2026"),
    Mistake("a server that is away", "snapshot public.a", '[stream]\nservers = "nats://127.0.0.1:9"', 4,
            ("nats://127.0.0.1:9", "cannot be reached"), "run this again"),
]  # fmt: skip


def call(folder: Path, mistake: Mistake, *, more: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command without a terminal in an environment of its own."""
    (folder / "bridge.toml").write_bytes(mistake.file if isinstance(mistake.file, bytes) else mistake.file.encode())
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "BRIDGE_", "LC_", "LANG"))}
    return subprocess.run(
        [sys.executable, "-m", "bridge", *mistake.arguments.split()],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), **dict(mistake.env), **(more or {})},
        input="",
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("mistake", TABLE, ids=[mistake.name for mistake in TABLE])
def test_a_mistake_is_told_with_place_and_remedy(mistake: Mistake, tmp_path: Path) -> None:
    done = call(tmp_path, mistake)
    assert done.returncode == mistake.code, done.stderr
    assert done.stdout == ""
    what, arrow, remedy = done.stderr.partition("\n  → ")
    assert arrow
    for word in mistake.says:
        assert word in what
    assert mistake.then in remedy
    assert "Traceback" not in done.stderr
    assert "nted" not in done.stderr  # of a password


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize("arguments", ["status", "status --json", "--help", "indx", "replay --help", "check"])
def test_an_encoding_without_arrows_and_marks_is_no_error(arguments: str, tmp_path: Path) -> None:
    done = call(tmp_path, Mistake("", arguments, '[source]\ndsn = "host=/nowhere"'), more={**ASCII, "COLUMNS": "40"})
    assert done.returncode in (0, 1, 2, 4)
    assert (done.stdout + done.stderr).isascii()
    assert "unexpected" not in done.stderr
    assert "\\u" not in done.stdout + done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_error(closed: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m bridge status {closed}; echo ended $? >code"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "BRIDGE_SOURCE__DSN": "host=/nowhere"},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert (tmp_path / "code").read_text() == "ended 1\n"
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(("option", "shown"), [("", False), ("-v", False), ("-vv", True)])
def test_a_traceback_of_what_is_unexpected_needs_two_vs(option: str, shown: bool, tmp_path: Path) -> None:
    broken = tmp_path / "bad.py"
    broken.write_text("import bridge.replay\nbridge.replay.start_of = lambda _: 1 / 0\n")
    code = "import bad, sys; from bridge.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *option.split(), "replay"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}, capture_output=True, encoding="utf-8",
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == shown
    if not shown:
        assert "unexpected ZeroDivisionError in bad.py:2" in done.stderr
        assert "-vv" in done.stderr


def test_a_port_in_use_is_no_obstacle_for_the_embedded_server(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (tmp_path / "bridge-data").mkdir()
        (tmp_path / "bridge-data" / "port").write_text(str(taken.getsockname()[1]))
        done = call(tmp_path, Mistake("", "replay", '[stream]\nservers = "embedded"'))
    assert done.returncode == 4
    assert "cdc_main" in done.stderr  # it ran, and has no stream yet


def test_logs_for_machines_are_json_and_nothing_else(tmp_path: Path) -> None:
    done = call(tmp_path, Mistake("", "--log-format json replay", '[stream]\nservers = "embedded"'))
    lines = [line for line in done.stderr.splitlines() if line.startswith("{")]
    assert lines
    for line in lines:
        assert {"event", "level", "timestamp"} <= json.loads(line).keys()


@pytest.mark.parametrize(
    "mistake", [one for one in TABLE if "--log-format" not in one.arguments and "--confg" not in one.arguments]
)
def test_an_error_is_an_object_too_where_logs_are_json(mistake: Mistake, tmp_path: Path) -> None:
    done = call(tmp_path, mistake._replace(arguments=f"--log-format json {mistake.arguments}"))
    assert done.returncode == mistake.code, done.stderr
    *_, last = [json.loads(line) for line in done.stderr.splitlines()]
    assert (last["event"], last["level"], last["code"]) == ("command failed", "error", mistake.code)
    for word in mistake.says:
        assert word in last["what"]
    assert mistake.then in last["next"]


@pytest.mark.anyio
async def test_why_a_rebuild_beside_the_bridge_ends_is_read_from_its_last_line(tmp_path: Path) -> None:
    async with anyio.create_task_group() as tasks:
        rebuilds = Rebuilds(tasks, ["--config", str(tmp_path / "nowhere.toml")], ["a"])
        with pytest.raises(Failed) as raised:
            await rebuilds.asked(Asked("a"))
    assert raised.value.exit_code == 2
    assert "nowhere.toml" in raised.value.what
    assert "--config FILE" in raised.value.remedy


@pytest.mark.anyio
async def test_no_color_is_shown_where_nobody_wants_it(tmp_path: Path, nats: NatsServer, osmem: SearchEngine) -> None:
    file = f'[source]\ndsn = "host=/nowhere"\n[stream]\nservers = "{nats.url}"\n{INDEX}url = "{osmem.url}"\n'
    for arguments in ("status", "check"):
        done = call(tmp_path, Mistake("", arguments, file), more={"NO_COLOR": "1", "TERM": "xterm", "FORCE_COLOR": ""})
        assert "\x1b" not in done.stdout + done.stderr
