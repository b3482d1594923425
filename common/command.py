"""How the three command lines end: every error a person can mend is a message and an exit code, never a traceback."""

import sys
from collections.abc import Sequence
from typing import NoReturn

import click
import typer

from common.errors import ExitCode, FedmedganError


def run_command(app: typer.Typer, arguments: Sequence[str] | None = None, interrupted: str = "stopped") -> NoReturn:
    """Run a Typer application and exit with a documented code.

    Args:
        app: The commands.
        arguments: What stands behind the command's name; None: as the process was started.
        interrupted: What to say on Ctrl-C.
    """
    app.suggest_commands = False  # click suggests the same beside it
    try:
        code = app(arguments, standalone_mode=False)
    except FedmedganError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = ExitCode.USAGE
    except click.Abort:
        code = ExitCode.INTERRUPTED
    if code == ExitCode.INTERRUPTED:  # Typer turns Ctrl-C into this code and says nothing
        print(interrupted, file=sys.stderr)
    sys.exit(code or ExitCode.OK)
