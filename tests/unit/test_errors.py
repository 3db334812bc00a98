"""Every error of the tree says what, where and what to do next: looked for in the sources, wherever one is made."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from bridge import errors

PACKAGE = Path(__file__).parents[2] / "bridge"
TREES = {file: ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}
CLASSES = {node.name: node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _kinds() -> set[str]:
    """The names of all classes of the tree, also those that modules add for themselves."""
    found = {"BridgeError"}
    while more := {
        name
        for name, node in CLASSES.items()
        if name not in found and {ast.unparse(base).rpartition(".")[2] for base in node.bases} & found
    }:
        found |= more
    return found


KINDS = _kinds()
# These say their remedy themselves.
OWN = {name for name in KINDS - {"BridgeError"} if any("__init__" in ast.unparse(part) for part in CLASSES[name].body)}


def _made() -> list[tuple[str, ast.Call]]:
    return [
        (f"{file.relative_to(PACKAGE)}:{node.lineno}", node)
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in KINDS - OWN
    ]


def test_each_error_has_a_remedy_of_its_own() -> None:
    made = _made()
    assert len(made) > 150
    bare = [where for where, call in made if len(call.args) != 2 or call.keywords]
    assert bare == []
    empty = [where for where, call in made for part in call.args if isinstance(part, ast.Constant) and not part.value]
    assert empty == []


def test_no_error_quotes_another_ones_text() -> None:
    """A library's or a server's words may hold values of rows; what may be shown has been chosen."""
    quoting = {
        where
        for where, call in _made()
        for part in ast.walk(call.args[0])
        if isinstance(part, ast.FormattedValue) and ast.unparse(part.value) in ("error", "str(error)", "repr(error)")
    }
    # TOML's own errors name a place and a rule; OpenSSL's, a file and a rule; of a mask, a column's name.
    assert {where.split(":")[0] for where in quoting} <= {"configfile.py", "stream/login.py", "source/leaving.py"}


@pytest.mark.parametrize("name", sorted(n for n, k in vars(errors).items() if isinstance(k, type)))
def test_the_tree_names_and_describes_each_kind(name: str) -> None:
    kind = getattr(errors, name)
    if issubclass(kind, errors.BridgeError):
        assert name in str(errors.__doc__)
        assert kind.__doc__
        assert kind.exit_code in (errors.EXIT_USAGE, errors.EXIT_CONTRADICTION, errors.EXIT_REFUSED)
