"""Whether everything is in step, with a bound: what /readyz answers. Pure.

Ready is more than alive: the newest look found no problem, and every commit of longer ago than the bound is in the
stream and in the live generation of each index. What is not known is not ready.
"""

from __future__ import annotations

from bridge.operate.status.health import span, unfed
from bridge.operate.status.parts import NATS, Index, Status


def reasons(found: Status | None, age: float, within: float) -> list[str]:
    """Why it is not ready; empty where it is.

    Args:
        found: the newest look; None before the first.
        age: how long ago it was, in seconds.
        within: how far behind is still in step, in seconds.
    """
    if found is None:
        return ["nothing has been looked at yet"]
    out = [f"the newest look is {span(age)} old"] if age > max(within, 1.0) else []
    out += [finding.what for finding in found.findings if finding.level == "problem"]
    if found.process.state != "streaming" and not found.away:
        out.append(f"the slot is not being read: the bridge is {found.process.state}")
    out += _lag(found, within)
    return out + [why for index in found.indexes for why in behind(index, within)]


def of_indexes(found: Status | None, age: float, within: float, names: list[str]) -> list[str]:
    """The same for some indexes alone, of a look that need not have asked PostgreSQL."""
    if found is None:
        return ["nothing has been looked at yet"]
    out = [f"the newest look is {span(age)} old"] if age > max(within, 1.0) else []
    if NATS in found.away:
        return [*out, f"{NATS} cannot be asked: {found.away[NATS]}"]
    for index in found.indexes:
        if index.name in names:
            out += [unfed(index)] if not index.reader else []
            if index.engine is not None and index.engine.away:
                out.append(f"the search engine of {index.name} cannot be asked: {index.engine.away}")
            out += [index.astray.why] if index.astray is not None else []
            out += behind(index, within)
    return out


def _lag(found: Status, within: float) -> list[str]:
    lag = found.lag
    if lag is None:
        return ["it is not known how far the stream is behind PostgreSQL"]
    if lag.bytes and lag.seconds is None:
        return ["it is not known for how long the stream has been behind PostgreSQL"]
    if (lag.seconds or 0.0) > within:
        return [f"the stream is {span(lag.seconds or 0.0)} behind PostgreSQL; {span(within)} are in step"]
    return []


def behind(index: Index, within: float) -> list[str]:
    """What keeps one index from being in step."""
    live = [one for one in index.generations if one.state == "live"]
    if not live:
        return [f"index {index.name} has no live generation"]
    out = []
    for one in live:
        if one.behind is None:
            out.append(f"{one.physical} has no consumer")
        elif one.behind and one.behind_seconds is None:
            out.append(f"it is not known for how long {one.physical} has been {one.behind:,} events behind")
        elif (one.behind_seconds or 0.0) > within:
            out.append(f"{one.physical} is {span(one.behind_seconds or 0.0)} behind; {span(within)} are in step")
    return out
