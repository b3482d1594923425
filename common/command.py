"""How the three command lines end: every error a person can mend is a message and an exit code, never a traceback."""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click
import typer

from common.errors import ExitCode, FedmedganError

OWN_NAMES = frozenset(
    (
        # of a site's home
        *("policy.toml", "site.toml", "federation.json", "bundles.txt", "agent.sock", "agent.lock", "keys"),
        *("site.json", "node.key", "node.pub", "next.key", "vault.json", "ledger", "ledger.jsonl"),
        *("ledger.head.json", "ledger.lock", "journal", "journal.jsonl", "journal.head.json", "journal.lock"),
        *("replies", "logs", "agent.log", "relay.log", "relay.json", "relay.lock", "start.log", "start.json"),
        *("start.lock", "serve.lock"),
        # of a coordinator's
        *("federation.toml", "ca.key", "ca.pem", "server.key", "server.pem", "coordinator.json", "control.token"),
        *("superexec.secret", "submit.lock", "running", "sites", "nodes.json", "runs"),
    )
)
"""What we call files and folders of a home: these names tell of no patient."""


def run_command(
    app: typer.Typer, arguments: Sequence[str] | None = None, interrupted: str = "stopped", name: str | None = None
) -> NoReturn:
    """Run a Typer application and exit with a documented code.

    Args:
        app: The commands.
        arguments: What stands behind the command's name; None: as the process was started.
        interrupted: What to say on Ctrl-C.
        name: The command's name, however the process was started (`python -m`); None: as it was started.

    Guarantees:
        - no_name_by_an_exception: An error of the system that no command expected is told without the names of files,
          which may name patients, but for those that the command line itself names and, in them, our own.
        - says_where: It is told in which file or folder of the command line it was, and never as one of a file where
          the system names none.
    """
    given = sys.argv[1:] if arguments is None else arguments
    app.suggest_commands = False  # click suggests the same beside it
    command = typer.main.get_command(app)
    _leave_paths_to_commands(command)
    try:
        code = command(list(given), prog_name=name, standalone_mode=False)
    except FedmedganError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except PermissionError as error:
        print(f"error: No permission for {_named(error, given)}. Mend it, or run as its user.", file=sys.stderr)
        code = ExitCode.STORAGE
    except OSError as error:
        traceback.print_tb(error.__traceback__)  # lines of the program; the error's own text would name the file
        where = f"{_named(error, given)}, and nothing here expected it: {_reason(error)}"
        print(f"error: The system refused {where}. Report it, with the lines above.", file=sys.stderr)
        code = ExitCode.INTERNAL
    except click.ClickException as error:
        error.show()
        code = ExitCode.USAGE
    except click.Abort:
        code = ExitCode.INTERRUPTED
    if code == ExitCode.INTERRUPTED:  # Typer turns Ctrl-C into this code and says nothing
        print(interrupted, file=sys.stderr)
    sys.exit(code or ExitCode.OK)


def _named(error: OSError, given: Sequence[str]) -> str:
    """Return where an error was as far as the command line names it; of what lies in there only our own files."""
    if not isinstance(error.filename, str | bytes):
        return "something (the system names no file)"
    path = _absolute(os.fsdecode(error.filename))
    # an option's value may stand behind `=`; the longest argument says most
    for argument in sorted((word.partition("=")[2] if word[:1] == "-" else word for word in given), key=len)[::-1]:
        if argument and path.is_relative_to(_absolute(argument)):
            below = path.relative_to(_absolute(argument)).parts
            shown = OWN_NAMES.issuperset(below)
            return str(Path(argument, *below)) if shown else f"something in {argument} whose name is not shown here"
    return "a file or folder whose name is not shown here"


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - as typed: links are not followed, but `..` is


def _reason(error: OSError) -> str:
    """Return what the system says by number; the numbers of libraries (TLS, names of hosts) are their own."""
    if type(error).__module__ != "builtins" or not error.errno:
        return type(error).__name__
    return f"{os.strerror(error.errno)} (errno {error.errno})"


def _leave_paths_to_commands(command: click.Command) -> None:
    """Keep click from looking whether paths can be read: the command says it better, and with its own exit code."""
    for parameter in command.params:
        if isinstance(parameter.type, click.Path):
            parameter.type.readable = False
    if isinstance(command, click.Group):
        for one in command.commands.values():
            _leave_paths_to_commands(one)
