"""What `bridge check` has found, for a terminal or as JSON."""

from __future__ import annotations

from typing import TextIO

import msgspec
from rich.text import Text

from bridge.operate.check import Checked
from bridge.operate.show import plain

_STYLES = {"error": "bold red", "warning": "yellow"}


def as_json(found: Checked) -> str:
    """Everything as one JSON object, with `ok` on top."""
    printed = msgspec.json.encode({"ok": not found.findings, **msgspec.structs.asdict(found)})
    return msgspec.json.format(printed, indent=2).decode() + "\n"


def report(found: Checked, out: TextIO) -> None:
    """Print every finding: what was seen, why it matters, what to do."""
    console = plain(out)
    for one in found.findings:
        console.print(Text(f"{one.level}: {one.about}: {one.what}", style=_STYLES[one.level]), soft_wrap=True)
        console.print(Text(f"  {one.why}"), soft_wrap=True)
        console.print(Text(f"  → {one.next}"), soft_wrap=True)
    if found.exact is None:
        console.print(Text("wal2json could not be tried: open transactions, or no free slot"), soft_wrap=True)
    counts = {level: sum(one.level == level for one in found.findings) for level in _STYLES}
    said = [f"{count} {level}{'s' * (count != 1)}" for level, count in counts.items() if count]
    verdict = f"{found.tables} table{'s' * (found.tables != 1)}: {', '.join(said) or 'all is well'}"
    console.print(Text(verdict, style="" if said else "green"), soft_wrap=True)
