"""One thread for each tensor operation: the tests run side by side, and threads that wait for a core spin."""

import logging
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def plain_loggers() -> Iterator[None]:
    """Leave our loggers to the next test as a process begins with them, whatever fixtures of modules set, too."""
    yield
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] == "fedmedgan":
            logger = logging.getLogger(name)
            for handler in list(logger.handlers):
                logger.removeHandler(handler)
                handler.close()
            logger.setLevel(logging.NOTSET)
            logger.propagate = True
