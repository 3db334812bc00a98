"""The text archive: docstrings of the Python standard library as messages that were posted to lists.

Every machine has it, it is real text by many hands, and it has threads: a class answers its module, a method its class.
`gather` reads sources and runs none of them; `load` fills the tables.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import random
import re
import sysconfig
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import psycopg

from bridge.errors import ServerMissing

_SKIPPED = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "site-packages", "dist-packages", "__pycache__"}
)
_FIRST_POST = datetime(1991, 2, 20, 12, 0, tzinfo=UTC)
_DIGEST_EVERY = 250
_DIGEST_PARTS = 150
_FEWEST = 50
_ENOUGH = 500
_FEW = 3

SCHEMA = """
CREATE TABLE lists (
    id integer PRIMARY KEY, name text NOT NULL UNIQUE, posts integer NOT NULL DEFAULT 0
);
CREATE TABLE messages (
    id bigint PRIMARY KEY, list_id integer NOT NULL REFERENCES lists, parent_id bigint, author text NOT NULL,
    subject text NOT NULL, body text NOT NULL, tags text[] NOT NULL, source jsonb NOT NULL, score numeric(8,3),
    pinned boolean NOT NULL DEFAULT false, posted_at timestamptz NOT NULL, edited_at timestamptz
);
"""
# What a search finds after stemming; the first form alone is found before.
_FAMILIES = [
    ("connections", "connect"), ("decoding", "decod"), ("threads", "thread"), ("handled", "handl"),
    ("parsing", "pars"), ("returning", "return"), ("files", "file"),
]  # fmt: skip
_COMMON = ["file", "return", "string", "object", "list", "name", "value", "call", "thread", "class", "method", "error"]


class Post(NamedTuple):
    """One message; `digest` is one whose body is so large that PostgreSQL stores it out of line (TOAST)."""

    id: int
    list_id: int
    parent_id: int | None
    author: str
    subject: str
    body: str
    tags: list[str]
    source: str
    score: str
    posted_at: datetime
    digest: bool = False


class Archive(NamedTuple):
    """What was gathered: list names in the order of their ids (from 1), and the posts."""

    lists: list[str]
    posts: list[Post]


class _Found(NamedTuple):
    where: str
    author: str
    subject: str
    body: str
    tags: list[str]
    source: str
    parent: int | None


def gather(most: int, seconds: float) -> Archive:
    """Up to `most` posts, read within about `seconds`, but some hundreds even if it takes longer.

    Raises:
        ServerMissing: this Python has (almost) no sources of its standard library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: list[_Found] = []
    deadline = time.monotonic() + seconds
    for file in _files(root):
        if len(found) >= most or (len(found) >= _ENOUGH and time.monotonic() > deadline):
            break
        _read(file, root, found)
    if len(found) < _FEWEST:
        raise ServerMissing(
            f"only {len(found)} docstrings were found in {root}", "use a Python with the sources of its library"
        )
    return _archive(found[:most])


def _files(root: Path) -> list[Path]:
    """The library's modules in an order that mixes packages, the same each time."""
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED)
        files += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    random.Random(1).shuffle(files)
    return files


def _read(file: Path, root: Path, found: list[_Found]) -> None:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return
    module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    for node, name, parent in _documented(tree, "", None, found):
        text = _text(node)
        if not text:
            continue
        first = re.split(r"\n\s*\n|(?<=[.:])\s", text, maxsplit=1)[0]
        subject = " ".join(f"{name}: {first}".removeprefix(": ").split())[:120]
        source = json.dumps({"file": str(file.relative_to(root)), "line": getattr(node, "lineno", 1)})
        kind = {"Module": "module", "ClassDef": "class"}.get(type(node).__name__, "function")
        tags = sorted({kind, *(part for part in name.strip("_").lower().split("_") if part.isalpha())})
        found.append(_Found(module.partition(".")[0], module, subject, text, tags, source, parent))


_Node = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(
    node: _Node, name: str, parent: int | None, found: list[_Found]
) -> Iterator[tuple[_Node, str, int | None]]:
    """`node` and what is defined in it, each with its name and the place of the post that it answers."""
    before = len(found)
    yield node, name, parent
    mine = before if len(found) > before else parent
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{name}.{child.name}".lstrip("."), mine, found)


def _text(node: _Node) -> str:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        # PostgreSQL's text holds neither of these.
        return inspect.cleandoc(first.value.value).replace("\0", "").encode(errors="ignore").decode()
    return ""


def _archive(found: list[_Found]) -> Archive:
    lists = {name: number for number, name in enumerate(dict.fromkeys(f.where for f in found), 1)}
    step = (datetime.now(UTC) - _FIRST_POST - timedelta(days=1)) / len(found)
    posts = []
    for number, item in enumerate(found):
        digest = number % _DIGEST_EVERY == _DIGEST_EVERY - 1
        body = item.body
        if digest:
            body = "\n\n".join(f.body for f in found[max(0, number - _DIGEST_PARTS) : number + 1])
        score = f"{(len(item.body) * 7919 % 99_991) / 1000:.3f}"
        parent = None if item.parent is None else item.parent + 1
        posts.append(
            Post(
                number + 1,
                lists[item.where],
                parent,
                item.author,
                f"Digest: {item.where}" if digest else item.subject,
                body,
                item.tags,
                item.source,
                score,
                _FIRST_POST + step * number,
                digest,
            )
        )
    return Archive(list(lists), posts)


async def load(dsn: str, archive: Archive) -> None:
    """Make the tables and fill them."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        await connection.execute(SCHEMA)
        cursor = connection.cursor()
        async with connection.transaction():
            async with cursor.copy("COPY lists (id, name) FROM STDIN") as copy:
                for number, name in enumerate(archive.lists, 1):
                    await copy.write_row((number, name))
            columns = ", ".join(Post._fields[:-1])
            async with cursor.copy(f"COPY messages ({columns}) FROM STDIN") as copy:
                for post in archive.posts:
                    await copy.write_row(post[:-1])
            await connection.execute(
                "UPDATE lists SET posts = (SELECT count(*) FROM messages WHERE list_id = lists.id)"
            )
        # The planner's estimate is what a snapshot's progress is measured by.
        await connection.execute("ANALYZE")


def words(archive: Archive, most: int = 8) -> list[str]:
    """Words that many posts have, for searches that must never come back empty."""
    counts = {word: sum(1 for post in archive.posts if _has(word, post.body)) for word in _COMMON}
    return sorted(_COMMON, key=lambda word: -counts[word])[:most]


def changing(archive: Archive) -> str:
    """The first word that some posts have, while three times as many have another one of the same stem."""
    for word, stem in _FAMILIES:
        exact = sum(1 for post in archive.posts if _has(word, post.body))
        family = re.compile(rf"\b{stem}", re.IGNORECASE)
        if exact >= _FEW and sum(1 for post in archive.posts if family.search(post.body)) >= 3 * exact:
            return word
    return _FAMILIES[-1][0]


def _has(word: str, text: str) -> bool:
    return re.search(rf"\b{word}\b", text, re.IGNORECASE) is not None
