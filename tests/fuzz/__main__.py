"""`python -m tests.fuzz`: each target in turn for its share of the time; inputs that break one are written to files."""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from pathlib import Path

from tests.fuzz.fuzzing import Finding, Target, fuzz, tried
from tests.fuzz.targets import TARGETS

FOLDER = Path(".fuzz")
MOST = 5


def main() -> int:
    """The exit code: 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="for all targets together")
    parser.add_argument("--target", choices=list(TARGETS), help="only this one, for all of the time")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="default: another one each time")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="read one input again, and show what it breaks")
    chosen = parser.parse_args()
    if chosen.replay is not None:
        return replay(chosen.replay, chosen.target or chosen.replay.name.split(".")[0])
    if chosen.minutes <= 0:
        parser.error("--minutes must be above zero")
    targets = [TARGETS[chosen.target]] if chosen.target else list(TARGETS.values())
    broken = sum(run(target, chosen.seed, chosen.minutes * 60 / len(targets)) for target in targets)
    say(f"{len(targets)} targets, seed {chosen.seed}: {broken} inputs broke one" if broken else "nothing was found")
    return 1 if broken else 0


def run(target: Target, seed: int, seconds: float) -> int:
    """One target; how many inputs broke it, of which each kind of error counts once."""
    kinds: set[str] = set()
    rounds = 0
    for rounds, finding in fuzz(target, seed, seconds=seconds):  # noqa: B007 - the last count is shown
        if finding is None or finding.kind in kinds:
            continue
        kinds.add(finding.kind)
        keep(finding)
        if len(kinds) >= MOST:
            break
    say(f"{target.name:<12} seed {seed}: {rounds:,} inputs, {len(kinds) or 'none'} broke it")
    return len(kinds)


def keep(finding: Finding) -> None:
    """Write the input to a file, and say how to look at it."""
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"{finding.target}.{hashlib.sha256(finding.data).hexdigest()[:12]}"
    file.write_bytes(finding.data)
    say(f"{finding.error}\n  → {file}: python -m tests.fuzz --replay {file}")


def replay(file: Path, name: str) -> int:
    """Read the input of a file again."""
    if name not in TARGETS:
        say(f"{file} does not begin with a target's name\n  → name it with --target: {', '.join(TARGETS)}")
        return 2
    became, finding = tried(TARGETS[name], file.read_bytes())
    say(finding.error if finding else f"it breaks nothing: {became}")
    return 1 if finding else 0


def say(text: str) -> None:
    """A line on stdout, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
