"""docker-compose.yml and what it refers to fit together, as far as a parser can tell."""

from __future__ import annotations

import fnmatch
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge import configfile
from bridge.embedded.nats import find_program

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
BUILT = sorted(name for name, service in SERVICES.items() if "build" in service)
BRIDGES = ["bridge", "index"]
CLUSTER: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.cluster.yml").read_text())["services"]
NODES = ["nats", "nats-2", "nats-3"]


def dockerfile(service: str) -> Path:
    build = SERVICES[service]["build"]
    return ROOT / str(build["context"]) / str(build.get("dockerfile", "Dockerfile"))


def environment(service: str) -> dict[str, str]:
    """Its variables as the container sees them, with a password that is set."""
    variables = SERVICES[service].get("environment", {})
    return {name: re.sub(r"\$\{POSTGRES_PASSWORD:\?[^}]*\}", "p@ss/word", value) for name, value in variables.items()}


def started(*profiles: str) -> set[str]:
    """The services that `docker compose up` starts with these profiles: those without one always."""
    return {name for name, one in SERVICES.items() if not one.get("profiles") or set(one["profiles"]) & set(profiles)}


def test_the_log_is_there_by_itself_and_the_search_engine_with_its_profile() -> None:
    assert started() == {"postgres", "nats", "bridge"}
    assert started("search") == set(SERVICES) == {"postgres", "nats", "bridge", "opensearch", "index"}


@pytest.mark.parametrize("profiles", [(), ("search",)])
def test_nothing_that_is_started_waits_for_what_is_not(profiles: tuple[str, ...]) -> None:
    """Compose refuses such a file."""
    running = started(*profiles)
    for name in running:
        assert SERVICES[name].get("depends_on", {}).keys() <= running, name


def test_the_search_engine_starts_alone_as_the_readme_has_it() -> None:
    line = "POSTGRES_PASSWORD=none docker compose --profile search up --detach --wait opensearch"
    assert line in (ROOT / "README.md").read_text()
    assert "depends_on" not in SERVICES["opensearch"]
    assert "healthcheck" in SERVICES["opensearch"], "--wait waits for it"


def test_versions_are_whole_and_the_engine_is_that_of_the_tests() -> None:
    images = {name: str(one["image"]) for name, one in SERVICES.items() if "image" in one}
    assert all(re.search(r":\d+\.\d+\.\d+", image) for image in images.values()), images
    pom = (ROOT / "tests/engines/opensearch.pom.xml").read_text()
    assert f"<version>{images['opensearch'].partition(':')[2]}." in pom
    assert {str(CLUSTER[node]["image"]) for node in NODES[1:]} == {images["nats"]}


def test_no_password_is_in_the_files() -> None:
    for file in ("docker-compose.yml", "docker-compose.cluster.yml"):
        text = (ROOT / file).read_text()
        assert not re.findall(r"\$\{\w+:?-", text), "a default would be one"
        assert not re.search(
            r"(?im)^\s+\S*(?:password|token|secret)\S*: (?!(?:&password )?\$\{\w+:\?|\*password$)", text
        )
    assert "/.env" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("service", sorted(set(SERVICES) - {"postgres"}))
def test_a_service_may_do_what_its_work_needs(service: str) -> None:
    """postgres begins as root, gives its folder to its user and becomes that."""
    assert SERVICES[service]["cap_drop"] == ["ALL"]
    assert SERVICES[service]["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in SERVICES[service]
    assert "cap_add" not in SERVICES[service]


def test_the_search_engine_has_a_bound_and_a_heap_well_within_it() -> None:
    heap = re.findall(r"-Xm[sx](\d+)m", SERVICES["opensearch"]["environment"]["OPENSEARCH_JAVA_OPTS"])
    assert len(heap) == 2
    assert heap[0] == heap[1]
    limit = re.fullmatch(r"(\d+)g", SERVICES["opensearch"]["mem_limit"])
    assert limit is not None
    assert int(limit[1]) * 1024 >= 3 * int(heap[1])


def test_the_index_reader_is_asked_where_it_answers() -> None:
    where = environment("index")["BRIDGE_OPERATE__INDEX_HTTP"]
    assert f'urlopen("http://{where}/readyz"' in SERVICES["index"]["healthcheck"]["test"][-1]


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_each_service_has_either_an_image_or_a_dockerfile_that_exists(service: str) -> None:
    assert ("image" in SERVICES[service]) != ("build" in SERVICES[service])
    if "build" in SERVICES[service]:
        assert dockerfile(service).is_file()


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_a_service_waits_for_services_that_have_a_health_check(service: str) -> None:
    for other, how in SERVICES[service].get("depends_on", {}).items():
        assert how == {"condition": "service_healthy"}
        assert "healthcheck" in SERVICES[other], f"{service} waits for {other}, which never becomes healthy"


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_mounts_name_a_declared_volume_or_a_file_of_the_checkout(service: str) -> None:
    for mount in SERVICES[service].get("volumes", []):
        source = mount.split(":")[0]
        if source.startswith("."):
            assert (ROOT / source).is_file(), f"Docker would make a folder of the missing {source}"
        else:
            assert source in COMPOSE["volumes"]


def test_every_declared_volume_is_used() -> None:
    mounted = {mount.split(":")[0] for service in SERVICES.values() for mount in service.get("volumes", [])}
    assert set(COMPOSE["volumes"]) <= mounted


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_ports_are_published_on_loopback_only(service: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[service].get("ports", []))


def test_no_two_services_publish_one_port_and_a_reader_keeps_away_from_those_of_engines() -> None:
    published = [port.split(":")[1] for one in SERVICES.values() for port in one.get("ports", [])]
    assert len(published) == len(set(published))
    of_nodes = range(9200, 9401)  # http.port and transport.port of Elasticsearch and OpenSearch
    shown = (ROOT / "bridge.example.toml").read_text() + (ROOT / "docs/operations.md").read_text()
    readers = re.findall(r"(?i)index_http(?: = \"|.*: \"|=)127\.0\.0\.1:(\d+)", shown)
    readers.append(environment("index")["BRIDGE_OPERATE__INDEX_HTTP"].rpartition(":")[2])
    assert len(readers) > 2
    assert not [port for port in readers if int(port) in of_nodes]


@pytest.mark.parametrize("service", BRIDGES)
def test_the_environment_is_a_valid_configuration(service: str) -> None:
    loaded = configfile.load(None, environment(service))
    assert loaded.stream.hold_back == 0
    assert SERVICES[service]["command"] == {"bridge": ["run"], "index": ["index", *loaded.index]}[service]


def test_the_index_is_of_the_example_table() -> None:
    table = configfile.load(None, environment("index")).index["messages"].table
    assert f"CREATE TABLE {table.removeprefix('public.')} (" in (ROOT / "docker/initdb/20-example.sql").read_text()


def test_the_bridge_gives_any_password_to_the_server() -> None:
    given = environment("bridge")
    assert given["PGPASSWORD"] == environment("postgres")["POSTGRES_PASSWORD"] == "p@ss/word"
    assert "password" not in given["BRIDGE_SOURCE__DSN"], "it would have to be escaped there"


@pytest.mark.parametrize("service", BRIDGES)
def test_hosts_in_the_environment_are_services_with_that_port(service: str) -> None:
    found = [
        host
        for value in environment(service).values()
        for host in re.findall(r"(?:nats://|http://|@)([a-z]+:\d+)", value)
    ]
    # Published or not, each server listens on its usual port, the one that `ports` names on the right.
    known = {f"{name}:{port.split(':')[2]}" for name in SERVICES for port in SERVICES[name].get("ports", [])}
    assert found
    assert set(found) <= known


def test_only_the_bridge_itself_has_the_database() -> None:
    assert environment("bridge")["BRIDGE_SOURCE__DSN"].endswith("@postgres:5432/postgres")
    assert not [name for name in environment("index") if name.startswith(("BRIDGE_SOURCE", "PG"))]


def test_nats_reads_the_mounted_configuration_and_stores_in_its_volume() -> None:
    command, mounts = SERVICES["nats"]["command"], SERVICES["nats"]["volumes"]
    targets = [mount.split(":")[1] for mount in mounts]
    assert command[command.index("-c") + 1] in targets
    (store,) = re.findall(r"^\s*store_dir: (\S+)$", (ROOT / "nats-server.conf").read_text(), re.MULTILINE)
    assert store in targets
    assert "-sd" not in command


@pytest.mark.parametrize("service", BUILT)
def test_what_a_dockerfile_copies_exists_and_is_not_ignored(service: str) -> None:
    ignore = (ROOT / ".dockerignore").read_text().split()
    kept = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    for line in dockerfile(service).read_text().splitlines():
        if not line.startswith("COPY ") or "--from=" in line:
            continue
        for source in line.split()[1:-1]:
            assert (ROOT / source).exists(), f"{source} is missing"
            assert any(fnmatch.fnmatch(source.split("/")[0], pattern) for pattern in kept), f"{source} is ignored"


def test_the_image_does_not_run_as_root() -> None:
    users = [line.split()[1] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("USER ")]
    assert users
    assert users[-1] not in {"root", "0"}


def test_the_image_says_how_it_is_and_runs_the_command() -> None:
    text = (ROOT / "Dockerfile").read_text()
    (check,) = re.findall(r"^HEALTHCHECK (.*) CMD (.*)$", text, re.MULTILINE)
    assert {option.split("=")[0] for option in check[0].split()} >= {"--interval", "--timeout", "--start-period"}
    assert check[1].startswith("bridge replay --limit 1")
    assert 'ENTRYPOINT ["bridge"]' in text


def test_postgres_is_ready_for_logical_decoding() -> None:
    assert "wal_level=logical" in SERVICES["postgres"]["command"]
    image = dockerfile("postgres").read_text()
    version = re.search(r"^FROM postgres:(\d+)", image, re.MULTILINE)
    assert version is not None
    assert f"postgresql-{version[1]}-wal2json" in image
    # Named on the command line, an older minor release would refuse to start.
    assert not any("output_plugin_libraries" in word for word in SERVICES["postgres"]["command"])


@pytest.mark.parametrize("service", BRIDGES)
def test_in_a_cluster_every_server_is_named_and_keeps_a_copy(service: str) -> None:
    merged = {**environment(service), **CLUSTER[service]["environment"]}
    loaded = configfile.load(None, merged).stream
    assert loaded.servers == [f"nats://{node}:4222" for node in NODES]
    assert loaded.replicas == len(NODES)


@pytest.mark.parametrize("node", NODES)
def test_a_server_of_the_cluster_takes_its_options_and_has_a_store_of_its_own(node: str) -> None:
    service = {**SERVICES["nats"], **CLUSTER[node]}
    assert service["hostname"] == node
    assert [mount for mount in service["volumes"] if mount.startswith(f"{node}:")] == [f"{node}:/var/lib/nats"]
    options = ["-n", node, *service["command"]]
    assert options[options.index("--routes") + 1].split(",") == [f"nats://{other}:6222" for other in NODES]
    options[options.index("-c") + 1] = str(ROOT / "nats-server.conf")
    # The server's own check of its configuration, with the options as they are.
    done = subprocess.run([find_program(), *options, "-t"], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_waits_for_a_server_of_the_cluster_without_a_health_check() -> None:
    for service in CLUSTER.values():
        for other in service.get("depends_on", {}):
            assert "healthcheck" in {**SERVICES.get(other, {}), **CLUSTER[other]}
