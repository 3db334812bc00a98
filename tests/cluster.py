"""Three nats-servers in one cluster on loopback, each with its own folder, to be killed and cut off one by one.

Every route from one server to another passes a `Proxy` of its own, and so does every client, so that a server can be
taken out of the cluster, with its clients or without them, while all processes live on. Of two servers only the first
makes the route: were both to, each might give up the one that the other keeps, again and again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import msgspec
import nats as nats_client

from bridge.embedded import Keeper, NatsServer, until
from bridge.embedded.nats import find_program, jetstream
from bridge.embedded.process import free_port, throwaway_folder
from bridge.embedded.search import http_get
from tests.proxy import Proxy

MEMBERS = 3


class NatsCluster:
    """The members, numbered from 0.

    urls: where clients connect: at each member's proxy, `fronts`.
    """

    def __init__(
        self,
        servers: list[NatsServer],
        routes: dict[tuple[int, int], Proxy],
        fronts: list[Proxy],
        monitors: list[int],
    ) -> None:
        self.servers = servers
        self._monitors = monitors
        self.fronts = fronts
        self._routes = routes

    @classmethod
    @asynccontextmanager
    async def throwaway(
        cls,
        proxied: Callable[[int], Proxy],
        *,
        sync_interval: str = "2m",
        settings: Mapping[str, str] | None = None,
    ) -> AsyncIterator[NatsCluster]:
        """A running cluster whose members know each other; stopped and deleted at the end."""
        find_program()
        ports = [free_port() for _ in range(MEMBERS)]
        numbers = range(MEMBERS)
        routes = {(here, there): proxied(ports[there]) for here, there in itertools.combinations(numbers, 2)}
        async with contextlib.AsyncExitStack() as stack:
            servers: list[NatsServer] = []
            monitors: list[int] = []
            for number in numbers:
                home = throwaway_folder()
                monitors.append(free_port())
                own = {
                    "server_name": f"n{number}",
                    "http": f'"127.0.0.1:{monitors[number]}"',
                    "jetstream": jetstream(home / "store", sync_interval),
                    "cluster": _cluster(ports[number], [routes[number, other] for other in numbers if other > number]),
                }
                server = NatsServer(home, Keeper(home), home / "store", free_port(), own | dict(settings or {}))
                stack.push_async_callback(server.close)
                servers.append(server)
            async with anyio.create_task_group() as tasks:
                for server in servers:
                    tasks.start_soon(server.start)
            found = cls(servers, routes, [proxied(server.port) for server in servers], monitors)
            for member in numbers:
                await until(partial(found.answers, member), 60, f"JetStream answers at n{member}")
            try:
                yield found
            finally:
                found.report()

    @property
    def urls(self) -> list[str]:
        return [f"nats://127.0.0.1:{front.port}" for front in self.fronts]

    def report(self) -> None:
        """Prints the end of what each server has logged, shown where the test fails."""
        for server in self.servers:
            lines = [line for line in server.log.read_text().splitlines() if "connect to route" not in line]
            print(server.name, "\n".join(lines[-40:]), sep="\n")  # noqa: T201

    async def answers(self, member: int) -> bool:
        """Whether JetStream answers a client of this member: it has a leader that the member can reach."""
        return await self._ask(member, "$JS.API.INFO") is not None

    async def talks_to(self, client: str) -> int:
        """The member that the client of this name is connected to, once there is one."""
        found: list[int] = []

        async def seen() -> bool:
            for member, port in enumerate(self._monitors):
                with contextlib.suppress(OSError):
                    _, body = await http_get("127.0.0.1", port, "/connz")
                    if any(one.get("name") == client for one in json.loads(body)["connections"] or []):
                        found[:] = [member]
            return bool(found)

        await until(seen, 30, f"{client} is connected")
        return found[0]

    async def leader(self, stream: str) -> int:
        """The member that leads a stream, once somebody does."""
        found: list[int] = []

        async def led() -> bool:
            info = await self._info(stream)
            name = info.get("leader", "") if info else ""
            found[:] = [int(name[1:])] if name else []
            return bool(found)

        await until(led, 30, f"{stream} has a leader")
        return found[0]

    async def current(self, stream: str) -> bool:
        """Whether every member has all of a stream."""
        info = await self._info(stream)
        others = info.get("replicas", []) if info else []
        return len(others) == MEMBERS - 1 and all(r["current"] and not r.get("offline") for r in others)

    async def isolate(self, member: int) -> None:
        """Cut one member off from the others; its clients stay."""
        for pair, proxy in self._routes.items():
            if member in pair:
                await proxy.refuse()

    def join(self) -> None:
        """Let every member reach every other one again."""
        for proxy in self._routes.values():
            proxy.accept()

    async def _info(self, stream: str) -> dict[str, Any] | None:
        """The cluster part of a stream's info, as whoever answers sees it."""
        for member in range(MEMBERS):
            found = await self._ask(member, f"$JS.API.STREAM.INFO.{stream}")
            if found is not None:
                return found.get("cluster")
        return None

    async def _ask(self, member: int, subject: str) -> dict[str, Any] | None:
        server = self.servers[member]
        if not server.running:
            return None
        try:
            client = await nats_client.connect(server.url, allow_reconnect=False, connect_timeout=2, error_cb=_ignored)
        except (nats_client.errors.Error, TimeoutError, OSError):
            return None
        try:
            answer = await client.request(subject, b"", timeout=1)
            found: dict[str, Any] = msgspec.json.decode(answer.data)
        except (nats_client.errors.Error, TimeoutError):
            return None
        finally:
            with contextlib.suppress(Exception):
                await client.close()
        return None if "error" in found else found


async def _ignored(_: Exception) -> None:
    """What a question meets is seen in its answer."""


def _cluster(port: int, routes: list[Proxy]) -> str:
    """The value of nats-server.conf's `cluster`. What a server would tell others of its own address leads nowhere, so
    that they take no way but the given routes."""
    # A server of a cluster must have a route, also one that waits for the others to make theirs.
    ports = [route.port for route in routes] or [1]
    given = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
    listen = f'listen: "127.0.0.1:{port}", advertise: "127.0.0.1:1", no_advertise: true'
    return f"{{ name: test, {listen}, routes: [{given}], pool_size: -1 }}"
