"""The command line: options in, one command run, an exit code out. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
from cyclopts import App, CycloptsError, Group, Parameter, UnknownOptionError, UnusedCliTokensError

from bridge import __version__, configfile, console, errors, log, structured
from bridge.commands import check as cli_check
from bridge.commands import index as cli_index
from bridge.commands import snapshot as cli_snapshot
from bridge.commands import status as cli_status
from bridge.config import Config
from bridge.errors import BridgeError, Unavailable, UsageError
from bridge.stream.server import Servers

HELP = """Turn a PostgreSQL database into a replayable NATS JetStream log, and keep search indexes built from it.

Without a command it runs the bridge."""
EPILOGUE = """Exit codes: 0 done; 1 a check or comparison found something; 2 usage or configuration; 3 a contradiction
that needs a person (gap, fenced, foreign writer, missing identity); 4 a server refused or lacks what is needed
(credentials, plugin, privilege); 130 interrupted; 141 whoever read the output has left (as `| head -1` does)."""
COMMON = ["--config", "--log-format", "--verbose", "--help", "--version"]


def _shown(default: object) -> str | None:
    """A default as the help shows it: that an option is not given needs no words."""
    return None if default in (None, False, 0, "") else str(default)


app = App(
    name="bridge",
    help=HELP,
    help_epilogue=EPILOGUE,
    version=__version__,
    version_flags=["--version"],
    console=console.Plain(),
    default_parameter=Parameter(show_default=_shown),
    group_parameters=Group("Options", sort_key=-1),
)
app.meta.group_parameters = Group("Options for every command", sort_key=0)
_chosen: dict[str, Any] = {"config": None, "verbose": 0, "form": "text"}


@app.default
@app.command
def run() -> int:
    """Run the bridge until it is stopped: snapshot, then stream. This is the default.

    SIGHUP reads the configuration anew and goes on with it.
    """
    from bridge.operate import beside
    from bridge.operate.around import around, bound
    from bridge.operate.show import snapshot as show_snapshot
    from bridge.pipeline.run import run as bridge
    from bridge.reload import with_reloads

    settings = _config()

    async def work(stop: anyio.Event) -> None:
        async with bound(settings.operate.http) as sockets, _own(settings) as own:

            async def once(now: Config, ending: anyio.Event) -> None:
                servers = own if now.stream.embedded else list(now.stream.servers)
                async with around(now, _running(now), sockets, _options()):
                    await bridge(now, servers, ending, show_snapshot.initial, lambda: beside.tell(now, servers))

            await with_reloads(settings, _config, stop, once, "http")

    return console.serve(work)


@app.command(usage="Usage: bridge index [OPTIONS] [NAMES...]")
def index(*names: str, show_mapping: Annotated[bool, Parameter(negative=())] = False) -> int:
    """Keep search indexes in step with the log until stopped; without NAME all that are configured.

    SIGHUP reads the configuration anew and goes on with it.

    Parameters
    ----------
    names
        Indexes, as their sections [index.NAME] are called.
    show_mapping
        Print the settings and mappings that a rebuild of NAME would make now, as JSON, and do nothing else.
    """
    from bridge.index.indexer import run_index
    from bridge.operate.http import web
    from bridge.reload import with_reloads

    settings = cli_index.having(_config(), names)
    chosen = list(names) or list(settings.index)
    if show_mapping:
        if len(chosen) != 1:
            raise UsageError("--show-mapping shows one index", f"name it: bridge index {chosen[0]} --show-mapping")
        return _show_mapping(settings, chosen[0])

    async def work(stop: anyio.Event) -> None:
        async with web.bound(settings.operate.index_http, "index_http") as sockets:

            async def once(now: Config, ending: anyio.Event) -> None:
                fed, servers = list(names) or list(now.index), _running(now)
                async with web.beside_indexes(now, servers, sockets, fed), anyio.create_task_group() as tasks:
                    tasks.start_soon(run_index, now, fed, servers)
                    await ending.wait()
                    tasks.cancel_scope.cancel()

            await with_reloads(settings, lambda: cli_index.having(_config(), names), stop, once, "index_http")

    return console.serve(work)


@app.command
def reindex(
    name: str,
    /,
    *,
    until: str | None = None,
    mapping: Path | None = None,
    keep_old: Annotated[bool, Parameter(negative=())] = False,
    back: Annotated[bool, Parameter(negative=())] = False,
    drop_old: Annotated[bool, Parameter(negative=())] = False,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    replace_index: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Build an index anew from the log's start, and switch its alias when it has caught up.

    Ctrl-C and SIGTERM take away what was begun; killed in any other way, the same command goes on with it.

    Parameters
    ----------
    name
        The index, as its section [index.NAME] is called.
    until
        Build it as it was at a sequence or a time such as 2026-01-31T12:00:00Z, beside the live one, under the alias
        NAME-until-SEQUENCE; with --drop-old: delete that one.
    mapping
        A mapping file for this rebuild in place of the configured one.
    keep_old
        Keep the generation that was in use, and keep it up to date.
    back
        Let searches see the kept generation again; the one in use is kept in its place.
    drop_old
        Delete the generations that are kept.
    dry_run
        Say what would be done, and do nothing.
    replace_index
        If an index, not an alias, has the alias' name: remove it in the call that sets the alias.
    """
    from bridge import reindex as commands

    settings = _config()
    cli_index.known(settings, name)
    asked = commands.Asked(name, until, str(mapping or ""), keep_old, back, drop_old, dry_run, replace_index)
    return commands.command(settings, asked, _running(settings))


@app.command
def replay(
    *,
    subject: Annotated[list[str] | None, Parameter(negative=())] = None,
    from_: Annotated[str, Parameter(name="--from")] = "start",
    follow: Annotated[bool, Parameter(negative=())] = False,
    limit: int | None = None,
) -> int:
    """Print the log's events as JSON lines.

    Parameters
    ----------
    subject
        Only this subject, wildcards allowed (cdc.main.public.users, cdc.main.*.users); may be given several times.
    from_
        Where to begin: start, a sequence, or a time such as 2026-01-31T12:00:00Z.
    follow
        Go on with what comes, until interrupted.
    limit
        End after this many events.
    """
    from bridge.outpipe import CHUNK, Out
    from bridge.replay import replay as print_events
    from bridge.replay import start_of

    start = start_of(from_)
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} prints nothing", "give 1 or more")
    wrong = [text for text in subject or [] if not text or " " in text or "" in text.split(".")]
    if wrong:
        raise UsageError(f"--subject {wrong[0]!r} is no subject", "write --subject cdc.main.public.users, say")
    settings = _config()

    async def work() -> None:
        async with _nats(settings) as servers:
            with console.output("make room, and go on with --from"):
                async with Out(held=0 if follow else CHUNK) as out, structured.group() as tasks:
                    if follow:
                        tasks.start_soon(console.reader_left)
                    await print_events(
                        settings, servers, out.write, filters=subject or [], start=start, follow=follow, limit=limit
                    )
                    tasks.cancel_scope.cancel()

    return console.once(work)


@app.command
def drop(
    *,
    stream: Annotated[bool, Parameter(negative=())] = False,
    state: Annotated[bool, Parameter(negative=())] = False,
    yes: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Drop the slot of a bridge that is not to go on; PostgreSQL keeps WAL for it until then. Asks first.

    Refused while a bridge runs.

    Parameters
    ----------
    stream
        Delete the stream with all its messages, too.
    state
        Delete what the state bucket knows of this source, too. What indexes remember stays: `reindex` mends them.
    yes
        Do not ask.
    """
    from bridge import drop as dropping

    settings = _config()
    asked = dropping.Asked(stream, state, yes)
    # An embedded server that does not run has no bridge: it need not be started for the question.
    return dropping.command(settings, asked, _running(settings) if _reachable(settings) else None, _nats)


@app.command
def demo(*, seconds: int = 45, keep: Annotated[bool, Parameter(negative=())] = False) -> int:
    """Show everything on throwaway servers: a text archive, writers, an index, a rebuild with no downtime.

    Parameters
    ----------
    seconds
        How long it takes, about.
    keep
        Stay up at the end and print commands to try by hand; Ctrl-C ends it.
    """
    from bridge.demo import demo as show

    async def work() -> None:
        outcome.append(await show(seconds=seconds, keep=keep))

    outcome: list[bool] = []
    code = console.once(work)
    return code or (errors.EXIT_DONE if outcome == [True] else errors.EXIT_FOUND)


@app.command
def completion(shell: Literal["bash", "zsh", "fish"], /) -> int:
    """Print the script by which a shell completes commands and options.

    * bash: `bridge completion bash > ~/.local/share/bash-completion/completions/bridge`
    * fish: `bridge completion fish > ~/.config/fish/completions/bridge.fish`
    * zsh: `bridge completion zsh > FOLDER/_bridge`, where FOLDER is one of `fpath`

    It counts in the shells that are started from then on.

    Parameters
    ----------
    shell
        Which shell.
    """
    with console.output():
        sys.stdout.write(f"{app.generate_completion(prog_name='bridge', shell=shell).rstrip()}\n")
        sys.stdout.flush()
    return errors.EXIT_DONE


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(help="Configuration file; default bridge.toml, if it is there.")] = None,
    log_format: Annotated[log.Format, Parameter(help="Log lines for people, or a JSON object each.")] = "text",
    verbose: Annotated[
        int,
        Parameter(name=["--verbose", "-v"], count=True, help="Log more; -vv: with a traceback of what is unexpected."),
    ] = 0,
) -> int:
    """Options that every command takes."""
    log.configure(log_format, verbose=verbose > 0)
    _chosen.update(config=config, verbose=verbose, form=log_format)
    return int(app(tokens, exit_on_error=False, print_error=False, result_action="return_value") or 0)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the process's exit code. No traceback reaches a user without -vv."""
    console.open_streams()
    _chosen["form"] = "text"
    try:
        with console.output():
            code = int(app.meta(arguments, exit_on_error=False, print_error=False, result_action="return_value") or 0)
            sys.stdout.flush()
        return code
    except UnusedCliTokensError as error:
        unknown = error.unused_tokens or []
        meant = _meant(unknown[:1], [name for name in app if not name.startswith("-")])
        return _failed(f"there is no command or argument {' '.join(unknown)}{meant}", "see bridge --help")
    except CycloptsError as error:
        what = str(error).strip()
        if isinstance(error, UnknownOptionError) and "Did you mean" not in what:
            # The library looks among the command's own options only.
            what = f"{what.rstrip('.')}{_meant([error.token.keyword or error.token.value], COMMON)}"
        return _failed(what, f"see bridge {' '.join([*(error.command_chain or ()), '--help'])}")
    except BridgeError as error:
        waits = isinstance(error, Unavailable) and error.remedy.startswith("waiting")
        return _failed(error.what, "run this again once it is there" if waits else error.remedy, error.exit_code)
    except KeyboardInterrupt:
        return errors.EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has had enough; what is still buffered must not be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.EXIT_PIPE
    except Exception as error:
        if _chosen["verbose"] > 1:
            raise
        remedy = "this is a defect of bridge: run it again with -vv and report the traceback"
        return _failed(errors.unexpected(error), remedy, errors.EXIT_FOUND)


def _failed(what: str, remedy: str, code: int = errors.EXIT_USAGE) -> int:
    """Tell why a command ends, in the form of its log lines; the exit code."""
    if _chosen["form"] == "json":
        log.get().error("command failed", what=what, next=remedy, code=code)
    else:
        console.say(f"{what}\n  → {remedy}")
    return code


def _meant(given: list[str], known: list[str]) -> str:
    """What was probably meant, as a question."""
    close = difflib.get_close_matches(given[0], known, 1) if given else []
    return f"; did you mean {close[0]}?" if close else ""


def _config() -> Config:
    return configfile.chosen(_file())


def _file() -> Path | None:
    file: Path | None = _chosen["config"]
    return configfile.DEFAULT if file is None and configfile.DEFAULT.is_file() else file


def _options() -> list[str]:
    """The options by which another command has the configuration of this one."""
    file = _file()
    return [] if file is None else ["--config", str(file.absolute())]


def _show_mapping(settings: Config, name: str) -> int:
    from bridge.index.preview import preview

    async def work() -> None:
        found = await preview(settings, name, _running(settings))
        console.say("\n".join([f"for {found.engine}", *found.warnings]))
        with console.output():
            sys.stdout.write(f"{found.text}\n")
            sys.stdout.flush()

    return console.once(work)


def _reachable(settings: Config) -> bool:
    """Whether NATS may be there without being started: an embedded server only where a bridge runs it."""
    from bridge import embedded

    return not settings.stream.embedded or embedded.find(Path(settings.stream.store_dir)) is not None


@contextlib.asynccontextmanager
async def _nats(settings: Config) -> AsyncIterator[Servers]:
    """The servers to connect to; the embedded one is started unless a bridge runs it already."""
    if _reachable(settings):
        yield _running(settings)
        return
    async with _own(settings) as servers:
        yield servers


@contextlib.asynccontextmanager
async def _own(settings: Config) -> AsyncIterator[list[str]]:
    """The servers of the bridge itself: the embedded one is its own, and nobody else may run it."""
    if isinstance(settings.stream.servers, list):
        yield settings.stream.servers
        return
    from bridge import embedded

    folder = Path(settings.stream.store_dir)
    async with embedded.supervised(folder) as server:
        log.get().info("nats-server started", url=server.url, store_dir=str(folder))
        yield [server.url]


def _running(settings: Config) -> Servers:
    """The servers that somebody else runs. The embedded one belongs to the bridge, which may have moved it to another
    port since: it is asked for at each connection."""
    if isinstance(settings.stream.servers, list):
        return settings.stream.servers
    folder = Path(settings.stream.store_dir)

    def find() -> list[str]:
        from bridge import embedded

        url = embedded.find(folder)
        if url is None:
            raise errors.NotStarted(f"no bridge runs its nats-server on {folder}", "waiting for `bridge run`")
        return [url]

    return find


cli_index.add(app, _config, _nats)
cli_snapshot.add(app, _config, _nats)
cli_check.add(app, _config, _running)
cli_status.add(app, _config, _running)
