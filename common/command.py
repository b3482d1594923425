"""How the three command lines end: every error a person can mend is a message and an exit code, never a traceback."""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click
import typer
import typer.core

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


def _show_help_as_it_is() -> None:
    """Keep Typer's help of arguments, which click from 8.5 on forgets, and write it without marks for rich.

    flwr holds typer below the release that knows this click.
    """
    plain = typer.core.TyperArgument.__init__

    def keeping(self: typer.core.TyperArgument, **given: Any) -> None:
        plain(self, **given)
        self.help = given.get("help")

    typer.core.TyperArgument.__init__ = keeping
    setattr(typer.core.TyperCommand, "format_arguments", _nothing)  # noqa: B010  # Typer lists them already
    setattr(typer.core, "HAS_RICH", False)  # noqa: B010  # a constant to the type checker


def _nothing(*_: object) -> None:
    """Write nothing."""


_show_help_as_it_is()
