"""Every parser of bytes from outside, by the name of its target."""

from __future__ import annotations

from tests.fuzz import index, settings, source, stream

TARGETS = {target.name: target for target in [*source.TARGETS, *stream.TARGETS, *index.TARGETS, *settings.TARGETS]}
