"""The switch from one generation to the next, in steps that can each be repeated after a kill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bridge import log
from bridge.errors import Fenced
from bridge.failpoints import reach
from bridge.index.bulk import remove_impostor
from bridge.index.foreign import its_own, may_replace
from bridge.index.generation import Generation, IndexRecord, Standing, writes
from bridge.index.place import Place


async def settle(place: Place) -> None:
    """End what a killed rebuild left behind: a switch of the alias that was begun, old generations to delete."""
    record = await place.record()
    for generation in record.having("switching"):
        holders = await place.engine.indexes(generation.alias or record.alias)
        if generation.physical in holders:
            await finish(place, generation.number, keep_old=generation.keeps)
        else:
            await restate(
                place, generation.number, "kept" if generation.served else "building", served=generation.served
            )
    await forget_retired(place)


async def complete(place: Place, generation: Generation, *, replace: bool = False) -> None:
    """The switch to a generation that is recorded as switching: the alias, the record, and what is not kept."""
    await move_alias(place, generation, replace=replace)
    await finish(place, generation.number, keep_old=generation.keeps)
    await forget_retired(place)


async def move_alias(place: Place, generation: Generation, *, replace: bool) -> None:
    """One call: the alias is on the new generation and on nothing else; one that it had before is gone."""
    alias, record = place.site.index.alias, await place.record()
    holders = await place.engine.indexes(alias)
    if alias in holders:
        await may_replace(place)
    actions: list[dict[str, Any]] = [{"add": {"index": generation.physical, "alias": alias}}]
    for index in holders:
        if index == alias and replace:
            actions.append({"remove_index": {"index": index}})
        elif index != generation.physical:
            actions.append({"remove": {"index": index, "alias": alias}})
    if record.alias not in ("", alias):
        ours = {one.physical for one in record.generations}
        showing = ours & (await place.engine.indexes(record.alias)).keys()
        actions += [{"remove": {"index": index, "alias": record.alias}} for index in showing]
    reach("switch.due")
    # Nothing in the engine knows of leases: a process that has slept until now would take the alias from a newer one.
    place.still_allowed()
    await place.engine.json("POST", "/_aliases", {"actions": actions})
    reach("switch.moved")


async def finish(place: Place, number: int, *, keep_old: bool) -> None:
    """The new generation, which has the alias, is the live one; the reader sees that and moves over.

    Raises:
        Fenced: it was not about to be: another command has made another one live.
    """

    def states(generation: Generation) -> Standing:
        if generation.number == number:
            return "live"
        return "kept" if keep_old and generation.state in ("live", "kept") else "retired"

    def edit(record: IndexRecord) -> IndexRecord:
        now = record.get(number)
        return _restated(record, states) if now is not None and now.state == "switching" else record

    record = await place.change(edit)
    live = record.get(number)
    if live is None or record.generation != number:
        raise Fenced(
            f"generation {number} of index {place.site.named} was replaced by another command meanwhile",
            "see what there is now: bridge status",
        )
    # Before what it replaces is removed: the log has the order of what happens.
    log.get().info("alias switched", index=place.site.name, alias=live.alias, to=live.physical)
    reach("switch.finished")


def _restated(record: IndexRecord, states: Callable[[Generation], Standing]) -> IndexRecord:
    for generation in record.generations:
        record = record.having_changed(generation.number, state=states(generation))
    return record


async def forget_retired(place: Place) -> None:
    """Delete the consumers and indexes of retired generations, then forget them."""
    record = await place.record()
    for old in record.having("retired"):
        await place.remove_consumer(old)
        reach("switch.consumer")
        if await its_own(place, old):
            await place.engine.delete(old.physical)
        elif await place.engine.indexes(old.physical):
            log.get().warning("left alone", index=place.site.name, name=old.physical, why="somebody else has made it")
        reach("switch.index")
        await remove_impostors(place, old.number)
        await _forget(place, old.number)
        reach("switch.forgotten")
        log.get().info("generation removed", index=place.site.name, physical=old.physical)


async def remove_impostors(place: Place, upto: int) -> None:
    """Remove empty indexes that have the name of a write alias of this index's generations, up to a number.

    A reader that was cancelled in the middle of a bulk to a generation that was just deleted, or replaced while it sent
    one, does not see the answer: a delete in that bulk may have made one.
    """
    name = place.site.name
    for index in await place.engine.indexes(f"{name}-*-w*"):
        found = writes(name).fullmatch(index)
        if found is not None and int(found[1]) <= upto:
            await remove_impostor(place.engine, index)


async def restate(place: Place, number: int, state: Standing, *, keeps: bool = False, served: bool = False) -> None:
    """A generation is in another state now; one that searches see stays, until `finish` makes another one live: what
    began with it may have been overtaken."""
    changes: dict[str, Any] = {"state": state, "keeps": keeps, "served": served}
    if state == "switching":
        changes["alias"] = place.site.index.alias

    def edit(record: IndexRecord) -> IndexRecord:
        return record if record.generation == number else record.having_changed(number, **changes)

    await place.change(edit)


async def _forget(place: Place, number: int) -> None:
    await place.change(lambda record: record.of([g for g in record.generations if g.number != number]))
