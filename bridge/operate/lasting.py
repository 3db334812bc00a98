"""Work beside the bridge that must not end it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from bridge.errors import BridgeError, Unavailable, unexpected
from bridge.waiting import Backoff, forever

# Until the next try where a server refuses, or something is wrong here.
PAUSE = 30.0


class Broken(Unavailable):
    """What cannot be done beside the bridge until somebody mends it."""


async def lasting(what: str, broken: str, work: Callable[[], Awaitable[None]], *, pause: float = PAUSE) -> None:
    """Do it for ever: what it cannot cope with is logged, and it begins anew after a while.

    Args:
        what: names it in the log. broken: what is not done meanwhile. pause: seconds until the next try.
    """

    async def attempt(_: Backoff) -> None:
        try:
            await work()
        except Unavailable:
            raise
        except BridgeError as error:
            raise _broken(f"{broken}: {error.what}", error.remedy, pause) from None
        except Exception as error:  # noqa: BLE001 - an onlooker's defect is no reason to stop the bridge
            remedy = "trying again; this is a defect of bridge: report it"
            raise _broken(f"{broken}: {unexpected(error)}", remedy, pause) from None

    # That a server is away says the bridge itself.
    await forever(what, attempt, backoff=Backoff(what, says=lambda error: isinstance(error, Broken)))


def _broken(what: str, remedy: str, pause: float) -> Broken:
    found = Broken(what, remedy)
    found.pause = pause
    return found
