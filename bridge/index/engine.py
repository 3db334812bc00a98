"""The search engine's HTTP interface: Elasticsearch and OpenSearch alike; the only module that talks to one.

Bodies go out as they are given and answers come back as bytes that are decoded where they are needed. Errors have three
kinds: away (`Unavailable`: no connection, 429, 5xx, a blocked index; `patiently` waits and tries again for ever),
refused (`ServerRefused`: TLS, credentials and privileges) and everything else (`EngineError`, for the caller to judge).
Reasons never leave here as the engine words them: they quote values of the document; reason.py keeps what is known.
An answer that is cut off, is not what was asked for, or comes from a part of the shards counts as none.

Not used, because some engines lack them: `_reindex`, `_update_by_query`, `_delete_by_query`, scripts. `GET /` only
where another way to ask is there, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import quote

import anyio
import elastic_transport
import msgspec
from elastic_transport import client_utils

from bridge.config import Index, hide
from bridge.errors import BridgeError, ServerRefused, Unavailable
from bridge.index import dialect, mapping, secure
from bridge.index.naming import UNREADABLE, address, parts
from bridge.index.reason import GONE, Problem, blocked, chain, scrub
from bridge.waiting import Backoff

T = TypeVar("T")

TIMEOUT = 60.0
ROLE = "give the role of `user` or `api_key` in [index.NAME] what docs/indexes.md calls the least that the role needs"
DENIED = {
    401: (
        "the login is wrong, or there is none",
        "correct `user` and `password`, or `api_key`, in [index.NAME] (or the files that `password_file` and"
        " `api_key_file` name)",
    ),
    403: ("the login's role lacks that privilege", ROLE),
}


class EngineError(BridgeError):
    """The engine refused a request: `status` and `kind` are its own, the message holds no row value.

    `words` are the engine's own for the innermost cause: to be shown only where no row was sent.
    """

    def __init__(self, status: int, kind: str, what: str, words: str = "") -> None:
        super().__init__(what, "see the engine's log")
        self.status = status
        self.kind = kind
        self.words = words


class NoAnswer(Unavailable):
    """There was no answer at all: the engine is away for every request alike."""


class Item(msgspec.Struct, frozen=True):
    """What became of one operation of a bulk."""

    status: int
    result: str = ""
    error: Problem | None = None
    index: str = msgspec.field(name="_index", default="")


class _Bulk(msgspec.Struct):
    items: list[dict[str, Item]]


class Found(msgspec.Struct, frozen=True):
    """One document as `_mget` gives it, its source as raw bytes."""

    id: str = msgspec.field(name="_id")
    found: bool = False
    version: int = msgspec.field(name="_version", default=0)
    routing: str = msgspec.field(name="_routing", default="")
    source: msgspec.Raw = msgspec.field(name="_source", default=msgspec.Raw())
    error: Problem | None = None


class _Found(msgspec.Struct):
    docs: list[Found]


class Hit(msgspec.Struct, frozen=True):
    """One search hit, its source as raw bytes where that was asked for; `sort` is what `search_after` takes."""

    id: str = msgspec.field(name="_id")
    routing: str = msgspec.field(name="_routing", default="")
    sort: list[Any] = []
    source: msgspec.Raw = msgspec.field(name="_source", default=msgspec.Raw())

    @property
    def address(self) -> str:
        """The document's address."""
        return address(self.id, self.routing)


class _Hits(msgspec.Struct):
    hits: list[Hit]


class _Shards(msgspec.Struct):
    failed: int = 0


class _Search(msgspec.Struct):
    hits: _Hits
    timed_out: bool = False
    shards: _Shards = msgspec.field(name="_shards", default_factory=_Shards)


class _Count(msgspec.Struct):
    count: int = 0
    shards: _Shards = msgspec.field(name="_shards", default_factory=_Shards)


class _Meta(msgspec.Struct):
    meta: dict[str, Any] = msgspec.field(name="_meta", default_factory=dict)


class _Told(msgspec.Struct):
    uuid: str = ""


class _Settings(msgspec.Struct):
    index: _Told = msgspec.field(default_factory=_Told)


class _Index(msgspec.Struct):
    aliases: dict[str, Any] = {}
    mappings: _Meta = msgspec.field(default_factory=_Meta)
    settings: _Settings = msgspec.field(default_factory=_Settings)


class _Refusal(msgspec.Struct):
    error: Problem | str = ""


class _Bytes(elastic_transport.Serializer):
    """Leaves bodies and answers alone."""

    def loads(self, data: bytes) -> Any:
        return data

    def dumps(self, data: Any) -> bytes:
        return bytes(data)


_bulk_answer = msgspec.json.Decoder(_Bulk)
_mget_answer = msgspec.json.Decoder(_Found)
_search_answer = msgspec.json.Decoder(_Search)
_count_answer = msgspec.json.Decoder(_Count)
_index_answer = msgspec.json.Decoder(dict[str, _Index])
_any_answer = msgspec.json.Decoder(dict[str, Any])


class Engine:
    """A client for one index's servers. Make it with `opened`."""

    def __init__(
        self,
        transport: elastic_transport.AsyncTransport,
        where: str,
        nodes: list[elastic_transport.NodeConfig],
    ) -> None:
        self._transport = transport
        self._nodes = nodes
        self.where = where
        self._backoff = Backoff(f"search engine at {where}")

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        lines: bool = False,
        seconds: float = TIMEOUT,
        index: str = "",
    ) -> bytes:
        """The answer's body.

        Args:
            body: bytes as they are, or anything that JSON can hold.
            lines: the body is newline-delimited JSON.
            index: which one it is about, where the path does not say so.

        Raises:
            Unavailable: no connection, too busy, out of order, or the index is blocked at the moment.
            ServerRefused: credentials or privileges.
            EngineError: any other answer that is not a success.
        """
        data = body if isinstance(body, bytes) or body is None else msgspec.json.encode(body)
        headers = {"accept": "application/json"}
        if data is not None:
            headers["content-type"] = "application/x-ndjson" if lines else "application/json"
        try:
            with anyio.fail_after(seconds + 1):
                answer = await self._transport.perform_request(
                    method, path, body=data, headers=headers, request_timeout=seconds
                )
        except (elastic_transport.TransportError, OSError, TimeoutError) as error:
            await self._objections()
            slow = isinstance(error, (elastic_transport.ConnectionTimeout, TimeoutError))
            how = f"does not answer within {seconds:g} s" if slow else "cannot be reached"
            raise NoAnswer(f"the search engine at {self.where} {how}", "waiting for it") from None
        content: bytes = answer.body or b""
        if answer.meta.status >= 300:
            raise self._refusal(answer.meta.status, content, f"{method} {path.split('?')[0]}", index)
        return content

    async def _objections(self) -> None:
        """Raise where it is TLS that fails: that does not pass by itself."""
        for node in self._nodes:
            if node.ssl_context is not None:
                refusal = await secure.objection(node.host, node.port, node.ssl_context, self.where)
                if refusal is not None:
                    raise refusal

    def _refusal(self, status: int, content: bytes, what: str, index: str = "") -> BridgeError:
        try:
            error = msgspec.json.decode(content, type=_Refusal).error
        except UNREADABLE:
            error = ""
        problem = error if isinstance(error, Problem) else Problem()
        reason = scrub(problem)
        named = what.split("/")[1]
        # A call over several indexes does not say here which one it is.
        block = blocked(problem, index or ("INDEX" if named.startswith("_") else named))
        if block is not None:
            return Unavailable(f"the search engine at {self.where} refuses {what}: {block[0]}", block[1])
        if status == 429 or status >= 500:
            return Unavailable(
                f"the search engine at {self.where} answers {what} with {status} ({reason})", "trying again"
            )
        if status in (401, 403):
            why, remedy = DENIED[status]
            return ServerRefused(
                f"the search engine at {self.where} refuses {what} with {status} ({reason}): {why}", remedy
            )
        words = [cause.reason or "" for cause in chain(problem)]
        return EngineError(
            status, problem.type, f"the search engine at {self.where} refuses {what} with {status}: {reason}", words[-1]
        )

    def _torn(self, what: str) -> Unavailable:
        return Unavailable(f"the search engine at {self.where} gives {what}", "trying again")

    def _read(self, decoder: msgspec.json.Decoder[T], content: bytes) -> T:
        """An answer as what it must be; one that is not whole or not the engine's is as good as none."""
        try:
            return decoder.decode(content)
        except UNREADABLE:
            raise self._torn("an answer that is cut off or not an engine's") from None

    async def patiently(
        self,
        action: Callable[[], Awaitable[T]],
        backoff: Backoff | None = None,
        *,
        before: Callable[[], None] = lambda: None,
    ) -> T:
        """The result of `action`, tried again for ever while the engine is away; that is said once.

        Args:
            backoff: the pauses of what may be away while the engine is there; the caller says when it is over.
            before: called before each try; what it raises ends them.
        """
        while True:
            before()
            try:
                result = await action()
            except Unavailable as error:
                await (self._backoff if backoff is None or isinstance(error, NoAnswer) else backoff).wait(error)
            else:
                self._backoff.over()
                return result

    async def _get(
        self, decoder: msgspec.json.Decoder[T], method: str, path: str, body: Any = None, *, seconds: float = TIMEOUT
    ) -> T:
        """The answer read by `decoder`; waits for the engine, and for all of the shards."""

        async def attempt() -> T:
            found = self._read(decoder, await self.ask(method, path, body, seconds=seconds))
            if isinstance(found, _Search | _Count) and (found.shards.failed or getattr(found, "timed_out", False)):
                raise self._torn(f"an answer of a part of the shards to {method} {path.split('?')[0]}")
            return found

        return await self.patiently(attempt)

    async def json(self, method: str, path: str, body: Any = None, *, seconds: float = TIMEOUT) -> dict[str, Any]:
        """The decoded answer, an object; waits for the engine."""
        return await self._get(_any_answer, method, path, body, seconds=seconds)

    async def bulk(self, alias: str, body: bytes, count: int) -> list[Item]:
        """What became of each of `count` operations, sent through a write alias that must exist; one try.

        Raises:
            Unavailable: as `ask`, or the answer is not one for each operation.
        """
        path = (
            f"/{quote(alias)}/_bulk?require_alias=true"
            "&filter_path=errors,items.*.status,items.*.result,items.*.error,items.*._index"
        )
        answer = self._read(_bulk_answer, await self.ask("POST", path, body, lines=True))
        if len(answer.items) != count or not all(answer.items):
            raise self._torn(f"{len(answer.items)} answers to {count} operations")
        return [next(iter(item.values())) for item in answer.items]

    async def mget(self, alias: str, addresses: list[str]) -> dict[str, Found]:
        """The documents that are there, by address; sees what was written a moment ago."""
        path = f"/{quote(alias)}/_mget"
        wanted = [parts(one) for one in addresses]
        body = {"docs": [{"_id": i, "routing": r} if r else {"_id": i} for i, r in wanted]}

        async def attempt() -> list[Found]:
            docs = self._read(_mget_answer, await self.ask("POST", path, body)).docs
            for doc in docs:
                # Where the index is gone the next write says so.
                if doc.error is not None and doc.error.type not in GONE:
                    raise self._torn(f"no answer for some documents ({scrub(doc.error)})")
            return docs

        return {address(doc.id, doc.routing): doc for doc in await self.patiently(attempt) if doc.found}

    async def search(self, alias: str, body: dict[str, Any]) -> list[Hit]:
        """The hits of a search in all of the shards."""
        path = f"/{quote(alias)}/_search?allow_partial_search_results=false"
        return (await self._get(_search_answer, "POST", path, body)).hits.hits

    async def refresh(self, index: str) -> None:
        """Make everything written so far visible to searches."""
        await self._get(_count_answer, "POST", f"/{quote(index)}/_refresh")

    async def count(self, index: str) -> int:
        """How many documents searches see."""
        return (await self._get(_count_answer, "GET", f"/{quote(index)}/_count")).count

    async def exists(self, name: str) -> bool:
        """Whether there is an index or alias of that name."""
        try:
            await self.json("GET", f"/{quote(name)}/_settings")
        except EngineError as error:
            if error.status == 404:
                return False
            raise
        return True

    async def indexes(self, pattern: str) -> dict[str, list[str]]:
        """The indexes that match a pattern (or hold that alias), each with its aliases."""
        found = await self._there(f"/{quote(pattern, safe='*')}/_alias")
        return {name: list(entry.aliases) for name, entry in found.items()}

    async def meta(self, index: str) -> dict[str, Any]:
        """The `_meta` part of an index's mapping; empty where there is no such index."""
        found = await self._there(f"/{quote(index)}/_mapping")
        return next(iter(found.values())).mappings.meta if found else {}

    async def uuid(self, index: str) -> str:
        """The id that an index got when it was made: a restored or remade one has another. Empty: not told."""
        found = await self._get(_index_answer, "GET", f"/{quote(index)}/_settings")
        return next(iter(found.values())).settings.index.uuid if found else ""

    async def _there(self, path: str) -> dict[str, _Index]:
        """What the engine says of indexes by their names; nothing where there are none."""
        try:
            return await self._get(_index_answer, "GET", path)
        except EngineError as error:
            if error.status == 404:
                return {}
            raise

    async def alias(self, index: str, alias: str) -> None:
        """Put an alias on an index, whatever else it is on."""
        await self.json("POST", "/_aliases", {"actions": [{"add": {"index": index, "alias": alias}}]})

    async def product(self) -> dialect.Product:
        """Which engine this is; one that does not tell (or not this role) is unknown."""
        return dialect.recognized(await self._told("/"), await self._told("/_nodes/_local"))

    async def template_settings(self, index: str) -> dict[str, Any]:
        """The settings that index templates give to a new index of that name; only those of `mapping.RESTORED`."""
        found = await self._told(f"/_index_template/_simulate_index/{quote(index)}", method="POST")
        return mapping.inherited(found or await self._told("/_template"), index)

    async def _told(self, path: str, method: str = "GET") -> dict[str, Any]:
        """The answer to a question that some engines and roles refuse; empty there."""
        try:
            return await self.json(method, path)
        except (EngineError, ServerRefused):
            return {}

    async def create(self, index: str, body: dict[str, Any]) -> None:
        """Make an index."""
        await self.json("PUT", f"/{quote(index)}", body)

    async def delete(self, index: str) -> None:
        """Remove an index; nothing happens where there is none."""
        try:
            await self.json("DELETE", f"/{quote(index)}")
        except EngineError as error:
            if error.status != 404:
                raise


@contextlib.asynccontextmanager
async def opened(config: Index) -> AsyncIterator[Engine]:
    """A client for the servers of `config`, closed at the end; connects when it is first used.

    Raises:
        ServerRefused: a url or a TLS file that cannot be used.
    """
    headers: dict[str, str] = {}
    if config.api_key:
        headers["authorization"] = f"ApiKey {config.api_key}"
    elif config.user:
        headers["authorization"] = client_utils.basic_auth_to_header((config.user, str(config.password)))
    made = secure.context(config.tls) if any(url.startswith("https:") for url in config.url) else None
    nodes = []
    for url in config.url:
        try:
            node = client_utils.url_to_node_config(url, use_default_ports_for_scheme=True)
        except ValueError:
            raise ServerRefused(f"{hide(url)} is not a url of a search engine", "correct `url` of the index") from None
        context = made if node.scheme == "https" else None
        nodes.append(node.replace(headers={**node.headers, **headers}, request_timeout=TIMEOUT, ssl_context=context))
    raw = _Bytes()
    transport = elastic_transport.AsyncTransport(
        nodes,
        serializers={"application/json": raw, "application/x-ndjson": raw, "text/*": raw, "application/*": raw},
        max_retries=len(nodes) - 1,
        retry_on_status=(),
        meta_header=False,
    )
    try:
        yield Engine(transport, ", ".join(hide(url) for url in config.url), nodes)
    finally:
        with anyio.CancelScope(shield=True):
            await transport.close()
