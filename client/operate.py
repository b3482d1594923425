"""`fedmedgan-site start|relay|status`, in a module of their own: these processes hold no torch and no patient code."""

import logging
import os
import signal
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from client import passphrase
from client.joining import load_pinned
from client.logs import log_to
from client.paths import Home, require_closed_home
from client.relay_state import STOPPED, State, read_state, why_ended
from client.supervise import Child, agent_command, relay_command, supervise
from common.command import run_command
from common.crypto import is_sealed, load_key
from common.errors import ConfigError, ExitCode, FedmedganError, StorageError
from common.flower_environment import flower_environment
from common.lock import alone, is_held
from common.passphrase import Passphrase

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)
app.command("passphrase")(passphrase.change)

HomeArgument = Annotated[Path, typer.Argument(help="The site's home folder.")]
SocketOption = Annotated[Path | None, typer.Option(help="The agent's Unix socket; HOME/agent.sock unless named.")]

MAX_SOCKET_BYTES = 107
CONTACT_LOST_S = 60
GOODBYE_S = 120.0
"""What the relay of a `start` that was killed may take to sign off at the link, while the next one waits."""
LOG = logging.getLogger("fedmedgan.start")


@app.command()
def start(home: HomeArgument, socket: SocketOption = None) -> None:
    """Run agent and relay and start them anew when they end, until SIGTERM or Ctrl-C.

    Ends with a child's code where only a person can mend what is wrong. An identity key under a passphrase is opened
    once before anything is started; the agent gets the passphrase through a pipe.
    """
    opened = Home(home.absolute())
    if not opened.policy.exists():
        raise StorageError(f"Expected a site's home in {home}. Make one: fedmedgan-site init {home} ...")
    require_closed_home(opened)
    load_pinned(opened.folder)
    os.environ.update(flower_environment(opened.folder, local=False))  # for the relay
    path, given = _socket(opened, socket), _passphrase(opened)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    with alone(opened.start_lock, "`start`"):
        log_to(opened.start_log)
        print(f"started; logs in {opened.start_log.parent}; see: fedmedgan-site status {home}", flush=True)
        children = [
            Child("agent", agent_command(opened.folder, path), given),
            Child("relay", relay_command(opened.folder, path), again=("--again",)),
        ]
        code = supervise(children, opened.start_state, stop)
    raise typer.Exit(code)


@app.command()
def relay(
    home: HomeArgument,
    socket: SocketOption = None,
    again: Annotated[bool, typer.Option("--again", hidden=True)] = False,  # `start` has told what ended the last one
) -> None:
    """Run the relay alone, for service managers and containers, until SIGTERM or Ctrl-C.

    Of HOME it needs federation.json and keys/node.key, unless the service manager hands it both as the credentials
    `federation.json` and `node.key`; it may have bundles.txt, and writes logs/. The agent's home may be elsewhere,
    under another user.
    """
    os.environ.update(flower_environment(home.absolute(), local=False))
    from client.relay import run  # imports flwr, which reads the environment as it is imported

    opened = Home(home.absolute())
    require_closed_home(opened)
    log_to(opened.relay_log)
    logging.getLogger("flwr").handlers.clear()  # what it says stands in the relay's log, once
    told, state = why_ended(opened.relay_state) if again else "", State(opened.relay_state)
    try:
        with alone(opened.relay_lock, "relay", GOODBYE_S):
            run(opened, _socket(opened, socket), state)
    except FedmedganError as error:
        LOG.error("%s", error)
        if str(error) == told and not state.node_id:  # one that was connected has come to a new end
            raise typer.Exit(error.exit_code) from None
        raise


@app.command()
def status(home: HomeArgument) -> None:
    """Show whether this site has joined, is started and is connected. Exits 8 where it is not connected."""
    opened = Home(home.absolute())
    if not opened.folder.is_dir():
        raise StorageError(f"Found no folder {home}. Name the home that `fedmedgan-site init` made, or the relay's.")
    pinned = load_pinned(opened.folder)
    print(f"site {pinned.site} of {pinned.federation}; coordinator {pinned.host}:{pinned.port}")
    print(f"bundles: {_bundles(opened)}")
    children = read_state(opened.start_state)
    started = is_held(opened.start_lock)
    print(f"start: {'running, process ' + str(children.get('pid')) if started else 'not running'}")
    for name in ("agent", "relay") if started else ():
        print(f"{name}: {_described(children.get(name))}")
    seen = read_state(opened.relay_state)
    lost_s = _seconds_since(seen.get("contact"))
    away = _why_not_connected(is_held(opened.relay_lock), str(seen.get("ended") or ""), lost_s)
    contact = f"last contact {lost_s:.0f} s ago" if lost_s is not None else "never connected; see logs/relay.log"
    print(f"link: {f'NOT connected: {away}; ' if away else 'connected, '}{contact}")
    if lost_s is not None:
        last = seen.get("last_message") or "never"
        print(f"node {seen.get('node')}: {seen.get('messages')} messages since {seen.get('started')}, the last {last}")
    if away:
        raise typer.Exit(ExitCode.FEDERATION)


def _why_not_connected(runs: bool, ended: str, lost_s: float | None) -> str:
    """Return nothing where the relay runs and was in contact lately, and did not say since that it ends."""
    if ended and not (runs and ended == STOPPED):
        return ended
    if not runs:
        return "no relay runs"
    return "" if lost_s is not None and lost_s < CONTACT_LOST_S and not ended else "no contact"


def _socket(home: Home, socket: Path | None) -> Path:
    path = (socket or home.socket).absolute()
    if len(bytes(path)) > MAX_SOCKET_BYTES:
        raise ConfigError(
            f"Expected a socket's path of at most {MAX_SOCKET_BYTES} bytes, {path} has {len(bytes(path))}. Name "
            "a shorter one: --socket /run/fedmedgan/agent.sock"
        )
    return path


def _passphrase(home: Home) -> Passphrase | None:
    if not is_sealed(home.key):
        return None
    given = passphrase.obtain()
    load_key(home.key, lambda: given)
    return given


def _bundles(home: Home) -> str:
    if not home.bundles.exists():
        return "any (no bundles.txt); none is ever opened"
    return f"only those in {home.bundles.name}; none is ever opened"


def _described(child: Any) -> str:
    if not isinstance(child, dict):
        return "unknown"
    running = f"process {child.get('pid')}" if child.get("pid") else f"ended with code {child.get('code')}, starts anew"
    return f"{running}; starts: {child.get('starts')}"


def _seconds_since(time: Any) -> float | None:
    try:
        return max((datetime.now(UTC) - datetime.fromisoformat(str(time))).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line."""
    run_command(app, arguments, name="fedmedgan-site")


if __name__ == "__main__":
    main()
