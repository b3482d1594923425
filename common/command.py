"""How the three command lines end: every error a person can mend is a message and an exit code, never a traceback."""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click
import typer

from common.errors import ExitCode, FedmedganError


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
          which may name patients, but for those that the command line itself names.
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
        said = f"{os.strerror(error.errno)} (errno {error.errno})" if error.errno else "no number is given"
        where = f"{_named(error, given)}, and nothing here expected it: {said}"
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
    """Return the file of an error where the command line names it itself, else that it is one."""
    return str(error.filename) if error.filename in given else "a file or folder whose name is not shown here"


def _leave_paths_to_commands(command: click.Command) -> None:
    """Keep click from looking whether paths can be read: the command says it better, and with its own exit code."""
    for parameter in command.params:
        if isinstance(parameter.type, click.Path):
            parameter.type.readable = False
    if isinstance(command, click.Group):
        for one in command.commands.values():
            _leave_paths_to_commands(one)
