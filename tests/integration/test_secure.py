"""TLS, client certificates and logins before a search engine: what works, and what is said where it does not."""

from __future__ import annotations

import base64
import ssl
from pathlib import Path
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

from bridge import configfile
from bridge.config import Index, Secret, Tls
from bridge.embedded import NatsServer, SearchEngine
from bridge.errors import EXIT_REFUSED, ServerRefused
from bridge.index.engine import opened
from bridge.index.indexer import run_index
from tests.integration.feeding import fed, row
from tests.tls import Authority, fronted

pytestmark = pytest.mark.anyio

BASIC = "Basic " + base64.b64encode(b"feeder:planted-word").decode()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "other")


def named(authority: Authority, pair: tuple[str, str] = ("", "")) -> Tls:
    return Tls(ca=authority.ca, cert=pair[0], key=pair[1])


async def health(url: str, **index: Any) -> Any:
    async with opened(Index(table="public.posts", url=[url], **index)) as engine:
        with anyio.fail_after(20):
            return await engine.json("GET", "/_cluster/health")


async def refusal(url: str, **index: Any) -> ServerRefused:
    with pytest.raises(ServerRefused) as found:
        await health(url, **index)
    assert found.value.exit_code == EXIT_REFUSED
    assert "planted" not in str(found.value)
    assert found.value.remedy
    return found.value


async def test_an_index_is_fed_through_tls_with_a_client_certificate_and_a_login(
    nats: NatsServer, osmem: SearchEngine, ours: Authority
) -> None:
    with fronted(osmem.port, ours.signs("server"), clients=ours.ca, login=BASIC) as port:
        url = f"https://localhost:{port}"
        login: dict[str, Any] = {
            "user": "feeder",
            "password": Secret("planted-word"),
            "tls": named(ours, ours.signs("client")),
        }
        with capture_logs() as said:
            async with fed(nats.url, url, **login) as log, log.reading():
                await log.posts(1, 3)
                await log.done()
                assert await log.documents() == {str(number): row(number) for number in (1, 2, 3)}
        assert "planted" not in str(said)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_an_authority_of_ones_own_verifies_the_server(osmem: SearchEngine, ours: Authority, host: str) -> None:
    with fronted(osmem.port, ours.signs("server")) as port:
        assert await health(f"https://{host}:{port}", tls=named(ours))


async def test_a_server_signed_by_somebody_else_is_refused(
    osmem: SearchEngine, ours: Authority, theirs: Authority
) -> None:
    with fronted(osmem.port, ours.signs("server")) as port:
        for tls in (named(theirs), Tls()):
            error = await refusal(f"https://localhost:{port}", tls=tls)
            assert "its certificate is not trusted" in error.what
            assert "ca = " in error.remedy


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_a_certificate_for_another_name_is_refused(osmem: SearchEngine, ours: Authority, host: str) -> None:
    with fronted(osmem.port, ours.signs("elsewhere", "DNS:elsewhere,IP:127.0.0.9")) as port:
        error = await refusal(f"https://{host}:{port}", tls=named(ours))
        assert f"its certificate is not for {host}" in error.what


async def test_a_certificate_that_has_expired_is_said(osmem: SearchEngine, ours: Authority) -> None:
    with fronted(osmem.port, ours.signs("old", days=-1)) as port:
        error = await refusal(f"https://localhost:{port}", tls=named(ours))
        assert "certificate has expired" in error.what
        assert "a new certificate" in error.remedy


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_missing_or_foreign_client_certificate_is_named(
    osmem: SearchEngine, ours: Authority, theirs: Authority, newest: ssl.TLSVersion
) -> None:
    with fronted(osmem.port, ours.signs("server"), clients=ours.ca, newest=newest) as port:
        url = f"https://localhost:{port}"
        missing = await refusal(url, tls=named(ours))
        assert "wants a client certificate" in missing.what
        assert "cert = " in missing.remedy
        foreign = await refusal(url, tls=named(ours, theirs.signs("client")))
        assert "does not accept the client's side" in foreign.what
        assert await health(url, tls=named(ours, ours.signs("client")))


async def test_tls_and_no_tls_mixed_up_is_named(osmem: SearchEngine, ours: Authority) -> None:
    error = await refusal(f"https://127.0.0.1:{osmem.port}", tls=named(ours))
    assert "speaks no TLS" in error.what
    assert "http://" in error.remedy


@pytest.mark.parametrize(
    "login",
    [
        {"user": "feeder", "password": Secret("planted-wrong")},
        {"api_key": Secret("planted-key")},
        {},
    ],
)
async def test_a_wrong_login_is_refused_without_showing_it(
    osmem: SearchEngine, ours: Authority, login: dict[str, Any]
) -> None:
    with fronted(osmem.port, ours.signs("server"), login=BASIC) as port:
        error = await refusal(f"https://localhost:{port}", tls=named(ours), **login)
        assert "401 (security_exception)" in error.what
        assert "api_key" in error.remedy


async def test_an_api_key_is_sent_as_it_is(osmem: SearchEngine, ours: Authority) -> None:
    with fronted(osmem.port, ours.signs("server"), login="ApiKey planted-key") as port:
        assert await health(f"https://localhost:{port}", tls=named(ours), api_key=Secret("planted-key"))


async def test_a_login_in_the_url_is_used_and_hidden(osmem: SearchEngine, ours: Authority) -> None:
    with fronted(osmem.port, ours.signs("server"), login=BASIC) as port:
        assert await health(f"https://feeder:planted-word@localhost:{port}", tls=named(ours))
        await refusal(f"https://feeder:planted-wrong@localhost:{port}", tls=named(ours))


async def test_files_that_hold_no_certificate_are_named(tmp_path: Path, ours: Authority, theirs: Authority) -> None:
    (tmp_path / "no.pem").write_text("planted")
    cert, _ = ours.signs("client")
    for tls in (Tls(ca=str(tmp_path / "no.pem")), Tls(cert=str(tmp_path / "no.pem")), Tls(cert=cert, key=ours.ca)):
        error = await refusal("https://127.0.0.1:9", tls=tls)
        assert (tls.cert or tls.ca) in error.what
    error = await refusal("https://127.0.0.1:9", tls=Tls(cert=cert, key=theirs.signs("client")[1]))
    assert "KEY_VALUES_MISMATCH" in error.what


async def test_a_key_with_a_password_is_refused_and_nobody_is_asked(tmp_path: Path, ours: Authority) -> None:
    cert, key = ours.signs("client")
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:planted", "-out", str(locked)]
    await anyio.run_process(command)
    error = await refusal("https://127.0.0.1:9", tls=Tls(cert=cert, key=str(locked)))
    assert "no password" in error.remedy


async def test_an_engine_that_is_away_behind_tls_is_waited_for(
    nats: NatsServer, osmem: SearchEngine, ours: Authority, proxied: Any
) -> None:
    with fronted(osmem.port, ours.signs("server")) as front:
        proxy = proxied(front)
        async with fed(nats.url, f"https://localhost:{proxy.port}", tls=named(ours)) as log, log.reading():
            await log.posts(1, 10)
            await log.done()
            await proxy.refuse()
            await log.posts(11, 10)
            proxy.accept()
            for _ in range(5):
                await proxy.cut()
                await anyio.sleep(0.2)
            await log.done()
            assert len(await log.documents()) == 20


async def test_a_reader_ends_with_the_remedy(nats: NatsServer, osmem: SearchEngine, ours: Authority) -> None:
    with fronted(osmem.port, ours.signs("server")) as port:
        url = f"https://localhost:{port}"
        async with fed(nats.url, url, with_engine=False) as log:
            await log.posts(1, 1)
            with pytest.raises(ServerRefused, match="not trusted"), anyio.fail_after(20):
                await run_index(log.config, [], log.servers)


def test_everything_may_come_from_files_and_the_environment(tmp_path: Path, ours: Authority) -> None:
    (tmp_path / "word").write_text("planted-word\n")
    (tmp_path / "bridge.toml").write_text(
        '[index.posts]\ntable = "public.posts"\nurl = "https://localhost"\nuser = "feeder"\npassword_file = "word"\n'
    )
    cert, key = ours.signs("client")
    found = configfile.load(
        tmp_path / "bridge.toml",
        {
            "BRIDGE_INDEX__POSTS__TLS__CA": ours.ca,
            "BRIDGE_INDEX__POSTS__TLS__CERT": cert,
            "BRIDGE_INDEX__POSTS__TLS__KEY": key,
        },
    )
    assert found.index["posts"].tls == Tls(ours.ca, cert, key)
    assert str(found.index["posts"].password) == "-".join(["planted", "word"])
    assert "planted" not in repr(found)
