"""`python bench/stub.py PORT`: a search engine that takes every bulk at once and keeps none of it.

It answers what an index reader and a rebuild ask for (indexes, aliases, mappings, counts, bulks), so that what they
cost can be measured without an engine. Bulks may hold `index` operations only: two lines each.
"""

from __future__ import annotations

import asyncio
import fnmatch
import functools
import json
import sys
from http import HTTPStatus
from typing import Any

import uvloop

LIMIT = 32 << 20
CREATED = b'{"index":{"_index":"%s","result":"created","status":201}}'


class Stub:
    """The indexes that were made: name → settings, mappings, aliases, and how many documents each was sent."""

    def __init__(self) -> None:
        self.indexes: dict[str, dict[str, Any]] = {}
        self.counts: dict[str, int] = {}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body."""
        target, *rest = path.partition("?")[0].strip("/").split("/")
        what = rest[0] if rest else ""
        if what == "_bulk":
            return self._bulk(target, body)
        status, found = self._other(method, target, what, json.loads(body) if body else {})
        return status, json.dumps(found).encode()

    def _bulk(self, alias: str, body: bytes) -> tuple[int, bytes]:
        index = next(iter(self._matching(alias)), None)
        if index is None:
            return 404, b'{"error":{"type":"index_not_found_exception"},"status":404}'
        count = body.count(b"\n") // 2
        self.counts[index] += count
        return 200, _created(index.encode(), count)

    def _other(self, method: str, target: str, what: str, body: dict[str, Any]) -> tuple[int, Any]:
        if target == "_cluster":
            return 200, {"status": "green", "number_of_data_nodes": 1}
        if target == "_aliases":
            for action in body["actions"]:
                self._act(*next(iter(action.items())))
            return 200, {"acknowledged": True}
        if method == "PUT" and not what:
            self.indexes[target] = {"settings": {}, "mappings": {}, "aliases": {}, **body}
            self.counts[target] = 0
            return 200, {"acknowledged": True}
        matching = self._matching(target)
        if not matching:
            return 404, {"error": {"type": "index_not_found_exception"}, "status": 404}
        if method == "DELETE":
            for index in matching:
                del self.indexes[index], self.counts[index]
            return 200, {"acknowledged": True}
        if method == "PUT":
            return 200, {"acknowledged": True}
        if what == "_count":
            return 200, {"count": sum(self.counts[index] for index in matching)}
        if what == "_search":
            return 200, {"hits": {"hits": []}}
        part = {"_alias": "aliases", "_mapping": "mappings", "_settings": "settings"}.get(what)
        return 200, {index: {part: self.indexes[index][part]} for index in matching} if part else {}

    def _act(self, kind: str, action: dict[str, str]) -> None:
        if kind == "remove_index":
            del self.indexes[action["index"]], self.counts[action["index"]]
        elif kind == "remove":
            self.indexes[action["index"]]["aliases"].pop(action["alias"], None)
        else:
            self.indexes[action["index"]]["aliases"][action["alias"]] = {}

    def _matching(self, target: str) -> list[str]:
        return [n for n, found in self.indexes.items() if fnmatch.fnmatch(n, target) or target in found["aliases"]]


@functools.lru_cache
def _created(index: bytes, count: int) -> bytes:
    return b'{"errors":false,"items":[%s]}' % b",".join([CREATED % index] * count)


async def serve(port: int) -> None:
    """Answer on a port of the loopback address for ever."""
    stub = Stub()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await _exchange(stub, reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", port, limit=LIMIT)
    async with server:
        await server.serve_forever()


async def _exchange(stub: Stub, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """One request and its answer; whether the connection stays."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, path, protocol = head[0].split(" ")
    length = next((int(line.split(":")[1]) for line in head if line.lower().startswith("content-length:")), 0)
    status, body = stub.answer(method, path, await reader.readexactly(length))
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    await writer.drain()
    return protocol == "HTTP/1.1"


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
