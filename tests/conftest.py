"""One thread for each tensor operation: the tests run side by side, and threads that wait for a core spin."""

import logging
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """Leave the levels of our loggers, and where their lines go, to the next test as this one found them."""
    ours = ("fedmedgan", *(name for name in logging.root.manager.loggerDict if name.startswith("fedmedgan.")))
    before = {name: (logging.getLogger(name).level, logging.getLogger(name).propagate) for name in ours}
    yield
    for name in logging.root.manager.loggerDict:
        if name.split(".")[0] == "fedmedgan":
            level, propagate = before.get(name, (logging.NOTSET, True))
            logging.getLogger(name).setLevel(level)
            logging.getLogger(name).propagate = propagate
