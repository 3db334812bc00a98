"""What a search engine answers."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec

from bridge.errors import BridgeError
from bridge.index import dialect, engine, mapping
from bridge.index.engine import Engine
from bridge.index.reason import Problem, blocked, scrub
from tests.fuzz.fuzzing import Target, outcome

PLANTED = "planted"
NOTHING: Any = None  # is sent
HERE = Engine(NOTHING, "http://127.0.0.1:9200", [])
DECODERS: list[msgspec.json.Decoder[Any]] = [
    engine._bulk_answer, engine._mget_answer, engine._search_answer, engine._count_answer, engine._index_answer,
    engine._any_answer,
]  # fmt: skip
REASON = (
    b'{"type":"mapper_parsing_exception","reason":"failed to parse field [n] of type [long] in document with id \'1\'. '
    b'Preview of field\'s value: \'planted\'","caused_by":{"type":"number_format_exception",'
    b'"reason":"For input string: \\"planted\\""}}'
)
ANSWERS = [
    b'{"errors":true,"items":[{"index":{"_index":"a-000001","status":201,"result":"created"}},{"delete":{"_index":"a",'
    b'"status":404,"result":"not_found"}},{"index":{"_index":"a","status":400,"error":%b}}]}' % REASON,
    b'{"docs":[{"_index":"a","_id":"1","_version":5,"found":true,"_source":{"a":1}},{"_id":"2","found":false}]}',
    b'{"took":1,"timed_out":false,"_shards":{"total":1,"successful":1,"failed":0},"hits":{"hits":[{"_id":"1","sort":[1],'
    b'"_source":{"a":[1]},"_routing":"r"}]}}',
    b'{"count":5,"_shards":{"total":1,"failed":0}}',
    b'{"error":%b,"status":400}' % REASON,
    b'{"error":{"type":"cluster_block_exception","reason":"index [a] blocked by: [X/12/planted]"},"status":403}',
    b'{"a-000001":{"aliases":{"a":{}},"mappings":{"_meta":{"source":"main"},"properties":{}},"settings":{"index":'
    b'{"uuid":"u"}}}}',
    b'{"name":"n","version":{"number":"2.19.1","distribution":"opensearch"},"tagline":"The OpenSearch Project"}',
    b'{"nodes":{"x":{"version":"8.17.0","modules":[{"name":"mapper-extras"}],"plugins":[]}}}',
    b'{"template":{"settings":{"index":{"refresh_interval":"7s","number_of_replicas":"2"}}}}',
    b'{"old":{"order":1,"index_patterns":["a-*"],"settings":{"index":{"refresh_interval":"1s"}}}}',
    b"<html>502 Bad Gateway</html>",
    b"",
]


def answered(data: bytes) -> str:
    """An answer is read or as good as none; what an engine says of a refusal never gets out as it is worded."""
    said = [outcome(partial(HERE._read, one, data), BridgeError) for one in DECODERS]
    for status in (400, 403, 429, 503):
        error = HERE._refusal(status, data, "POST /a-000001/_bulk")
        assert PLANTED not in str(error), "the engine's words get out"
        assert error.remedy
        said.append(type(error).__name__)
    try:
        problem = msgspec.json.decode(data, type=engine._Refusal).error
    except (msgspec.MsgspecError, ValueError, RecursionError):
        problem = ""
    if isinstance(problem, Problem):
        assert PLANTED not in scrub(problem, ["n"])
        said.append(str(blocked(problem, "a")))
    try:
        found = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return " ".join(said)
    product = dialect.recognized(found, found)
    said += [product.distribution, str(sorted(mapping.inherited(found, "a-000001")))]
    return " ".join(said)


WORDS = [b'"items":[', b'"error":', b'"status":403', b'"_index":"a"', b'"caused_by":', b'"version":', b'"nodes":{',
         b'"template":', b'"index_patterns":', b'"order":', b'"settings":', b'"hits":', b'"_source":']  # fmt: skip
TARGETS = [Target("engine", answered, ANSWERS, WORDS)]
