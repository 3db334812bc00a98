"""Which columns, by their numbers, a row's names are of, where the catalogue is ahead of the log. Pure.

A row has its columns in the order of their numbers, and leaves out some: those that are not there yet, are dropped
already, or are TOASTed and were left alone by an update. Which name is of which number is the cheapest way to lay one
order beside the other: what was recorded costs nothing, what the catalogue says a little, a name or type that neither
knows more, and what cannot be is out of reach. So names that were exchanged, taken over, or had for a time are told by
where they stand.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

NEVER = 1000
# The key's columns may be others by now, but seldom are.
OTHER_KEY = 4
# A name that another column had: the two may have exchanged theirs.
EXCHANGED = 3
# Of names by numbers; a table of some hundred columns that is altered in each transaction stays a matter of tenths of a
# second.
MOST_CELLS = 250_000


class When(IntEnum):
    """Where a place in the log is, as a transaction sees it: before its commit, within it, or after."""

    BEFORE = -1
    WITHIN = 0
    AFTER = 1


class Slot(NamedTuple):
    """What is known of one number: the column's last recorded name and type, and today's (a dropped one has none).

    when: where the place in the log is to the transaction that altered it last; large: whether its values could be
    TOASTed, with the type that counts there; grown: with today's; virtual: no row has it; key: whether it is of today's
    key.
    """

    number: int
    recorded: str | None
    recorded_oid: int | None
    today: str | None
    today_oid: int | None
    when: When
    large: bool
    grown: bool = False
    virtual: bool = False
    key: bool = False


def aligned(
    slots: Sequence[Slot], shown: Mapping[str, int], *, whole: bool, key: Collection[str] = (), first: bool = False
) -> dict[int, str] | None:
    """The names of numbers: those that a row shows, and those that it leaves out and that are there.

    Args:
        slots: in the order of the row's columns, without those that are gone for sure.
        shown: the row's names, in its order, with their types' oids.
        whole: whether the row leaves nothing out that is there.
        key: the names of the primary key's columns, as the change has them; none where that is not known.
        first: whether nothing was recorded yet, of any column.

    Returns:
        None where nothing fits, or too much is to be looked at.
    """
    names = list(shown)
    if len(names) > len(slots) or len(names) * len(slots) > MOST_CELLS:
        return None
    recorded = {slot.recorded for slot in slots if slot.recorded is not None}
    newest = max((slot.number for slot in slots if slot.recorded is not None), default=0)
    taken = _cheapest(
        [
            [
                _named(slot, name, oid, recorded) + (OTHER_KEY if key and (name in key) != slot.key else 0)
                for name, oid in shown.items()
            ]
            for slot in slots
        ],
        [_left(slot, whole=whole) + _lost(slot, shown) for slot in slots],
        [_passed(slot, newest, whole=whole) for slot in slots],
    )
    if taken is None:
        return None
    found = {slots[place].number: names[index] for index, place in enumerate(taken)}
    for slot in slots:
        if slot.number not in found and _there(slot, whole=whole, first=first):
            name = _unseen(slot, {*names, *found.values()})
            if name is not None:
                found[slot.number] = name
    return found


def _cheapest(named: Sequence[Sequence[int]], left: Sequence[int], passed: Sequence[int]) -> list[int] | None:
    """The place that each name takes, ascending, so that the sum of `named` where one is taken and of `left` where none
    is comes out least, with `passed` where one behind it is taken; None where all of that is out of reach."""
    count = len(named[0]) if named else 0
    # The least cost of so many names on the slots so far, and whether the last of these took the last of those.
    costs, steps = [0] + [NEVER * NEVER] * count, list[bytearray]()
    for row, cost, more in zip(named, left, passed, strict=True):
        step, now = bytearray(count + 1), [costs[0] + cost + (more if count else 0)]
        for index in range(1, count + 1):
            skips = costs[index] + cost + (more if index < count else 0)
            takes = costs[index - 1] + row[index - 1]
            # Of two that fit alike the older column is the likelier one.
            step[index] = takes < skips
            now.append(min(takes, skips))
        costs = now
        steps.append(step)
    if costs[count] >= NEVER:
        return None
    taken, index = [], count
    for place in reversed(range(len(steps))):
        if index and steps[place][index]:
            taken.append(place)
            index -= 1
    return taken[::-1]


def _named(slot: Slot, name: str, oid: int, recorded: Collection[str]) -> int:
    """What it costs to take a name of a type for a column's; `recorded`: the names that all had."""
    if slot.virtual:
        return NEVER
    if slot.when is When.AFTER:
        return 0 if (name, oid) == (slot.today, slot.today_oid) else NEVER
    cost = 0
    exchanged = slot.recorded is not None and name in recorded
    if slot.when is When.WITHIN and (slot.today is not None or slot.recorded is not None):
        cost += 0 if name == slot.today else 1 if name == slot.recorded else EXCHANGED if exchanged else 6
    elif name == slot.recorded:
        cost += 0
    elif name == slot.today:
        cost += 2 if slot.recorded is not None else 1
    elif exchanged:
        cost += EXCHANGED
    else:
        # What came and went since may have had any name, what was there all the time hardly.
        cost += 3 + 2 * (slot.today is not None) + 2 * (slot.recorded is not None)
    if oid not in (slot.recorded_oid, slot.today_oid):
        # One that has the type that it had would have been altered twice; to be dropped it need not have been at all.
        often = slot.today_oid is None or slot.today_oid == slot.recorded_oid
        cost += 0 if slot.today_oid is None and slot.recorded_oid is None else 8 if often else 4
    elif oid != slot.recorded_oid and slot.recorded_oid is not None and slot.when is When.BEFORE:
        cost += 1
    return cost


def _left(slot: Slot, *, whole: bool) -> int:
    """What it costs that a row leaves a column out."""
    if slot.virtual:
        return 0
    if slot.recorded is None:
        # Of one that came since no value was left alone before a change has shown it.
        return NEVER if slot.today is not None and slot.when is When.AFTER and (whole or not slot.large) else 0
    if slot.today is not None:
        return NEVER if whole or not (slot.large or slot.grown) else 1 if slot.large else 4
    # It is dropped later, or is already: then the record is behind.
    return 1 if slot.when is When.WITHIN else 2 if slot.large and not whole else 4


def _passed(slot: Slot, newest: int, *, whole: bool) -> int:
    """What it costs in addition that a row leaves out a column that came since, and has one that came after it: then
    the former was there, for it is dropped later, if at all.

    Args:
        newest: the number of the last recorded column. What is before that and not recorded was gone already.
    """
    if slot.number <= newest or slot.virtual or (slot.today is None and slot.when is not When.BEFORE):
        return 0
    return NEVER if whole else 1 if slot.large or slot.grown else 4


def _lost(slot: Slot, shown: Collection[str]) -> int:
    """What it costs in addition that the name which a column had is another one's in the row."""
    if slot.recorded not in shown or slot.virtual or slot.when is not When.BEFORE:
        return 0
    return 2 if slot.today not in (None, slot.recorded) and slot.today not in shown else 5


def _there(slot: Slot, *, whole: bool, first: bool) -> bool:
    if slot.recorded is None:
        # What nobody alters from then on was there.
        return first and slot.today is not None and slot.when is When.AFTER and not (whole or slot.virtual)
    return slot.today is not None or (slot.when is When.BEFORE and slot.large and not whole)


def _unseen(slot: Slot, names: Collection[str]) -> str | None:
    """The name of a column that a row leaves out, and that no other column has."""
    first, second = (slot.today, slot.recorded) if slot.when is not When.BEFORE else (slot.recorded, slot.today)
    return next((name for name in (first, second) if name is not None and name not in names), None)
