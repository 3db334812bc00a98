"""docs/configuration.md: made of the configuration's structs (types, defaults) and bridge.example.toml (what for).

`python -m tests.reference` writes it; a test compares.
"""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union

import msgspec

from bridge import config
from bridge.config import Secret

ROOT = Path(__file__).parents[1]
EXAMPLE, PAGE = ROOT / "bridge.example.toml", ROOT / "docs" / "configuration.md"

HEAD = """# Configuration

One file, `bridge.toml` in the folder where a command is started, or the one that `--config` names. It is read once, at
the start; what is wrong in it is said all at once, with exit code 2. [bridge.example.toml](../bridge.example.toml) has
every key with its default, to copy from.

Each plain key is also an environment variable, which wins over the file: `BRIDGE_`, the section and the key in
capitals, with two underscores between them (`BRIDGE_STREAM__TLS__CA`, `BRIDGE_INDEX__MESSAGES__PASSWORD`). Lists are
separated by commas there. Secrets need not stand in the file: give them by variables, or by the keys that end in
`_file`.

Durations are `500ms`, `90s`, `2m`, `36h`, `7d`; sizes `512MB`, `10GB` (powers of 1,024). Files are found from the
configuration file's folder.
"""

_SECTION = re.compile(r'(?:# )?\[([\w.]+(?:\."[\w.]+")?)\]\s*(?:# (.*))?')
_KEY = re.compile(r"(?:# )?(\w+) = (?:[^#\"]|\"[^\"]*\")*(?:# (.*))?")
_MORE = re.compile(r"#?\s{20,}# (.*)")
SECTIONS: dict[str, tuple[str, type[msgspec.Struct]]] = {
    "source": ("[source]", config.Source),
    'source.table."public.users"': ('[source.table."SCHEMA.TABLE"]', config.Table),
    "stream": ("[stream]", config.Stream),
    "state": ("[state]", config.State),
    "snapshot": ("[snapshot]", config.Snapshot),
    "operate": ("[operate]", config.Operate),
    "index.messages": ("[index.NAME]", config.Index),
    'index.messages.of."public.pages"': ('[index.NAME.of."SCHEMA.TABLE"]', config.Part),
}


class Told(NamedTuple):
    """What the example says of a section and of its keys, in its order."""

    about: str
    keys: dict[str, str]


def told() -> dict[str, Told]:
    """What the example says, by section."""
    found: dict[str, Told] = {}
    section, key = "", ""
    for line in EXAMPLE.read_text().splitlines():
        if (match := _SECTION.fullmatch(line)) is not None:
            section, key = match[1], ""
            found[section] = Told(match[2] or "", {})
        elif section and (match := _MORE.fullmatch(line)) is not None and key:
            found[section].keys[key] += f" {match[1]}"
        elif section and (match := _KEY.fullmatch(line)) is not None:
            key = match[1]
            found[section].keys[key] = match[2] or ""
    return found


def kind(hint: Any) -> str:
    """A type in TOML's words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(f'`"{one}"`' for one in inner if one)
    if origin in (Union, types.UnionType):
        return " or ".join(kind(one) for one in inner if one is not types.NoneType)
    if origin in (list, dict):
        return "list" if origin is list else "table"
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return "table"
    return {bool: "`true` or `false`", int: "number", float: "number", Secret: "text, secret"}.get(hint, "text")


def default(field: msgspec.structs.FieldInfo) -> str:
    """A default as TOML has it; empty where there is none."""
    value = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
    if value is None or value == "" or value == [] or value == {} or isinstance(value, msgspec.Struct):
        return ""
    return f"`{msgspec.json.encode(value).decode()}`"


def page() -> str:
    """The whole page."""
    said, parts = told(), [HEAD]
    for name, (title, struct) in SECTIONS.items():
        about, hints = said[name], typing.get_type_hints(struct)
        parts += [f"## `{title}`\n", *([f"{about.about[:1].upper()}{about.about[1:]}.\n"] if about.about else [])]
        rows = ["| key | value | default | |", "|---|---|---|---|"]
        fields = {field.name: field for field in msgspec.structs.fields(struct)}
        for key, text in about.keys.items():
            cell = text.replace("|", "\\|").replace("*", "\\*")
            rows.append(f"| `{key}` | {kind(hints[key])} | {default(fields[key])} | {cell} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
