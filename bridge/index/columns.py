"""Columns that came after an index was made: added live with their types; what cannot be added asks for a rebuild."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bridge import log
from bridge.index import mapping
from bridge.index.engine import Engine, EngineError
from bridge.index.generation import Generation


async def grow(
    engine: Engine,
    name: str,
    generation: Generation,
    columns: Sequence[mapping.Column],
    documents: list[dict[str, Any]],
) -> dict[str, Any] | None:
    """The generation's mapping with the columns that it lacked; None where it could not or need not grow.

    Args:
        columns: the table's columns as they are recorded now.
        documents: what the engine refused for fields that it does not know; a field without a column is guessed.
    """
    if generation.origin.get("mapping") is not None or generation.shape.transform:
        return None
    shape, known = generation.shape, dict(generation.mapping["properties"])
    today = mapping.fields(columns, keep=shape.columns, exclude=shape.exclude, rename=shape.rename)
    _say_changed(name, sorted(field for field in today.keys() & known.keys() if today[field] != known[field]))
    added = {field: kind for field, kind in today.items() if field not in known}
    for document in documents:
        added |= {f: mapping.guess(v) for f, v in document.items() if f not in known and f not in added}
    if not added:
        # Another bulk has added them meanwhile.
        return generation.mapping if documents else None
    try:
        await engine.json("PUT", f"/{generation.physical}/_mapping", {"properties": added})
    except EngineError as error:
        log.get().warning(
            "columns not added", index=name, columns=sorted(added), why=error.kind, next=f"bridge reindex {name}"
        )
        return None
    log.get().info("columns added", index=name, columns=sorted(added))
    return {**generation.mapping, "properties": {**known, **added}}


def _say_changed(name: str, columns: list[str]) -> None:
    if columns:
        log.get().warning("columns changed their type", index=name, columns=columns, next=f"bridge reindex {name}")
