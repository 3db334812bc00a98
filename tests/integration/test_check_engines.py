"""What `bridge check` finds of search engines and indexes, on each of them, and that its remedies mend it."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Literal

import anyio
import msgspec
import pytest

from bridge.config import Secret, Tls
from bridge.embedded import NatsServer, SearchEngine, free_port, until
from bridge.errors import ServerRefused
from bridge.operate.check import check
from bridge.operate.checks.finding import Finding
from bridge.operate.show.status import page
from bridge.operate.status import parts
from bridge.operate.status.collect import collect
from bridge.operate.status.live import Live
from bridge.stream.subjects import index_key
from tests.denying import denying, one_page, telling_nothing
from tests.integration.feeding import Log, fed
from tests.serving import at_free_port, serving
from tests.tls import Authority, fronted

pytestmark = pytest.mark.anyio


async def found(log: Log) -> dict[str, Finding]:
    """Everything about the engine that is not quite right, by id, but for the disk of the tests' machine."""
    # Whether a replica has a node is the engine's affair, too: a template may want one.
    spared = {"engine.disk", "engine.health"}
    every = (await check(log.config, log.servers)).found
    return {one.id: one for one in every if one.id.startswith(("engine.", "clocks.")) and one.id not in spared}


async def test_an_index_and_what_can_be_wrong_with_it(log: Log) -> None:
    await log.posts(1, 3)
    before = await check(log.config, log.servers)
    assert "not built yet" in {one.id: one.what for one in before.findings}["engine.alias"]
    async with log.reading():
        await log.done()
    assert await found(log) == {}
    every = {one.id: one.what for one in (await check(log.config, log.servers)).findings}
    physical = f"{log.name}-000001"
    assert every["engine.alias"] == f"{log.name} is {physical}"
    assert re.match("OpenSearch|Elasticsearch", every["engine.product"])
    assert {"engine.reachable", "clocks.engine", "engine.privileges"} <= every.keys()

    await log.engine.json("PUT", f"/{log.name}/_settings", {"index.blocks.read_only_allow_delete": True})
    block = (await found(log))["engine.block"]
    remedy = re.search(r"PUT (/\S+) (\{.*\})", block.next)
    assert remedy is not None
    await log.engine.json("PUT", remedy[1], json.loads(remedy[2]))
    assert "engine.block" not in await found(log)

    await log.engine.json("PUT", f"/{log.name}-other", {})
    await log.engine.alias(f"{log.name}-other", log.name)
    assert f"is on {physical}, {log.name}-other" in (await found(log))["engine.alias"].what
    await log.engine.delete(f"{log.name}-other")
    assert "engine.alias" not in await found(log)

    forgotten = f"{log.name}-000002"
    await log.engine.json("PUT", f"/{forgotten}", {})
    left = (await found(log))["engine.leftover"]
    delete = f"curl -X DELETE {log.engine.where}/{forgotten}"
    assert (forgotten in left.what, left.level, left.next.endswith(delete)) == (True, "warning", True)
    assert "no bridge has made it" in left.what
    await log.engine.delete(forgotten)
    assert "engine.leftover" not in await found(log)

    log.with_index(exclude=["body"], transform="no.such:thing")
    now = await found(log)
    assert ("exclude" in now["engine.config"].what, now["engine.config"].level) == (True, "warning")
    assert "ModuleNotFoundError" in now["engine.transform"].what
    log.with_index(exclude=[], transform="")
    await log.engine.delete(physical)
    now = await found(log)
    assert (list(now), now["engine.alias"].next) == (["engine.alias"], f"bridge reindex {log.name}")


async def test_a_generation_that_the_bucket_has_forgotten_is_left_over_and_nothing_else(quick: Log) -> None:
    await quick.posts(1, 3)
    first, second = await quick.rebuild(keep_old=True), await quick.rebuild(keep_old=True)
    record = await quick.record()
    key = index_key(quick.config.source.name, quick.name)
    await quick.state.put(key, record.of([one for one in record.generations if one.number == second.generation]))
    # One node cannot place a replica: of an index that nobody uses nobody need hear.
    await quick.engine.json("PUT", f"/{first.physical}/_settings", {"index.number_of_replicas": 1})
    await quick.engine.json("PUT", f"/{first.physical}/_settings", {"index.blocks.write": True})
    every = [one for one in (await check(quick.config, quick.servers)).found if first.physical in str(one)]
    assert [(one.id, one.level) for one in every] == [("engine.leftover", "warning")]
    assert f"{first.physical} is an earlier generation, which the state bucket has forgotten" in every[0].what
    assert "no other harm" in every[0].why


async def test_an_index_that_was_built_from_another_stream_is_an_error_with_its_remedy(quick: Log) -> None:
    await quick.posts(1, 3)
    made = await quick.rebuild()
    record = await quick.record()
    older = record.having_changed(made.generation, stream_created="2026-01-31T12:00:00Z")
    await quick.state.put(index_key(quick.config.source.name, quick.name), older)
    [wrong] = [one for one in (await check(quick.config, quick.servers)).of("error") if one.id.startswith("engine.")]
    assert (wrong.id, wrong.next) == ("engine.alias", f"build it anew: bridge reindex {quick.name}")
    assert "was built from another stream" in wrong.what
    found = await collect(quick.config, quick.servers)
    of_index = [(one.what, one.next) for one in found.findings if made.physical in one.what or "reader" in one.what]
    what = f"{made.physical} was built from another stream than today's, and is as it was then"
    assert of_index == [(what, f"build it anew: bridge reindex {quick.name}")]
    page(found, shown := io.StringIO())
    assert f"{quick.name}: of another stream, no reader" in shown.getvalue()


async def test_an_index_that_has_the_alias_name_is_named(quick: Log) -> None:
    await quick.engine.json("PUT", f"/{quick.name}", {})
    taken = (await found(quick))["engine.alias"]
    assert ("not an alias" in taken.what, "--replace-index" in taken.next) == (True, True)


async def test_a_wrong_login_is_named_and_its_password_is_not(
    nats: NatsServer, osmem: SearchEngine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ours = Authority(tmp_path_factory.mktemp("tls"))
    login = "Basic " + base64.b64encode(b"feeder:planted-word").decode()
    tls = Tls(ca=ours.ca)
    with fronted(osmem.port, ours.signs("server"), login=login) as port:
        url = f"https://localhost:{port}"
        async with fed(nats.url, url, user="feeder", password=Secret("planted-word"), tls=tls) as log:
            assert await found(log) == {}
            log.with_index(password=Secret("planted-wrong"))
            every = await check(log.config, log.servers)
            refused = [one for one in every.of("error") if one.id == "engine.reachable"]
            assert ["401" in one.what for one in refused] == [True]
            assert "password" in refused[0].next
            assert "planted" not in str(msgspec.to_builtins(every))
            log.with_index(password=Secret("planted-word"))


@pytest.mark.parametrize(
    ("status", "finding", "why", "remedy"),
    [
        (401, "engine.reachable", "the login is wrong", "`api_key`, in [index.NAME]"),
        (403, "engine.privileges", "the role may not", "The least that the role needs"),
    ],
)
async def test_an_engine_that_lets_nobody_in_is_no_engine_that_is_away(
    quick: Log, status: Literal[401, 403], finding: str, why: str, remedy: str
) -> None:
    there = quick.config.index[quick.name].url
    with denying(status) as url:
        quick.with_index(url=[url], api_key=Secret("planted-key"))
        one = (await found(quick))[finding]
        assert (one.level, why in one.what, remedy in one.next) == ("error", True, True), one
        with pytest.raises(ServerRefused) as ended, anyio.fail_after(20):
            await quick.rebuild()
        told = [f for f in (await collect(quick.config, quick.servers)).findings if "search engine" in f.what]
        live = Live(quick.config, quick.servers)
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(live.run)
                # On a busy machine an answer may come after a look.
                again, look = list[parts.Finding](), 0
                while not again or again[0].next != ended.value.remedy:
                    look = await live.next(look)
                    assert live.latest is not None
                    again = [f for f in live.latest.findings if "search engine" in f.what]
                tasks.cancel_scope.cancel()
        quick.with_index(url=there, api_key=Secret(""))
    said = ended.value
    assert f"with {status} (security_exception): the login" in said.what
    assert ("api_key" in said.remedy, "[index.NAME]" in said.remedy) == (True, True)
    assert [(f.level, f.next) for f in told] == [(f.level, f.next) for f in again] == [("problem", said.remedy)]
    assert f"with {status}" in told[0].what
    assert "planted" not in str([one, said.what, said.remedy, told])


@asynccontextmanager
async def files(folder: Path) -> AsyncIterator[str]:
    """Python's own server of files."""
    port = free_port()
    called = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    async with await anyio.open_process(called, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:

            async def listens() -> bool:
                try:
                    await (await anyio.connect_tcp("127.0.0.1", port)).aclose()
                except OSError:
                    return False
                return True

            await until(listens, 30, "http.server")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.mark.parametrize("kind", ["files", "bridge", "page", "moved", "nothing"])
async def test_what_speaks_http_and_is_no_engine_is_said_to_be_none(quick: Log, kind: str, tmp_path: Path) -> None:
    await quick.posts(1, 3)
    await quick.rebuild()
    there = quick.config.index[quick.name].url
    async with AsyncExitStack() as stack:
        if kind == "files":
            url = await stack.enter_async_context(files(tmp_path))
        elif kind == "bridge":
            url = await stack.enter_async_context(serving(at_free_port(quick.config)))
        else:
            status = {"page": 200, "moved": 301, "nothing": 404}[kind]
            url = stack.enter_context(one_page(status))
        quick.with_index(url=[url], transform="no.such:thing")
        every = [one for one in (await check(quick.config, quick.servers)).findings if quick.name in one.about]
        quick.with_index(url=there, transform="")
    assert [(one.id, one.level, one.what, one.next) for one in every] == [
        (
            "engine.reachable",
            "error",
            "what answers there is no Elasticsearch or OpenSearch",
            "correct `url` of the index",
        )
    ]
    assert url in every[0].about
    assert await found(quick) == {}


async def test_a_page_in_place_of_an_engines_answer_is_a_finding(quick: Log) -> None:
    there = quick.config.index[quick.name].url
    with one_page(200, root=True) as url:
        quick.with_index(url=[url])
        every = [one for one in (await check(quick.config, quick.servers)).findings if quick.name in one.about]
        quick.with_index(url=there)
    assert [(one.id, one.level, one.what, one.next) for one in every] == [
        (
            "engine.reachable",
            "error",
            f"the answer to GET /{quick.name}-*/_alias is cut off or not an engine's",
            "correct `url` of the index, or look at the proxy on the way",
        )
    ]


async def test_an_engine_that_tells_a_role_of_nothing_but_its_indexes_is_one(quick: Log) -> None:
    await quick.posts(1, 3)
    await quick.rebuild()
    there = quick.config.index[quick.name].url
    with telling_nothing(there[0]) as url:
        quick.with_index(url=[url])
        every = await found(quick)
        quick.with_index(url=there)
    assert {id: one.what for id, one in every.items()} == {"engine.product": "the engine does not tell what it is"}
