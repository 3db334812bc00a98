"""Whether clocks agree. Pure.

A server's clock is read between two moments of ours: it is off by as much as it lies outside of them, so that a slow
answer is no difference.
"""

from __future__ import annotations

import msgspec

from bridge.operate.checks.finding import Finding, warning, well
from bridge.operate.status.health import span

# Leases are renewed each second and taken for gone after ten.
MOST = 3.0


class Reading(msgspec.Struct, frozen=True):
    """By how many seconds a clock is ahead of this one, at least; negative where it is behind."""

    ahead: float


def read_at(began: float, told: float, ended: float, *, coarse: float = 0.0) -> Reading:
    """What an answer tells of a clock.

    Args:
        began, ended: when it was asked and had answered, by this clock (seconds since 1970).
        told: what it said. coarse: it may have cut off so many seconds.
    """
    if told + coarse < began:
        return Reading(told + coarse - began)
    return Reading(told - ended if told > ended else 0.0)


def judge(kind: str, about: str, found: Reading) -> Finding:
    """What the difference means.

    Args:
        kind: "postgres", "nats" or "engine". about: the server, for people.
    """
    if abs(found.ahead) < MOST:
        return well(f"clocks.{kind}", about, "its clock and this one agree")
    how = "ahead of" if found.ahead > 0 else "behind"
    return warning(
        f"clocks.{kind}",
        about,
        f"its clock is {span(abs(found.ahead))} {how} this one",
        "set both by NTP: `timedatectl set-ntp true` on each host (or chrony), and see `timedatectl timesync-status`",
    )
