"""A small disk of a test's own, to be filled: a tmpfs, which only root may mount."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers import missing


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """`folder` is a disk of that size while the block lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        missing("a small disk cannot be mounted here (that takes root)")
    try:
        yield
    finally:
        # Lazily: whatever still has a file open there must not keep it.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def enlarge(folder: Path, megabytes: int) -> None:
    """The disk grows."""
    subprocess.run(["mount", "-o", f"remount,size={megabytes}m", str(folder)], check=True)
