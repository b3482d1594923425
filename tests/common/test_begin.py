"""The three command lines before any command is there."""

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

import client.entry
import server.entry
import simulations.entry
from common.errors import ExitCode


class Stopped(importlib.abc.MetaPathFinder):
    """Ctrl-C while a module is imported."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == self.name:
            raise KeyboardInterrupt
        return None


@pytest.mark.parametrize(
    ("entry", "command", "module"),
    [
        (client.entry, "init", "client.cli"),
        (client.entry, "pull", "client.pull.command"),
        (client.entry, "start", "client.operate"),
        (server.entry, "runs", "server.cli"),
        (simulations.entry, "run", "simulations.cli"),
    ],
)
def test_interrupted_while_modules_are_imported(
    entry: ModuleType,
    command: str,
    module: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Stopped(module), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        entry.main([command])
    assert ended.value.code == ExitCode.INTERRUPTED
    assert capsys.readouterr().err == "stopped\n"
