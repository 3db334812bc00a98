"""Logins and TLS before a NATS server: what works, and what is said where it does not."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import nkeys  # type: ignore[import-untyped]
import pytest

from bridge.config import Secret, Stream, Tls
from bridge.embedded import NatsServer
from bridge.errors import EXIT_REFUSED, ServerRefused, Unavailable
from bridge.stream import server
from tests.jwts import Key, Operator
from tests.tls import Authority

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


async def connects(url: str, **stream: Any) -> None:
    with anyio.fail_after(20):
        async with server.connect(Stream(servers=[url], **stream), [url]) as broker:
            assert (await broker.api("INFO"))["type"].endswith("account_info_response")


async def answered(url: str, **stream: Any) -> None:
    """What a server says of a certificate may be lost with its connection: the bridge tries again, too."""
    for _ in range(5):
        with contextlib.suppress(Unavailable):
            return await connects(url, **stream)
    return await connects(url, **stream)


async def refusal(url: str, **stream: Any) -> ServerRefused:
    with pytest.raises(ServerRefused) as found:
        await answered(url, **stream)
    assert found.value.exit_code == EXIT_REFUSED
    assert "planted" not in str(found.value).replace("/planted", "")
    return found.value


async def test_an_nkey_logs_in_and_another_does_not(tmp_path: Path) -> None:
    key, other = Key(nkeys.PREFIX_BYTE_USER), Key(nkeys.PREFIX_BYTE_USER)
    for name, text in (("ours", key.seed), ("theirs", f"{other.seed}\n"), ("none", "planted"), ("empty", "")):
        (tmp_path / name).write_text(text)
    (tmp_path / "account").write_text(Key(nkeys.PREFIX_BYTE_ACCOUNT).seed)
    async with NatsServer.throwaway(settings={"authorization": f"{{ users: [{{ nkey: {key.public} }}] }}"}) as nats:
        await connects(nats.url, nkey_seed_file=str(tmp_path / "ours"))
        assert "refuses the login" in (await refusal(nats.url, nkey_seed_file=str(tmp_path / "theirs"))).what
        for name in ("none", "empty", "account"):
            error = await refusal(nats.url, nkey_seed_file=str(tmp_path / name))
            assert (f"{name} holds no nkey seed" in error.what, "begins with SU" in error.remedy) == (True, True)
        assert "cannot be read" in (await refusal(nats.url, nkey_seed_file=str(tmp_path / "gone"))).what


async def test_a_creds_file_logs_in_and_a_broken_one_is_named_at_once(tmp_path: Path) -> None:
    operator = Operator()
    good = operator.credentials(tmp_path / "good.creds").read_text()
    broken = {
        "empty": "",
        "no JWT": good.partition("-----BEGIN USER")[1] + good.partition("-----BEGIN USER")[2],
        "no seed": good.partition("-----BEGIN USER")[0],
        "wrong seed": good.replace("\nSU", "\nSX"),
    }
    async with NatsServer.throwaway(settings=operator.settings) as nats:
        await connects(nats.url, credentials=str(tmp_path / "good.creds"))
        stranger = Operator().credentials(tmp_path / "stranger.creds")
        assert "refuses the login" in (await refusal(nats.url, credentials=str(stranger))).what
        for name, text in broken.items():
            (tmp_path / "broken.creds").write_text(text)
            error = await refusal(nats.url, credentials=str(tmp_path / "broken.creds"))
            assert "holds no JWT with its seed" in error.what, name


async def test_tls_verifies_the_server_and_may_show_a_certificate(ours: Authority, tmp_path: Path) -> None:
    theirs = Authority(tmp_path, "other")
    cert, key = ours.signs("server")
    tls = f'{{ cert_file: "{cert}", key_file: "{key}", ca_file: "{ours.ca}", verify: true }}'
    users = "{ users: [{ user: bridge, password: word }] }"
    async with NatsServer.throwaway(settings={"tls": tls, "authorization": users}) as nats:
        mine, login = ours.signs("client"), {"user": "bridge", "password": Secret("word")}
        for url in (nats.url, nats.url.replace("nats://", "tls://")):
            await connects(url, tls=Tls(ours.ca, *mine), **login)
        wrong = await refusal(nats.url, tls=Tls(ours.ca, *mine), user="bridge", password=Secret("planted"))
        assert "refuses the login" in wrong.what
        assert "certificate" in (await refusal(nats.url, tls=Tls(theirs.ca, *mine), **login)).what.lower()
        foreign = Tls(ours.ca, *theirs.signs("client"))
        assert "TLS" in (await refusal(nats.url, tls=foreign, **login)).what
        assert "TLS" in (await refusal(nats.url, tls=Tls(ours.ca), **login)).what


async def test_a_certificate_for_another_name_is_refused(ours: Authority) -> None:
    cert, key = ours.signs("elsewhere", "DNS:elsewhere")
    async with NatsServer.throwaway(settings={"tls": f'{{ cert_file: "{cert}", key_file: "{key}" }}'}) as nats:
        assert "is not valid for '127.0.0.1'" in (await refusal(nats.url, tls=Tls(ours.ca))).what


async def test_nothing_is_sent_to_a_server_without_the_tls_that_was_asked_for(
    nats: NatsServer, ours: Authority
) -> None:
    login = {"user": "bridge", "password": Secret("planted")}
    for url, tls in ((nats.url, Tls(ours.ca)), (nats.url.replace("nats://", "tls://"), Tls())):
        assert "asks for no TLS" in (await refusal(url, tls=tls, **login)).what
    with overheard() as (port, heard):
        await refusal(f"nats://127.0.0.1:{port}", tls=Tls(ours.ca), **login)
        assert heard == []


async def test_a_server_that_takes_both_is_spoken_to_with_tls(ours: Authority) -> None:
    cert, key = ours.signs("server")
    settings = {"tls": f'{{ cert_file: "{cert}", key_file: "{key}" }}', "allow_non_tls": "true"}
    async with (
        NatsServer.throwaway(settings=settings) as nats,
        server.connect(Stream(servers=[nats.url], tls=Tls(ours.ca)), [nats.url]) as broker,
    ):
        transport: Any = broker.nc._transport
        assert transport._io_writer.get_extra_info("ssl_object") is not None
        await broker.api("INFO")


@contextmanager
def overheard() -> Iterator[tuple[int, list[bytes]]]:
    """Somebody in between who says that there is no TLS, and hears what comes."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def work() -> None:
            taken, _ = listening.accept()
            with taken:
                taken.sendall(b'INFO {"server_id":"x","version":"2.15.1","max_payload":1048576}\r\n')
                if data := taken.recv(1000):
                    heard.append(data)

        thread = threading.Thread(target=work)
        thread.start()
        yield listening.getsockname()[1], heard
        thread.join(10)
