"""The bridge's HTTP side for tests: beside a bridge in this process, at a free port."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from bridge.config import Config, Operate, Secret
from bridge.embedded import free_port
from bridge.operate.around import around
from bridge.operate.http import web
from tests.running import toml

TOKEN = "x" * 8 + "a-token-of-its-own"


def at_free_port(config: Config, **changes: Any) -> Config:
    """The configuration with its HTTP side at a port that nobody has."""
    return msgspec.structs.replace(config, operate=Operate(http=f"127.0.0.1:{free_port()}", **changes))


def with_token(config: Config) -> Config:
    """The same with actions."""
    return at_free_port(config, token=Secret(TOKEN))


@asynccontextmanager
async def serving(config: Config, folder: Path | None = None) -> AsyncIterator[str]:
    """Serves while the block lasts; the url. `folder`: where the configuration is put for commands that the page
    starts."""
    options: list[str] = []
    if folder is not None:
        options = ["--config", str(written(config, folder))]
    async with (
        web.bound(config.operate.http, "http") as sockets,
        around(config, list(config.stream.servers), sockets, options),
    ):
        yield f"http://{config.operate.http}"


def written(config: Config, folder: Path) -> Path:
    """The configuration as a file, with its indexes."""
    file = folder / "bridge.toml"
    file.write_text(toml(config) + _indexes(config))
    return file


def _indexes(config: Config) -> str:
    return "".join(
        f"[index.{name}]\ntable = {json.dumps(index.table)}\nurl = {json.dumps(index.url)}\n"
        f"alias = {json.dumps(index.alias)}\n"
        for name, index in config.index.items()
    )


class Answered(msgspec.Struct):
    """What an HTTP request was answered with."""

    status: int
    text: str
    headers: dict[str, str]


async def asked(url: str, method: str = "GET", **how: Any) -> Answered:
    """One request."""
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
        session.request(method, url, **how) as answer,
    ):
        return Answered(answer.status, await answer.text(), dict(answer.headers))
