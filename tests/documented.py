"""The examples of docs/events.md: real ones, which a test compares with what is written there or writes anew.

An example stands behind a comment that names it, a table of values behind one like it:

    <!-- example: insert -->
    ```json
    {"op":"insert",…}
    ```

What is another one in each run (LSNs, transaction ids, times, and with them positions and a claim check's size and
digest) is `Settled`: the smallest of a run's LSNs is always 0/1A00000, the next one 0/1A00040, and so on; transaction
ids count from 730, times in seconds from 2026-01-01, oids of types that are not PostgreSQL's own from 16384. Who is
before whom stays.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from bridge.event import Position
from bridge.pipeline.between import LAST_LSN
from bridge.source import lsn

PAGE = Path(__file__).parents[1] / "docs" / "events.md"
WRITES = bool(os.environ.get("BRIDGE_UPDATE_DOCS"))
WIDTH = 116
COMMIT, CHANGE = 0, 1
LISTS = {"columns", "old_columns"}
OWN = 16384  # the first oid that is not PostgreSQL's own

Members = dict[str, bytes]
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_OID = re.compile(rb'(?<="oid":)\d+')
_text = msgspec.json.Decoder(str).decode


def members(payload: bytes) -> Members:
    """An event's members, each as raw JSON, in its order."""
    return {name: bytes(value) for name, value in _members.decode(payload).items()}


class Settled:
    """What varies from run to run, of all the events that one run has made."""

    def __init__(self, payloads: Iterable[bytes]) -> None:
        lsns: set[tuple[int, int]] = set()
        ids: set[bytes] = set()
        times: set[bytes] = set()
        oids: set[bytes] = set()
        for found in map(members, payloads):
            lsns |= set(_lsns(found).values())
            ids.add(found["txid"])
            times.add(found["committed_at"])
            oids.update(one for name in LISTS & found.keys() for one in _OID.findall(found[name]) if int(one) >= OWN)
        # A change's LSN may be the end of the commit before it, or not: as two numbers they are always two.
        self._lsns = {one: 0x1A00000 + 0x40 * place for place, one in enumerate(sorted(lsns))}
        self._ids = {one: b"%d" % (730 + place) for place, one in enumerate(sorted(ids - {b"null"}, key=int))}
        self._oids = {one: b"%d" % (OWN + place) for place, one in enumerate(sorted(oids, key=int))}
        first = datetime(2026, 1, 1, tzinfo=UTC)
        self._times = {
            one: f'"{first + timedelta(seconds=place):%Y-%m-%dT%H:%M:%S.%fZ}"'.encode()
            for place, one in enumerate(sorted(times - {b"null"}))
        }

    def position(self, text: str) -> str:
        """A position."""
        found = Position.parse(text)
        end = (found.end, COMMIT)
        here = end if found.lsn == found.end else (found.lsn, CHANGE)
        at = found.lsn if found.lsn in (0, LAST_LSN) else self._lsns[here]
        return str(found._replace(end=self._lsns[end], lsn=at))

    def event(self, payload: bytes, whole: bytes = b"") -> Members:
        """An event; `whole` is what its claim check refers to."""
        found = members(payload)
        found |= {name: f'"{lsn.show(self._lsns[one])}"'.encode() for name, one in _lsns(found).items()}
        found["txid"] = self._ids.get(found["txid"], b"null")
        found["committed_at"] = self._times.get(found["committed_at"], b"null")
        for name in LISTS & found.keys():
            found[name] = _OID.sub(lambda match: self._oids.get(match[0], match[0]), found[name])
        if "ref" in found:
            ref = members(found["ref"])
            stored = joined(self.event(whole))
            ref["name"] = f'"{self.position(_text(ref["name"]))}"'.encode()
            ref["size"] = b"%d" % len(stored)
            digest = base64.urlsafe_b64encode(hashlib.sha256(stored).digest())
            ref["digest"] = b'"SHA-256=%b"' % digest
            found["ref"] = joined(ref)
        return found


def _lsns(found: Members) -> dict[str, tuple[int, int]]:
    change, commit = (lsn.parse(_text(found[name])) for name in ("lsn", "commit_lsn"))
    return {"lsn": (change, COMMIT if change == commit else CHANGE), "commit_lsn": (commit, COMMIT)}


def joined(found: Members) -> bytes:
    """The payload that the members are of."""
    return b"{%b}" % b",".join(b'"%b":%b' % (name.encode(), value) for name, value in found.items())


def shown(found: Members) -> str:
    """An event on lines of the page's width."""
    lines, line = [], ""
    for part in joined(found).decode().replace(',"', ',\n"').split("\n"):
        if line and len(line) + len(part) > WIDTH:
            lines.append(line)
            line = " "
        line += part
    return "\n".join([*lines, line])


class Page:
    """docs/events.md."""

    def __init__(self) -> None:
        self.text = PAGE.read_text()

    def example(self, name: str) -> str:
        """What stands in the fenced block behind a comment."""
        match = self._block(name).search(self.text)
        assert match is not None, f"{PAGE.name} has no example {name}"
        return match[2].rstrip("\n")

    @property
    def examples(self) -> set[str]:
        """The names of all examples."""
        return set(re.findall(r"<!-- example: ([\w ]+) -->\n```", self.text))

    def put(self, name: str, example: str) -> None:
        """Put another example in its place; in the file where that is asked for."""
        self._write(self._block(name).sub(lambda match: f"{match[1]}{example}\n{match[3]}", self.text))

    def rows(self, name: str) -> list[list[str]]:
        """The cells of a table, without its head."""
        match = re.search(rf"<!-- {name} -->\n\|.*\n\|.*\n((?:\|.*\n)+)", self.text)
        assert match is not None, f"{PAGE.name} has no table {name}"
        return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in match[1].splitlines()]

    def fill(self, name: str, rows: Sequence[Sequence[str]]) -> None:
        """Put other rows into a table; in the file where that is asked for."""
        lines = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
        table = re.compile(rf"(<!-- {name} -->\n\|.*\n\|.*\n)(?:\|.*\n)+")
        self._write(table.sub(lambda match: match[1] + lines, self.text))

    @staticmethod
    def _block(name: str) -> re.Pattern[str]:
        return re.compile(rf"(<!-- example: {name} -->\n```\w*\n)((?:(?!```).*\n)*)(```\n)")

    def _write(self, text: str) -> None:
        self.text = text
        if WRITES:
            PAGE.write_text(text)
