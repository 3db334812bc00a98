"""What of `bridge check` concerns this machine: the embedded server's program, folder and disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from bridge.config import Stream
from bridge.embedded.nats import NO_ROOM, find_program
from bridge.errors import ServerMissing
from bridge.operate.checks.finding import Finding, warning, well, wrong
from bridge.operate.status.health import size

ID = "embedded.store"
LITTLE = 1 << 30


def store(config: Stream) -> list[Finding]:
    """Whether the embedded server can run here; nothing where there is none."""
    if not config.embedded:
        return []
    out = []
    try:
        find_program()
    except ServerMissing as error:
        out.append(wrong(ID, "", error.what, error.remedy, why="the embedded server is a program of its own"))
    folder = Path(config.store_dir)
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    about = str(folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = f"{there} cannot be written to"
        next_ = f"chown or chmod it for the user that runs the bridge, or give another [stream] store_dir than {folder}"
        return [*out, wrong(ID, about, what, next_, why="the embedded server keeps the log there")]
    free = shutil.disk_usage(there).free
    what = f"{size(free)} free on the disk of {folder}"
    if free < LITTLE:
        make = wrong if free < NO_ROOM else warning
        out.append(
            make(ID, about, what, "make room there, or move the folder to a larger disk, while the bridge is down")
        )
    return out or [well(ID, about, what)]
