"""The benchmark's arithmetic: medians, spreads, processor times between two moments, budgets, comparisons, choices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import compare, latency, markdown, processor, readable, rows, snapshots, stream, switching, workloads
from bench.budgets import BUDGETS, Budget
from bench.ground import nanoseconds
from bench.processor import Usage
from bench.result import Result, quantile, result
from bench.snapshots import Runs, Taken
from bench.stub import Stub

SECOND = 10**9


def found(row: str, ratio: float = 0.0, value: float = 1.0, spread: float = 0.0) -> Result:
    return Result(row, value, value / ratio if ratio else 0.0, ratio, "unit", 3, spread)


def chosen(*only: str) -> list[str]:
    return [row for _, wanted in rows.choose(rows.measurements(3, 1.0), list(only)) for row in wanted]


def test_a_ratio_is_that_of_the_medians_and_its_spread_that_of_the_runs_beside_each_other() -> None:
    one = result("row", "unit", [50, 100, 200], [100, 200, 400])
    assert (one.value, one.yardstick, one.ratio) == (100, 200, 0.5)
    assert one.spread == 0
    assert result("row", "unit", [50, 100, 100], [100, 100, 100]).spread == 0.5


def test_without_a_yardstick_the_spread_is_that_of_the_values() -> None:
    one = result("row", "unit", [9, 10, 12])
    assert (one.ratio, one.yardstick, one.spread) == (0, 0, 0.3)


def test_runs_without_their_yardstick_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        result("row", "unit", [1, 2], [1])


@given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from([0.01, 0.5, 0.99, 1.0]))
def test_a_quantile_is_the_smallest_value_that_so_many_do_not_exceed(values: list[float], share: float) -> None:
    ordered = sorted(values)
    one = quantile(ordered, share)
    assert sum(value <= one for value in ordered) >= share * len(ordered)
    assert sum(value < one for value in ordered) < share * len(ordered)


def test_processor_time_is_read_between_two_moments_not_between_samples() -> None:
    samples = [Usage(0, 5.0), Usage(10 * SECOND, 5.0), Usage(20 * SECOND, 15.0), Usage(30 * SECOND, 15.0)]
    assert processor.spent(samples, 12 * SECOND, 18 * SECOND) == pytest.approx(6.0)
    assert processor.spent(samples, 5 * SECOND, 11 * SECOND) == pytest.approx(1.0)


def test_outside_of_the_samples_no_processor_time_is_assumed() -> None:
    samples = [Usage(10 * SECOND, 1.0), Usage(20 * SECOND, 2.0)]
    assert processor.spent(samples, 0, 100 * SECOND) == pytest.approx(1.0)
    assert processor.spent([], 0, SECOND) == 0


def test_a_process_that_ended_after_its_last_sample_was_as_busy_until_then() -> None:
    samples = [Usage(0, 0.5), Usage(10 * SECOND, 5.5)]
    assert processor.extrapolated(samples, 12 * SECOND) == pytest.approx(6.5)
    assert processor.extrapolated(samples[:1], 12 * SECOND) == 0.5


BUSY = "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True)\ninput()"


def test_the_processor_time_of_a_server_is_also_that_of_the_processes_that_it_starts() -> None:
    before, alone = processor.used_by_all(os.getpid()), processor.used(os.getpid())
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        lives = processor.used_by_all(os.getpid())
        child.communicate(b"\n")
    ended, ours = processor.used_by_all(os.getpid()), processor.used(os.getpid()) - alone
    # What /proc counts is a few hundredths less than what the child has seen.
    assert lives - before >= 0.15
    assert ended - before - ours >= 0.15


def test_two_processors_are_bound_by_the_costliest_process_or_by_all_together() -> None:
    assert stream.bound(20.0, 2.0, 2.0) == pytest.approx(50_000)
    assert stream.bound(10.0, 10.0, 20.0) == pytest.approx(50_000)


@pytest.mark.parametrize(
    ("budget", "figure", "verdict"),
    [
        (Budget("ratio", 0.9, 1.2), 0.89, "not met"),
        (Budget("ratio", 0.9, 1.2), 0.9, "met"),
        (Budget("ratio", 0.9, 1.2), 1.2, "aim met"),
        (Budget("ratio", 1.15, 1.0), 1.16, "not met"),
        (Budget("ratio", 1.15, 1.0), 1.1, "met"),
        (Budget("ratio", 1.15, 1.0), 0.97, "aim met"),
        (Budget("value", 15, 5), 15.1, "not met"),
        (Budget("value", 15, 5), 4.9, "aim met"),
        (Budget("value", 0, 0), 0, "aim met"),
        (Budget("value", 0, 0), 1, "not met"),
    ],
)
def test_a_budget_knows_whether_more_or_less_is_better(budget: Budget, figure: float, verdict: str) -> None:
    one = found("row", ratio=figure) if budget.of == "ratio" else found("row", value=figure)
    assert budget.verdict(one) == verdict


def test_every_budget_is_of_a_row_that_can_be_measured() -> None:
    for row in BUDGETS:
        assert chosen(row), row


def test_two_runs_are_compared_by_their_ratios_and_where_there_are_none_by_their_values() -> None:
    a = [found("rate", ratio=0.5, value=100), found("cost", value=10)]
    b = [found("rate", ratio=0.6, value=50), found("cost", value=5)]
    changes = compare.compare(a, b)
    assert [one.row for one in changes] == ["rate", "cost"]
    assert [one.change for one in changes] == pytest.approx([0.2, -0.5])


@pytest.mark.parametrize(("spreads", "marked"), [((0.1, 0.1), True), ((0.3, 0.1), False), ((0.1, 0.3), False)])
def test_only_a_change_beyond_the_spread_of_either_run_has_a_mark(spreads: tuple[float, float], marked: bool) -> None:
    a, b = (found("rate", ratio, spread=spread) for ratio, spread in zip((0.5, 0.6), spreads, strict=True))
    assert compare.compare([a], [b])[0].marked is marked


def test_a_row_that_only_one_run_has_is_shown_without_a_change() -> None:
    changes = compare.compare([found("a"), found("b")], [found("b"), found("c")])
    assert [(one.row, one.change is None) for one in changes] == [("a", True), ("b", False), ("c", True)]


def test_compare_prints_both_runs_and_points_at_what_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, ratio in (("before", 0.5), ("after", 0.75)):
        (tmp_path / name).write_bytes(msgspec.json.encode([found("stream.chain.tx1", ratio, spread=0.1)]))
    monkeypatch.setattr(sys, "argv", ["bench.compare", str(tmp_path / "before"), str(tmp_path / "after")])
    assert compare.main() == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("stream.chain.tx1"))
    assert line.split()[3:6] == ["0.50", "0.75", "+50.0%"]
    assert "◀ more" in line


def test_a_file_that_holds_no_results_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"row": 1}')
    with pytest.raises(SystemExit, match="file: Expected `array`"):
        compare.read(tmp_path / "file")


def test_a_choice_is_a_row_or_what_rows_begin_with_up_to_a_dot() -> None:
    assert chosen("latency.batch.500") == ["latency.batch.500"]
    assert chosen("stream.chain.tx1") == ["stream.chain.tx1", "rss.stream"]
    assert chosen("latency.chain") == [f"latency.chain.{rate}" for rate in (100, 500, 2000)]
    assert chosen("index.rebuild", "latency.batch.100") == [
        "latency.batch.100", "index.rebuild.opensearch", "index.rebuild.elasticsearch",
    ]  # fmt: skip
    assert {"stream.backlog", "stream.tables1000", "stream.batch.wide"} < set(chosen("stream"))


def test_everything_that_is_measured_of_indexes_has_one_name() -> None:
    assert chosen("index") == [
        "index.rebuild.opensearch", "index.rebuild.elasticsearch", "index.reader", "latency.index.100", "rss.index",
        "index.searcher",
    ]  # fmt: skip


def test_everything_that_is_measured_of_snapshots_has_one_name() -> None:
    assert chosen("snapshot") == [
        "snapshot.initial", "snapshot.limit", "snapshot.incremental", "rss.snapshot", "latency.snapshot.200",
    ]  # fmt: skip
    assert chosen("snapshot.limit") == ["snapshot.limit"]
    assert chosen("latency.snapshot") == ["latency.snapshot.200"]
    assert "latency.snapshot.200" in chosen("latency")


def test_a_part_of_a_rows_results_chooses_the_row() -> None:
    assert chosen("rss.index.reindex") == ["rss.index"]
    assert chosen("latency.chain.500.p99") == ["latency.chain.500"]
    assert chosen("stream.batch.tx20.cpu.nats") == ["stream.batch.tx20", "rss.stream"]


def test_the_largest_memory_needs_every_size_measured() -> None:
    assert set(chosen("rss")) == {f"stream.{mode}.{size}" for mode in ("chain", "batch") for size in stream.SIZES} | {
        "rss.stream", "rss.snapshot", "rss.index",
    }  # fmt: skip


def test_without_a_choice_all_is_measured_once() -> None:
    everything = [row for one in rows.measurements(3, 1.0) for row in one.rows]
    assert chosen() == everything
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("unknown", ["streams", "stream.chain.tx", "latency.chain.50", "index.rebuild.osmem"])
def test_a_choice_that_fits_no_row_is_refused_by_name(unknown: str) -> None:
    with pytest.raises(ValueError, match=f"no such row: {unknown};"):
        chosen("stream", unknown)


def test_a_pgbench_line_gives_the_time_of_the_commit_without_the_wait_for_its_turn() -> None:
    # client, transaction, elapsed since it was due, script, second, microsecond, lag
    lines = ["3 17 2500 0 1700000000 250000 1000", "0 0 900 0 1700000001 5 0"]
    assert latency.commits(lines) == [(1_700_000_000_250_000_000, 1.5), (1_700_000_001_000_005_000, 0.9)]


def test_the_first_second_of_a_run_is_not_counted() -> None:
    assert latency.warm([(5 * SECOND, 1.0), (6 * SECOND - 1, 2.0), (6 * SECOND, 3.0), (9 * SECOND, 4.0)]) == [3.0, 4.0]
    assert latency.warm([]) == []


def test_a_document_is_late_by_the_time_since_its_commit() -> None:
    waiting = readable.Waiting()
    waiting.commit(7, SECOND, SECOND + 2_000_000)
    waiting.commit(8, SECOND, SECOND + 3_000_000)
    waiting.see("7", SECOND + 12_000_000)
    assert waiting.readable == [(SECOND + 2_000_000, 10.0)]
    assert list(waiting.committed) == ["8"]
    assert [took for _, took in waiting.commits] == [2.0, 3.0]


def test_a_search_that_failed_in_one_run_is_not_lost_in_a_median() -> None:
    runs = [switching.Run(searches=100, bad=bad, reader=50, rebuild=60, seconds=2) for bad in (0, 3, 0)]
    found = {one.row: one for one in switching.results(runs, ["index.searcher"])}
    assert list(found) == ["index.searcher", "index.searcher.asked"]
    assert found["index.searcher"].value == 3
    assert "300 searches" in found["index.searcher"].unit
    assert BUDGETS["index.searcher"].verdict(found["index.searcher"]) == "not met"


def test_each_kind_of_snapshot_stands_beside_its_own_yardstick() -> None:
    def taken(rate: float) -> Taken:
        return Taken(rate, postgres=1.0, nats=5.0, bridge=10.0)

    runs = Runs(streamed=[50.0], initial=[taken(100)], incremental=[taken(70)], published=[taken(125)])
    names = ["snapshot.initial", "snapshot.limit", "snapshot.incremental"]
    found = {one.row: one for one in snapshots.results(runs, names)}
    assert [found[name].ratio for name in names] == [2.0, 0.8, 0.7]
    assert found["snapshot.incremental.bound"].value == pytest.approx(100_000)
    assert [one.row for one in snapshots.results(runs, ["snapshot.limit"])] == [
        "snapshot.limit", "snapshot.limit.cpu.nats", "snapshot.limit.cpu.publisher",
    ]  # fmt: skip


def ask(stub: Stub, method: str, path: str, body: object = None) -> tuple[int, object]:
    status, answer = stub.answer(method, path, msgspec.json.encode(body) if body is not None else b"")
    return status, msgspec.json.decode(answer)


def test_the_stub_of_an_engine_takes_every_bulk_and_only_where_there_is_an_index() -> None:
    stub = Stub()
    bulk = b'{"index":{"_id":"1"}}\n{"a":1}\n{"index":{"_id":"2"}}\n{"a":2}\n'
    assert stub.answer("POST", "/posts-1-w/_bulk?require_alias=true", bulk)[0] == 404
    ask(stub, "PUT", "/posts-1", {"mappings": {"_meta": {"index": "posts"}}, "aliases": {"posts-1-w": {}}})
    status, answer = stub.answer("POST", "/posts-1-w/_bulk?require_alias=true", bulk)
    item = {"index": {"_index": "posts-1", "result": "created", "status": 201}}
    assert (status, msgspec.json.decode(answer)) == (200, {"errors": False, "items": [item, item]})
    assert ask(stub, "GET", "/posts-1/_count") == (200, {"count": 2})
    assert ask(stub, "GET", "/posts-1/_mapping") == (200, {"posts-1": {"mappings": {"_meta": {"index": "posts"}}}})


def test_the_stub_moves_an_alias_and_forgets_an_index() -> None:
    stub = Stub()
    for name in ("posts-1", "posts-2"):
        ask(stub, "PUT", f"/{name}", {"aliases": {"posts": {}} if name == "posts-1" else {}})
    assert ask(stub, "GET", "/posts/_alias") == (200, {"posts-1": {"aliases": {"posts": {}}}})
    moved = [
        {"add": {"index": "posts-2", "alias": "posts"}},
        {"remove": {"index": "posts-1", "alias": "posts"}},
    ]
    ask(stub, "POST", "/_aliases", {"actions": moved})
    ask(stub, "DELETE", "/posts-1")
    assert ask(stub, "GET", "/posts*/_alias") == (200, {"posts-2": {"aliases": {"posts": {}}}})
    assert ask(stub, "GET", "/posts-1/_count")[0] == 404


def test_times_of_both_servers_are_read_to_their_last_digit() -> None:
    assert nanoseconds("1970-01-01T00:00:01.5Z") == 1_500_000_000
    assert nanoseconds("2026-01-01T00:00:00.123456789Z") == 1_767_225_600_123_456_789
    assert nanoseconds("2026-01-01T00:00:00Z") == 1_767_225_600_000_000_000
    assert latency.committed_at(
        b'{"op":"insert","source":"s","schema":"public","table":"t","committed_at":"1970-01-01T00:00:02.000001Z"}'
    ) == 2 * SECOND + 1000  # fmt: skip


@pytest.mark.parametrize("scale", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("size", list(stream.SIZES))
def test_every_size_is_whole_transactions_whatever_the_scale(size: str, scale: float) -> None:
    load = stream.SIZES[size](scale)
    total, per = (int(number) for number in load.load.removeprefix("CALL load(").removesuffix(")").split(","))
    assert load.rows == total > 0
    assert total % per == 0


def test_a_table_that_is_read_by_snapshots_is_as_one_in_use() -> None:
    load = workloads.messages(5000, 1000)
    assert load.settled == [*load.setup, load.load, "VACUUM (ANALYZE)", "CHECKPOINT"]


def test_many_tables_get_enough_rows_for_the_first_of_each_to_lie_before_what_is_measured() -> None:
    assert workloads.tables(1000, 100).rows * 0.05 >= 1000


def test_the_table_of_the_documentation_has_each_row_beside_its_budget() -> None:
    lines = markdown.table([found("stream.chain.tx1", ratio=0.95, spread=0.05), found("other")]).splitlines()
    assert lines[2:] == [
        "| `stream.chain.tx1` | 1.00 | 1.05 | 0.95 | 5% | 0.9 | 1.2 | met |",
        "| `other` | 1.00 |  |  | 0% |  |  |  |",
    ]
    assert len({line.count("|") for line in lines}) == 1
