"""`fedmedgan-site check|import` in a process of their own: it holds no torch, which takes seconds to import."""

from typing import NoReturn

import typer

from client import images
from common.command import run_command

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)
app.command("check")(images.check)
app.command("import")(images.import_)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line."""
    run_command(app, arguments, name="fedmedgan-site")
