"""The entry of `fedmedgan-site`: relay, supervisor, pull, check and import run without what only the agent needs."""

import sys
from typing import NoReturn

from common.begin import Command, begin

LIGHT = frozenset({"start", "relay", "status", "passphrase"})


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line."""
    given = sys.argv[1:] if arguments is None else arguments
    begin(lambda: _load(given[0] if given else ""), given)


def _load(command: str) -> Command:
    if command in LIGHT:
        from client.operate import main as run
    elif command == "pull":
        from client.pull.command import main as run
    elif command in {"check", "import"}:
        from client.bring import main as run
    else:
        from client.cli import main as run
    return run


if __name__ == "__main__":
    main()
