"""The entry of `fedmedgan-simulate`."""

from typing import NoReturn

from common.begin import Command, begin


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line."""
    begin(_load, arguments)


def _load() -> Command:
    from simulations.cli import main as run

    return run


if __name__ == "__main__":
    main()
