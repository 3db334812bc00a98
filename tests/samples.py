"""Where sample data lies that is in no checkout: in a folder `shared` beside it, or beside a folder that it is in."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
CHINOOK = next(
    (found for above in ROOT.parents if (found := above / "shared" / "data" / "chinook.sql").exists()),
    ROOT.parent / "shared" / "data" / "chinook.sql",
)
