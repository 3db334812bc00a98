"""Which way events are published: "batch" (atomic batches, ADR-50) or "chain" (single messages, each fenced). Pure.

A server that syncs each write pays for every message of a chain, but for a batch only once; any other takes a chain
for less work. Compact mode never splits a key change, which only a batch can promise.

A chain's messages name the id of the one before, which each replica of a stream checks for itself against what it
stored last. One that has just caught up with the others does not know that id (nats-server 2.15): it takes the refusal
for a write error and never writes again. So a replicated stream gets batches, whose sequence the leader alone checks.
"""

from __future__ import annotations

from typing import Literal

from bridge.errors import ConfigError, OtherStream

Publishing = Literal["batch", "chain"]


def choose(
    publish: str, sync: str, mode: str, server_allows_atomic: bool, *, replicas: int = 1
) -> tuple[Publishing, str]:
    """How to publish, and why in a few words.

    Args:
        publish: `[stream] publish`: "auto", "batch" or "chain".
        sync: `[stream] sync`: "always", "replicated" or a duration.
        mode: `[stream] mode`: "log" or "compact".
        server_allows_atomic: whether the stream takes atomic batches (`allow_atomic`, server 2.12 or newer).
        replicas: how many the stream has.

    Raises:
        ConfigError: a chain is asked for on a replicated stream.
        OtherStream: a batch is what must be used, and the stream does not take any.
    """
    if mode == "compact":
        return _batch("compact mode never splits a key change", server_allows_atomic)
    if publish == "batch":
        return _batch('publish = "batch"', server_allows_atomic)
    if publish == "chain" and replicas > 1:
        raise ConfigError(
            f'publish = "chain" on a stream of {replicas} replicas: one that has caught up could not write any more',
            '[stream] publish = "auto" or "batch"',
        )
    if publish == "chain":
        return "chain", 'publish = "chain"'
    if replicas > 1:
        return _batch(f"{replicas} replicas: a chain would stop those that have caught up", server_allows_atomic)
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
