"""What to try by hand while the demo's servers stay up."""

from __future__ import annotations

import shlex
import shutil

from rich.text import Text

from bridge.demo.children import INDEX, Site
from bridge.embedded import NatsServer, Postgres, SearchEngine

_UPDATE = "UPDATE messages SET subject = 'Hello, world' WHERE id = 1"


def commands(postgres: Postgres, nats: NatsServer, engine: SearchEngine, site: Site) -> Text:
    """Commands to copy, each with what it shows; those of programs that are not installed are left out."""
    psql = "psql" if shutil.which("psql") else str(postgres.bindir / "psql")
    dsn, url = postgres.dsn(), engine.url
    found: list[tuple[str, list[str]]] = [
        (
            "change something",
            [
                shlex.join([psql, dsn]),
                f'{shlex.join([psql, dsn])} -c "{_UPDATE}"',
            ],
        ),
        (
            "and find it",
            [
                f"curl -s '{url}/{INDEX}/_doc/1?_source_excludes=body&pretty'",
                f"curl -s '{url}/{INDEX}/_search?q=subject:hello&_source=id,subject&pretty'",
                f"curl -s '{url}/_cat/aliases?v'",
            ],
        ),
        (
            "the log, from its beginning and as it goes on",
            [
                shlex.join(site.command("replay", "--limit", "3")),
                shlex.join(site.command("replay", "--subject", "cdc.main.public.messages", "--follow")),
            ],
        ),
        ("build the index anew", [shlex.join(site.command("reindex", INDEX))]),
        ("logs and configuration", [f"tail -f {shlex.quote(str(site.folder))}/*.log", f"cat {site.config}"]),
    ]
    if shutil.which("nats"):
        with_server = f"nats --server {nats.url}"
        shown = ["stream ls", "stream subjects cdc_main", "kv ls bridge", "kv get bridge checkpoint.main --raw"]
        found.insert(3, ("what JetStream has", [f"{with_server} {rest}" for rest in [*shown, "consumer ls cdc_main"]]))
    text = Text("\nThe servers stay up; Ctrl-C ends them. Try, in another terminal:\n")
    for title, lines in found:
        text.append(f"\n  # {title}\n", style="dim")
        text.append("".join(f"  {line}\n" for line in lines))
    return text
