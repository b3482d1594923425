"""The exit code of a pull."""

import pytest

from client.pull.archive import Reason
from client.pull.asked import Row
from client.pull.tally import Failure, Tally
from common.errors import ExitCode


@pytest.mark.parametrize("reason", list(Reason))
def test_what_failed_but_was_not_missed_is_told_by_the_exit_code(reason: Reason) -> None:
    """A query that gets HTTP 500 expects nothing, so nothing is missing: it is no success all the same."""
    code = Tally(failures=[Failure(Row(2), reason)]).exit_code(fetched=True)
    of_the_list = {Reason.NOT_FOUND, Reason.OTHERS, Reason.NO_ISSUER}
    assert code == (ExitCode.DATA if reason in of_the_list else ExitCode.OK if reason is Reason.NOT_ASKED else 13)
