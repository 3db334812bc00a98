"""The configuration read from TOML and the environment, checked once, every finding at once.

Every plain key is also an environment variable, `BRIDGE_SOURCE__DSN` for `[source] dsn`, which wins over the file;
lists are comma-separated there.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from bridge.config import Config, Index, Secret, Tls
from bridge.configcheck import check
from bridge.errors import ConfigError

DEFAULT = Path("bridge.toml")
ENVIRONMENT = "BRIDGE_"
# Any of these says which database an empty dsn means.
LIBPQ = ("PGHOST", "PGHOSTADDR", "PGDATABASE", "PGSERVICE")


def chosen(path: Path | None, environment: Mapping[str, str] = os.environ) -> Config:
    """The same as `load`, where anybody has said anything: defaults alone are somebody who forgot the file.

    Raises:
        ConfigError: as `load`, or there is neither a file nor a variable.
    """
    if path is None and not any(_is_key(name) or name in LIBPQ for name in environment):
        raise ConfigError(
            f"nothing is configured: there is no {DEFAULT} in {_here()}, and no variable {ENVIRONMENT}SECTION__KEY",
            f"name the file with --config FILE, or write {DEFAULT} there: bridge.example.toml lists every key",
        )
    return load(path, environment)


def _is_key(variable: str) -> bool:
    return variable.startswith(ENVIRONMENT) and "__" in variable


def _here() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return "the present folder, which is gone"


def load(path: Path | None, environment: Mapping[str, str] = os.environ) -> Config:
    """The configuration from `path` (None: the environment alone) and `environment`.

    Raises:
        ConfigError: names every wrong, unknown, missing or impossible key at once.
    """
    data = _read(path) if path is not None else {}
    findings: list[str] = []
    _overlay(data, environment, findings)
    config: Config = _complete(_build(Config, data, "", findings), path, findings)
    if findings:
        where = str(path) if path is not None else f"the environment (there is no {DEFAULT} in {_here()})"
        if path is not None and any(_is_key(name) for name in environment):
            where = f"{path} and the environment, whose variables win"
        raise ConfigError(
            f"{len(findings)} finding{'s'[: len(findings) != 1]} in {where}:\n"
            + "\n".join(f"  - {f}" for f in findings),
            "correct the keys named above; bridge.example.toml lists every key with its default",
        )
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", "correct that line") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply", "write fewer brackets within each other") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not valid UTF-8", "save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "name the file with --config FILE") from None


def _overlay(data: dict[str, Any], environment: Mapping[str, str], findings: list[str]) -> None:
    for variable in sorted(environment):
        if not _is_key(variable):
            continue
        path = variable.removeprefix(ENVIRONMENT).lower().split("__")
        kind = _type_at(path)
        if kind is None:
            findings.append(f"{variable}: no such key{_nearby(path)}")
            continue
        text = environment[variable]
        value: Any = text
        if kind in (int, float, bool):
            try:
                value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
            except (ValueError, KeyError):
                findings.append(f"{variable}: expected {'true or false' if kind is bool else 'a number'}")
                continue
        elif "list" in str(kind) and text != "embedded":
            value = [part.strip() for part in text.split(",") if part.strip()]
        here = data
        for name in path[:-1]:
            here = here.setdefault(name, {})
            if not isinstance(here, dict):
                findings.append(f"{variable}: {name} is no section in the file")
                break
        else:
            here[path[-1]] = value


def _nearby(path: list[str]) -> str:
    """The variable that was probably meant."""
    known = [
        f"{section}__{field.name}".upper()
        for section, kind in get_type_hints(Config).items()
        if isinstance(kind, type)
        for field in msgspec.structs.fields(kind)
    ]
    close = difflib.get_close_matches("__".join(path).upper(), known, 1)
    return f" (is it {ENVIRONMENT}{close[0]}?)" if close else ""


def _type_at(path: list[str]) -> Any:
    """The type of a plain key, None where there is no such key."""
    if len(path) == 3 and path[0] == "index":
        kind: Any = get_type_hints(Index).get(path[2])
    elif path[:-1] == ["stream", "tls"] or (len(path) == 4 and path[::2] == ["index", "tls"]):
        kind = get_type_hints(Tls).get(path[-1])
    elif len(path) == 2 and path[0] != "index":
        section = get_type_hints(Config).get(path[0])
        kind = get_type_hints(section).get(path[1]) if isinstance(section, type) else None
    else:
        return None
    if kind is Tls or "dict" in str(kind):
        return None
    return bool if kind == (bool | None) else kind


def _hook(kind: type[Any], value: Any) -> Any:
    if kind is Secret and isinstance(value, str):
        return Secret(value)
    raise TypeError(f"Expected `{kind.__name__}`")


def _build(kind: type[Any], data: Any, path: str, findings: list[str]) -> Any:
    """A struct of `kind` from `data`; each wrong key becomes a finding and has its default, so that the others are
    checked as well."""
    if not isinstance(data, dict):
        findings.append(f"{path}: expected a table")
        return None
    values: dict[str, Any] = {}
    hints = get_type_hints(kind)
    known = {field.name: field for field in msgspec.structs.fields(kind)}
    for name in sorted(data.keys() - known.keys()):
        close = difflib.get_close_matches(name, known, 1)
        findings.append(f"{_join(path, name)}: no such key" + (f" (is it {close[0]}?)" if close else ""))
    for name in known:
        where = _join(path, name)
        if name not in data:
            continue
        value = _value(hints[name], data[name], where, findings)
        if value is not None:
            values[name] = value
    return kind(**values)


def _value(hint: Any, value: Any, where: str, findings: list[str]) -> Any:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return _build(hint, value, where, findings)
    inner = get_args(hint)[-1] if "dict" in str(hint) else None
    if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
        if not isinstance(value, dict):
            findings.append(f"{where}: expected a table")
            return None
        built = {name: _build(inner, part, f'{where}."{name}"', findings) for name, part in value.items()}
        return {name: part for name, part in built.items() if part is not None}
    if hint == list[str] and isinstance(value, str) and where.endswith(".url"):
        value = [value]
    if "embedded" in str(hint) and isinstance(value, str) and value != "embedded":
        value = [value]
    if isinstance(value, str) and "\0" in value:
        findings.append(f"{where}: holds a zero character, which no path, name or server takes")
        return None
    try:
        return msgspec.convert(value, hint, dec_hook=_hook)
    except msgspec.ValidationError as error:
        choices = " or ".join([f'"{one}"' for one in _choices(hint)])
        also = "a list of texts, or " if "list" in str(hint) else ""
        why = f"expected {also}{choices}" if choices else _plainly(str(error))
        findings.append(f"{where}: {why}")
        return None


_TOML = {"array": "a list", "str": "a text", "object": "a table", "int": "a whole number", "float": "a number",
         "bool": "true or false", "Secret": "a text"}  # fmt: skip


def _plainly(error: str) -> str:
    """What msgspec says of a value, in TOML's words."""
    what, _, where = error.partition(" - at")
    within = " in it" if "[" in where or "." in where.replace("$.", "", 1) else ""
    return (
        re.sub(r"`([A-Za-z]+)( \| null)?`", lambda m: _TOML.get(m[1], m[1]), what.replace("Expected", "expected"))
        + within
    )


def _choices(hint: Any) -> list[object]:
    """The values that a key may have, where there are only some."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [one for part in get_args(hint) if get_origin(part) is Literal for one in get_args(part)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _complete(config: Config, path: Path | None, findings: list[str]) -> Config:
    """`config` with the names that follow from others, its relative files found beside the configuration file."""
    base = path.parent if path is not None else Path()
    source, stream = config.source, config.stream
    plain = re.sub(r"[^a-z0-9_]", "_", source.name.lower())
    source = msgspec.structs.replace(source, slot=source.slot or f"bridge_{plain}"[:63])
    source = msgspec.structs.replace(source, **_secrets(base, source, ("dsn", "mask_key"), "source", findings))
    stream = msgspec.structs.replace(
        stream,
        name=stream.name or "cdc_" + re.sub(r"[^A-Za-z0-9_-]", "_", source.name),
        sync=stream.sync or ("always" if stream.embedded else "2m"),
        store_dir=str(base / stream.store_dir),
        **{k: str(base / v) for k in ("credentials", "nkey_seed_file") if (v := getattr(stream, k))},
        tls=_beside(base, stream.tls),
        **_secrets(base, stream, ("password", "token"), "stream", findings),
    )
    indexes = {}
    for name, index in config.index.items():
        changes: dict[str, Any] = {"alias": index.alias or name, "tls": _beside(base, index.tls)}
        if index.mapping:
            changes["mapping"] = str(base / index.mapping)
        changes |= _secrets(base, index, ("password", "api_key"), f"index.{name}", findings)
        indexes[name] = msgspec.structs.replace(index, **changes)
    operate = config.operate
    operate = msgspec.structs.replace(operate, **_secrets(base, operate, ("token",), "operate", findings))
    config = msgspec.structs.replace(config, source=source, stream=stream, operate=operate, index=indexes)
    check(config, findings)
    return config


def _beside(base: Path, tls: Tls) -> Tls:
    return Tls(**{k: str(base / v) for k in ("ca", "cert", "key") if (v := getattr(tls, k))})


def _secrets(base: Path, section: Any, keys: tuple[str, ...], where: str, findings: list[str]) -> dict[str, Secret]:
    """Those of a section's secrets that are in files: KEY_file names the file that holds KEY."""
    found: dict[str, Secret] = {}
    for key in keys:
        file = getattr(section, f"{key}_file")
        if not file:
            continue
        if getattr(section, key):
            findings.append(f"{where}: {key} and {key}_file exclude each other")
        try:
            found[key] = Secret((base / file).read_text(encoding="utf-8").strip())
        except (OSError, UnicodeDecodeError):
            findings.append(f"{where}.{key}_file: {base / file} cannot be read")
    return found
