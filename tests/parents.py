"""Processes that start servers, so that a test can kill them and see what is left."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bridge.embedded import until
from bridge.embedded.process import alive

PROGRAM = """
import json, sys
from pathlib import Path
import anyio
from bridge import log
from bridge.embedded import NatsServer, Postgres, SearchEngine, supervised

log.configure()  # standard output is for one line of JSON alone

async def main():
    {body}

anyio.run(main)
"""


@contextmanager
def parent(body: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A Python process that runs `body`, and the JSON line that it printed once its servers were up."""
    code = PROGRAM.replace("{body}", textwrap.indent(textwrap.dedent(body), "    ").strip())
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


async def gone(pids: list[int]) -> None:
    """Waits until none of these processes runs."""
    await until(lambda: not any(map(alive, pids)), 20, f"processes {pids} have ended")
