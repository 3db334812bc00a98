"""A bridge that is killed, paused and started again, and is gone with the process that started it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import bridge
from bridge.embedded import Keeper, until
from bridge.failpoints import VARIABLE

SAID = "failpoint "
CHECKOUT = Path(bridge.__file__).parents[1]


def is_stopped(pid: int) -> bool:
    """Whether a SIGSTOP holds this process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].startswith(" T")
    except OSError:
        return False


class Bridge:
    """`python -m bridge` under a keeper, which kills it and removes `folder` when this process ends in any way.

    Args:
        arguments: the command and what belongs to it, where it is not to be the bridge itself.
        module: what is run in the place of `bridge`.
    """

    def __init__(self, folder: Path, config: str, *arguments: str, module: str = "bridge") -> None:
        self._keeper = Keeper(folder)
        self._module = module
        self._arguments = arguments
        self._file = folder / "bridge.toml"
        self._file.write_text(config)
        self.output = folder / "output"
        self._before = 0

    async def start(self, failpoint: str = "") -> None:
        """Start it, with a failpoint armed if one is named; the output is appended."""
        self._before = len(self.text)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "BRIDGE_"))}
        await self._keeper.spawn(
            [sys.executable, "-m", self._module, "--verbose", "--config", self._file, *self._arguments],
            cwd=CHECKOUT,
            log=self.output,
            env=environment | ({VARIABLE: failpoint} if failpoint else {}),
            stop_signal=signal.SIGKILL,
        )

    @property
    def text(self) -> str:
        """All that it has said since its first start."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    @property
    def silent(self) -> bool:
        """Whether it has said nothing since its last start."""
        return len(self.text) == self._before

    @property
    def running(self) -> bool:
        return self._keeper.running

    @property
    def pid(self) -> int:
        """Of the one that runs."""
        assert self._keeper.pid is not None
        return self._keeper.pid

    @property
    def code(self) -> int | None:
        """How the last one ended; negative: the signal that killed it."""
        return None if self.running else self._keeper.exit_code

    @property
    def stopped(self) -> bool:
        """Whether a SIGSTOP holds it."""
        return is_stopped(self._keeper.pid or 0)

    def send(self, number: int) -> None:
        """Send a signal."""
        self._keeper.signal(number)

    async def ended(self, seconds: float = 30) -> int:
        """The exit code, once it has ended."""
        await until(lambda: not self.running, seconds, f"the bridge has ended:\n{self.text[-2000:]}")
        return self._keeper.exit_code or 0

    async def end(self, number: int = signal.SIGTERM, seconds: float = 40) -> int:
        """Send a signal and wait for the end."""
        self.send(number)
        return await self.ended(seconds)

    async def stop(self) -> None:
        """End it in order, which is exit code 0, or SIGTERM's own end where it had not come to say anything yet."""
        early = self.silent
        code = await self.end()
        fine = code == 0 or (early and code == -signal.SIGTERM)
        assert fine, f"ended with code {code} on SIGTERM:\n{self.text[-1500:]}"

    async def said(self, word: str, seconds: float = 30, times: int = 1) -> None:
        """Wait until the output has `word` so often; fails at once where the bridge ends by itself before."""

        def there() -> bool:
            found = self.text.count(word) >= times
            assert found or self.running, f"the bridge ended with code {self.code} by itself"
            return found

        await until(there, seconds, f"the bridge says {word!r}")

    async def reached(self, said: int, seconds: float) -> bool:
        """Whether another failpoint than the first `said` is reached in time; it may then be stopped, dead, or at work
        again."""
        try:
            await until(lambda: self.text.count(SAID) > said or not self.running, seconds, "a point is reached")
        except TimeoutError:
            return False
        if self.text.count(SAID) == said:
            return False
        if self.text.rpartition(SAID)[2].partition("\n")[0].endswith(": stop"):
            await until(lambda: self.stopped, 5, "it is stopped")
        return True

    async def close(self) -> None:
        """Kill what is left of it and remove its folder."""
        await self._keeper.close()
