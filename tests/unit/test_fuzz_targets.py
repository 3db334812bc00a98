"""Some thousand changed inputs for each parser of bytes from outside, the same ones each time; `make fuzz` has more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import __main__ as command
from tests.fuzz.fuzzing import Target, fuzz
from tests.fuzz.targets import TARGETS

SLOW = {"value": 400, "toml": 150, "env": 300, "delivery": 1_000, "engine": 1_500, "copy": 1_500}


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_in_is_read_or_refused(name: str) -> None:
    for _, finding in fuzz(TARGETS[name], 1, rounds=SLOW.get(name, 3_000)):
        assert finding is None, f"{finding.data!r}\n{finding.error}"


def test_the_samples_are_understood_and_not_only_refused() -> None:
    for name, target in TARGETS.items():
        outcomes = {target.check(sample) for sample in target.samples}
        assert len(outcomes) > 1, f"all samples of {name} end alike"


def test_what_breaks_a_parser_is_written_to_a_file_that_replays_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(data: bytes) -> str:
        return str(data[:1].decode("ascii"))

    broken = Target("header", check, [b"abc"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TARGETS, "header", broken)
    found = command.run(broken, seed=1, seconds=0.5)
    said = capsys.readouterr().out
    assert found == 1
    assert "seed 1" in said
    assert "UnicodeDecodeError" in said
    (file,) = (tmp_path / ".fuzz").iterdir()
    assert f"--replay {file.relative_to(tmp_path)}" in said
    assert command.replay(file, "header") == 1
    assert "UnicodeDecodeError" in capsys.readouterr().out
    file.write_bytes(b"a")
    assert command.replay(file, "header") == 0
