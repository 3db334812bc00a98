"""What `bridge check` has found, for a terminal or as JSON."""

from __future__ import annotations

from typing import Any, TextIO

import msgspec
from rich.text import Text

from bridge.operate.checks.finding import Checked, Finding
from bridge.operate.show.status import plain

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def as_json(found: Checked, *, quiet: bool = False) -> str:
    """Everything as one JSON object; `ok` on top tells whether there is no error."""
    whole = {
        "ok": found.sound,
        "errors": len(found.of("error")),
        "warnings": len(found.of("warning")),
        "findings": [_plain(one) for one in (found.found if quiet else found.findings)],
    }
    return msgspec.json.format(msgspec.json.encode(whole), indent=2).decode() + "\n"


def _plain(one: Finding) -> dict[str, Any]:
    whole: dict[str, Any] = msgspec.to_builtins(one)
    return whole if one.fix is not None else {key: value for key, value in whole.items() if key != "fix"}


def report(found: Checked, out: TextIO, *, quiet: bool = False) -> None:
    """Print what is well in a line each, then every finding: what was seen, why it matters, what to do."""
    console = plain(out)
    for one in found.found if quiet else found.findings:
        about = f" {one.about}:" if one.about else ""
        if one.level == "ok":
            console.print(Text("ok ", _STYLES["ok"]).append(f"{one.id}:{about} {one.what}", "dim"), soft_wrap=True)
            continue
        console.print(Text(f"{one.level} {one.id}:{about} {one.what}", _STYLES[one.level]), soft_wrap=True)
        console.print(Text(f"  {one.why}"), soft_wrap=True)
        console.print(Text(f"  → {one.next}"), soft_wrap=True)
    counts = [f"{n} {level}{'s' * (n != 1)}" for level in ("error", "warning") if (n := len(found.of(level)))]
    verdict = f"{len(found.findings)} checks: {', '.join(counts) or 'all is well'}"
    console.print(Text(verdict, "" if counts else "green"), soft_wrap=True)


def plan(fixable: list[Finding], out: TextIO) -> None:
    """Print exactly what `--fix` runs, and what each costs."""
    console = plain(out)
    console.print(Text("These can be mended now:"), soft_wrap=True)
    for one in fixable:
        assert one.fix is not None
        for step in one.fix.runs:
            console.print(Text(f"  {step}"), soft_wrap=True)
        if one.fix.costs:
            console.print(Text(f"    {one.fix.costs}", "dim"), soft_wrap=True)
