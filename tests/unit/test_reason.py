"""What gets out of an engine's reasons, and what does not."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.index.reason import TYPES, Problem, blocked, paths, scrub

KNOWN = {"age", "doc", "doc.a", "by day"}
VALUES = st.text(st.sampled_from("planted[]'\"\n .:{}=\\field"), max_size=60) | st.text(max_size=60)


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("failed to parse field [age] of type [long] in document with id 'planted'", "x [age, long]"),
        ("failed to parse field [doc.planted] of type [planted]. Preview: 'field [planted]'", "x [doc]"),
        ("failed to parse field [doc.a.planted] of type [ip]", "x [doc.a, ip]"),
        ("mapping set to strict, dynamic introduction of [planted] within [doc] is not allowed", "x [doc]"),
        ("mapping set to strict, dynamic introduction of [by day] within [_doc] is not allowed", "x [by day]"),
        ("Document contains at least one immense term in field=\"age\" (whose UTF8 …) 'planted'", "x [age]"),
        ("object mapping tried to parse field [planted] as object", "x"),
        ("planted", "x"),
    ],
)
def test_only_known_names_are_shown(reason: str, shown: str) -> None:
    assert scrub(Problem("x", reason), KNOWN) == shown


def test_the_whole_tree_is_scrubbed() -> None:
    deep = Problem("a", "field [age]", Problem("b", "planted", Problem("Planted kind!", None, Problem("d"))))
    assert scrub(deep, KNOWN) == "a [age]: b: unnamed: d"
    assert scrub(None) == scrub(Problem()) == "no reason given"


@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=6))
def test_nothing_of_any_text_is_shown(levels: list[tuple[str, str]]) -> None:
    problem = None
    for kind, reason in levels:
        problem = Problem(kind, f"failed to parse field [{reason}] of type [{kind}] '{reason}': {reason}", problem)
    shown = scrub(problem, KNOWN)
    kinds = {kind for kind, _ in levels if re.fullmatch("[a-z0-9_]{1,80}", kind)}
    names = "|".join(re.escape(name) for name in sorted(KNOWN | TYPES, key=len, reverse=True))
    rest = re.sub(rf" \[(?:{names})(?:, (?:{names}))*\]", "", shown)
    assert {part for part in rest.split(": ") if part} <= kinds | {"unnamed", "no reason given"}


def test_the_paths_of_a_mapping_are_those_inside_and_beside_others() -> None:
    mapping = {
        "properties": {
            "title": {"type": "text", "fields": {"raw": {"type": "keyword"}}},
            "doc": {"properties": {"a": {"type": "long"}}},
        }
    }
    assert paths(mapping) == {"title", "title.raw", "doc", "doc.a"}


@pytest.mark.parametrize(
    ("number", "words", "remedy"),
    [
        (12, "flood-stage watermark", "index.blocks.read_only_allow_delete"),
        (8, "index.blocks.write", "PUT /posts/_settings"),
        (4, "closed", "POST /posts/_open"),
        (1, "recovering", "waiting"),
        (13, "cluster.blocks.read_only_allow_delete", "PUT /_cluster/settings"),
        (77, "block 77", "GET /posts/_settings"),
    ],
)
def test_a_block_is_named_with_what_lifts_it(number: int, words: str, remedy: str) -> None:
    reason = f"index [posts] blocked by: [FORBIDDEN/{number}/planted text];"
    found = blocked(Problem("wrapped", "planted", Problem("cluster_block_exception", reason)), "posts")
    assert found is not None
    assert words in found[0]
    assert remedy in found[1]
    assert "planted" not in "".join(found)


def test_what_is_no_block_is_none() -> None:
    assert blocked(Problem("mapper_parsing_exception", "blocked by: [FORBIDDEN/12/x]"), "posts") is None
    assert blocked(None, "posts") is None
