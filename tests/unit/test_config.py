"""The configuration: files, environment, and every finding at once."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from bridge import config, configfile
from bridge.errors import ConfigError
from tests import reference

EXAMPLE = Path(__file__).parents[2] / "bridge.example.toml"


def load(tmp_path: Path, text: str, **environment: str) -> config.Config:
    file = tmp_path / "bridge.toml"
    file.write_text(text)
    return configfile.load(file, environment)


def findings(tmp_path: Path, text: str, **environment: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, **environment)
    assert error.value.exit_code == 2
    return str(error.value)


def test_the_example_is_the_defaults_and_names_every_key() -> None:
    assert configfile.load(EXAMPLE, {}) == msgspec.structs.replace(
        configfile.load(None, {}),
        stream=msgspec.structs.replace(configfile.load(None, {}).stream, store_dir=str(EXAMPLE.parent / "bridge-data")),
    )
    whole = re.sub(r"(?m)^# (?=[\[a-z])", "", EXAMPLE.read_text().split("\n\n", 1)[1])
    data = tomllib.loads(whole)
    kinds: dict[str, type[msgspec.Struct]] = {
        "source": config.Source, "stream": config.Stream, "snapshot": config.Snapshot, "state": config.State,
        "operate": config.Operate,
    }  # fmt: skip
    for section, kind in kinds.items():
        assert data[section].keys() == {f.name for f in msgspec.structs.fields(kind)}, section
    index = data["index"]["messages"]
    assert index.keys() == {f.name for f in msgspec.structs.fields(config.Index)}
    assert index["of"]["public.pages"].keys() == {f.name for f in msgspec.structs.fields(config.Part)}
    assert data["source"]["table"]["public.users"].keys() == {f.name for f in msgspec.structs.fields(config.Table)}


def test_the_reference_is_what_structs_and_example_say() -> None:
    assert reference.PAGE.read_text() == reference.page(), "write it anew: python -m tests.reference"
    for name, (_, kind) in reference.SECTIONS.items():
        # A table within a table has a section of its own.
        keys = {f.name for f in msgspec.structs.fields(kind)} - ({"table"} if name == "source" else {"of"})
        assert reference.told()[name].keys.keys() == keys, name


def test_names_that_follow_from_others_are_filled_in(tmp_path: Path) -> None:
    found = load(
        tmp_path, '[source]\nname = "Shop.eu"\n[stream]\nservers = "embedded"\n[index.posts]\ntable = "public.posts"'
    )
    assert (found.source.slot, found.stream.name, found.stream.sync) == ("bridge_shop_eu", "cdc_Shop_eu", "always")
    assert found.index["posts"].alias == "posts"
    assert found.stream.store_dir == str(tmp_path / "bridge-data")
    assert found.stream.hold_back == 0


def test_an_acks_hold_back_follows_sync(tmp_path: Path) -> None:
    assert load(tmp_path, "").stream.hold_back == 120
    assert load(tmp_path, '[stream]\nsync = "500ms"').stream.hold_back == 0.5


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    found = load(
        tmp_path, '[source]\nname = "file"\n[stream]\nreplicas = 1',
        BRIDGE_SOURCE__NAME="env", BRIDGE_SOURCE__TABLES="a.x, b.*", BRIDGE_STREAM__REPLICAS="3",
        BRIDGE_STREAM__SERVERS="nats://a:1,nats://b:2", BRIDGE_INDEX__POSTS__TABLE="a.x",
        BRIDGE_STREAM__TLS__CA="ca.pem", BRIDGE_INDEX__POSTS__REJECT_LIMIT="0.25",
        BRIDGE_INDEX__POSTS__URL="https://a:9200", BRIDGE_INDEX__POSTS__TLS__CA="bridge.toml",
        BRIDGE_INDEX__POSTS__USER="u", BRIDGE_INDEX__POSTS__PASSWORD="p", BRIDGE_SOURCE__FAILOVER="true",
    )  # fmt: skip
    assert (found.source.name, found.source.tables, found.stream.replicas) == ("env", ["a.x", "b.*"], 3)
    assert found.source.failover is True
    assert found.stream.servers == ["nats://a:1", "nats://b:2"]
    assert found.index["posts"].table == "a.x"
    assert found.stream.tls.ca == str(tmp_path / "ca.pem")
    posts = found.index["posts"]
    assert (posts.tls.ca, posts.tls.cert, posts.reject_limit) == (str(tmp_path / "bridge.toml"), "", 0.25)
    assert (posts.user, posts.password) == ("u", "p")


def test_embedded_may_come_from_the_environment() -> None:
    assert configfile.load(None, {"BRIDGE_STREAM__SERVERS": "embedded"}).stream.embedded


def test_every_finding_is_named_at_once(tmp_path: Path) -> None:
    text = findings(
        tmp_path,
        '[source]\nnam = "x"\nslot = "Bad-Slot"\ntables = ["nodot"]\n[stream]\nreplicas = "three"\nmax_age = "soon"\n'
        '[index.Bad]\ntable = "a.b"\nurl = "ftp://x"\n[nonsense]\n[source.table."public.users"]\nexlude = ["x"]',
        BRIDGE_STREAM__NONSENSE="1",
    )
    for expected in ["source.nam: no such key (is it name?)", "stream.replicas", "nonsense: no such key", "exlude",
                     "BRIDGE_STREAM__NONSENSE: no such key", "source.slot", "nodot", "stream.max_age: ", "index.Bad: ",
                     "http://"]:  # fmt: skip
        assert expected in text
    text = findings(
        tmp_path,
        '[source]\nslot = "Bad-Slot"\ntables = ["nodot"]\n[stream]\nmax_age = "soon"\nsync = "replicated"\n'
        'user = "a"\ntoken = "b"\n[index.Bad]\ntable = "a.b"\nurl = "ftp://x"\ncolumns = ["a"]\nexclude = ["b"]',
    )
    for expected in ["source.slot", "nodot", "stream.max_age", "needs replicas", "user, token", "index.Bad", "http://",
                     "exclude each other"]:  # fmt: skip
        assert expected in text


@pytest.mark.parametrize("wrong", ['replicas = "three"', "replicas = 9"])
def test_what_follows_from_another_finding_is_no_finding(tmp_path: Path, wrong: str) -> None:
    text = findings(tmp_path, f'[stream]\nsync = "replicated"\n{wrong}\n[index.posts]\nurl = 1\nalias = 2')
    assert [line.split(": ")[0] for line in text.splitlines()[1:-1]] == [
        *(['  - stream.replicas'] if "three" in wrong else []),
        '  - index."posts".url', '  - index."posts".alias',
        *(['  - stream.replicas'] if "9" in wrong else []),
        '  - index.posts.table',
    ]  # fmt: skip


def test_a_table_named_twice_is_one_finding(tmp_path: Path) -> None:
    text = findings(tmp_path, '[index.posts]\ntables = ["a.b", "a.b"]')
    assert [line.split(": ")[0] for line in text.splitlines()[1:-1]] == ["  - index.posts.tables"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[source]\non_gap = "resnapshot"\n[snapshot]\nmode = "never"', "source.on_gap: "),
        ('[snapshot]\non_rewrite = "stop"', "snapshot.on_rewrite"),
        ('[source]\non_rewrite = "warn"', "source.on_rewrite: no such key"),
        ('[stream]\npublish = "single"', "stream.publish"),
        ('[stream]\nmode = "compact"\nmax_age = "7d"', "stream.max_age: a compacted log keeps every row"),
        ('[stream]\nmode = "compact"\nmax_bytes = "1GB"', "stream.max_bytes"),
        ('[stream]\nmode = "compact"\ndiscard = "new"', "stream.discard"),
        ('[stream]\nmode = "compact"\npublish = "chain"', "stream.publish"),
        ('[stream]\nreplicas = 3\npublish = "chain"', "stream.publish"),
        ('[stream]\nmode = "compact"\ntombstone_ttl = "500ms"', "stream.tombstone_ttl"),
        ('[stream]\ntombstone_ttl = "soon"', "stream.tombstone_ttl"),
        ("[index.posts]", "index.posts.table: is missing"),
        ('[index.posts]\ntable = "a.b"\ntables = ["a.b"]', "index.posts: table and tables"),
        ('[index.posts]\ntables = ["a.b", "a.b"]', "index.posts.tables: names a table twice"),
        (
            '[index.posts]\ntable = "a.b"\ncolumns = ["a"]\nrename = { b = "c" }',
            "rename: names b, which columns leaves out",
        ),
        ('[index.posts]\ntable = "a.b"\nexclude = ["b"]\nrename = { b = "c" }', "names b, which exclude leaves out"),
        ('[index.posts]\ntable = "a.b"\n[index.posts.of."a.c"]\nid = "x"', 'index.posts.of."a.c": is not among'),
        ('[index.posts]\ntables = ["a.b", "a.c"]\nid = "{id}"', "index.posts.id: rows of several tables"),
        ('[index.posts]\ntables = ["a.b", "a.c"]\n[index.posts.of."a.b"]\nid = "a.c|{id}"', "cannot hold |"),
        ('[index.posts]\ntable = "a.b"\nid = "post"', "index.posts.id: the template 'post' names no column"),
        ('[index.posts]\ntable = "a.b"\nid = "{a}{b}"', "needs text between"),
        ('[index.posts]\ntable = "a.b"\nid = "{a!r}"', "must name columns plainly"),
        ('[index.posts]\ntable = "a.b"\nid = "{a"', "index.posts.id: "),
        ('[index.posts]\ntable = "a.b"\nconstants = { _bridge = 1 }', "index.posts.constants: _bridge"),
        ('[index.posts]\ntables = ["a.b"]\n[index.posts.of."a.b"]\ntransform = "x"', 'of."a.b".transform: must look'),
        ('[index.posts]\ntables = ["a.b"]\n[index.posts.of."a.b"]\nrouted = "x"', "no such key (is it r"),
        ('[index.posts]\ntable = "a.b"\nreject_limit = 1.5', "index.posts.reject_limit: a share"),
        ('[index.posts]\ntable = "a.b"\ntls = { ca = "no.pem" }', "no.pem cannot be read"),
        ('[operate]\nhttp = "9300"', "operate.http: '9300' is not an address such as 127.0.0.1:9300"),
        ('[operate]\nindex_http = "auto"', "operate.index_http: 'auto' is not an address"),
        (
            '[operate]\nhttp = "[::1]:9"\nindex_http = "[::1]:9"',
            "operate.index_http: is the address of operate.http, too",
        ),
        ('[operate]\nhosts = ["http://bridge:9300"]', "operate.hosts: 'http://bridge:9300' is no host name"),
        ('[operate]\nready_within = "soon"', "operate.ready_within: 'soon' is not a duration"),
        ("[operate]\ntable_metrics = -1", "operate.table_metrics: 0 to 10,000"),
        ('[operate]\ntoken = "short"', "operate.token: needs at least 16 printable characters"),
        ('[operate]\ntoken_file = "nosuch"', "operate.token_file: "),
        ('[index.posts]\ntable = "a.b"\ntls = { ca = "bridge.toml" }', "index.posts.tls: is for urls that begin with"),
        ('[index.posts]\ntable = "a.b"\nurl = "https://a"\ntls = { key = "bridge.toml" }', "of no use without cert"),
        ('[index.posts]\ntable = "a.b"\ntls = { cat = "x" }', 'index."posts".tls.cat: no such key'),
        ('[index.a]\ntable = "s.t"\n[index.a-000001]\ntable = "s.t"', "index.a-000001: a-000001 is what a generation"),
        ('[index.a]\ntable = "s.t"\n[index.b]\ntable = "s.t"\nalias = "a-000002-w"', "index.b: a-000002-w is what"),
        ('[index.a]\ntable = "s.t"\n[index.a-until-7]\ntable = "s.t"', "index.a-until-7: a-until-7 is what"),
        ('[index.a-until-7]\ntable = "s.t"', "index.a-until-7: names that end with -until- and a number"),
        ('[index.a]\ntable = "s.t"\nalias = "a-000003"', "index.a.alias: is what a generation of this index"),
        ('[index.a]\ntable = "s.t"\n[index.b]\ntable = "s.t"\nalias = "a"', "index.b.alias: is that of index a, too"),
        ('[index.a]\ntable = "public.*"', "index.a: public.* is a pattern"),
        ('[index.a]\ntable = "s.t"\nalias = "w-*"', "index.a.alias: takes no spaces, commas"),
        ('[index.a]\ntable = "s.t"\nalias = "a,b"', "index.a.alias: takes no spaces, commas"),
        ('[index.a]\ntable = "s.t"\nalias = "_x"', "index.a.alias: takes no spaces, commas"),
        ("[index]\nposts = 1", "expected a table"),
        ("[stream]\nservers = []", "stream.servers"),
        ('[source]\ntables = ["!public.x"]', "names no table"),
    ],
)
def test_an_impossible_value_names_its_key(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in findings(tmp_path, text)


@pytest.mark.parametrize("alias", ["posts", "Posts.2026", ".hidden", "a-b_c", "\u00e9t\u00e9"])
def test_an_alias_may_be_what_engines_take(tmp_path: Path, alias: str) -> None:
    assert load(tmp_path, f'[index.a]\ntable = "s.t"\nalias = "{alias}"').index["a"].alias == alias


def test_what_comes_later_may_have_its_default(tmp_path: Path) -> None:
    load(tmp_path, '[source]\non_gap = "stop"\nmessages = []\nonly_local = false')


def test_broken_toml_and_missing_files_are_configuration_errors(tmp_path: Path) -> None:
    assert "not valid TOML" in findings(tmp_path, "[source\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        configfile.load(tmp_path / "none.toml", {})
    (tmp_path / "latin.toml").write_bytes(b'x = "\xff"')
    with pytest.raises(ConfigError, match="UTF-8"):
        configfile.load(tmp_path / "latin.toml", {})


def test_secrets_never_show_in_a_repr(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("planted-from-file\n")
    found = load(
        tmp_path,
        '[source]\ndsn = "postgresql://u:planted1@h/db"\n[stream]\nuser = "u"\npassword = "planted2"\n'
        '[index.posts]\ntable = "a.b"\napi_key_file = "key"',
    )
    assert found.index["posts"].api_key == "planted-from-file"
    assert found.source.dsn.startswith("postgresql://u:planted1")
    assert "planted" not in repr(found)
    assert config.hide("nats://u:planted@host:4222") == "nats://***@host:4222"


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("90s", 90), ("2m", 120), ("1.5h", 5400), ("7d", 604_800)]
)
def test_durations(text: str, seconds: float) -> None:
    assert config.duration(text) == seconds


@pytest.mark.parametrize(("text", "size"), [("1024", 1024), ("10KB", 10240), ("1GB", 1 << 30), ("2 TB", 2 << 40)])
def test_sizes(text: str, size: int) -> None:
    assert config.size(text) == size


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a.b", ("a", "b")), ('"A.x"."b ""q"""', ("A.x", 'b "q"')), ("public.we ird", ("public", "we ird"))],
)
def test_table_names_are_split_at_their_dot(text: str, expected: tuple[str, str]) -> None:
    assert config.split_name(text) == expected


@pytest.mark.parametrize("text", ["", "a", "a.b.c", '"a.b', ".b", "a."])
def test_what_is_no_table_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        config.split_name(text)


@pytest.mark.parametrize(
    ("keys", "finding"),
    [
        ('numeric = "float"', "index.posts.numeric"),
        ('numeric = "scaled_float:0"', "index.posts.numeric"),
        ('json = "nested"', 'index."posts".json'),
        ('mapping = "m.json"\nnumeric = "double"', "index.posts.numeric: the file of `mapping`"),
        ('mapping = "m.json"\nfields = { a = { type = "long" } }', "index.posts.fields: the file of `mapping`"),
        ("fields = { a = { scaling_factor = 10 } }", "index.posts.fields.a: names no type"),
        ('fields = { _bridge = { type = "long" } }', "index.posts.fields._bridge"),
        ('exclude = ["a"]\nfields = { a = { type = "long" } }', "index.posts.fields.a: exclude"),
        ('rename = { a = "b" }\nfields = { a = { type = "long" } }', "calls that column b in the document"),
    ],
)
def test_fields_that_cannot_be_are_found(tmp_path: Path, keys: str, finding: str) -> None:
    assert finding in findings(tmp_path, f'[index.posts]\ntable = "public.posts"\n{keys}')


def test_fields_are_taken_by_the_names_in_the_document(tmp_path: Path) -> None:
    keys = """numeric = "scaled_float:100"
        json = "flat"
        rename = { a = "b", b = "a" }
        fields = { a = { type = "long" }, price = { type = "scaled_float", scaling_factor = 100 } }"""
    found = load(tmp_path, f'[index.posts]\ntable = "public.posts"\n{keys}').index["posts"]
    assert found.fields["price"] == {"type": "scaled_float", "scaling_factor": 100}
    assert (found.numeric, found.json) == ("scaled_float:100", "flat")


def test_defaults_alone_are_a_file_that_was_not_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for nothing in ({}, {"BRIDGE_FAILPOINT": "x", "PGPASSWORD": "p", "HOME": "/"}):
        with pytest.raises(ConfigError) as found:
            configfile.chosen(None, nothing)
        assert f"there is no bridge.toml in {tmp_path}" in found.value.what
        assert "--config FILE" in found.value.remedy
        assert "bridge.example.toml" in found.value.remedy
    assert configfile.chosen(None, {"PGSERVICE": "app"}) == configfile.load(None, {})
    assert configfile.chosen(None, {"BRIDGE_SOURCE__NAME": "a"}).source.name == "a"
    with pytest.raises(ConfigError, match=f"in the environment .there is no bridge.toml in {tmp_path}"):
        configfile.chosen(None, {"BRIDGE_SOURCE__NAEM": "a"})
