"""Random changes of bytes: some blind, some made for what is inside (numbers, brackets, quotation marks, text)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

LARGEST = 20_000
NUMBERS = [
    b"0",
    b"-1",
    b"01",
    b"1e999",
    b"1.",
    b"-",
    b"2147483648",
    b"18446744073709551616",
    b"9" * 400,
    b"NaN",
    b"1e5",
]
PIECES = [
    b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\\", b'"', b'\\"', b"\\u0000", b"\\ud800", b"{", b"}", b"[", b"]",
    b",", b":", b"null", b"true", b"\n", b"\r\n", b"\t", b" ", b"%s", b"{}", b"[" * 3000, b'{"a":' * 3000, b"'",
    "é".encode(), "😀".encode(), "\u2028".encode(), b"//", b"..", b"-", b"+",
]  # fmt: skip
_NUMBER = re.compile(rb"\d+")
_WORD = re.compile(rb"\w+")
_TEXT = re.compile(rb'"[^"]*"')

Change = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def _place(chance: random.Random, data: bytes) -> tuple[int, int]:
    start = chance.randint(0, len(data))
    return start, min(len(data), start + int(chance.paretovariate(0.7)))


def _flipped(chance: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    if not data:
        return data
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def _removed(chance: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = _place(chance, data)
    return data[:start] + data[end:]


def _repeated(chance: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = _place(chance, data)
    return data[:end] + data[start:end] * chance.randint(1, 3) + data[end:]


def _cut(chance: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data[: chance.randint(0, len(data))]


def _inserted(chance: random.Random, data: bytes, tokens: Sequence[bytes]) -> bytes:
    start, end = _place(chance, data)
    piece = chance.choice(tokens) if tokens and chance.random() < 0.6 else chance.choice(PIECES)
    return data[:start] + piece + data[chance.choice((start, end)) :]


def _noise(chance: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, _end = _place(chance, data)
    return data[:start] + chance.randbytes(chance.randint(1, 8)) + data[start:]


def _swapped(pattern: re.Pattern[bytes], pieces: Sequence[bytes]) -> Change:
    """Another piece in the place of something that the pattern finds."""

    def change(chance: random.Random, data: bytes, tokens: Sequence[bytes]) -> bytes:
        found = list(pattern.finditer(data))
        if not found:
            return data
        at = chance.choice(found)
        new = chance.choice(pieces or tokens or PIECES)
        return data[: at.start()] + new + data[at.end() :]

    return change


_CHANGES: list[Change] = [
    _flipped, _removed, _repeated, _cut, _inserted, _inserted, _noise, _swapped(_NUMBER, NUMBERS), _swapped(_WORD, ()),
    _swapped(_TEXT, [b'""', b'"\\u0000"', b"1", b"null", b"{}", b"[]", b'"' + b"x" * 300 + b'"', b'"a\\"b"']),
]  # fmt: skip


def mutated(chance: random.Random, data: bytes, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """`data` with one change or some; now and then the beginning of it with the end of another one."""
    if chance.random() < 0.1:
        other = chance.choice(others)
        data = data[: chance.randint(0, len(data))] + other[chance.randint(0, len(other)) :]
    for _ in range(min(8, int(chance.paretovariate(1.2)))):
        data = chance.choice(_CHANGES)(chance, data, tokens)
    return data[:LARGEST]
