"""The package's shape: who may import whom, and which modules do no I/O."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "bridge"
PURE = [
    "source/lsn.py",
    "source/frames.py",
    "source/wal2json.py",
    "source/values.py",
    "source/inverse.py",
    "source/place.py",
    "pipeline/messages.py",
    "pipeline/belonging.py",
    "source/altering.py",
    "source/copied.py",
    "source/leaving.py",
    "source/rows.py",
    "source/pattern.py",
    "source/unreadable.py",
    "event.py",
    "delays.py",
    "operate/http/ready.py",
    "operate/http/view.py",
    "operate/http/metrics.py",
    "stream/subjects.py",
    "stream/batch.py",
    "stream/keyed.py",
    "stream/mode.py",
    "index/document.py",
    "index/circuit.py",
    "index/reason.py",
    "index/mapping.py",
    "index/dropped.py",
    "index/naming.py",
    "index/unchanged.py",
    "index/generation.py",
    "index/dialect.py",
    "index/fieldnames.py",
    "index/convert.py",
    "index/nested.py",
    "index/sample.py",
    "index/sight.py",
    "index/pace.py",
    "pipeline/recover.py",
    "pipeline/compactable.py",
    "pipeline/guarded.py",
    "pipeline/untold.py",
    "pipeline/aligned.py",
    "pipeline/layout.py",
    "pipeline/numbered.py",
    "pipeline/judging.py",
    "pipeline/pace.py",
    "pipeline/shape.py",
    "operate/status/health.py",
    "operate/status/history.py",
    "operate/status/outlook.py",
    "operate/status/parts.py",
    "operate/agreement.py",
    "operate/checks/catalogue.py",
    "operate/checks/finding.py",
    "operate/checks/postgres.py",
    "operate/checks/tables.py",
    "operate/checks/jetstream.py",
    "operate/checks/engines.py",
    "operate/checks/clocks.py",
    "stream/reach.py",
    "stream/refusal.py",
    "stream/answer.py",
]
IO = {"anyio", "asyncio", "socket", "psycopg", "nats", "aiohttp", "elastic_transport", "subprocess", "os", "pathlib"}
JOINS = {
    "pipeline",
    "index/feed.py",
    "index/place.py",
    "index/indexer.py",
    "index/preview.py",
    "index/letters.py",
    "index/rebuild.py",
    "index/plan.py",
    "index/sound.py",
    "index/back.py",
    "index/past.py",
    "index/cancel.py",
    "reindex.py",
    "index/rereading.py",
    "index/verify.py",
    "drop.py",
    "operate",
    "demo",
    "cli.py",
    "commands",
    "replay.py",
}
SIDES = ("source", "stream", "index")


def imports(file: Path) -> set[str]:
    """The modules that a file imports when it is loaded; `from a import b` counts as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def modules() -> list[str]:
    return sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_imports_nothing_that_does_io(name: str) -> None:
    found = imports(PACKAGE / name)
    assert not {module for module in found if module.split(".")[0] in IO}


@pytest.mark.parametrize("side", SIDES)
def test_source_stream_and_index_know_nothing_of_each_other(side: str) -> None:
    others = {f"bridge.{other}" for other in SIDES if other != side}
    offenders = {
        name: sorted(m for m in imports(PACKAGE / name) if m.startswith(tuple(others)))
        for name in modules()
        if name.startswith(f"{side}/") and name not in JOINS
    }
    assert {name: found for name, found in offenders.items() if found} == {}


def test_only_the_joints_import_two_sides() -> None:
    joints = {
        name
        for name in modules()
        if len({m.split(".")[1] for m in imports(PACKAGE / name) if m.startswith("bridge.")} & set(SIDES)) > 1
        and not name.startswith("index/")
    }
    assert {name for name in joints if name.split("/")[0] not in JOINS} == set()


def test_every_module_opens_with_its_contract() -> None:
    bare = [name for name in modules() if not ast.get_docstring(ast.parse((PACKAGE / name).read_text()))]
    assert [name for name in bare if (PACKAGE / name).read_text().strip()] == []
