"""`python -m tests.reading.small`: the bridge, but what it reads while the stream flows comes in small chunks."""

from __future__ import annotations

import sys

from bridge import cli
from bridge.pipeline import pace

pace.FIRST_UNKNOWN = pace.FIRST_MOST = pace.MOST = 25

if __name__ == "__main__":
    sys.exit(cli.main())
