"""Subjects, keys, positions and LSNs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.event import Position
from bridge.source import lsn
from bridge.source.catalog import Filter
from bridge.stream import subjects


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=63))
def test_a_token_holds_only_what_subjects_and_keys_allow_and_can_be_read_back(name: str) -> None:
    token = subjects.token(name)
    assert set(token) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-=")
    assert token
    assert subjects.untoken(token) == name


@given(st.text(max_size=20), st.text(max_size=20))
def test_two_names_never_share_a_token(one: str, other: str) -> None:
    assert (subjects.token(one) == subjects.token(other)) == (one == other)


def test_a_name_full_of_wildcards_is_one_harmless_token() -> None:
    assert subjects.table_subject("cdc", "main", "public", "we.ird *>$ tbl") == (
        "cdc.main.public.we=2Eird=20=2A=3E=24=20tbl"
    )


def test_the_longest_names_stay_below_what_the_server_takes_as_a_subject() -> None:
    name = "\U0001f600" * 15  # 60 bytes, twelve characters each once escaped
    assert len(subjects.table_subject("cdc", name, name, name)) < 4000


positions = st.builds(
    Position,
    st.integers(1, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
)  # fmt: skip


@given(positions, positions)
def test_positions_as_text_sort_like_positions(one: Position, other: Position) -> None:
    assert (str(one) < str(other)) == (one < other)
    assert Position.parse(str(one)) == one


@pytest.mark.parametrize("text", ["", "1-2-3-4-5", "00000001-0000000000000001-0000000000000001-00000001", "x" * 60])
def test_what_is_no_position_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Position.parse(text)


@given(st.integers(0, 2**64 - 1))
def test_an_lsn_can_be_read_back(value: int) -> None:
    assert lsn.parse(lsn.show(value)) == value


@pytest.mark.parametrize("text", ["", "0", "/", "1/", "/1", "123456789/0", "0/g"])
def test_what_is_no_lsn_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        lsn.parse(text)


@pytest.mark.parametrize(
    ("patterns", "table", "expected"),
    [
        (["public.*"], ("public", "users"), True),
        (["public.*"], ("other", "users"), False),
        (["public.*", "!public.sess*"], ("public", "sessions"), False),
        (["!public.sessions", "public.*"], ("public", "sessions"), False),
        (["*.*"], ("any", "thing"), True),
        (["public.user?"], ("public", "users"), True),
        (["public.user?"], ("public", "user"), False),
        (['public."we.ird"'], ("public", "we.ird"), True),
        (["public.a+b"], ("public", "a+b"), True),
        (["public.a+b"], ("public", "aab"), False),
        (["public.Users"], ("public", "users"), False),
    ],
)
def test_patterns_choose_tables(patterns: list[str], table: tuple[str, str], expected: bool) -> None:
    assert Filter(patterns).matches(*table) is expected
