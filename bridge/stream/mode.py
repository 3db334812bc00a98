"""Which way events are published: "batch" (atomic batches, ADR-50) or "chain" (single messages, each fenced). Pure.

A server that syncs each write pays for every message of a chain, but for a batch only once; any other takes a chain
for less work. Compact mode never splits a key change, which only a batch can promise.
"""

from __future__ import annotations

from typing import Literal

from bridge.errors import OtherStream

Publishing = Literal["batch", "chain"]


def choose(publish: str, sync: str, mode: str, server_allows_atomic: bool) -> tuple[Publishing, str]:
    """How to publish, and why in a few words.

    Args:
        publish: `[stream] publish`: "auto", "batch" or "chain".
        sync: `[stream] sync`: "always", "replicated" or a duration.
        mode: `[stream] mode`: "log" or "compact".
        server_allows_atomic: whether the stream takes atomic batches (`allow_atomic`, server 2.12 or newer).

    Raises:
        OtherStream: a batch is what must be used, and the stream does not take any.
    """
    if mode == "compact":
        return _batch("compact mode never splits a key change", server_allows_atomic)
    if publish == "batch":
        return _batch('publish = "batch"', server_allows_atomic)
    if publish == "chain":
        return "chain", 'publish = "chain"'
    if sync == "always":
        if server_allows_atomic:
            return "batch", 'sync = "always": the server syncs a batch once, a chain for every message'
        return "chain", "the stream does not allow atomic batches"
    return "chain", f'sync = "{sync}": the server does not sync each message, so that a chain costs it less'


def _batch(why: str, allowed: bool) -> tuple[Publishing, str]:
    if not allowed:
        raise OtherStream(
            f"the stream does not allow atomic batches, and must: {why}",
            "allow them: nats stream edit STREAM --allow-batch",
        )
    return "batch", why
