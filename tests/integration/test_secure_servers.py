"""TLS and logins at PostgreSQL and NATS: what works, and what is said, once, where it does not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import psycopg
import pytest

from bridge import configfile
from bridge.config import Secret, Stream, Tls
from bridge.embedded import NatsServer, Postgres, until
from bridge.embedded.postgres import server_user
from bridge.errors import ServerRefused
from bridge.source.connection import connect as to_postgres
from bridge.stream.server import connect as to_nats
from tests.tls import Authority

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "other")


def _given_to_server(pair: tuple[str, str], folder: Path) -> tuple[str, str]:
    """Copies of a certificate and its key that PostgreSQL's own user may read, and nobody else."""
    folder.mkdir(exist_ok=True)
    found = []
    for file in pair:
        copy = folder / Path(file).name
        shutil.copy(file, copy)
        copy.chmod(0o600)
        if user := server_user():
            os.chown(copy, *user)
        found.append(str(copy))
    return found[0], found[1]


@pytest.fixture(scope="module")
async def postgres(ours: Authority) -> AsyncIterator[Postgres]:
    async with Postgres.throwaway(fsync=False) as server:
        cert, key = _given_to_server(ours.signs("postgres"), server.data_dir / "tls")
        hba = server.data_dir / "pg_hba.conf"
        hba.write_text(f"host all guarded 127.0.0.1/32 scram-sha-256\n{hba.read_text()}")
        async with to_postgres(server.dsn()) as sql:
            for name, value in {"ssl_cert_file": cert, "ssl_key_file": key, "ssl": "on"}.items():
                await sql.execute(f"ALTER SYSTEM SET {name} = '{value}'".encode())
            await sql.execute("CREATE ROLE guarded LOGIN REPLICATION PASSWORD 'planted-right'")
        await server.restart()
        yield server


@pytest.fixture(scope="module")
async def guarded(ours: Authority) -> AsyncIterator[NatsServer]:
    cert, key = ours.signs("nats")
    tls = f"{{ cert_file: {json.dumps(cert)}, key_file: {json.dumps(key)} }}"
    login = '{ users: [ { user: "writer", password: "planted-right" } ] }'
    async with NatsServer.throwaway(settings={"tls": tls, "authorization": login}) as server:
        yield server


async def secured(dsn: str) -> bool:
    """Whether a connection with this dsn is encrypted."""
    async with to_postgres(dsn) as sql:
        row = await (await sql.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")).fetchone()
        return bool(row and row[0])


async def objection(what: Any) -> ServerRefused:
    with pytest.raises(ServerRefused) as found, anyio.fail_after(20):
        await what
    assert found.value.remedy
    assert "planted" not in str(found.value)
    return found.value


async def test_an_authority_alone_verifies_postgresql(postgres: Postgres, ours: Authority, theirs: Authority) -> None:
    assert await secured(postgres.dsn(sslrootcert=ours.ca))
    stranger = await objection(secured(postgres.dsn(sslrootcert=theirs.ca)))
    assert "TLS with PostgreSQL fails" in stranger.what
    assert "sslrootcert" in stranger.remedy
    missing = await objection(secured(postgres.dsn(sslrootcert="/nowhere/ca.pem")))
    assert "/nowhere/ca.pem" in missing.what


async def test_a_certificate_of_postgresql_for_another_name_is_refused(postgres: Postgres, ours: Authority) -> None:
    dsn = postgres.dsn(sslrootcert=ours.ca).replace("127.0.0.1", "elsewhere") + "&hostaddr=127.0.0.1"
    error = await objection(secured(dsn))
    assert 'does not match host name "elsewhere"' in error.what


async def test_a_certificate_of_postgresql_that_has_expired_is_told_how_to_see(
    postgres: Postgres, ours: Authority
) -> None:
    old = _given_to_server(ours.signs("old", days=-1), postgres.data_dir / "tls")
    query = "SELECT current_setting('ssl_cert_file'), current_setting('ssl_key_file')"
    async with to_postgres(postgres.dsn()) as sql:
        now = await (await sql.execute(query)).fetchone()
        assert now is not None
        try:
            await given(sql, old)
            error = await expired(postgres, ours)
        finally:
            await given(sql, now)
    # libpq does not say more.
    assert "certificate verify failed" in error.what
    assert "expired" in error.remedy
    assert "openssl s_client -starttls postgres" in error.remedy


async def given(sql: psycopg.AsyncConnection[Any], pair: Sequence[str]) -> None:
    """Have the server use another certificate and key."""
    for name, value in zip(("ssl_cert_file", "ssl_key_file"), pair, strict=True):
        await sql.execute(f"ALTER SYSTEM SET {name} = '{value}'".encode())
    await sql.execute("SELECT pg_reload_conf()")


async def expired(postgres: Postgres, ours: Authority) -> ServerRefused:
    """The refusal once the server has its new settings."""
    found: list[ServerRefused] = []

    async def refused() -> bool:
        try:
            await secured(postgres.dsn(sslrootcert=ours.ca))
        except ServerRefused as error:
            found.append(error)
        return bool(found)

    await until(refused, 20, "the certificate counts")
    return found[0]


async def test_postgresql_without_tls_is_refused_where_an_authority_is_named(pg_db: str, ours: Authority) -> None:
    mark = "&" if "?" in pg_db else "?"
    error = await objection(secured(f"{pg_db}{mark}sslrootcert={ours.ca}"))
    assert "does not support SSL" in error.what


@pytest.mark.parametrize("variable", ["PGSSLROOTCERT", "PGSSLMODE"])
async def test_libpqs_variables_count_as_the_dsn_does(
    postgres: Postgres, theirs: Authority, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    if variable == "PGSSLROOTCERT":
        monkeypatch.setenv("PGSSLROOTCERT", theirs.ca)
        assert "TLS" in (await objection(secured(postgres.dsn()))).what
    else:
        monkeypatch.setenv("PGSSLMODE", "disable")
        assert not await secured(postgres.dsn(sslrootcert=theirs.ca))


async def test_a_wrong_password_at_postgresql_is_refused_without_showing_it(postgres: Postgres) -> None:
    dsn = postgres.dsn(user="guarded").replace("guarded@", "guarded:planted-wrong@")
    error = await objection(secured(dsn))
    assert "password authentication failed" in error.what
    assert "pg_hba.conf" in error.remedy


async def asked(url: str, **stream: Any) -> int:
    """What a server says once somebody has logged in."""
    async with to_nats(Stream(**stream), [url]) as broker:
        return broker.max_payload


LOGIN: dict[str, Any] = {"user": "writer", "password": Secret("planted-right")}


async def test_an_authority_alone_verifies_nats(guarded: NatsServer, ours: Authority, theirs: Authority) -> None:
    assert await asked(guarded.url, **LOGIN, tls=Tls(ca=ours.ca))
    for tls in (Tls(ca=theirs.ca), Tls()):
        error = await objection(asked(guarded.url, **LOGIN, tls=tls))
        assert "TLS with NATS" in error.what
        assert "[stream] tls" in error.remedy


async def test_a_certificate_of_nats_for_another_name_is_refused(ours: Authority) -> None:
    cert, key = ours.signs("elsewhere", "DNS:elsewhere")
    tls = f"{{ cert_file: {json.dumps(cert)}, key_file: {json.dumps(key)} }}"
    async with NatsServer.throwaway(settings={"tls": tls}) as server:
        error = await objection(asked(server.url, tls=Tls(ca=ours.ca)))
        assert "TLS with NATS" in error.what


async def test_a_certificate_of_nats_that_has_expired_is_said(ours: Authority) -> None:
    cert, key = ours.signs("old", days=-1)
    tls = f"{{ cert_file: {json.dumps(cert)}, key_file: {json.dumps(key)} }}"
    async with NatsServer.throwaway(settings={"tls": tls}) as server:
        error = await objection(asked(server.url, tls=Tls(ca=ours.ca)))
        assert "TLS with NATS" in error.what
        assert "certificate has expired" in error.what
        assert "a new certificate" in error.remedy


@pytest.mark.parametrize("how", ["an authority", "the url"])
async def test_no_login_goes_to_a_nats_server_that_asks_for_no_tls(nats: NatsServer, ours: Authority, how: str) -> None:
    url = nats.url if how == "an authority" else nats.url.replace("nats://", "tls://")
    tls = Tls(ca=ours.ca) if how == "an authority" else Tls()
    error = await objection(asked(url, **LOGIN, tls=tls))
    assert "asks for no TLS" in error.what
    assert "nothing was sent" in error.what


async def test_a_wrong_password_at_nats_is_refused_without_showing_it(guarded: NatsServer, ours: Authority) -> None:
    error = await objection(asked(guarded.url, user="writer", password=Secret("planted-wrong"), tls=Tls(ca=ours.ca)))
    assert "refuses the login" in error.what


async def test_tls_files_of_nats_that_are_none_are_named(guarded: NatsServer, tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("planted")
    error = await objection(asked(guarded.url, tls=Tls(ca=str(tmp_path / "no.pem"))))
    assert "[stream] tls" in error.what


async def test_secrets_come_from_files(
    postgres: Postgres, guarded: NatsServer, ours: Authority, tmp_path: Path
) -> None:
    (tmp_path / "dsn").write_text(postgres.dsn(user="guarded").replace("guarded@", "guarded:planted-right@") + "\n")
    (tmp_path / "word").write_text("planted-right\n")
    (tmp_path / "bridge.toml").write_text(
        f'[source]\ndsn_file = "dsn"\n[stream]\nservers = "{guarded.url}"\nuser = "writer"\npassword_file = "word"\n'
        f'tls = {{ ca = "{ours.ca}" }}\n'
    )
    found = configfile.load(tmp_path / "bridge.toml", {})
    assert "planted" not in repr(found)
    await secured(str(found.source.dsn))
    async with to_nats(found.stream, [guarded.url]) as broker:
        assert broker.max_payload
