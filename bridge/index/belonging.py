"""Whether an index was built from the stream that there is now: its mapping's `_meta` says which one that was."""

from __future__ import annotations

from bridge.errors import IndexMismatch
from bridge.index.engine import Engine, EngineError


async def belongs(engine: Engine, name: str, physical: str, stream: str, created: str) -> None:
    """Return where it was. A stream that was made again begins at 1: all its writes would lose against old versions.

    Args:
        name: the index as it is configured.
        created: when the stream was made; that is its identity.

    Raises:
        IndexMismatch: the index is gone, not ours, or built from another stream.
    """
    try:
        meta = await engine.meta(physical)
    except EngineError as error:
        if error.status != 404:
            raise
        meta = {}
    remedy = f"build it anew: bridge reindex {name}"
    if not meta:
        raise IndexMismatch(f"the index {physical} is gone or was not made by the bridge", remedy)
    if meta.get("stream") != stream or meta.get("stream_created") != created:
        raise IndexMismatch(
            f"the index {physical} was built from another stream than today's {stream}, made at {created}", remedy
        )
