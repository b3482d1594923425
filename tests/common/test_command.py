"""How a command line shows its help and its mistakes."""

import errno
import socket
import ssl
from importlib import import_module
from pathlib import Path
from typing import Annotated

import click
import pytest
import typer

from client.paths import Home
from common.command import OWN_NAMES, run_command
from common.errors import ExitCode
from server.consortium import Consortium

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


@app.command()
def read(file: Path, also: Path | None = None) -> None:
    """Read it."""
    print(file.read_text(), also)


def test_an_unreadable_path_is_the_commands_own_to_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither click answers first with how the command is used, nor does a traceback come of it."""

    def refuse(path: object, *_: object, **__: object) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("os.access", lambda *_, **__: False)
    monkeypatch.setattr(Path, "read_text", refuse)
    code, text = said(capsys, "read", str(tmp_path), "--also", str(tmp_path))
    assert (code, "Traceback" in text, "Usage" in text) == (ExitCode.STORAGE, False, False), text
    assert f"error: No permission for {tmp_path}." in text


@pytest.mark.parametrize("kind", [errno.ENAMETOOLONG, errno.EACCES])
def test_no_name_by_an_exception(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    names = str(tmp_path / "DOE"), None, str(tmp_path / "ROE")

    def refuse(*_: object, **__: object) -> str:
        raise OSError(kind, "text of the system", *names)

    monkeypatch.setattr(Path, "read_text", refuse)
    code, text = said(capsys, "read", str(tmp_path))
    assert code == (ExitCode.STORAGE if kind == errno.EACCES else ExitCode.INTERNAL)
    assert "/DOE" not in text, text
    assert "/ROE" not in text, text
    assert "whose name is not shown here" in text, text
    assert kind == errno.EACCES or "File name too long (errno 36)" in text


FEDERATION, KEY = "home/federation.toml", "home/keys/site.json"
HIDDEN = "something in home whose name is not shown here"


@pytest.mark.parametrize(
    ("arguments", "name", "where"),
    [
        (["home"], FEDERATION, FEDERATION),
        (["home"], KEY, KEY),
        (["home/"], KEY, KEY),
        (["./home"], KEY, KEY),
        (["home"], "{here}/" + KEY, KEY),
        (["{here}/home"], KEY, "{here}/" + KEY),
        (["home"], "home", "home"),
        (["home"], "home/keys/DOE", HIDDEN),
        (["home"], "home/DOE/site.json", HIDDEN),
        (["home"], b"home/DOE", HIDDEN),
        (["home"], "home/../home/DOE", HIDDEN),
        (["home", "--also=home/logs"], "home/logs/DOE", "something in home/logs whose name is not shown here"),
        (["home"], "homes/DOE", "a file or folder whose name is not shown here"),
        (["home", "--also="], "DOE", "a file or folder whose name is not shown here"),
        (["home"], None, "something (the system names no file)"),
        (["home"], 7, "something (the system names no file)"),
    ],
)
def test_says_where(
    arguments: list[str],
    name: str | bytes | int | None,
    where: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Below an argument that argument is named, and in it our own files; what else lies there may name a patient."""
    monkeypatch.chdir(tmp_path)
    given = [argument.format(here=tmp_path) for argument in arguments]
    named = name.format(here=tmp_path) if isinstance(name, str) else name

    def refuse(*_: object, **__: object) -> str:
        raise OSError(errno.EACCES, "text of the system", named)

    monkeypatch.setattr(Path, "read_text", refuse)
    code, text = said(capsys, "read", *given)
    assert (code, f"error: No permission for {where.format(here=tmp_path)}. " in text) == (ExitCode.STORAGE, True), text
    assert "DOE" not in text, text


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ssl.SSLCertVerificationError(1, "certificate of DOE"), "SSLCertVerificationError"),
        (socket.gaierror(-2, "Name or service not known"), "gaierror"),
        (ConnectionResetError(errno.ECONNRESET, "text"), "Connection reset by peer (errno 104)"),
        (OSError("DOE"), "OSError"),
    ],
)
def test_an_error_of_no_file_is_not_told_as_one(
    error: OSError, reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(Path, "read_text", refuse)
    code, text = said(capsys, "read", "home")
    assert (code, "DOE" in text) == (ExitCode.INTERNAL, False), text
    assert f"refused something (the system names no file), and nothing here expected it: {reason}." in text, text


def test_every_fixed_path_of_a_home_is_one_of_our_names() -> None:
    for home in (Home(Path("home")), Consortium(Path("home"))):
        properties = [name for name, kind in vars(type(home)).items() if isinstance(kind, property)]
        paths = [getattr(home, name) for name in properties if name != "database"]  # federation.toml names that one
        assert len(paths) > 10
        assert {part for path in paths for part in path.relative_to("home").parts} <= OWN_NAMES


def commands(module: str, name: str) -> list[tuple[str, list[str], str]]:
    """Return the entry, the words and the usage of every command of a command line, groups and what is in them too."""

    def below(command: click.Command, words: list[str]) -> list[list[str]]:
        inner = command.commands.values() if isinstance(command, click.Group) else ()
        return [words, *(found for one in inner for found in below(one, [*words, str(one.name)]))]

    listed = below(typer.main.get_command(import_module(f"{module}.cli").app), [])
    entry = f"{module}.{'cli' if module == 'simulations' else 'entry'}"
    return [(entry, words, " ".join([name, *words])) for words in listed]


EVERY = [
    *commands("client", "fedmedgan-site"),
    *commands("server", "fedmedgan-coordinator"),
    *commands("simulations", "fedmedgan-simulate"),
]


@pytest.mark.parametrize(("module", "words", "name"), EVERY, ids=[name for _, _, name in EVERY])
def test_usage_has_the_commands_name_however_it_was_started(
    module: str, words: list[str], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [f"/somewhere/{module.replace('.', '/')}.py"])
    with pytest.raises(SystemExit) as ended:
        import_module(module).main([*words, "--nonsense"])
    assert ended.value.code == ExitCode.USAGE
    assert f"Usage: {name} [OPTIONS]" in capsys.readouterr().err
