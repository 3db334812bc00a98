"""What pages show of commands and their answers, and whether what came is alike.

A page's block is run by tests where `<!-- runnable -->` stands above it, fenced or indented. What follows a line `$ …`
is what the command answers; in a block without such lines each line is a command. `<!-- runnable: FILE -->` stands
above what goes into that file, `<!-- runnable: sql -->` above statements: a block, or the first `code` of a paragraph.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

FREE = [
    (re.compile(r"[│├┼┤╭╮╰╯─┬┴]+"), " "),
    (re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{8,16}){2,4}\b"), "N"),  # positions
    (re.compile(r"\b[0-9A-Za-z]{22}\b"), "ID"),
    (re.compile(r"\b[\w-]{8}\.\d{12}\b"), "ID"),
    (re.compile(r"\b[0-9A-F]+/[0-9A-F]+\b"), "N"),  # LSNs
    (re.compile(r"\d{4}-\d\d-\d\d[ T][\d:.]+(Z|\+00:00| \+0000 UTC)?"), "N"),
    (re.compile(r"[-+]?\d([\d.,:]*\d)?( ?([KMG]i?B|B)\b|([µnm]?s|[mhd])\b)?(/s)?"), "N"),
    (re.compile(r"\bN (s|min|h|days?)\b"), "N"),
    (re.compile(r"(N[ \t]*)+(?=N\b)"), ""),  # 1m2.5s, 2 min 10 s
    (re.compile(r"\bnull\b"), "N"),
    (re.compile(r'(?<="state":)"(requested|running|waiting|done)"'), "S"),
    (re.compile(r'(?<="phase":)"\w+"'), "S"),
]
MARKED = re.compile(r"^ *<!-- runnable(?:: ([\w.]+))? -->\n", re.MULTILINE)


def shape(text: str) -> list[str]:
    """What stays the same from run to run: the words of each line."""
    for pattern, stands in FREE:
        text = pattern.sub(stands, text)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [line for line in lines if line]


def alike(shown: str, came: str) -> bool:
    """Whether an output has the documented one's lines, in any order: servers give headers and keys in one of their
    own. A line `…` stands for any others, a `…` within a line for any rest of it."""
    documented, found = Counter(shape(shown)), Counter(shape(came))
    more = documented.pop("…", 0)
    for line in [line for line in documented.elements() if "…" in line]:
        pattern = re.compile(".*".join(map(re.escape, line.split("…"))))
        whole = next(filter(pattern.fullmatch, found.elements()), None)
        if whole is None:
            return False
        documented[line] -= 1
        found[whole] -= 1
    return documented <= found if more else documented == found


class Block(NamedTuple):
    """A marked block: what is done with it ("" : it is run), and its text."""

    what: str
    text: str

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Each command with what it is to answer."""
        if not re.search(r"(?m)^\$ ", self.text):
            return [(line, "") for line in self.text.splitlines() if line]
        return re.findall(r"^\$ (.*)\n?((?:(?!\$ ).*\n?)*)", self.text, re.MULTILINE)


def marked(page: Path) -> list[Block]:
    """A page's marked blocks, in order."""
    text = page.read_text()
    return [Block(found[1] or "", _block(text[found.end() :].lstrip("\n"))) for found in MARKED.finditer(text)]


def _block(text: str) -> str:
    if fenced := re.match(r"```.*\n((?:(?!```).*\n)*)```", text):
        return str(fenced[1])
    if indented := re.match(r"(?: {4,}.*\n|\n)+", text):
        return textwrap.dedent(indented[0]).strip("\n") + "\n"
    code = re.search(r"`([^`]+)`", text)
    assert code is not None, f"nothing to run in {text[:100]}"
    return f"{code[1]}\n"
