"""`python -m bridge` that says on SIGUSR1 how many tasks its event loop has: a line `tasks: N` on standard error."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from types import FrameType

from bridge.cli import main

ASKED = signal.SIGUSR1
SAID = "tasks: "


def _say(_number: int, _frame: FrameType | None) -> None:
    os.write(2, f"{SAID}{len(asyncio.all_tasks(asyncio.get_running_loop()))}\n".encode())


if __name__ == "__main__":
    signal.signal(ASKED, _say)
    sys.exit(main())
