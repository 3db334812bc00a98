"""Child servers: a throwaway PostgreSQL, nats-server and search engine for `demo` and the tests, and the supervised
nats-server of `servers = "embedded"`. No child outlives this process, not even when it is killed."""

from bridge.embedded.nats import NatsServer, find, supervised
from bridge.embedded.postgres import Postgres
from bridge.embedded.process import Keeper, Server, free_port, until
from bridge.embedded.search import SearchEngine

__all__ = [
    "Keeper",
    "NatsServer",
    "Postgres",
    "SearchEngine",
    "Server",
    "find",
    "free_port",
    "supervised",
    "until",
]
