"""The log events in the sources: their names, and the levels that they are logged with."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "bridge"
LEVELS = ("debug", "info", "warning", "error")


def events() -> dict[str, set[str]]:
    """Every event's name and levels. A name that is no constant is the union of what it can be, where that is a choice
    of constants; anything else is an error, for who reads logs by names has to know them all."""
    found: dict[str, set[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        if "demo" in file.parts:
            continue
        for level, name in _calls(ast.parse(file.read_text()), file):
            found.setdefault(name, set()).add(level)
    return found


def _calls(tree: ast.Module, file: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS):
            continue
        if not ast.unparse(node.func.value).endswith(("log", "log.get()", "log.get(**names)")):
            continue
        for name in _constants(node.args[0]):
            assert name, f"{file}:{node.lineno} logs an event whose name is no constant"
            yield node.func.attr, name


def _constants(node: ast.expr) -> list[str]:
    if isinstance(node, ast.IfExp):
        return [*_constants(node.body), *_constants(node.orelse)]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else [""]
