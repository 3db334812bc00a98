"""The parts of `bridge check`: one module that asks each server, one that judges what it said, the list of findings."""
