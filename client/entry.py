"""The entry of `fedmedgan-site`: its commands for relay, supervisor and pull run without what only the agent needs."""

import sys
from typing import NoReturn

LIGHT = frozenset({"start", "relay", "status", "passphrase"})


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in LIGHT:
        from client.operate import main as run
    elif given and given[0] == "pull":
        from client.pull.command import main as run
    else:
        from client.cli import main as run
    run(given)


if __name__ == "__main__":
    main()
