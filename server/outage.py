"""Runs while the link hears nobody: what Flower holds against a run is not held for the link's own absence.

Out of scope: what a run does while its link is away (server/exchange, server/run_process).
"""

import time
from datetime import timedelta
from typing import cast

from flwr.server.superlink.linkstate import LinkStateFactory, SqlLinkState
from flwr.supercore.date import now
from flwr.supercore.state.schema.corestate_models import Task
from sqlalchemy import update

from server.connections import Seldom

PATIENCE_S = 180.0
"""A run asks again for a link that was away every 20 s, in several threads of which one waits for the other."""
DEAF_S = 5.0
"""A link that has heard nobody for so long does not hold it against the runs that it did not hear them."""
_DEAF = Seldom("the link hears nobody; the runs get more time to be heard; looks since the last such line: %d")


def keep_runs(states: LinkStateFactory, patience_s: float = PATIENCE_S) -> None:
    """Give the runs that were under way when the link went away time to be heard of again.

    Flower fails a run of which nothing was heard for a minute, also when it was the link that was not there. The run
    itself waits for the link as long as it takes. One that is not heard in `patience_s` fails as ever. Call this before
    the link answers anybody.

    Guarantees:
        - an_outage_ends_no_run: However long the link was away, a run that is there when it comes back goes on.
    """
    state = cast("SqlLinkState", states.state())
    with state.session() as session:
        alive = update(Task).where(Task.token.is_not(None), Task.active_until.is_not(None))
        session.execute(alive.values(active_until=now() + timedelta(seconds=patience_s)))


def keep_unheard_runs(states: LinkStateFactory, heard: float) -> None:
    """Give the runs time as after an outage while the link itself can hear nobody.

    Args:
        states: The link's database.
        heard: When the link last took what came, by time.monotonic().

    Guarantees:
        - deafness_ends_no_run: However long the link accepts nothing, or its loop stands still, no run fails for it.
    """
    if time.monotonic() - heard > DEAF_S:
        _DEAF()
        keep_runs(states)
