"""The dashboard and the alert rules in deploy/ ask for metrics that exist, with labels that these have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from prometheus_client.core import Metric

from bridge.operate.http import metrics
from bridge.operate.status.parts import Engine, Generation, Index, Lag, Status, Table
from bridge.stream.state import Again, Missed
from tests.unit.test_health import CHECKPOINT, GOOD, SLOT

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES: dict[str, Any] = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana.json").read_text())
# Of Prometheus itself, and of prometheus-client's collector of this process.
OTHERS = {"up": {"job", "instance"}, "process_resident_memory_bytes": {"job", "instance"}}
OF_TARGETS = {"job", "instance", "le"}

# A status in which nothing is unknown, so that every metric has a sample.
WHOLE: Status = msgspec.structs.replace(
    GOOD,
    slot=msgspec.structs.replace(SLOT, limit=1 << 30, safe=1 << 29, lost_in=100.0),
    checkpoint=msgspec.structs.replace(CHECKPOINT, missed={"public.t": Missed(changes=1, seq=1)}),
    lag=Lag(1, 1.0),
    process=msgspec.structs.replace(GOOD.process, since="2026-01-31T11:00:00Z"),
    tables=[Table("public.t", "running", 1, 2, 3, eta=1.0, again=Again(state="running", eta=1.0))],
    indexes=[
        Index(
            "t", "t", "live", 1, "x", [Generation(1, "t-000001", "building", 1, 1, 1.0, done=0.5, eta=1.0)],
            reader_since="2026-01-31T11:00:00Z", engine=Engine("http://e"),
        )
    ],
)  # fmt: skip


def known() -> dict[str, set[str]]:
    """Every sample's name with its labels."""
    families: list[Metric] = [
        *metrics.collected(WHOLE, 1.0, [], most=10),
        *metrics.collected_of_indexes(WHOLE, 1.0, [], ["t"]),
    ]
    found: dict[str, set[str]] = {}
    for family in families:
        for one in family.samples:
            found.setdefault(one.name, set()).update(one.labels)
    return found | OTHERS


def rules() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Where each expression stands, and the expression."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["definition"]


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_an_expression_asks_for_metrics_and_labels_that_exist(where: str, expression: str) -> None:
    there = known()
    bare = re.sub(r'"[^"]*"', '""', expression)
    assert bare.count("(") == bare.count(")")
    assert bare.count("{") == bare.count("}")
    names = re.findall(r"\b(?:bridge_[a-z_0-9]+|process_[a-z_0-9]+|up)\b", bare)
    assert names, where
    assert set(names) <= there.keys(), where
    for name, matchers in re.findall(r"\b([a-z_0-9]+)\{([^}]*)\}", bare):
        assert set(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", matchers)) <= there[name] | OF_TARGETS, where
    kept = {label.strip() for labels in re.findall(r"\bby \(([^)]*)\)", bare) for label in labels.split(",")}
    assert kept <= set().union(*(there[name] for name in names)) | OF_TARGETS, where
    counted = re.findall(r"\b(?:rate|increase)\(([a-z_0-9]+)", bare)
    assert all(name.endswith(("_total", "_bucket", "_sum", "_count", "_sequence")) for name in counted), where


def test_values_of_labels_are_those_that_exist() -> None:
    states = {
        one.labels[label]
        for family in metrics.collected(WHOLE, 1.0, [], most=10)
        for one in family.samples
        for label in ("state", "status")
        if label in one.labels
    } | {"live"}
    asked = re.findall(r'(?:state|status)=~?"([^"]+)"', " ".join(expression for _, expression in expressions()))
    assert {value for text in asked for value in text.split("|")} <= states


def test_the_rules_are_as_prometheus_reads_them() -> None:
    assert RULES.keys() == {"groups"}
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for group in RULES["groups"]:
        assert group.keys() == {"name", "rules"}
    for rule in rules():
        assert (
            {"alert", "expr", "labels", "annotations"}
            <= rule.keys()
            <= {"alert", "expr", "for", "labels", "annotations"}
        )
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_every_alert_is_in_the_documentation() -> None:
    documented = (DEPLOY.parent / "docs/operations.md").read_text()
    assert [rule["alert"] for rule in rules() if f"`{rule['alert']}`" not in documented] == []


def test_the_panels_do_not_cover_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
