"""The crash suite itself can be killed: nothing of it stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bridge.embedded import until
from tests.parents import gone

pytestmark = [pytest.mark.anyio, pytest.mark.crash]


def start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.crash", "--seeds", "1", "--seed", "7", "--jobs", "1"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


async def test_a_killed_run_leaves_no_process_and_no_folder() -> None:
    with start() as run:
        try:
            here = psutil.Process(run.pid)

            def bridge() -> list[psutil.Process]:
                return [one for one in here.children(recursive=True) if "bridge.toml" in " ".join(_words(one))]

            await until(bridge, 60, "the run has started a bridge")
            pids = [one.pid for one in here.children(recursive=True)]
            folders = [Path(word).parent for word in _words(bridge()[0]) if word.endswith("bridge.toml")]
            assert len(pids) >= 8  # a keeper for each of three servers and the bridge
            assert folders
            assert folders[0].exists()
        finally:
            run.kill()
    await gone(pids)
    await until(lambda: not folders[0].exists(), 30, "the bridge's folder is removed")


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
