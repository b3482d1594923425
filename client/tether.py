"""Run one of our commands as a child that ends when its supervisor does: `python -m client.tether MODULE ARGUMENTS`.

The supervisor holds the other end of standard input; when the supervisor is gone, even by kill -9, that end closes.
"""

import importlib
import os
import signal
import sys
import threading


def _wait_for_the_end() -> None:
    while os.read(0, 1):  # not by sys.stdin, whose lock would be held while the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_wait_for_the_end, daemon=True).start()
    importlib.import_module(sys.argv[1]).main(sys.argv[2:])
