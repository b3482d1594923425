"""How a command line shows its help and its mistakes."""

from typing import Annotated

import pytest
import typer

from common.command import run_command
from common.errors import ExitCode

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command()
def start(home: Annotated[str, typer.Argument(help="The site's home folder.")]) -> None:
    """Start it."""


@app.command()
def stop() -> None:
    """Stop it."""


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    with pytest.raises(SystemExit) as ended:
        run_command(app, list(arguments))
    captured = capsys.readouterr()
    return ended.value.code, captured.out + captured.err


def test_help_explains_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, "start", "--help")
    plain = " ".join(text.replace("│", " ").split())
    assert (code, plain.count("The site's home folder. [required]")) == (0, 1), text


def test_a_wrong_word_is_answered_once(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, "strat")
    assert (code, text.lower().count("did you mean")) == (ExitCode.USAGE, 1), text
