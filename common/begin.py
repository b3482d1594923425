"""How the command lines begin: Ctrl-C ends them with a word also while modules are imported, which takes seconds."""

import sys
from collections.abc import Callable
from typing import NoReturn

from common.errors import ExitCode

Command = Callable[[list[str] | None], NoReturn]


def begin(load: Callable[[], Command], arguments: list[str] | None) -> NoReturn:
    """Import a command line and run it.

    Args:
        load: Imports it.
        arguments: What stands behind the command's name; None: as the process was started.
    """
    try:
        load()(arguments)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(ExitCode.INTERRUPTED)
